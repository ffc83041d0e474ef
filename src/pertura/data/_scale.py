"""On what scale values are, and the counts behind normalized ones."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

Values = NDArray | sparse.csr_matrix

# counts that are recovered from a logarithm are whole, or they were none
_MAX_TELLING, _MIN_TELLING, _TOLERANCE, _MAX_BROKEN = 20, 20, 0.02, 0.01


def counts_of(x: Values) -> tuple[Values, NDArray[np.float64]] | None:
    """Counts behind expression that is the log1p of counts times a number per cell.

    The smallest positive value of a cell is taken for one count.

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
    counts = np.nan_to_num(linear / np.repeat(unit, length))
    whole = np.round(counts)
    # the smallest value of a cell, and large ones, are near a whole number whatever they are
    telling = (linear > 0) & (counts < _MAX_TELLING)
    error = np.abs(counts - whole)[telling]
    number = len(error) - np.isfinite(unit).sum()
    if number < _MIN_TELLING or (error > _TOLERANCE).sum() > _MAX_BROKEN * number:
        return None
    if sparse.issparse(x):
        return sparse.csr_matrix((whole, x.indices, x.indptr), shape=x.shape), unit
    return whole.reshape(x.shape), unit
