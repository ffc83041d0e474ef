"""Effects in a context where other perturbations are known."""

from __future__ import annotations

import numpy as np
import pytest

from pertura.effects import Conditions, Transfer

N, N_GENES = 30, 400


def _table(seed: int, *, kind: str, n_known: int) -> tuple[Conditions, np.ndarray, np.ndarray]:
    """Perturbations in two contexts; of the second some are known. Effects of all, and the rows that are known."""
    rng = np.random.default_rng(seed)
    first = rng.normal(size=(N, 3)) @ rng.normal(size=(3, N_GENES)) + 0.3 * rng.normal(size=(N, N_GENES))
    second = {
        "offset": first + 2.0 * rng.normal(size=N_GENES),
        "rotated": first @ rng.normal(size=(N_GENES, N_GENES)) / np.sqrt(N_GENES),
        "unrelated": rng.normal(size=(N, N_GENES)),
        "same": first + 0.3 * rng.normal(size=(N, N_GENES)),
    }[kind]
    effect, known = np.concatenate([first, second]), np.arange(N + n_known)
    codes, context = np.tile(np.arange(N), 2)[known, None], np.repeat([0, 1], N)[known]
    return Conditions(codes, np.ones((len(known), 1)), context, 2), effect, known


def _transfer(conditions: Conditions, effect: np.ndarray, noise: float = 0.0, shared: float = 0.0) -> Transfer:
    def elsewhere(asked, context):
        mask = (conditions.label == asked.label) & (conditions.context != context)
        return mask / max(mask.sum(), 1)

    own = effect[: len(conditions)]
    return Transfer(conditions, own @ own.T / N_GENES, np.full(len(own), noise), np.full(len(own), shared), elsewhere)


def _errors(kind: str, n_known: int = 15) -> tuple[float, float]:
    """Squared error of the unknown effects, by the transfer and by those elsewhere, in units of their square."""
    conditions, effect, known = _table(0, kind=kind, n_known=n_known)
    transfer = _transfer(conditions, effect)
    asked = [conditions.ask(np.array([p]), np.ones(1)) for p in range(n_known, N)]
    found = np.stack([transfer(a, 1) for a in asked]) @ effect[known]
    truth, there = effect[N + n_known :], effect[n_known:N]
    scale = (truth**2).sum()
    return ((found - truth) ** 2).sum() / scale, ((there - truth) ** 2).sum() / scale


@pytest.mark.parametrize(("kind", "at_most"), [("offset", 0.1), ("rotated", 0.35), ("same", 0.1), ("unrelated", 1.1)])
def test_known_perturbations_say_what_is_different_here(kind, at_most):
    error, elsewhere = _errors(kind)
    assert error < at_most
    assert error < 1.05 * elsewhere


def test_too_few_known_perturbations_say_nothing():
    """With two contexts, both have as many repeated perturbations: two."""
    conditions, effect, _ = _table(0, kind="offset", n_known=2)
    transfer, asked = _transfer(conditions, effect), conditions.ask(np.array([9]), np.ones(1))
    assert not transfer.knows(1)
    np.testing.assert_array_equal(transfer(asked, 1), np.arange(N + 2) == 9)


@pytest.mark.parametrize("n_known", [1, 2])
def test_one_known_perturbation_says_what_other_contexts_have_learned(n_known):
    """All effects of a context are off by the same: how much of what is off is common, the other contexts know."""
    rng = np.random.default_rng(3)
    base = rng.normal(size=(N, 3)) @ rng.normal(size=(3, N_GENES))
    effect = np.concatenate([base + 2.0 * rng.normal(size=N_GENES) + 0.3 * rng.normal(size=base.shape) for _ in "abc"])
    kept = np.flatnonzero(np.arange(3 * N) < 2 * N + n_known)
    codes = np.tile(np.arange(N), 3)[kept, None]
    conditions = Conditions(codes, np.ones(codes.shape), np.repeat([0, 1, 2], N)[kept], 3)
    transfer = _transfer(conditions, effect)
    asked = [conditions.ask(np.array([p]), np.ones(1)) for p in range(n_known, N)]
    found = np.stack([transfer(a, 2) for a in asked]) @ effect[kept]
    truth, there = effect[2 * N + n_known :], (effect[n_known:N] + effect[N + n_known : 2 * N]) / 2
    assert transfer.knows(2)
    assert ((found - truth) ** 2).mean() < 0.4 * ((there - truth) ** 2).mean()


def test_noisy_effects_are_believed_less():
    """Known effects with a large error move a prediction less away from that of elsewhere."""
    conditions, effect, _ = _table(0, kind="offset", n_known=6)
    asked = conditions.ask(np.array([20]), np.ones(1))
    weights = [np.abs(_transfer(conditions, effect, noise)(asked, 1)[N:]).sum() for noise in (0.0, 50.0)]
    assert weights[1] < 0.8 * weights[0]


def test_the_noise_of_the_controls_is_no_effect():
    """What all effects of a context have in common is theirs, or the noise of the controls they were compared with."""
    conditions, effect, _ = _table(0, kind="offset", n_known=12)
    asked, own = conditions.ask(np.array([20]), np.ones(1)), N + np.arange(12)
    weight = [np.abs(_transfer(conditions, effect, shared=s)(asked, 1)[own].sum()) for s in (0.0, 4.0)]
    assert weight[0] > 0.8 and weight[1] < 0.15
    # left out as asked anew: the prediction of a known condition from the others leaves the noise out, too
    transfer = _transfer(conditions, effect, shared=4.0)
    rows, weights = transfer.left_out(1)
    np.testing.assert_allclose(weights[np.arange(12), rows], 0.0, atol=1e-10)
    assert np.abs(weights[:, own].sum(1)).max() < 0.15


def test_a_condition_is_left_out_of_its_own_prediction():
    conditions, effect, _ = _table(1, kind="rotated", n_known=12)
    rows, weights = _transfer(conditions, effect).left_out(1)
    np.testing.assert_array_equal(rows, N + np.arange(12))
    np.testing.assert_allclose(weights[np.arange(12), rows], 0.0, atol=1e-10)
    # as from a table without it, but for the variances that are learned anew
    less = np.delete(np.arange(len(conditions)), rows[3])
    without = Conditions(conditions.codes[less], conditions.dose[less], conditions.context[less], 2)
    transfer = _transfer(without, effect[less])
    predicted = transfer(without.ask(np.array([3]), np.ones(1)), 1) @ effect[less]
    assert np.corrcoef(predicted, weights[3] @ effect[: len(conditions)])[0, 1] > 0.98


def test_the_order_of_conditions_plays_no_part():
    conditions, effect, known = _table(2, kind="rotated", n_known=10)
    order = np.random.default_rng(0).permutation(len(known))
    shuffled = Conditions(conditions.codes[order], conditions.dose[order], conditions.context[order], 2)
    asked = conditions.ask(np.array([25]), np.ones(1))
    one = _transfer(conditions, effect)(asked, 1) @ effect[known]
    other = _transfer(shuffled, effect[order])(shuffled.ask(np.array([25]), np.ones(1)), 1) @ effect[order]
    np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4)
