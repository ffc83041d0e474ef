"""Training data: the split into training and validation cells, and minibatches of pairs and singletons."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from numpy.typing import NDArray
from scvi import settings
from scvi.data import AnnDataManager
from torch.utils.data import DataLoader, Sampler

from ._cells import Batch, CellDataset, Rows
from ._pairs import Coupling


class PairSampler(Sampler[Batch]):
    """Minibatches of one epoch: every perturbed cell with a newly drawn partner, all other cells as singletons.

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
    ) -> None:
        self.rows = rows
        self.coupling = coupling
        self.shuffle = shuffle
        self.singletons = singletons
        self.seed = seed
        self.epoch = 0
        n_pairs = 0 if coupling is None else len(coupling.treated)
        self._n_batches = max(1, round((len(rows) if singletons or not n_pairs else 2 * n_pairs) / batch_size))

    def __len__(self) -> int:
        return len(self._shard(np.arange(self._n_batches)))

    def _shard(self, parts: NDArray | list) -> NDArray | list:
        """The batches of this process."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
            if len(parts) >= world:
                return parts[rank : len(parts) // world * world : world]
        return parts

    def __iter__(self) -> Iterator[Batch]:
        rng = np.random.default_rng([self.seed, self.epoch if self.shuffle else 0])
        self.epoch += 1
        if self.coupling is None or not len(self.coupling.treated):
            pre, post, singles = self.rows[:0], self.rows[:0], self.rows
        else:
            post, pre = self.coupling.treated, self.coupling.draw(rng)
            singles = np.setdiff1d(self.rows, np.concatenate([post, pre])) if self.singletons else self.rows[:0]
        order = rng.permutation(len(post)) if self.shuffle else np.arange(len(post))
        pairs = np.array_split(order, self._n_batches)
        singles = np.array_split(rng.permutation(singles) if self.shuffle else singles, self._n_batches)
        # the small halves of both splits come last: turn one around, so that batches are of equal size
        batches = [
            Batch(np.concatenate([pre[p], s, post[p]]), len(p)) for p, s in zip(pairs, singles[::-1], strict=True)
        ]
        yield from self._shard([b for b in batches if len(b.rows)])


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
        common = {"batch_size": batch_size, "singletons": singletons, "seed": seed}
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
