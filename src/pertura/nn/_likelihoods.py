"""What a decoder's output says about the measured expression, and back again.

Each likelihood gives the distribution of expression, and the two steps of a counterfactual that belong to the measurement:
`abduct` infers the noise of a cell's own measurement, `predict` replays that noise under another latent state.
"""

from __future__ import annotations

import pyro.distributions as dist
import torch
import torch.nn.functional as F
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor, nn


class CountLikelihood(nn.Module):
    r"""Negative binomial as a Gamma-Poisson mixture.

    :math:`\rho = \mathrm{softmax}(W h + b)`, :math:`\epsilon_g \sim \mathrm{Gamma}(\theta_g, \theta_g)`,
    :math:`x_g \sim \mathrm{Poisson}(\ell \rho_g \epsilon_g)`, so that :math:`x_g` has mean :math:`\ell \rho_g` and inverse
    dispersion :math:`\theta_g`.

    Parameters
    ----------
    n_in
        Width of the decoder's hidden layer.
    n_genes
        Number of genes.
    """

    native_scale = "counts"

    def __init__(self, n_in: int, n_genes: int) -> None:
        super().__init__()
        self.logits = nn.Linear(n_in, n_genes)
        self.log_theta = nn.Parameter(torch.ones(n_genes))

    def initialise(self, mean: Tensor, scale: Tensor) -> None:
        """Start at the mean composition of the data; `mean` has shape ``(n_genes,)`` and any unit."""
        with torch.no_grad():
            self.logits.bias.copy_(torch.log(mean / mean.sum() + 1e-7))

    def rate(self, h: Tensor, library: Tensor) -> Tensor:
        """Expected counts, ``(..., n_genes)``."""
        return library * F.softmax(self.logits(h), dim=-1)

    def forward(self, h: Tensor, library: Tensor) -> TorchDistribution:
        """Distribution of a cell's counts; one event dimension."""
        theta = self.log_theta.clamp(-5.0, 8.0).exp()
        rate = self.rate(h, library).clamp(min=1e-8)
        # logits = log(mean / theta) is the parametrisation that stays finite for rates near zero
        return dist.NegativeBinomial(theta, logits=rate.log() - theta.log()).to_event(1)

    def abduct(self, h: Tensor, library: Tensor, x: Tensor) -> Tensor:
        """Draw of epsilon given the cell's own counts: Gamma(theta + x, theta + rate)."""
        theta = self.log_theta.clamp(-5.0, 8.0).exp()
        return torch.distributions.Gamma(theta + x, theta + self.rate(h, library)).sample()

    def predict(self, h: Tensor, library: Tensor, noise: Tensor) -> Tensor:
        """Counts under another latent state, the cell's epsilon kept."""
        return torch.poisson(self.rate(h, library) * noise)

    def fresh_noise(self, h: Tensor, library: Tensor) -> Tensor:
        """Draw of epsilon of a cell that was never measured."""
        theta = self.log_theta.clamp(-5.0, 8.0).exp()
        return torch.distributions.Gamma(theta, theta).sample(h.shape[:-1])


class GaussianLikelihood(nn.Module):
    r"""Log expression or bulk profiles: :math:`x_g \sim N(\mu_g(h), \sigma_g(h)^2)`, in units of the registered layer.

    Parameters
    ----------
    n_in
        Width of the decoder's hidden layer.
    n_genes
        Number of genes.
    """

    native_scale = "layer"

    def __init__(self, n_in: int, n_genes: int) -> None:
        super().__init__()
        self.loc = nn.Linear(n_in, n_genes)
        self.log_scale = nn.Linear(n_in, n_genes)
        nn.init.normal_(self.log_scale.weight, std=1e-3)
        self.register_buffer("unit", torch.ones(n_genes))

    def initialise(self, mean: Tensor, scale: Tensor) -> None:
        """Start at the mean of the data, and measure in units of its spread; both of shape ``(n_genes,)``."""
        with torch.no_grad():
            self.unit.copy_(scale.clamp(min=1e-3))
            self.loc.bias.copy_(mean / self.unit)
            self.log_scale.bias.zero_()

    def _parameters_of(self, h: Tensor) -> tuple[Tensor, Tensor]:
        return self.loc(h) * self.unit, self.log_scale(h).clamp(-5.0, 3.0).exp() * self.unit

    def forward(self, h: Tensor, library: Tensor) -> TorchDistribution:
        """Distribution of a profile; one event dimension."""
        return dist.Normal(*self._parameters_of(h)).to_event(1)

    def abduct(self, h: Tensor, library: Tensor, x: Tensor) -> Tensor:
        """Standardised residual of the cell's own measurement."""
        loc, scale = self._parameters_of(h)
        return (x - loc) / scale

    def predict(self, h: Tensor, library: Tensor, noise: Tensor) -> Tensor:
        """Expression under another latent state, the cell's residual kept."""
        loc, scale = self._parameters_of(h)
        return loc + scale * noise

    def fresh_noise(self, h: Tensor, library: Tensor) -> Tensor:
        """Draw of the residual of a cell that was never measured."""
        return torch.randn(*h.shape[:-1], self.unit.shape[0], device=h.device)
