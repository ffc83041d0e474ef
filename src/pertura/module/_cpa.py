r"""CPA: the compositional perturbation autoencoder (Lotfollahi et al. 2023).

.. math::

    z^b_i &\sim N(0, I), \quad z_i = z^b_i + \sum_t s_t(d_{it})\,V_t \\
    s_t(d) &= d^{n_t} (1 + k_t^{n_t}) / (d^{n_t} + k_t^{n_t}) \\
    x_i &\sim p_\theta(x \mid \mathrm{dec}(z_i + C_{c_i}))

with embeddings V of perturbations and C of contexts, and the guide :math:`q(z^b \mid x)`. The encoder does not know the
perturbation. A discriminator that only the training plan moves tells perturbation and context from :math:`z^b`; the encoder
is trained against it, so that all that tells them is in V and C.

The basal state of the paper has neither prior nor noise. Here the encoder gives a normal distribution: its spread is learned,
or held small (``basal_sd``) to be close to the paper.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pertura.nn._mlp import MLP

from ._base import Action, Cells
from ._latent import Decoder, LatentModule, NormalEncoder, hill


class CPA(LatentModule):
    r"""Generative model, guide and discriminator of CPA.

    Parameters
    ----------
    n_genes, n_perturbations, n_contexts, n_batch
        Sizes of the data.
    n_latent
        Dimension of the latent state.
    n_layers, n_hidden
        Layers of decoder and encoder, and their width. No layers make the decoder (log-)linear; the encoder has at least one.
    discriminator_hidden
        Widths of the layers of the discriminator, which has one neural network for perturbations and one for contexts.
    basal_sd
        Standard deviation of the guide of the basal state; `None` learns one for each cell and dimension.
    likelihood, link_sharpness, heteroscedastic
        See :class:`~pertura.nn.CountLikelihood` and :class:`~pertura.nn.GaussianLikelihood`.
    normalize_input
        Whether the encoder sees counts per 10,000 or raw counts, both as standardized log1p.
    adversary_weight
        Weight of the discriminator's loss beside the mean log likelihood of a gene.
    effect_lr_factor
        Learning rate of embeddings and dose responses in units of that of the neural networks.

    Attributes
    ----------
    context_share
        Share of each trained context in the embedding of a context, ``(n_contexts + 1, n_contexts)``. A context that was not
        trained has the mean; the last row stands for all that were not registered.
    """

    no_weight_decay = {"likelihood.log_theta"}
    discriminator_parameters = ("discriminators.",)

    def __init__(
        self,
        n_genes: int,
        n_perturbations: int,
        n_contexts: int = 1,
        n_batch: int = 1,
        *,
        n_latent: int = 32,
        n_layers: int = 0,
        n_hidden: int = 128,
        discriminator_hidden: Sequence[int] = (64, 64),
        basal_sd: float | None = None,
        likelihood: Literal["nb", "normal"] = "nb",
        link_sharpness: float = 3.0,
        heteroscedastic: bool = False,
        normalize_input: bool = True,
        adversary_weight: float = 1.0,
        effect_lr_factor: float = 5.0,
    ) -> None:
        super().__init__(n_genes, n_batch, normalize_input)
        self.n_latent, self.n_perturbations, self.basal_sd = n_latent, n_perturbations, basal_sd
        self.adversary_weight = adversary_weight
        self.adversary_share = 0.0  # of the full weight; the training plan raises it
        self.lr_factors = {"embedding_": effect_lr_factor, "dose_": effect_lr_factor}
        self.encoder = NormalEncoder([n_genes, self.n_covariates], n_latent, n_hidden, max(1, n_layers))
        self.decoder = Decoder([n_latent, self.n_covariates], n_hidden, n_layers)
        self.make_likelihood(likelihood, self.decoder.n_out, link_sharpness, heteroscedastic)
        self.embedding_perturbation = nn.Parameter(0.1 * torch.randn(n_perturbations, n_latent))
        self.embedding_context = nn.Parameter(0.1 * torch.randn(n_contexts, n_latent))
        self.dose_log_k = nn.Parameter(torch.zeros(n_perturbations))
        self.dose_log_n = nn.Parameter(torch.zeros(n_perturbations))
        self.register_buffer("context_share", torch.empty(n_contexts + 1, n_contexts))
        self.set_contexts(torch.ones(n_contexts, dtype=torch.bool))
        classes = [n_perturbations + 1] + [n_contexts] * (n_contexts > 1)
        self.discriminators = nn.ModuleList(_discriminator(n_latent, discriminator_hidden, n) for n in classes)

    @torch.no_grad()
    def set_contexts(self, trained: Tensor) -> None:
        """Say which contexts have training cells, ``(n_contexts,)``; the others are given the mean embedding of these."""
        own = torch.diag(trained.to(self.context_share))
        mean = own.sum(0) / own.sum().clamp(min=1.0)
        self.context_share.copy_(torch.cat([own + (~trained).to(own)[:, None] * mean, mean[None]]))

    # -- generative model and guide ---------------------------------------------------------------------------------

    def model(self, cells: Cells, kl_weight: float = 1.0) -> None:
        """Joint density of a minibatch."""
        shift, context = self.shift(cells.action), self.context(cells.context)
        with pyro.plate("cells", len(cells)):
            with pyro.poutine.scale(scale=kl_weight):
                z = pyro.sample("basal", dist.Normal(cells.x.new_zeros(self.n_latent), 1.0).to_event(1))
            state = pyro.deterministic("state", z + shift, event_dim=1)
            h = self.decoder(state + context, self.one_hot_batch(cells.batch))
            pyro.sample("x", self.likelihood(h, cells.library), obs=cells.x)

    def guide(self, cells: Cells, kl_weight: float = 1.0) -> None:
        """q(z | x); in training less what the discriminator still recognizes."""
        posterior = self.basal_posterior(cells)
        with pyro.plate("cells", len(cells)), pyro.poutine.scale(scale=kl_weight):
            pyro.sample("basal", posterior.to_event(1))
        weight = self.adversary_weight * self.adversary_share * self.n_genes
        if self.training and weight > 0:
            loss, _ = self.discriminator_loss(_standardized(posterior.loc), cells)
            # what a guide adds is subtracted from the ELBO: a discriminator that is wrong raises it
            pyro.factor("adversary", -weight * loss.sum(), has_rsample=True)

    def basal_posterior(self, cells: Cells) -> dist.Normal:
        """q(z | x), batch shape ``(n_cells, n_latent)``."""
        posterior = self.encoder(self.standardized(cells.x, cells.library), self.one_hot_batch(cells.batch))
        return posterior if self.basal_sd is None else dist.Normal(posterior.loc, self.basal_sd)

    # -- what is done to cells, and where they are from -------------------------------------------------------------

    def strength(self, action: Action) -> Tensor:
        """Dose response of each member, ``(n_cells, order)``: rises with the dose, 0 at 0 and 1 at the highest registered."""
        code = action.codes.clamp(min=0)
        return hill(action.dose, self.dose_log_k[code], self.dose_log_n[code]) * (action.codes >= 0)

    def shift(self, action: Action) -> Tensor:
        """Sum over members of s(dose) V, ``(n_cells, n_latent)``."""
        return (self.strength(action)[..., None] * self.embedding_perturbation[action.codes.clamp(min=0)]).sum(-2)

    def context(self, context: Tensor) -> Tensor:
        """Embedding of the context of each cell, ``(n_cells, n_latent)``; the mean where it was not trained."""
        return self.context_share[context.clamp(max=len(self.embedding_context))] @ self.embedding_context

    # -- adversary --------------------------------------------------------------------------------------------------

    def discriminator_input(self, cells: Cells) -> Tensor:
        """Basal state as the discriminators are given it, ``(n_cells, n_latent)``."""
        return _standardized(self.basal_posterior(cells).loc)

    def discriminator_loss(self, given: Tensor, cells: Cells) -> tuple[Tensor, Tensor]:
        """Sum of the cross-entropies of perturbation and context, and equal weights, both ``(n_cells,)``."""
        targets = [self.members(cells.action)]
        if len(self.discriminators) > 1:
            targets.append(F.one_hot(cells.context, len(self.embedding_context)).to(given))
        said = [head(given).log_softmax(-1) for head in self.discriminators]
        loss = -sum((target * log_p).sum(-1) for target, log_p in zip(targets, said, strict=True))
        return loss, torch.ones_like(loss)

    def members(self, action: Action) -> Tensor:
        """Share of each perturbation in what was done to a cell, and of nothing, ``(n_cells, n_perturbations + 1)``."""
        place = torch.where(action.present, action.codes, self.n_perturbations)
        share = F.one_hot(place, self.n_perturbations + 1).sum(-2).to(self.embedding_context)
        share[:, -1] *= ~action.present.any(-1)
        return share / share.sum(-1, keepdim=True)


def _discriminator(n_in: int, hidden: Sequence[int], n_classes: int) -> nn.Module:
    mlp = MLP(n_in, hidden)
    return nn.Sequential(mlp, nn.Linear(mlp.n_out, n_classes))


def _standardized(loc: Tensor) -> Tensor:
    """Locations of a minibatch with mean 0 and sd 1, so that nothing is hidden in coordinates that are made small."""
    centered = loc - loc.mean(0)
    return centered / (centered.square().mean(0) + 1e-6).sqrt()
