"""Bags of cells."""

from __future__ import annotations

import numpy as np

from pertura.data._bags import BagSampler

ROWS = np.arange(100, 160)
CONTEXT = np.repeat([0, 1, 2], 20)
# contexts 0 and 1 have controls and two conditions each, context 2 a condition without controls
CONDITION = np.concatenate([np.repeat([-1, 0, 1], [10, 5, 5]), np.repeat([-1, 2, 3], [10, 5, 5]), np.full(20, 4)])


def _sampler(**options) -> BagSampler:
    return BagSampler(
        ROWS, CONDITION, CONTEXT, **{"bag_size": 7, "bags_per_batch": 3, "shuffle": True, "seed": 0, **options}
    )


def test_bags_are_of_one_condition_and_its_context():
    sampler = _sampler()
    assert (sampler.n_bags, len(sampler)) == (4, 2)
    seen = []
    for batch in sampler:
        n_bags = batch.n_pairs // 7
        assert len(batch.rows) == 2 * batch.n_pairs
        for bag in range(n_bags):
            control = batch.rows[7 * bag : 7 * bag + 7] - 100
            treated = batch.rows[batch.n_pairs + 7 * bag : batch.n_pairs + 7 * bag + 7] - 100
            assert (CONDITION[control] == -1).all()
            assert len(set(CONDITION[treated])) == 1
            assert set(CONTEXT[control]) == set(CONTEXT[treated])
            seen.append(CONDITION[treated][0])
    assert sorted(seen) == [0, 1, 2, 3]


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
