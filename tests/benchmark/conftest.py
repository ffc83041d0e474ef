"""A small simulated screen and fast models whose predictions are known."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData

from pertura import datasets


class Shift:
    """Adds a fixed effect to control cells; remembers what it was trained on and asked."""

    def __init__(self, effect, half_width=0.1):
        self.effect, self.half_width = effect, half_width
        self.trained_on: list[AnnData] = []
        self.asked: list[tuple] = []

    def __call__(self, adata, *, setup, seed):
        self.trained_on.append(adata)
        self.setup, self.seed = setup, seed
        return self

    def predict_perturbation(self, perturbation, *, adata, return_anndata, ci, **options):
        assert return_anndata
        self.asked.append((perturbation, adata, options))
        x = np.log1p(1e4 * adata.layers["counts"].toarray() / adata.layers["counts"].sum(1)) + self.effect
        return AnnData(X=np.asarray(x), obs=adata.obs.copy(), var=adata.var.copy())[:, ::-1].copy()

    def get_perturbation_effect(self, perturbation, *, adata, ci, **options):
        effect = np.broadcast_to(self.effect, adata.n_vars)
        table = pd.DataFrame({"gene": adata.var_names, "lfc_mean": effect})
        return table.assign(ci_low=effect - self.half_width, ci_high=effect + self.half_width)[::-1]


@pytest.fixture(scope="session")
def shift():
    return Shift


@pytest.fixture(scope="session")
def _screen():
    adata = datasets.simulate(
        n_cells_per_condition=20,
        n_control_cells=30,
        n_genes=60,
        n_regulators=8,
        n_perturbations=3,
        combinations=2,
        n_contexts=3,
        n_unresponsive_contexts=0,
        library_size=3000,
        n_truth_cells=50,
        seed=1,
    )
    adata.uns["dataset"] = {
        **adata.uns["dataset"],
        "perturbation_key": "perturbation",
        "control": "control",
        "context_key": "cell_type",
        "scale": "counts",
    }
    return adata


@pytest.fixture
def screen(_screen):
    return _screen.copy()
