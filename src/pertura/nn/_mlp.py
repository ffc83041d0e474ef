"""Multilayer perceptrons."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm


class MLP(nn.Sequential):
    """Layers of ELU units, from `n_in` to `hidden` one after the other, optionally weight-normalised.

    Shapes: ``(..., n_in) -> (..., hidden[-1])``; with no hidden layers the identity.

    Parameters
    ----------
    n_in
        Width of the input.
    hidden
        Widths of the layers.
    use_weight_norm
        Reparametrise weights as direction and length, as Rampasek et al. do.
    dropout_rate
        Probability with which a hidden unit is dropped in training.
    """

    def __init__(
        self, n_in: int, hidden: Sequence[int], *, use_weight_norm: bool = False, dropout_rate: float = 0.0
    ) -> None:
        layers: list[nn.Module] = []
        for n_from, n_to in zip([n_in, *hidden], hidden, strict=False):
            linear = nn.Linear(n_from, n_to)
            layers += [weight_norm(linear) if use_weight_norm else linear, nn.ELU()]
            if dropout_rate > 0:
                layers.append(nn.Dropout(dropout_rate))
        super().__init__(*layers)
        self.n_out = hidden[-1] if hidden else n_in

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Hidden representation of `x`."""
        return super().forward(x)
