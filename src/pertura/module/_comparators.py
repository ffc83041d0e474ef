r"""Published comparators of SAMS-VAE, as Bereket & Karaletsos (2023) set them up.

:class:`SVAEPlus` (Lopez et al. 2023) shifts the *prior* of a cell's latent state, :class:`ConditionalVAE` gives the
perturbation itself to encoder and decoder. CPA-VAE is :class:`~pertura.module.SAMSVAE` without a mask.
"""

from __future__ import annotations

from typing import Literal

import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pertura.nn._masks import StraightThroughBernoulli

from ._base import Action, Cells
from ._latent import Decoder, LatentModule, NormalEncoder, beside, log_dose_response
from ._shifts import share_of_data


class _Comparator(LatentModule):
    """Encoder, decoder and likelihood of both.

    Parameters
    ----------
    n_genes, n_perturbations, n_batch
        Sizes of the data.
    n_seen, n_added
        Width of what the encoder and the decoder see of the perturbation.
    n_latent, n_layers, n_hidden, likelihood, link_sharpness, normalize_input
        As in :class:`SAMSVAE`.
    """

    def __init__(
        self,
        n_genes: int,
        n_perturbations: int,
        n_batch: int,
        n_seen: int,
        n_added: int,
        *,
        n_latent: int = 30,
        n_layers: int = 0,
        n_hidden: int = 128,
        likelihood: Literal["nb", "normal"] = "nb",
        link_sharpness: float = 3.0,
        normalize_input: bool = True,
        effect_lr_factor: float = 5.0,
    ) -> None:
        super().__init__(n_genes, n_batch, normalize_input)
        self.n_latent, self.n_perturbations = n_latent, n_perturbations
        self.lr_factors = {"effect_": effect_lr_factor, "mask_": effect_lr_factor}
        self.encoder = NormalEncoder([n_genes, self.n_covariates, n_seen], n_latent, n_hidden, max(1, n_layers))
        self.decoder = Decoder([n_latent + n_added, self.n_covariates], n_hidden, n_layers)
        self.make_likelihood(likelihood, self.decoder.n_out, link_sharpness)
        self.dose_log_kappa = nn.Parameter(torch.zeros(n_perturbations))

    def strength(self, action: Action) -> Tensor:
        """Dose response of each member, ``(n_cells, order)``."""
        known = action.codes >= 0
        return log_dose_response(self.dose_log_kappa[action.codes.clamp(min=0)], action.dose) * known

    def observe(self, state: Tensor, cells: Cells) -> None:
        """Sample expression."""
        h = self.decoder(state, self.one_hot_batch(cells.batch))
        pyro.sample("x", self.likelihood(h, cells.library), obs=cells.x)


class ConditionalVAE(_Comparator):
    """x ~ p(x | dec([z; d])), q(z | x, d), with d the dose responses of all perturbations."""

    def __init__(self, n_genes: int, n_perturbations: int, n_batch: int = 1, **options: object) -> None:
        super().__init__(n_genes, n_perturbations, n_batch, n_perturbations, n_perturbations, **options)

    def indicators(self, action: Action) -> Tensor:
        """d, ``(n_cells, n_perturbations)``."""
        one_hot = F.one_hot(action.codes.clamp(min=0), self.n_perturbations).to(self.input_mean)
        return (self.strength(action)[..., None] * one_hot).sum(-2)

    def model(self, cells: Cells, kl_weight: float = 1.0) -> None:
        """Joint density of a minibatch."""
        d = self.indicators(cells.action)
        with pyro.plate("cells", len(cells)):
            with pyro.poutine.scale(scale=kl_weight):
                z = pyro.sample("basal", dist.Normal(cells.x.new_zeros(self.n_latent), 1.0).to_event(1))
            state = pyro.deterministic("state", beside(z, d), event_dim=1)
            self.observe(state, cells)

    def guide(self, cells: Cells, kl_weight: float = 1.0) -> None:
        """q(z | x, d)."""
        posterior = self.encoder(
            self.standardized(cells.x, cells.library), self.one_hot_batch(cells.batch), self.indicators(cells.action)
        )
        with pyro.plate("cells", len(cells)), pyro.poutine.scale(scale=kl_weight):
            pyro.sample("basal", posterior.to_event(1))


class SVAEPlus(_Comparator):
    r""":math:`z_i \sim N(\sum_t s_t M_t \circ a_t, I)`, with point estimates a and a Beta(1, K) prior of the rate of M.

    Parameters
    ----------
    mask_prior
        :math:`1 / (1 + K)`.
    **options
        As in :class:`ConditionalVAE`.
    """

    no_weight_decay = {"effect_", "mask_", "likelihood.log_theta"}

    def __init__(
        self, n_genes: int, n_perturbations: int, n_batch: int = 1, *, mask_prior: float = 0.1, **options: object
    ) -> None:
        n_latent = int(options.get("n_latent", 30))
        super().__init__(n_genes, n_perturbations, n_batch, n_latent, 0, **options)
        self.n_failures = 1.0 / mask_prior - 1.0
        self.effect_loc = nn.Parameter(0.1 * torch.randn(n_perturbations, n_latent))
        self.mask_logits = nn.Parameter(torch.zeros(n_perturbations, n_latent))
        self.mask_rate = nn.Parameter(torch.full((n_perturbations, n_latent), -1.0))

    def proba(self) -> Tensor:
        """Posterior probability that the mask is on, ``(n_perturbations, n_latent)``."""
        return self.mask_logits.sigmoid()

    def shift(self, mask: Tensor, action: Action) -> Tensor:
        """Shift of the prior mean, ``(..., n_cells, n_latent)``."""
        table = mask * self.effect_loc
        return (self.strength(action)[..., None] * table[..., action.codes.clamp(min=0), :]).sum(-2)

    def model(self, cells: Cells, kl_weight: float = 1.0) -> None:
        """Joint density of a minibatch, its share of the global terms included."""
        with share_of_data(self, len(cells), kl_weight):
            if self.training:
                pyro.factor("rate_prior", -(self.n_failures - 1.0) * F.softplus(self.mask_rate).sum())
            with pyro.plate("perturbations", self.n_perturbations):
                mask = pyro.sample("mask", dist.Bernoulli(logits=self.mask_rate).to_event(1))
        shift = self.shift(mask, cells.action)
        with pyro.plate("cells", len(cells)):
            with pyro.poutine.scale(scale=kl_weight):
                state = pyro.sample("state", dist.Normal(shift, 1.0).to_event(1))
            self.observe(state, cells)

    def guide(self, cells: Cells, kl_weight: float = 1.0) -> None:
        """q(M) q(z | x, shift)."""
        with share_of_data(self, len(cells), kl_weight), pyro.plate("perturbations", self.n_perturbations):
            posterior = StraightThroughBernoulli(self.mask_logits.new_tensor(1.0), logits=self.mask_logits)
            mask = pyro.sample("mask", posterior.to_event(1))
        shift = self.shift(mask, cells.action)
        posterior = self.encoder(self.standardized(cells.x, cells.library), self.one_hot_batch(cells.batch), shift)
        with pyro.plate("cells", len(cells)), pyro.poutine.scale(scale=kl_weight):
            pyro.sample("state", posterior.to_event(1))
