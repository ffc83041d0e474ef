from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import torch

from pertura import _cli, _quickstart, datasets
from pertura import metrics as mt
from pertura.model import PertVAE


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """The quickstart on a few simulated cells, run once."""
    folder = tmp_path_factory.mktemp("quickstart")
    out = folder / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert _cli.main(["quickstart", "--fast", "--out", str(out), "--context", "context_2"]) == 0
    return out


def test_writes_what_it_says_and_nothing_else(done):
    assert {p.name for p in done.iterdir()} == {"quickstart.png", "predicted.h5ad", "model", "scores.csv"}
    assert [p.name for p in done.parent.iterdir()] == ["out"]
    assert (done / "quickstart.png").stat().st_size > 10_000


def test_the_held_out_cells_are_not_in_what_was_trained_on(done):
    cells = ad.read_h5ad(done / "predicted.h5ad")
    held = (cells.obs["cell_type"] == "context_2") & (cells.obs["perturbation"] != "control")
    assert not held.any()
    # of 25 controls; the measured effect is against the other 12
    assert (cells.obs["cell_type"] == "context_2").sum() == 13
    (name,) = set(cells.obs["perturbation"]) - {"control"}
    for key in (name, f"{name}_low", f"{name}_high"):
        assert np.isfinite(cells.layers[key]).all()
    frame = sc.get.rank_genes_groups_df(cells, "context_2", key=f"{name}_effect")
    assert len(frame) == cells.n_vars


def test_the_model_loads(done):
    model = PertVAE.load(str(done / "model"), adata=False)
    cells = ad.read_h5ad(done / "predicted.h5ad")[:3].copy()
    answer = model.predict_perturbation(model.vocabulary.names[0], adata=cells, return_anndata=True)
    assert answer.shape == cells.shape


def test_scores(done):
    scores = pd.read_csv(done / "scores.csv")
    assert set(scores["metric"]) == {"pearson_effect_top", "r2_top", "mse", "gap_closed"}
    assert set(scores["model"]) == {"PertVAE", "NoChange", "MeanEffect", "WeightedMeanEffect", "ceiling"}
    own = scores[(scores["metric"] != "gap_closed") & (scores["model"] != "NoChange")]
    assert (own["low"] <= own["mean"]).all() and (own["mean"] <= own["high"]).all() and (own["low"] < own["high"]).all()
    none = scores[(scores["model"] == "NoChange") & (scores["metric"] == "pearson_effect_top")]
    assert none["mean"].item() == pytest.approx(0, abs=1e-6)


def test_scores_are_those_of_the_metrics():
    rng = np.random.default_rng(0)
    x, y, c, start = rng.normal(size=(4, 300))
    top = np.argsort(-np.abs(y - c))[:100]
    at = _quickstart._draw_genes(top, rng)
    assert at.shape == (501, 100) and set(at.ravel()) == set(top)
    for metric in ("pearson_effect_top", "r2_top"):
        profiles = x[None], y[None], c[None], start[None]
        value = _quickstart._boot(metric, *profiles, at=at)
        options = {"predicted_control": start} if metric == "pearson_effect_top" else {}
        assert value[0] == pytest.approx(mt.get_metric(metric)(x, y, c, **options))
        assert value[1:].std() > 0.01
    full = _quickstart._boot("mse", *profiles, at=top[None], full_size=True)
    assert full[0] == pytest.approx(mt.mse(x[top], y[top]) / 2)


@pytest.mark.parametrize(
    ("words", "about", "n_genes"),
    [
        ([], "Kang et al. 2018", 1267),
        (["--data", "kang"], "Kang et al. 2018", 1267),
        (["--data", "simulated"], "simulated", 60),
        (["--fast"], "simulated", 60),
    ],
)
def test_reads_real_cells_without_cache_or_network(words, about, n_genes, offline, monkeypatch, tmp_path):
    monkeypatch.setattr(datasets, "simulate", lambda **size: _small(size))
    ran = []
    monkeypatch.setattr(_quickstart, "_run", lambda *arguments: ran.append(arguments))
    assert _quickstart.main([*words, "--out", str(tmp_path / "out")]) == 0
    ((dataset, said, context, *_),) = ran
    assert about in said and dataset.adata.n_vars == n_genes
    assert context == ("CD14+ Monocytes" if n_genes == 1267 else "context_1")


def _small(size):
    from pertura.datasets._simulate import simulate

    return simulate(**{**size, "n_genes": 60, "n_regulators": 8, "n_cells_per_condition": 4, "n_control_cells": 4})


@pytest.mark.parametrize(
    "arguments", [["--context", "unheard"], ["--data", "kang"], ["--unheard"], ["--out", "/dev/null/x"]]
)
def test_wrong_arguments(arguments, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        _quickstart.main(["--fast", "--out", str(tmp_path / "out"), *arguments])
    assert stopped.value.code == 2
    assert "error" in capsys.readouterr().err


def test_seed_makes_the_model():
    dataset, _ = _quickstart._load("simulated", True)
    effects, state = [], torch.random.get_rng_state()
    for seed in ("1", "1", "2"):
        options = _quickstart._parser().parse_args(["--fast", "--max-epochs", "1", "--seed", seed])
        train = dataset.rows(np.arange(dataset.adata.n_obs))
        model = _quickstart._train(train, dataset, options)
        effects.append(model.get_perturbation_effect(n_samples=5, seed=0)["lfc_mean"])
    assert torch.equal(torch.random.get_rng_state(), state)
    pd.testing.assert_series_equal(effects[0], effects[1])
    assert not effects[0].equals(effects[2])
