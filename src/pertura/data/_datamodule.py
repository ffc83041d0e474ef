"""Training data: the split into training and validation cells, and minibatches of pairs and singletons."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import zip_longest

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from numpy.typing import NDArray
from scvi import settings
from scvi.data import AnnDataManager
from torch.utils.data import DataLoader, Sampler

from ._cells import CHUNK, Batch, CellDataset, Rows
from ._pairs import Coupling


class PairSampler(Sampler[Batch]):
    """Minibatches of one epoch: every perturbed cell with a newly drawn partner, all other cells as singletons.

    Cells of a file come in windows. A window is made of chunks of neighboring rows from places all over the file, in random order; its
    cells are shuffled and parted into minibatches. Partners come from a reservoir of controls of every stratum, which is drawn anew each
    epoch where not all controls fit into it. Partners with other weights, and registered pairs of many controls, are read with the window.

    Parameters
    ----------
    rows
        Cells of this part of the data.
    coupling
        Partners, or `None` for plain minibatches.
    batch_size
        Number of distinct cells per minibatch, about.
    shuffle
        New order and partners every epoch; otherwise the same ones each time.
    singletons
        Whether cells outside the pairs take part.
    seed
        Of partners and order.
    window
        Number of cells of a file in memory, and in the reservoir; `None` for cells that are in memory. Cells that all fit come in the same
        order as from memory.
    chunk
        Number of neighboring rows of a file that are read together.
    n_workers
        Processes that read: each has its own window.
    """

    def __init__(
        self,
        rows: Rows,
        coupling: Coupling | None,
        *,
        batch_size: int,
        shuffle: bool,
        singletons: bool = True,
        seed: int = 0,
        window: int | None = None,
        chunk: int = CHUNK,
        n_workers: int = 0,
    ) -> None:
        self.rows = rows
        self.coupling = coupling
        self.shuffle = shuffle
        self.singletons = singletons
        self.seed = seed
        self.window, self.chunk = window, chunk
        self.n_workers = n_workers
        self.epoch = 0
        n_pairs = 0 if coupling is None else len(coupling.treated)
        self._n_batches = max(1, round((len(rows) if singletons or not n_pairs else 2 * n_pairs) / batch_size))

    def __len__(self) -> int:
        return len(self._shard(np.arange(self._n_batches)))

    def _process(self, n_parts: int) -> tuple[int, int]:
        """Number of this process and of all that share an epoch of so many minibatches."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
            if n_parts >= world:
                return rank, world
        return 0, 1

    def _shard(self, parts: NDArray | list) -> NDArray | list:
        """The batches of this process."""
        rank, world = self._process(len(parts))
        return parts[rank : len(parts) // world * world : world]

    def __iter__(self) -> Iterator[Batch]:
        rng = np.random.default_rng([self.seed, self.epoch if self.shuffle else 0])
        self.epoch += 1
        fits = self.window is None or len(self.rows) <= self.window
        reservoir = self.rows[:0]
        if self.coupling is None or not len(self.coupling.treated):
            pre, post, singles = self.rows[:0], self.rows[:0], self.rows
        else:
            coupling = self.coupling if fits else self.coupling.reservoir(self.window, rng)
            post, pre = coupling.treated, coupling.draw(rng)
            singles = np.setdiff1d(self.rows, np.concatenate([post, pre])) if self.singletons else self.rows[:0]
            controls = np.unique(coupling.partners)
            reservoir = controls if not fits and len(controls) <= self.window else reservoir
        if not fits:
            yield from self._windows(pre, post, singles, reservoir, rng)
            return
        held = () if self.window is None else (np.sort(self.rows),)
        yield from self._shard(self._mixed(pre, post, singles, self._n_batches, held, rng))

    def _mixed(
        self, pre: Rows, post: Rows, singles: Rows, n: int, held: tuple[Rows, ...], rng: np.random.Generator
    ) -> list[Batch]:
        """Minibatches of equal shares of pairs and singletons."""
        order = rng.permutation(len(post)) if self.shuffle else np.arange(len(post))
        pairs = np.array_split(order, n)
        singles = np.array_split(rng.permutation(singles) if self.shuffle else singles, n)
        # the small halves of both splits come last: turn one around, so that batches are of equal size
        batches = (np.concatenate([pre[p], s, post[p]]) for p, s in zip(pairs, singles[::-1], strict=True))
        return [Batch(rows, len(p), held) for rows, p in zip(batches, pairs, strict=True) if len(rows)]

    def _windows(
        self, pre: Rows, post: Rows, singles: Rows, reservoir: Rows, rng: np.random.Generator
    ) -> Iterator[Batch]:
        """The minibatches of this process, window by window."""
        cells = np.concatenate([post, singles])
        partner = np.concatenate([pre, np.full(len(singles), -1)])
        chunks, chunk = np.unique(cells // self.chunk, return_inverse=True)
        place = rng.permutation(len(chunks)) if self.shuffle else np.arange(len(chunks))
        order = np.lexsort((cells, place[chunk]))
        cells, partner = cells[order], partner[order]
        rank, world = self._process(self._n_batches)
        n = self._n_batches // world
        # a pair is two cells of a minibatch
        size = np.append(0, np.cumsum(1 + (partner >= 0)))
        edges = np.searchsorted(size, np.linspace(0, size[-1], n * world + 1))
        per_window = max(1, int(self.window * n * world / size[-1]))

        def window(batches: NDArray[np.int64]) -> tuple[Rows, ...]:
            at = slice(edges[batches[0]], edges[batches[-1] + 1])
            cell, other = cells[at], partner[at]
            own = np.union1d(cell, np.setdiff1d(other[other >= 0], reservoir))
            return cell, other, own

        def lane(batches: NDArray[np.int64]) -> Iterator[Batch]:
            parts = np.array_split(batches, -(-len(batches) // per_window))
            coming = map(window, parts)
            after = next(coming)
            for part in parts:
                (cell, other, own), after = after, next(coming, None)
                held = (own, reservoir) if len(reservoir) else (own,)
                paired = other >= 0
                mixed = self._mixed(other[paired], cell[paired], cell[~paired], len(part), held, rng)
                yield from mixed if after is None else (batch._replace(ahead=after[-1]) for batch in mixed)

        # minibatches go to the workers in turn
        lanes = [b for b in np.array_split(rank * n + np.arange(n), max(1, self.n_workers)) if len(b)]
        yield from (batch for turn in zip_longest(*map(lane, lanes)) for batch in turn if batch is not None)


class PerturbationDataModule(LightningDataModule):
    """Loaders of training and validation cells.

    Parameters
    ----------
    manager
        Registered data.
    train_idx, val_idx
        Rows.
    train_coupling, val_coupling
        Partners within each part, or `None` for models that do not compare pairs.
    batch_size
        Cells per minibatch.
    singletons
        Whether cells outside the pairs take part.
    seed
        Of partners and order.
    samplers
        Minibatches of training and validation cells, for models that form them otherwise.
    """

    def __init__(
        self,
        manager: AnnDataManager,
        train_idx: Rows,
        val_idx: Rows,
        *,
        train_coupling: Coupling | None = None,
        val_coupling: Coupling | None = None,
        batch_size: int = 128,
        singletons: bool = True,
        seed: int = 0,
        samplers: tuple[PairSampler, PairSampler | None] | None = None,
    ) -> None:
        super().__init__()
        self.train_idx, self.val_idx = train_idx, val_idx
        self.test_idx = np.setdiff1d(np.arange(manager.adata.n_obs), np.concatenate([train_idx, val_idx]))
        self.n_train, self.n_val = len(train_idx), len(val_idx)
        self.dataset = CellDataset(manager)
        self.batch_size, self.seed = batch_size, seed
        if samplers is not None:
            self._train, self._val = samplers
            return
        common = {
            "batch_size": batch_size,
            "singletons": singletons,
            "seed": seed,
            "window": self.dataset.expression.window,
            "chunk": self.dataset.expression.chunk,
            "n_workers": settings.dl_num_workers,
        }
        self._train = PairSampler(train_idx, train_coupling, shuffle=True, **common)
        self._val = PairSampler(val_idx, val_coupling, shuffle=False, **common) if len(val_idx) else None

    def pair(self, train: Coupling, val: Coupling | None) -> None:
        """Replace the partners of the same cells."""
        self._train.coupling = train
        if self._val is not None:
            self._val.coupling = val

    def _loader(self, sampler: PairSampler) -> DataLoader:
        return DataLoader(
            self.dataset,
            sampler=sampler,
            batch_size=None,
            num_workers=settings.dl_num_workers,
            persistent_workers=settings.dl_persistent_workers and settings.dl_num_workers > 0,
        )

    def train_dataloader(self) -> DataLoader:
        """Minibatches of training cells."""
        return self._loader(self._train)

    def val_dataloader(self) -> DataLoader | list:
        """Minibatches of validation cells."""
        return [] if self._val is None else self._loader(self._val)

    def iterate(self, rows: Rows, batch_size: int = 1024) -> Iterator[dict[str, torch.Tensor | int]]:
        """Tensors of the given rows, in order."""
        for start in range(0, len(rows), batch_size):
            yield self.dataset[Batch(rows[start : start + batch_size], 0)]
