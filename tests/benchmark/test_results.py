"""The store of results: what is kept, what is replaced, what is refused."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from pertura.benchmark import Results

RUN = {"dataset": "d", "model": "m", "seed": 0}


def test_a_file_keeps_every_run_as_it_was(tmp_path):
    path = tmp_path / "deep" / "results.csv"
    results = Results(path)
    assert not results.has(RUN) and not path.exists()
    # names that a reader of CSV files takes for missing values
    rows = [
        {"perturbation": "NA", "metric": "mse", "value": 0.5},
        {"perturbation": "None", "metric": "mse", "value": np.nan},
    ]
    results.add(rows, RUN, settings="x", seconds=2.0)
    results.add([{"metric": "mse", "value": 1.0}], {**RUN, "seed": 1}, settings="x", n_cells=3)
    again = Results(path)
    pd.testing.assert_frame_equal(again.select(), results.select(), check_dtype=False)
    assert again.table["perturbation"].tolist() == ["NA", "None", ""]
    assert np.isnan(again.table["value"].iloc[1]) and again.table["versions"].str.contains("pertura ").all()
    assert again.has(RUN, settings="x") and again.has({"dataset": "d"}, settings="x") and not again.has({"seed": 2})
    assert len(again.select(seed=[1, 2])) == 1 and again.select(model="other").empty


def test_a_run_with_more_metrics_replaces_the_older(tmp_path):
    path = tmp_path / "results.csv"
    results = Results(path)
    for model in ("m", "n"):
        results.add([{"metric": "mse", "value": 1.0}], {**RUN, "model": model})
    assert results.has(RUN, metrics=["mse"]) and not results.has(RUN, metrics=["mse", "mae"])
    results.add([{"metric": k, "value": 2.0} for k in ("mse", "mae")], RUN)
    for table in (results.select(), Results(path).select()):
        assert table.groupby("model")["value"].agg(list).to_dict() == {"m": [2.0, 2.0], "n": [1.0]}


def test_refuses(tmp_path):
    results = Results()
    results.add([{"metric": "mse", "value": 1.0}], RUN, settings="x")
    with pytest.raises(ValueError, match="other settings"):
        results.has(RUN, settings="y")
    with pytest.raises(ValueError, match="no column 'score'"):
        results.add([{"score": 1.0}], RUN)
    (tmp_path / "no.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="no benchmark result"):
        Results(tmp_path / "no.csv")
