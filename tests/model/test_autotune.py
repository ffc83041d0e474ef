"""The search of options in the documentation, by Ray Tune."""

from __future__ import annotations

import numpy as np
import pytest

from pertura.model import SAMSVAE


@pytest.fixture
def tools(monkeypatch):
    ray = pytest.importorskip("ray", reason="the extra `tune` is not installed")
    tune = pytest.importorskip("ray.tune", reason="the extra `tune` is not installed")
    pytest.importorskip("scib_metrics", reason="the extra `tune` is not installed")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
    yield tune
    ray.shutdown()


@pytest.mark.slow
def test_a_search_finds_the_smaller_error(tools, screen, tmp_path):
    from scvi import autotune

    adata = screen()
    SAMSVAE.setup_anndata(adata, perturbation_key="perturbation", control="control")
    found = autotune.run_autotune(
        SAMSVAE,
        adata,
        metrics=["elbo_validation", "prediction_validation"],
        mode="min",
        search_space={
            "model_params": {"n_latent": tools.choice([3, 5])},
            "train_params": {
                "max_epochs": 3,
                "accelerator": "cpu",
                "plan_kwargs": {"lr": tools.grid_search([1e-9, 1e-2])},
            },
        },
        num_samples=1,
        scheduler="fifo",
        searcher="random",
        seed=0,
        resources={"cpu": 1},
        logging_dir=str(tmp_path),
        ignore_reinit_error=True,
    )
    assert not found.result_grid.errors
    tried = found.result_grid.get_dataframe()
    assert np.isfinite(tried[["elbo_validation", "prediction_validation"]].to_numpy(float)).all()
    best = found.result_grid.get_best_result("elbo_validation", "min").config
    # nothing is learned at the other rate
    assert best["train_params"]["plan_kwargs"]["lr"] == 1e-2 and best["model_params"]["n_latent"] in (3, 5)
