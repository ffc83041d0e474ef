"""Bags of control cells with bags of treated cells beside them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from ._cells import Batch, Rows
from ._datamodule import PairSampler


class BagSampler(PairSampler):
    """Minibatches of bags: each condition once per epoch, with newly drawn cells.

    A bag is `bag_size` control cells of a context, as many of the other half of its controls, and as many treated cells of a
    condition in it, drawn with replacement. Which half comes first is drawn, too. The first are to predict the difference of the
    others: this has none of their noise. A minibatch holds the first control cells of its bags, bag after bag, then the
    other ones, then the treated ones.

    Parameters
    ----------
    rows
        Cells of this part of the data.
    condition
        Condition of each of the `rows`: equal numbers share perturbation, dose and context; -1 for control cells.
    context
        Context of each of the `rows`.
    half
        Half, 0 or 1, of each control cell among the `rows`. In a context with controls of one half these are both.
    bag_size
        Cells per bag.
    bags_per_batch
        Bags per minibatch.
    shuffle
        New cells and order every epoch; otherwise the same ones each time.
    seed
        Of cells and order.
    """

    def __init__(
        self,
        rows: Rows,
        condition: NDArray[np.int64],
        context: NDArray[np.int64],
        half: NDArray[np.int64],
        *,
        bag_size: int,
        bags_per_batch: int,
        shuffle: bool,
        seed: int = 0,
    ) -> None:
        super().__init__(rows, None, batch_size=max(1, len(rows)), shuffle=shuffle, seed=seed)
        self.bag_size = bag_size
        is_control = condition < 0
        treated = _Groups(rows[~is_control], condition[~is_control])
        control = _Groups(rows[is_control], 2 * context[is_control] + half)
        first = np.unique(condition[~is_control], return_index=True)[1]
        names = 2 * context[~is_control][first][:, None] + np.arange(2)
        there = np.isin(names, control.names)
        kept = np.flatnonzero(there.any(axis=1))
        names = np.where(there, names, names[:, ::-1])[kept]
        self._treated, self._control = treated, control
        # numbers of the treated group, and of the groups of either half of the controls
        self._bags = np.column_stack([kept, np.searchsorted(control.names, names)])
        self._n_batches = -(-len(kept) // bags_per_batch)

    @property
    def n_bags(self) -> int:
        """Number of conditions with controls."""
        return len(self._bags)

    def __iter__(self) -> Iterator[Batch]:
        rng = np.random.default_rng([self.seed, self.epoch if self.shuffle else 0])
        self.epoch += 1
        bags = self._bags[rng.permutation(len(self._bags))] if self.shuffle else self._bags
        post = self._treated.draw(bags[:, 0], self.bag_size, rng)
        side = rng.integers(2, size=len(bags)) if self.shuffle else np.zeros(len(bags), dtype=np.int64)
        pre, base = (
            self._control.draw(bags[np.arange(len(bags)), 1 + s], self.bag_size, rng) for s in (side, 1 - side)
        )
        parts = np.array_split(np.arange(len(bags)), self._n_batches) if len(bags) else []
        batches = [
            Batch(np.concatenate([v[p].ravel() for v in (pre, base, post)]), 2 * len(p) * self.bag_size)
            for p in parts
            if len(p)
        ]
        yield from self._shard(batches)


class _Groups:
    """Cells by group, to draw from many groups at once."""

    def __init__(self, rows: Rows, group: NDArray[np.int64]) -> None:
        order = np.argsort(group, kind="stable")
        self.rows = rows[order]
        self.names, self.start, self.count = np.unique(group[order], return_index=True, return_counts=True)

    def draw(self, groups: NDArray[np.int64], size: int, rng: np.random.Generator) -> Rows:
        """Cells with replacement, ``(len(groups), size)``."""
        at = rng.integers(self.count[groups][:, None], size=(len(groups), size))
        return self.rows[self.start[groups][:, None] + at]
