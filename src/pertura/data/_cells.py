"""Registered tensors of any cells, read from wherever their AnnData has them."""

from __future__ import annotations

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

from ._constants import KEYS
from ._library import Library

Rows = NDArray[np.int64]


class Batch(NamedTuple):
    """Rows of a minibatch: pre-treatment cells of the pairs, singletons, post-treatment cells of the pairs."""

    rows: Rows
    n_pairs: int


@dataclass(frozen=True)
class Expression:
    """Expression of the model's genes, in the model's order.

    Attributes
    ----------
    values
        Cells x genes as stored: array, sparse matrix, or a matrix of a backed file.
    columns
        Where the model's genes are in `values`; `None` where they are all of them, in order.
    kind
        ``"counts"`` or ``"continuous"``.
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
        values = adata.X if layer is None else adata.layers[layer]
        if sparse.issparse(values) and values.format != "csr":
            values = values.tocsr()  # rows are what is read, again and again
        return cls(values, None if same else position, kind)

    def rows(self, rows: Rows) -> NDArray[np.float32]:
        """Dense expression of some cells, ``(len(rows), n_genes)``, in the order asked for."""
        block = self.stored(rows)
        block = block.toarray() if sparse.issparse(block) else block
        return np.ascontiguousarray(block, dtype=np.float32)

    def stored(self, rows: Rows) -> Any:
        """The same as it is stored, dense or sparse."""
        if isinstance(self.values, np.ndarray) or sparse.issparse(self.values):
            block = self.values[rows]
        else:  # files must be read in ascending order, each row once
            unique, inverse = np.unique(rows, return_inverse=True)
            block = self.values[unique]
            block = (block.compute() if hasattr(block, "compute") else block)[inverse]
        block = block if sparse.issparse(block) else np.asarray(block)
        return block if self.columns is None else block[:, self.columns]


class CellDataset(Dataset):
    """Registered tensors of any cells, in the order asked for, whatever the order in the file.

    A minibatch holds what was registered (``KEYS``, shape ``(n_cells, ...)``, float32), the library of each cell under
    ``KEYS.LIBRARY`` (see :class:`Library`; 1 for data that are not counts), and ``n_pairs``.

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

    def __getitem__(self, batch: Batch) -> dict[str, torch.Tensor | int]:
        rows = np.asarray(batch.rows)
        out: dict[str, torch.Tensor | int] = {KEYS.X: torch.from_numpy(self.expression.rows(rows))}
        for key, values in self.fields.items():
            block = values[rows]
            block = block.toarray().astype(np.float32) if sparse.issparse(block) else block
            out[key] = torch.from_numpy(block)
        library = self.library.of(rows, out[KEYS.X].numpy())
        out[KEYS.LIBRARY] = torch.from_numpy(library.astype(np.float32))[:, None]
        out["n_pairs"] = batch.n_pairs
        return out

    def __len__(self) -> int:
        return self.n_cells
