"""The command line, on simulated cells in place of the public ones."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData

from pertura import datasets
from pertura.benchmark.__main__ import main


def test_kang(screen, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(datasets, "kang_2018_mini", lambda: screen)
    out, plot = tmp_path / "kang.csv", tmp_path / "kang.png"
    arguments = ["kang", "--models", "Additive", "--metrics", "mse", "pearson_effect_top20", "--out", str(out)]
    assert main([*arguments, "--plot", str(plot)]) == 0
    text = capsys.readouterr().out
    for name in ("NoChange", "MeanEffect", "WeightedMeanEffect", "Additive", "ceiling", "gap_closed"):
        assert name in text
    results = pd.read_csv(out)
    # Baselines do not depend on the seed and run once.
    assert results.groupby("model")["seed"].nunique().eq(1).all()
    assert len(results) == 5 * 2 * 15
    value = results[results["metric"] == "mse"].groupby("model")["value"].mean()
    assert value["MeanEffect"] < value["NoChange"]
    assert plot.stat().st_size > 10_000
    size = out.stat().st_size
    assert main(arguments) == 0 and out.stat().st_size == size


def test_other_questions(screen, monkeypatch, capsys):
    monkeypatch.setattr(datasets, "norman_mcfaline_mini", lambda: screen)
    assert main(["norman", "--split", "unseen_combination", "--models", "Additive", "--metrics", "mse"]) == 0
    assert "Additive" in capsys.readouterr().out


def test_l1000(monkeypatch, capsys):
    rng = np.random.default_rng(0)
    x = rng.normal(8, 2, size=(12, 30)).astype(np.float32)
    obs = pd.DataFrame({"perturbation": ["control", "control", *[f"d{i // 2}" for i in range(10)]], "dose": 1.0})
    obs.index = [f"p{i}" for i in range(12)]
    obs["paired_control_index"] = ["p0", "p1"] * 6
    adata = AnnData(X=x, obs=obs, var=pd.DataFrame(index=[f"g{i}" for i in range(30)]))
    adata.obs.loc[["p0", "p1"], "dose"] = 0.0
    monkeypatch.setattr(datasets, "lincs_l1000_ht115", lambda: adata)
    assert main(["l1000", "--models", "MeanEffect", "--seeds", "1"]) == 0
    text = capsys.readouterr().out
    assert "spearman" in text and "compound_mean_effect" in text and "p_identity" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["unheard"], "`data`"),
        (["kang", "--models", "Unheard"], "`models`"),
        (["kang", "--metrics", "unheard"], "`metrics`"),
        (["l1000", "--plot", "x.png"], "--plot"),
    ],
)
def test_wrong_arguments(screen, arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(datasets, "kang_2018_mini", lambda: screen)
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_without_data(monkeypatch, capsys):
    def missing():
        raise datasets.DataNotAvailable("connect to the network")

    monkeypatch.setattr(datasets, "kang_2018_mini", missing)
    with pytest.raises(SystemExit) as stopped:
        main(["kang"])
    assert stopped.value.code == 2 and "connect to the network" in capsys.readouterr().err


def test_is_a_command():
    result = subprocess.run([sys.executable, "-m", "pertura.benchmark", "--help"], capture_output=True, text=True)
    assert result.returncode == 0 and "--seeds" in result.stdout
