"""What a decoder's output says about the measured expression, and back again.

Each likelihood gives the distribution of expression. The distribution knows the two steps of a counterfactual that belong to
the measurement: `abduct` infers the noise of a cell's own measurement, `replay` gives expression with that noise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyro.distributions as dist
import torch
import torch.nn.functional as F
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor, nn

from . import _counts

_PER_10K = 1e4
_LEAST_REST = 1e-4


@dataclass(frozen=True, eq=False)
class CountNoise:
    """What the counts of a cell say about its own noise: where they lie in the distribution they were drawn from.

    Parameters
    ----------
    x
        Counts, ``(..., n_genes)``.
    mean
        Their mean, ``(..., n_genes)``; the two shapes broadcast.
    """

    x: Tensor
    mean: Tensor

    @cached_property
    def v(self) -> Tensor:
        """Position within the interval of quantiles of each count, between 0 and 1; drawn once, so that all replays share it."""
        return torch.rand(torch.broadcast_shapes(self.x.shape, self.mean.shape), device=self.mean.device)


class NegativeBinomial(TorchDistribution):
    """Negative binomial of mean and inverse dispersion, quick where most counts are zero.

    The gamma functions cancel at a count of zero, so that they are evaluated at the other entries alone. Counterfactuals keep the quantiles
    of a cell's counts: asked for its own mean, a cell gets its own counts back. They and expectations have no gradient.

    Parameters
    ----------
    mean
        Positive, ``(..., n_genes)``.
    theta
        Inverse dispersion, ``(n_genes,)``.
    """

    arg_constraints: dict[str, Any] = {}
    support = dist.constraints.nonnegative_integer

    def __init__(self, mean: Tensor, theta: Tensor) -> None:
        # what only densities need is computed where they are asked for: predictions need the mean alone
        self._mean, self._theta = mean, theta
        TorchDistribution.__init__(self, mean.shape, validate_args=False)

    @cached_property
    def logits(self) -> Tensor:
        """log(mean / theta): the parametrization that stays finite for means near zero."""
        return self._mean.log() - self._theta.log()

    @property
    def total_count(self) -> Tensor:
        """Inverse dispersion."""
        return self._theta

    @property
    def mean(self) -> Tensor:
        """Mean, ``(..., n_genes)``."""
        return self._mean

    @property
    def variance(self) -> Tensor:
        """Variance, ``(..., n_genes)``."""
        return self._mean + self._mean.square() / self._theta

    def sample(self, sample_shape: torch.Size | tuple[int, ...] = ()) -> Tensor:
        """Counts: Poisson draws whose rates are Gamma draws."""
        with torch.no_grad():
            shape = (*sample_shape, *self.batch_shape)
            rate = torch.distributions.Gamma(
                self._theta.expand(shape), (self._theta / self._mean).expand(shape)
            ).sample()
            return torch.poisson(rate)

    def expand(self, batch_shape: torch.Size, _instance: None = None) -> NegativeBinomial:
        """The same distribution over a larger batch."""
        return NegativeBinomial(self._mean.expand(batch_shape), self._theta)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log probability of counts."""
        log_prob = value * self.logits - (self._theta + value) * F.softplus(self.logits)
        where = value.nonzero(as_tuple=True)
        x, theta = value[where], self._theta[where[-1]]
        combinatorial = torch.lgamma(x + theta) - torch.lgamma(theta) - torch.lgamma(x + 1)
        return log_prob + torch.zeros_like(value).index_put(where, combinatorial)

    def abduct(self, x: Tensor) -> CountNoise:
        """Noise of counts `x` that were measured under this distribution; ``(n_cells, n_genes)`` or with draws in front."""
        return CountNoise(x.detach(), self._mean.detach())

    def replay(self, noise: CountNoise) -> Tensor:
        """Counts under this distribution, the noise kept: whole numbers, one draw where the noise leaves a choice."""
        return _counts.replay(noise.x, noise.mean, self._mean, self._theta, noise.v)

    def conditional_mean(self, noise: CountNoise, scale: str = "counts", depth: Tensor | None = None) -> Tensor:
        """Mean of :meth:`replay` over what the noise leaves open, without drawing.

        Parameters
        ----------
        noise
            From :meth:`abduct` of the distribution under which the counts were measured.
        scale
            ``"counts"``, or ``"log1p"`` for log1p of counts per 10,000 of `depth`.
        depth
            Library of each cell, ``(n_cells,)`` or ``(..., n_cells, 1)``; needed for ``"log1p"`` alone.
        """
        return _counts.conditional_mean(noise.x, noise.mean, self._mean, self._theta, scale, depth)

    def expectation(self, scale: str = "counts", depth: Tensor | None = None) -> Tensor:
        """Mean on a scale, without drawing; `scale` and `depth` as in :meth:`conditional_mean`. Its error is below 1e-3."""
        return _counts.expected(self._mean, self._theta, scale, depth)


