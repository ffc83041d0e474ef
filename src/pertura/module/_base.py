"""What every module is: a Pyro model and guide. Counterfactuals and likelihoods follow from these two.

A counterfactual has three steps (Pearl): *abduction* infers what is a cell's own, its basal state and the noise of its
measurement, from its expression and its perturbation (the guide, traced); *action* exchanges the perturbation;
*prediction* runs the model again with the same basal state and noise (the model, replayed). Global parameters are drawn
once for all cells, so that their uncertainty does not average out over cells.

A new model writes ``model`` and ``guide`` with these conventions:

* cells are in ``pyro.plate("cells", n)``, expression is the observed site ``"x"``, whose distribution is one of
  :mod:`pertura.nn` (it knows how to infer and to replay measurement noise);
* sites outside that plate are global;
* ``pyro.deterministic("state", …)`` names the latent state under the perturbation, and ``pyro.deterministic("basal", …)``
  the one before it; without the second it is the state under control;
* terms that are losses rather than densities are added only ``if self.training``.

Optional attributes that training reads: ``on_step(progress)`` is called before each step with the share of training that
is done, ``lr_factors`` maps prefixes of parameter names to factors of the learning rate, ``no_weight_decay`` names
prefixes that are not decayed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from scvi.module.base import PyroBaseModuleClass
from torch import Tensor

from pertura.data._constants import KEYS, UNKNOWN

from ._draws import expression_of, is_latent, is_local, noise_of, run


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

    def __len__(self) -> int:
        return self.codes.shape[0]

    @property
    def present(self) -> Tensor:
        """Whether a slot holds a perturbation with a dose above 0, ``(n_cells, order)``."""
        return (self.codes != -1) & (self.dose > 0)

    @property
    def any_unknown(self) -> bool:
        """Whether a component is outside the vocabulary."""
        return bool((self.codes == UNKNOWN).any())

    @property
    def one(self) -> Action:
        """The same with a single row where all cells have the same one, to be broadcast: saves work on genes."""
        if len(self) > 1 and self.codes.stride(0) == 0:
            return self[:1]
        return self

    def __getitem__(self, rows: Any) -> Action:
        """Some of the cells."""
        features = None if self.features is None else self.features[rows]
        return Action(self.codes[rows], self.dose[rows], features)

    def expand(self, n_cells: int) -> Action:
        """One row for many cells, without a copy."""
        features = None if self.features is None else self.features.expand(n_cells, -1, -1)
        return Action(self.codes.expand(n_cells, -1), self.dose.expand(n_cells, -1), features)

    def control(self) -> Action:
        """Nothing is done to the same cells."""
        nothing = Action(torch.full_like(self.codes[:1, :1], -1), torch.zeros_like(self.dose[:1, :1]))
        return nothing.expand(len(self))

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
        Total counts of the cells, those of genes that are not registered included, ``(n_cells, 1)``; 1 for data that are
        not counts.
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


Globals = dict[str, Any]


@dataclass
class Basal:
    """What abduction infers of cells: draws of all that is their own.

    Attributes
    ----------
    cells
        The cells as measured.
    state
        Basal state, ``(n_draws, n_cells, n_latent)``.
    latents
        Noise or values of local latent variables, by site.
    noise
        Noise of the cell's own measurement, as the distribution of expression infers it.
    globals_
        Draws of global parameters.
    n_draws
        Number of draws.
    """

    cells: Cells
    state: Tensor
    latents: dict[str, Tensor] = field(default_factory=dict)
    noise: Any = None
    globals_: Globals = field(default_factory=dict)
    n_draws: int = 1


@dataclass
class Counterfactual:
    """What cells would be under a perturbation.

    Attributes
    ----------
    state
        Latent state, ``(n_draws, n_cells, n_latent)``.
    expression
        Distribution of expression, batch shape ``(n_draws, n_cells, n_genes)``; see :mod:`pertura.nn`.
    drawn
        Gives the distribution of which single cells are drawn, where these have noise of their state that means leave out.
    """

    state: Tensor
    expression: Any
    drawn: Callable[[], Any] | None = None

    @property
    def of_cells(self) -> Any:
        """Distribution of which single cells are drawn."""
        return self.expression if self.drawn is None else self.drawn()


class PerturbationModule(PyroBaseModuleClass):
    """Base of all modules; see the head of this file for how to write one.

    Every parameter is an attribute that exists after ``__init__`` (no `PyroModule`, no global parameter store), so that
    two models live side by side, training goes on after loading, and gradients are clipped and synchronized as usual.

    Attributes
    ----------
    native_scale
        Scale of expression: ``"counts"``, ``"log1p"`` (counts per 10,000) or ``"layer"``.
    nonnegative
        Whether the smallest registered value is 0: then no prediction should be negative. The model says so.
    n_train
        Number of training cells; weighs global against local terms.
    """

    native_scale: str = "counts"
    nonnegative: bool = False

    def __init__(self) -> None:
        super().__init__()
        self.n_train = 1

    @property
    def list_obs_plate_vars(self) -> dict[str, Any]:
        """Observation plate, as scvi-tools asks for it."""
        return {"name": "cells", "in": [0], "sites": {}, "event_dim": 1}

    def add_rest(self) -> None:
        """Let libraries hold counts of genes that are not registered; needed by likelihoods of counts alone."""

    def on_load(self, model: Any, **kwargs: Any) -> None:
        """Nothing to do: the state dict holds everything."""

    @staticmethod
    def _get_fn_args_from_batch(batch: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        return (Cells.from_tensors(batch),), {}

    # -- counterfactuals --------------------------------------------------------------------------------------------

    def draw_globals(self, n_draws: int, cells: Cells) -> Globals:
        """Draws of global parameters from the guide, by site, each with a leading dimension of `n_draws`.

        Parameters
        ----------
        n_draws
            Number of draws; an even number has antithetic pairs, whose average has no error of first order.
        cells
            Any cell: a guide runs on cells.
        """
        sites = run(self.guide, cells, n_draws).nodes.items()
        return {name: site["value"] for name, site in sites if is_latent(site) and not is_local(site)}

    def abduct(self, cells: Cells, n_draws: int, globals_: Globals) -> Basal:
        """Infer basal state and measurement noise of cells from their own expression and perturbation.

        Parameters
        ----------
        cells
            As measured.
        n_draws
            Draws of the local latent variables; those of `globals_`.
        globals_
            As :meth:`draw_globals` gives them.
        """
        guide = run(self.guide, cells, n_draws, globals_).nodes
        local = {name: site["value"] for name, site in guide.items() if is_latent(site) and is_local(site)}
        factual = run(self.model, cells, n_draws, {**globals_, **local})
        latents = {name: noise_of(factual.nodes[name]) for name in local}
        basal = Basal(cells, cells.x, latents, expression_of(factual).abduct(cells.x), globals_, n_draws)
        if "basal" in factual.nodes:
            basal.state = factual.nodes["basal"]["value"]
        else:
            basal.state = self.counterfactual(basal, cells.action.control()).state
        return basal

    def counterfactual(self, basal: Basal, action: Action) -> Counterfactual:
        """Exchange the perturbation and run the model again with the cell's own basal state."""
        cells = replace(basal.cells, action=action)
        trace = run(self.model, cells, basal.n_draws, basal.globals_, basal.latents)
        return Counterfactual(trace.nodes["state"]["value"], expression_of(trace))

    def log_weights(self, cells: Cells, n_draws: int, globals_: Globals) -> Tensor:
        """Log p(x, z) - log q(z) of draws of the local latent variables, ``(n_draws, n_cells)``."""
        guide = run(self.guide, cells, n_draws, globals_).nodes
        local = {name: site["value"] for name, site in guide.items() if is_latent(site) and is_local(site)}
        factual = run(self.model, cells, n_draws, {**globals_, **local}).nodes
        total = factual["x"]["fn"].log_prob(cells.x)
        for name, value in local.items():
            total = total + factual[name]["fn"].log_prob(value) - guide[name]["fn"].log_prob(value)
        return total
