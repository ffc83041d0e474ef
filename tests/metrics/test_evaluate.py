"""`evaluate` against the metrics called by hand, on planted data."""

from functools import partial

import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import scipy.sparse as sp
from anndata import AnnData
from scipy.stats import false_discovery_control, ttest_ind

from pertura import metrics as mt

KEYS = {"perturbation_key": "perturbation", "control": "ctrl"}
N_GENES = 40
GENES = [f"g{i}" for i in range(N_GENES)]


def make(seed, conditions, contexts, n=60, sparse=True):
    """Cells whose mean depends on perturbation and context; noise and order depend on the seed."""
    base = {c: np.random.default_rng(i).gamma(2.0, 0.5, N_GENES) for i, c in enumerate(contexts)}
    # The perturbation's own gene falls, ten others rise.
    effect = {p: np.zeros(N_GENES) for p in conditions}
    for i, p in enumerate(conditions):
        effect[p][10 + 3 * i : 20 + 3 * i] = 0.8 if p != "ctrl" else 0.0
    rng = np.random.default_rng(seed)
    blocks, obs = [], []
    for context in contexts:
        for p in conditions:
            blocks.append(np.maximum(base[context] + effect[p] + 0.3 * rng.normal(size=(n, N_GENES)), 0))
            obs += [(p, context)] * n
    x = np.vstack(blocks)
    names = [f"c{i}" for i in range(len(obs))]
    obs = pd.DataFrame(obs, columns=["perturbation", "cell_type"], index=names)
    order = rng.permutation(len(obs))
    adata = AnnData(sp.csr_matrix(x) if sparse else x, obs=obs, var=pd.DataFrame(index=GENES))
    return adata[order].copy()


CONDITIONS, CONTEXTS = ["ctrl", "g1", "g2", "g1+g2"], ["T", "B"]


@pytest.fixture(scope="module")
def truth():
    return make(0, CONDITIONS, CONTEXTS)


@pytest.fixture(scope="module")
def pred():
    return make(1, CONDITIONS[1:], CONTEXTS, n=50, sparse=False)


def mean(adata, p, context):
    keep = (adata.obs["perturbation"] == p) & (adata.obs["cell_type"] == context)
    return np.asarray(adata[keep].X.mean(axis=0)).ravel()


def means(adata):
    keys = adata.obs.drop_duplicates().itertuples(index=False, name=None)
    return pd.DataFrame({key: mean(adata, *key) for key in keys}, index=adata.var_names).T


def value(table, metric, condition="g1", context="B"):
    rows = table[(table["metric"] == metric) & (table["condition"] == condition) & (table["context"] == context)]
    assert len(rows) == 1
    return rows["value"].item()


def test_values_are_those_of_the_metrics(truth, pred):
    table = mt.evaluate(pred, truth, context_key="cell_type", top=10, **KEYS)
    assert list(table.columns) == ["condition", "context", "metric", "value"]
    assert not table.duplicated(["condition", "context", "metric"]).any()
    assert set(table["condition"]) == {"g1", "g2", "g1+g2"}
    x, t, c = mean(pred, "g1", "B"), mean(truth, "g1", "B"), mean(truth, "ctrl", "B")
    assert value(table, "pearson_effect") == pytest.approx(mt.pearson_effect(x, t, c))
    assert value(table, "pearson_effect_top") == pytest.approx(mt.pearson_effect(x, t, c, top=10))
    assert value(table, "r2_top") == pytest.approx(mt.r2(x, t, c, top=10))
    assert value(table, "mse") == pytest.approx(mt.mse(x, t))
    assert value(table, "de_overlap") == pytest.approx(mt.de_overlap(x, t, c, k=10))
    cells = [a[(a.obs["perturbation"] == "g1") & (a.obs["cell_type"] == "B")].X for a in (pred, truth)]
    assert value(table, "energy_distance") == pytest.approx(mt.energy_distance(cells[0], cells[1].toarray()))
    assert value(table, "variance_ratio") == pytest.approx(mt.variance_ratio(cells[0], cells[1].toarray()))
    assert table["value"].notna().all()