class CellCounts(dist.Independent):
    """Counts of the genes of a cell, of which the genes that are not registered have the rest of the library.

    Parameters
    ----------
    base
        Counts of the registered genes, batch shape ``(..., n_cells, n_genes)``.
    library
        Total counts of the cells, ``(n_cells, 1)``.
    theta
        Inverse dispersion of the counts of all other genes, ``(1,)``.
    """

    def __init__(self, base: NegativeBinomial, library: Tensor, theta: Tensor) -> None:
        super().__init__(base, 1, validate_args=False)
        self.library, self.theta = library, theta

    def expand(self, batch_shape: torch.Size, _instance: None = None) -> CellCounts:
        """The same distribution over a larger batch."""
        shape = torch.Size(batch_shape) + self.event_shape
        return CellCounts(self.base_dist.expand(shape), self.library, self.theta)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log probability of the counts of the registered genes, and of their complement to the library."""
        rest = (self.library - value.sum(-1, keepdim=True)).clamp(min=0.0)
        # effects on single genes change what is left for the others
        mean = self.library - self.base_dist.mean.sum(-1, keepdim=True)
        mean = torch.maximum(mean, _LEAST_REST * self.library)
        return super().log_prob(value) + NegativeBinomial(mean, self.theta).log_prob(rest).squeeze(-1)


class Gaussian(dist.Normal):
    """Normal distribution whose counterfactuals keep the standardized residual of a cell."""

    def abduct(self, x: Tensor) -> Tensor:
        """Standardized residual of the measurement `x`, ``(..., n_genes)``."""
        return (x - self.loc) / self.scale

    def replay(self, noise: Tensor) -> Tensor:
        """Expression under this distribution, the residual kept."""
        return self.loc + self.scale * noise

    def conditional_mean(self, noise: Tensor, scale: str = "layer", depth: Tensor | None = None) -> Tensor:
        """The same as :meth:`replay`, as the residual leaves nothing open."""
        _only_layer(scale)
        return self.replay(noise)

    def expectation(self, scale: str = "layer", depth: Tensor | None = None) -> Tensor:
        """Mean."""
        _only_layer(scale)
        return self.loc


class RectifiedGaussian(Gaussian):
    """Log1p of counts per 10,000: a normal distribution whose values below 0 are read as 0.

    Counterfactuals keep the standardized residual. :meth:`log_prob` is the density of the normal distribution: zeros have no
    probability of their own, so that it compares with other models of log1p expression, not with models of counts.
    """

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draws, at least 0."""
        return super().sample(torch.Size(sample_shape)).clamp(min=0.0)

    def replay(self, noise: Tensor) -> Tensor:
        """Expression under this distribution, the residual kept."""
        return super().replay(noise).clamp(min=0.0)

    def conditional_mean(self, noise: Tensor, scale: str = "log1p", depth: Tensor | None = None) -> Tensor:
        """The same as :meth:`replay`, as the residual leaves nothing open.

        Parameters
        ----------
        noise
            From :meth:`abduct` of the distribution under which the cell was measured.
        scale
            ``"log1p"``, or ``"counts"`` for counts at `depth`.
        depth
            Library of each cell, ``(n_cells,)`` or ``(..., n_cells, 1)``; needed for ``"counts"`` alone.
        """
        return Point(self.replay(noise), "log1p").expectation(scale, depth)

    def expectation(self, scale: str = "log1p", depth: Tensor | None = None) -> Tensor:
        """Mean on a scale, in closed form; `scale` and `depth` as in :meth:`conditional_mean`."""
        t = self.loc / self.scale
        above = torch.special.ndtr(t)
        if scale == "log1p":
            return self.loc * above + self.scale * torch.exp(-0.5 * t.square()) / math.sqrt(2 * math.pi)
        # mean of max(exp(x) - 1, 0), and from there as of one value
        lognormal = torch.exp(self.loc + 0.5 * self.scale.square()) * torch.special.ndtr(t + self.scale)
        return Point(torch.log1p((lognormal - above).clamp(min=0.0)), "log1p").expectation(scale, depth)


