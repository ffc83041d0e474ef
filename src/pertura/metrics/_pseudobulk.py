"""Means and variances of groups of cells, and differential expression computed from them."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import scanpy as sc
import scipy.sparse as sp
from anndata import AnnData
from numpy.typing import NDArray
from scipy.stats import false_discovery_control, ttest_ind_from_stats

from pertura.effects._depth import equal_depth_changes

from ._arrays import Floats

ALL = "all"
"""Name of the one context of data without a context key."""


def expression(adata: AnnData, layer: str | None, name: str) -> Any:
    """Matrix (cells, genes) of `X` or a layer; warns if it looks like raw counts."""
    if layer is not None and layer not in adata.layers:
        found = sorted(key for key in adata.layers if key is not None)
        raise ValueError(f"`{name}` has no layer {layer!r}; it has {found}.")
    x = adata.X if layer is None else adata.layers[layer]
    if x is None:
        raise ValueError(f"`{name}` has no X; name the layer that holds log1p expression.")
    values = x.data if sp.issparse(x) else np.asarray(x)
    # log1p of counts per 10,000 stays below log1p(1e4) = 9.2.
    if values.size and values.max() > 20 and np.array_equal(values, np.rint(values)):
        warnings.warn(
            f"`{name}` looks like raw counts; metrics expect log1p of counts per 10,000 "
            "(sc.pp.normalize_total(target_sum=1e4), then sc.pp.log1p).",
            stacklevel=4,
        )
    return x


def conditions(
    adata: AnnData, perturbation_key: str, context_key: str | None, name: str
) -> tuple[NDArray[np.intp], pd.MultiIndex]:
    """Group of each cell, and the groups (condition, context)."""
    for key, argument in ((perturbation_key, "perturbation_key"), (context_key, "context_key")):
        if key is None:
            continue
        if key not in adata.obs:
            raise ValueError(f"`{argument}`: {name}.obs has no column {key!r}; it has {list(adata.obs.columns)}.")
        if adata.obs[key].isna().any():
            raise ValueError(f"`{argument}`: {name}.obs[{key!r}] has missing values; drop or label those cells.")
    condition = adata.obs[perturbation_key].astype(str)
    context = adata.obs[context_key].astype(str) if context_key else pd.Series(ALL, index=adata.obs.index)
    keys = pd.MultiIndex.from_arrays([condition.to_numpy(), context.to_numpy()])
    codes, groups = keys.factorize(sort=True)
    groups = groups.set_names(["condition", "context"])
    return codes, groups


@dataclass(frozen=True)
class Moments:
    """Number of cells, mean and unbiased variance (groups, genes) of groups of cells."""

    groups: pd.MultiIndex
    n: Floats
    mean: Floats
    var: Floats

    def take(self, keys: pd.MultiIndex) -> Moments:
        """Return the moments of some groups, in the given order."""
        at = self.groups.get_indexer(keys)
        return Moments(keys, self.n[at], self.mean[at], self.var[at])

    def pool(self, labels: pd.Index) -> Moments:
        """Moments of unions of groups; `labels` names the union of each group."""
        codes, names = labels.factorize()
        member = np.zeros((len(names), len(codes)))
        member[codes, np.arange(len(codes))] = 1.0
        square = self.var * np.maximum(self.n - 1, 0)[:, None] + self.n[:, None] * self.mean**2
        return _from_sums(names, member @ self.n, member @ (self.n[:, None] * self.mean), member @ square)

    def minus(self, part: Moments) -> Moments:
        """Moments of each group without the cells of `part` (same order, each contained in its group)."""
        sums = [
            (m.n[:, None] * m.mean, m.var * np.maximum(m.n - 1, 0)[:, None] + m.n[:, None] * m.mean**2)
            for m in (self, part)
        ]
        return _from_sums(self.groups, self.n - part.n, sums[0][0] - sums[1][0], sums[0][1] - sums[1][1])


def _from_sums(groups: Any, n: Floats, total: Floats, square: Floats) -> Moments:
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = total / n[:, None]
        var = np.maximum(square - n[:, None] * mean**2, 0.0) / np.maximum(n - 1, 1)[:, None]
    return Moments(groups, n, mean, np.where(n[:, None] > 1, var, np.nan))


def moments(x: Any, codes: NDArray[np.intp], groups: pd.Index) -> Moments:
    """Moments of each group of rows of a dense or sparse matrix (cells, genes)."""
    label = pd.Categorical.from_codes(codes, [str(i) for i in range(len(groups))])
    cells = AnnData(
        x.astype(np.float64), obs=pd.DataFrame({"group": label}, index=pd.RangeIndex(len(codes)).astype(str))
    )
    n = np.bincount(codes, minlength=len(groups)).astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):  # groups of one cell have no variance
        found = sc.get.aggregate(cells, "group", ["mean", "var"])
    return Moments(groups, n, found.layers["mean"], np.where(n[:, None] > 1, found.layers["var"], np.nan))


def at_equal_depth(found: Moments, x: Any, codes: NDArray[np.intp], control: str) -> Moments:
    """Moments whose differences to the controls of a context are those at equal sequencing depth.

    Means of groups that were sequenced more deeply than their controls are those of thinned counts. Where the controls are the
    deeper ones, the means change by as much in the other direction. Nothing changes where `x` does not tell counts.

    Parameters
    ----------
    found, x, codes
        Moments of the groups, cells and group of each, as for :func:`moments`; groups are (condition, context).
    control
        Label of the controls.
    """
    context = found.groups.get_level_values(1)
    reference = found.groups.get_indexer(pd.MultiIndex.from_arrays([[str(control)] * len(context), context]))
    change = equal_depth_changes(x, codes, reference)
    return found if change is None else replace(found, mean=found.mean + change)


def welch(a: Moments, b: Moments) -> tuple[Floats, Floats]:
    """Welch t statistics and Benjamini-Hochberg p values (groups, genes); no evidence gives 0 and 1."""
    n_a, n_b = a.n[:, None], b.n[:, None]
    with np.errstate(invalid="ignore", divide="ignore"):
        t, p = ttest_ind_from_stats(a.mean, np.sqrt(a.var), n_a, b.mean, np.sqrt(b.var), n_b, equal_var=False)
    known = np.isfinite(t) & np.isfinite(p)
    return np.where(known, t, 0.0), false_discovery_control(np.where(known, p, 1.0), axis=-1, method="bh")


def perturbed_mean(
    adata: AnnData,
    *,
    perturbation_key: str,
    control: str,
    context_key: str | None = None,
    layer: str | None = None,
) -> pd.DataFrame:
    """Average of the perturbation centroids: the reference that removes what all perturbations share.

    Parameters
    ----------
    adata
        *Training* cells.
    perturbation_key, context_key
        Columns of ``adata.obs``.
    control
        Label of the control cells, which are left out.
    layer
        Layer with expression on the scale of the evaluation; default ``X``.

    Returns
    -------
    DataFrame (contexts, genes); every perturbation weighs the same, whatever its number of cells. Contexts
    without perturbed cells are absent.
    """
    codes, groups = conditions(adata, perturbation_key, context_key, "adata")
    perturbed = np.asarray(groups.get_level_values("condition") != str(control))
    if not perturbed.any():
        raise ValueError(f"`adata` has no cells other than the control {control!r}.")
    x = expression(adata, layer, "adata")
    found = at_equal_depth(moments(x, codes, groups), x, codes, control)
    means = pd.DataFrame(found.mean, groups, adata.var_names)
    return means[perturbed].groupby(level="context").mean()
