"""scvi-tools' trainer, which an interruption stops without losing what was learned."""

from __future__ import annotations

import logging
import signal
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from scvi import settings
from scvi.train import Trainer as ScviTrainer
from scvi.train import TrainRunner as ScviTrainRunner

# what Lightning and PyTorch say of any model that scvi-tools trains
_NOT_FOR_USERS = (
    r".*does not have many workers.*",
    r".*The number of training batches.*",
    r".*isinstance\(treespec, LeafSpec\).*",
    r".*[GT]PU available but not used.*",
)


class Trainer(ScviTrainer):
    """Stops after the step that Ctrl-C meets, and keeps errors for later.

    :class:`scvi.train.TrainRunner` prints errors under a wrong name, and Lightning leaves the interpreter on Ctrl-C. Therefore
    :meth:`fit` returns normally after both, and :class:`TrainRunner` raises the error afterwards.

    Attributes
    ----------
    interrupted
        Whether the user stopped the training.
    error
        What ended the training otherwise, or `None`.
    """

    interrupted: bool = False
    error: BaseException | None = None

    @property
    def n_steps(self) -> int:
        """Minibatches on which the model was trained."""
        return self.fit_loop.epoch_loop.batch_progress.total.processed

    @property
    def n_epochs(self) -> float:
        """Epochs that were trained; the last may be a fraction."""
        return self.n_steps / max(self.num_training_batches, 1)

    def fit(self, *args: Any, **kwargs: Any) -> None:
        """Train; the first Ctrl-C lets the step finish, a second one does not."""
        try:
            with self._interruptible():
                super().fit(*args, **kwargs)
        except (KeyboardInterrupt, SystemExit) as error:
            # Lightning turns one into the other
            by_user = isinstance(error, KeyboardInterrupt) or isinstance(error.__context__, KeyboardInterrupt)
            self.interrupted = by_user
            if not by_user or self.world_size > 1:
                self.error = error
        except Exception as error:
            if getattr(settings, "mlflow_set_tracking_uri", ""):  # the run is logged as failed
                raise
            self.error = error
        if self.interrupted and self.error is None and not self.n_steps:
            self.error = KeyboardInterrupt()

    @contextmanager
    def _interruptible(self) -> Iterator[None]:
        """Let SIGINT ask for a stop; several processes would not stop at the same step."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.getsignal(signal.SIGINT)

        def stop(number: int, frame: Any) -> None:
            if self.interrupted:
                before(number, frame)
            self.interrupted = self.should_stop = True

        if callable(before) and self.world_size == 1:
            signal.signal(signal.SIGINT, stop)
        try:
            yield
        finally:
            if before is not None:  # Lightning ignores further signals after one, and leaves it at that
                signal.signal(signal.SIGINT, before)


class TrainRunner(ScviTrainRunner):
    """Trains with :class:`Trainer`, and raises what ended the training once history and devices are in order."""

    _trainer_cls = Trainer

    def __call__(self) -> None:
        """Train."""
        was_trained = self.model.is_trained_
        super().__call__()
        if self.trainer.error is not None:
            self.model.is_trained_ = was_trained
            raise self.trainer.error


@contextmanager
def quiet() -> Iterator[None]:
    """Hide what Lightning says of devices, loaders and its other products, and leave its loggers as they were.

    Nothing is hidden where ``scvi.settings.verbosity`` is `logging.DEBUG`.
    """
    if logging.getLogger("scvi").level <= logging.DEBUG:
        yield
        return
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        for message in _NOT_FOR_USERS:
            warnings.filterwarnings("ignore", message=message)
        try:
            for logger in loggers:
                logger.setLevel(max(logger.level, logging.WARNING))
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
