"""Network metrics: candidates, orientation, ties, scikit-learn references."""

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from sklearn.metrics import average_precision_score

from pertura import metrics as mt
from pertura.metrics import EdgeCandidates

GENES = list("ABCDEF")


@pytest.fixture
def network():
    rng = np.random.default_rng(0)
    matrix = pd.DataFrame(rng.normal(size=(6, 6)), GENES, GENES)
    truth = pd.DataFrame(
        [("A", "C"), ("A", "D"), ("B", "A"), ("B", "B"), ("A", "C"), ("A", "absent"), ("gone", "C")],
        columns=["source", "target"],
    )
    return matrix, truth


@pytest.fixture
def large():
    rng = np.random.default_rng(1)
    label = rng.random(3000) < 0.07
    return EdgeCandidates(label, rng.normal(size=3000) + label, rng.integers(12, size=3000))


def test_candidates_are_regulators_by_genes_without_self_loops(network):
    matrix, truth = network
    c = mt.edge_candidates(matrix, truth)
    # Regulators A, B; genes A, B, C, D; 2 * 4 - 2 self loops. E and F are not in the known network.
    assert c.label.size == 6
    assert c.label.sum() == 3
    assert c.density == 0.5
    by_hand = {("A", "B"): 0, ("A", "C"): 1, ("A", "D"): 1, ("B", "A"): 1, ("B", "C"): 0, ("B", "D"): 0}
    expected = sorted((abs(matrix.loc[s, t]), y) for (s, t), y in by_hand.items())
    assert sorted(zip(c.score, c.label, strict=True)) == expected
    signed = mt.edge_candidates(matrix, truth, absolute=False)
    assert (signed.score < 0).any()


def test_orientation_is_source_by_target():
    matrix = pd.DataFrame(0.0, GENES, GENES)
    matrix.loc["A", ["C", "D"]] = 1.0
    truth = [("A", "C"), ("A", "D"), ("B", "E")]
    assert mt.auroc(matrix, truth) > 0.8
    assert mt.auroc(matrix.T, truth) <= 0.5


def test_table_matrix_array_and_sparse_agree(network):
    matrix, truth = network
    table = matrix.rename_axis("source").reset_index().melt("source", var_name="target", value_name="weight")
    table = table.sample(frac=1, random_state=0)
    expected = mt.score_network(matrix, truth)
    order = list("FCABED")
    for scores, options in (
        (table, {"genes": GENES}),
        (matrix.loc[order, order], {}),
        (matrix.to_numpy(), {"genes": GENES}),
        (sp.csr_matrix(matrix.to_numpy()), {"genes": GENES}),
        (matrix.loc[["A", "B"]], {}),
    ):
        pd.testing.assert_series_equal(mt.score_network(scores, truth, **options), expected)
    # Without the universe, a table cannot say which genes were absent: their edges count as missed.
    assert mt.score_network(table, truth)["n_edges"] == 5


def test_unlisted_pairs_score_zero():
    table = pd.DataFrame({"source": ["A"], "target": ["C"], "weight": [-2.0]})
    truth = [("A", "C"), ("A", "B"), ("B", "D")]
    c = mt.edge_candidates(table, truth)
    assert sorted(c.score) == [0] * 5 + [2.0]


def test_against_sklearn_and_naive(large):
    order = np.argsort(-large.score)
    e = large.label.sum()
    assert mt.auprc(large) == average_precision_score(large.label, large.score)
    assert mt.auprc_ratio(large) == pytest.approx(mt.auprc(large) / large.label.mean())
    early = large.label[order[:e]].mean() / large.label.mean()
    for ties in ("include", "strict", "expected"):
        assert mt.epr(large, ties=ties) == pytest.approx(early)
    assert mt.hit_at(large) == pytest.approx(large.label[order[:30]].mean())
    assert mt.hit_at(large, fraction=0.0101) == pytest.approx(large.label[order[:31]].mean())


@pytest.mark.parametrize("rounded", [False, True])
def test_macro_auprc_against_sklearn(large, rounded):
    c = EdgeCandidates(large.label, large.score.round(1 if rounded else 12), large.source)
    table = mt.auprc_per_regulator(c)
    expected = [average_precision_score(c.label[c.source == k], c.score[c.source == k]) for k in table.index]
    np.testing.assert_allclose(table["auprc"], expected, rtol=1e-12)
    assert mt.macro_auprc(c) == pytest.approx(np.mean(expected))
    np.testing.assert_array_equal(table["n_candidates"], np.bincount(c.source))


def test_regulator_without_edges_does_not_count():
    c = EdgeCandidates([1, 0, 0, 0], [0.1, 0.9, 0.3, 0.2], np.array(["a", "a", "b", "b"]))
    assert mt.macro_auprc(c) == 0.5
    assert np.isnan(mt.auprc_per_regulator(c).loc["b", "auprc"])


