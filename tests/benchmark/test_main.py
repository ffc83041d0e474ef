"""The command line, on simulated cells in place of the public ones."""

from __future__ import annotations

import subprocess
import sys

import pandas as pd
import pytest

from pertura import _cli, datasets
from pertura.benchmark import Dataset, Results
from pertura.benchmark.__main__ import main


def test_kang(screen, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(datasets, "kang_2018_mini", lambda: screen)
    out, plot = tmp_path / "kang.csv", tmp_path / "kang.png"
    arguments = ["kang", "--models", "Additive", "--metrics", "mse", "pearson_effect_top20", "--out", str(out)]
    assert main([*arguments, "--plot", str(plot)]) == 0
    text = capsys.readouterr().out
    for name in ("NoChange", "MeanEffect", "WeightedMeanEffect", "Additive", "ceiling", "gap_closed"):
        assert name in text
    results = Results(out).table
    # Baselines do not depend on the seed and run once.
    assert results.groupby("model")["seed"].nunique().eq(1).all()
    assert len(results) == 5 * 2 * 15 and set(results["split"]) == {"unseen_context"}
    value = results[results["metric"] == "mse"].groupby("model")["value"].mean()
    assert value["MeanEffect"] < value["NoChange"]
    assert plot.stat().st_size > 10_000
    size = out.stat().st_size
    assert main(arguments) == 0 and out.stat().st_size == size


def test_another_task(screen, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(datasets, "norman_mcfaline_mini", lambda: screen)
    words = ["norman", "--task", "unseen_combination", "--models", "Additive", "--metrics", "pearson_effect", "--out"]
    assert main([*words, str(tmp_path / "halves.csv")]) == 0
    assert "Additive" in capsys.readouterr().out
    assert main([*words, str(tmp_path / "shared.csv"), "--controls", "shared"]) == 0
    assert main([*words, str(tmp_path / "other.csv"), "--split-seed", "1"]) == 0
    tables = [Results(tmp_path / f"{name}.csv").table for name in ("halves", "shared", "other")]
    assert [set(t["controls"]) for t in tables] == [{"halves"}, {"shared"}, {"halves"}]
    assert tables[0]["value"].mean() != tables[2]["value"].mean() != tables[1]["value"].mean()


def test_few_shots(screen, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(datasets, "kang_2018_mini", lambda: screen)
    words = ["kang", "--models", "EmpiricalBayes", "--metrics", "mse", "--out", str(tmp_path / "few.csv")]
    assert main([*words, "--task", "few_shot_context", "--shots", "0", "8"]) == 0
    results = Results(tmp_path / "few.csv").table
    assert set(results["split"]) == {"few_shot_context (0 cells)", "few_shot_context (8 cells)"}
    value = results.groupby(["split", "model"])["value"].mean().unstack()
    assert value.loc["few_shot_context (8 cells)", "EmpiricalBayes"] < value["EmpiricalBayes"].iloc[0]
    # one truth for all numbers of cells
    assert value["NoChange"].nunique() == 1 and results["n_cells"].eq(12).all()
    with pytest.raises(SystemExit):
        main([*words, "--shots", "5"])
    assert "few_shot_context" in capsys.readouterr().err


def test_some_contexts(screen, monkeypatch, tmp_path, capsys):
    """Cells of the other contexts neither train nor are they asked."""
    monkeypatch.setattr(datasets, "kang_2018_mini", lambda: screen)
    dataset = Dataset.of("kang")
    chosen = sorted(set(dataset.contexts))[:2]
    words = ["kang", "--task", "unseen_context", "--models", "NoChange", "--metrics", "mse", "--contexts"]
    assert main([*words, *chosen, "--out", str(tmp_path / "two.csv")]) == 0
    assert set(Results(tmp_path / "two.csv").table["context"]) == set(chosen)
    assert set(dataset.only(chosen).contexts) == set(chosen) < set(dataset.contexts)
    with pytest.raises(SystemExit):
        main([*words, "nowhere"])
    assert "`contexts`" in capsys.readouterr().err


def test_a_file_of_one_s_own(screen, tmp_path, capsys):
    adata = screen[screen.obs["cell_type"] == screen.obs["cell_type"].iloc[0]].copy()
    adata.obs = adata.obs.rename(columns={"perturbation": "guide"})
    adata.obs["guide"] = adata.obs["guide"].astype(str).replace("control", "NT")
    path, out = tmp_path / "my.h5ad", tmp_path / "out.csv"
    adata.uns = {}
    adata.write_h5ad(path)
    words = ["benchmark", str(path), "--models", "MeanEffect", "--metrics", "mse", "--out", str(out)]
    own = ["--perturbation-key", "guide", "--control", "NT", "--layer", "counts"]
    assert _cli.main([*words, *own]) == 0
    results = Results(out).table
    # without contexts, cells are held out
    assert set(results["dataset"]) == {"my"} and set(results["split"]) == {"held_out_cells"}
    assert set(results["perturbation"]) == set(adata.obs["guide"]) - {"NT"}
    for change, message in ((["--control", "no"], "`control`"), (["--perturbation-key", "no"], "`perturbation_key`")):
        with pytest.raises(SystemExit):
            _cli.main([*words, *own, *change])
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        _cli.main(words)
    assert "--perturbation-key" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        _cli.main(["benchmark", str(tmp_path / "other.h5ad"), *own])
    assert "no file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["unheard"], "`data`"),
        (["kang", "--models", "Unheard"], "`models`"),
        (["kang", "--metrics", "unheard"], "`metrics`"),
        (["kang", "--task", "unheard"], "--task"),
        (["grn", "--models", "unheard"], "--models"),
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


def test_speed_is_a_word_of_its_own(monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(
        "pertura.benchmark.__main__.run_speed",
        lambda data, models, n_steps, **sizes: seen.append((data, models, n_steps)) or pd.DataFrame({"ratio": [1.5]}),
    )
    assert main(["speed", "kang", "--steps", "3"]) == 0 and main(["speed", "simulated", "--models", "CPA"]) == 0
    assert seen == [("kang", ["SAMSVAE"], 3), (None, ["CPA"], 200)] and "1.500" in capsys.readouterr().out


def test_is_a_command():
    result = subprocess.run([sys.executable, "-m", "pertura.benchmark", "--help"], capture_output=True, text=True)
    assert result.returncode == 0 and "usage: pertura benchmark" in result.stdout
