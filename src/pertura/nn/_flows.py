"""Normalizing flows of the guides."""

from __future__ import annotations

import pyro.distributions as dist
import pyro.distributions.transforms as T
import torch
from pyro.distributions.torch_distribution import TorchDistribution
from pyro.nn import ConditionalAutoRegressiveNN
from torch import nn
from torch.nn.utils.parametrizations import weight_norm


class InverseAutoregressiveFlow(nn.Module):
    r"""Gaussian base followed by LSTM-type inverse autoregressive steps (Kingma et al., 2016).

    A step is :math:`(m, s) = \mathrm{ARN}(z, h)`, :math:`z' = \sigma(s) \odot z + (1 - \sigma(s)) \odot m`, with log-determinant
    :math:`\sum_j \log \sigma(s_j)`; the order of the dimensions is reversed between steps. Sampling, and scoring what was
    just sampled, is parallel; other values would be inverted one dimension after the other.

    Parameters
    ----------
    n_latent
        Dimension of z.
    n_in
        Width of the hidden layer that gives mean and scale of the Gaussian.
    n_context
        Units of the layer beside mean and scale that gives the context h of the steps.
    n_steps
        Number of autoregressive steps; 0 leaves the Gaussian.
    n_hidden
        Units of the single hidden layer of each step; at least `n_latent`.
    use_weight_norm
        Whether all layers are weight-normalized.
    """

    def __init__(
        self,
        n_latent: int,
        n_in: int,
        n_context: int,
        n_steps: int = 2,
        n_hidden: int = 300,
        use_weight_norm: bool = False,
    ) -> None:
        super().__init__()
        self.n_latent = n_latent
        self.loc = nn.Linear(n_in, n_latent)
        self.log_scale = nn.Linear(n_in, n_latent)
        n_steps = n_steps if n_latent > 1 else 0
        self.context = nn.Sequential(nn.Linear(n_in, n_context), nn.ELU()) if n_steps else None
        nn.init.constant_(self.log_scale.bias, -1.0)
        # `stable` is the LSTM-type update; the gate starts almost open, so that the flow starts near the identity.
        self.steps = nn.ModuleList(
            T.ConditionalAffineAutoregressive(
                ConditionalAutoRegressiveNN(
                    n_latent,
                    n_context,
                    [max(n_hidden, n_latent)],
                    permutation=torch.arange(n_latent),
                    nonlinearity=nn.ELU(),
                ),
                stable=True,
                sigmoid_bias=2.0,
            )
            for _ in range(n_steps)
        )
        if use_weight_norm:
            for layer in [m for m in self.modules() if isinstance(m, nn.Linear)]:
                weight_norm(layer)

    def forward(self, h: torch.Tensor) -> TorchDistribution:
        """Distribution of z given the hidden layer ``h`` of shape ``(..., n_in)``; one event dimension."""
        base = dist.Normal(self.loc(h), self.log_scale(h).clamp(-7.0, 2.0).exp()).to_event(1)
        if not self.steps:
            return base
        reverse = T.Permute(torch.arange(self.n_latent - 1, -1, -1, device=h.device))
        h, transforms = self.context(h), []
        for i, step in enumerate(self.steps):
            transforms += [reverse, step.condition(h)] if i else [step.condition(h)]
        return dist.TransformedDistribution(base, transforms)

    def mean(self, h: torch.Tensor) -> torch.Tensor:
        """Where the mean of the base goes: a point summary of z, ``(..., n_latent)``."""
        z = self.loc(h)
        h = h if self.context is None else self.context(h)
        for i, step in enumerate(self.steps):
            if i:
                z = z.flip(-1)
            z = step.condition(h)(z)
        return z
