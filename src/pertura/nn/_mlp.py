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


class ResidualMLP(nn.Module):
    r"""Layers of leaky ReLU units with skip connections; several inputs are added up in the first layer.

    :math:`h_1 = \sigma(\sum_i W_i u_i + b_1)`, :math:`h_k = \sigma(W_k h_{k-1} + b_k) + h_{k-1}`. Giving inputs apart
    spares their concatenation: one that all draws share is multiplied once.

    Parameters
    ----------
    n_in
        Widths of the inputs; those of width 0 are left out.
    n_hidden
        Width of all layers.
    n_layers
        Number of layers, at least 1.
    """

    def __init__(self, n_in: Sequence[int], n_hidden: int, n_layers: int) -> None:
        super().__init__()
        self.first = nn.ModuleList(
            nn.Linear(n, n_hidden, bias=i == 0) if n else nn.Identity() for i, n in enumerate(n_in)
        )
        self.rest = nn.ModuleList(nn.Linear(n_hidden, n_hidden) for _ in range(n_layers - 1))
        self.n_out = n_hidden

    def forward(self, *inputs: torch.Tensor | None) -> torch.Tensor:
        """Hidden representation; inputs broadcast against each other, ``(..., n_in[i]) -> (..., n_hidden)``."""
        total: torch.Tensor | float = 0.0
        for layer, u in zip(self.first, inputs, strict=True):
            if u is not None and isinstance(layer, nn.Linear):
                total = total + layer(u)
        h = nn.functional.leaky_relu(total)
        for layer in self.rest:
            h = nn.functional.leaky_relu(layer(h)) + h
        return h
