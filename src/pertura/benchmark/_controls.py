"""Control cells of a split: those that models learn from and start from, and those that the truth is measured against."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from pertura.data import Split

from ._dataset import Dataset

logger = logging.getLogger(__name__)

Protocol = Literal["halves", "shared"]
Rows = NDArray[np.intp]
# controls of a context, at least, on either side
_MIN_CONTROLS = 10


@dataclass(frozen=True, eq=False)
class Controls:
    """Rows of a data set.

    Attributes
    ----------
    train
        What models train on: the training rows of the split without the reference controls.
    asked
        By context: controls that predictions start from.
    reference
        By context: controls that the true effect is measured against.
    """

    train: Rows
    asked: dict[str, Rows]
    reference: dict[str, Rows]

    def protocol(self, context: str) -> Protocol:
        """Whether both sides of a context have controls of their own."""
        return "shared" if np.intersect1d(self.asked[context], self.reference[context]).size else "halves"


def divide_controls(dataset: Dataset, split: Split, protocol: Protocol = "halves", *, max_controls: int) -> Controls:
    """Divide the controls of the contexts that have held-out cells.

    Parameters
    ----------
    dataset, split
        Cells, and those that are held out.
    protocol
        ``"halves"``: a random half of the controls, drawn by context and batch from the seed of the split, is the reference and
        trains no model; predictions start from the others. Where a split holds out controls of its own, these are the reference.
        A context with fewer than 20 controls keeps ``"shared"`` ones. ``"shared"``: predictions start from the reference
        controls: those held out, or else those that train.
    max_controls
        Predictions start from a random subset of this size of more controls.
    """
    if protocol not in get_args(Protocol):
        raise ValueError(f"`controls` must be 'halves' or 'shared', got {protocol!r}.")
    context, is_control = dataset.contexts, dataset.labels == dataset.control
    part = np.zeros(len(context), dtype=np.int8)
    part[split.train], part[split.test] = 1, 2
    batch_key = (dataset.setup or {}).get("batch_key")
    batch = context if batch_key is None else dataset.adata.obs[batch_key].astype(str).to_numpy(dtype=str)
    half_rng, rng = np.random.default_rng([split.seed or 0, 1]), np.random.default_rng(0)
    asked: dict[str, Rows] = {}
    reference: dict[str, Rows] = {}
    for name in np.unique(context[(part == 2) & ~is_control]):
        train, test = (np.flatnonzero(is_control & (context == name) & (part == p)) for p in (1, 2))
        sides = None
        if protocol == "halves":
            sides = (train, test) if min(len(train), len(test)) >= _MIN_CONTROLS else None
            sides = sides or _halves(np.concatenate([train, test]), batch, half_rng)
            if len(sides[1]) < _MIN_CONTROLS:
                logger.warning(
                    "Context %r of split %r has %d control cells, too few for halves of at least %d: predictions and truth "
                    "share them.",
                    *(name, split.name, len(train) + len(test), _MIN_CONTROLS),
                )
                sides = None
        same = _some(test if len(test) else train, max_controls, rng) if sides is None else None
        if same is not None and len(same) < 2:
            logger.warning("Context %r of split %r has no control cells: it is not scored.", name, split.name)
            continue
        asked[name], reference[name] = (same, same) if sides is None else (_some(sides[0], max_controls, rng), sides[1])
    if not asked:
        raise ValueError(f"`splits`: no held-out context of {split.name!r} has control cells to start from.")
    # shared controls of training stay there
    own = [rows for name, rows in reference.items() if asked[name] is not rows]
    return Controls(np.setdiff1d(split.train, np.concatenate([*own, split.test])), asked, reference)


def _halves(rows: Rows, batch: NDArray[np.str_], rng: np.random.Generator) -> tuple[Rows, Rows]:
    """Random halves with equal shares of each batch; the first has the odd row."""
    order = rows[np.lexsort((rng.random(len(rows)), batch[rows]))]
    return np.sort(order[::2]), np.sort(order[1::2])


def _some(rows: Rows, n: int, rng: np.random.Generator) -> Rows:
    return np.sort(rng.choice(rows, n, replace=False)) if len(rows) > n else rows