class Point(dist.Delta):
    """Expression known without noise, as closed-form baselines give it.

    Parameters
    ----------
    value
        Expression, ``(..., n_cells, n_genes)``.
    native_scale
        What it is: ``"counts"``, ``"log1p"`` (log1p of counts per 10,000) or ``"layer"`` (units of the registered layer).
    """

    def __init__(self, value: Tensor, native_scale: str) -> None:
        if native_scale not in ("counts", "log1p", "layer"):
            raise ValueError(f"native_scale={native_scale!r} is no scale; use 'counts', 'log1p' or 'layer'.")
        super().__init__(value, validate_args=False)
        self.native_scale = native_scale

    def expand(self, batch_shape: torch.Size, _instance: None = None) -> Point:
        """The same expression over a larger batch."""
        return Point(self.v.expand(batch_shape), self.native_scale)

    def abduct(self, x: Tensor) -> None:
        """There is no noise to infer."""
        return None

    def replay(self, noise: None = None, scale: str | None = None, depth: Tensor | None = None) -> Tensor:
        """Expression on `scale`, its own by default; see :meth:`expectation`."""
        return self.expectation(scale, depth)

    def conditional_mean(self, noise: None = None, scale: str | None = None, depth: Tensor | None = None) -> Tensor:
        """Expression on `scale`, its own by default; see :meth:`expectation`."""
        return self.expectation(scale, depth)

    def expectation(self, scale: str | None = None, depth: Tensor | None = None) -> Tensor:
        """Expression on a scale.

        Parameters
        ----------
        scale
            `None` for its own. Expression in units of a layer stays what it is.
        depth
            Library of each cell, ``(n_cells,)`` or ``(..., n_cells, 1)``; needed between ``"counts"`` and ``"log1p"``.
        """
        if scale is None or self.native_scale in (scale, "layer"):
            return self.v
        if scale not in ("counts", "log1p"):
            raise ValueError(f"There is no way from the scale {self.native_scale!r} to {scale!r}.")
        if depth is None:
            raise ValueError(
                f"depth is None, but it is needed from {self.native_scale!r} to {scale!r}; pass the library of each cell, (n_cells,)."
            )
        per_10k = _counts.per_cell(depth) / _PER_10K
        return torch.log1p(self.v / per_10k) if scale == "log1p" else torch.expm1(self.v.clamp(min=0.0)) * per_10k


def _only_layer(scale: str) -> None:
    if scale != "layer":
        raise ValueError(f"scale={scale!r} needs a likelihood of counts; a Gaussian one gives 'layer' alone.")


