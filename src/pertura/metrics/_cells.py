"""Scores of predicted cells as a distribution.

Inputs are ``(cells, genes)`` matrices, dense or sparse, on the same scale. Pairwise distances are computed in
chunks (:func:`sklearn.metrics.pairwise_distances_chunked`), so memory stays bounded for any number of cells.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import scipy.sparse as sp
from sklearn.metrics import pairwise_distances, pairwise_distances_chunked

from ._arrays import Floats
from ._registry import register

Cells = Any
"""Dense or sparse matrix (cells, genes)."""


def _cells(predicted: Cells, truth: Cells, max_cells: int | None, seed: int) -> tuple[Cells, Cells]:
    """Check and return float64 matrices, each subsampled to at most `max_cells` rows."""
    rng = np.random.default_rng(seed)
    out = []
    for name, value in (("predicted", predicted), ("truth", truth)):
        x = sp.csr_matrix(value, dtype=np.float64) if sp.issparse(value) else np.asarray(value, dtype=np.float64)
        if x.ndim != 2 or x.shape[0] < 2:
            raise ValueError(f"`{name}` must be a matrix (cells, genes) with at least 2 cells, got shape {x.shape}.")
        if not np.isfinite(x.data if sp.issparse(x) else x).all():
            raise ValueError(f"`{name}` has missing or infinite values; remove them.")
        if max_cells is not None and x.shape[0] > max_cells:
            x = x[np.sort(rng.choice(x.shape[0], max_cells, replace=False))]
        out.append(x)
    if out[0].shape[1] != out[1].shape[1]:
        raise ValueError(f"`predicted` has {out[0].shape[1]} genes, `truth` {out[1].shape[1]}; align them by name.")
    return out[0], out[1]


def _pair_sum(a: Cells, b: Cells | None, metric: str, transform: Any, memory: float) -> Floats:
    """Sum ``transform(distance)`` over all pairs; with ``b=None`` over those of `a`, diagonal included."""
    squared = metric == "sqeuclidean"
    chunks = pairwise_distances_chunked(a, b, metric="euclidean", working_memory=memory, squared=squared)
    return np.sum([transform(chunk) for chunk in chunks], axis=0)


@register(best_value=0.0, higher_is_better=False, needs="cells")
def energy_distance(
    predicted: Cells,
    truth: Cells,
    *,
    metric: Literal["euclidean", "sqeuclidean"] = "euclidean",
    unbiased: bool = True,
    max_cells: int | None = None,
    seed: int = 0,
    working_memory: float = 64,
) -> float:
    r"""Energy distance :math:`2 E\|X-Y\| - E\|X-X'\| - E\|Y-Y'\|` between predicted and true cells.

    Parameters
    ----------
    predicted, truth
        ``(cells, genes)``; the numbers of cells may differ.
    metric
        ``"euclidean"``, or ``"sqeuclidean"`` (scPerturb, pertpy), which sees means only: with it the distance
        is ``2 * |difference of means|^2``.
    unbiased
        Leave the zero distance of each cell to itself out of the two within-set means (U-statistic); the
        value can then be slightly negative. ``False`` is the V-statistic, which is >= 0 but grows as cells
        get fewer.
    max_cells
        Use a random subsample of at most this many cells of each set.
    seed
        Seed of the subsample.
    working_memory
        Size of one chunk of distances, in MiB.
    """
    if metric not in ("euclidean", "sqeuclidean"):
        raise ValueError(f"`metric` must be 'euclidean' or 'sqeuclidean', got {metric!r}.")
    x, y = _cells(predicted, truth, max_cells, seed)
    n, m = x.shape[0], y.shape[0]
    between, within_x, within_y = (
        _pair_sum(a, b, metric, np.sum, working_memory) for a, b in ((x, y), (x, None), (y, None))
    )
    less = 1 if unbiased else 0
    return float(2 * between / (n * m) - within_x / (n * (n - less)) - within_y / (m * (m - less)))


def median_distance(cells: Cells, *, max_cells: int = 1000, seed: int = 0) -> float:
    """Median Euclidean distance between two different cells, the usual bandwidth of a Gaussian kernel.

    Parameters
    ----------
    cells
        ``(cells, genes)``.
    max_cells
        Size of the random subsample used.
    seed
        Seed of the subsample.
    """
    x, _ = _cells(cells, cells, max_cells, seed)
    distance = pairwise_distances(x, metric="euclidean")
    return float(np.median(distance[np.triu_indices_from(distance, k=1)]))


@register(best_value=0.0, higher_is_better=False, needs="cells")
def mmd_rbf(
    predicted: Cells,
    truth: Cells,
    *,
    bandwidth: float | None = None,
    scales: Sequence[float] = (1.0,),
    unbiased: bool = True,
    max_cells: int | None = None,
    seed: int = 0,
    working_memory: float = 64,
) -> float:
    r"""Squared maximum mean discrepancy with a Gaussian kernel :math:`\exp(-\|x-y\|^2 / 2h^2)`.

    Parameters
    ----------
    predicted, truth
        ``(cells, genes)``; the numbers of cells may differ.
    bandwidth
        :math:`h`; default the median distance among the *true* cells, so that all models are scored with one
        kernel.
    scales
        Multiples of the bandwidth, over which the result is averaged.
    unbiased
        U-statistic (can be slightly negative) or, with ``False``, V-statistic.
    max_cells, seed, working_memory
        As in :func:`energy_distance`.
    """
    x, y = _cells(predicted, truth, max_cells, seed)
    if bandwidth is None:
        bandwidth = median_distance(y, seed=seed)
        if bandwidth == 0:
            raise ValueError("`bandwidth`: the median distance of the true cells is 0; pass a bandwidth.")
    if bandwidth <= 0 or not len(scales) or min(scales) <= 0:
        raise ValueError(f"`bandwidth` and `scales` must be positive, got {bandwidth} and {tuple(scales)}.")
    n, m = x.shape[0], y.shape[0]
    gammas = 1.0 / (2.0 * (bandwidth * np.asarray(scales, dtype=np.float64)) ** 2)

    def kernels(distance: Floats) -> Floats:
        return np.array([np.exp(-g * distance).sum() for g in gammas])

    between, within_x, within_y = (
        _pair_sum(a, b, "sqeuclidean", kernels, working_memory) for a, b in ((x, y), (x, None), (y, None))
    )
    if unbiased:  # the kernel of a cell with itself is 1
        value = (within_x - n) / (n * (n - 1)) + (within_y - m) / (m * (m - 1)) - 2 * between / (n * m)
    else:
        value = within_x / n**2 + within_y / m**2 - 2 * between / (n * m)
    return float(value.mean())


def _variance(x: Cells) -> Floats:
    if not sp.issparse(x):
        return x.var(axis=0, ddof=1)
    n = x.shape[0]
    mean = np.asarray(x.mean(axis=0)).ravel()
    square = np.asarray(x.multiply(x).mean(axis=0)).ravel()
    return np.maximum(square - mean**2, 0.0) * n / (n - 1)


@register(best_value=1.0, higher_is_better=None, needs="cells")
def variance_ratio(
    predicted: Cells, truth: Cells, *, reduce: Literal["median", "total", "none"] = "median"
) -> float | Floats:
    """Predicted over true variance across cells; below 1 the prediction is too uniform.

    Parameters
    ----------
    predicted, truth
        ``(cells, genes)``.
    reduce
        ``"median"`` of the genes' ratios (genes without true variance left out), ``"total"`` variance over
        total variance, or ``"none"`` for the ratio per gene (NaN without true variance).
    """
    if reduce not in ("median", "total", "none"):
        raise ValueError(f"`reduce` must be 'median', 'total' or 'none', got {reduce!r}.")
    x, y = _cells(predicted, truth, None, 0)
    vx, vy = _variance(x), _variance(y)
    if reduce == "total":
        return float(vx.sum() / vy.sum()) if vy.sum() > 0 else float("nan")
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio = np.where(vy > 0, vx / vy, np.nan)
    if reduce == "none":
        return ratio
    return float(np.nanmedian(ratio)) if (vy > 0).any() else float("nan")
