"""Mean expression per perturbation, dose and context, in one pass over the cells."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scvi.data import AnnDataManager

from pertura.data._cells import CellDataset
from pertura.data._constants import CONTROL_ONLY, KEYS
from pertura.data._vocabulary import dose_units

logger = logging.getLogger(__name__)

_TARGET_SUM = 1e4
_CHUNK_ENTRIES = 4_000_000  # cells x genes that are in memory at one time
# few cells say little about a gene's variance: as many degrees of freedom are lent by the other groups
_PRIOR_DF = 3.0


@dataclass(frozen=True)
class Pseudobulk:
    """Means of treated conditions and, below them, of the controls of every context.

    Attributes
    ----------
    codes
        Members of each condition, sorted and padded with -1, ``(n_conditions, order)``.
    dose
        Their doses in the registered unit (1 without doses), padded with 0, ``(n_conditions, order)``.
    context
        Code of the context, ``(n_conditions,)``.
    mean, variance
        Mean expression and its squared standard error, ``(n_conditions + n_contexts, n_genes)``; the rows of contexts
        without controls are 0.
    has_control
        Whether a context has controls, ``(n_contexts,)``.
    """

    codes: NDArray[np.int64]
    dose: NDArray[np.float64]
    context: NDArray[np.int64]
    mean: NDArray[np.float32]
    variance: NDArray[np.float32]
    has_control: NDArray[np.bool_]


def members(encoded: NDArray, max_dose: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Codes and registered doses of cells, members without a dose left out.

    Parameters
    ----------
    encoded
        Component codes and relative doses side by side, ``(n_cells, 2 * order)``.
    max_dose
        Unit of the relative doses, per perturbation.

    Returns
    -------
    codes, dose
        Both ``(n_cells, order)``: members first, padded with -1 and 0.
    """
    codes, dose = np.split(np.asarray(encoded, dtype=np.float64), 2, axis=1)
    codes = codes.round().astype(np.int64)
    present = (codes != CONTROL_ONLY) & (dose > 0)
    unit = dose_units(max_dose)
    order = np.argsort(~present, axis=1, kind="stable")
    codes, dose = np.where(present, codes, CONTROL_ONLY), np.where(present, dose * unit[codes], 0.0)
    return np.take_along_axis(codes, order, 1), np.take_along_axis(dose, order, 1)


def pseudobulk(
    manager: AnnDataManager,
    rows: NDArray[np.int64],
    *,
    max_dose: NDArray[np.float64],
    n_contexts: int,
) -> Pseudobulk:
    """Means per (perturbation, dose, context) and of controls per context; sparse data stay sparse.

    Of counts, log1p of counts per 10,000 is averaged; other data are as they were registered.

    Standard errors are moderated: the variance of a group is averaged, by degrees of freedom, with that within all
    groups, which counts for three.

    Parameters
    ----------
    manager
        Registered data.
    rows
        Cells to use, ascending.
    max_dose
        Highest dose of each perturbation.
    n_contexts
        Number of contexts.

    Raises
    ------
    ValueError
        Where no perturbed cell shares its context with a control.
    """
    codes, dose = members(np.asarray(manager.adata.obsm[f"_scvi_{KEYS.PERTURBATION}"])[rows], max_dose)
    context = np.asarray(manager.adata.obs[f"_scvi_{KEYS.CONTEXT}"])[rows].astype(np.int64)
    # codes first: controls, all of whose members are -1, sort before the treated
    keys = np.concatenate([codes, dose, context[:, None]], axis=1)
    groups, group = np.unique(keys, axis=0, return_inverse=True)
    n, total, square = group_sums(manager, rows, group.ravel(), len(groups))
    mean, variance = _errors(n, total, square)

    order = codes.shape[1]
    group_codes = groups[:, :order].astype(np.int64)
    group_dose, group_context = groups[:, order : 2 * order], groups[:, -1].astype(np.int64)
    is_control = (group_codes == CONTROL_ONLY).all(axis=1)
    has_control = np.zeros(n_contexts, dtype=bool)
    has_control[group_context[is_control]] = True
    measured = ~is_control & has_control[group_context]
    lost = int(n[~is_control & ~measured].sum())
    if not measured.any():
        raise ValueError(
            "`adata`: no perturbed training cell has a control of its context to compare with. "
            "Every context needs control cells; check `context_key`, `control` and the training rows."
        )
    if lost:
        logger.warning("%d perturbed cells are in contexts without control cells: they are not used.", lost)

    n_measured = int(measured.sum())
    stacked = np.zeros((2, n_measured + n_contexts, total.shape[1]), dtype=np.float32)
    at = n_measured + group_context[is_control]
    for part, values in zip(stacked, (mean, variance), strict=True):
        part[:n_measured], part[at] = values[measured], values[is_control]
    return Pseudobulk(group_codes[measured], group_dose[measured], group_context[measured], *stacked, has_control)


