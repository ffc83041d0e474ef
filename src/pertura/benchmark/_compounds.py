"""Held-out compounds in screens of bulk expression: DrugAAE beside the mean effect, ridge and nearest neighbour."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from pertura.effects._features import _LeaveOneOut, correlations

from ._screens import CONTROL, Screen

logger = logging.getLogger(__name__)

_PENALTIES = np.logspace(-2.0, 2.0, 9)
_METRICS = ["pearson", "sign_accuracy", "rank", "error"]


def run_compounds(
    screen: Screen,
    *,
    descriptions: Sequence[str] | None = None,
    seeds: int | Sequence[int] = 5,
    n_folds: int = 5,
    model: Mapping[str, Any] | None = None,
    train: Mapping[str, Any] | None = None,
    out: str | Path | None = None,
) -> pd.DataFrame:
    """Predict compounds of which no profile of the asked conditions was trained.

    Every number that a method needs is chosen on training compounds: the penalty of ridge by generalised leave-one-out,
    what DrugAAE believes of descriptions (gene by gene or not, network or not included) as it always does, in every fold.

    Parameters
    ----------
    screen
        What to predict.
    descriptions
        Names in ``screen.descriptions``; `None`: all.
    seeds, n_folds
        Repeats of the assignment to folds.
    model, train
        Arguments of :class:`pertura.model.DrugAAE` and its ``train``; ``model=None`` leaves it out.
    out
        CSV that grows, fold by fold; what is in it is not run again.

    Returns
    -------
    One row per description, seed, condition, compound and method: ``pearson``, ``sign_accuracy``, ``rank`` (share of the other
    held-out compounds of the fold whose measured effect is less like the prediction than the compound's own), ``error``
    (squared error, 1 for no effect), ``reproducible`` (correlation of the compound's replicates), and what DrugAAE chose:
    ``gene_by_gene``, ``share`` of the description and ``network``.
    """
    path = None if out is None else Path(out)
    rows = [] if path is None or not path.exists() else pd.read_csv(path).to_dict("records")
    done = {(r["description"], r["seed"], r["fold"]) for r in rows}
    for description in screen.descriptions if descriptions is None else descriptions:
        table, names = _features(screen, description)
        for seed in range(seeds) if isinstance(seeds, int) else seeds:
            parts = np.array_split(np.random.default_rng(seed).permutation(len(names)), n_folds)
            for fold, part in enumerate(parts):
                if (description, seed, fold) in done:
                    continue
                held_out = [names[i] for i in np.sort(part)]
                keys = {"description": description, "seed": seed, "fold": fold}
                found = _fold(screen, table, names, held_out, description, seed, model, train)
                rows += [{**keys, **row, "reproducible": screen.reproducible.get(row["compound"])} for row in found]
                logger.info("%s, seed %d, fold %d of %d", description, seed, fold + 1, n_folds)
                if path is not None:
                    pd.DataFrame(rows).to_csv(path, index=False)
    return pd.DataFrame(rows)


def summarise_compounds(results: pd.DataFrame, *, agreeing: float | None = None) -> pd.DataFrame:
    """Means over compounds, and 95 % intervals over compounds (each one's mean over the seeds).

    Parameters
    ----------
    results
        Of :func:`run_compounds`.
    agreeing
        Report beside all compounds those whose replicates correlate by more than this.

    Returns
    -------
    One row per description, condition (``"mean"``: over conditions, where there are several), set of compounds and method;
    ``over_mean`` and ``over_ridge`` are paired differences of ``pearson``.
    """
    sets = {"all": results}
    if agreeing is not None:
        sets[f"replicates > {agreeing:g}"] = results[results["reproducible"] > agreeing]
    tables = []
    for name, part in sets.items():
        several = part["condition"].nunique() > 1
        for condition, own in [*part.groupby("condition", sort=False), *([("mean", part)] if several else [])]:
            table = _summary(own)
            table.insert(1, "condition", condition)
            table.insert(2, "compounds", name)
            tables.append(table)
    return pd.concat(tables, ignore_index=True).sort_values(["compounds", "description"], kind="stable")


def _summary(results: pd.DataFrame) -> pd.DataFrame:
    keys = ["description", "method"]
    each = results.groupby([*keys, "compound"], sort=False)[_METRICS].mean()
    for name, method in (("over_mean", "mean effect"), ("over_ridge", "ridge")):
        if method in each.index.get_level_values("method"):
            other = each["pearson"].xs(method, level="method")
            each[name] = each["pearson"] - other.reindex(each.index.droplevel("method")).to_numpy()
    grouped = each.groupby(keys, sort=False)
    table, half = grouped.mean(), 1.96 * grouped.sem()
    for name in ("over_ridge", "over_mean", "pearson"):
        if name in table:
            table.insert(table.columns.get_loc(name) + 1, f"{name}_ci", half[name])
    table["n_compounds"] = grouped.size()
    return table.reset_index()


def _features(screen: Screen, description: str) -> tuple[pd.DataFrame, list[str]]:
    """Table of features of all compounds that train or are asked, and names of those that are asked."""
    from pertura.priors import describe_drugs, drug_table

    if description not in screen.descriptions:
        raise ValueError(f"`descriptions`: {description!r} is none of {', '.join(map(repr, screen.descriptions))}.")
    every = [n for n in screen.adata.obs["perturbation"].astype(str).unique() if n != CONTROL]
    signatures = screen.descriptions[description]
    asked = [n for n in every if any(n in screen.effects[c].index for c in _conditions(screen, description))]
    if not signatures:
        return drug_table(every, text=describe_drugs(every)), asked
    tables = {n: screen.signatures[n] for n in signatures}
    return drug_table(every, signatures=tables), [n for n in asked if all(n in t.index for t in tables.values())]


def _conditions(screen: Screen, description: str) -> list[str]:
    """Conditions that are asked: those that describe are not."""
    return [c for c in screen.effects if c not in screen.descriptions[description]]


def _fold(
    screen: Screen,
    table: pd.DataFrame,
    names: Sequence[str],
    held_out: Sequence[str],
    description: str,
    seed: int,
    model: Mapping[str, Any] | None,
    train: Mapping[str, Any] | None,
) -> list[dict[str, Any]]:
    """Scores of all methods under all conditions; ridge and neighbour learn of compounds whose description is complete."""
    conditions, known = _conditions(screen, description), set(names) - set(held_out)
    found: dict[str, NDArray] = {}
    chosen: dict[str, Any] = {}
    if model is not None:
        found, chosen = _drugaae(screen, table, held_out, conditions, seed, model, train or {})
    rows = []
    for condition in conditions:
        effect = screen.effects[condition]
        asked = [n for n in held_out if n in effect.index]
        learned = [n for n in effect.index if n in known]
        x, target, new = (
            table.loc[learned].to_numpy(float),
            effect.loc[learned].to_numpy(),
            table.loc[asked].to_numpy(float),
        )
        predicted = {
            "mean effect": np.repeat(target.mean(0, keepdims=True), len(asked), axis=0),
            "ridge": _ridge(x, target, new),
            "nearest neighbour": _neighbour(x, target, new),
        }
        for name in screen.descriptions[description][-1:]:
            predicted[f"copy of {name}"] = screen.signatures[name].loc[asked].to_numpy()
        if condition in found:
            predicted["DrugAAE"] = found[condition][[list(held_out).index(n) for n in asked]]
        for method, values in predicted.items():
            extra = {"condition": condition, **(chosen if method == "DrugAAE" else {})}
            rows += [{**row, **extra} for row in score_effects(method, asked, values, effect.loc[asked].to_numpy())]
    return rows


def _ridge(x: NDArray, target: NDArray, asked: NDArray) -> NDArray[np.float64]:
    """Ridge with the penalty of best leave-one-out correlation."""
    centre, mean = x.mean(0), target.mean(0)
    scale = np.sqrt(((x - centre) ** 2).sum() / len(x)) + 1e-12
    own, new = (x - centre) / scale, (asked - centre) / scale
    kernel = own @ own.T
    best = max(_PENALTIES, key=lambda p: correlations(_LeaveOneOut(kernel, p, target)(), target).mean())
    return mean + new @ own.T @ np.linalg.solve(kernel + best * np.eye(len(x)), target - mean)


def _neighbour(x: NDArray, target: NDArray, asked: NDArray) -> NDArray[np.float64]:
    """Effect of the compound with the most similar description; the mean effect where there is no description."""
    norm = np.linalg.norm(x, axis=1), np.linalg.norm(asked, axis=1)
    similarity = asked @ x.T / np.maximum(norm[1][:, None] * norm[0], 1e-12)
    return np.where((norm[1] > 0)[:, None], target[similarity.argmax(1)], target.mean(0))


def _drugaae(
    screen: Screen,
    table: pd.DataFrame,
    held_out: Sequence[str],
    conditions: Sequence[str],
    seed: int,
    model: Mapping[str, Any],
    train: Mapping[str, Any],
) -> tuple[dict[str, NDArray[np.float64]], dict[str, Any]]:
    """Predicted effects by condition, and what the model chose."""
    condition = screen.adata.obs["condition"].astype(str)
    use = condition.isin(["", *conditions]) & ~screen.adata.obs["perturbation"].isin(list(held_out))
    fitted = fit_drugaae(screen, use.to_numpy(), table, seed=seed, model=model, train=train)
    summary = fitted.description_ or {}
    chosen = {k: summary.get(k) for k in ("gene_by_gene", "share")} | {"network": float(fitted.module.network_share[0])}
    return {c: ask_drugaae(fitted, screen, c, held_out) for c in conditions}, chosen


def fit_drugaae(
    screen: Screen,
    use: NDArray[np.bool_],
    table: pd.DataFrame | None,
    *,
    seed: int,
    model: Mapping[str, Any],
    train: Mapping[str, Any],
) -> Any:
    """DrugAAE trained on some of the profiles."""
    import torch

    from pertura.model import DrugAAE

    adata = screen.adata.copy()
    arguments = {"perturbation_key": "perturbation", "control": CONTROL, **screen.setup}
    if table is not None:
        adata.uns["features"] = table
        arguments["perturbation_features_key"] = "features"
    options = {"accelerator": "cpu", "enable_progress_bar": False, **train}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        DrugAAE.setup_anndata(adata, **arguments)
        fitted = DrugAAE(adata, **model)
        fitted.train(datasplitter_kwargs={"external_indexing": [np.flatnonzero(use)]}, seed=seed, **options)
    return fitted


def ask_drugaae(fitted: Any, screen: Screen, condition: str, names: Sequence[str]) -> NDArray[np.float64]:
    """Effects of compounds under a condition, ``(n_compounds, n_genes)``, on some of its controls."""
    dose, context = screen.asked[condition]
    obs = screen.adata.obs
    rows = np.flatnonzero((obs["perturbation"].astype(str) == CONTROL).to_numpy())
    if context is not None:
        rows = rows[(obs[screen.setup["context_key"]].astype(str) == context).to_numpy()[rows]]
    rows = np.random.default_rng(0).permutation(rows)[:100]
    found = fitted.get_perturbation_effect(list(names), indices=np.sort(rows), dose=dose, n_samples=2)
    wide = found.pivot_table(index="perturbation", columns="gene", values="lfc_mean", sort=False)
    return wide.loc[list(names), screen.adata.var_names].to_numpy()


def score_effects(method: str, names: Sequence[str], predicted: NDArray, measured: NDArray) -> list[dict[str, Any]]:
    """Scores of a method's predictions, compound by compound."""
    r = correlations(predicted, measured)
    centred = [v - v.mean(1, keepdims=True) for v in (predicted, measured)]
    unit = [v / np.maximum(np.linalg.norm(v, axis=1, keepdims=True), 1e-12) for v in centred]
    table = unit[0] @ unit[1].T
    other = ~np.eye(len(names), dtype=bool)
    below = (table < np.diag(table)[:, None]) + 0.5 * (table == np.diag(table)[:, None])
    rank = (below * other).sum(1) / max(len(names) - 1, 1)
    sign = (np.sign(predicted) == np.sign(measured)).mean(1)
    error = ((predicted - measured) ** 2).sum(1) / np.maximum((measured**2).sum(1), 1e-12)
    return [
        {"compound": n, "method": method, "pearson": a, "sign_accuracy": b, "rank": c, "error": e}
        for n, a, b, c, e in zip(names, r, sign, rank, error, strict=True)
    ]
