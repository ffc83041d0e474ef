"""What to know of data before training."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pandas as pd
from anndata import AnnData

from pertura.data import _diagnostics as diagnose
from pertura.data._diagnostics import Cells, Finding
from pertura.data._fields import sources
from pertura.data._library import describe, find_library
from pertura.data._validation import (
    _names,
    check_doses,
    check_names,
    check_obs_key,
    check_perturbations,
    check_size_factor,
)
from pertura.data._vocabulary import parse_label

_FEW_CELLS, _MANY_DOSES = 10, 20
_MAX_CELLS = 100_000


def check(
    adata: AnnData,
    *,
    perturbation_key: str,
    control: str,
    layer: str | None = None,
    context_key: str | None = None,
    dose_key: str | None = None,
    batch_key: str | None = None,
    size_factor_key: str | None = None,
    delimiter: str = "+",
    seed: int = 0,
) -> pd.DataFrame:
    """Tell what a user should know of data before training: one row per check.

    Nothing is changed. Arguments are those of ``setup_anndata``, which runs the cheap checks itself and logs what is serious.

    Parameters
    ----------
    adata
        Cells x genes, in memory or backed; a view is fine.
    perturbation_key, control, layer, context_key, dose_key, batch_key, size_factor_key, delimiter
        As in ``setup_anndata``.
    seed
        Of the choice of cells: of more than 100,000, as many random ones are read for scale, library and depth.

    Returns
    -------
    DataFrame with columns ``check``; ``status``: ``"ok"``, ``"warning"`` or ``"problem"`` (which setup refuses, or no model can make
    good); ``where``: what was looked at; ``found``; and ``what to do``.

    Raises
    ------
    ValueError
        If an argument names nothing in `adata`.

    Examples
    --------
    >>> adata = pertura.datasets.kang_2018_mini()
    >>> table = pertura.pp.check(
    ...     adata, perturbation_key="condition", control="ctrl", context_key="cell_type", layer="counts"
    ... )
    >>> set(table["status"])
    {'ok'}
    """
    keys = {
        "perturbation_key": perturbation_key,
        "context_key": context_key,
        "dose_key": dose_key,
        "batch_key": batch_key,
        "size_factor_key": size_factor_key,
    }
    for argument, key in keys.items():
        if key is not None and key not in adata.obs:
            check_obs_key(adata, argument, key)
    if layer is not None and layer not in adata.layers:
        raise ValueError(
            f"`layer`: {layer!r} is not in `adata.layers`, which has {_names(adata.layers) or 'no entries'}."
        )
    if adata.n_obs == 0 or adata.n_vars == 0 or (layer is None and adata.X is None):
        raise ValueError(
            "`adata` has no expression. Check the filtering, or name the layer with the expression (`layer`)."
        )
    cells = Cells.of(adata, layer, perturbation_key, control, context_key, _MAX_CELLS, seed)
    asked = {**keys, "delimiter": delimiter, "control": control}
    findings = [*_expression(cells, size_factor_key), *_labels(adata, asked), *_questions(adata, asked)]
    return pd.DataFrame(findings).rename(columns={"do": "what to do"})


def _refused(check: str, where: str, ok: str, *calls: Callable[[], Any]) -> Finding:
    """Whether setup would refuse the data."""
    try:
        for call in calls:
            call()
    except ValueError as error:
        found, _, do = str(error).partition(". ")
        return Finding(check, "problem", where, found, do)
    return Finding(check, "ok", where, ok)


# -- expression -----------------------------------------------------------------------------------------------------------


def _expression(cells: Cells, size_factor_key: str | None) -> Iterator[Finding]:
    adata = cells.adata
    scale = diagnose.scale_of(diagnose._values(adata, cells.layer), cells.rows)
    yield diagnose.check_scale(cells, scale)
    yield diagnose.check_likelihood(cells, scale)
    yield _refused("names", "adata", "genes and cells have unique names", lambda: check_names(adata))
    sizes = None
    if size_factor_key is not None:
        kind = "counts" if scale == "counts" else "continuous"
        found = _refused(
            "size factors",
            f"adata.obs[{size_factor_key!r}]",
            "positive numbers",
            lambda: check_size_factor(adata, size_factor_key, kind),
        )
        yield found
        sizes = adata.obs[size_factor_key].to_numpy() if found.status == "ok" else None
    library, share = diagnose.depth_of(cells, scale, sizes)
    yield _library(cells, scale, share, size_factor_key)
    yield diagnose.check_depth(cells, library)


def _library(cells: Cells, scale: str, share: float | None, size_factor_key: str | None) -> Finding:
    """Which library setup would take, by the cells that are read, and whether the genes are all of it."""
    if scale != "counts":
        return Finding("library", "ok", cells.where, "not used: only counts are divided by it")
    adata = cells.adata
    # libraries are those of cells, whatever else their AnnData holds
    some = AnnData(
        obs=adata.obs.iloc[cells.rows],
        var=pd.DataFrame(index=adata.var_names),
        X=None if adata.X is None else adata.X[cells.rows],
        layers={} if cells.layer is None else {cells.layer: adata.layers[cells.layer][cells.rows]},
    )
    expression, x = sources(some, cells.layer, some.var_names, "counts", size_factor_key is None)
    try:
        state, _ = find_library(expression, x, some.obs, cells.layer, size_factor_key)
    except ValueError as error:
        found, _, do = str(error).partition(". ")
        return Finding("library", "problem", cells.where, found, do)
    found = describe(state, adata.n_vars)
    if state["source"] == "total" and share is not None and share < diagnose._ALL_GENES:
        return Finding(
            "library",
            "warning",
            cells.where,
            f"{found}; these are {share:.0%} of the whole library",
            "Keep the total counts of all genes in a column and name it `size_factor_key`, so that expression is per 10,000 of the whole.",
        )
    return Finding("library", "ok", cells.where, found)


# -- labels ---------------------------------------------------------------------------------------------------------------


def _labels(adata: AnnData, asked: dict[str, Any]) -> Iterator[Finding]:
    key, control, delimiter = asked["perturbation_key"], asked["control"], asked["delimiter"]
    where = f"adata.obs[{key!r}]"
    label = diagnose._text(adata.obs[key])
    missing = int(label.isna().sum())
    if missing:
        yield Finding(
            "labels",
            "problem",
            where,
            f"{missing} of {adata.n_obs} cells have no label",
            "Drop them, or call gRNAs with `pertura.pp.call_guides` if they come from a screen.",
        )
    known = AnnData(obs=adata.obs[label.notna().to_numpy()]) if missing else adata
    if not missing or known.n_obs:
        found = _refused(
            "perturbations",
            where,
            f"{label.nunique() - 1} perturbed labels beside {control!r}",
            lambda: check_perturbations(known, key, control, delimiter),
        )
        yield found
    context_key = asked["context_key"]
    context = pd.Series("all", label.index)
    for name in ("context_key", "batch_key"):
        if asked[name] is not None:
            yield _refused(
                name[:-4],
                f"adata.obs[{asked[name]!r}]",
                "every cell has one",
                lambda n=name: check_obs_key(adata, n, asked[n]),
            )
    if context_key is not None:
        context = diagnose._text(adata.obs[context_key])
    yield diagnose.check_non_targeting(pd.Index(label.dropna().unique()), control, delimiter, where)
    yield diagnose.check_controls(
        label, context, control, where if context_key is None else f"adata.obs[{context_key!r}]"
    )
    yield _few_cells(label, context, where)
    if asked["batch_key"] is not None:
        yield _batches(label == control, diagnose._text(adata.obs[asked["batch_key"]]), context, asked["batch_key"])
    if asked["dose_key"] is not None:
        yield from _doses(adata, asked)


def _few_cells(label: pd.Series, context: pd.Series, where: str) -> Finding:
    n = pd.Series(label.str.cat(context, sep=" in ") if context.nunique() > 1 else label).value_counts()
    few = n[n < _FEW_CELLS]
    found = f"{len(n)} conditions, of {int(n.min()) if len(n) else 0} to {int(n.max()) if len(n) else 0} cells"
    if few.empty:
        return Finding("cells", "ok", where, found)
    found += f"; {len(few)} have fewer than {_FEW_CELLS}: {_names(few.index, 4)}"
    return Finding(
        "cells", "warning", where, found, "Their measured effects are mostly noise; expect wide intervals there."
    )


def _batches(is_control: pd.Series, batch: pd.Series, context: pd.Series, key: str) -> Finding:
    where = f"adata.obs[{key!r}]"
    both = context.astype(str).str.cat(batch.astype(str), sep=" / ")
    share = float((~both[~is_control].isin(set(both[is_control]))).mean()) if (~is_control).any() else 0.0
    if batch.nunique() < 2:
        return Finding("batches", "ok", where, "one batch")
    if share < 0.1:
        return Finding("batches", "ok", where, f"{batch.nunique()} batches; perturbed cells have controls in theirs")
    return Finding(
        "batches",
        "warning",
        where,
        f"{share:.0%} of the perturbed cells have no controls in their batch (and context)",
        "What the batch does can not be told from what the perturbation does: leave `batch_key` out, or add controls.",
    )


def _doses(adata: AnnData, asked: dict[str, Any]) -> Iterator[Finding]:
    key, where = asked["dose_key"], f"adata.obs[{asked['dose_key']!r}]"
    perturbation_key, control = asked["perturbation_key"], asked["control"]
    found = _refused("doses", where, "", lambda: check_doses(adata, key, perturbation_key, control, asked["delimiter"]))
    if found.status != "ok" or not pd.api.types.is_numeric_dtype(adata.obs[key]):
        yield found._replace(found=found.found or "texts, one dose for each member")
        return
    dose, is_control = adata.obs[key], adata.obs[perturbation_key].astype(str) == control
    n_zero, n_dosed = int((dose[~is_control] == 0).sum()), int((dose[is_control] > 0).sum())
    n = dose[~is_control].groupby(adata.obs.loc[~is_control, perturbation_key].astype(str)).nunique()
    text = f"{int(n.min())} to {int(n.max())} doses of a perturbation" if len(n) else "none"
    if n_zero:
        text += f"; {n_zero} perturbed cells have dose 0 and count as controls"
    if n_dosed:
        text += f"; {n_dosed} controls have a dose, which is not used"
    many = bool(len(n)) and n.max() > _MANY_DOSES
    do = "Relabel the cells of dose 0 if they are no controls." if n_zero else ""
    do = "Round doses to those that were given: rounding errors make new ones." if many else do
    yield Finding("doses", "warning" if n_zero or many else "ok", where, text, do)


# -- questions ------------------------------------------------------------------------------------------------------------


def _questions(adata: AnnData, asked: dict[str, Any]) -> Iterator[Finding]:
    """What the data can be asked, which models fit, and what they have to beat."""
    label = diagnose._text(adata.obs[asked["perturbation_key"]])
    control, delimiter = asked["control"], asked["delimiter"]
    members = {text: parse_label(text, control, delimiter) for text in label.dropna().unique()}
    singles = {m for names in members.values() for m in names}
    where = f"adata.obs[{asked['perturbation_key']!r}]"

    def fits(question: str, models: str, baseline: str) -> Finding:
        return Finding("models", "ok", where, question, f"Models: {models}. Baseline to beat: {baseline}.")

    if asked["context_key"] is not None:
        context = diagnose._text(adata.obs[asked["context_key"]])
        seen = pd.crosstab(context, label) > 0
        if len(seen) > 1:
            absent = int((~seen.drop(columns=control, errors="ignore")).to_numpy().sum())
            found = f"{len(seen)} contexts; {absent} pairs of perturbation and context were not measured"
            yield fits(
                f"a context where a perturbation is missing ({found})", "PertVAE, PerturbX", "Linear, MeanEffect"
            )
    several = [text for text, names in members.items() if len(names) > 1]
    if several:
        yield fits(f"combinations ({len(several)} were measured)", "SAMSVAE, CPA", "Additive")
    dose = None if asked["dose_key"] is None else adata.obs[asked["dose_key"]]
    if dose is not None and dose.nunique() > 2:
        yield fits(f"doses ({dose.nunique()} different ones)", "CPA, PertVAE", "MeanEffect")
    if len(singles) > 1:
        yield fits(f"a screen of {len(singles)} perturbations with few cells each", "SAMSVAE", "MeanEffect, Linear")
        yield fits(
            "perturbations that were never measured, from `perturbation_features_key`",
            "SAMSVAE, DrugAAE",
            "NearestNeighbour",
        )
        genes = len(singles & set(map(str, adata.var_names)))
        if genes > 0.5 * len(singles):
            found = f"the gene regulatory network behind a screen ({genes} perturbations bear the names of genes)"
            yield fits(found, "GPOVAE", "Correlation")
    if len(singles) == 1 and asked["context_key"] is None:
        yield fits(
            "one perturbation in one context: its effect and single cells under it", "PertVAE, SAMSVAE", "MeanEffect"
        )


# -- command line ---------------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``pertura check FILE.h5ad``; the exit status is 1 where there are problems."""
    parser = argparse.ArgumentParser(prog="pertura check", description=__doc__)
    parser.add_argument("file", help="file with the cells (.h5ad)")
    parser.add_argument("--perturbation-key", required=True, help="column of obs that says what was done to each cell")
    parser.add_argument("--control", required=True, help="label of unperturbed cells")
    for name in ("layer", "context-key", "dose-key", "batch-key", "size-factor-key"):
        parser.add_argument(f"--{name}", help="as in setup_anndata")
    parser.add_argument("--delimiter", default="+", help="joins the members of a combination")
    options = vars(parser.parse_args(arguments))
    from anndata import read_h5ad

    try:
        adata = read_h5ad(options.pop("file"), backed="r")
        table = check(adata, **options)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    for line in table.to_dict("records"):
        sys.stdout.write(f"{line['status']:8} {line['check']}: {line['where']}: {line['found']}\n")
        if line["what to do"]:
            sys.stdout.write(f"{'':9}-> {line['what to do']}\n")
    return int((table["status"] == "problem").any())
