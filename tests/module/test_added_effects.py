"""Effects that are added to cells."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pertura.effects import ConditionMeans
from pertura.module import Action
from pertura.module._added_effects import MeasuredMeans, MovedCells, _same, add_effect, split_controls

WHICH = torch.tensor([0, 1, 1, 0])


def test_the_mean_over_controls_moves_by_the_effect_and_no_cell_below_zero():
    torch.manual_seed(0)
    x = torch.rand(1, 50, 6) * (torch.rand(1, 50, 6) < 0.6)
    control = x.mean(1)
    effect = torch.tensor([[[0.5, -0.1, 0.0, 1.0, -0.2, -9.0]]])
    moved = add_effect(x, effect, control, torch.zeros(50, dtype=torch.long), True)
    torch.testing.assert_close(moved.mean(1)[0, :5], (control + effect[0])[0, :5])
    assert (moved >= 0).all() and (moved[..., 5] == 0).all()


@pytest.mark.parametrize("nonnegative", [True, False])
def test_each_cell_has_its_own_effect(nonnegative):
    x, effect = torch.full((2, 4, 1), 2.0), torch.tensor([[[1.0], [3.0]], [[10.0], [30.0]]])
    moved = add_effect(x, effect, torch.ones(2, 1), WHICH, nonnegative)
    assert moved[..., 0].tolist() == [[3, 5, 5, 3], [12, 32, 32, 12]]


def test_same_perturbations_whatever_their_order_and_padding():
    one = Action(torch.tensor([[0, 1], [0, 1], [0, -1], [0, -1], [-1, -1], [-2, -1]]), torch.ones(6, 2))
    other = Action(
        torch.tensor([[1, 0, -1], [0, 2, -1], [-1, 0, 1], [0, -1, -1], [-1, -1, -1], [-2, -1, -1]]),
        torch.tensor([[1.0, 1, 0], [1, 1, 0], [0, 1, 0], [0.5, 0, 0], [0, 0, 0], [1, 0, 0]]),
    )
    # the third: a member without a dose is absent; the last: what is unknown may be anything
    assert _same(one, other).tolist() == [True, False, True, False, True, False]
    assert _same(other, one).tolist() == [True, False, True, False, True, False]


def test_what_did_not_move_is_what_was_measured():
    counts, library = torch.tensor([[3.0, 0.0, 1234567.0]]), torch.tensor([[54321.0]])
    own = torch.log1p(counts * (1e4 / library))
    moved = own + torch.tensor([0.0, 1.0, 0.0])
    found = MovedCells(moved[None], "log1p", own, counts)
    at_counts = found.conditional_mean(None, "counts", library)[0]
    assert at_counts[0, [0, 2]].tolist() == counts[0, [0, 2]].tolist()
    torch.testing.assert_close(at_counts[0, 1], torch.expm1(moved[0, 1]) * 5.4321)
    with pytest.raises(ValueError, match="no distribution of single cells"):
        found.sample()


def test_means_take_the_size_of_what_is_loaded():
    means = ConditionMeans(
        codes=np.array([[0], [1]]),
        dose=np.ones((2, 1)),
        context=np.array([0, 0]),
        mean=np.array([[2.0, 3.0], [0.0, 1.0], [1.0, 1.0]], np.float32),
        variance=np.full((3, 2), 0.5, np.float32),
        has_control=np.array([True]),
    )
    one, other = (MeasuredMeans(2, 1, np.ones(2)) for _ in range(2))
    one.set(means)
    mean, variance = one.sums(np.array([[0.5, 0.5], [1.0, -1.0]]))
    torch.testing.assert_close(mean, torch.tensor([[0.0, 1.0], [2.0, 2.0]]))
    # the error of the controls is shared: it counts once in a mean, and not at all in a difference
    torch.testing.assert_close(variance, torch.tensor([[0.75, 0.75], [1.0, 1.0]]))
    other.load_state_dict(one.state_dict())
    assert len(other.conditions) == 2
    torch.testing.assert_close(other.effect, one.effect)


def test_distances_are_to_the_contexts_of_the_effects():
    means = MeasuredMeans(2, 2, np.ones(1))
    control = np.array([[1.0, 1.0], [3.0, 5.0]], np.float32)
    means.set(
        ConditionMeans(
            codes=np.array([[0], [0]]),
            dose=np.ones((2, 1)),
            context=np.array([0, 1]),
            mean=np.concatenate([control + 7, control]),
            variance=np.ones((4, 2), np.float32),
            has_control=np.array([True, True]),
        )
    )
    known = torch.cat([means.control, torch.tensor([[10.0, 20.0]])])  # the last: a context of the query
    weights = np.array([[1.0, 0.0], [0.5, 0.5], [0.2, 0.2]])
    found = means.distances(weights, np.array([0, 2, 2]), known)
    torch.testing.assert_close(found, torch.tensor([[0.0, 0.0], [8.0, 17.0], [3.2, 6.8]]))


def test_profiles_and_effects_have_different_halves_of_the_controls():
    """Noise of a control profile must not be in the effect that is predicted from it."""
    rng = np.random.default_rng(0)
    halves = rng.normal(size=(2, 2, 5)).astype(np.float32)  # contexts, halves, genes
    treated = rng.normal(size=(2, 5)).astype(np.float32)
    control = halves.mean(1)
    means = MeasuredMeans(5, 2, np.ones(1))
    means.set(
        ConditionMeans(
            codes=np.array([[0], [0]]),
            dose=np.ones((2, 1)),
            context=np.array([0, 1]),
            mean=np.concatenate([treated, control]),
            variance=np.ones((4, 5), np.float32),
            has_control=np.array([True, True]),
        )
    )
    table = SimpleNamespace(control_halves=halves.swapaxes(0, 1), has_control=np.array([True, True]))
    for half, (profiles, effects) in enumerate(split_controls(means, table)):
        np.testing.assert_allclose(profiles, halves[:, half], atol=1e-6)
        np.testing.assert_allclose(effects, treated - halves[:, 1 - half], atol=1e-6)
