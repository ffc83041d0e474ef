"""What the functions below a model ask of it."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from anndata import AnnData
from numpy.typing import NDArray
from scvi.data import AnnDataManager

from pertura.data._vocabulary import Vocabulary
from pertura.effects._discrepancy import Discrepancy
from pertura.module._base import PerturbationModule

from ._registered import Registered


class Model(Protocol):
    """A model: its registered data, its module, and what it may override.

    Attributes
    ----------
    registered, vocabulary
        What was registered, and the perturbations that are known.
    module
        Pyro model and guide.
    adata, adata_manager, registry
        Data of the model, as scvi-tools has them; `adata` may be `None`.
    is_trained_, train_indices
        Whether it is trained, and on which rows.
    """

    registered: Registered
    vocabulary: Vocabulary
    module: PerturbationModule
    adata: AnnData | None
    adata_manager: AnnDataManager | None
    registry: dict[str, Any]
    is_trained_: bool
    train_indices: NDArray[np.int64]
    _discrepancy: Discrepancy
    _query_columns: tuple[str, ...]
    _can_predict_features: bool
    _only_genes: bool

    def _check_if_trained(self, warn: bool, message: str) -> None: ...
    def _check_representable(self, label: str) -> None: ...
    def _can_take_back(self, name: str) -> bool: ...
    def _fields(self, args: dict[str, Any], features: Any = None) -> list[Any]: ...
