"""Sums over groups of cells, in one pass; sparse values stay sparse."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray
from scipy import sparse
from scvi.data import AnnDataManager

from pertura.data._cells import CellDataset, Rows
from pertura.data._constants import CONTROL_ONLY, EFFECTS, KEYS
from pertura.data._scale import counts_of

Matrix = NDArray[np.float64]
Values = NDArray | sparse.csr_matrix

TARGET_SUM = 1e4
_CHUNK_ENTRIES = 4_000_000  # stored numbers that are in memory at one time
_MAX_CHUNK = 16_384  # cells
# log library of a usual cell: about this origin, the square of the log library says something else than the log itself
_LOG_LIBRARY = 8.0


class Chunk(NamedTuple):
    """Some cells: their positions, values as registered, expression on the scale of the table, and library."""

    positions: NDArray[np.int64]
    raw: Values
    x: Values
    library: NDArray[np.float64]


class Sums:
    """What is added up while cells pass by."""

    def __init__(self, dataset: CellDataset, n_cells: int, n_groups: int, n_batches: int, linear: bool) -> None:
        self.dataset, n_genes = dataset, dataset.n_genes
        self.total, self.square = np.zeros((2 * n_groups, n_genes)), np.zeros((n_groups, n_genes))
        self.depth, self.depth_square = np.zeros((2 * n_groups, 2)), np.zeros((2, 2))
        self.depth_x = np.zeros((2, n_genes))
        self.by_batch = np.zeros((n_batches if n_batches > 1 else 0, n_genes))
        self.raw, self.raw_square = np.zeros(n_genes), np.zeros(n_genes)
        self.linear_total = np.zeros((n_groups, n_genes)) if linear else None
        self.linear_square = np.zeros((n_groups, n_genes)) if linear else None
        self.unit = self.library = 0.0
        self.log_library = np.full(n_cells, np.nan)
        self.sample_x: list[Values] = []
        self.sample_depth: list[Matrix] = []

    def add_all(
        self,
        rows: Rows,
        group: NDArray[np.int64],
        half: NDArray[np.int64],
        batch: NDArray[np.int64],
        kept: NDArray[np.bool_],
    ) -> None:
        """Read the cells once."""
        part = group * 2 + half
        kind = self.dataset.expression.kind
        counts, countable = kind == "counts", kind != EFFECTS
        for positions, raw, x, library in chunks(self.dataset, rows):
            depth = np.log(library) - _LOG_LIBRARY
            if counts:
                self.log_library[positions] = np.log(library)
            elif countable:
                found = counts_of(raw)
                countable = found is not None
                self.log_library[positions] = np.log(TARGET_SUM / found[1]) if countable else np.nan
            depth = np.stack([depth, depth**2], axis=1)
            add_groups(self.total, part[positions], x)
            add_groups(self.square, group[positions], squared(x))
            if len(self.by_batch):
                add_groups(self.by_batch, batch[positions], x)
            for k in (0, 1):
                self.depth[:, k] += np.bincount(part[positions], depth[:, k], minlength=len(self.depth))
            self.depth_square += depth.T @ depth
            self.depth_x += (x.T @ depth).T
            self.raw += column_sums(raw)
            self.raw_square += column_sums(squared(raw))
            self.library += float(library.sum())
            if self.linear_total is not None:
                scaled = _scaled(raw, TARGET_SUM / library)
                self.unit += float((TARGET_SUM / library).sum())
                add_groups(self.linear_total, group[positions], scaled)
                add_groups(self.linear_square, group[positions], squared(scaled))
            chosen = kept[positions]
            self.sample_x.append(x[chosen].astype(np.float32))
            self.sample_depth.append(depth[chosen])
        if not countable:
            self.log_library[:] = np.nan

    def sampled(self) -> Values:
        if not self.sample_x:
            return np.zeros((0, self.dataset.n_genes), dtype=np.float32)
        if sparse.issparse(self.sample_x[0]):
            return sparse.vstack(self.sample_x, format="csr")
        return np.concatenate(self.sample_x)


def control_means(
    manager: AnnDataManager, contexts: NDArray[np.int64]
) -> tuple[NDArray[np.bool_], NDArray[np.float32]]:
    """Mean expression of the control cells of some contexts of any registered data.

    Returns
    -------
    found, mean
        Whether a context has control cells, ``(n,)``, and their mean, ``(n, n_genes)``.
    """
    dataset = CellDataset(manager)
    codes, dose = np.split(dataset.fields[KEYS.PERTURBATION], 2, axis=1)
    context = codes_of(dataset, KEYS.CONTEXT, np.arange(len(codes)))
    treated = ((codes != CONTROL_ONLY) & (dose > 0)).any(axis=1)
    if dataset.expression.kind == EFFECTS:
        return np.ones(len(contexts), dtype=bool), np.zeros((len(contexts), dataset.n_genes), dtype=np.float32)
    rows = np.flatnonzero(~treated & np.isin(context, contexts))
    group = np.searchsorted(contexts, context[rows])
    total = np.zeros((len(contexts), dataset.n_genes))
    for chunk in chunks(dataset, rows):
        add_groups(total, group[chunk.positions], chunk.x)
    n = np.bincount(group, minlength=len(contexts))
    return n > 0, (total / np.maximum(n, 1)[:, None]).astype(np.float32)


def codes_of(dataset: CellDataset, key: str, rows: Rows) -> NDArray[np.int64]:
    if key not in dataset.fields:
        return np.zeros(len(rows), dtype=np.int64)
    return dataset.fields[key][rows].ravel().astype(np.int64)


def chunks(dataset: CellDataset, rows: Rows) -> Iterator[Chunk]:
    """Some thousand cells at a time; sparse values stay sparse."""
    expression = dataset.expression
    values = expression.values
    stored = dataset.n_genes
    if sparse.issparse(values):
        stored = max(1, int(values.nnz / max(values.shape[0], 1)))
    size = int(np.clip(_CHUNK_ENTRIES // stored, 64, _MAX_CHUNK))
    for start in range(0, len(rows), size):
        positions = np.arange(start, min(start + size, len(rows)))
        own = rows[positions]
        part = expression.stored(own).astype(np.float64)
        if expression.kind != "counts":
            yield Chunk(positions, part, part, np.ones(len(own)))
            continue
        library = dataset.library.of(own, part)
        x = _scaled(part, TARGET_SUM / library)
        if sparse.issparse(x):
            np.log1p(x.data, out=x.data)
        else:
            np.log1p(x, out=x)
        yield Chunk(positions, part, x, library)


def _scaled(x: Values, scale: NDArray) -> Values:
    """Rows times a number each."""
    if not sparse.issparse(x):
        return x * scale[:, None]
    return sparse.csr_matrix((x.data * np.repeat(scale, np.diff(x.indptr)), x.indices, x.indptr), shape=x.shape)


def squared(x: Values) -> Values:
    return sparse.csr_matrix((x.data**2, x.indices, x.indptr), shape=x.shape) if sparse.issparse(x) else x * x


def column_sums(x: Values) -> NDArray[np.float64]:
    if not sparse.issparse(x):
        return x.sum(0)
    result = np.zeros((1, x.shape[1]))
    add_groups(result, np.zeros(x.shape[0], dtype=np.int64), x)
    return result[0]


@njit(nogil=True, cache=True)
def _add_rows(into: Matrix, group: NDArray, data: NDArray, indices: NDArray, start: NDArray) -> None:
    for i in range(len(group)):
        total = into[group[i]]
        for j in range(start[i], start[i + 1]):
            total[indices[j]] += data[j]


def add_groups(into: Matrix, group: NDArray[np.int64], x: Values) -> None:
    """Add rows to the sums of their groups."""
    if sparse.issparse(x):
        _add_rows(into, group, x.data, x.indices, x.indptr)
        return
    present, local = np.unique(group, return_inverse=True)  # a chunk may hold few of the groups
    member = sparse.csr_matrix(
        (np.ones(len(group)), (local.ravel(), np.arange(len(group)))), (len(present), len(group))
    )
    into[present] += member @ x


def project(dataset: CellDataset, rows: Rows, axes: NDArray) -> NDArray[np.float32]:
    """Coordinates of cells along axes of expression on the scale of the table, ``(n_rows, n_axes)``; cells are read once.

    Parameters
    ----------
    dataset
        Registered cells.
    rows
        Cells to use.
    axes
        ``(n_axes, n_genes)``.
    """
    result = np.empty((len(rows), len(axes)), dtype=np.float32)
    for chunk in chunks(dataset, np.asarray(rows, dtype=np.int64)):
        result[chunk.positions] = chunk.x @ axes.T
    return result
