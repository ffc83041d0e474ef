"""Networks in closed form, and how left-out cells weigh them."""

from __future__ import annotations

import numpy as np
import pytest

from pertura.effects import closed_form_networks, combine_networks, explained, stack_networks


@pytest.fixture(scope="module")
def cells() -> np.ndarray:
    """A chain 0 -> 1 -> ... -> 7, standardized."""
    rng = np.random.default_rng(0)
    weight = np.diag(np.full(7, 1.0), 1)
    x = rng.normal(size=(600, 8)) @ np.linalg.inv(np.eye(8) - weight)
    return (x - x.mean(0)) / x.std(0)


def test_the_inverse_root_leaves_paths_out(cells):
    of_correlation, whitening = closed_form_networks(cells)
    correlation = np.corrcoef(cells.T)
    assert correlation[4, 6] > 0.7 * correlation[4, 5]
    assert abs(whitening[4, 6]) < 0.3 * whitening[4, 5]
    for network in (of_correlation, whitening):
        assert not np.diag(network).any()
        np.testing.assert_allclose(network, network.T, atol=1e-10)


def test_left_out_cells_choose(cells):
    """A network of chance gets no more than its even share, whatever its unit; without any that predicts all count alike."""
    train, left_out = cells[:400], cells[400:]
    rng = np.random.default_rng(1)
    chance = rng.normal(size=(8, 8)) * (1 - np.eye(8))
    own = closed_form_networks(train)
    share = stack_networks([1e3 * chance, *own], train, left_out)
    assert share.sum() == pytest.approx(1) and share[0] < 0.2 < share[1:].min()
    np.testing.assert_allclose(stack_networks([np.zeros((8, 8))] * 2, train, left_out), [0.5, 0.5])
    assert explained(own[1], cells) > 2 * explained(chance, cells)


def test_evidence_depends_on_ranks_and_shares(cells):
    first, second = closed_form_networks(cells)
    pairs = ~np.eye(8, dtype=bool)
    alone = combine_networks([first, second], np.array([1.0, 0.0]), pairs)
    np.testing.assert_allclose(alone, combine_networks([-5 * first**3, second], np.array([1.0, 0.0]), pairs))
    assert not np.diag(alone).any() and alone.argmax() == np.abs(first).argmax()
    assert np.ptp(combine_networks([first, second], np.array([0.5, 0.5]), pairs) - alone) > 0.1
