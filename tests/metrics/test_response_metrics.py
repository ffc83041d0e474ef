"""Profile metrics against scipy / scikit-learn, closed forms, ties and invariances."""

import numpy as np
import pandas as pd
import pytest
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import mean_absolute_error, mean_squared_error, r2_score

from pertura import metrics as mt

FUNCTIONS = {
    "pearson_effect": mt.pearson_effect,
    "pearson_effect_top": lambda x, t, c: mt.pearson_effect(x, t, c, top=7),
    "spearman_effect": mt.spearman_effect,
    "spearman_effect_top": lambda x, t, c: mt.spearman_effect(x, t, c, top=7),
    "r2_top": lambda x, t, c: mt.r2(x, t, c, top=7),
    "r2_effect": mt.r2_effect,
    "mse_top": lambda x, t, c: mt.mse(x, t, c, top=7),
    "mae": mt.mae,
    "wmse": mt.wmse,
    "weighted_r2": mt.weighted_r2,
    "direction_match": mt.direction_match,
    "de_overlap": lambda x, t, c: mt.de_overlap(x, t, c, k=7),
    "pearson_effect_vs_reference": mt.pearson_effect_vs_reference,
}


@pytest.fixture
def xtc():
    rng = np.random.default_rng(0)
    c = rng.gamma(2.0, size=50)
    t = c + rng.normal(size=50)
    return t + rng.normal(size=50), t, c


def top_genes(t, c, k):
    return np.argsort(-np.abs(t - c))[:k]


def test_agree_with_scipy_and_sklearn(xtc):
    x, t, c = xtc
    s = top_genes(t, c, 10)
    weights = mt.de_weights(t - c)
    reference = c + 0.3
    expected = {
        mt.pearson_effect(x, t, c): pearsonr(x - c, t - c)[0],
        mt.pearson_effect(x, t, c, top=10): pearsonr((x - c)[s], (t - c)[s])[0],
        mt.pearson_effect(x, t, c, genes=np.arange(20)): pearsonr((x - c)[:20], (t - c)[:20])[0],
        mt.pearson_effect_vs_reference(x, t, reference * 2): pearsonr(x - reference * 2, t - reference * 2)[0],
        mt.spearman_effect(x, t, c): spearmanr(x - c, t - c)[0],
        mt.spearman_effect(x, t, c, top=10): spearmanr((x - c)[s], (t - c)[s])[0],
        mt.r2(x, t): r2_score(t, x),
        mt.r2(x, t, c, top=10): r2_score(t[s], x[s]),
        mt.r2(x, t, c, on="effect", top=10): r2_score((t - c)[s], (x - c)[s]),
        mt.r2_effect(x, t, c): r2_score(t - c, x - c),
        mt.mse(x, t): mean_squared_error(t, x),
        mt.mse(x, t, c, top=10): mean_squared_error(t[s], x[s]),
        mt.mae(x, t): mean_absolute_error(t, x),
        mt.wmse(x, t, c): mean_squared_error(t, x, sample_weight=weights),
        mt.weighted_r2(x, t, c): r2_score(t - c, x - c, sample_weight=weights),
    }
    np.testing.assert_allclose(list(expected), list(expected.values()), rtol=1e-12)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_vectorised_equals_one_by_one_and_genes_may_be_permuted(name, xtc):
    f, rng = FUNCTIONS[name], np.random.default_rng(1)
    x = np.stack([xtc[0], xtc[0] * 0.3, xtc[1]])
    t = np.stack([xtc[1], xtc[1] + rng.normal(size=50), xtc[1]])
    # Half of the true effects are exactly zero or tie, so that cuts fall into ties.
    t[:, ::2] = xtc[2][::2]
    t[:, 1::4] = (xtc[2] + 1.0)[1::4]
    c = xtc[2]
    together = f(x, t, c)
    assert together.shape == (3,)
    one_by_one = [f(x[i], t[i], c) for i in range(3)]
    assert all(isinstance(v, float) for v in one_by_one)
    np.testing.assert_allclose(together, one_by_one, rtol=1e-12)
    for seed in range(5):
        p = np.random.default_rng(seed).permutation(50)
        np.testing.assert_allclose(f(x[:, p], t[:, p], c[p]), together, rtol=1e-9)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_perfect_prediction_reaches_best_value(name, xtc):
    _, t, c = xtc
    best = mt.get_metric(name, top=7).best_value
    assert FUNCTIONS[name](t, t, c) == pytest.approx(best)


def test_predictor_without_effect(xtc):
    _, t, c = xtc
    for noise in (0.0, 1e-7):  # exactly the control, and the control rounded to single precision
        x = c * (1 + noise * np.random.default_rng(0).normal(size=50))
        assert mt.pearson_effect(x, t, c) == 0.0
        assert mt.spearman_effect(x, t, c) == 0.0
        assert mt.direction_match(x, t, c) == 0.5
        assert mt.de_overlap(x, t, c, k=10) == pytest.approx(10 / 50)
        assert mt.r2_effect(x, t, c) < 0
    assert np.isnan(mt.pearson_effect(t, c, c))
    assert np.isnan(mt.r2_effect(t, c, c))
    assert np.isnan(mt.direction_match(t, c, c))


def test_small_but_real_effect_is_not_taken_for_rounding(xtc):
    _, t, c = xtc
    assert mt.pearson_effect(c + 1e-4 * (t - c), t, c) == pytest.approx(1.0)


