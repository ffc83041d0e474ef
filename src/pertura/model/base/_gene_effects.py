"""Measured effects as a site of a model: fitted before training, fine-tuned to the decoder after it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray

from pertura.data._vocabulary import dose_units
from pertura.effects import ConditionTable, MeasuredEffect, feature_blocks, fit_measured
from pertura.module._base import Action

from ._departures import ContextEffects
from ._predict import Predictor, Settings, device_of
from ._protocol import Model
from ._query import Query

_MAX_CELLS, _MAX_STARTS = 128, 64


def dose_response(model: Model) -> Callable[[NDArray[np.int64], NDArray[np.float64]], NDArray[np.float64]]:
    """What ``model.module.strength`` says of codes and registered doses."""
    device, unit = device_of(model.module), dose_units(model.vocabulary.max_dose)

    @torch.no_grad()
    def strength(codes: NDArray[np.int64], dose: NDArray[np.float64]) -> NDArray[np.float64]:
        relative = torch.as_tensor(dose / unit[codes], dtype=torch.float32, device=device)
        return model.module.strength(Action(torch.as_tensor(codes, device=device), relative)).cpu().numpy()

    return strength


@torch.no_grad()
def fit_gene_effects(model: Model, table: ConditionTable) -> None:
    """Set the posterior of measured effects of ``model.module.gene_effects`` from the training cells.

    The module offers ``strength(action)``, the dose response of each member. Features of perturbations are used where the
    site was made with them. Rows beyond those of the perturbations are not measured.
    """
    module = model.module
    device = device_of(module)
    site = module.gene_effects
    site.departures.clear()
    site.measured = _measured(model, table)
    if not model.is_trained_:
        base = torch.as_tensor(table.control_moments.mean, dtype=torch.float32, device=device)
        start, library = _start(module, table, device)
        site.set_curve(base, module.likelihood, start, library)


def _measured(model: Model, table: ConditionTable, left_out: Sequence[int] = ()) -> MeasuredEffect:
    vocabulary, known = model.vocabulary, model.module.gene_effects.measured
    described = known.feature_weight.shape[0] > 0
    return fit_measured(
        table,
        known.n_perturbations,
        combinations=[vocabulary.code(members).tolist() for members in vocabulary.combinations],
        strength=dose_response(model),
        features=vocabulary.feature_matrix(vocabulary.names) if described else None,
        feature_blocks=feature_blocks(list(vocabulary.features.columns)) if described else None,
        left_out=left_out,
    ).to(device_of(model.module))


@torch.no_grad()
def fit_gene_departures(model: Model, table: ConditionTable) -> None:
    """Set what effects in single contexts differ from those that a model's measured effects of the other contexts predict."""
    site, contexts = model.module.gene_effects, ContextEffects(model, table)

    @contextmanager
    def without(fold: NDArray[np.int64]) -> Iterator[None]:
        kept, site.measured = site.measured, _measured(model, table, fold)
        try:
            yield
        finally:
            site.measured = kept

    contexts.set_departures(site.departures, contexts.predict(without))


def _start(module: torch.nn.Module, table: ConditionTable, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Activations before training, of cells whose genes vary as they do among controls, and their library."""
    library = np.exp(np.asarray(table.sample.depth)[:, 0] + 8.0)
    at = np.argsort(library)[np.linspace(0, len(library) - 1, min(_MAX_STARTS, len(library))).astype(int)]
    library = torch.as_tensor(library[at], dtype=torch.float32, device=device)[:, None]
    bias = module.likelihood.linear.bias
    return bias.expand(len(library), -1), library


@torch.no_grad()
def refine_gene_effects(model: Model, table: ConditionTable, seed: int = 0) -> None:
    """Fit the curve from effects to activations to control cells as the trained decoder sees them."""
    module = model.module
    rows = model.train_indices[
        Query(model.registered, model.adata_manager, model.adata, model.train_indices).is_control
    ]
    if not len(rows):
        return
    rng = np.random.default_rng(seed)
    rows = rows if len(rows) <= _MAX_CELLS else np.sort(rng.choice(rows, _MAX_CELLS, replace=False))
    cells = Query(model.registered, model.adata_manager, model.adata, rows)
    settings = Settings(1, model.registered.default_scale, seed)
    activation, library = [], []
    for block in Predictor(module, cells, model.vocabulary, settings).blocks():
        activation.append(module.activation(block.basal)[0])
        library.append(block.cells.library)
    device = device_of(module)
    base = torch.as_tensor(table.control_moments.mean, dtype=torch.float32, device=device)
    module.gene_effects.set_curve(base, module.likelihood, torch.cat(activation), torch.cat(library))
