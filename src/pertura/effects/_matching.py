"""How much perturbed cells differ from controls that resemble them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from pertura.data._cells import CellDataset, Rows
from pertura.data._constants import CONTROL_ONLY, KEYS

from ._sums import chunks, codes_of

Matrix = NDArray[np.float64]
_MAX_MATCHED = 1000


def matched_differences(
    dataset: CellDataset, rows: Rows, genes: NDArray[np.int64], n_perturbations: int, n_quantiles: int, seed: int = 0
) -> tuple[Matrix, NDArray[np.float64]]:
    """Quantiles of how much cells differ from a matched control, gene by gene (Baek et al. 2025).

    Each cell is matched to the control of its context that entropic optimal transport gives it most of (cost: Euclidean
    distance over 100, strength 1, as in the paper). Of each condition at most 1,000 cells are matched.

    Parameters
    ----------
    dataset, rows
        Cells.
    genes
        Genes that are compared; columns of -1 have no meaning.
    n_perturbations, n_quantiles
        Number of perturbations and of quantiles.
    seed
        Of the choice of cells.

    Returns
    -------
    Quantiles of the absolute difference ``(n_perturbations, n_quantiles, n_genes)``, 0 where nothing was measured, on the
    scale of a :class:`ConditionTable`, and the share of each perturbation in the matched cells ``(n_perturbations,)``.
    """
    import ot

    rng, context = np.random.default_rng(seed), codes_of(dataset, KEYS.CONTEXT, rows)
    codes, dose = np.split(dataset.fields[KEYS.PERTURBATION][rows], 2, axis=1)
    members = np.sort(np.where(dose > 0, codes, CONTROL_ONLY).astype(np.int64), axis=1)[:, ::-1]

    def expression(at: NDArray[np.int64]) -> Matrix:
        at = at if len(at) <= _MAX_MATCHED else np.sort(rng.choice(at, _MAX_MATCHED, replace=False))
        parts = [chunk.x[:, np.maximum(genes, 0)] for chunk in chunks(dataset, rows[at])]
        return np.concatenate([part.toarray() if sparse.issparse(part) else part for part in parts])

    found: list[list[Matrix]] = [[] for _ in range(n_perturbations)]
    for c in np.unique(context):
        here = np.flatnonzero(context == c)
        kinds, kind = np.unique(members[here], axis=0, return_inverse=True)
        is_control = (kinds == CONTROL_ONLY).all(1)
        if not is_control.any():
            continue
        control = expression(here[is_control[kind.ravel()]])
        for k in np.flatnonzero(~is_control):
            x = expression(here[kind.ravel() == k])
            cost = ot.dist(x, control, metric="euclidean") / 100.0
            partner = ot.sinkhorn(ot.unif(len(x)), ot.unif(len(control)), cost, 1.0).argmax(1)
            for member in kinds[k][kinds[k] >= 0]:
                found[member].append(np.abs(x - control[partner]))
    levels = (np.arange(n_quantiles) + 0.5) / n_quantiles
    difference = np.zeros((n_perturbations, n_quantiles, len(genes)))
    for row, parts in enumerate(found):
        if parts:
            difference[row] = np.quantile(np.concatenate(parts), levels, axis=0)
    return difference, np.array([sum(map(len, parts)) for parts in found], dtype=np.float64) / max(len(rows), 1)
