"""Shares of predictions."""

import numpy as np
import pytest

from pertura.effects import share_of_differences, stack_shares

CONTEXT = np.repeat(np.arange(8), 3)


@pytest.fixture
def parts():
    rng = np.random.default_rng(0)
    return rng.normal(size=(2, 24, 10)), rng.normal(size=(24, 10))


def test_shares_are_those_of_the_truth(parts):
    predicted, noise = parts
    share = stack_shares(0.6 * predicted[0] + 0.2 * predicted[1] + 0.01 * noise, predicted, CONTEXT)
    np.testing.assert_allclose(share, [0.6, 0.2], atol=0.01)


def test_shares_are_not_negative_and_at_most_one_together(parts):
    predicted, noise = parts
    np.testing.assert_allclose(stack_shares(3.0 * predicted[0] - predicted[1], predicted, CONTEXT), [1.0, 0.0])


def test_no_gain_beyond_chance_is_no_share(parts):
    predicted, noise = parts
    assert stack_shares(noise, predicted, CONTEXT).tolist() == [0.0, 0.0]
    # a gain in one of many contexts is one draw
    target = noise.copy()
    target[CONTEXT == 0] += 3.0 * predicted[0][CONTEXT == 0]
    assert stack_shares(target, predicted, CONTEXT).tolist() == [0.0, 0.0]


def test_share_of_differences_needs_differences():
    """Nothing is believed of contexts that are alike but for noise, and all of a right prediction of those that are not."""
    rng = np.random.default_rng(0)
    noise, differences = rng.normal(size=(8, 50)), 2.0 * rng.normal(size=(8, 50))
    variance = np.full(8, 50.0)
    assert share_of_differences(noise, noise, variance) == 0.0
    assert share_of_differences(differences + noise, differences, variance) > 0.9
    assert share_of_differences(differences + noise, 4.0 * differences, variance) == pytest.approx(0.25, abs=0.05)
    assert share_of_differences(differences + noise, -differences, variance) == 0.0
    # a condition of few cells counts for little
    differences[0] = -differences[0]
    wrong = np.r_[5000.0, variance[1:]]
    assert share_of_differences(differences * np.r_[-1, np.ones(7)][:, None], differences, wrong) > 0.9
