"""The benchmark of planted networks, small."""

from __future__ import annotations

import numpy as np
import pytest

from pertura.benchmark import run_planted, summarise_planted

SMALL = {"n_genes": 30, "n_regulators": 8, "n_perturbations": 8, "n_cells_per_condition": 20, "n_truth_cells": 5}


def test_table_and_summary():
    options = {"screen": SMALL, "train": {"max_epochs": 1}, "n_latent": 4, "n_hidden": 8}
    table = run_planted(priors=("none", "right"), seeds=1, **options)
    own = table[table["method"] == "GPOVAE"].set_index("prior")
    assert list(own.index) == ["none", "right"]
    assert own[["auprc", "auprc_all", "pearson", "mse", "coverage"]].notna().all(axis=None)
    assert own.loc["right", "auprc_all"] > own.loc["none", "auprc_all"]
    simple = table[table["method"] != "GPOVAE"].set_index("method")
    assert simple.loc["z score of the shift", "auprc"] > 0.3 and np.isnan(simple.loc["shift", "auprc_all"])
    assert simple.loc["no change", "pearson"] == 0 < simple.loc["no change", "mse"]
    summary = summarise_planted(table).set_index(["metric", "method", "prior"])
    assert summary.loc[("pearson", "GPOVAE", "right"), "mean"] == pytest.approx(own.loc["right", "pearson"])
    with pytest.raises(ValueError, match="`priors`"):
        run_planted(priors=["true"])
