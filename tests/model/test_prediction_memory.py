"""Memory does not grow with the number of cells."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from scipy import sparse

from pertura import datasets
from pertura.model.base import _out

from .conftest import MODELS, Spec

STATM = Path("/proc/self/statm")
pytestmark = pytest.mark.skipif(not STATM.exists(), reason="memory of a process is read from /proc")
N_GENES = 200


def resident() -> float:
    """Resident memory of this process in MiB."""
    return int(STATM.read_text().split()[1]) * 4096 / 2**20


def growth(call: Callable[[], Any]) -> float:
    """By how much the resident memory rises at most while something runs, in MiB."""
    peak, running = [0.0], True

    def watch() -> None:
        while running:
            peak[0] = max(peak[0], resident())
            time.sleep(0.002)

    thread = threading.Thread(target=watch)
    before = resident()
    thread.start()
    try:
        call()
    finally:
        running = False
        thread.join()
    return peak[0] - before


@pytest.fixture(scope="module")
def model(spec):
    return fitted(spec)


def fitted(spec: Spec) -> Any:
    """A model of few cells."""

    adata = datasets.simulate(
        n_cells_per_condition=10,
        n_control_cells=20,
        n_genes=N_GENES,
        n_regulators=6,
        n_perturbations=2,
        n_contexts=2,
        n_unresponsive_contexts=0,
        n_biomarkers=2,
        n_truth_cells=10,
    )
    spec.setup(adata)
    return spec.fit(spec.make(adata), **({"max_epochs": 1} if spec.learns_by_gradient else {}))


def many(adata: AnnData, n_cells: int) -> AnnData:
    """The same cells again and again."""
    times = -(-n_cells // adata.n_obs)
    rows = np.tile(np.arange(adata.n_obs), times)[:n_cells]
    obs = adata.obs[["perturbation", "cell_type", "batch"]].iloc[rows]
    obs.index = pd.RangeIndex(n_cells).astype(str)
    counts = sparse.vstack([adata.layers["counts"]] * times, format="csr")[:n_cells]
    return AnnData(obs=obs, var=pd.DataFrame(index=adata.var_names), layers={"counts": counts})


def iterate(model: Any, adata: AnnData, n_samples: int) -> None:
    seen = 0
    for chunk in model.iter_predictions(model.vocabulary.names[0], adata=adata, n_samples=n_samples):
        seen += chunk.n_obs
    assert seen == adata.n_obs


def effect(model: Any, adata: AnnData, n_samples: int) -> None:
    names = list(model.vocabulary.names)
    assert len(model.get_perturbation_effect(names, adata=adata, n_samples=n_samples)) == 2 * 2 * N_GENES


def to_file(model: Any, adata: AnnData, n_samples: int) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "pred.zarr"
        model.predict_perturbation(model.vocabulary.names[0], adata=adata, ci=None, n_samples=n_samples, out=path)


def compare(call: Callable[..., None], model: Any, sizes: tuple[int, int], n_samples: int) -> list[float]:
    queries = [many(model.adata, n) for n in sizes]
    call(model, queries[0], n_samples)  # what is allocated once
    return [growth(lambda q=query: call(model, q, n_samples)) for query in queries]


@pytest.fixture(scope="module")
def one_model():
    """The others go the same way: they are tried among the slow tests."""
    return fitted(next(spec for spec in MODELS if spec.name == "model.SAMSVAE"))


@pytest.mark.parametrize("call", [iterate, effect, to_file])
def test_memory_at_2_000_and_20_000_cells(one_model, call, monkeypatch):
    model = one_model
    # a few MiB of means wait to be written, whatever the number of cells: both files are to fill several chunks
    monkeypatch.setattr(_out, "_CHUNK_BYTES", 2**20)
    few, all_ = compare(call, model, (2_000, 20_000), n_samples=2)
    # the predictions of 20,000 cells fill 46 MiB, their draws 31 MiB per perturbation
    assert all_ < few + 15


def test_what_is_kept_is_seen(one_model):
    """The measurement would see predictions that are kept."""
    model = one_model
    # 137 MiB of predictions: more than what earlier tests may have left free in the heap
    adata = many(model.adata, 60_000)
    options = {"adata": adata, "n_samples": 2, "return_anndata": True}
    kept: list[AnnData] = []
    rise = growth(lambda: kept.append(model.predict_perturbation(model.vocabulary.names[0], **options)))
    assert rise > 50


@pytest.mark.slow
@pytest.mark.parametrize("call", [iterate, effect])
def test_memory_at_10_000_and_100_000_cells(model, call):
    few, all_ = compare(call, model, (10_000, 100_000), n_samples=10)
    # 229 MiB of predictions, 763 MiB of draws
    assert all_ < few + 50
