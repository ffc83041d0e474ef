"""Studies of single cells: what is held out, and what stands beside the models."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData

from pertura.benchmark import ModelSpec, Results


def test_fewer_cells_are_among_the_more(dataset):
    from papalexi_few_cells import few_cells_splits

    few, more, every = few_cells_splits(dataset, sizes=[3, 6, None], seed=1, min_cells=5)
    label = dataset.labels
    assert set(few.train) < set(more.train) < set(every.train)
    np.testing.assert_array_equal(few.test, every.test)
    assert not set(every.train) & set(every.test)
    number = pd.Series(label[few.train]).value_counts()
    assert number.pop("control") == (label[every.train] == "control").sum() and (number == 3).all()


def test_the_training_mean_and_its_shrinkage(dataset):
    from papalexi_few_cells import SIMPLE, few_cells_splits

    (split,) = few_cells_splits(dataset, sizes=[None], min_cells=5)
    train = dataset.rows(split.train)
    own, shrunk, mean = (
        SIMPLE[n](train, setup=dataset.keys, seed=0) for n in ("TrainingMean", "GenewiseEB", "MeanOfPerturbations")
    )
    x = pd.DataFrame(dataset.expression(split.train).toarray(), columns=train.var_names)
    x = x.groupby(dataset.labels[split.train])
    effect = (x.mean() - x.mean().loc["control"]).drop("control")
    key = ("all", "")
    np.testing.assert_allclose(own.mean[key].loc[effect.index], effect, atol=1e-5)
    error = x.var().div(x.size(), axis=0)
    se = np.sqrt(error.drop("control") + error.loc["control"])
    np.testing.assert_allclose(own.sd[key].loc[effect.index], se, atol=1e-4)
    ratio = shrunk.mean[key] / own.mean[key]
    assert ((ratio > -1e-9) & (ratio < 1)).all(axis=None)
    np.testing.assert_allclose(mean.mean[key].iloc[0], effect.mean(), atol=1e-5)
    # asked for cells or for effects, the same is said
    query = train[(dataset.labels[split.train] == "control")].copy()
    name = effect.index[0]
    cells = own.predict_perturbation(name, adata=query)
    table = own.get_perturbation_effect(name, adata=query, ci=0.9).set_index("gene")
    np.testing.assert_allclose(cells.X.mean(0) - x.mean().loc["control"], effect.loc[name], atol=1e-4)
    np.testing.assert_allclose(table["ci_high"] - table["lfc_mean"], 1.645 * own.sd[key].loc[name], rtol=1e-3)


def test_few_cells(dataset, monkeypatch, tmp_path, capsys):
    import papalexi_few_cells as study

    monkeypatch.setattr(study, "screen", lambda: dataset)
    monkeypatch.setattr(study, "study", lambda *a, f=study.study, **o: f(*a, **o, min_cells=5, progress=False))
    out = tmp_path / "papalexi.csv"
    model = "SAMSVAE:n_latent=2,train.max_epochs=1"
    study.main(["--cells", "4", "--seeds", "1", "--models", model, "--out", str(out)])
    assert "GenewiseEB" in capsys.readouterr().out
    results = Results(out).table
    assert set(results["metric"]) == set(study.METRICS) and set(results["split"]) == {"4 cells"}
    found = results[results["model"] == model].set_index("metric")["value"]
    assert found.notna().all() and (found["log_likelihood"] < 0).all()
    table = study.summary(results[results["metric"] == "pearson_effect"]).set_index("model").drop("ceiling")
    best = table.loc[["TrainingMean", "GenewiseEB"], "mean"].max()
    np.testing.assert_allclose(table["gain"], table["mean"] - best, atol=1e-9)


def test_held_out_pairs_and_genes(dataset):
    import norman

    names = sorted({m for label in set(dataset.labels) for m in label.split("+")} - {"control"})
    dataset.adata.uns[norman.FEATURES] = pd.DataFrame(np.eye(len(names), 2), index=names)
    (split,) = norman.pairs_split(dataset, seed=3)
    train, test = set(dataset.labels[split.train]), set(dataset.labels[split.test])
    pairs = test - {"control"}
    assert pairs and all("+" in p and set(p.split("+")) <= train for p in pairs)
    assert not set(split.train) & set(split.test) and "control" in train & test
    held = []
    for split in norman.singles_splits(dataset, n_folds=3):
        out = set(dataset.labels[split.test]) - {"control"}
        assert {m for label in dataset.labels[split.train] for m in label.split("+")}.isdisjoint(out)
        assert not set(split.train) & set(split.test)
        held += out
    assert sorted(held) == names


def test_pairs_beside_adding_up(dataset):
    import norman

    from pertura import baseline

    models = {n: ModelSpec(getattr(baseline, n), stochastic=False) for n in ("Additive", "MeanEffect")}
    found = norman.study(dataset, models, norman.pairs_split, seeds=2, n_halves=5, progress=False)
    table = norman.summarize_pairs(found).query("metric == 'pearson_effect'").set_index(["pairs", "model"])
    own, added = table.loc[("all", "MeanEffect")], table.loc[("all", "Additive")]
    assert own["n_conditions"] == 2
    assert own["gain"] == pytest.approx(own["mean"] - added["mean"])


def test_knockouts_from_controls():
    """Gene a drives b; one knock-out is of a, one of a gene that is not there."""
    import infosem_knockouts as study

    from pertura.benchmark import Dataset

    rng = np.random.default_rng(0)
    state = rng.normal(size=(300, 6)).astype(np.float32) + 3.0
    labels = np.repeat(["control", "a", "other"], 100)
    state[labels == "a", 0] = 0.0
    state[:, 1] += state[:, 0] - 3.0
    cells = AnnData(state, pd.DataFrame({"perturbation": labels}, [f"c{i}" for i in range(300)]))
    cells.var_names = list("abcdef")
    found = study.study(
        Dataset(cells, "simulated", "perturbation", "control"),
        seeds=1,
        results=Results(),
        train={"max_epochs": 2},
        hidden=(8,),
    )
    assert set(found["perturbation"]) == {"a"}
    value = found.set_index(["model", "metric"])["value"]
    assert value["regression", "pearson"] > 0.8 and value["ceiling", "pearson"] > 0.8
    row = study.summary(found).set_index(["method", "metric"]).loc[("InfoSEM - regression", "pearson")]
    assert row["mean"] == pytest.approx(value["InfoSEM", "pearson"] - value["regression", "pearson"])


def test_knockouts_left_out(monkeypatch):
    """Gene a drives b to d, c drives e; the screen has its knock-outs, and those of genes that are not measured."""
    import papalexi_knockouts as study

    from pertura.benchmark import Dataset

    rng = np.random.default_rng(0)
    names = ["a", "c", "x", "y", "z", "w"]
    effect = pd.DataFrame(0.0, ["control", *names], list("abcdef"))
    effect.loc[["a", "x", "y"], list("bcd")] = -1.5
    effect.loc["a", "a"] = effect.loc["c", "c"] = -3.0
    labels = np.repeat(effect.index, [120, *[40] * 6])
    x = rng.poisson(np.exp(1.5 + effect.loc[labels])).astype(np.float32)
    cells = AnnData(
        x, pd.DataFrame({"perturbation": labels}, [f"c{i}" for i in range(len(x))]), effect.columns.to_frame()
    )
    cells.layers["counts"] = x
    features = pd.DataFrame(rng.normal(size=(6, 2)), names, ["s:0", "s:1"])
    dataset = Dataset(cells, "small", "perturbation", "control", layer="counts")
    part = study.LeftOut(dataset, features, 0, {"max_epochs": 1, "accelerator": "cpu"}, False)
    assert len(part.here) == len(part.there) == 60
    mean, low, high = part.gpovae("x", features)
    assert mean.shape == (6,) and (low < high).all()
    # what is left is what is scored: both models stand aside
    asked = []
    ends = part.effect["y"], part.effect["y"] - 3.0, part.effect["y"] + 3.0
    monkeypatch.setattr(study.LeftOut, "gpovae", lambda self, *given: asked.append(given) or ends)
    monkeypatch.setattr(study.LeftOut, "infosem", lambda self, targets: dict.fromkeys(targets, ends))
    given = {"results": Results(), "seeds": 1, "min_cells": 20, "targets": ["a", "x"]}
    found = study.study(dataset, features, permuted=True, **given)
    assert [target for target, _ in asked] == ["a", "a", "a", "x", "x"] and asked[2][1] is None
    value = found.set_index(["perturbation", "model", "metric"])["value"]
    assert value["x", study.SETS, "pearson"] > 0.9 and value["x", study.SETS, "coverage"] == 1.0
    assert (
        value["x", "no change", "error"] > value["x", "mean effect", "error"] and value["x", "ceiling", "pearson"] > 0.5
    )
    assert ("x", study.PLAIN, "pearson") not in value and ("x", study.OTHERS, "coverage") in value
    assert {study.PLAIN, study.SETS, "InfoSEM", "regression", "correlation"} <= set(
        value["a"].index.get_level_values(0)
    )
    with pytest.raises(ValueError, match=r"`targets`: \['q'\]"):
        study.study(dataset, features, **{**given, "targets": ["q"]})
    table = study.summary(found, cells.var_names).set_index(["knock-outs", "method", "metric"])
    assert table.loc[("all (2)", "no change", "error"), "mean"] == 1.0
    gain = table.loc[("all (2)", study.SETS, "pearson")]
    assert gain["gain"] == pytest.approx(gain["mean"] - table.loc[("all (2)", "mean effect", "pearson"), "mean"])


def test_planted_networks():
    import planted_networks as study

    small = {"n_genes": 30, "n_regulators": 8, "n_perturbations": 8, "n_cells_per_condition": 20, "n_truth_cells": 5}
    options = {"screen": small, "train": {"max_epochs": 1}, "n_latent": 4, "n_hidden": 8}
    results = Results()
    found = study.study(seeds=1, results=results, priors=["right"], **options)
    value = found.set_index(["model", "metric"])["value"]
    own = value["GPOVAE, prior: right"]
    assert set(own.index) == {"auprc", "auprc_all", "pearson", "mse", "coverage"} and own.notna().all()
    assert own["auprc_all"] > value["correlation", "auprc_all"]
    assert value["z score of the shift", "auprc"] > 0.3 and ("shift", "auprc_all") not in value
    assert value["no change", "pearson"] == 0 < value["no change", "mse"]
    assert len(study.study(seeds=1, results=results, priors=["right"], **options)) == len(found)


def test_infosem_with_a_dense_inverse_is_the_same_model():
    import infosem_speed as study

    table = study.study((60,), n_regulators=10, n_cells=128, n_steps=1)
    assert (table["max_difference"] < 1e-4).all() and (table["seconds_per_epoch_dense"] > 0).all()


def test_coverage_of_all_genes_and_of_the_largest_by_question():
    from interval_coverage import METRICS, QUESTIONS, screen, summary

    first, second = list(QUESTIONS)[:2]
    rows = [("Linear", first, 0, (0.9, 0.8)), ("Linear", first, 1, (0.8, 0.6)), ("CPA", second, 0, (1.0, 0.5))]
    table = pd.DataFrame(
        [
            {"model": m, "question": q, "seed": seed, "metric": name, "value": value}
            for m, q, seed, values in rows
            for name, value in zip(METRICS, values, strict=True)
        ]
    )
    found = summary(table).set_index("model")
    assert found.loc["Linear", first] == "0.85; 0.70"
    assert (found.loc["CPA", first], found.loc["CPA", second]) == ("", "1.00; 0.50")

    data = screen(n_perturbations=6, n_drug_classes=3, n_cells_per_condition=5, n_control_cells=10, n_truth_cells=5)
    described = data.adata.uns[data.setup["perturbation_features_key"]]
    assert set(described.index) == set(data.labels) - {data.control} and (described != 0).any(axis=None)
