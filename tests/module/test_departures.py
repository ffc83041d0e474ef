"""Effects in single contexts as a site of a model."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pertura.module._base import Action
from pertura.module._departures import Departures, RowNoise

N_GENES = 4


@pytest.fixture
def site():
    """A in contexts 0 and 1, B in context 0, A and B in context 1; perturbations with doses up to 10."""
    site = Departures(N_GENES)
    mean = torch.arange(1.0, 5.0)[:, None].expand(4, N_GENES)
    site.set(
        codes=[[0, -1], [0, -1], [1, -1], [0, 1]],
        dose=[[10.0, 0.0], [10.0, 0.0], [10.0, 0.0], [10.0, 10.0]],
        context=[0, 1, 0, 1],
        max_dose=[10.0, 10.0],
        delta=10 * mean,
        mean=mean,
        low=mean - 1.0,
        high=mean + 3.0,
    )
    return site


def asked(*codes, dose=1.0):
    return Action(torch.tensor(codes), torch.full((len(codes), len(codes[0])), dose))


def test_cells_have_what_was_measured_in_their_context(site):
    action, context = asked([0, -1], [0, -1], [1, -1], [1, -1], [-1, -1], [0, -1]), torch.tensor([0, 1, 0, 1, 0, 7])
    added, has = site(action, context)
    np.testing.assert_allclose(added[:, 0], [1.0, 2.0, 3.0, 0.0, 0.0, 0.0])
    np.testing.assert_array_equal(has[:, 0], [True, True, True, False, False, False])
    np.testing.assert_allclose(site.change(action, context)[:, 0], [10.0, 20.0, 30.0, 0.0, 0.0, 0.0])
    assert site(asked([1, -1]), torch.tensor([1])) is None
    assert site.change(asked([-1, -1]), torch.tensor([0])) == 0.0


def test_combinations_depart_as_measured_or_as_their_members_do(site):
    added, _ = site(asked([0, 1], [1, 0]), torch.tensor([1, 0]))
    np.testing.assert_allclose(added[:, 0], [4.0, 1.0 + 3.0])


def test_departures_follow_the_dose(site):
    """Linear in the dose below the lowest measured one."""
    added, _ = site(asked([0, -1], dose=0.5), torch.tensor([0]))
    np.testing.assert_allclose(added, 0.5, rtol=1e-6)


def test_one_row_where_all_cells_are_alike(site):
    added, has = site(asked([0, -1]).expand(5), torch.zeros(5, dtype=torch.long))
    assert added.shape == (1, N_GENES) and has.shape == (1, 1)


def test_noise_reaches_as_far_as_the_sd_on_either_side(site):
    noise = RowNoise(N_GENES, 3, 6, torch.device("cpu"))
    added, _ = site(asked([0, -1]), torch.tensor([0]), noise, first=5)
    deviate = noise.rows(torch.tensor([5]))
    np.testing.assert_allclose(added, 1.0 + torch.where(deviate > 0, 3 * deviate, deviate), rtol=1e-5)


def test_noise_in_training_is_standard_normal_for_every_row():
    """Of many rows in one step some may have the same; which do not change what each has on average."""
    torch.manual_seed(0)
    drawn = torch.stack([RowNoise(20, None, 1, torch.device("cpu")).rows(torch.arange(300)) for _ in range(200)])
    assert drawn.shape == (200, 300, 20)
    assert drawn.mean((0, 2)).abs().max() < 0.1 and (drawn.std((0, 2)) - 1.0).abs().max() < 0.1
    assert (drawn[0, :50] != drawn[1, :50]).all() and len(drawn[0, :50].unique(dim=0)) == 50


def test_saved_and_forgotten(site):
    other = Departures(N_GENES)
    other.load_state_dict(site.state_dict())
    np.testing.assert_array_equal(other(asked([0, 1]), torch.tensor([0]))[0], site(asked([0, 1]), torch.tensor([0]))[0])
    site.clear()
    assert site(asked([0, -1]), torch.tensor([0])) is None and site.sample_noise() is None
