"""Training of encoder and decoder, and of the gene regulatory network, in turn."""

from __future__ import annotations

from typing import Any

import torch
from pyro.infer import ELBO

from ._elbo import ClosedFormELBO
from ._plan import PyroPlan

_OPTIMIZERS = ("adam", "rmsprop")


class AlternatingPlan(PyroPlan):
    """Trains all parameters at once, or encoder and decoder in some epochs and the gene regulatory network in others.

    These are the two steps of DeepSEM. What the module names in ``lr_factors`` (the gene regulatory network and its prior) is one
    part, everything else the other. The part that waits gets no gradients, so that its optimizer keeps its state.

    Parameters
    ----------
    module
        The module.
    optimizer
        ``"adam"`` (with decoupled weight decay) or ``"rmsprop"``.
    betas
        Decay of Adam's moments.
    grn_lr_factor
        Multiplies the learning rates in ``lr_factors``.
    n_epochs_networks, n_epochs_grn
        Epochs in turn of encoder and decoder (neural networks), and of the gene regulatory network; 0 of both trains everything at
        once.
    loss_fn, lr, weight_decay, n_epochs_kl_warmup, n_steps_kl_warmup, min_kl_weight, max_kl_weight, lr_schedule
        As in :class:`PyroPlan`; the loss is by default one with divergences in closed form.
    """

    def __init__(
        self,
        module: Any,
        *,
        optimizer: str = "adam",
        betas: tuple[float, float] = (0.9, 0.9),
        grn_lr_factor: float = 1.0,
        n_epochs_networks: int = 0,
        n_epochs_grn: int = 0,
        loss_fn: ELBO | None = None,
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        n_epochs_kl_warmup: float | None = None,
        n_steps_kl_warmup: int | None = None,
        min_kl_weight: float = 1e-6,
        max_kl_weight: float = 1.0,
        lr_schedule: str = "constant",
    ) -> None:
        if optimizer not in _OPTIMIZERS:
            raise ValueError(f"`optimizer` must be one of {_OPTIMIZERS}, got {optimizer!r}.")
        if (n_epochs_networks > 0) != (n_epochs_grn > 0):
            raise ValueError("`n_epochs_networks` and `n_epochs_grn` must both be above 0, or both be 0.")
        super().__init__(
            module,
            loss_fn=ClosedFormELBO() if loss_fn is None else loss_fn,
            lr=lr,
            weight_decay=weight_decay,
            n_epochs_kl_warmup=n_epochs_kl_warmup,
            n_steps_kl_warmup=n_steps_kl_warmup,
            min_kl_weight=min_kl_weight,
            max_kl_weight=max_kl_weight,
            lr_schedule=lr_schedule,
        )
        if optimizer == "rmsprop":
            self.optim = torch.optim.RMSprop
        else:
            self.optim_kwargs["betas"] = tuple(betas)
        self.grn_lr_factor = grn_lr_factor
        self.n_epochs_networks, self.n_epochs_grn = n_epochs_networks, n_epochs_grn

    def _optimizer(self, named: list[tuple[str, torch.nn.Parameter]]) -> torch.optim.Optimizer:
        optimizer = super()._optimizer(named)
        prefixes = tuple(self.module.lr_factors)
        own = {id(parameter) for name, parameter in named if name.startswith(prefixes)}
        for group in optimizer.param_groups:
            if id(group["params"][0]) in own:
                group["lr"] *= self.grn_lr_factor
        return optimizer

    def waits(self, epoch: int) -> str | None:
        """Which part is not trained in an epoch: ``"grn"``, ``"networks"`` or `None`."""
        if self.n_epochs_grn == 0:
            return None
        return "grn" if epoch % (self.n_epochs_networks + self.n_epochs_grn) < self.n_epochs_networks else "networks"

    def on_after_backward(self) -> None:
        """Drop the gradients of the part that waits."""
        waiting = self.waits(self.current_epoch)
        if waiting is None:
            return
        prefixes = tuple(self.module.lr_factors)
        for name, parameter in self.module.named_parameters():
            if name.startswith(prefixes) == (waiting == "grn"):
                parameter.grad = None
