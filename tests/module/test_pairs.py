"""Priors of pairs of genes: what is right is used, what is wrong is not, and no pair teaches itself."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import spearmanr
from sklearn.metrics import average_precision_score

from pertura.module import _pairs
from pertura.module._pairs import PairPrior, _gamma_regression

N, D = 120, 8
REGULATORS = np.arange(0, N, 2)
OFF = REGULATORS[:, None] != np.arange(N)


def embedding(seed: int = 0) -> np.ndarray:
    """Twelve families of ten genes."""
    rng = np.random.default_rng(seed)
    h = rng.normal(size=(12, D))[np.arange(N) % 12] + 0.4 * rng.normal(size=(N, D))
    return (h - h.mean(0)).astype(np.float32)


def prior(h: np.ndarray, known: np.ndarray | None = None) -> PairPrior:
    unit = h / np.linalg.norm(h, axis=1, keepdims=True)
    return PairPrior(np.maximum(unit @ unit.T, 0)[REGULATORS], h, REGULATORS, known)


@pytest.fixture(scope="module")
def planted() -> tuple[np.ndarray, np.ndarray]:
    """Edges, more often between similar genes, and sizes of weights which are larger for edges."""
    rng = np.random.default_rng(1)
    edge = rng.random((len(REGULATORS), N)) < 0.02 + 0.4 * prior(embedding()).similarity ** 2
    return edge & OFF, (rng.exponential(size=edge.shape) * np.where(edge, 3.0, 1.0) * OFF).astype(np.float32)


def precision(edge: np.ndarray, score: np.ndarray) -> float:
    return average_precision_score(edge[OFF], score[OFF])


def test_a_prior_that_is_right_is_used(planted):
    edge, size = planted
    own = prior(embedding())
    found = own.learn(size)
    coefficient, error, kept = found.coefficients[0]
    assert coefficient > 4 * error and kept > 0.8
    assert np.ptp(found.log_size[OFF]) > 0.3
    alone = max(precision(edge, size), precision(edge, own.similarity))
    assert precision(edge, found.log_odds) > 1.1 * alone


@pytest.mark.parametrize("wrong", ["permuted", "empty", "constant"])
def test_a_prior_that_is_wrong_changes_nothing(planted, wrong):
    edge, size = planted
    h = {"permuted": embedding()[np.random.default_rng(3).permutation(N)], "empty": np.zeros((N, D), np.float32)}
    if wrong == "constant":
        own = PairPrior(np.ones(size.shape, np.float32), embedding(), REGULATORS)
    elif wrong == "empty":
        own = PairPrior(np.zeros(size.shape, np.float32), h["empty"], REGULATORS)
    else:
        own = prior(h["permuted"])
    found = own.learn(size)
    if wrong != "constant":
        assert not found.coefficients[0, 2]
    assert np.ptp(found.log_size) < 1e-3, "the same prior for all pairs"
    assert spearmanr(found.log_odds[OFF], size[OFF]).statistic > 0.99999
    assert len(np.unique(found.log_odds[OFF])) > 0.99 * OFF.sum()


def test_no_pair_teaches_itself(planted, monkeypatch):
    """The sizes of one gene's weights do not enter the coefficients of its own pairs, but those of others."""
    monkeypatch.setattr(_pairs, "_DOUBT", 0.0)  # coefficients are not shrunk
    _, size = planted
    own = prior(embedding())
    changed = size.copy()
    changed[5] *= 1 + 100 * own.similarity[5]
    before, after = (own._size_of(s, own.similarity[..., None])[0] for s in (size, changed))
    np.testing.assert_allclose(before[5], after[5], rtol=1e-6)
    assert np.abs(before - after)[own.fold[REGULATORS] != own.fold[REGULATORS[5]]].max() > 0.1


def test_known_edges_teach_edges_of_other_genes():
    """A linear rule of the embeddings that the similarity does not know; a third of the genes is held out."""
    rng = np.random.default_rng(2)
    h = rng.normal(size=(N, D)).astype(np.float32)
    logit = 3.0 * h[REGULATORS, :1] * h[:, 1] + 2.0 * h[:, 2] - 3.0
    edge = (rng.random(logit.shape) < 1 / (1 + np.exp(-logit))) & OFF
    size = rng.exponential(size=edge.shape).astype(np.float32)
    new = np.arange(N) >= 80
    known = np.where(edge, 1, -1).astype(np.int8)
    known[REGULATORS >= 80] = 0
    known[:, new] = 0
    test = np.ix_(REGULATORS >= 80, new)
    own = prior(h, known)
    assert own.features == ("similarity", "known_edges")
    log_odds = own.learn(size).log_odds
    # a product of two different dimensions is out of reach, the additive part is not
    assert average_precision_score(edge[test].ravel(), log_odds[test].ravel()) > 1.5 * edge[test].mean()
    assert (log_odds[known > 0].mean() - log_odds[known < 0].mean()) > 2 * np.log(0.95 / 0.05)
    only = prior(h, np.maximum(known, 0)).learn(size).log_odds
    assert average_precision_score(edge[test].ravel(), only[test].ravel()) > 1.5 * edge[test].mean()
    wrong = prior(h[rng.permutation(N)], known)
    assert wrong._labels is None or wrong._labels.worth < 0.3 * own._labels.worth


def test_too_few_known_edges_are_no_classifier(planted):
    _, size = planted
    known = np.zeros(size.shape, np.int8)
    known[0, 3], known[2, 3] = 1, -1
    own = prior(embedding(), known)
    assert own.features == ("similarity",)
    with_known, without = own.learn(size), prior(embedding()).learn(size)
    difference = with_known.log_odds - without.log_odds
    assert difference[0, 3] == pytest.approx(np.log(19), abs=1e-4)
    assert difference[2, 3] == pytest.approx(-np.log(19), abs=1e-4)
    assert np.count_nonzero(np.abs(difference) > 1e-4) == 2


def test_gamma_regression_finds_the_rates():
    rng = np.random.default_rng(0)
    x = rng.uniform(size=(20_000, 2))
    y = rng.exponential(np.exp(0.3 + x @ [1.5, -2.0]))
    np.testing.assert_allclose(_gamma_regression(x, y), [1.5, -2.0], atol=0.1)
    y[:100] = 0.0
    assert np.isfinite(_gamma_regression(x, y)).all()
    assert not _gamma_regression(x, np.zeros(len(x))).any()