def test_constant_scores_get_the_density(large):
    c = EdgeCandidates(large.label, np.zeros(3000), large.source)
    s = mt.score_network(c)
    assert s["auprc_ratio"] == pytest.approx(1)
    assert s["auroc"] == 0.5
    assert s["epr"] == pytest.approx(1)
    assert mt.epr(c, ties="expected") == pytest.approx(1)
    assert mt.epr(c, ties="strict") == 0
    assert s["hit_at"] == pytest.approx(s["density"])


def test_epr_tie_rules_by_hand():
    # E = 2 of 6; scores 3 | 2 2 2 | 1 0, the edges are at 3 and at one of the twos.
    c = EdgeCandidates([1, 1, 0, 0, 0, 0], [3, 2, 2, 2, 1, 0])
    assert mt.epr(c, ties="include") == pytest.approx((2 / 4) / (2 / 6))
    assert mt.epr(c, ties="strict") == pytest.approx((1 / 2) / (2 / 6))
    assert mt.epr(c, ties="expected") == pytest.approx(((1 + 1 / 3) / 2) / (2 / 6))
    assert mt.hit_at(c, fraction=0.5) == pytest.approx((1 + 2 / 3) / 3)


def test_tied_scores_equal_the_mean_over_random_orders(large):
    c = EdgeCandidates(large.label, large.score.round(0))
    rng = np.random.default_rng(0)
    broken = [EdgeCandidates(c.label, c.score + 1e-3 * rng.random(3000)) for _ in range(100)]
    for f in (mt.hit_at, lambda x: mt.epr(x, ties="expected"), mt.auroc):
        assert f(c) == pytest.approx(np.mean([f(b) for b in broken]), rel=0.03)


def test_order_of_pairs_does_not_matter(large):
    c = EdgeCandidates(large.label, large.score.round(1), large.source)
    p = np.random.default_rng(2).permutation(3000)
    pd.testing.assert_series_equal(
        mt.score_network(EdgeCandidates(c.label[p], c.score[p], c.source[p])), mt.score_network(c)
    )


def test_monotone_transform_does_not_matter(large):
    c = EdgeCandidates(large.label, np.exp(large.score), large.source)
    pd.testing.assert_series_equal(mt.score_network(c), mt.score_network(large))


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda m, t: mt.auprc(m), "`truth`"),
        (lambda m, t: mt.auprc(m, t.rename(columns={"source": "tf"})), "`truth`"),
        (lambda m, t: mt.auprc(m, [("A", "B", "C")]), "`truth`"),
        (lambda m, t: mt.auprc(m, [("a", "b")]), "upper/lower"),
        (lambda m, t: mt.auprc(m.to_numpy(), t), "`genes`"),
        (lambda m, t: mt.auprc(m.set_axis(["A"] * 6, axis=1), t), "repeated"),
        (lambda m, t: mt.auprc(m, t, targets=["Q", "C"]), "`targets`"),
        (lambda m, t: mt.epr(m, t, ties="first"), "`ties`"),
        (lambda m, t: mt.hit_at(m, t, fraction=1), None),
        (lambda m, t: mt.hit_at(m, t, fraction=5), "`fraction`"),
        (lambda m, t: mt.auprc(m * np.nan, t), "`score`"),
        (lambda m, t: mt.macro_auprc(EdgeCandidates([1, 0], [1, 0])), "`source`"),
        (lambda m, t: mt.auprc(EdgeCandidates([1, 0], [1, 0]), t), "`truth`"),
        (lambda m, t: mt.auprc(EdgeCandidates([0, 0], [1, 0])), "no known edge"),
        (lambda m, t: mt.auprc(t.assign(weight=1.0), t), "twice"),
        (lambda m, t: mt.auprc(t, t), "weight"),
    ],
)
def test_errors(call, word, network):
    if word is None:
        assert call(*network) == 0.5
        return
    with pytest.raises(ValueError, match=word):
        call(*network)


@pytest.mark.parametrize(
    ("truth", "n_edges", "auprc", "ratio", "epr", "hit"),
    [
        ("Specific", 756, 0.092, 1.08, 1.24, 0.067),
        ("Non-specific", 3067, 0.018, 0.94, 1.06, 0.019),
        ("STRING", 4815, 0.041, 1.10, 1.46, 0.059),
    ],
)
def test_absolute_correlation_on_beeline_mdc(load_dataset, truth, n_edges, auprc, ratio, epr, hit):
    adata = load_dataset("beeline_mdc", ground_truth=truth)
    correlation = np.corrcoef(np.asarray(adata.X, dtype=np.float64).T)
    score = mt.score_network(correlation, adata.uns["ground_truth"], genes=adata.var_names)
    assert score["n_edges"] == n_edges
    assert score["auprc"] == pytest.approx(auprc, abs=5e-4)
    assert score["auprc_ratio"] == pytest.approx(ratio, abs=6e-3)
    assert score["epr"] == pytest.approx(epr, abs=6e-3)
    assert score["hit_at"] == pytest.approx(hit, abs=6e-4)
