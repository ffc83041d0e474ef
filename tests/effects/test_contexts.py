"""Weights of contexts and doses."""

import numpy as np
import pytest

from pertura.effects import Conditions, choose_strength, fit_convergence, ridge_weights, softmax_weights
from pertura.effects._contexts import profile_correlations

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("strength", [1e-3, 0.1, 10.0])
def test_weights_are_those_of_ridge_regression(strength):
    from sklearn.linear_model import Ridge

    control, effect = RNG.normal(size=(7, 20)), RNG.normal(size=(6, 4))
    gram = control @ control.T
    weights = ridge_weights(gram[:6, :6], gram[6, :6], strength, 30)
    centered = control[:6] - control[:6].mean(0)
    alpha = strength * (centered**2).sum() / 5
    expected = Ridge(alpha=alpha).fit(control[:6], effect).predict(control[6:])[0]
    np.testing.assert_allclose(weights @ effect, expected, rtol=1e-6)
    assert weights.sum() == pytest.approx(1)


def test_without_end_the_ridge_is_the_mean():
    np.testing.assert_allclose(ridge_weights(np.eye(4), np.arange(4.0), np.inf, 3), 0.25)
    np.testing.assert_allclose(ridge_weights(np.eye(1), np.ones(1), 0.1, 3), 1)


def test_softmax():
    np.testing.assert_allclose(softmax_weights(np.array([0.0, 1.0]), 0.5), np.array([1, np.e**2]) / (1 + np.e**2))
    np.testing.assert_allclose(softmax_weights(np.array([0.0, 900.0]), 1e-3), [0, 1])


def test_correlations_of_profiles():
    a, b = RNG.normal(size=(3, 9)), RNG.normal(size=(2, 9))
    np.testing.assert_allclose(profile_correlations(a, b), np.corrcoef(a, b)[:3, 3:])
    assert (profile_correlations(np.ones((1, 9)), b) == 0).all()


def test_strength_is_chosen_by_left_out_contexts():
    """Small where effects follow the control profiles, large where they do not."""
    n = 8
    conditions = Conditions(np.zeros((n, 1), np.int64), np.ones((n, 1)), np.arange(n), n)
    position = np.linspace(-1, 1, n)[:, None]
    control = position * RNG.normal(size=20) + 0.01 * RNG.normal(size=(n, 20))
    gram = (control - control.mean(0)) @ (control - control.mean(0)).T
    along, noise = 1 + position * RNG.normal(size=20), RNG.normal(size=(n, 20))
    assert choose_strength(conditions, along, gram, 5) <= 0.01
    assert choose_strength(conditions, noise, gram, 5) >= 10
    two = Conditions(np.zeros((2, 1), np.int64), np.ones((2, 1)), np.arange(2), 2)
    assert choose_strength(two, along[:2], gram[:2, :2], 5) == np.inf


def test_members_that_were_measured():
    codes = np.array([[0, -1], [1, 2]])
    found = Conditions(codes, np.where(codes >= 0, 1.0, 0.0), np.zeros(2, np.int64), 1)
    assert [found.has_member(c) for c in (0, 1, 2, 3, -1)] == [True, True, True, False, False]
    assert found.find(np.array([1, 2])) >= 0 and found.find(np.array([1])) == -1


def test_strength_by_splits_of_the_controls():
    """Where noise of the profiles is in the effects, it looks like a relation; other controls show that there is none."""
    rng = np.random.default_rng(3)
    n = 12
    conditions = Conditions(np.zeros((n, 1), np.int64), np.ones((n, 1)), np.arange(n), n)
    controls, treated = rng.normal(size=(2, n, 20)), 0.3 * rng.normal(size=(n, 20))
    centered = controls - controls.mean(1, keepdims=True)
    gram = np.stack([c @ c.T for c in centered])
    assert choose_strength(conditions, treated - controls[0], gram[0], 15) < np.inf
    assert choose_strength(conditions, treated - controls[::-1], gram, 15) >= 100


@pytest.mark.parametrize(("true", "low", "high"), [(0.6, 0.5, 0.7), (0.0, 0.0, 0.0), (-0.5, 0.0, 0.0)])
def test_convergence_is_that_of_left_out_contexts(true, low, high):
    """With noise in the control profiles; contexts that move apart are not brought together."""
    n, genes = 8, 200
    rng = np.random.default_rng(0)
    conditions = Conditions(np.repeat([[0], [1]], n, 0), np.ones((2 * n, 1)), np.tile(np.arange(n), 2), n)
    control = rng.normal(0, 1, (n, genes))
    halves = control + rng.normal(0, 0.4, (2, n, genes))
    treated = rng.normal(0, 1, (2, 1, genes)) + (1 - true) * control + rng.normal(0, 0.2, (2, n, genes))
    against = [treated.reshape(2 * n, genes) - np.tile(half, (2, 1)) for half in halves]
    found = fit_convergence(conditions, list(zip(halves, against[::-1], strict=True)))
    assert low <= found <= high
    if true == 0:  # the same noise on either side looks like convergence
        assert fit_convergence(conditions, list(zip(halves, against, strict=True))) > 0.05
    two = Conditions(np.zeros((2, 1), np.int64), np.ones((2, 1)), np.arange(2), 2)
    assert fit_convergence(two, [(halves[0, :2], against[1][:2])]) == 0
