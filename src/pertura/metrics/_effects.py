"""Measured effects with their standard errors, and whether predicted intervals hold them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy.stats import norm

from ._pseudobulk import at_equal_depth, expression, moments

LEVELS = tuple(np.round(np.linspace(0.05, 0.95, 19), 2))


def measured_effect(
    adata: AnnData,
    perturbation: str | None = None,
    *,
    perturbation_key: str,
    control: str,
    context_key: str | None = None,
    layer: str | None = None,
) -> pd.DataFrame:
    """Difference of means between perturbed and control cells at equal sequencing depth, gene by gene, with its standard error.

    Of the two the deeper cells are thinned in expectation. This needs log1p of normalized counts; of other values, the plain
    difference is returned.

    Parameters
    ----------
    adata
        Measured cells.
    perturbation
        Label in `perturbation_key`; `None` takes the only one there is.
    perturbation_key, context_key
        Columns of ``obs``.
    control
        Label of control cells.
    layer
        Layer on the scale of the effect, normally log1p of counts per 10,000; default ``X``.

    Returns
    -------
    DataFrame, a row per context and gene: ``perturbation``, ``context``, ``gene``, ``effect``, ``se``, ``mean_control``,
    ``mean_perturbed``, ``n_control`` and ``n_perturbed``. Contexts without two cells of either kind are left out.
    """
    for argument, key in (("perturbation_key", perturbation_key), ("context_key", context_key)):
        if key is not None and key not in adata.obs:
            raise ValueError(f"`{argument}`: adata.obs has no column {key!r}; it has {list(adata.obs.columns)}.")
    label = adata.obs[perturbation_key].astype(str).to_numpy(dtype=str)
    context = np.full(adata.n_obs, "all") if context_key is None else adata.obs[context_key].astype(str).to_numpy(str)
    if perturbation is None:
        others = sorted(set(label) - {control})
        if len(others) != 1:
            raise ValueError(f"`perturbation`: the cells have {others[:8]}; name one.")
        perturbation = others[0]
    keep = np.flatnonzero(np.isin(label, [perturbation, control]))
    codes, groups = pd.MultiIndex.from_arrays([label[keep], context[keep]]).factorize()
    x = expression(adata, layer, "adata")[keep]
    values = at_equal_depth(moments(x, codes, groups), x, codes, control)
    se2 = values.var / values.n[:, None]
    tables = []
    for name in pd.unique(context[keep]):
        at = groups.get_indexer([(perturbation, name), (control, name)])
        if (at < 0).any() or (values.n[at] < 2).any():
            continue
        treated, base = at
        tables.append(
            pd.DataFrame(
                {
                    "perturbation": perturbation,
                    "context": name,
                    "gene": adata.var_names.to_numpy(dtype=object),
                    "effect": values.mean[treated] - values.mean[base],
                    "se": np.sqrt(se2[treated] + se2[base]),
                    "mean_control": values.mean[base],
                    "mean_perturbed": values.mean[treated],
                    "n_control": int(values.n[base]),
                    "n_perturbed": int(values.n[treated]),
                }
            )
        )
    if not tables:
        raise ValueError(f"`perturbation`: no context has at least two cells of both {perturbation!r} and {control!r}.")
    return pd.concat(tables, ignore_index=True)


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
