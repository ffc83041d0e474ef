"""On what scale values are, and the counts behind normalized ones."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

Values = NDArray | sparse.csr_matrix

# counts that are recovered from a logarithm are whole, or they were none
_MAX_TELLING, _MIN_TELLING, _TOLERANCE, _MAX_BROKEN, _MAX_SMALLEST = 20, 20, 0.02, 0.01, 3


def counts_of(x: Values) -> tuple[Values, NDArray[np.float64]] | None:
    """Counts behind expression that is the log1p of counts times a number per cell.

    The smallest positive value of a cell is one count, or two or three where others are no multiples of it.

    Returns
    -------
    Counts as stored in `x`, and their unit, ``(n_cells,)``: NaN in cells without any. `None` where the values are of another
    kind: negative, scaled, corrected, or logarithms to another base.
    """
    stored = x.data if sparse.issparse(x) else x.ravel()
    # counts per 10,000 or per million have smaller logarithms
    if not len(stored) or not stored.min() >= 0 or stored.max() > 30:
        return None
    linear = np.expm1(stored.astype(np.float64))
    start = x.indptr if sparse.issparse(x) else np.arange(len(x) + 1) * x.shape[1]
    length = np.diff(start)
    unit = np.full(len(length), np.nan)
    some = np.flatnonzero(length)
    unit[some] = np.minimum.reduceat(np.where(linear > 0, linear, np.inf), start[some])
    unit[~np.isfinite(unit)] = np.nan
    cell = np.repeat(np.arange(len(length)), length)
    least = unit.copy()
    for smallest in range(1, _MAX_SMALLEST + 1):
        counts = np.nan_to_num(linear / unit[cell])
        whole = np.round(counts)
        # large values are near a whole number whatever they are
        broken = (linear > 0) & (counts < _MAX_TELLING) & (np.abs(counts - whole) > _TOLERANCE)
        if smallest == _MAX_SMALLEST or not broken.any():
            break
        again = np.unique(cell[broken])
        unit[again] = least[again] / (smallest + 1)
    # nor does the smallest value of a cell tell anything
    number = ((linear > 0) & (counts < _MAX_TELLING)).sum() - np.isfinite(unit).sum()
    if number < _MIN_TELLING or broken.sum() > _MAX_BROKEN * number:
        return None
    if sparse.issparse(x):
        return sparse.csr_matrix((whole, x.indices, x.indptr), shape=x.shape), unit
    return whole.reshape(x.shape), unit