def test_weights_and_de_genes_agree_with_scanpy_and_scipy(truth, pred):
    table = mt.evaluate(pred, truth, context_key="cell_type", metrics=["wmse", "direction_match"], **KEYS)
    x, t, c = mean(pred, "g1", "B"), mean(truth, "g1", "B"), mean(truth, "ctrl", "B")
    inside = truth[truth.obs["cell_type"] == "B"].copy()
    inside.uns["log1p"] = {"base": None}
    sc.tl.rank_genes_groups(inside, "perturbation", groups=["g1"], reference="rest", method="t-test")
    scores = sc.get.rank_genes_groups_df(inside, "g1").set_index("names")["scores"].loc[GENES]
    assert value(table, "wmse") == pytest.approx(mt.wmse(x, t, weights=mt.de_weights(scores)), rel=1e-4)
    groups = [inside[inside.obs["perturbation"] == p].X.toarray() for p in ("g1", "ctrl")]
    p = np.nan_to_num(ttest_ind(*groups, equal_var=False).pvalue, nan=1.0)
    de = false_discovery_control(p) < 0.05
    assert 8 < de.sum() < 20
    assert value(table, "direction_match") == pytest.approx(mt.direction_match(x, t, c, de=de))


def test_means_and_cells_give_the_same_profile_scores(truth, pred):
    table = mt.evaluate(pred, truth, context_key="cell_type", **KEYS)
    frame = means(pred)
    same = mt.evaluate(frame[GENES[::-1]], truth, context_key="cell_type", **KEYS)
    wanted = table[table["metric"].isin(set(same["metric"]))]
    keys = ["condition", "context", "metric"]
    pd.testing.assert_frame_equal(
        same.sort_values(keys, ignore_index=True), wanted.sort_values(keys, ignore_index=True)
    )
    swapped = frame.rename_axis(["perturbation", "cell_type"]).swaplevel()
    pd.testing.assert_frame_equal(mt.evaluate(swapped, truth, context_key="cell_type", **KEYS), same)


EFFECT_METRICS = ["pearson_effect", "spearman_effect", "r2_effect", "weighted_r2", "direction_match", "de_overlap"]


def test_predicted_effects_are_against_the_controls_of_the_prediction(truth, pred):
    own = make(1, CONDITIONS, CONTEXTS, n=50)
    control = (own.obs["perturbation"] == "ctrl").to_numpy()
    own.X = sp.csr_matrix(np.where(control[:, None], own.X.toarray() + np.linspace(0, 1, N_GENES), own.X.toarray()))
    options = {"context_key": "cell_type", "metrics": [*EFFECT_METRICS, "mse", "r2_top", "discrimination_score_l2"]}
    table = mt.evaluate(own, truth, **options, **KEYS)
    assert "ctrl" not in set(table["condition"]) and table.attrs["controls"] == "own"
    x, t, c, start = mean(own, "g1", "B"), mean(truth, "g1", "B"), mean(truth, "ctrl", "B"), mean(own, "ctrl", "B")
    for metric in EFFECT_METRICS[:3]:
        assert value(table, metric) == pytest.approx(mt.get_metric(metric)(x, t, c, start))
        assert abs(value(table, metric) - mt.get_metric(metric)(x, t, c)) > 1e-3
    assert value(table, "mse") == pytest.approx(mt.mse(x, t)) and value(table, "r2_top") > 0
    # means with rows of controls say the same
    pd.testing.assert_frame_equal(
        mt.evaluate(means(own).sort_index(), truth, **options, **KEYS).sort_values(["metric", "condition", "context"]),
        table.sort_values(["metric", "condition", "context"]),
        check_like=True,
    )
    shared = mt.evaluate(own, truth, controls="shared", **options, **KEYS)
    without = mt.evaluate(own[~control].copy(), truth, **options, **KEYS)
    pd.testing.assert_frame_equal(shared, without)
    assert shared.attrs["controls"] == without.attrs["controls"] == "shared"
    assert value(shared, "pearson_effect") == pytest.approx(mt.pearson_effect(x, t, c))
    with pytest.raises(ValueError, match="`pred` has no control cells.*'B'"):
        mt.evaluate(own[~(control & (own.obs["cell_type"] == "B").to_numpy())].copy(), truth, **options, **KEYS)
    with pytest.raises(ValueError, match="`controls`"):
        mt.evaluate(own, truth, controls="both", **options, **KEYS)


@pytest.mark.parametrize("metric", [*EFFECT_METRICS, "r2_on_effect"])
def test_metrics_of_effects_take_both_controls(metric):
    """Moving the prediction and its controls together changes no effect; without the controls it does."""
    rng = np.random.default_rng(0)
    t, c, x, start, other = rng.normal(size=(5, 200))
    function = partial(mt.r2, on="effect") if metric == "r2_on_effect" else mt.get_metric(metric)
    assert function(x + other, t, c, start + other) == pytest.approx(function(x, t, c, start))
    assert function(x, t, c, c) == pytest.approx(function(x, t, c))
    assert abs(function(x, t, c, start) - function(x, t, c)) > 1e-3


