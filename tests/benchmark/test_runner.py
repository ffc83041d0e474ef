from __future__ import annotations

import logging

import numpy as np
import pandas as pd
import pytest

from pertura import benchmark as bm
from pertura import data, datasets
from pertura import metrics as mt
from pertura.benchmark._resources import Resources

KEYS = {"perturbation_key": "perturbation", "control": "control", "context_key": "cell_type"}
FAST = {"baselines": False, "progress": False, "seeds": 1}


def mean(adata, perturbation, context):
    keep = (adata.obs["perturbation"] == perturbation) & (adata.obs["cell_type"] == context)
    return np.asarray(adata[keep.to_numpy()].X.mean(axis=0), dtype=np.float64).ravel()


@pytest.mark.parametrize("kind", ["unseen_context", "unseen_perturbation", "unseen_combination", "held_out_cells"])
def test_held_out_cells_never_reach_the_model(screen, shift, kind):
    spy = shift(0.0)
    dataset = bm.Dataset.of(screen)
    options = {"n_folds": 3} if kind == "unseen_perturbation" else {}
    splits = bm.make_splits(dataset, kind, **options)
    bm.run(dataset, {"spy": spy}, splits=splits, metrics="mse", n_halves=0, **FAST)
    assert len(spy.trained_on) == len(splits)
    for split, seen in zip(splits, spy.trained_on, strict=True):
        assert set(seen.obs_names) == set(screen.obs_names[split.train])
        assert not set(seen.obs_names) & set(screen.obs_names[split.test])
        # Nothing that was computed from all cells, the simulator's truth included.
        assert not seen.uns and not seen.obsm and not seen.varm and not seen.varp and not seen.obsp
        assert not seen.is_view
    held = {c for s in splits for c in screen.obs["perturbation"].iloc[s.test]} - {"control"}
    assert {asked[0] for asked in spy.asked} == held
    # Questions start from control cells, never from the profiles they are scored against.
    for _, query, _ in spy.asked:
        assert set(query.obs["perturbation"]) == {"control"}
        assert query.obs["cell_type"].nunique() == 1


def test_validation_rows_are_not_trained_on(screen, shift):
    spy = shift(0.0)
    splits = data.leave_context_out(screen, **KEYS, val_fraction=0.3)
    bm.run(screen, {"spy": spy}, splits=splits[:1], metrics="mse", n_halves=0, **FAST)
    assert set(spy.trained_on[0].obs_names) == set(screen.obs_names[splits[0].train])


def test_changing_the_model_s_copy_changes_nothing(screen):
    before = screen.copy()

    class Vandal:
        def __call__(self, adata, *, setup, seed):
            adata.X = adata.X * 0
            adata.layers["counts"].data[:] = 0
            adata.obs["perturbation"] = "gone"
            return self

        def predict_perturbation(self, perturbation, *, adata, **options):
            answer = adata.copy()
            adata.X = adata.X * 0
            adata.layers["counts"].data[:] = 0
            return answer

    split = bm.make_splits(bm.Dataset.of(screen), "unseen_context")[0]
    table = bm.run(screen, {"vandal": Vandal()}, splits=split, metrics="mse", n_halves=0, **FAST)
    (context,) = split.held_out
    for row in table.itertuples():
        truth, control = mean(before, row.perturbation, context), mean(before, "control", context)
        assert row.value == pytest.approx(mt.mse(control, truth), rel=1e-4)
    assert (screen.X != before.X).nnz == 0
    assert (screen.layers["counts"] != before.layers["counts"]).nnz == 0
    assert screen.obs.equals(before.obs)


