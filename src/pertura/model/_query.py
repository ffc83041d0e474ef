"""Cells that a model is asked about: registered beside the user's AnnData, which is not marked."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from mudata import MuData
from numpy.typing import NDArray
from scvi.data import AnnDataManager

from pertura.data import _mudata
from pertura.data._cells import Batch, CellDataset, Expression
from pertura.data._constants import KEYS, UNKNOWN
from pertura.data._fields import not_counts
from pertura.data._validation import check_expression, check_obs_key, check_size_factor
from pertura.module._base import Cells, PerturbationModule

from ._arguments import ArgumentMixin
from ._engine import Question, device_of, seeded

if TYPE_CHECKING:
    from scvi.data.fields import BaseAnnDataField


class QueryManager(AnnDataManager):
    """Registered annotation of cells whose expression stays where it is.

    Attributes
    ----------
    expression
        Expression of the model's genes.
    """

    expression: Expression


class QueryMixin(ArgumentMixin):
    """From what a user passes to what a module reads."""

    module: PerturbationModule
    adata: AnnData | None
    adata_manager: AnnDataManager | None
    registry: dict[str, Any]
    gene_names: pd.Index

    # arguments of `setup_anndata` that name columns which cells must have to be asked about
    _query_columns: ClassVar[tuple[str, ...]] = (
        "perturbation_key",
        "dose_key",
        "context_key",
        "batch_key",
        "size_factor_key",
    )

    if TYPE_CHECKING:

        @classmethod
        def _fields(cls, args: dict[str, Any]) -> list[BaseAnnDataField]: ...
        def _argument(self, name: str) -> Any: ...
        def _state(self, key: str) -> dict[str, Any]: ...
        def _check_if_trained(self, warn: bool, message: str) -> None: ...

    def _mudata_settings(self) -> dict[str, Any]:
        settings = self._state(KEYS.PERTURBATION).get("mudata")
        if settings is None:
            raise ValueError(
                "`adata` is a MuData, but the model was set up with an AnnData. Pass the expression modality."
            )
        return settings

    def _query(self, adata: AnnData | MuData | None, indices: Any = None) -> tuple[AnnDataManager, AnnData]:
        """Registered form of the cells asked, and the AnnData where results go.

        Parameters
        ----------
        adata
            As users pass it.
        indices
            Cells whose values are looked at; by default all.
        """
        self._check_if_trained(warn=False, message="The model is not trained. Call `train()` before predicting.")
        if adata is None and self.adata is None:
            raise ValueError("`adata`: the model was loaded without data, so pass the cells to predict for.")
        annotations = None
        if isinstance(adata, MuData):
            settings = self._mudata_settings()
            user = _mudata.check_modality(adata, "rna_mod", settings["rna_mod"])
            if user is not self.adata:
                annotations = _mudata.annotations(adata, settings)
        else:
            user = self.adata if adata is None else adata
            if not isinstance(user, AnnData):
                raise ValueError(f"`adata` must be an AnnData, got {type(adata).__name__}.")
        if user is self.adata:
            # another model may have registered the same AnnData since
            self.adata_manager.validate()
            return self.adata_manager, user
        return self._transfer(user, self._rows(user, indices), annotations), user

    def _transfer(self, user: AnnData, rows: NDArray[np.int64], annotations: pd.DataFrame | None) -> QueryManager:
        layer = self._argument("layer")
        if layer is not None and layer not in user.layers:
            raise ValueError(f"`adata`: the model was trained on layer {layer!r}, which `adata.layers` does not have.")
        expression = Expression.of(user, layer, self.gene_names, self.data_kind)
        obs = user.obs if annotations is None else user.obs.assign(**annotations)
        columns = self._columns(obs)
        if check_expression(user, layer, np.sort(rows)) != "counts" and self.data_kind == "counts":
            raise ValueError(not_counts(layer))
        light = AnnData(obs=pd.DataFrame(columns, index=user.obs_names.astype(str)))
        fields = [f for f in self._fields(self.registry["setup_args"]) if f.registry_key != KEYS.X]
        manager = QueryManager(fields=fields)
        manager.expression = expression
        manager.register_fields(light, self.registry)
        return manager

    def _columns(self, obs: pd.DataFrame) -> dict[str, Any]:
        """Columns that the fields read, checked."""
        columns = {}
        for argument, name in self.registry["setup_args"].items():
            if not argument.endswith("_key") or not isinstance(name, str):
                continue
            if name not in obs:
                if argument not in self._query_columns:
                    continue
                remedy = (
                    f" For unperturbed cells set `adata.obs[{name!r}] = {self.vocabulary.control!r}`."
                    if argument == "perturbation_key"
                    else ""
                )
                raise ValueError(
                    f"`adata`: the column {name!r} of `obs`, registered as `{argument}`, is missing.{remedy}"
                )
            columns[name] = obs[name].to_numpy()
        known = AnnData(obs=pd.DataFrame(columns, index=obs.index.astype(str)))
        for argument in self._query_columns:
            if self._argument(argument) in columns:
                check_obs_key(known, argument, self._argument(argument))
        check_size_factor(known, self._argument("size_factor_key"), self.data_kind)
        self._check_batches(columns)
        return columns

    def _check_batches(self, columns: dict[str, Any]) -> None:
        key = self._argument("batch_key")
        if key is None:
            return
        batches = list(self._state(KEYS.BATCH)["categorical_mapping"])
        new = [b for b in pd.unique(np.asarray(columns[key])) if b not in batches]
        if new:
            raise ValueError(
                f"`adata`: batch {new[0]!r} in `obs[{key!r}]` was not in training (known: "
                f"{', '.join(map(str, batches[:8]))}). Assign the cells to a known batch, or train without `batch_key`."
            )

    def _check_known(self, user: AnnData, manager: AnnDataManager, rows: NDArray[np.int64]) -> None:
        """Cells whose own perturbation the model does not know can not be taken back to their basal state."""
        codes, _ = self._actions(manager, rows)
        names = self.vocabulary.names
        unknown = [c for c in np.unique(codes[codes >= 0]) if not self._is_known(names[c])]
        found = np.isin(codes, [UNKNOWN, *unknown]).any(1)
        if found.any():
            key = self._argument("perturbation_key")
            labels = manager.adata.obs[key].iloc[rows[found]].astype(str).unique()
            some = f"perturbation{'s' if len(labels) > 1 else ''} {', '.join(map(repr, labels[:5]))}"
            raise ValueError(
                f"`adata`: {int(found.sum())} cells carry the {some}{', …' if len(labels) > 5 else ''}, which the model has "
                f"not seen; their basal state can not be inferred. Ask control cells: `indices=np.flatnonzero(adata.obs"
                f"[{key!r}] == {self.vocabulary.control!r})`."
            )

    def _is_known(self, name: str) -> bool:
        """Whether the effect of a registered perturbation can be taken back; a split may have left it out of training."""
        step = self._discrepancy.step(Question(name))
        return step != "unseen" and (step != "unseen with features" or self._can_predict_features)

    # -- what is known of the cells ---------------------------------------------------------------------------------

    @staticmethod
    def _actions(manager: AnnDataManager, rows: NDArray[np.int64]) -> tuple[NDArray, NDArray]:
        """Component codes and relative doses of cells, ``(n_cells, order)`` each."""
        encoded = np.asarray(manager.adata.obsm[f"_scvi_{KEYS.PERTURBATION}"])[rows]
        codes, dose = np.split(encoded, 2, axis=1)
        return np.rint(codes).astype(np.int64), dose

    def _done(self, manager: AnnDataManager, rows: NDArray[np.int64]) -> tuple[list[Question], NDArray[np.int64]]:
        """The distinct things that were done to cells, and which of them to each cell."""
        codes, dose = self._actions(manager, rows)
        order = codes.shape[1]
        present = (codes >= 0) & (dose > 0)
        done = np.concatenate([np.where(present, codes, -1), np.where(present, dose, 0.0)], axis=1)
        unique, which = np.unique(done, axis=0, return_inverse=True)
        names, unit = self.vocabulary.names, np.asarray(self.vocabulary.max_dose)
        questions = []
        for line in unique:
            kept = line[:order] >= 0
            code = line[:order][kept].astype(np.int64)
            label = self.vocabulary.delimiter.join(names[c] for c in code) or self.vocabulary.control
            # relative doses are float32: give back the digits that the user gave
            each = tuple(float(f"{d:.6g}") for d in line[order:][kept] * unit[code])
            questions.append(Question(label, each))
        return questions, which.ravel()

    def _is_control(self, manager: AnnDataManager, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
        codes, dose = self._actions(manager, rows)
        return ~((codes != -1) & (dose > 0)).any(1)

    @staticmethod
    def _contexts_of(manager: AnnDataManager, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.asarray(manager.adata.obs[f"_scvi_{KEYS.CONTEXT}"]).astype(np.int64)[rows]

    def _controls_or_all(self, manager: AnnDataManager, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Control cells among the rows, by context; all cells of a context that has none."""
        control = self._is_control(manager, rows)
        context = self._contexts_of(manager, rows)
        return rows[control | ~np.isin(context, np.unique(context[control]))]

    def _context_names(self, manager: AnnDataManager) -> list[str]:
        if self._argument("context_key") is None:
            return ["all"]
        return [str(c) for c in manager.get_state_registry(KEYS.CONTEXT)["categorical_mapping"]]

    # -- what modules read ------------------------------------------------------------------------------------------

    def _tensors(
        self, manager: AnnDataManager, rows: NDArray[np.int64], batch_size: int
    ) -> Iterator[dict[str, torch.Tensor]]:
        device, dataset = device_of(self.module), CellDataset(manager)
        for start in range(0, len(rows), batch_size):
            tensors = dataset[Batch(rows[start : start + batch_size], 0)]
            tensors.pop("n_pairs")
            yield {k: v.to(device) for k, v in tensors.items()}

    def _cells(self, manager: AnnDataManager, rows: NDArray[np.int64], batch_size: int) -> Iterator[Cells]:
        yield from map(Cells.from_tensors, self._tensors(manager, rows, batch_size))

    def _globals(self, manager: AnnDataManager, n_samples: int, seed: int) -> dict[str, torch.Tensor]:
        """Draws of global parameters, and what a model learns of the query before it predicts."""
        self.module.eval()
        with torch.no_grad(), seeded(seed, device_of(self.module)):
            return self.module.draw_globals(n_samples)
