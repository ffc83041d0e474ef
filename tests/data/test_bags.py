"""Bags of cells."""

from __future__ import annotations

import numpy as np

from pertura.data._bags import BagSampler

ROWS = np.arange(100, 160)
CONTEXT = np.repeat([0, 1, 2], 20)
# contexts 0 and 1 have controls and two conditions each, context 2 a condition without controls
CONDITION = np.concatenate([np.repeat([-1, 0, 1], [10, 5, 5]), np.repeat([-1, 2, 3], [10, 5, 5]), np.full(20, 4)])
HALF = np.tile([0, 1], 30)


def _sampler(half=HALF, **options) -> BagSampler:
    return BagSampler(
        ROWS,
        CONDITION,
        CONTEXT,
        half[CONDITION < 0],
        **{"bag_size": 7, "bags_per_batch": 3, "shuffle": True, "seed": 0, **options},
    )


def _parts(batch, size=7):
    """Control cells, other control cells and treated cells of each bag, as positions in the arrays above."""
    n = batch.n_pairs // 2
    assert len(batch.rows) == 3 * n and n % size == 0
    return (batch.rows - 100).reshape(3, -1, size).swapaxes(0, 1)


def test_bags_are_of_one_condition_and_its_context():
    sampler = _sampler()
    assert (sampler.n_bags, len(sampler)) == (4, 2)
    seen = []
    for batch in sampler:
        for control, other, treated in _parts(batch):
            assert (CONDITION[control] == -1).all() and (CONDITION[other] == -1).all()
            assert len(set(CONDITION[treated])) == 1
            assert set(CONTEXT[control]) == set(CONTEXT[treated]) == set(CONTEXT[other])
            seen.append(CONDITION[treated][0])
    assert sorted(seen) == [0, 1, 2, 3]


def test_what_predicts_and_what_is_predicted_have_other_controls():
    sampler = _sampler(bags_per_batch=4)
    first = []
    for _ in range(20):
        for batch in sampler:
            for control, other, _ in _parts(batch):
                assert len(set(HALF[control])) == 1 and set(HALF[control]) == {1 - HALF[other[0]]} == {
                    1 - h for h in HALF[other]
                }
                first.append(HALF[control[0]])
    assert 0.3 < np.mean(first) < 0.7  # either half is asked with
    alone = np.where(CONTEXT == 0, 1, HALF)  # a context with controls of one half: there is nothing to divide
    for batch in _sampler(alone):
        for control, other, _ in _parts(batch):
            if CONTEXT[control[0]] == 0:
                assert (alone[control] == 1).all() and (alone[other] == 1).all()
            else:
                assert not set(control) & set(other)


def test_draws_are_new_each_epoch_and_repeat_with_the_seed():
    one, two = _sampler(), _sampler()
    first, second = [b.rows for b in one], [b.rows for b in one]
    again = [b.rows for b in two]
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    assert any((a != b).any() for a, b in zip(first, second, strict=True))
    still = _sampler(shuffle=False)
    assert all((a.rows == b.rows).all() for a, b in zip(list(still), list(still), strict=True))


def test_cells_are_drawn_evenly():
    sampler = _sampler(bag_size=3000, bags_per_batch=4)
    (batch,) = list(sampler)
    treated = batch.rows[batch.n_pairs :]
    number = np.bincount(treated - 100, minlength=60)[CONDITION >= 0][:20]
    assert number.min() > 500 and number.max() < 700
