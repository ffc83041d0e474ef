"""Cells that a model is asked about: registered beside the user's AnnData, which is not marked."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from mudata import MuData
from numpy.typing import NDArray
from scvi.data import AnnDataManager

from pertura.data import _mudata
from pertura.data._cells import Batch, CellDataset, Expression
from pertura.data._constants import CONTROL_ONLY, KEYS, UNKNOWN
from pertura.data._fields import not_counts, sources
from pertura.data._library import Library
from pertura.data._perturbation import Perturbation
from pertura.data._validation import check_expression, check_obs_key, check_size_factor
from pertura.data._vocabulary import Vocabulary
from pertura.module._base import Cells

from ._arguments import as_rows
from ._protocol import Model
from ._registered import Registered

Rows = NDArray[np.int64]


class QueryManager(AnnDataManager):
    """Registered annotation of cells whose expression stays where it is.

    Attributes
    ----------
    expression
        Expression of the model's genes.
    library
        Libraries of the cells.
    """

    expression: Expression
    library: Library


@dataclass(frozen=True)
class Query:
    """Some registered cells.

    Attributes
    ----------
    registered
        What the model knows.
    manager
        Registered form of the AnnData.
    user
        AnnData where results go.
    rows
        Cells that are asked, rows of the AnnData.
    """

    registered: Registered
    manager: AnnDataManager
    user: AnnData
    rows: Rows

    def at(self, rows: Rows) -> Query:
        """Other cells of the same AnnData."""
        return Query(self.registered, self.manager, self.user, rows)

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def contexts(self) -> list[str]:
        """Names of contexts by code; those that the model has not seen follow those it has."""
        if self.registered.argument("context_key") is None:
            return ["all"]
        return [str(c) for c in self.manager.get_state_registry(KEYS.CONTEXT)["categorical_mapping"]]

    @cached_property
    def context(self) -> NDArray[np.int64]:
        """Code of the context of each cell."""
        return np.asarray(self.manager.adata.obs[f"_scvi_{KEYS.CONTEXT}"]).astype(np.int64)[self.rows]

    @cached_property
    def actions(self) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Component codes and relative doses of each cell, ``(n_cells, order)`` twice."""
        encoded = np.asarray(self.manager.adata.obsm[f"_scvi_{KEYS.PERTURBATION}"])[self.rows]
        codes, dose = np.split(encoded, 2, axis=1)
        if self.registered.are_effects:  # a question about a row starts from its context's control
            codes, dose = np.full_like(codes, CONTROL_ONLY), np.zeros_like(dose)
        return np.rint(codes).astype(np.int64), dose

    @cached_property
    def is_control(self) -> NDArray[np.bool_]:
        """Whether nothing was done to a cell."""
        codes, dose = self.actions
        return ~((codes != -1) & (dose > 0)).any(1)

    def done(self, vocabulary: Vocabulary) -> tuple[list[Perturbation], NDArray[np.int64]]:
        """The distinct perturbations of the cells, and which of them each cell has."""
        codes, dose = self.actions
        order = codes.shape[1]
        present = (codes >= 0) & (dose > 0)
        done = np.concatenate([np.where(present, codes, -1), np.where(present, dose, 0.0)], axis=1)
        unique, which = np.unique(done, axis=0, return_inverse=True)
        names, unit = vocabulary.names, np.asarray(vocabulary.max_dose)
        found = []
        for line in unique:
            kept = line[:order] >= 0
            code = line[:order][kept].astype(np.int64)
            label = vocabulary.delimiter.join(names[c] for c in code) or vocabulary.control
            # relative doses are float32: give back the digits that the user gave
            found.append(Perturbation(label, tuple(float(f"{d:.6g}") for d in line[order:][kept] * unit[code])))
        return found, which.ravel()

    def controls_or_all(self) -> Query:
        """Control cells; in contexts that have none, all cells. The control of effects is one row for each context."""
        if self.registered.are_effects:
            return self.at(self.rows[np.sort(np.unique(self.context, return_index=True)[1])])
        control, context = self.is_control, self.context
        return self.at(self.rows[control | ~np.isin(context, np.unique(context[control]))])

    # -- what modules read ------------------------------------------------------------------------------------------

    @cached_property
    def dataset(self) -> CellDataset:
        """Registered tensors of all cells of the AnnData."""
        return CellDataset(self.manager)

    def tensors(self, batch_size: int, device: torch.device) -> Iterator[dict[str, torch.Tensor]]:
        """Registered tensors of the cells, some at a time."""
        for start in range(0, len(self.rows), batch_size):
            tensors = self.dataset[Batch(self.rows[start : start + batch_size], 0)]
            tensors.pop("n_pairs")
            yield {k: v.to(device) for k, v in tensors.items()}

    def cells(self, batch_size: int, device: torch.device) -> Iterator[Cells]:
        """The cells, some at a time."""
        yield from map(Cells.from_tensors, self.tensors(batch_size, device))


