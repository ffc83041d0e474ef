"""One progress bar for everything that training does."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ProgressBar as LightningBar
from lightning.pytorch.utilities import rank_zero_only
from scvi.utils import track
from tqdm.notebook import tqdm_notebook

T = TypeVar("T")

# The percentages at which each part begins and ends. How long the parts take is not known beforehand.
_PARTS = {"prepare": (0.0, 5.0), "train": (5.0, 95.0), "finish": (95.0, 100.0)}
_FORMAT = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"


class Progress:
    """A bar from the first read to the last measured effect, in stages.

    While a model trains, its hooks find the bar as ``self._progress``. At all other times that is a bar which shows nothing, so
    that a hook need not ask.

    Parameters
    ----------
    shown
        Whether there is a bar. It also needs ``scvi.settings.verbosity`` to be below `logging.ERROR`, and is shown by the first of
        several processes only.

    Examples
    --------
    >>> for block in self._progress.track(blocks, "Measuring effects", total=len(blocks)):
    ...     measure(block)
    """

    def __init__(self, shown: bool = False) -> None:
        self._bar: Any = None
        self._values: Callable[[], Mapping[str, float]] | None = None
        self._end = self._from = self._to = 0.0
        self._total: float | None = None
        self._done = self._drawn = 0.0
        self._ends = ""
        if shown and rank_zero_only.rank == 0 and logging.getLogger("scvi").level < logging.ERROR:
            # scvi-tools shows training with tqdm in both of its styles
            self._bar = track(
                None,
                "Training",
                style="tqdm",
                total=100.0,
                bar_format=_FORMAT,
                mininterval=0,
                miniters=0,
                smoothing=0.05,
            )
            # lines of a log file are not overwritten
            plain = not isinstance(self._bar, tqdm_notebook) and not sys.stdout.isatty()
            self._every = 1.0 if plain else 0.1

    def __getstate__(self) -> dict[str, Any]:
        """Bars are not copied, and are not sent to other processes."""
        return {**self.__dict__, "_bar": None, "_values": None}

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Show the end, or remove the bar if something went wrong."""
        bar, self._bar, self._values = self._bar, None, None
        if bar is None:
            return
        if kind is None:
            bar.n = bar.total
            bar.set_description_str(self._ends or "Trained")
        else:
            bar.leave = False
        bar.close()

    def part(self, name: str) -> None:
        """Begin one of ``"prepare"``, ``"train"`` and ``"finish"``."""
        self._from, self._end = _PARTS[name]
        self._to, self._total, self._done = self._from, None, 0.0

    def stage(self, name: str, total: float | None = None, share: float = 0.5) -> None:
        """Begin a stage of this part.

        Parameters
        ----------
        name
            What is done, such as ``"Measuring effects"``.
        total
            Number of steps; `None` where they are not counted.
        share
            Share of what is left of this part.
        """
        self._from = self._to
        self._to, self._total, self._done = self._from + share * (self._end - self._from), total, 0.0
        self.describe(name)

    def describe(self, name: str) -> None:
        """Say what is done now."""
        if self._bar is not None:
            self._bar.set_description_str(name, refresh=False)
            self._draw()

    def advance(self, n: float = 1) -> None:
        """Report further steps of this stage."""
        self.reach(self._done + n)

    def reach(self, done: float) -> None:
        """Report how many steps of this stage are done in all."""
        self._done = done
        if self._bar is not None and time.monotonic() - self._drawn >= self._every:
            self._draw()

    def track(self, items: Iterable[T], name: str, total: float | None = None, share: float = 0.5) -> Iterator[T]:
        """Iterate, with a stage of one step for each item."""
        self.stage(name, len(items) if total is None and hasattr(items, "__len__") else total, share)
        for item in items:
            yield item
            self.advance()

    def show_values(self, values: Callable[[], Mapping[str, float]]) -> None:
        """Numbers beside the bar; `values` is called when the bar is drawn."""
        self._values = values

    def ends_with(self, name: str) -> None:
        """Say what the bar is to say at its end."""
        self._ends = name

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Take the bar away while something else is printed."""
        if self._bar is not None:
            self._bar.clear()
        yield
        if self._bar is not None:
            self._bar.refresh()

    def _draw(self) -> None:
        self._drawn = time.monotonic()
        if self._values is not None:
            self._bar.set_postfix({name: f"{value:.5g}" for name, value in self._values().items()}, refresh=False)
        share = min(self._done / self._total, 1.0) if self._total else 0.0
        self._bar.update(max(self._from + share * (self._to - self._from) - self._bar.n, 0.0))


class EpochProgress(LightningBar):
    """Epochs and the steps within them, on the bar that `train` has begun.

    Beside the bar are the means of the epoch so far (``epoch_means`` of the plan) and what was logged for the last epoch.

    Parameters
    ----------
    progress
        The bar.
    """

    def __init__(self, progress: Progress) -> None:
        super().__init__()
        self.progress = progress
        self._last: dict[str, float] = {}

    def disable(self) -> None:
        """Show nothing; the trainer calls it in all processes but the first."""
        self.progress = Progress()

    def enable(self) -> None:
        """Nothing to do: the bar is there from the start."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin the part of the epochs."""

        def values() -> dict[str, float]:
            so_far = pl_module.epoch_means() if hasattr(pl_module, "epoch_means") else {}
            return {**self._last, **so_far}

        self.progress.part("train")
        self.progress.show_values(values)
        self.progress.stage("Epoch 1", total=max(trainer.max_epochs or 1, 1), share=1.0)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Name the epoch."""
        self._keep(trainer)
        self.progress.describe(f"Epoch {trainer.current_epoch + 1}/{trainer.max_epochs}")

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """One step further."""
        self.progress.reach(trainer.current_epoch + (batch_idx + 1) / trainer.num_training_batches)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Show what the last epoch came to; the plan is not needed any more."""
        self._keep(trainer)
        last = dict(self._last)
        self.progress.show_values(lambda: last)

    def _keep(self, trainer: pl.Trainer) -> None:
        self._last = {name: float(value) for name, value in trainer.progress_bar_metrics.items()}
