"""Features of measured and of asked perturbations."""

import numpy as np
import pytest

from pertura.effects._contexts import Asked
from pertura.effects._features import label_features, linear_slope, member_features


def test_features_of_a_combination_are_the_sum_of_its_members():
    known = np.array([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]])
    codes = np.array([[0, -1], [0, 1], [1, 2]])
    found, described = label_features(codes, known, np.array([[1.0, 5.0], [1.0, 0.5], [1.0, 1.0]]))
    np.testing.assert_allclose(found[:2], [[1, 0], [1, 1]])
    assert described.tolist() == [True, True, False]


def test_features_of_unseen_members_are_those_that_are_asked():
    known = np.array([[1.0], [0.0]])
    none = np.zeros(0)
    asked = Asked(np.array([0, -2]), np.ones(2), np.array([[9.0], [3.0]], np.float32), -1, none)
    np.testing.assert_allclose(member_features(asked, known), [[1], [3]])
    assert member_features(Asked(np.array([0, -2]), np.ones(2), None, -1, none), known) is None
    assert member_features(Asked(np.array([1]), np.ones(1), None, -1, none), known) is None


@pytest.mark.parametrize("n_features", [2, 9])
def test_slope_of_each_context(n_features):
    p = np.random.default_rng(5).normal(size=(8, n_features))
    context, described = np.array([0] * 5 + [1] * 3), np.arange(8) != 2
    found = linear_slope(p, described, context, 0.3)
    own = p[[0, 1, 3, 4]]
    np.testing.assert_allclose(found[[0, 1, 3, 4]], own @ np.linalg.inv(own.T @ own + 0.3 * np.eye(n_features)))
    assert (found[2] == 0).all() and found[5:].any()
