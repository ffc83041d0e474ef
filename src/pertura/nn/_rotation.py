"""Rotations to simple structure."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_N_STARTS, _MAX_STEPS, _TOLERANCE = 10, 500, 1e-8


def quartimax(loadings: NDArray, seed: int = 0) -> NDArray[np.float64]:
    r"""Orthogonal rotation after which each row has few large entries.

    Maximises :math:`\sum_{tj} (L R)_{tj}^4` by repeated projection on the orthogonal matrices, from several starts.

    Parameters
    ----------
    loadings
        L, ``(n, k)``.
    seed
        Of the starts.

    Returns
    -------
    R, ``(k, k)``.

    Notes
    -----
    Neuhaus & Wrigley 1954, Brit J Stat Psychol 7:81-91.
    """
    loadings = np.asarray(loadings, dtype=np.float64)
    rng = np.random.default_rng(seed)
    k = loadings.shape[1]
    best, result = -1.0, np.eye(k)
    for _ in range(_N_STARTS):
        rotation = np.linalg.qr(rng.normal(size=(k, k)))[0]
        reached = 0.0
        for _ in range(_MAX_STEPS):
            left, values, right = np.linalg.svd(loadings.T @ (loadings @ rotation) ** 3)
            rotation = left @ right
            if values.sum() <= reached * (1.0 + _TOLERANCE):
                break
            reached = values.sum()
        if (score := float(((loadings @ rotation) ** 4).sum())) > best:
            best, result = score, rotation
    return result