def test_reference_removes_what_all_perturbations_share():
    rng = np.random.default_rng(0)
    c = rng.gamma(2.0, size=500)
    shared, own = 3 * rng.normal(size=500), rng.normal(size=(2, 500))
    t, other = c + shared + own
    assert mt.pearson_effect(other, t, c) > 0.85
    reference = c + shared
    assert abs(mt.pearson_effect_vs_reference(other, t, reference)) < 0.15
    assert mt.pearson_effect_vs_reference(reference, t, reference) == 0.0
    with_control = mt.pearson_effect_vs_reference(other, t, reference, c, top=20)
    s = top_genes(t, c, 20)
    assert with_control == pytest.approx(pearsonr((other - reference)[s], (t - reference)[s])[0])


def test_top_weights_share_the_last_places():
    w = mt.top_weights(np.array([3.0, 1.0, 1.0, 2.0, 1.0]), 4)
    np.testing.assert_allclose(w, [1, 2 / 3, 2 / 3, 1, 2 / 3])
    np.testing.assert_array_equal(mt.top_weights(np.array([3.0, 1.0]), 5), 1)


def test_top_weights_are_the_expectation_over_random_ties():
    scores = np.random.default_rng(0).integers(4, size=12).astype(float)
    rng = np.random.default_rng(1)
    hits = np.zeros(12)
    for _ in range(4000):
        p = rng.permutation(12)
        hits[p[np.argsort(-scores[p], kind="stable")[:5]]] += 1
    np.testing.assert_allclose(mt.top_weights(scores, 5), hits / 4000, atol=0.04)


def test_top_within_gene_mask(xtc):
    x, t, c = xtc
    mask = np.arange(50) < 20
    assert mt.mse(x, t, c, top=5, genes=mask) == pytest.approx(mt.mse(x[:20], t[:20], c[:20], top=5))
    assert mt.mse(x, t, c, top=30, genes=mask) == pytest.approx(mt.mse(x[:20], t[:20]))


def test_de_weights_closed_form():
    np.testing.assert_allclose(mt.de_weights([-3.0, 1.0, 2.0, np.nan]), np.array([9, 1, 4, 0]) / 14)
    np.testing.assert_allclose(mt.de_weights([2.0, -2.0]), [0.5, 0.5])


def test_wmse_ignores_genes_without_weight():
    t = np.zeros(3)
    assert mt.wmse([1.0, 2.0, 9.0], t, weights=[1.0, 3.0, 0.0]) == pytest.approx((1 + 12) / 4)


def test_direction_match_counts():
    c = np.zeros(4)
    t = np.array([1.0, -1.0, 1.0, 1.0])
    x = np.array([1.0, 1.0, 0.0, -1.0])
    assert mt.direction_match(x, t, c) == pytest.approx((1 + 0 + 0.5 + 0) / 4)
    assert mt.direction_match(x, t, c, de=np.array([True, False, True, False])) == pytest.approx(0.75)


def test_de_overlap_counts():
    c = np.zeros(6)
    t = np.array([6.0, -5, 4, 0.1, 0.2, 0.3])
    x = np.array([1.0, 5, 0.1, 4, 0.2, 0.3])
    assert mt.de_overlap(x, t, c, k=3) == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda x, t, c: mt.mse(x, t, top=3), "control"),
        (lambda x, t, c: mt.mse(x[:-1], t), "number of genes"),
        (lambda x, t, c: mt.pearson_effect(np.append(x[:-1], np.nan), t, c), "`predicted`"),
        (lambda x, t, c: mt.pearson_effect(x, t, c, top=0), "`top`"),
        (lambda x, t, c: mt.pearson_effect(x, t, c, genes=["A"]), "`genes`"),
        (lambda x, t, c: mt.pearson_effect(x, t, c, genes=np.ones(3, bool)), "`genes`"),
        (lambda x, t, c: mt.r2(x, t, on="delta"), "`on`"),
        (lambda x, t, c: mt.r2(x, t, on="effect"), "control"),
        (lambda x, t, c: mt.wmse(x, t), "`weights`"),
        (lambda x, t, c: mt.wmse(x, t, weights=-np.ones(50)), "`weights`"),
        (lambda x, t, c: mt.direction_match(x, t, c, de=np.ones(50)), "`de`"),
        (lambda x, t, c: mt.pearson_effect(np.stack([x, x]), np.stack([t, t, t]), c), "shapes"),
        (lambda x, t, c: mt.mse(pd.Series(x), pd.Series(t, index=range(50, 100))), "different genes"),
    ],
)
def test_errors_name_the_argument(call, word, xtc):
    with pytest.raises(ValueError, match=word):
        call(*xtc)


def test_registry():
    table = mt.list_metrics()
    assert set(table.index) == set(mt.METRICS)
    assert table["doc"].str.len().gt(10).all()
    assert list(mt.list_metrics("network").index) == [
        "auprc",
        "auprc_ratio",
        "auroc",
        "epr",
        "hit_at",
        "macro_auprc",
    ]
    assert mt.get_metric("r2_top20").name == "r2_top20"
    assert mt.get_metric("mse") is mt.METRICS["mse"]
    for wrong in ("r3", "auprc_top", "r2_topx"):
        with pytest.raises(ValueError, match="`metrics`"):
            mt.get_metric(wrong)
    with pytest.raises(ValueError, match="already"):
        mt.register("mse", best_value=0.0, higher_is_better=False, needs="mean")(lambda x: x)
    with pytest.raises(ValueError, match="`needs`"):
        mt.register(best_value=0.0, higher_is_better=False, needs="luck")
    assert mt.METRICS["variance_ratio"].orient(0.5) == mt.METRICS["variance_ratio"].orient(1.5) == -0.5
    with pytest.raises(ValueError, match="no best value"):
        mt.METRICS["systematic_variation"].orient(1.0)


def test_get_metric_top(xtc):
    assert mt.get_metric("mse_top", top=5)(*xtc) == mt.mse(*xtc, top=5)
    assert mt.get_metric("mse_top9", top=5)(*xtc) == mt.mse(*xtc, top=9)