def test_retrieval_is_within_context_and_leaves_all_targets_out(truth, pred):
    table = mt.evaluate(
        pred[pred.obs["perturbation"] != "g2"],
        truth,
        context_key="cell_type",
        metrics=["centroid_accuracy", "discrimination_score_l1"],
        **KEYS,
    )
    c = mean(truth, "ctrl", "B")
    p = np.stack([mean(pred, k, "B") - c for k in ("g1", "g1+g2")])
    t = np.stack([mean(truth, k, "B") - c for k in ("g1", "g1+g2")])
    other = mean(truth, "g2", "B")[None] - c
    np.testing.assert_allclose(
        [value(table, "centroid_accuracy", k) for k in ("g1", "g1+g2")],
        mt.centroid_accuracy(p, t, others=other),
    )
    np.testing.assert_allclose(
        [value(table, "discrimination_score_l1", k) for k in ("g1", "g1+g2")],
        mt.discrimination_score(p, t, others=other, exclude=[1, 2]),
    )
    zero = means(truth)
    zero.loc[:] = np.stack([mean(truth, "ctrl", context) for _, context in zero.index])
    score = mt.evaluate(zero, truth, context_key="cell_type", metrics=["centroid_accuracy"], **KEYS)
    assert score.groupby("context")["value"].mean().tolist() == pytest.approx([0.5, 0.5])


def test_reference_forms_agree(truth, pred):
    train = make(5, CONDITIONS, ["T"])
    profile = mt.perturbed_mean(train, **KEYS)
    expected = np.mean([mean(train, p, "T") for p in CONDITIONS[1:]], axis=0)
    np.testing.assert_allclose(profile.loc["all"], expected)
    options = {"context_key": "cell_type", "metrics": ["pearson_effect_vs_reference"], **KEYS}
    tables = [
        mt.evaluate(pred, truth, reference=r, **options)
        for r in (
            train,
            profile.loc["all"][GENES[::-1]],
            expected,
            mt.perturbed_mean(train, context_key="cell_type", **KEYS),
        )
    ]
    for table in tables:
        np.testing.assert_allclose(table["value"], tables[0]["value"])
    x, t = mean(pred, "g1", "B"), mean(truth, "g1", "B")
    assert value(tables[0], "pearson_effect_vs_reference") == pytest.approx(
        mt.pearson_effect_vs_reference(x, t, expected)
    )
    assert "pearson_effect_vs_reference" in set(
        mt.evaluate(pred, truth, context_key="cell_type", reference=train, **KEYS)["metric"]
    )


def test_reference_of_the_own_context_is_used(truth, pred):
    reference = mt.perturbed_mean(truth, context_key="cell_type", **KEYS)
    table = mt.evaluate(
        pred,
        truth,
        context_key="cell_type",
        reference=reference,
        metrics=["pearson_effect_vs_reference"],
        **KEYS,
    )
    m = np.mean([mean(truth, p, "B") for p in CONDITIONS[1:]], axis=0)
    expected = mt.pearson_effect_vs_reference(mean(pred, "g1", "B"), mean(truth, "g1", "B"), m)
    assert value(table, "pearson_effect_vs_reference") == pytest.approx(expected)


def test_intervals_allow_for_sampling_error(truth):
    # Bounds that are exactly the expectation (width 0): only the sampling error of the truth is left.
    big = means(make(99, CONDITIONS, CONTEXTS, n=4_000))
    table = mt.evaluate(big, truth, context_key="cell_type", low=big, high=big, **KEYS)
    coverage = table[table["metric"] == "interval_coverage"]["value"].mean()
    assert coverage == pytest.approx(0.9, abs=0.06)
    assert (table[table["metric"] == "interval_width"]["value"] == 0).all()


def test_without_contexts_layers_and_single_condition(truth, pred):
    cells = truth[(truth.obs["cell_type"] == "B") & truth.obs["perturbation"].isin(["ctrl", "g1"])].copy()
    cells.layers["log"] = cells.X.copy()
    cells.X = cells.X * 0
    table = mt.evaluate(pd.DataFrame([mean(pred, "g1", "B")], ["g1"], GENES), cells, layer="log", **KEYS)
    assert set(table["context"]) == {"all"}
    assert not {"centroid_accuracy", "energy_distance"} & set(table["metric"])
    x, t, c = mean(pred, "g1", "B"), mean(truth, "g1", "B"), mean(truth, "ctrl", "B")
    assert value(table, "pearson_effect", context="all") == pytest.approx(mt.pearson_effect(x, t, c))