class CountLikelihood(nn.Module):
    r"""Negative binomial as a Gamma-Poisson mixture.

    :math:`\epsilon_g \sim \mathrm{Gamma}(\theta_g, \theta_g)`, :math:`x_g \sim \mathrm{Poisson}(\ell \rho_g \epsilon_g)`, so
    that :math:`x_g` has mean :math:`\ell \rho_g` and inverse dispersion :math:`\theta_g`. The composition is
    :math:`\rho_g \propto \exp(\mathrm{softplus}_\beta(a_g)) - 1` with :math:`a = W h + b` and
    :math:`\mathrm{softplus}_\beta(a) = \log(1 + e^{\beta a}) / \beta`. For :math:`\beta = 1` this is the softmax
    (log-expression is linear in h); the larger :math:`\beta`, the more nearly expression is linear on the scale of
    log1p(counts per 10,000), on which a change of a gene that is hardly expressed stays small.

    Where :math:`\ell` holds counts of genes that are not registered, these are one more component: after :meth:`add_rest`,
    :math:`\rho_g = r_g / (r_0 + \sum_k r_k)` with amounts r. The share of the registered genes then follows the state, and the counts of
    all other genes, :math:`\ell - \sum_g x_g`, are negative binomial with the mean that the registered genes leave. Only ratios
    of amounts matter, so that :math:`r_0` is a constant: :meth:`initialize` sets it to the mean share of the data.

    Parameters
    ----------
    n_in
        Width of the decoder's hidden layer.
    n_genes
        Number of genes.
    link_sharpness
        :math:`\beta`.
    layer
        Last layer, from the hidden layer to activations ``(..., n_genes)``. It has a parameter ``bias``, ``(n_genes,)``, that is
        added last and that :meth:`initialize` sets. By default linear.
    """

    native_scale = "counts"

    def __init__(self, n_in: int, n_genes: int, link_sharpness: float = 1.0, layer: nn.Module | None = None) -> None:
        super().__init__()
        self.activation = nn.Linear(n_in, n_genes) if layer is None else layer
        self.log_theta = nn.Parameter(torch.ones(n_genes))
        self.link_sharpness = link_sharpness
        self.register_buffer("rest", None)
        self.register_parameter("log_theta_rest", None)

    def add_rest(self) -> None:
        """Let libraries hold counts of genes that are not registered."""
        self.rest = self.log_theta.new_ones(1).detach()
        self.log_theta_rest = nn.Parameter(torch.full_like(self.rest, 3.0))

    def initialize(self, mean: Tensor, scale: Tensor, library: float | None = None) -> None:
        """Start at the mean composition of the data.

        Parameters
        ----------
        mean
            Mean expression, ``(n_genes,)``.
        scale
            Not used: counts have no unit of their own.
        library
            Mean library; by default the sum of `mean`.
        """
        total = float(mean.sum())
        library = total if self.rest is None or library is None else max(library, total)
        rate = _PER_10K * mean / library + 1e-3
        beta = self.link_sharpness
        with torch.no_grad():
            if self.rest is not None:
                self.rest.fill_(_PER_10K * max(1.0 - total / library, _LEAST_REST))
            self.activation.bias.copy_(torch.expm1(beta * torch.log1p(rate).double()).log() / beta)

    def amount(self, activation: Tensor) -> Tensor:
        """Amount of each gene; their shares are the composition."""
        if self.link_sharpness == 1.0:
            return activation.exp()
        softplus = F.softplus(activation, beta=self.link_sharpness)
        if torch.is_grad_enabled():
            return torch.expm1(softplus.clamp(max=15.0)) + 1e-4
        return softplus.clamp_(max=15.0).expm1_().add_(1e-4)

    def rate(self, h: Tensor, library: Tensor, offset: Tensor | float = 0.0) -> Tensor:
        """Expected counts, ``(..., n_genes)``.

        `offset` is added to the activation of each gene, and changes the gene alone: expected counts then need not add up
        to the library.
        """
        activation = self.activation(h)
        if self.link_sharpness == 1.0:
            total = activation.logsumexp(-1, keepdim=True)
            total = total if self.rest is None else torch.logaddexp(total, self.rest.log())
            return library * (activation - total + offset).exp()
        amount = self.amount(activation)
        share = library / self._total(amount)
        moved = amount if isinstance(offset, float) and offset == 0.0 else self.amount(activation + offset)
        return share * moved if torch.is_grad_enabled() else moved.mul_(share)

    def moved_by(self, activation: Tensor, library: Tensor, offset: Tensor | float) -> NegativeBinomial:
        """Distribution of counts, given activations, with an offset; genes are in the batch shape."""
        total = self._total(self.amount(activation))
        return NegativeBinomial((library * self.amount(activation + offset) / total).clamp(min=1e-8), self.theta)

    def _total(self, amount: Tensor) -> Tensor:
        total = amount.sum(-1, keepdim=True)
        return total if self.rest is None else total + self.rest

    @property
    def linear(self) -> nn.Module:
        """The layer that reads h."""
        return self.activation

    @property
    def theta(self) -> Tensor:
        """Inverse dispersion, ``(n_genes,)``."""
        return self.log_theta.clamp(-5.0, 8.0).exp()

    def forward(self, h: Tensor, library: Tensor, offset: Tensor | float = 0.0) -> TorchDistribution:
        """Distribution of a cell's counts; one event dimension."""
        rate = self.rate(h, library, offset)
        rate = rate.clamp(min=1e-8) if torch.is_grad_enabled() else rate.clamp_(min=1e-8)
        counts = NegativeBinomial(rate, self.theta)
        if self.rest is None:
            return counts.to_event(1)
        return CellCounts(counts, library, self.log_theta_rest.clamp(-5.0, 8.0).exp())


