"""The training plan of all Pyro modules."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Protocol

import pyro
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from pyro.infer import ELBO, Trace_ELBO
from scvi.train import LowLevelPyroTrainingPlan
from torch import Tensor

from pertura.data._constants import KEYS
from pertura.module._base import PerturbationModule


class TrainingHooks(Protocol):
    """What a module may tell its training plan, beside ``model`` and ``guide``. Each may be missing.

    Attributes
    ----------
    lr_factors
        Learning rate of some parameters, as a factor of the plan's. Keys are beginnings of parameter names. These parameters have
        no weight decay.
    no_weight_decay
        Beginnings of the names of further parameters without weight decay. Vectors and scalars never have any.
    n_train
        Number of training cells; the plan sets it before the first step. It weighs global against local terms of the ELBO.
    """

    lr_factors: Mapping[str, float]
    no_weight_decay: Collection[str]
    n_train: int

    def on_step(self, progress: float) -> None:
        """Change what depends on time, such as a temperature; called before each step.

        Parameters
        ----------
        progress
            Share of the training that is done, from 0 to 1. Training that goes on after an earlier one begins with the share
            that the earlier one reached: 1 if it was complete.
        """


class PyroPlan(LowLevelPyroTrainingPlan):
    """Optimizes a module's parameters directly, with an ELBO per cell on training and on validation data.

    scvi-tools' `PyroTrainingPlan` optimizes the global parameter store: training after loading is then lost, a second
    model shares the first one's parameters, gradients can not be clipped, and there is no validation.

    Parameters
    ----------
    module
        The module, with a ``model`` and a ``guide``, and as many of :class:`TrainingHooks` as it needs.
    loss_fn
        Pyro objective; by default :class:`~pyro.infer.Trace_ELBO`.
    lr
        Learning rate of Adam at its peak.
    weight_decay
        Decoupled weight decay of matrices (not of biases, and not of parameters that the module names in
        `no_weight_decay`).
    n_epochs_kl_warmup
        Epochs in which the weight of the divergences rises to 1; a fraction below 1 is one of all steps.
    n_steps_kl_warmup
        The same in steps, where `n_epochs_kl_warmup` is `None`.
    min_kl_weight, max_kl_weight
        First and last weight of the divergences; validation uses the last.
    lr_schedule
        ``"cosine"`` lets the learning rate fall to zero step by step, ``"constant"`` does not.

    Attributes
    ----------
    annealed
        Share of the training that was done before, from 0 to 1; see :meth:`TrainingHooks.on_step`.
    prediction_error
        Measures how well validation cells are predicted; `None` where that is not known.
    """

    annealed: float = 0.0
    prediction_error: Callable[[], float] | None = None

    def __init__(
        self,
        module: PerturbationModule,
        *,
        loss_fn: ELBO | None = None,
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        n_epochs_kl_warmup: float | None = None,
        n_steps_kl_warmup: int | None = None,
        min_kl_weight: float = 1e-6,
        max_kl_weight: float = 1.0,
        lr_schedule: str = "constant",
    ) -> None:
        if lr_schedule not in ("constant", "cosine"):
            raise ValueError(f"`lr_schedule` must be 'constant' or 'cosine', got {lr_schedule!r}.")
        super().__init__(
            module,
            loss_fn=Trace_ELBO() if loss_fn is None else loss_fn,
            optim=torch.optim.AdamW,
            optim_kwargs={"lr": lr},
            n_epochs_kl_warmup=int(n_epochs_kl_warmup or 0) or None,
            n_steps_kl_warmup=n_steps_kl_warmup,
            min_kl_weight=min_kl_weight,
            max_kl_weight=max_kl_weight,
        )
        self.weight_decay = weight_decay
        self.lr_schedule = lr_schedule
        # sums over the cells of this epoch; handing every step to the trainer's own bookkeeping takes a tenth of its time
        self._totals: dict[str, tuple[Tensor, int]] = {}
        self._warmup_fraction = n_epochs_kl_warmup if n_epochs_kl_warmup and n_epochs_kl_warmup < 1 else None

    def setup(self, stage: str) -> None:
        """Tell the module the size of the data."""
        self.module.n_train = self.n_obs_training or 1

    def on_train_start(self) -> None:
        """Turn a fractional warm-up into steps, whose number is known by now, and give each process its own draws."""
        if self.global_rank:
            torch.manual_seed(torch.initial_seed() + self.global_rank)
        if self._warmup_fraction and self._n_steps:
            self.n_steps_kl_warmup = max(1, round(self._warmup_fraction * self._n_steps))

    def on_train_end(self) -> None:
        """Give all processes the first one's running statistics, which differ since the last step."""
        if self.trainer.world_size > 1:
            for buffer in self.module.buffers():
                if buffer.is_floating_point():
                    torch.distributed.broadcast(buffer, 0)

    @property
    def _n_steps(self) -> int | None:
        """Number of all steps; `None` where training has no end."""
        n = self.trainer.estimated_stepping_batches
        return max(1, int(n)) if 0 < n < float("inf") else None

    def loss_per_cell(self, batch: dict[str, Tensor], kl_weight: float) -> tuple[Tensor, int]:
        """Negative ELBO per cell, and the number of cells.

        Raises
        ------
        FloatingPointError
            If it is not finite.
        """
        args, kwargs = self.module._get_fn_args_from_batch(batch)
        if self.use_kl_weight:
            kwargs = {**kwargs, "kl_weight": kl_weight}
        n_cells = len(batch[KEYS.X])
        try:
            loss = self.differentiable_loss_fn(self.module.model, self.module.guide, *args, **kwargs) / n_cells
        except ValueError as error:
            # distributions refuse parameters that are not finite before there is a loss
            if "invalid values" not in str(error):
                raise
            what = f"A parameter became nan or infinite: {str(error).partition(chr(10))[0]}"
            raise FloatingPointError(self._not_finite(what)) from error
        if not torch.isfinite(loss):
            raise FloatingPointError(self._not_finite(f"The loss became {loss.item()}."))
        return loss, n_cells

    def _not_finite(self, what: str) -> str:
        return (
            f"{what} Training stopped in epoch {self.current_epoch}; the parameters are those of the last step. Try a "
            "smaller learning rate (`lr=1e-4`), gradient clipping (`gradient_clip_val=10`), and check the expression "
            "for extreme values."
        )

    @property
    def annealing(self) -> float:
        """Share of the training that is done, from 0 to 1, earlier training included."""
        done = min(self.global_step / max(1, self.trainer.estimated_stepping_batches), 1.0)
        return self.annealed + (1.0 - self.annealed) * done

    def begin_step(self) -> None:
        """Tell the module how much of the training is done, if it asks."""
        if hasattr(self.module, "on_step"):
            self.module.on_step(self.annealing)

    def epoch_means(self) -> dict[str, float]:
        """Means of this epoch so far, over its cells."""
        return {name: float(total) / n_cells for name, (total, n_cells) in self._totals.items()}

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """One step on a minibatch."""
        self.begin_step()
        # Pyro's checks of every value and shape take a sixth of a step: the first minibatch of each epoch has them
        with pyro.validation_enabled(batch_idx == 0 and pyro.settings.get("validate_poutine")):
            loss, n_cells = self.loss_per_cell(batch, self.kl_weight)
        self._count("elbo_train", loss.detach(), n_cells)
        return loss

    def on_train_epoch_end(self) -> None:
        """Log means over the cells of the epoch, and how far warm-up and annealing are: later training starts there."""
        for name, (total, n_cells) in self._totals.items():
            self._log(name, total / n_cells, n_cells)
        self._totals.clear()
        if self.use_kl_weight:
            self.log("kl_weight", self.kl_weight, on_step=False, on_epoch=True, sync_dist=True)
        self.log("annealing", self.annealing, on_step=False, on_epoch=True, sync_dist=True)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Negative ELBO of held-out cells, without warm-up."""
        loss, n_cells = self.loss_per_cell(batch, self.max_kl_weight)
        self._log("elbo_validation", loss, n_cells)

    def on_validation_epoch_end(self) -> None:
        """Error of predictions of held-out cells."""
        if self.prediction_error is not None and not self.trainer.sanity_checking:
            self.log("prediction_validation", self.prediction_error(), prog_bar=True, sync_dist=True)

    def _count(self, name: str, value: Tensor, n_cells: int) -> None:
        total, seen = self._totals.get(name, (0.0, 0))
        self._totals[name] = total + value * n_cells, seen + n_cells

    def _log(self, name: str, value: Tensor, n_cells: int) -> None:
        """Mean over the cells of an epoch, in all processes."""
        self.log(name, value, on_step=False, on_epoch=True, prog_bar=True, batch_size=n_cells, sync_dist=True)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW; groups with and without weight decay, and with the module's own learning rates."""
        optimizer = self._optimizer(list(self.module.named_parameters()))
        scheduler = self._scheduler(optimizer)
        if scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _optimizer(self, named: list[tuple[str, torch.nn.Parameter]]) -> torch.optim.Optimizer:
        decay, plain, own = [], [], []
        special: dict[str, float] = getattr(self.module, "lr_factors", {})
        skip: set[str] = getattr(self.module, "no_weight_decay", set())
        for name, parameter in named:
            if not parameter.requires_grad:
                continue
            factor = next((f for prefix, f in special.items() if name.startswith(prefix)), None)
            if factor is not None:
                own.append({"params": [parameter], "weight_decay": 0.0, "lr": self.optim_kwargs["lr"] * factor})
            elif parameter.dim() < 2 or any(name.startswith(s) for s in skip):
                plain.append(parameter)
            else:
                decay.append(parameter)
        groups = [
            {"params": decay, "weight_decay": self.weight_decay},
            {"params": plain, "weight_decay": 0.0},
            *own,
        ]
        # one pass over all parameters; where precision is mixed, Lightning does not clip gradients for it
        how = dict(self.optim_kwargs)
        if self.optim is torch.optim.AdamW and "mixed" not in str(getattr(self._trainer, "precision", "")):
            how["fused"] = True
        return self.optim([g for g in groups if g["params"]], **how)

    def _scheduler(self, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler | None:
        if self.lr_schedule == "constant" or self._n_steps is None:
            return None
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=self._n_steps)
