r"""Expression at another sequencing depth, in expectation.

With :math:`x` counts of a gene among the :math:`L` of a cell, a library of :math:`pL` would have held binomially many of the
:math:`x`. Expression at that depth is :math:`E[\log(1 + 10^4 y / (pL))]`, :math:`y \sim \mathrm{Binomial}(x, p)`: deep cells can be
compared with shallow ones, never the other way round. So of two groups of cells the deeper one is thinned.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray
from scipy import sparse

from pertura.data._scale import counts_of

from ._sums import Matrix, Values, add_groups

_SAME_DEPTH = 0.01  # log ratio of depths below which nothing is done
_STEP = math.log(1.25)  # controls are thinned in steps of at most this; in between, their mean is interpolated
_MAX_STEPS = 8
_MAX_SUMMED = 128  # larger counts vary little around their mean: two terms of the Taylor series
_CELLS = 4096


@njit(nogil=True, cache=True, error_model="numpy")
def _thin(counts: NDArray, start: NDArray, unit: NDArray, log_p: NDArray, out: NDArray) -> None:
    """What log1p(unit x) changes by at the share p of the depth, for the stored counts of each cell."""
    value, choose = np.empty(_MAX_SUMMED + 1), np.empty(_MAX_SUMMED + 1)
    for i in range(len(unit)):
        if not log_p[i] < -_SAME_DEPTH:
            out[start[i] : start[i + 1]] = 0.0
            continue
        p, u = math.exp(log_p[i]), unit[i]
        odds = p / (1.0 - p)
        for k in range(_MAX_SUMMED + 1):
            value[k], choose[k] = math.log1p(u / p * k), -1.0
        for j in range(start[i], start[i + 1]):
            x = counts[j]
            if not x > 0:
                out[j] = 0.0
                continue
            if x > _MAX_SUMMED:
                out[j] = -0.5 / odds * x * (u / (1.0 + u * x)) ** 2
                continue
            n = int(round(x))
            if choose[n] < 0.0:  # a cell has few distinct counts
                probability, mean = (1.0 - p) ** n, 0.0
                for k in range(n):
                    probability *= (n - k) / (k + 1.0) * odds
                    mean += probability * value[k + 1]
                choose[n] = mean
            out[j] = choose[n] - math.log1p(u * n)


def change_at_depth(counts: Values, unit: NDArray[np.float64], log_p: NDArray[np.float64]) -> Values:
    """What expected expression changes by where cells are sequenced less deeply.

    Parameters
    ----------
    counts
        Whole numbers, ``(n_cells, n_genes)``.
    unit
        Expression is the log1p of counts times this, ``(n_cells,)``.
    log_p
        Logarithm of the share of the depth, ``(n_cells,)``; nothing changes above -0.01.

    Returns
    -------
    ``(n_cells, n_genes)``, sparse where `counts` are.
    """
    unit, log_p = (np.ascontiguousarray(v, dtype=np.float64) for v in (unit, log_p))
    if sparse.issparse(counts):
        out = np.empty(len(counts.data))
        _thin(counts.data, counts.indptr, unit, log_p, out)
        return sparse.csr_matrix((out, counts.indices, counts.indptr), shape=counts.shape)
    flat = np.ascontiguousarray(counts).ravel()
    out = np.empty(len(flat))
    _thin(flat, np.arange(len(counts) + 1) * counts.shape[1], unit, log_p, out)
    return out.reshape(counts.shape)


class Thinning(NamedTuple):
    """How deep groups of cells are to be thinned so that treated ones and their controls are equally deep.

    Attributes
    ----------
    treated
        Logarithm of the share of the depth of each treated group, ``(n_treated,)``; 0 where it is not the deeper one.
    step
        Controls of a context are thinned in steps of this logarithm, ``(n_contexts,)``; 0 where they never are the deeper ones.
    weight
        How much of the change of either step each treated group is compared with, ``(n_treated, n_steps)``.
    """

    treated: NDArray[np.float64]
    step: NDArray[np.float64]
    weight: Matrix

    @classmethod
    def of(cls, gap: NDArray[np.float64], context: NDArray[np.int64], n_contexts: int) -> Thinning:
        """Thinning of treated groups whose mean log library is larger by `gap` than that of their controls."""
        gap = np.where(np.abs(gap) < _SAME_DEPTH, 0.0, gap)
        deepest = np.zeros(n_contexts)
        np.minimum.at(deepest, context, gap)
        n_steps = int(np.clip(np.ceil(-deepest.min(initial=0.0) / _STEP), 0, _MAX_STEPS))
        step = deepest / max(n_steps, 1)
        at = np.divide(np.minimum(gap, 0.0), step[context], out=np.zeros(len(gap)), where=step[context] < 0)
        # between two steps the change is interpolated, and before the first is none
        weight = np.clip(1.0 - np.abs(at[:, None] - np.arange(1, n_steps + 1)), 0.0, 1.0)
        return cls(np.minimum(-gap, 0.0), step, weight)

    @property
    def steps(self) -> Matrix:
        """Logarithm of the share of the depth at either step, ``(n_contexts, n_steps)``."""
        return self.step[:, None] * np.arange(1, self.weight.shape[1] + 1)


class Counted(NamedTuple):
    """Some cells: their positions, counts, and the unit of which expression is the log1p."""

    positions: NDArray[np.int64]
    counts: Values
    unit: NDArray[np.float64]


def changes(cells: Iterator[Counted], log_p: Matrix, group: NDArray[np.int64], n_groups: int, n_genes: int) -> Matrix:
    """Sums over groups of what expression changes by at other depths, ``(n_depths, n_groups, n_genes)``.

    Parameters
    ----------
    cells
        Each cell once.
    log_p
        Logarithms of the shares of the depth of each cell, ``(n_cells, n_depths)``.
    group
        Group of each cell, ``(n_cells,)``.
    n_groups, n_genes
        Sizes.
    """
    total = np.zeros((log_p.shape[1], n_groups, n_genes))
    for positions, counts, unit in cells:
        for into, p in zip(total, log_p[positions].T, strict=True):
            if (p < 0).any():
                add_groups(into, group[positions], change_at_depth(counts, unit, p))
    return total


def equal_depth_changes(
    x: Values, group: NDArray[np.int64], reference: NDArray[np.int64], *, library: NDArray | None = None
) -> Matrix | None:
    """What the mean of each group of cells changes by, so that its difference to a reference is one at equal depth.

    Add the result to the means of the groups: what is left between a group and its reference does not come from sequencing depth.
    Of the two the deeper one is thinned in expectation; where this is the reference, the group gets the opposite of its change.

    Parameters
    ----------
    x
        Cells x genes: log1p of counts times a number per cell, such as counts per 10,000.
    group
        Group of each cell, ``(n_cells,)``; -1 for cells that are not used.
    reference
        Group that each group is compared with, ``(n_groups,)``; its own number, or -1, for groups that stay as they are.
    library
        Library of each cell, ``(n_cells,)``, by default up to a factor what one count is in `x`.

    Returns
    -------
    ``(n_groups, n_genes)``; `None` where counts can not be recovered from `x`, so that the effect of depth is not known.
    """
    x = x.tocsr() if sparse.issparse(x) else np.asarray(x)
    group, reference = np.asarray(group), np.asarray(reference)
    parts = [np.arange(start, min(start + _CELLS, x.shape[0])) for start in range(0, x.shape[0], _CELLS)]
    found = [counts_of(x[own]) for own in parts]
    if any(part is None for part in found):
        return None
    unit = np.concatenate([part[1] for part in found])
    log_library = -np.log(unit) if library is None else np.log(np.asarray(library, dtype=np.float64))
    used = np.isfinite(unit) & (group >= 0)
    n_groups = len(reference)
    n = np.bincount(group[used], minlength=n_groups)
    depth = np.bincount(group[used], log_library[used], n_groups) / np.maximum(n, 1)
    treated = np.flatnonzero((reference >= 0) & (reference != np.arange(n_groups)) & (n > 0) & (n[reference] > 0))
    plan = Thinning.of(depth[treated] - depth[reference[treated]], reference[treated], n_groups)
    n_steps = max(plan.weight.shape[1], 1)
    log_p = np.zeros((n_groups + 1, n_steps))  # the last row is that of cells without a group
    log_p[:-1, : plan.weight.shape[1]] = plan.steps
    log_p[treated, 0] += plan.treated
    cells = (Counted(own, counts, u) for own, (counts, u) in zip(parts, found, strict=True))
    number = np.maximum(np.bincount(group[group >= 0], minlength=n_groups), 1)
    at = np.where(used, group, n_groups)
    mean = changes(cells, log_p[at], at, n_groups + 1, x.shape[1])[:, :-1] / number[:, None]
    result = np.zeros(mean.shape[1:])
    result[treated] = mean[0, treated] * (plan.treated < 0)[:, None]
    for k, weight in enumerate(plan.weight.T):
        result[treated] -= weight[:, None] * mean[k, reference[treated]]
    return result
