"""The parameters of the best epoch."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback


class KeepBest(Callback):
    """Gives the module back the parameters and buffers of its best validation when training ends.

    scvi-tools' `SaveCheckpoint` does so by way of files with the whole model, and its early stopping leaves the last epoch's.

    Parameters
    ----------
    monitor
        Name of what is logged.
    mode
        Whether the best is the ``"min"`` or the ``"max"``.
    """

    def __init__(self, monitor: str, mode: str = "min") -> None:
        self.monitor, self.sign = monitor, 1.0 if mode == "min" else -1.0
        self.best = float("inf")
        self._state: dict[str, torch.Tensor] = {}

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Keep a copy if this is the best so far."""
        found = trainer.callback_metrics.get(self.monitor)
        if trainer.sanity_checking or found is None or not self.sign * float(found) < self.best:
            return
        self.best = self.sign * float(found)
        self._state = {name: value.detach().clone() for name, value in pl_module.module.state_dict().items()}

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Give it back."""
        if self._state:
            pl_module.module.load_state_dict(self._state)
            self._state = {}

    def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
        """Give it back when the user stops the training at once."""
        self.on_train_end(trainer, pl_module)
