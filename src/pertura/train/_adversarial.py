"""Training against a discriminator."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from pyro.infer import ELBO
from torch import Tensor

from pertura.module._base import Cells

from ._plan import PyroPlan


class AdversarialModule(Protocol):
    """What a module must offer to :class:`AdversarialPlan`, beside ``model``, ``guide`` and its :class:`TrainingHooks`.

    Attributes
    ----------
    discriminator_parameters
        Beginnings of the names of the parameters that only the discriminator's optimizer changes.
    adversary_share
        Share of the adversary's full weight, from 0 to 1; the plan sets it before each step. The module's ``model`` multiplies the
        loss of being recognized by it.
    """

    discriminator_parameters: tuple[str, ...]
    adversary_share: float

    def discriminator_input(self, cells: Cells) -> Tensor:
        """What the discriminator is given of each cell, such as its basal state, ``(n_cells, n_features)``."""

    def discriminator_loss(self, given: Tensor, cells: Cells) -> tuple[Tensor, Tensor]:
        """Loss of the discriminator and weight of each cell, both ``(n_cells,)``.

        `given` is the module's :meth:`discriminator_input`. The loss must be differentiable by it.
        """


_OFFERS = ("discriminator_parameters", "adversary_share", "discriminator_input", "discriminator_loss")


class AdversarialPlan(PyroPlan):
    """Two optimizers in turn: a discriminator that tells the perturbation from the basal state, and everything else.

    Lightning's manual optimization; every parameter is in exactly one optimizer.

    Parameters
    ----------
    module
        The module, as :class:`AdversarialModule` describes it.
    lr_discriminator
        Learning rate of the discriminator, which does not fall.
    n_discriminator_steps
        Steps of the discriminator for each step of everything else.
    gradient_penalty
        Weight of the squared gradient of the discriminator's loss by its input. Without it both chase each other. (The gradient of
        the sum of all logits, which CPA penalizes, has no effect on a softmax.)
    warmup_start, warmup_end
        Shares of the training at which the adversary begins to count, and counts fully; the discriminator learns from the
        first step.
    gradient_clip_val, gradient_clip_algorithm
        As in :class:`lightning.pytorch.trainer.trainer.Trainer`, which leaves clipping to the plan.
    loss_fn, lr, weight_decay, n_epochs_kl_warmup, n_steps_kl_warmup, min_kl_weight, max_kl_weight, lr_schedule
        As in :class:`PyroPlan`.
    """

    def __init__(
        self,
        module: Any,
        *,
        lr_discriminator: float = 1e-2,
        n_discriminator_steps: int = 3,
        gradient_penalty: float = 0.1,
        warmup_start: float = 0.1,
        warmup_end: float = 0.4,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
        loss_fn: ELBO | None = None,
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        n_epochs_kl_warmup: float | None = None,
        n_steps_kl_warmup: int | None = None,
        min_kl_weight: float = 1e-6,
        max_kl_weight: float = 1.0,
        lr_schedule: str = "constant",
    ) -> None:
        missing = [name for name in _OFFERS if not hasattr(module, name)]
        if missing:
            raise TypeError(
                f"`module`: {type(module).__name__} has no {', '.join(missing)}, which `AdversarialPlan` needs. "
                "See `pertura.train.AdversarialModule`."
            )
        super().__init__(
            module,
            loss_fn=loss_fn,
            lr=lr,
            weight_decay=weight_decay,
            n_epochs_kl_warmup=n_epochs_kl_warmup,
            n_steps_kl_warmup=n_steps_kl_warmup,
            min_kl_weight=min_kl_weight,
            max_kl_weight=max_kl_weight,
            lr_schedule=lr_schedule,
        )
        self.automatic_optimization = False
        self.lr_discriminator, self.n_discriminator_steps = lr_discriminator, n_discriminator_steps
        self.gradient_penalty = gradient_penalty
        self.warmup_start, self.warmup_end = warmup_start, warmup_end
        self._clip = {"gradient_clip_val": gradient_clip_val, "gradient_clip_algorithm": gradient_clip_algorithm}
        self.n_steps = 0

    @property
    def global_step(self) -> int:
        """Steps of everything but the discriminator; Lightning counts those of both optimizers."""
        return self.n_steps

    def adversary_share(self, progress: float) -> float:
        """Share of the adversary's weight at a share of the training."""
        span = max(self.warmup_end - self.warmup_start, 1e-9)
        return float(min(max((progress - self.warmup_start) / span, 0.0), 1.0))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """One step of everything else, then some of the discriminator on the same cells."""
        main, discriminator = self.optimizers()
        self.begin_step()
        self.module.adversary_share = self.adversary_share(self.annealing)
        loss, n_cells = self.loss_per_cell(batch, self.kl_weight)
        self._step(main, loss)
        for scheduler in self._schedulers:
            scheduler.step()
        cells = Cells.from_tensors(batch)
        with torch.no_grad():
            given = self.module.discriminator_input(cells)
        for _ in range(self.n_discriminator_steps):
            found = self.discriminator_loss(given, cells)
            self._step(discriminator, found)
        self.n_steps += 1
        self._count("elbo_train", loss.detach(), n_cells)
        self._count("discriminator_train", found.detach(), n_cells)

    def discriminator_loss(self, given: Tensor, cells: Cells) -> Tensor:
        """Weighted mean over the cells, and the penalty of steep gradients."""
        given = given.detach().requires_grad_(True)
        loss, weight = self.module.discriminator_loss(given, cells)
        (gradient,) = torch.autograd.grad(loss.sum(), given, create_graph=True)
        return (weight * loss).sum() / weight.sum() + self.gradient_penalty * gradient.square().sum(-1).mean()

    def _step(self, optimizer: Any, loss: Tensor) -> None:
        optimizer.zero_grad()
        self.manual_backward(loss)
        if self._clip["gradient_clip_val"] is not None:
            self.clip_gradients(optimizer, **self._clip)
        optimizer.step()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """Everything else, as :class:`PyroPlan` has it, and the discriminator."""
        named, prefixes = list(self.module.named_parameters()), tuple(self.module.discriminator_parameters)
        mine = [p for name, p in named if name.startswith(prefixes)]
        main = self._optimizer([(n, p) for n, p in named if not n.startswith(prefixes)])
        other = torch.optim.AdamW(mine, lr=self.lr_discriminator, weight_decay=self.weight_decay)
        # the discriminator's rate stays: it must keep up with an encoder that changes less and less
        scheduler = self._scheduler(main)
        self._schedulers = [] if scheduler is None else [scheduler]
        return [main, other]
