"""The studies are scripts: their folder is put on the path."""

from __future__ import annotations

from pathlib import Path

import pytest
from anndata import AnnData

from pertura import datasets
from pertura.benchmark import Dataset

FOLDER = Path(__file__).parents[2] / "docs" / "studies"


@pytest.fixture(autouse=True)
def studies_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(FOLDER)


@pytest.fixture(scope="session")
def _screen() -> AnnData:
    return datasets.simulate(
        n_cells_per_condition=20,
        n_control_cells=30,
        n_genes=40,
        n_regulators=8,
        n_perturbations=3,
        combinations=2,
        n_contexts=1,
        n_unresponsive_contexts=0,
        library_size=3000,
        n_truth_cells=20,
        seed=1,
    )


@pytest.fixture
def dataset(_screen: AnnData) -> Dataset:
    """Three knock-outs and two pairs of them in one context."""
    return Dataset(_screen.copy(), "simulated", "perturbation", "control", layer="counts")