def test_scores_are_those_of_the_definitions(screen, shift):
    effect = np.random.default_rng(0).normal(0, 0.3, screen.n_vars)
    names = ["pearson_effect_top20", "r2_top20", "mse", "interval_coverage", "interval_coverage_top20"]
    table = bm.run(screen, {"shift": shift(effect, 0.2)}, metrics=names, n_halves=0, **FAST)
    assert len(table) == 3 * 5 * len(names)  # contexts, perturbations
    for (perturbation, context), rows in table.groupby(["perturbation", "context"]):
        truth, control = mean(screen, perturbation, context), mean(screen, "control", context)
        value = rows.set_index("metric")["value"]
        x = control + effect
        assert value["pearson_effect_top20"] == pytest.approx(mt.pearson_effect(x, truth, control, top=20), abs=1e-5)
        assert value["r2_top20"] == pytest.approx(mt.r2(x, truth, control, top=20), abs=1e-5)
        assert value["mse"] == pytest.approx(mt.mse(x, truth), rel=1e-5)
        measured = mt.measured_effect(
            screen[(screen.obs["cell_type"] == context).to_numpy()], perturbation, **KEYS
        ).set_index("gene")
        low, high, se = effect - 0.2, effect + 0.2, measured["se"].to_numpy()
        coverage = mt.interval_coverage(low, high, measured["effect"], truth_se=se)
        assert value["interval_coverage"] == pytest.approx(coverage)
        top = np.argsort(-np.abs(measured["effect"].to_numpy()))[:20]
        coverage = mt.interval_coverage(low[top], high[top], measured["effect"].to_numpy()[top], truth_se=se[top])
        assert value["interval_coverage_top20"] == pytest.approx(coverage)
    assert set(table["n_cells"]) == {20}
    assert (table["seconds"] >= 0).all() and (table["peak_mb"] > 10).all()
    assert set(table["split"]) == {"unseen_context"} and set(table["dataset"]) == {"simulated"}


def test_interval_metrics_are_nan_without_intervals(screen):
    class Silent:
        def predict_perturbation(self, perturbation, *, adata, **options):
            return adata.copy()

    table = bm.run(
        screen, {"silent": lambda adata, **_: Silent()}, metrics=["mse", "interval_coverage"], n_halves=0, **FAST
    )
    value = table.groupby("metric")["value"]
    assert value.count().to_dict() == {"mse": 15, "interval_coverage": 0}
    assert len(table) == 30


def test_ceiling_is_the_split_half_of_the_held_out_cells(screen, shift):
    table = bm.run(screen, {"shift": shift(0.0)}, metrics=["mse", "interval_width"], n_halves=7, **FAST)
    row = table[(table["model"] == "ceiling") & (table["metric"] == "mse")].iloc[0]
    keep = (screen.obs["perturbation"] == row["perturbation"]) & (screen.obs["cell_type"] == row["context"])
    cells = screen[keep.to_numpy()].X
    control = mean(screen, "control", row["context"])
    expected = mt.split_half_ceiling(cells, control, "mse", n_splits=7).mean()["mse"]
    # Rows of the same cells in another order are halved otherwise: close, not equal.
    assert row["value"] == pytest.approx(expected, rel=0.15)
    assert table.loc[(table["model"] == "ceiling") & (table["metric"] == "interval_width"), "value"].isna().all()


def test_metrics_of_cells_get_draws(screen, shift):
    spy = shift(0.0)
    split = bm.make_splits(bm.Dataset.of(screen), "unseen_context")[0]
    table = bm.run(screen, {"spy": spy}, splits=split, metrics=["energy_distance"], n_halves=0, **FAST)
    assert table["value"].notna().all()
    assert any(options.get("n_samples") == 1 for _, _, options in spy.asked)


def test_metrics_across_conditions_and_against_the_reference(screen, shift):
    names = ["centroid_accuracy", "pearson_effect_vs_reference"]
    splits = bm.make_splits(bm.Dataset.of(screen), "unseen_context")
    table = bm.run(screen, {"shift": shift(0.3)}, splits=splits, metrics=names, n_halves=0, **FAST)
    assert table.groupby("metric")["value"].count().to_dict() == dict.fromkeys(names, 15)
    train = data.leave_context_out(screen, **KEYS)[0].train
    reference = mt.perturbed_mean(screen[train], **KEYS).mean(axis=0).to_numpy()
    row = table[(table["metric"] == names[1])].iloc[0]
    truth, control = mean(screen, row["perturbation"], row["context"]), mean(screen, "control", row["context"])
    expected = mt.pearson_effect_vs_reference(control + 0.3, truth, reference)
    assert row["value"] == pytest.approx(expected, abs=1e-4)


