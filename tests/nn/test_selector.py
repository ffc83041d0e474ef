"""Concrete selector."""

from __future__ import annotations

import pytest
import torch

from pertura.nn import ConcreteSelector, MemberLinear
from pertura.nn._selector import BagAggregation


def test_temperature_falls_exponentially_between_its_bounds():
    selector = ConcreteSelector(1, 2, 5, temperature=(10.0, 0.1))
    seen = []
    for progress in (0.0, 0.5, 1.0, 1.5):
        selector.anneal(progress)
        seen.append(float(selector.temperature))
    assert seen == pytest.approx([10.0, 1.0, 0.1, 0.1])


def test_draws_are_soft_when_hot_and_hard_when_cold():
    torch.manual_seed(0)
    selector = ConcreteSelector(2, 3, 20)
    hot = selector.distribution(50).rsample()
    selector.anneal(1.0)
    cold = selector.distribution(50).rsample()
    assert hot.shape == (50, 2, 3, 20)
    assert hot.amax(-1).mean() < 0.2
    assert cold.amax(-1).mean() > 0.9


def test_cold_draws_follow_the_logits():
    torch.manual_seed(0)
    selector = ConcreteSelector(1, 1, 4, temperature=(0.05, 0.05))
    with torch.no_grad():
        selector.logits.copy_(torch.tensor([0.1, 0.2, 0.3, 0.4]).log())
    share = selector.distribution(20_000).rsample().mean(0).flatten()
    torch.testing.assert_close(share, torch.tensor([0.1, 0.2, 0.3, 0.4]), atol=0.02, rtol=0)


def test_duplicates_and_certainty():
    selector = ConcreteSelector(2, 3, 4)
    with torch.no_grad():
        selector.logits.fill_(-50.0)
        selector.logits[0, range(3), [0, 1, 2]] = 50.0
        selector.logits[1, :, 3] = 50.0
    torch.testing.assert_close(selector.duplicates(), torch.tensor([0.0, 2.0]))
    torch.testing.assert_close(selector.certainty(), torch.ones(2))
    torch.testing.assert_close(selector.entropy(), torch.zeros(2))
    assert selector.chosen().tolist() == [[0, 1, 2], [3, 3, 3]]


def test_members_have_layers_of_their_own():
    layer = MemberLinear(2, 3, 4)
    x = torch.randn(5, 2, 3)
    y = layer(x)
    for member in range(2):
        torch.testing.assert_close(y[:, member], x[:, member] @ layer.weight[member] + layer.bias[member])


@pytest.mark.parametrize("kind", ["mean", "attention", "gated"])
def test_a_bag_is_a_weighted_mean_of_its_cells(kind):
    torch.manual_seed(0)
    aggregation, z = BagAggregation(2, 3, kind), torch.randn(4, 7, 2, 3)
    weights = aggregation.weights(z)
    assert weights.shape == (4, 7, 2, 1) and (weights > 0).all()
    torch.testing.assert_close(weights.sum(1), torch.ones(4, 2, 1))
    torch.testing.assert_close(aggregation(z), (weights * z).sum(1))
    torch.testing.assert_close(aggregation(z[:, torch.randperm(7)]), aggregation(z))
    assert (kind == "mean") == bool(weights.std(1).max() < 1e-6)
