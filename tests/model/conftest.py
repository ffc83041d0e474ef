"""Every model of the package, small and trained on a few simulated cells."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData
from scipy import sparse

import pertura
from pertura import datasets

QUIET = {"accelerator": "cpu", "enable_progress_bar": False}
SCREEN = {"perturbation_key": "perturbation", "control": "control", "layer": "counts", "context_key": "cell_type"}


@dataclass(frozen=True)
class Spec:
    """A model and what can be asked of it.

    Attributes
    ----------
    name
        Where it is, below `pertura`.
    init, train
        Arguments that make it small and fast.
    learns_by_gradient
        Whether it has an ELBO, epochs and validation.
    combines
        Whether it predicts combinations that it has not seen.
    refuses_unseen
        Whether it has no way to represent a perturbation without features.
    knows_genes
        Whether a perturbation that bears the name of a gene is represented by it.
    only_genes
        Whether a perturbation is an intervention on the gene whose name it bears, and features of others are refused.
    samples
        Whether it has a distribution of cells, to draw replicates from.
    reconstructs
        Whether a cell under its own perturbation is close to what was measured of it.
    moves_neighbours
        Whether the random draws of a cell depend on the cells beside it: its rates are drawn from one stream with theirs, and
        an answer then agrees up to the error of drawing.
    wrong_init
        One wrong value for each argument of its own.
    own_setup
        Arguments of ``setup_anndata`` beyond the shared ones, which tests of the model itself try.
    """

    name: str
    init: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)
    learns_by_gradient: bool = True
    combines: bool = True
    reconstructs: bool = True
    refuses_unseen: bool = True
    knows_genes: bool = False
    only_genes: bool = False
    samples: bool = True
    moves_neighbours: bool = False
    wrong_init: dict[str, Any] = field(default_factory=dict)
    own_setup: tuple[str, ...] = ()

    @property
    def cls(self) -> type:
        namespace, _, name = self.name.partition(".")
        return getattr(getattr(pertura, namespace), name)

    def setup(self, adata: AnnData, **arguments: Any) -> None:
        self.cls.setup_anndata(adata, **{**SCREEN, "batch_key": "batch", **arguments})

    def make(self, adata: AnnData | None = None, **arguments: Any) -> Any:
        torch.manual_seed(0)
        return self.cls(adata, **{**self.init, **arguments})

    def fit(self, model: Any, **arguments: Any) -> Any:
        model.train(**{**QUIET, **self.train, **arguments})
        return model


_WRONG_PERTVAE = {
    "n_latent": 0,
    "encoder_hidden": "wide",
    "decoder_hidden": (0,),
    "n_flow_context": -1,
    "n_flow_steps": -1,
    "n_flow_hidden": 0.5,
    "rank": 0,
    "effect_input": "gene",
    "pairing": "twins",
    "likelihood": "poisson",
    "prior_sd_W": 0.0,
    "prior_sd_b": -1.0,
    "free_nats": -1.0,
    "use_weight_norm": "yes",
    "dropout_rate": 1.0,
    "input_noise": -0.1,
    "prediction_weight": -1.0,
    "effect_lr_factor": 0.0,
    "link_sharpness": 0.0,
    "singletons": "no",
    "heteroscedastic": "yes",
    "preset": "best",
}
_WRONG_SAMSVAE = {
    "n_latent": 0,
    "n_layers": -1,
    "n_hidden": 1.5,
    "effect": "loud",
    "effect_guide": "blind",
    "basal_guide": "blind",
    "mask_prior": 1.0,
    "prior_sd_E": 0.0,
    "interactions": "yes",
    "shrinkage": "yes",
    "likelihood": "poisson",
    "link_sharpness": 0.0,
    "normalise_input": "yes",
    "rotate_shifts": "yes",
    "n_particles": 0,
    "effect_lr_factor": 0.0,
    "preset": "best",
}
_SMALL = {"n_latent": 4, "encoder_hidden": (16,), "n_flow_hidden": 8, "n_flow_context": 8}
_CLOSED_FORM = {"learns_by_gradient": False, "samples": False}
# adding a model is adding a line
MODELS = [
    Spec(
        "model.PertVAE",
        init=_SMALL,
        train={"max_epochs": 3, "batch_size": 64},
        wrong_init=_WRONG_PERTVAE,
        own_setup=("pair_key",),
    ),
    Spec(
        "model.SAMSVAE",
        init={"n_latent": 4, "n_hidden": 16},
        train={"max_epochs": 3, "batch_size": 64},
        wrong_init=_WRONG_SAMSVAE,
    ),
    Spec(
        "model.CRADLEVAE",
        init={"n_latent": 4, "n_hidden": 16},
        train={"max_epochs": 3, "batch_size": 64},
        wrong_init={
            "counterfactual_weight": -1.0,
            "class_balance": "yes",
            "match_quality": "yes",
            "preset": "best",
        },
        own_setup=("qc_key",),
    ),
    Spec(
        "model.GPOVAE",
        init={"n_latent": 4, "n_hidden": 16},
        train={"max_epochs": 3, "batch_size": 64},
        wrong_init={
            "objective": "loud",
            "regulators": "TF1",
            "alignment_weight": -1.0,
            "covariation_weight": -1.0,
            "shift_floor": 0.0,
            "n_hops": -1,
            "shift_criterion": -1.0,
            "sparsity_weight": -1.0,
            "preset": "best",
        },
        own_setup=("qc_key", "network_key"),
        knows_genes=True,
    ),
    Spec(
        "model.PerturbX",
        init={"n_selected": 8, "n_members": 2, "n_hidden": 8, "bag_size": 8, "n_components": 5, "rank": 5},
        train={"max_epochs": 3, "batch_size": 64},
        wrong_init={
            "n_selected": 0,
            "n_latent": 0.5,
            "n_hidden": -1,
            "aggregation": "sum",
            "n_members": 0,
            "rank": 0,
            "residual": "yes",
            "gene_weights": "heavy",
            "bag_size": 0,
            "beta": -1.0,
            "duplicate_penalty": -1.0,
            "dropout_rate": 1.0,
            "n_components": 0,
            "ridge": -1.0,
            "preset": "best",
        },
        knows_genes=True,
        samples=False,
    ),
    Spec(
        "model.DrugAAE",
        init={"n_latent": 4, "encoder_hidden": (16,), "n_gene_embedding": 8, "discriminator_hidden": (8,)},
        train={"max_epochs": 3, "batch_size": 64},
        wrong_init={
            "n_latent": 0,
            "n_gene_embedding": 0.5,
            "n_effect_components": 0,
            "encoder_hidden": "wide",
            "decoder_hidden": (0,),
            "discriminator_hidden": 3,
            "interaction_rank": 0,
            "likelihood": "poisson",
            "link_sharpness": 0.0,
            "residual": "yes",
            "free_encoder": "yes",
            "adversary_weight": -1.0,
            "contrast_weight": -1.0,
            "counterfactual_weight": -1.0,
            "modality_dropout": 0.5,
            "dropout_rate": 1.0,
            "preset": "best",
        },
        own_setup=("ppi_key",),
        moves_neighbours=True,
    ),
    Spec(
        "model.InfoSEM",
        init={"n_ensemble": 2, "hidden": (8,)},
        train={"max_epochs": 3, "batch_size": 64},
        wrong_init={
            "prior": "text",
            "embedding_key": 3,
            "edges_key": 3,
            "regulators": "absent",
            "n_ensemble": 0,
            "prior_mean": "deep",
            "n_components": 0,
            "posterior": "exact",
            "likelihood": "poisson",
            "hidden": "wide",
            "alpha": 0.0,
            "beta": -1.0,
            "augmentation": 1.0,
            "sparsity_delay": -0.1,
            "z_prior": "wide",
            "prior_shrinkage": -1.0,
            "edge_logit_sd": 0.0,
            "max_radius": -1.0,
            "controls_only": "yes",
            "preset": "best",
        },
        knows_genes=True,
        only_genes=True,
    ),
    Spec("baseline.Additive", wrong_init={"use_own_context": "yes"}, refuses_unseen=False, **_CLOSED_FORM),
    Spec("baseline.Linear", wrong_init={"n_components": 0, "ridge": -1.0}, knows_genes=True, **_CLOSED_FORM),
]


def small_screen(**settings: Any) -> AnnData:
    """Two contexts, three perturbations and one combination; 200 cells x 40 genes."""
    default = {
        "n_cells_per_condition": 15,
        "n_control_cells": 40,
        "n_genes": 40,
        "n_regulators": 6,
        "n_perturbations": 3,
        "combinations": 1,
        "n_contexts": 2,
        "n_unresponsive_contexts": 0,
        "n_biomarkers": 2,
        "n_truth_cells": 20,
        "n_batches": 2,
        "seed": 3,
    }
    return datasets.simulate(**{**default, **settings})


def fingerprint(value: Any) -> Any:
    """Everything in an AnnData, in a form that `==` compares."""
    if isinstance(value, AnnData):
        slots = ("obs", "var", "uns", "obsm", "varm", "obsp", "varp", "layers")
        return {"X": fingerprint(value.X), **{name: fingerprint(getattr(value, name)) for name in slots}}
    if isinstance(value, pd.DataFrame):
        columns = [(str(c), str(value[c].dtype), fingerprint(value[c].to_numpy(object))) for c in value]
        return fingerprint(value.index.to_numpy(object)), columns
    if isinstance(value, Mapping):
        return {k: fingerprint(v) for k, v in value.items() if k is not None}
    if sparse.issparse(value):
        return value.format, value.shape, value.data.tobytes(), value.indices.tobytes()
    if isinstance(value, np.ndarray) and value.dtype != object:
        return value.shape, str(value.dtype), value.tobytes()
    return repr(value.tolist() if hasattr(value, "tolist") else value)


@pytest.fixture(scope="session", params=MODELS, ids=lambda spec: spec.name)
def spec(request: pytest.FixtureRequest) -> Spec:
    return request.param


@pytest.fixture(scope="session")
def gradient_spec(spec: Spec) -> Spec:
    if not spec.learns_by_gradient:
        pytest.skip("trained in closed form")
    return spec


@pytest.fixture
def unchanged() -> Callable[..., AbstractContextManager[None]]:
    """`with unchanged(adata):` fails if the block leaves a trace in it."""

    @contextmanager
    def compare(adata: AnnData) -> Iterator[None]:
        before = fingerprint(adata)
        yield
        after = fingerprint(adata)
        assert [k for k in before if before[k] != after[k]] == []

    return compare


@pytest.fixture(scope="session")
def _screens() -> dict[str, AnnData]:
    log_ratios = small_screen(modality="log")
    log_ratios.X = log_ratios.X - log_ratios.X.mean(0)
    return {
        "plain": small_screen(),
        "dosed": small_screen(doses=[1.0, 10.0], combinations=0, n_cells_per_condition=12, n_perturbations=2),
        "continuous": log_ratios,
    }


@pytest.fixture
def screen(_screens: dict[str, AnnData]) -> Callable[..., AnnData]:
    """`screen()` is a fresh AnnData; `screen("dosed")`, `screen("continuous")` are others."""
    return lambda name="plain": _screens[name].copy()


@pytest.fixture(scope="session")
def trained(spec: Spec, _screens: dict[str, AnnData]) -> Any:
    """A trained model; tests leave it and its data as they are."""
    adata = _screens["plain"].copy()
    spec.setup(adata)
    return spec.fit(spec.make(adata))


@pytest.fixture(scope="session")
def trained_dosed(spec: Spec, _screens: dict[str, AnnData]) -> Any:
    adata = _screens["dosed"].copy()
    spec.setup(adata, dose_key="dose")
    return spec.fit(spec.make(adata))


@pytest.fixture(scope="session")
def trained_continuous(spec: Spec, _screens: dict[str, AnnData]) -> Any:
    adata = _screens["continuous"].copy()
    spec.setup(adata, layer=None)
    return spec.fit(spec.make(adata))
