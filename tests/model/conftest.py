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
    replicates_counts
        Whether replicates have the distribution of counts, and not that of their logarithms alone.
    scores
        Whether it has a likelihood of cells.
    likes_own
        Whether cells are more likely under their own perturbation than without it. Where an intervention says nothing about the
        gene it is on, they are not.
    planted, planted_train
        Arguments with which it finds planted effects.
    planted_r, planted_slope
        Correlation with planted effects, and their size, that it reaches at least.
    planted_dose
        Dose that does to the gene itself what the highest simulated one does.
    planted_continuous
        Size of planted effects on continuous data that it reaches at least.
    """

    name: str
    init: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)
    learns_by_gradient: bool = True
    combines: bool = True
    refuses_unseen: bool = True
    knows_genes: bool = False
    only_genes: bool = False
    samples: bool = True
    replicates_counts: bool = True
    scores: bool = True
    likes_own: bool = True
    planted: dict[str, Any] = field(default_factory=dict)
    planted_train: dict[str, Any] = field(default_factory=lambda: {"max_epochs": 60, "batch_size": 64})
    planted_r: float = 0.7
    planted_slope: float = 0.5
    planted_dose: float = 10.0
    planted_continuous: float = 0.3

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


def pytest_configure(config: pytest.Config) -> None:
    """Register the marker."""
    config.addinivalue_line(
        "markers", "needs(name, value=True): only for models whose `Spec` has an attribute of that value"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out, rather than pass or skip, what makes no sense for a model."""
    kept, dropped = [], []
    for item in items:
        spec = item.callspec.params.get("spec") if hasattr(item, "callspec") else None
        wanted = [(mark.args[0], mark.kwargs.get("value", True)) for mark in item.iter_markers("needs")]
        fits = spec is None or all(bool(getattr(spec, name)) == value for name, value in wanted)
        (kept if fits else dropped).append(item)
    items[:] = kept
    if dropped:
        config.hook.pytest_deselected(items=dropped)


_SMALL = {"n_latent": 4, "n_hidden": 16}
_SHORT = {"max_epochs": 3, "batch_size": 64}
_CLOSED_FORM = {"learns_by_gradient": False, "samples": False, "scores": False, "planted_train": {}}
# adding a model is adding a line
MODELS = [
    Spec(
        "model.PertVAE",
        init={"n_latent": 4, "encoder_hidden": (16,), "n_flow_hidden": 8, "n_flow_context": 8},
        train=_SHORT,
        planted={"n_latent": 16, "encoder_hidden": (32,), "n_flow_hidden": 16, "n_flow_context": 16},
        planted_slope=0.35,
    ),
    Spec("model.SAMSVAE", init=_SMALL, train=_SHORT),
    Spec("model.CRADLEVAE", init=_SMALL, train=_SHORT),
    Spec("model.GPOVAE", init=_SMALL, train=_SHORT, knows_genes=True),
    Spec(
        "model.CPA",
        init=_SMALL,
        train=_SHORT,
        planted={"n_latent": 16, "n_hidden": 32},
        planted_train={"max_epochs": 120, "batch_size": 64},
    ),
    Spec(
        "model.PerturbX",
        init={"n_selected": 8, "n_members": 2, "n_hidden": 8, "bag_size": 8, "n_components": 5, "rank": 5},
        train=_SHORT,
        samples=False,
        scores=False,
    ),
    Spec(
        "model.DrugAAE",
        init={"n_latent": 4, "encoder_hidden": (16,), "n_gene_embedding": 8, "discriminator_hidden": (8,)},
        train=_SHORT,
    ),
    Spec(
        "model.InfoSEM",
        init={"n_ensemble": 2, "hidden": (8,)},
        train=_SHORT,
        knows_genes=True,
        only_genes=True,
        replicates_counts=False,
        likes_own=False,
        planted_r=0.5,
        planted_slope=0.3,
        # the highest simulated dose leaves a fifth of the counts, that of a knock-out nothing
        planted_dose=8.0,
    ),
    Spec("baseline.Additive", refuses_unseen=False, **_CLOSED_FORM),
    Spec("baseline.Linear", knows_genes=True, **_CLOSED_FORM),
    # stands for EmpiricalBayes, too, which it extends
    Spec("baseline.GaussianProcess", knows_genes=True, **_CLOSED_FORM),
]
# arguments that all models share are checked by code that all models share: one model and one baseline will do
SHARED = [spec for spec in MODELS if spec.name in ("model.SAMSVAE", "baseline.Linear")]


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


@pytest.fixture(scope="session", params=SHARED, ids=lambda spec: spec.name)
def shared_spec(request: pytest.FixtureRequest) -> Spec:
    return request.param


@pytest.fixture(
    scope="session", params=[spec for spec in MODELS if spec.learns_by_gradient], ids=lambda spec: spec.name
)
def gradient_spec(request: pytest.FixtureRequest) -> Spec:
    return request.param


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
def trained_shared(shared_spec: Spec, _screens: dict[str, AnnData]) -> Any:
    adata = _screens["plain"].copy()
    shared_spec.setup(adata)
    return shared_spec.fit(shared_spec.make(adata))


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