def test_nothing_of_the_users_data_changes(truth, pred):
    before = [a.X.copy() for a in (truth, pred)], [a.obs.copy() for a in (truth, pred)]
    mt.evaluate(pred[:, GENES[::-1]], truth, context_key="cell_type", **KEYS)
    assert (before[0][0] != truth.X).nnz == 0 and (before[0][1] == pred.X).all()
    pd.testing.assert_frame_equal(before[1][0], truth.obs)
    assert not truth.uns and not pred.uns


def test_unmeasured_predictions_are_left_out_and_counts_warned_about(truth, pred):
    extra = pred.copy()
    extra.obs["perturbation"] = extra.obs["perturbation"].astype(str).replace("g2", "never measured")
    table = mt.evaluate(extra, truth, context_key="cell_type", metrics=["mse"], **KEYS)
    assert set(table["condition"]) == {"g1", "g1+g2"}
    counts = truth.copy()
    counts.X = np.rint(counts.X.toarray() * 100)
    with pytest.warns(UserWarning, match="`truth` looks like raw counts"):
        mt.evaluate(pred, counts, context_key="cell_type", metrics=["mse"], **KEYS)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"perturbation_key": "drug"}, "`perturbation_key`"),
        ({"context_key": "line"}, "`context_key`"),
        ({"control": "DMSO"}, "`control`"),
        ({"layer": "counts"}, "`truth` has no layer"),
        ({"pred_layer": "x"}, "`pred` has no layer"),
        ({"metrics": ["r3"]}, "`metrics`"),
        ({"metrics": ["crps"]}, "`metrics`"),
        ({"metrics": ["systematic_variation"]}, "`metrics`"),
        ({"metrics": ["interval_coverage"]}, "`metrics`"),
        ({"metrics": ["pearson_effect_vs_reference"]}, "`reference`"),
        ({"reference": np.ones(3)}, "`reference`"),
        ({"low": pd.DataFrame()}, "`low` and `high`"),
    ],
)
def test_errors_name_the_argument(change, word, truth, pred):
    with pytest.raises(ValueError, match=word):
        mt.evaluate(pred, truth, **(KEYS | {"context_key": "cell_type"} | change))


def test_errors_of_the_prediction(truth, pred):
    options = {"context_key": "cell_type", **KEYS}
    frame = means(pred)
    for bad, word in (
        (pred[:, GENES[3:]], r"`pred` lacks 3 of the 40 genes"),
        (frame[GENES[:-1]], r"`pred` lacks 1 of the 40 genes"),
        (frame.reset_index(level=1, drop=True), "`pred` must be indexed"),
        (pd.concat([frame, frame]), "several rows"),
        (frame.rename(index=lambda k: f"{k}x"), "none of the 6 predicted"),
        ([1, 2], "`pred` must be an AnnData or a DataFrame"),
    ):
        with pytest.raises(ValueError, match=word):
            mt.evaluate(bad, truth, **options)
    with pytest.raises(ValueError, match="`context_key`"):
        mt.evaluate(frame, truth, **KEYS)
    with pytest.raises(ValueError, match="reads cells"):
        mt.evaluate(frame, truth, metrics=["energy_distance"], **options)
    with pytest.raises(ValueError, match="`low` lacks 1"):
        mt.evaluate(frame, truth, low=frame.iloc[1:], high=frame, **options)


def test_false_discoveries_are_counted_gene_by_gene_within_a_condition():
    """Two conditions, of which only one responds: what the other is like changes nothing."""
    from pertura.metrics._pseudobulk import moments, welch

    rng = np.random.default_rng(0)
    x = rng.normal(size=(90, 12))
    x[30:60, :6] += 1.0
    found = moments(x, np.repeat([0, 1, 2], 30), pd.RangeIndex(3))
    control, both = found.take(pd.Index([0, 0])), found.take(pd.Index([1, 2]))
    t, adjusted = welch(both, control)
    for row, cells in enumerate((x[30:60], x[60:])):
        expected = ttest_ind(cells, x[:30], equal_var=False)
        np.testing.assert_allclose(t[row], expected.statistic)
        np.testing.assert_allclose(adjusted[row], false_discovery_control(expected.pvalue))