def control_means(
    manager: AnnDataManager, contexts: NDArray[np.int64]
) -> tuple[NDArray[np.bool_], NDArray[np.float32]]:
    """Mean expression of the control cells of some contexts of any registered data.

    Returns
    -------
    found, mean
        Whether a context has control cells, ``(n,)``, and their mean, ``(n, n_genes)``.
    """
    encoded = np.asarray(manager.adata.obsm[f"_scvi_{KEYS.PERTURBATION}"])
    codes, dose = np.split(encoded, 2, axis=1)
    context = np.asarray(manager.adata.obs[f"_scvi_{KEYS.CONTEXT}"])
    treated = ((codes != CONTROL_ONLY) & (dose > 0)).any(axis=1)
    rows = np.flatnonzero(~treated & np.isin(context, contexts))
    group = np.searchsorted(contexts, context[rows])
    n, total, _ = group_sums(manager, rows, group, len(contexts))
    return n > 0, (total / np.maximum(n, 1)[:, None]).astype(np.float32)


def group_sums(
    manager: AnnDataManager,
    rows: NDArray[np.int64],
    group: NDArray[np.int64],
    n_groups: int,
) -> tuple[NDArray, NDArray, NDArray]:
    """Number of cells, sums and sums of squares of each group of cells.

    Parameters
    ----------
    manager, rows
        As in :func:`pseudobulk`.
    group, n_groups
        Group of each of the `rows`, and their number.

    Returns
    -------
    n, total, square
        ``(n_groups,)``, and twice ``(n_groups, n_genes)``, float64.
    """
    dataset = CellDataset(manager)
    shape = (n_groups, dataset.n_genes)
    total, square = np.zeros(shape), np.zeros(shape)
    for positions, x in _chunks(dataset, rows):
        # a chunk holds few of the groups
        present, local = np.unique(group[positions], return_inverse=True)
        one = np.ones(len(positions))
        member = sparse.csr_matrix((one, (local, np.arange(len(positions)))), shape=(len(present), len(positions)))
        for into, values in ((total, x), (square, x.multiply(x) if sparse.issparse(x) else x * x)):
            part = member @ values
            into[present] += part.toarray() if sparse.issparse(part) else part
    return np.bincount(group, minlength=n_groups), total, square


def _chunks(
    dataset: CellDataset, rows: NDArray[np.int64]
) -> Iterator[tuple[NDArray[np.int64], NDArray | sparse.csr_matrix]]:
    """Positions in `rows` and normalised expression, some thousand cells at a time."""
    expression = dataset.expression
    size = int(np.clip(_CHUNK_ENTRIES // dataset.n_genes, 64, 8192))
    for start in range(0, len(rows), size):
        positions = np.arange(start, min(start + size, len(rows)))
        own = rows[positions]
        part = expression.values[own]
        part = part.compute() if hasattr(part, "compute") else part
        part = part.tocsr() if sparse.issparse(part) else np.asarray(part)
        part = (part if expression.columns is None else part[:, expression.columns]).astype(np.float64)
        if expression.kind == "counts":
            scale = _TARGET_SUM / _library(dataset, own, part)
            part = (sparse.diags(scale) @ part).log1p() if sparse.issparse(part) else _log1p(part, scale)
        yield positions, part


def _library(dataset: CellDataset, rows: NDArray[np.int64], counts: Any) -> NDArray[np.float64]:
    """Library of cells, as minibatches have it."""
    if dataset.size_unit is not None:
        return dataset.fields[KEYS.SIZE_FACTOR][rows].ravel().astype(np.float64) * dataset.size_unit
    return np.maximum(np.asarray(counts.sum(axis=1)).ravel(), 1.0)


def _log1p(x: NDArray, scale: NDArray) -> NDArray:
    return np.log1p(x * scale[:, None])


def _errors(n: NDArray, total: NDArray, square: NDArray) -> tuple[NDArray, NDArray]:
    """Means and their moderated squared standard errors."""
    mean = total / n[:, None]
    within = np.maximum(square - n[:, None] * mean**2, 0.0)
    df = n - 1.0
    if not df.sum():
        logger.warning("No condition has replicates: the standard errors of the means are not known.")
        return mean, np.zeros_like(mean)
    pooled = within.sum(axis=0) / df.sum()
    variance = (within + _PRIOR_DF * pooled) / (df[:, None] + _PRIOR_DF)
    return mean, variance / n[:, None]
