"""Training against a discriminator."""

from __future__ import annotations

from typing import Any

import torch
from pyro.infer import ELBO
from torch import Tensor

from pertura.module._base import Cells

from ._plan import PyroPlan


class AdversarialPlan(PyroPlan):
    """Two optimisers in turn: a discriminator that tells the perturbation from the basal state, and everything else.

    Lightning's manual optimisation; every parameter is in exactly one optimiser. Steps are counted by the plan itself, as
    Lightning counts those of both optimisers.

    Parameters
    ----------
    module
        The module, with a ``discriminator``.
    lr_discriminator
        Learning rate of the discriminator, which does not fall.
    n_discriminator_steps
        Steps of the discriminator for each step of everything else.
    gradient_penalty
        Weight of the squared gradient, by its input, of what the discriminator says of the true perturbation. Without it both
        chase each other. (Of the sum of all logits, as CPA has it, it would not count: a softmax does not know that sum.)
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

    def adversary_share(self, progress: float) -> float:
        """Share of the adversary's weight at a share of the training."""
        span = max(self.warmup_end - self.warmup_start, 1e-9)
        return float(min(max((progress - self.warmup_start) / span, 0.0), 1.0))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """One step of the autoencoder, then some of the discriminator on the same cells."""
        main, discriminator = self.optimizers()
        total = self.trainer.num_training_batches * max(1, self.trainer.max_epochs or 1)
        self.module.adversary_share = self.adversary_share(self.n_steps / max(total, 1))
        loss, n_cells = self.loss_per_cell(batch, self.kl_weight)
        self._step(main, loss)
        cells = Cells.from_tensors(batch)
        with torch.no_grad():
            loc, _ = self.module.encode(cells, self.module.describe(cells.action, cells.context)[1])
        target = self.module.labels(cells.action)
        for _ in range(self.n_discriminator_steps):
            found = self.discriminator_loss(self.module.shown(loc), target)
            self._step(discriminator, found)
        self.n_steps += 1
        self._count("elbo_train", loss.detach(), n_cells)
        self._count("discriminator_train", found.detach(), n_cells)

    def discriminator_loss(self, shown: Tensor, target: Tensor) -> Tensor:
        """Cross-entropy, classes weighted, and the penalty of steep gradients."""
        shown = shown.detach().requires_grad_(True)
        logits = self.module.discriminator(shown)
        weight = target @ (1.0 / self.module.class_share.clamp(min=1e-6))
        entropy = -(target * logits.log_softmax(-1)).sum(-1)
        (gradient,) = torch.autograd.grad(entropy.sum(), shown, create_graph=True)
        return (weight * entropy).sum() / weight.sum() + self.gradient_penalty * gradient.square().sum(-1).mean()

    def _step(self, optimizer: Any, loss: Tensor) -> None:
        optimizer.zero_grad()
        self.manual_backward(loss)
        if self._clip["gradient_clip_val"] is not None:
            self.clip_gradients(optimizer, **self._clip)
        optimizer.step()

    def on_train_epoch_end(self) -> None:
        """Means of the epoch; learning rates fall with the epochs."""
        super().on_train_epoch_end()
        for scheduler in self._schedulers:
            scheduler.step()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """Everything else, as :class:`PyroPlan` has it, and the discriminator."""
        named = list(self.module.named_parameters())
        mine = [p for name, p in named if name.startswith("discriminator.")]
        main = self._optimizer([(n, p) for n, p in named if not n.startswith("discriminator.")])
        other = torch.optim.AdamW(mine, lr=self.lr_discriminator, weight_decay=self.weight_decay)
        # the discriminator's rate stays: it must keep up with an autoencoder that moves less and less
        scheduler = self._scheduler(main)
        self._schedulers = [] if scheduler is None else [scheduler]
        return [main, other]