def query(
    model: Model, adata: AnnData | MuData | None, indices: Any = None, *, check_perturbations: bool = True
) -> Query:
    """Register the cells that a user asks about.

    Parameters
    ----------
    model
        Whose genes, contexts and perturbations count.
    adata, indices
        As users pass them.
    check_perturbations
        Whether cells must carry perturbations that the model knows: others can not be taken back to their basal state.
    """
    model._check_if_trained(warn=False, message="The model is not trained. Call `train()` before predicting.")
    if adata is None and model.adata is None:
        raise ValueError("`adata`: the model was loaded without data, so pass the cells to predict for.")
    registered, annotations = model.registered, None
    if isinstance(adata, MuData):
        settings = registered.mudata
        if settings is None:
            raise ValueError(
                "`adata` is a MuData, but the model was set up with an AnnData. Pass the expression modality."
            )
        user = _mudata.check_modality(adata, "rna_mod", settings["rna_mod"])
        if user is not model.adata:
            annotations = _mudata.annotations(adata, settings)
    else:
        user = model.adata if adata is None else adata
        if not isinstance(user, AnnData):
            raise ValueError(f"`adata` must be an AnnData, got {type(adata).__name__}.")
    rows = as_rows(user.n_obs, indices)
    if user is model.adata:
        # another model may have registered the same AnnData since
        model.adata_manager.validate()
        asked = Query(registered, model.adata_manager, user, rows)
    else:
        asked = Query(registered, _transfer(model, user, rows, annotations), user, rows)
    if check_perturbations:
        _check_known(model, asked)
    return asked


def _transfer(model: Model, user: AnnData, rows: Rows, annotations: pd.DataFrame | None) -> QueryManager:
    """Registered form of an AnnData that the model was not made with."""
    registered = model.registered
    layer = registered.argument("layer")
    if layer is not None and layer not in user.layers:
        raise ValueError(f"`adata`: the model was trained on layer {layer!r}, which `adata.layers` does not have.")
    needs_x = registered.library["source"] == "X"
    expression, x = sources(user, layer, registered.gene_names, registered.data_kind, needs_x)
    obs = user.obs if annotations is None else user.obs.assign(**annotations)
    columns = _columns(registered, obs, model._query_columns)
    if check_expression(user, layer, np.sort(rows)) != "counts" and registered.is_counts:
        raise ValueError(not_counts(layer))
    light = AnnData(obs=pd.DataFrame(columns, index=user.obs_names.astype(str)))
    fields = [f for f in model._fields(model.registry["setup_args"]) if f.registry_key != KEYS.X]
    manager = QueryManager(fields=fields)
    manager.expression = expression
    manager.library = Library.of_query(registered.library, expression, x, light.obs, rows)
    manager.register_fields(light, model.registry)
    return manager


def _columns(registered: Registered, obs: pd.DataFrame, needed: tuple[str, ...]) -> dict[str, Any]:
    """Columns that the fields read, checked."""
    columns = {}
    for argument, name in registered.arguments.items():
        if not argument.endswith("_key") or not isinstance(name, str):
            continue
        if name not in obs:
            if argument not in needed:
                continue
            control = registered.vocabulary.control
            remedy = (
                f" For unperturbed cells set `adata.obs[{name!r}] = {control!r}`."
                if argument == "perturbation_key"
                else ""
            )
            raise ValueError(f"`adata`: the column {name!r} of `obs`, registered as `{argument}`, is missing.{remedy}")
        columns[name] = obs[name].to_numpy()
    known = AnnData(obs=pd.DataFrame(columns, index=obs.index.astype(str)))
    for argument in needed:
        if registered.argument(argument) in columns:
            check_obs_key(known, argument, registered.argument(argument))
    check_size_factor(known, registered.argument("size_factor_key"), registered.data_kind)
    key = registered.argument("batch_key")
    new = [] if key is None else [b for b in pd.unique(np.asarray(columns[key])) if b not in registered.batches]
    if new:
        raise ValueError(
            f"`adata`: batch {new[0]!r} in `obs[{key!r}]` was not in training (known: "
            f"{', '.join(map(str, registered.batches[:8]))}). Assign the cells to a known batch, or train without `batch_key`."
        )
    return columns


def _check_known(model: Model, asked: Query) -> None:
    """Cells whose own perturbation the model does not know can not be taken back to their basal state."""
    codes, _ = asked.actions
    vocabulary = model.vocabulary
    unknown = [c for c in np.unique(codes[codes >= 0]) if not model._can_take_back(vocabulary.names[c])]
    found = np.isin(codes, [UNKNOWN, *unknown]).any(1)
    if found.any():
        key = model.registered.argument("perturbation_key")
        labels = asked.manager.adata.obs[key].iloc[asked.rows[found]].astype(str).unique()
        some = f"perturbation{'s' if len(labels) > 1 else ''} {', '.join(map(repr, labels[:5]))}"
        raise ValueError(
            f"`adata`: {int(found.sum())} cells carry the {some}{', …' if len(labels) > 5 else ''}, which the model has "
            f"not seen; their basal state can not be inferred. Pass control cells: `indices=np.flatnonzero(adata.obs"
            f"[{key!r}] == {vocabulary.control!r})`."
        )