def test_doses_are_asked_one_by_one(shift):
    adata = datasets.simulate(
        n_cells_per_condition=8, n_genes=40, n_regulators=4, n_perturbations=2, doses=[0.1, 1.0, 10.0], n_contexts=2
    )
    spy = shift(0.0)
    keys = {**KEYS, "dose_key": "dose", "layer": "counts"}
    table = bm.run(adata, {"spy": spy}, splits="unseen_dose", metrics="mse", **keys, **FAST)
    assert {options["dose"] for _, _, options in spy.asked} == {0.1, 1.0, 10.0}
    scored = table[table["model"] == "spy"]
    assert len(scored) == 2 * 2 * 3
    assert set(scored["dose"]) == {"0.1", "1.0", "10.0"}
    assert (scored["held_out"].str.removeprefix("dose=") == scored["dose"]).all()
    assert (spy.trained_on[0].obs["dose"] != 0.1).all()
    assert bm.summarize(table, baseline="spy").query("model == 'spy'")["n_conditions"].item() == 12


def test_held_out_controls_are_the_reference_where_there_are_some(screen, shift):
    spy = shift(0.0)
    split = bm.make_splits(bm.Dataset.of(screen), "held_out_cells")
    bm.run(screen, {"spy": spy}, splits=split, metrics="mse", n_halves=0, **FAST)
    test = set(screen.obs_names[split[0].test])
    assert all(set(query.obs_names) <= test for _, query, _ in spy.asked)


def test_control_cells_are_subsampled(screen, shift):
    spy = shift(0.0)
    table = bm.run(screen, {"spy": spy}, metrics="mse", n_halves=0, max_controls=10, **FAST)
    assert {query.n_obs for _, query, _ in spy.asked} == {10}
    # No change is scored against the same ten control cells.
    row = table.iloc[0]
    query = spy.asked[0][1]
    assert row["perturbation"] == spy.asked[0][0]
    control = np.asarray(screen[query.obs_names].X.mean(0)).ravel()
    assert row["value"] == pytest.approx(mt.mse(control, mean(screen, row["perturbation"], row["context"])), rel=1e-5)


def test_a_file_of_results_is_continued(screen, shift, tmp_path):
    path = tmp_path / "deep" / "results.csv"
    options = {"metrics": ["mse", "pearson_effect"], "n_halves": 3, "out": path, **FAST}
    splits = bm.make_splits(bm.Dataset.of(screen), "unseen_context")
    first = shift(0.1)
    bm.run(screen, {"first": first}, splits=splits[:2], **options)
    assert len(first.trained_on) == 2
    second = shift(0.2)
    table = bm.run(screen, {"first": first, "second": second}, splits=splits, **options)
    assert (len(first.trained_on), len(second.trained_on)) == (3, 3)
    again = bm.run(screen, {"first": first, "second": second}, splits=splits, **options)
    assert len(first.trained_on) == 3
    order = ["model", "held_out", "perturbation", "metric"]
    columns = [*order, "value", "dose", "context", "seed", "n_cells"]
    pd.testing.assert_frame_equal(
        again.sort_values(order)[columns].reset_index(drop=True),
        table.sort_values(order)[columns].reset_index(drop=True),
    )
    fresh = bm.run(screen, {"first": shift(0.1), "second": shift(0.2)}, splits=splits, **{**options, "out": None})
    pd.testing.assert_frame_equal(
        fresh.sort_values(order)[columns].reset_index(drop=True),
        table.sort_values(order)[columns].reset_index(drop=True),
    )
    more = bm.run(screen, {"first": first}, splits=splits, **{**options, "metrics": ["mae", "mse"]})
    assert len(first.trained_on) == 6
    assert set(more["metric"]) == {"mae", "mse"} and not more.duplicated([*order, "seed"]).any()
    with pytest.raises(ValueError, match="`out`.*other settings"):
        bm.run(screen, {"first": first}, splits=splits, **{**options, "level": 0.5})
    (tmp_path / "no.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="`out`.*no benchmark result"):
        bm.run(screen, {"first": first}, **{**options, "out": tmp_path / "no.csv"})


def test_models_that_refuse(screen, shift, caplog):
    def refuse(adata, *, setup, seed):
        raise ValueError("cannot")

    options = {"metrics": "mse", "n_halves": 0, **FAST}
    with pytest.raises(ValueError, match="cannot"):
        bm.run(screen, {"no": refuse}, **options)
    with caplog.at_level(logging.WARNING):
        table = bm.run(screen, {"no": refuse, "yes": shift(0.0)}, on_error="skip", **options)
    assert set(table["model"]) == {"yes"}
    assert "cannot" in caplog.text


def test_a_context_without_controls_is_not_scored(screen, shift, caplog):
    lonely = (
        (screen.obs["cell_type"] == screen.obs["cell_type"].cat.categories[0])
        & (screen.obs["perturbation"] == "control")
    ).to_numpy()
    adata = screen[~lonely].copy()
    split = data.held_out_cells(adata, perturbation_key="perturbation", context_key="cell_type")
    with caplog.at_level(logging.WARNING):
        table = bm.run(adata, {"m": shift(0.0)}, splits=split, metrics="mse", n_halves=0, **FAST)
    assert table["context"].nunique() == 2
    assert "no control cells" in caplog.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"splits": "unheard"}, "`splits`"),
        ({"splits": []}, "`splits`"),
        ({"splits": "unseen_dose"}, "`dose_key`"),
        ({"metrics": "unheard"}, "`metrics`"),
        ({"metrics": "auprc"}, "`metrics`"),
        ({"metrics": []}, "`metrics`"),
        ({"seeds": []}, "`seeds`"),
        ({"models": {"ceiling": lambda **_: None}}, "`models`"),
        ({"models": {}}, "`models`"),
        ({"models": {"a": 3}}, "`models`"),
        ({"models": ["a"]}, "`models`"),
        ({"on_error": "ignore"}, "`on_error`"),
        ({"data": "unheard"}, "`data`"),
        ({"data": 3}, "`data`"),
        ({"context_key": "unheard"}, "`context_key`"),
        ({"control": "unheard"}, "`control`"),
    ],
)
def test_wrong_arguments(screen, shift, change, message):
    options = {"data": screen, "models": {"m": shift(0.0)}, **FAST, **change}
    with pytest.raises(ValueError, match=message):
        bm.run(options.pop("data"), options.pop("models"), **options)


