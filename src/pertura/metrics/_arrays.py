"""Shared arithmetic of the profile metrics: checked inputs, gene weights, weighted correlation.

Every profile metric reduces the last axis (genes), so one call scores one profile or a whole table of
conditions.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

# Relative to the size of the profiles, an effect below this is rounding of single-precision input, not a
# prediction.
_NOISE = 1e-6


def result(values: Any) -> Any:
    """Python float for a scalar, the array otherwise."""
    return float(values) if np.ndim(values) == 0 else values


def _labels(value: Any) -> pd.Index | None:
    if isinstance(value, pd.Series):
        return value.index
    return value.columns if isinstance(value, pd.DataFrame) else None


def profiles(**named: Any) -> list[Floats]:
    """Float64 arrays (..., genes) that agree in genes and broadcast; errors name the argument.

    Labelled inputs (Series, DataFrame) must carry the same genes in the same order.
    """
    arrays: dict[str, Floats] = {}
    first: tuple[str, pd.Index] | None = None
    for name, value in named.items():
        array = np.asarray(value, dtype=np.float64)
        if array.ndim == 0:
            raise ValueError(f"`{name}` must be a profile (genes,) or a table (..., genes), got a single number.")
        if not np.isfinite(array).all():
            raise ValueError(
                f"`{name}` has {int((~np.isfinite(array)).sum())} missing or infinite values; remove them."
            )
        labels = _labels(value)
        if labels is not None:
            if first is not None and not labels.equals(first[1]):
                raise ValueError(
                    f"`{name}` and `{first[0]}` carry different genes or another order; reindex one of them."
                )
            first = first or (name, labels)
        arrays[name] = array
    sizes = {name: array.shape[-1] for name, array in arrays.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"The profiles differ in their number of genes: {sizes}.")
    try:
        np.broadcast_shapes(*(array.shape for array in arrays.values()))
    except ValueError:
        shapes = {name: array.shape for name, array in arrays.items()}
        raise ValueError(f"The profiles do not have matching shapes: {shapes}.") from None
    return list(arrays.values())


def top_weights(scores: Floats, k: int) -> Floats:
    """Membership of each gene in the k largest `scores`, ties at the cut sharing the places that are left.

    Parameters
    ----------
    scores
        (..., genes), ranked over the last axis.
    k
        Number of genes.

    Returns
    -------
    (..., genes) in [0, 1], summing to ``min(k, genes)``: the expected membership if ties were broken at
    random.
    """
    if isinstance(k, bool) or not isinstance(k, int | np.integer) or k < 1:
        raise ValueError(f"`top` must be a positive number of genes, got {k!r}.")
    n_genes = scores.shape[-1]
    if k >= n_genes:
        return np.ones_like(scores)
    cut = np.partition(scores, n_genes - k, axis=-1)[..., n_genes - k, None]
    above, tied = scores > cut, scores == cut
    share = (k - above.sum(-1, keepdims=True)) / tied.sum(-1, keepdims=True)
    return above + tied * share


def gene_weights(
    truth: Floats, control: Floats | None, *, top: int | None = None, genes: ArrayLike | None = None
) -> Floats:
    """Weight each gene by its place in `genes`, and among the `top` of largest true effect within these.

    Returns (..., genes) in [0, 1]: 1 inside the set, 0 outside, shares for genes that tie at the cut.
    """
    n_genes = truth.shape[-1]
    mask = np.ones(n_genes, dtype=bool) if genes is None else np.asarray(genes)
    if mask.dtype != bool:
        if not np.issubdtype(mask.dtype, np.integer):
            raise ValueError("`genes` must be a boolean mask (genes,) or integer positions; translate names first.")
        if mask.size and (mask.min() < -n_genes or mask.max() >= n_genes):
            raise ValueError(f"`genes` names position {mask.max()} but the profiles have {n_genes} genes.")
        mask = np.isin(np.arange(n_genes), mask % n_genes)
    if mask.shape[-1] != n_genes:
        raise ValueError(f"`genes` is a mask over {mask.shape[-1]} genes but the profiles have {n_genes}.")
    if top is None:
        return np.broadcast_to(mask, np.broadcast_shapes(mask.shape, truth.shape)).astype(np.float64)
    if control is None:
        raise ValueError("`top` ranks genes by |truth - control|: pass `control` as well.")
    effect = np.abs(truth - control)
    weights = top_weights(np.where(mask, effect, -1.0), top)
    return np.where(mask, weights, 0.0)


def weighted_mean(values: Floats, weights: Floats) -> Floats:
    """Mean over the last axis; NaN where the weights sum to zero."""
    total = weights.sum(-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return (values * weights).sum(-1) / total


def weighted_pearson(predicted: Floats, truth: Floats, weights: Floats, *, scale: Floats | float = 0.0) -> Floats:
    """Weighted correlation over the last axis.

    A prediction without variation (below single-precision rounding of profiles of root mean square `scale`)
    says nothing about the genes and gets 0; a truth without variation makes the question void and gives NaN.
    """
    p = predicted - weighted_mean(predicted, weights)[..., None]
    t = truth - weighted_mean(truth, weights)[..., None]
    pp, tt, pt = (weighted_mean(a, weights) for a in (p * p, t * t, p * t))
    floor = (_NOISE * np.asarray(scale)) ** 2
    with np.errstate(invalid="ignore", divide="ignore"):
        r = np.clip(pt / np.sqrt(pp * tt), -1.0, 1.0)
    r = np.where(pp <= floor, 0.0, r)
    return np.where((tt <= floor) | np.isnan(tt), np.nan, r)


def rms(values: Floats) -> Floats:
    """Root mean square over the last axis."""
    return np.sqrt(np.mean(values**2, axis=-1))
