"""Measured effects with their standard errors, and whether predicted intervals hold them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from difflib import get_close_matches

import numpy as np
import pandas as pd
import scanpy as sc
from anndata import AnnData
from scipy.stats import norm

from pertura.data._vocabulary import parse_label
from pertura.effects._ranked import ranked_effects

from ._pseudobulk import ALL, at_equal_depth, expression, moments

logger = logging.getLogger(__name__)

LEVELS = tuple(np.round(np.linspace(0.05, 0.95, 19), 2))


def measured_effect(
    adata: AnnData,
    perturbation: str | Sequence[str] | None = None,
    *,
    perturbation_key: str,
    control: str,
    context_key: str | None = None,
    layer: str | None = None,
    delimiter: str = "+",
    min_cells: int = 2,
) -> pd.DataFrame:
    """Difference of means between perturbed and control cells at equal sequencing depth, gene by gene, with its standard error.

    Of the two the deeper cells are thinned in expectation. This needs log1p of normalized counts; of other values, the plain
    difference is returned.

    Labels are read as models read them: ``"B+A"`` is ``"A+B"``, ``"A+A"`` and ``"A+control"`` are ``"A"``.

    Parameters
    ----------
    adata
        Measured cells.
    perturbation
        A perturbation, a combination, or a list of them; `None` takes all there are.
    perturbation_key, context_key
        Columns of ``obs``.
    control
        Label of control cells.
    layer
        Layer on the scale of the effect, normally log1p of counts per 10,000; default ``X``. Raw counts get a warning.
    delimiter
        Joins the members of a combination.
    min_cells
        Fewest perturbed, and fewest control, cells of a context; at least 2. Conditions with fewer are left out.

    Returns
    -------
    DataFrame, a row per perturbation, context and gene: ``perturbation``, ``context``, ``gene``, ``effect``, ``se``,
    ``mean_control``, ``mean_perturbed``, ``n_control`` and ``n_perturbed``. ``attrs["left_out"]`` lists the conditions
    with too few cells.

    Raises
    ------
    ValueError
        Where a column, a layer or a perturbation is missing, or no condition has enough cells.

    See Also
    --------
    effects_to_anndata : The table as an AnnData, for scanpy's plots.
    """
    for argument, key in (("perturbation_key", perturbation_key), ("context_key", context_key)):
        if key is not None and key not in adata.obs:
            raise ValueError(f"`{argument}`: adata.obs has no column {key!r}; it has {list(adata.obs.columns)}.")

    def canonical(name: str) -> str:
        return delimiter.join(parse_label(name, control, delimiter)) or control

    spelled = adata.obs[perturbation_key].astype(str)
    label = spelled.map({name: canonical(name) for name in spelled.unique()}).to_numpy(dtype=object)
    context = np.full(adata.n_obs, ALL) if context_key is None else adata.obs[context_key].astype(str).to_numpy(object)
    found = sorted(set(label) - {control})
    given = [perturbation] if isinstance(perturbation, str) else perturbation
    wanted = found if given is None else list(dict.fromkeys(canonical(str(name)) for name in given))
    unknown = [name for name in wanted if name not in found]
    if unknown or not wanted:
        close = get_close_matches(unknown[0], found, n=1) if unknown else []
        hint = f" Did you mean {close[0]!r}?" if close else ""
        more = f", … ({len(found)} in all)" if len(found) > 8 else ""
        raise ValueError(
            f"`perturbation`: no cell of adata.obs[{perturbation_key!r}] is {', '.join(map(repr, unknown)) or 'perturbed'}; "
            f"it holds {', '.join(found[:8])}{more}.{hint}"
        )
    keep = np.flatnonzero(np.isin(label, [*wanted, control]))
    codes, groups = pd.MultiIndex.from_arrays([label[keep], context[keep]]).factorize()
    x = expression(adata, layer, "adata")[keep]
    values = at_equal_depth(moments(x, codes, groups), x, codes, control)
    asked = pd.MultiIndex.from_product([wanted, pd.unique(context[keep])])
    treated = groups.get_indexer(asked)
    base = groups.get_indexer(pd.MultiIndex.from_arrays([np.repeat(control, len(asked)), asked.get_level_values(1)]))
    fewest = np.minimum(*(np.where(at < 0, 0, values.n[at]) for at in (treated, base)))
    enough = fewest >= max(min_cells, 2)
    left_out = [" in ".join(pair) for pair in asked[(treated >= 0) & ~enough]]
    if not enough.any():
        raise ValueError(
            f"`perturbation`: no context has at least {max(min_cells, 2)} cells of both {', '.join(map(repr, wanted[:8]))} "
            f"and {control!r}."
        )
    if left_out:
        logger.info("Left out, with fewer than %d cells: %s.", max(min_cells, 2), ", ".join(left_out))
    treated, base, kept, n_genes = treated[enough], base[enough], asked[enough], adata.n_vars
    se2 = values.var / values.n[:, None]
    table = pd.DataFrame(
        {
            "perturbation": np.repeat(kept.get_level_values(0), n_genes),
            "context": np.repeat(kept.get_level_values(1), n_genes),
            "gene": np.tile(adata.var_names.to_numpy(dtype=object), len(kept)),
            "effect": (values.mean[treated] - values.mean[base]).ravel(),
            "se": np.sqrt(se2[treated] + se2[base]).ravel(),
            "mean_control": values.mean[base].ravel(),
            "mean_perturbed": values.mean[treated].ravel(),
            "n_control": np.repeat(values.n[base].astype(int), n_genes),
            "n_perturbed": np.repeat(values.n[treated].astype(int), n_genes),
        }
    )
    table.attrs["left_out"] = left_out
    return table


def effects_to_anndata(effects: pd.DataFrame) -> AnnData:
    """Effects as an AnnData with one row per condition, so that :mod:`scanpy.pl` draws a screen.

    Parameters
    ----------
    effects
        What ``get_perturbation_effect`` or :func:`measured_effect` returns.

    Returns
    -------
    AnnData, conditions x genes. ``X``: effects. ``layers``: the other numbers of the table, such as ``"lfc_sd"`` or ``"se"``.
    ``obs``: ``perturbation``, ``context`` and ``dose`` as far as the table has them, ``condition`` (these, joined), and what
    else is one value per condition. ``uns["rank_genes_groups"]``: genes of each condition by effect in units of its sd, for
    ``sc.pl.rank_genes_groups*`` and ``sc.get.rank_genes_groups_df``. Genes that a condition lacks are NaN. ``obsm["X_pca"]``: components of the effects, from which scanpy draws dendrograms.

    Raises
    ------
    ValueError
        Where columns are missing, or a condition has a gene twice.

    Examples
    --------
    >>> screen = pertura.metrics.effects_to_anndata(model.get_perturbation_effect())
    >>> sc.pl.heatmap(screen, ["STAT1", "IRF1"], groupby="perturbation", cmap="RdBu_r", vcenter=0)
    """
    value, sd = ("lfc_mean", "lfc_sd") if "lfc_mean" in effects else ("effect", "se")
    missing = [c for c in ("perturbation", "gene", value, sd) if c not in effects]
    if missing:
        raise ValueError(
            f"`effects` lacks the columns {missing}; pass what `get_perturbation_effect` or `measured_effect` returns."
        )
    keys = [key for key in ("perturbation", "dose", "context") if key in effects]
    row, conditions = pd.MultiIndex.from_frame(effects[keys].astype(str)).factorize()
    column, genes = pd.factorize(effects["gene"].astype(str))
    if pd.Index(row * len(genes) + column).has_duplicates:
        raise ValueError("`effects`: a condition has the same gene twice.")
    obs = conditions.to_frame(index=False, name=keys)
    told = [key for key in keys if key == "perturbation" or obs[key].nunique() > 1]
    obs["condition"] = obs[told].agg(" | ".join, axis=1)
    obs.index = pd.Index(obs["condition"].to_numpy(object), name=None)
    layers = {}
    for name, values in effects.drop(columns=[*keys, "gene"]).items():
        if values.groupby(row).nunique(dropna=False).max() == 1 and (name.startswith("n_") or name == "novelty"):
            obs[name] = values.groupby(row).first().to_numpy()
        else:
            layers[name] = np.full((len(conditions), len(genes)), np.nan, np.float32)
            layers[name][row, column] = values
    obs = obs.astype({c: "category" for c in ("condition", "novelty", *keys) if c in obs})
    out = AnnData(layers.pop(value), obs=obs, var=pd.DataFrame(index=genes), layers=layers)
    # what scanpy orders conditions by; its own choice of 50 components needs as many conditions
    out.obsm["X_pca"] = sc.pp.pca(np.nan_to_num(out.X), n_comps=min(out.shape) - 1) if min(out.shape) > 1 else out.X * 0
    # a model's table has fold changes where its scale has them
    ranked = effects.rename(columns={value: "lfc_mean"}).assign(condition=obs["condition"].to_numpy()[row])
    if "gene_sd" not in ranked:
        ranked["gene_sd"] = ranked[sd]
    params = {"groupby": "condition", "reference": "control", "method": "effect", "use_raw": False, "layer": None}
    out.uns["rank_genes_groups"] = ranked_effects(
        ranked if "log2fc" in ranked else ranked.assign(log2fc=ranked["lfc_mean"]), "condition", params
    )
    return out


def match_effects(predicted: pd.DataFrame, measured: pd.DataFrame) -> pd.DataFrame:
    """Rows of both tables for the same gene (and perturbation and context, where both name several)."""
    on = ["gene"]
    for key in ("perturbation", "context"):
        if key in predicted and key in measured:
            several = predicted[key].nunique() > 1 or measured[key].nunique() > 1
            on += [key] if several else []
    # Categories of different sets would not merge.
    left, right = (t.astype(dict.fromkeys(on, object)) for t in (predicted, measured))
    shared = [c for c in right.columns if c not in left.columns or c in on]
    merged = left.merge(right[shared], on=on, how="inner", validate="one_to_one")
    if merged.empty:
        raise ValueError("`predicted` and `measured` have no gene (of one perturbation and context) in common.")
    return merged


def effect_calibration(
    predicted: pd.DataFrame,
    measured: pd.DataFrame,
    *,
    levels: Sequence[float] = LEVELS,
    top: int | None = None,
) -> pd.DataFrame:
    """How often intervals of predicted effects hold the measured effect, at several levels.

    Parameters
    ----------
    predicted
        What ``get_perturbation_effect`` returns: ``gene, lfc_mean, lfc_sd`` (and ``perturbation, context``).
    measured
        What :func:`measured_effect` returns. Intervals are widened by its standard error: a mean over finitely
        many cells scatters around the effect that was predicted.
    levels
        Nominal levels in (0, 1).
    top
        Only the genes of largest measured absolute effect, per perturbation and context.

    Returns
    -------
    DataFrame with columns ``level``, ``coverage`` (share of genes) and ``width`` (mean width of the intervals
    as predicted).
    """
    table = match_effects(predicted, measured)
    if top is not None:
        rank = table["effect"].abs().groupby([table["perturbation"], table["context"]]).rank(ascending=False)
        table = table[rank <= top]
    nominal = np.asarray(levels, dtype=np.float64)
    if nominal.ndim != 1 or not ((nominal > 0) & (nominal < 1)).all():
        raise ValueError(f"`levels` must lie between 0 and 1, got {levels!r}.")
    z = norm.ppf((1 + nominal) / 2)
    sd = table["lfc_sd"].to_numpy()
    distance = np.abs(table["effect"].to_numpy() - table["lfc_mean"].to_numpy())
    reach = np.sqrt(sd**2 + table["se"].to_numpy() ** 2)
    return pd.DataFrame(
        {
            "level": nominal,
            "coverage": (distance[:, None] <= z * reach[:, None]).mean(axis=0),
            "width": 2 * z * sd.mean(),
        }
    )