def test_splits_of_other_data(screen, shift):
    splits = bm.make_splits(bm.Dataset.of(screen), "unseen_context")
    with pytest.raises(ValueError, match="other data"):
        bm.run(screen[:50].copy(), {"m": shift(0.0)}, splits=splits, **FAST)
    with pytest.raises(ValueError, match="same kind and name"):
        bm.run(screen, {"m": shift(0.0)}, splits=[splits[0], splits[0]], **FAST)


def test_resources():
    with Resources() as used:
        block = np.ones(40 * 2**20, dtype=np.uint8)
    assert used.seconds > 0
    assert used.peak_mb > 40
    del block


def test_genes_that_respond_in_training(screen, shift):
    """``_top_train`` chooses genes without looking at the held-out context."""
    split = data.leave_context_out(screen, **KEYS)[0]
    names = ["mse_top_train", "pearson_effect_top_train"]
    table = bm.run(screen, {"shift": shift(0.3)}, splits=[split], metrics=names, top=10, n_halves=2, **FAST)
    held = sorted(set(screen.obs["cell_type"].iloc[split.test]))[0]
    perturbation = table["perturbation"].iloc[0]
    others = [c for c in screen.obs["cell_type"].unique() if c != held]
    trained = [
        np.abs(mean(screen, perturbation, c) - mean(screen, "control", c))
        for c in others
        if ((screen.obs["perturbation"] == perturbation) & (screen.obs["cell_type"] == c)).any()
    ]
    genes = np.argsort(-np.mean(trained, axis=0))[:10]
    truth = mean(screen, perturbation, held)[genes]
    predicted = mean(screen, "control", held)[genes] + 0.3
    own = table[(table["perturbation"] == perturbation) & (table["context"] == held) & (table["model"] == "shift")]
    value = own.set_index("metric")["value"]
    assert value["mse_top_train"] == pytest.approx(((predicted - truth) ** 2).mean(), rel=1e-3)
    ceiling = table[(table["model"] == "ceiling") & (table["metric"] == "mse_top_train")]["value"]
    assert ceiling.notna().any() and (ceiling.dropna() < table[table["model"] == "shift"]["value"].max()).all()
