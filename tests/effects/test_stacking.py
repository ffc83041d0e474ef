"""Shares of predictions."""

import numpy as np
import pytest

from pertura.effects import stack_shares

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
