"""Registered tensors of any cells, read from wherever their AnnData has them."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from numpy.typing import NDArray
from scipy import sparse
from scvi.data import AnnDataManager
from torch.utils.data import Dataset

from ._collection import shards_of
from ._constants import CONTROL_ONLY, EFFECTS, KEYS
from ._library import Library

Rows = NDArray[np.int64]

# Neighboring rows of a file that are read together and shuffled with those of other places: long enough for few seeks, short enough
# for many conditions in one window where the file is sorted by them. Files that are compressed in larger parts are read in those, if
# a window has so many places.
CHUNK, _PLACES = 128, 16
_WINDOW, _MIN_WINDOW, _WINDOW_BYTES = 8192, 1024, 2**27
_GAP = 32  # rows that nobody asked for are cheaper to read than to skip, up to so many
_SCATTERED = 4  # rows per range; below that a file finds the rows by itself


class Batch(NamedTuple):
    """A minibatch: pre-treatment cells of the pairs, singletons, post-treatment cells of the pairs.

    Attributes
    ----------
    rows
        Its cells.
    n_pairs
        Number of pairs.
    held
        Ascending rows of the file that stay in memory as long as minibatches name them; every cell of this one is among them. Without any
        the cells are read one by one.
    ahead
        What later minibatches will name, read while the model trains on this one.
    """

    rows: Rows
    n_pairs: int
    held: tuple[Rows, ...] = ()
    ahead: Rows | None = None


@dataclass(frozen=True)
class Expression:
    """Expression of the model's genes, in the model's order.

    Attributes
    ----------
    values
        Cells x genes as stored: array, sparse matrix, a matrix of a backed file, or the shards of a collection.
    columns
        Where the model's genes are in `values`; `None` where they are all of them, in order.
    kind
        ``"counts"``, ``"continuous"`` or ``"effects"``.
    """

    values: Any
    columns: NDArray[np.int64] | None
    kind: str

    @classmethod
    def of(cls, adata: AnnData, layer: str | None, genes: NDArray[np.str_] | pd.Index, kind: str) -> Expression:
        """Expression of the named genes in a layer.

        Raises
        ------
        ValueError
            If genes are missing or occur twice.
        """
        stored = pd.Index(adata.var_names.astype(str))
        genes = pd.Index(np.asarray(genes).astype(str))
        if not stored.is_unique:
            doubled = stored[stored.duplicated()].unique()
            raise ValueError(
                f"`adata`: {len(doubled)} gene names occur more than once (such as {doubled[0]!r}), and genes are "
                "matched by name. Call `adata.var_names_make_unique()` first."
            )
        position = stored.get_indexer(genes)
        if (position < 0).any():
            missing = genes[position < 0]
            raise ValueError(
                f"`adata`: {len(missing)} of the model's {len(genes)} genes are missing "
                f"({', '.join(missing[:5])}{', …' if len(missing) > 5 else ''}). Genes are matched by name: use the "
                "same annotation, and add zeros only for genes that really were not expressed."
            )
        same = len(stored) == len(genes) and (position == np.arange(len(genes))).all()
        values = shards_of(adata.X if layer is None else adata.layers[layer])
        if sparse.issparse(values) and values.format != "csr":
            values = values.tocsr()  # rows are what is read, again and again
        if sparse.issparse(values) and values.indices.dtype != values.indptr.dtype:
            # of two types of numbers, one would be converted whole for each minibatch
            values = type(values)((values.data, values.indices, values.indptr), shape=values.shape)
        return cls(values, None if same else position, kind)

    def rows(self, rows: Rows) -> NDArray[np.float32]:
        """Dense expression of some cells, ``(len(rows), n_genes)``, in the order asked for."""
        block = self.stored(rows)
        block = block.toarray() if sparse.issparse(block) else block
        return np.ascontiguousarray(block, dtype=np.float32)

    def stored(self, rows: Rows) -> Any:
        """The same as it is stored, dense or sparse."""
        block = self.values[rows] if self.in_memory else _read(self.values, rows)
        return block if self.columns is None else block[:, self.columns]

    @property
    def in_memory(self) -> bool:
        """Whether reading single rows costs nothing."""
        return isinstance(self.values, np.ndarray) or sparse.issparse(self.values)

    @property
    def window(self) -> int | None:
        """Number of rows of a file that training holds at once: 8,192, or fewer where they are large; `None` in memory."""
        if self.in_memory:
            return None
        n, n_genes = self.values.shape
        group, shards = getattr(self.values, "group", None), getattr(self.values, "nnz", n * n_genes / 2)
        per_row = 2 * (shards if group is None else group["indices"].shape[0]) / max(n, 1)
        return int(np.clip(_WINDOW_BYTES // max(4 * per_row, 1), _MIN_WINDOW, _WINDOW))

    @property
    def chunk(self) -> int:
        """Number of neighboring rows of a file that are read together."""
        if self.window is None:
            return CHUNK
        group = getattr(self.values, "group", None)
        stored = self.values if group is None else group["indices"]
        together = (getattr(stored, "chunks", None) or (1,))[0]
        if isinstance(together, tuple):  # of dask
            together = together[0]
        rows = together if group is None else together * self.values.shape[0] // max(stored.shape[0], 1)
        return int(np.clip(rows, CHUNK, max(CHUNK, self.window // _PLACES)))


def _read(values: Any, rows: Rows) -> Any:
    """Rows of a file, in the order asked for: read in ascending order, each once, neighbors together."""
    unique, inverse = np.unique(rows, return_inverse=True)
    parts = np.split(unique, np.flatnonzero(np.diff(unique) > _GAP) + 1)
    # dask, annbatch and files of columns plan for themselves
    whole = hasattr(values, "compute") or getattr(values, "format", "csr") != "csr"
    if whole or len(unique) < _SCATTERED * len(parts):
        block = values[unique]
        block = block.compute() if hasattr(block, "compute") else block
    else:
        # anndata's own slicing of a sparse file looks up a version each time, which takes longer than reading
        ranges = values._to_backed() if hasattr(values, "_to_backed") else values
        blocks = [ranges[part[0] : part[-1] + 1][part - part[0]] for part in parts]
        block = sparse.vstack(blocks, format="csr") if sparse.issparse(blocks[0]) else np.concatenate(blocks)
    block = block if sparse.issparse(block) else np.asarray(block)
    return block if len(rows) == len(unique) and (inverse[1:] > inverse[:-1]).all() else block[inverse]


class CellDataset(Dataset):
    """Registered tensors of any cells, in the order asked for, whatever the order in the file.

    A minibatch holds what was registered (``KEYS``, shape ``(n_cells, ...)``, float32), the library of each cell under
    ``KEYS.LIBRARY`` (see :class:`Library`; 1 for data that are not counts), and ``n_pairs``. In place of a row of effects it has
    the control of its context, which is 0.

    Parameters
    ----------
    manager
        Registered data.
    """

    def __init__(self, manager: AnnDataManager) -> None:
        adata = manager.adata
        expression, library = getattr(manager, "expression", None), getattr(manager, "library", None)
        if expression is None:
            state = manager.get_state_registry(KEYS.X)
            layer = manager.data_registry[KEYS.X]["attr_key"]
            expression = Expression.of(adata, layer, state["column_names"], state["data_kind"])
            library = Library.registered(state["library"], adata.obs)
        self.expression: Expression = expression
        self.library: Library = library
        self.n_cells: int = adata.n_obs
        self.n_genes: int = expression.values.shape[1] if expression.columns is None else len(expression.columns)
        self._held: list[tuple[Rows, Expression]] = []
        self._ahead: tuple[Rows, Future] | None = None
        self.fields: dict[str, Any] = {}
        for key in manager.data_registry:
            if key == KEYS.X:
                continue
            values = manager.get_from_registry(key)
            if not hasattr(values, "shape") or values.shape[:1] != (self.n_cells,):
                continue  # not about cells
            if sparse.issparse(values):
                self.fields[key] = values.tocsr()
            else:
                self.fields[key] = np.asarray(values, dtype=np.float32).reshape(self.n_cells, -1)

    def __getstate__(self) -> dict[str, Any]:
        """Another process reads for itself."""
        return {**self.__dict__, "_held": [], "_ahead": None}

    def __getitem__(self, batch: Batch) -> dict[str, torch.Tensor | int]:
        rows = np.asarray(batch.rows)
        out: dict[str, torch.Tensor | int] = {KEYS.X: torch.from_numpy(self._expression(batch))}
        for key, values in self.fields.items():
            block = values[rows]
            block = block.toarray().astype(np.float32) if sparse.issparse(block) else block
            out[key] = torch.from_numpy(block)
        if self.expression.kind == EFFECTS:  # what is asked of a row starts from its control, which is 0
            out[KEYS.X].zero_()
            codes, dose = out[KEYS.PERTURBATION].chunk(2, dim=1)
            out[KEYS.PERTURBATION] = torch.cat([torch.full_like(codes, CONTROL_ONLY), torch.zeros_like(dose)], 1)
        library = self.library.of(rows, out[KEYS.X].numpy())
        out[KEYS.LIBRARY] = torch.from_numpy(library.astype(np.float32))[:, None]
        out["n_pairs"] = batch.n_pairs
        return out

    def _expression(self, batch: Batch) -> NDArray[np.float32]:
        """Dense expression of a minibatch, from rows in memory where it names some."""
        if not batch.held:
            return self.expression.rows(batch.rows)
        # what is no longer named goes before anything is read
        self._held = [h for h in self._held if any(np.array_equal(h[0], rows) for rows in batch.held)]
        for rows in batch.held:
            if not any(np.array_equal(h[0], rows) for h in self._held):
                self._held.append((rows, self._read(rows)))
        if batch.ahead is not None and self._ahead is None:
            reader = ThreadPoolExecutor(1)
            self._ahead = batch.ahead, reader.submit(self._hold, batch.ahead)
            reader.shutdown(wait=False)
        out = np.empty((len(batch.rows), self.n_genes), dtype=np.float32)
        for rows, expression in self._held:
            at = np.minimum(np.searchsorted(rows, batch.rows), len(rows) - 1)
            found = rows[at] == batch.rows
            out[found] = expression.rows(at[found])
        return out

    def _hold(self, rows: Rows) -> Expression:
        return Expression(self.expression.stored(rows), None, self.expression.kind)

    def _read(self, rows: Rows) -> Expression:
        """Rows of a file, which may have been read already."""
        ahead, self._ahead = self._ahead, None
        return ahead[1].result() if ahead is not None and np.array_equal(ahead[0], rows) else self._hold(rows)

    def __len__(self) -> int:
        return self.n_cells