class GaussianLikelihood(nn.Module):
    r"""Log expression or bulk profiles: :math:`x_g \sim N(\mu_g(h), \sigma_g^2)`, in units of the registered layer.

    Parameters
    ----------
    n_in
        Width of the decoder's hidden layer.
    n_genes
        Number of genes.
    heteroscedastic
        Let :math:`\log \sigma_g` be linear in h, as in the paper. A replayed residual then grows or shrinks with the state,
        without bound for states far from the data.
    layer
        Last layer, as in :class:`CountLikelihood`; its output is in units of each gene's spread.
    """

    native_scale = "layer"

    def __init__(self, n_in: int, n_genes: int, heteroscedastic: bool = False, layer: nn.Module | None = None) -> None:
        super().__init__()
        self.loc = nn.Linear(n_in, n_genes) if layer is None else layer
        self.log_scale = nn.Parameter(torch.zeros(n_genes))
        self.log_scale_slope = nn.Linear(n_in, n_genes, bias=False) if heteroscedastic else None
        if self.log_scale_slope is not None:
            nn.init.normal_(self.log_scale_slope.weight, std=1e-3)
        self.register_buffer("unit", torch.ones(n_genes))

    def initialize(self, mean: Tensor, scale: Tensor, library: float | None = None) -> None:
        """Start at the mean of the data, and measure in units of its spread; both of shape ``(n_genes,)``."""
        with torch.no_grad():
            self.unit.copy_(scale.clamp(min=1e-3))
            self.loc.bias.copy_(mean / self.unit)
            self.log_scale.zero_()

    @property
    def linear(self) -> nn.Module:
        """The layer that reads h."""
        return self.loc

    def _parameters_of(self, h: Tensor) -> tuple[Tensor, Tensor]:
        log_scale = self.log_scale if self.log_scale_slope is None else self.log_scale + self.log_scale_slope(h)
        return self.loc(h) * self.unit, log_scale.clamp(-5.0, 3.0).exp() * self.unit

    def forward(self, h: Tensor, library: Tensor, offset: Tensor | float = 0.0) -> TorchDistribution:
        """Distribution of a profile; one event dimension. `offset` is added to its mean."""
        loc, scale = self._parameters_of(h)
        return Gaussian(loc + offset, scale).to_event(1)
