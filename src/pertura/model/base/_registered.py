"""What was registered with a model: built once, passed to everything that needs it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from pertura.data._constants import EFFECTS, KEYS
from pertura.data._fields import ExpressionField
from pertura.data._vocabulary import Vocabulary


@dataclass(frozen=True)
class Registered:
    """Registered names, kinds and arguments.

    Attributes
    ----------
    vocabulary
        Perturbations.
    gene_names
        Genes, in the model's order.
    contexts
        Contexts, in the order of their codes; ``("all",)`` where none were registered.
    batches
        Values of the batch column, in the order of their codes.
    data_kind
        ``"counts"``, ``"continuous"`` or ``"effects"``.
    nonnegative
        Whether the smallest registered value is 0, as of counts and their logarithms: then no prediction should be negative.
    library
        How the library of a cell is found; see :func:`pertura.data._library.find_library`.
    arguments
        Arguments of ``setup_anndata``.
    mudata
        How the perturbation modality of a MuData is read; `None` where an AnnData was registered.
    """

    vocabulary: Vocabulary
    gene_names: pd.Index
    contexts: tuple[str, ...]
    batches: tuple[Any, ...]
    data_kind: str
    nonnegative: bool
    library: dict[str, Any]
    arguments: dict[str, Any]
    mudata: dict[str, Any] | None

    @classmethod
    def of(cls, registry: dict[str, Any]) -> Registered:
        """What the registry of an AnnDataManager holds."""
        states = {key: entry["state_registry"] for key, entry in registry["field_registries"].items()}
        arguments = dict(registry["setup_args"])
        has_context = arguments.get("context_key") is not None
        return cls(
            vocabulary=Vocabulary.from_registry(states[KEYS.PERTURBATION]),
            gene_names=pd.Index(np.asarray(states[KEYS.X]["column_names"]).astype(str)),
            contexts=tuple(map(str, states[KEYS.CONTEXT]["categorical_mapping"])) if has_context else ("all",),
            batches=tuple(states[KEYS.BATCH]["categorical_mapping"]),
            data_kind=states[KEYS.X][ExpressionField.KIND],
            nonnegative=states[KEYS.X][ExpressionField.NONNEGATIVE],
            library=states[KEYS.X][ExpressionField.LIBRARY],
            arguments=arguments,
            mudata=states[KEYS.PERTURBATION].get("mudata"),
        )

    @property
    def is_counts(self) -> bool:
        """Whether expression is counts."""
        return self.data_kind == "counts"

    @property
    def are_effects(self) -> bool:
        """Whether rows are effects, with a control of 0."""
        return self.data_kind == EFFECTS

    @property
    def default_scale(self) -> str:
        """Scale of predictions where none is asked."""
        return "log1p" if self.is_counts else "layer"

    def argument(self, name: str) -> Any:
        """An argument of ``setup_anndata``; `None` where the model has no such argument."""
        return self.arguments.get(name)
