"""Tiny registered data of every kind, and what is measured of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from scipy import sparse
from scvi.data import AnnDataManager

from pertura import baseline as bl
from pertura.effects import ConditionTable

N_GENES = 30
SETUP = {
    "perturbation_key": "perturbation",
    "control": "ctrl",
    "context_key": "context",
    "batch_key": "batch",
    "dose_key": "dose",
    "layer": "counts",
}


@pytest.fixture(scope="session")
def screen() -> AnnData:
    """Counts with two contexts, three batches, doses and a combination; depth differs between cells."""
    rng = np.random.default_rng(0)
    labels = rng.choice(["ctrl", "A", "B", "A+B"], 500, p=[0.4, 0.25, 0.2, 0.15])
    obs = pd.DataFrame({"perturbation": labels, "context": rng.choice(["x", "y"], 500)})
    obs["batch"] = rng.choice(["b1", "b2", "b3"], 500, p=[0.5, 0.3, 0.2])
    single = rng.choice(["1", "2.5"], 500)
    obs["dose"] = np.where(labels == "ctrl", "0", np.where(labels == "A+B", "2.5+0.3", single))
    obs.index = [f"cell{i}" for i in range(500)]
    depth = rng.lognormal(0.0, 0.6, 500)
    rate = rng.gamma(0.5, 2.0, N_GENES) * np.where((labels == "A")[:, None] & (np.arange(N_GENES) < 5), 4.0, 1.0)
    counts = rng.poisson(rate * depth[:, None]).astype(np.float32)
    return AnnData(obs=obs, layers={"counts": sparse.csr_matrix(counts)}, shape=counts.shape)


@pytest.fixture
def registered() -> Callable[..., bl.NoChange]:
    """`registered(adata)` sets up and gives an untrained model."""

    def register(adata: AnnData, **setup: Any) -> bl.NoChange:
        bl.NoChange.setup_anndata(adata, **{**SETUP, **setup})
        return bl.NoChange(adata)

    return register


@pytest.fixture
def measure(registered) -> Callable[..., ConditionTable]:
    """`measure(adata)` registers and measures all cells."""

    def of(adata: AnnData, *, rows: np.ndarray | None = None, setup: dict | None = None, **options: Any) -> Any:
        model = registered(adata, **(setup or {}))
        manager: AnnDataManager = model.adata_manager
        return ConditionTable.measure(
            manager,
            np.arange(adata.n_obs) if rows is None else rows,
            max_dose=np.array(model.vocabulary.max_dose),
            n_contexts=len(model.contexts),
            **options,
        )

    return of
