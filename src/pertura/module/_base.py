"""What every module shares: a Pyro model and guide, and the three steps of a counterfactual.

A prediction is *abduction* (the basal state and the measurement noise of the very cell, inferred from its own
expression and its own perturbation), *action* (the perturbation is exchanged), *prediction* (decoding with the same
noise). Global parameters are drawn once per prediction, so that their uncertainty does not average out over cells.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from scvi.module.base import PyroBaseModuleClass
from torch import Tensor

from pertura.data._constants import KEYS, UNKNOWN


@dataclass
class Action:
    """What is done to each cell.

    Attributes
    ----------
    codes
        Component codes, ``(n_cells, order)``; -1 is an empty slot, -2 a perturbation outside the vocabulary.
    dose
        Dose of each component in units of its highest registered dose, ``(n_cells, order)``.
    features
        Features of components outside the vocabulary, ``(n_cells, order, n_features)``, or `None`.
    """

    codes: Tensor
    dose: Tensor
    features: Tensor | None = None

    @property
    def present(self) -> Tensor:
        """Whether a slot holds a perturbation with a dose above 0, ``(n_cells, order)``."""
        return (self.codes != -1) & (self.dose > 0)

    @property
    def any_unknown(self) -> bool:
        """Whether a component is outside the vocabulary."""
        return bool((self.codes == UNKNOWN).any())

    def control(self) -> Action:
        """Nothing is done to the same cells."""
        return Action(torch.full_like(self.codes[:, :1], -1), torch.zeros_like(self.dose[:, :1]))

    def to(self, device: torch.device | str) -> Action:
        """Copy on another device."""
        features = None if self.features is None else self.features.to(device)
        return Action(self.codes.to(device), self.dose.to(device), features)


@dataclass
class Cells:
    """A minibatch of measured cells.

    Attributes
    ----------
    x
        Expression in the registered layer, ``(n_cells, n_genes)``.
    action
        What was done to each cell.
    context, batch
        Codes, ``(n_cells,)``. Contexts that the model has not seen follow those it has.
    library
        Total counts, or registered size factors in units of total counts, ``(n_cells, 1)``; 1 for data that are not
        counts.
    qc
        1 for cells that failed quality control, ``(n_cells, 1)``, where that was registered.
    """

    x: Tensor
    action: Action
    context: Tensor
    batch: Tensor
    library: Tensor
    qc: Tensor | None = None

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> Cells:
        """Cells of a loader's minibatch."""
        x = tensors[KEYS.X]
        codes, dose = tensors[KEYS.PERTURBATION].chunk(2, dim=1)
        library = tensors.get(KEYS.LIBRARY)
        return cls(
            x=x,
            action=Action(codes.round().long(), dose),
            context=tensors[KEYS.CONTEXT].long().flatten(),
            batch=tensors[KEYS.BATCH].long().flatten(),
            library=x.sum(1, keepdim=True).clamp(min=1.0) if library is None else library,
            qc=tensors.get(KEYS.QC),
        )

    def __len__(self) -> int:
        return self.x.shape[0]


@dataclass
class Basal:
    """Draws of what abduction infers; the first dimension is the draw, the second the cell.

    Attributes
    ----------
    z
        Basal state, ``(n_samples, n_cells, n_latent)``.
    noise
        Noise of the cell's own measurement, ``(n_samples, n_cells, n_genes)``.
    context, batch, library
        As in :class:`Cells`.
    """

    z: Tensor
    noise: Tensor
    context: Tensor
    batch: Tensor
    library: Tensor


class PerturbationModule(PyroBaseModuleClass):
    """Base of all modules.

    Every parameter is an attribute that exists after ``__init__`` (no `PyroModule`, no global parameter store), so that
    two models live side by side, training goes on after loading, and gradients are clipped and synchronised as usual.

    Attributes
    ----------
    native_scale
        Scale of :meth:`decode`: ``"counts"``, ``"log1p"`` (counts per 10,000) or ``"layer"``.
    n_train
        Number of training cells; weighs global against local terms.
    """

    native_scale: str = "counts"

    def __init__(self) -> None:
        super().__init__()
        self.n_train = 1

    @property
    def list_obs_plate_vars(self) -> dict[str, Any]:
        """Observation plate, as scvi-tools asks for it."""
        return {"name": "cells", "in": [0], "sites": {}, "event_dim": 1}

    def on_load(self, model: Any, **kwargs: Any) -> None:
        """Nothing to do: the state dict holds everything."""

    @abstractmethod
    def draw_globals(self, n_samples: int) -> dict[str, Tensor]:
        """Draws of the global parameters, each with a leading dimension of `n_samples`."""

    @abstractmethod
    def abduct(self, cells: Cells, n_samples: int, globals_: dict[str, Tensor]) -> Basal:
        """Infer basal state and measurement noise of cells from their own expression and perturbation."""

    @abstractmethod
    def act(self, basal: Basal, action: Action, globals_: dict[str, Tensor]) -> Tensor:
        """Latent state under a perturbation, ``(n_samples, n_cells, n_latent)``."""

    @abstractmethod
    def decode(self, z: Tensor, basal: Basal) -> Tensor:
        """Draws of expression on :attr:`native_scale`, replaying noise, ``(n_samples, n_cells, n_genes)``."""

    def express(self, z: Tensor, basal: Basal, action: Action, globals_: dict[str, Tensor]) -> Tensor:
        """As :meth:`decode`, of a state that `action` led to.

        Modules in which a perturbation also changes genes directly, beside the latent state, override this.
        """
        return self.decode(z, basal)

    def fresh_noise(self, z: Tensor, basal: Basal) -> Tensor:
        """Measurement noise of cells that were never measured, as :meth:`decode` takes it.

        Modules whose expression has a ``likelihood`` of :mod:`pertura.nn` need not override this.
        """
        return self.likelihood.fresh_noise(self._decoded(z, basal.batch), basal.library)
