"""Perturbations measured in few cells: halves, baselines and what the table says."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from pertura.benchmark import Dataset, few_cells_splits, run_few_cells, summarise_few_cells
from pertura.benchmark.__main__ import main
from pertura.benchmark._few_cells import genewise_eb, training_mean


@pytest.fixture
def dataset(screen):
    one = screen[screen.obs["cell_type"] == screen.obs["cell_type"].iloc[0]].copy()
    return Dataset(one, "simulated", "perturbation", "control", layer="counts")


def test_fewer_cells_are_among_the_more(dataset):
    few, more, every = few_cells_splits(dataset, sizes=[3, 6, None], seed=1, min_cells=5)
    label = dataset.labels
    assert set(few.train) < set(more.train) < set(every.train)
    np.testing.assert_array_equal(few.test, every.test)
    assert not set(every.train) & set(every.test)
    number = pd.Series(label[few.train]).value_counts()
    controls = (label[every.train] == "control").sum()
    assert number.pop("control") == controls and (number == 3).all()


def test_the_training_mean_and_its_shrinkage(dataset):
    (split,) = few_cells_splits(dataset, sizes=[None], min_cells=5)
    train = dataset.rows(split.train)
    own, shrunk = (f(train, setup=dataset.keys, seed=0) for f in (training_mean, genewise_eb))
    x = pd.DataFrame(dataset.expression(split.train).toarray()).groupby(dataset.labels[split.train]).mean()
    name = own.mean.index[0]
    np.testing.assert_allclose(own.mean.loc[name], x.loc[name] - x.loc["control"], atol=1e-6)
    ratio = shrunk.mean / own.mean
    # one factor for each gene and number of cells
    assert ((ratio > -1e-9) & (ratio < 1)).all(axis=None)
    assert (shrunk.sd < own.sd.mean().mean() * 3).all(axis=None)


def test_one_command(dataset, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("pertura.benchmark._few_cells.papalexi_screen", lambda: dataset)
    monkeypatch.setattr("pertura.benchmark._few_cells.few_cells_splits", _small)
    out = tmp_path / "papalexi.csv"
    metrics = ["pearson_effect", "energy_distance", "interval_coverage", "log_likelihood"]
    model = "SAMSVAE:n_latent=2,train.max_epochs=1"
    assert main(["papalexi", "--cells", "4", "--seeds", "1", "--models", model, "--out", str(out)]) == 0
    assert "GenewiseEB" in capsys.readouterr().out
    results = pd.read_csv(out)
    assert set(results["metric"]) == set(metrics) and set(results["split"]) == {"4 cells"}
    found = results[results["model"] == model].set_index("metric")["value"]
    assert found.notna().all() and (found["log_likelihood"] < 0).all()
    assert (found["interval_coverage"] > 0.5).all()


def _small(dataset, **options):
    return few_cells_splits(dataset, **{**options, "min_cells": 5})


def test_the_gain_is_over_the_better_of_the_simple_ones(dataset):
    results = run_few_cells(dataset, {}, sizes=[4], seeds=2, metrics=["pearson_effect"], min_cells=5, progress=False)
    table = summarise_few_cells(results, active=["nothing"]).set_index("model")
    best = table.loc[["TrainingMean", "GenewiseEB"], "mean"].max()
    np.testing.assert_allclose(table["gain"].drop("ceiling"), (table["mean"] - best).drop("ceiling"), atol=1e-9)
    assert table["active"].isna().all() and results["held_out"].nunique() == 2


@pytest.mark.parametrize(("options", "message"), [({"sizes": [0]}, "`sizes`"), ({"min_cells": 1000}, "`min_cells`")])
def test_wrong_arguments(dataset, options, message):
    with pytest.raises(ValueError, match=message):
        few_cells_splits(dataset, **options)
