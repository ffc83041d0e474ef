"""Benchmarks of network models, small."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from pertura.benchmark import grn_knockouts, grn_speed, summarise_knockouts


def test_speed_is_of_the_same_model():
    table = grn_speed((60, 80), n_regulators=10, n_cells=128, n_steps=1)
    assert table["n_genes"].tolist() == [60, 80]
    assert (table["max_difference"] < 1e-4).all()
    np.testing.assert_allclose(table["faster"], table["seconds_per_epoch_dense"] / table["seconds_per_epoch"])


@pytest.fixture
def cells() -> ad.AnnData:
    """Gene a drives b; one knock-out is of a, one of a gene that is not there."""
    rng = np.random.default_rng(0)
    state = rng.normal(size=(300, 6)).astype(np.float32) + 3.0
    labels = np.repeat(["control", "a", "other"], 100)
    state[labels == "a", 0] = 0.0
    state[:, 1] += state[:, 0] - 3.0
    return ad.AnnData(state, obs=pd.DataFrame({"perturbation": labels}), var=pd.DataFrame(index=list("abcdef")))


def test_knockouts(cells):
    table = grn_knockouts(cells, layer=None, train={"max_epochs": 2}, seeds=2, hidden=(8,))
    assert table["target"].tolist() == ["a", "a"] and table["seed"].tolist() == [0, 1]
    assert table["pearson_regression"].iloc[0] > 0.9 and table["ceiling"].iloc[0] > 0.9
    summary = summarise_knockouts(table).set_index("metric")
    row = summary.loc["pearson_difference"]
    assert row["mean"] == pytest.approx(table["pearson_sem"].mean() - table["pearson_regression"].mean())
    with pytest.raises(ValueError, match="no perturbation in"):
        grn_knockouts(cells[:, 1:].copy(), layer=None)
