"""What models of cells with a latent state share: input of encoders, batches, dose response, decoder and likelihood."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import pyro.distributions as dist
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pertura.nn._likelihoods import CountLikelihood, GaussianLikelihood
from pertura.nn._mlp import ResidualMLP

from ._base import PerturbationModule


class LatentModule(PerturbationModule):
    """A module with a latent state, an encoder of standardized expression, a decoder and a likelihood.

    Parameters
    ----------
    n_genes, n_batch
        Sizes of the data.
    normalize_input
        Whether encoders see counts per 10,000 or raw counts, both as standardized log1p.

    Attributes
    ----------
    input_mean, input_scale
        Mean and standard deviation of each gene on the encoder's scale, ``(n_genes,)``.
    likelihood
        Distribution of expression given what the decoder says.
    """

    no_weight_decay = {"likelihood.log_theta"}

    def __init__(self, n_genes: int, n_batch: int = 1, normalize_input: bool = True) -> None:
        super().__init__()
        self.n_genes, self.n_batch, self.normalize_input = n_genes, n_batch, normalize_input
        self.register_buffer("input_mean", torch.zeros(n_genes))
        self.register_buffer("input_scale", torch.ones(n_genes))

    @property
    def n_covariates(self) -> int:
        """Width of what :meth:`one_hot_batch` gives."""
        return self.n_batch if self.n_batch > 1 else 0

    def make_likelihood(
        self,
        kind: Literal["nb", "normal"],
        n_in: int,
        link_sharpness: float,
        heteroscedastic: bool = False,
        layer: nn.Module | None = None,
    ) -> None:
        """Set :attr:`likelihood`, which reads a hidden layer of width `n_in`; for `layer` see :mod:`pertura.nn`."""
        if kind == "nb":
            self.likelihood: nn.Module = CountLikelihood(n_in, self.n_genes, link_sharpness, layer)
        else:
            self.likelihood = GaussianLikelihood(n_in, self.n_genes, heteroscedastic, layer)
        self.native_scale = self.likelihood.native_scale

    def add_rest(self) -> None:
        """See :meth:`pertura.nn.CountLikelihood.add_rest`."""
        if self.native_scale == "counts":
            self.likelihood.add_rest()

    @torch.no_grad()
    def standardize(
        self, mean: Tensor, sd: Tensor, raw_mean: Tensor, raw_sd: Tensor, library: float | None = None
    ) -> None:
        """Take over what the training cells say of each gene, ``(n_genes,)`` each.

        Parameters
        ----------
        mean, sd
            On the encoder's scale, as :meth:`normalized` gives it.
        raw_mean, raw_sd
            Of the registered layer: where the decoder starts.
        library
            Mean library of the cells; by default that of the registered genes.
        """
        self.input_mean.copy_(mean)
        # a gene that hardly varies must not enter the encoder blown up
        self.input_scale.copy_(sd.clamp(min=0.2 * float(sd.square().mean().sqrt()) + 1e-6))
        self.likelihood.initialize(raw_mean.float(), raw_sd.float(), library)

    def normalized(self, x: Tensor, library: Tensor) -> Tensor:
        """Counts as log1p of counts per 10,000 of the library (or of counts); other values as they are."""
        if self.native_scale != "counts":
            return x
        return torch.log1p(1e4 * x / library if self.normalize_input else x)

    def standardized(self, x: Tensor, library: Tensor) -> Tensor:
        """Input of encoders: normalized expression with mean 0 and sd 1."""
        return (self.normalized(x, library) - self.input_mean) / self.input_scale

    def one_hot_batch(self, batch: Tensor) -> Tensor | None:
        """Indicators of batches, ``(n_cells, n_batch)``; `None` where there is one batch."""
        if self.n_batch < 2:
            return None
        return F.one_hot(batch.clamp(max=self.n_batch - 1), self.n_batch).to(self.input_mean)

    def with_batch(self, values: Tensor, batch: Tensor) -> Tensor:
        """Values with the batch beside them, ``(..., n_cells, width + n_covariates)``."""
        one_hot = self.one_hot_batch(batch)
        return values if one_hot is None else beside(values, one_hot)


def beside(*parts: Tensor) -> Tensor:
    """Parts of a state side by side, broadcast over draws and cells."""
    shape = torch.broadcast_shapes(*(part.shape[:-1] for part in parts))
    return torch.cat([part.expand(*shape, -1) for part in parts], dim=-1)


def log_dose_response(log_kappa: Tensor, dose: Tensor) -> Tensor:
    r"""Dose response :math:`\log(1 + \kappa d) / \log(1 + \kappa)`: monotone, 0 at dose 0, 1 at the highest registered one.

    Parameters
    ----------
    log_kappa
        Curvature before a softplus, of the shape of `dose`.
    dose
        In units of the highest registered dose.
    """
    if bool(((dose == 0.0) | (dose == 1.0)).all()):
        return dose  # all curves meet there: no gradient
    kappa = F.softplus(log_kappa) + 1e-3
    return torch.log1p(kappa * dose) / torch.log1p(kappa)


def hill(dose: Tensor, log_k: Tensor, log_n: Tensor) -> Tensor:
    """Hill curve that is 0 at dose 0 and 1 at dose 1."""
    n, k = log_n.exp(), log_k.exp()
    power = torch.where(dose > 0, dose.clamp(min=1e-12), torch.ones_like(dose)).pow(n) * (dose > 0)
    return power * (1.0 + k.pow(n)) / (power + k.pow(n))


class NormalEncoder(nn.Module):
    """Diagonal normal posterior of a latent state from several inputs.

    Parameters
    ----------
    n_in
        Widths of the inputs; those of width 0 are left out.
    n_latent
        Dimension of the latent state.
    n_hidden, n_layers
        Width and number of hidden layers.
    """

    def __init__(self, n_in: Sequence[int], n_latent: int, n_hidden: int, n_layers: int) -> None:
        super().__init__()
        self.hidden = ResidualMLP(n_in, n_hidden, n_layers)
        self.loc = nn.Linear(n_hidden, n_latent)
        self.log_variance = nn.Linear(n_hidden, n_latent)

    def forward(self, *inputs: Tensor | None) -> dist.Normal:
        """Posterior, batch shape ``(..., n_cells, n_latent)``."""
        h = self.hidden(*inputs)
        return dist.Normal(self.loc(h), (self.log_variance(h).clamp(max=10.0).exp() + 1e-4).sqrt())

    @torch.no_grad()
    def rotate_output(self, r: Tensor) -> None:
        """Express the latent state in rotated coordinates; its posterior stays diagonal."""
        self.loc.weight.copy_(r.T @ self.loc.weight)
        self.loc.bias.copy_(r.T @ self.loc.bias)
        share = r.square().T
        self.log_variance.weight.copy_(share @ self.log_variance.weight)
        self.log_variance.bias.copy_(share @ self.log_variance.bias)


class Decoder(nn.Module):
    """Hidden layer that the likelihood reads; without layers, the latent state itself: (log-)linear decoding.

    Parameters
    ----------
    n_in
        Widths of latent state and batch indicators.
    n_hidden, n_layers
        Width and number of hidden layers.
    """

    def __init__(self, n_in: Sequence[int], n_hidden: int, n_layers: int) -> None:
        super().__init__()
        self.hidden = ResidualMLP(n_in, n_hidden, n_layers) if n_layers else None
        self.n_out = n_hidden if n_layers else sum(n_in)

    def forward(self, state: Tensor, one_hot: Tensor | None) -> Tensor:
        """``(..., n_cells, n_latent) -> (..., n_cells, n_out)``."""
        if self.hidden is not None:
            return self.hidden(state, one_hot)
        return state if one_hot is None else beside(state, one_hot)

    def input_layer(self, likelihood: nn.Module) -> nn.Linear:
        """The layer that multiplies the latent state."""
        return likelihood.linear if self.hidden is None else self.hidden.first[0]
