"""Retrieval metrics: ranks by hand, ties, excluded genes."""

import numpy as np
import pytest

from pertura import metrics as mt


@pytest.fixture
def truth():
    return np.random.default_rng(0).normal(size=(8, 30))


def naive(p, t, metric, exclude=None):
    out = []
    for i in range(len(p)):
        keep = np.setdiff1d(np.arange(p.shape[1]), [] if exclude is None else exclude[i])
        a, b = p[i, keep], t[:, keep]
        d = {
            "l1": np.abs(a - b).sum(1),
            "l2": np.sqrt(((a - b) ** 2).sum(1)),
            "cosine": 1 - b @ a / np.linalg.norm(a) / np.linalg.norm(b, axis=1),
        }[metric]
        out.append(int(np.argsort(np.argsort(d))[i]))
    return np.array(out)


@pytest.mark.parametrize("metric", ["l1", "l2", "cosine"])
@pytest.mark.parametrize("excluded", [False, True])
def test_discrimination_score_ranks(truth, metric, excluded):
    p = truth + 2.5 * np.random.default_rng(1).normal(size=truth.shape)
    exclude = [[i, 29 - i] if i % 2 else [] for i in range(8)] if excluded else None
    rank = naive(p, truth, metric, exclude)
    assert 0 < rank.sum()
    np.testing.assert_allclose(mt.discrimination_score(p, truth, metric=metric, exclude=exclude), 1 - rank / 8)
    assert mt.METRICS[f"discrimination_score_{metric}"](p, truth, exclude=exclude) == pytest.approx(1 - rank / 8)
    if metric == "l2" and not excluded:
        np.testing.assert_allclose(mt.centroid_accuracy(p, truth), 1 - rank / 7)


@pytest.mark.parametrize("metric", ["l1", "l2", "cosine"])
def test_perfect_and_constant_predictions(truth, metric):
    np.testing.assert_array_equal(mt.discrimination_score(truth, truth, metric=metric), 1)
    np.testing.assert_array_equal(mt.centroid_accuracy(truth, truth), 1)
    same = np.broadcast_to(truth.mean(0), truth.shape)
    # One profile for all: every rank from 0 to 7 occurs once.
    assert mt.centroid_accuracy(same, truth).mean() == pytest.approx(0.5)
    assert mt.discrimination_score(same, truth, metric=metric).mean() == pytest.approx(9 / 16)


def test_ties_count_one_half(truth):
    t = np.vstack([truth[:1], truth[:1], truth[2:4]])
    np.testing.assert_allclose(mt.centroid_accuracy(t, t), [1 - 0.5 / 3, 1 - 0.5 / 3, 1, 1])
    for metric in ("l1", "l2", "cosine"):
        np.testing.assert_allclose(mt.discrimination_score(t, t, metric=metric), [1 - 0.5 / 4] * 2 + [1, 1])
    # No effect has no direction: all cosines tie.
    np.testing.assert_allclose(
        mt.discrimination_score(np.zeros((8, 30)), truth, metric="cosine"), np.full(8, 1 - 3.5 / 8)
    )


def test_excluding_the_target_removes_a_give_away():
    rng = np.random.default_rng(0)
    t = 0.1 * rng.normal(size=(40, 60))
    t[np.arange(40), np.arange(40)] = -5.0
    p = 0.1 * rng.normal(size=(40, 60))
    p[np.arange(40), np.arange(40)] = -5.0
    chance = 41 / 80
    assert mt.discrimination_score(p, t).mean() == 1.0
    assert mt.discrimination_score(p, t, exclude=range(40)).mean() == pytest.approx(chance, abs=0.15)
    # Leaving out only the own target makes "no change" look perfect; leaving out all targets does not.
    zero = np.zeros_like(p)
    assert mt.discrimination_score(zero, t, exclude=[[i] for i in range(40)]).mean() == 1.0
    assert mt.discrimination_score(zero, t, exclude=range(40)).mean() == pytest.approx(chance)


def test_others_are_candidates_and_against_prediction(truth):
    p = truth[:3] + 2.5 * np.random.default_rng(2).normal(size=(3, 30))
    padded = np.vstack([p, np.zeros((5, 30))])
    np.testing.assert_allclose(
        mt.centroid_accuracy(p, truth[:3], others=truth[3:]), mt.centroid_accuracy(padded, truth)[:3]
    )
    np.testing.assert_allclose(
        mt.centroid_accuracy(padded, truth, against="prediction"), mt.centroid_accuracy(truth, padded)
    )
    assert np.isnan(mt.centroid_accuracy(p[:1], truth[:1])).all()


def test_invariant_to_gene_order_and_shift(truth):
    p = truth + np.random.default_rng(3).normal(size=truth.shape)
    order, shift = np.random.default_rng(4).permutation(30), np.random.default_rng(5).normal(size=30)
    np.testing.assert_allclose(mt.centroid_accuracy(p[:, order], truth[:, order]), mt.centroid_accuracy(p, truth))
    np.testing.assert_allclose(mt.centroid_accuracy(p + shift, truth + shift), mt.centroid_accuracy(p, truth))


def test_systematic_variation():
    e = np.array([[1.0, 0.0], [0.0, 1.0]])
    assert mt.systematic_variation(e) == pytest.approx(np.sqrt(0.5))
    assert mt.systematic_variation(np.ones((3, 4))) == pytest.approx(1.0)
    rng = np.random.default_rng(0)
    assert mt.systematic_variation(rng.normal(size=(100, 500))) < 0.2


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda t: mt.centroid_accuracy(t[0], t[0]), "tables"),
        (lambda t: mt.centroid_accuracy(t, t, against="both"), "`against`"),
        (lambda t: mt.centroid_accuracy(t, t, against="prediction", others=t), "`others`"),
        (lambda t: mt.discrimination_score(t, t, metric="l3"), "`metric`"),
        (lambda t: mt.discrimination_score(t, t, exclude=[[]]), "`exclude`"),
        (lambda t: mt.systematic_variation(t[0]), "`effects`"),
    ],
)
def test_errors(call, word, truth):
    with pytest.raises(ValueError, match=word):
        call(truth)
