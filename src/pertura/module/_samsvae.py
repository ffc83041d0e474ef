r"""SAMS-VAE: sparse additive shifts of a latent basal state (Bereket & Karaletsos 2023).

.. math::

    E_{tj} &\sim N(0, \sigma_j^2), \quad M_{tj} \sim \mathrm{Bernoulli}(\alpha) \\
    z^b_i &\sim N(0, I), \quad z^p_i = \sum_t s_t(d_{it})\,(E_t \circ M_t) \\
    x_i &\sim p_\theta(x \mid \mathrm{dec}(z^b_i + z^p_i))

with the guide :math:`q(M)\,q(E \mid M)\,q(z^b \mid x, z^p)`. Without a mask this is CPA-VAE.

With ``effects="measured"`` the perturbation acts on genes, with an effect :math:`\Delta_t \sim N(m_t, s_t^2)` that has its
posterior in closed form from measured effects (:class:`~pertura.module._gene_effects.GeneEffects`), and the sparse latent
shift explains that effect instead of the cells, through the linear part W of the decoder:

.. math::

    x_i \sim p_\theta(x \mid \mathrm{dec}(z^b_i) + c(\Delta_i)), \quad
    c(m_t) \sim N\big((E_t \circ M_t) W, \; s_t^2 + \tau^2\big)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pertura.data._constants import UNKNOWN

from ._base import Action, Basal, Cells
from ._gene_effects import MAX_ROWS, GeneEffects, explain_effects
from ._latent import Decoder, LatentModule, NormalEncoder
from ._shifts import RotateOnce, SparseShifts, share_of_data


class SAMSVAE(LatentModule):
    r"""Generative model and guide of SAMS-VAE.

    Parameters
    ----------
    n_genes, n_perturbations, n_batch
        Sizes of the data.
    n_latent
        Dimension of the latent state.
    n_layers, n_hidden
        Layers of decoder and encoder, and their width. No layers make the decoder (log-)linear; the encoder has at least one.
    masked, effect_guide, mask_prior, prior_sd_E, interactions, n_features
        Of the shifts; see :class:`SparseShifts`.
    basal_guide
        ``"amortized"``: q(z | x); ``"correlated"``: q(z | x, shift).
    likelihood, link_sharpness
        ``"nb"`` or ``"normal"``; see :class:`~pertura.nn.CountLikelihood`.
    normalize_input
        Whether the encoder sees counts per 10,000, or raw counts as in the paper, both as standardized log1p.
    rotate_shifts
        Whether to rotate the latent space once, after a third of the first training, to where shifts are sparse.
    effects
        What a perturbation does to cells: ``"latent"``, its shift; ``"measured"``, its measured effect.
    combinations
        Codes of the members of registered combinations; for measured effects.
    """

    no_weight_decay = {"shifts.", "likelihood.log_theta"}

    def __init__(
        self,
        n_genes: int,
        n_perturbations: int,
        n_batch: int = 1,
        *,
        n_latent: int = 30,
        n_layers: int = 0,
        n_hidden: int = 128,
        masked: bool = True,
        effect_guide: Literal["mean_field", "correlated"] = "mean_field",
        basal_guide: Literal["amortized", "correlated"] = "correlated",
        mask_prior: float = 0.1,
        prior_sd_E: float | None = None,
        interactions: bool = False,
        likelihood: Literal["nb", "normal"] = "nb",
        link_sharpness: float = 3.0,
        normalize_input: bool = True,
        rotate_shifts: bool = True,
        effect_lr_factor: float = 5.0,
        n_features: int = 0,
        effects: Literal["measured", "latent"] = "latent",
        combinations: Sequence[Sequence[int]] = (),
    ) -> None:
        super().__init__(n_genes, n_batch, normalize_input)
        self.n_latent, self.basal_guide = n_latent, basal_guide
        self.lr_factors = {"shifts.": effect_lr_factor}
        self.shifts = SparseShifts(
            n_perturbations,
            n_latent,
            masked=masked,
            guide=effect_guide,
            mask_prior=mask_prior,
            prior_sd=prior_sd_E,
            interactions=interactions,
            n_features=n_features,
            n_hidden=n_hidden,
        )
        self.gene_effects: GeneEffects | None = None
        if effects == "measured":
            self.gene_effects = GeneEffects(n_perturbations, n_genes, n_features, combinations)
            self.basal_guide = basal_guide = "amortized"
        n_seen = n_latent if basal_guide == "correlated" else 0
        self.encoder = NormalEncoder([n_genes, self.n_covariates, n_seen], n_latent, n_hidden, max(1, n_layers))
        self.decoder = Decoder([n_latent, self.n_covariates], n_hidden, n_layers)
        self.make_likelihood(likelihood, self.decoder.n_out, link_sharpness)
        self.rotation = RotateOnce(self.shifts, rotate_shifts)

    # -- generative model and guide ---------------------------------------------------------------------------------

    def model(self, cells: Cells, kl_weight: float = 1.0) -> None:
        """Joint density of a minibatch, its share of the global terms included."""
        explains = self.gene_effects is not None and self.training
        plate = self.shifts.plate(MAX_ROWS if explains else None)
        with share_of_data(self, len(cells), kl_weight):
            table = self.shifts.prior(plate)
        shift, offset = 0.0 if explains else self.shifts(table, cells.action), 0.0
        if self.gene_effects is not None:
            noise = self.gene_effects.sample_noise()
            offset = self.gene_effects(cells.action.one, self.strength(cells.action.one), noise, cells.context)
            if explains:
                with share_of_data(self, len(cells), 1.0):
                    explain_effects(self, table, plate)
        with pyro.plate("cells", len(cells)):
            with pyro.poutine.scale(scale=kl_weight):
                z = pyro.sample("basal", dist.Normal(cells.x.new_zeros(self.n_latent), 1.0).to_event(1))
            state = pyro.deterministic("state", z + shift, event_dim=1)
            h = self.decoder(state if self.gene_effects is None else z, self.one_hot_batch(cells.batch))
            pyro.sample("x", self.likelihood(h, cells.library, offset), obs=cells.x)

    def guide(self, cells: Cells, kl_weight: float = 1.0) -> None:
        """q(M) q(E | M) q(z | x, shift); of measured effects the encoder sees what they leave of x."""
        plate = self.shifts.plate(MAX_ROWS if self.gene_effects is not None and self.training else None)
        with share_of_data(self, len(cells), kl_weight):
            table = self.shifts.guide(plate)
        u, shift = self.standardized(cells.x, cells.library), None
        if self.gene_effects is not None:
            self.gene_effects.sample_noise()
            u = u - self.gene_effects.delta(cells.action, self.strength(cells.action), cells.context) / self.input_scale
        elif self.basal_guide == "correlated":
            shift = self.shifts(table, cells.action)
        with pyro.plate("cells", len(cells)), pyro.poutine.scale(scale=kl_weight):
            q = self.encoder(u, self.one_hot_batch(cells.batch), shift)
            if shift is not None:
                # the encoder then finds the state, which x is about, whatever part of it the shift explains
                q = dist.Normal(q.loc - shift, q.scale)
            pyro.sample("basal", q.to_event(1))

    def strength(self, action: Action) -> Tensor:
        """Dose response of each member; of those outside the vocabulary, their dose."""
        return self.shifts.strength(action) + action.dose * (action.codes == UNKNOWN)

    def on_genes(self, shift: Tensor) -> Tensor:
        """What a latent shift adds to the activation of each gene, ``(..., n_genes)``."""
        if self.decoder.hidden is None:
            return shift @ self.likelihood.linear.weight[:, : self.n_latent].T
        one_hot = self.one_hot_batch(torch.zeros(1, dtype=torch.long, device=shift.device))
        moved, start = (self.decoder(s, one_hot) for s in (shift, torch.zeros_like(shift[..., :1, :])))
        return self.likelihood.linear(moved) - self.likelihood.linear(start)

    def activation(self, basal: Basal) -> Tensor:
        """Activations of genes without any perturbation, ``(n_draws, n_cells, n_genes)``."""
        return self.likelihood.linear(self.decoder(basal.state, self.one_hot_batch(basal.cells.batch)))

    def on_step(self, progress: float) -> None:
        """Rotate the latent space once, a third of the first training being done.

        With a normal prior of the basal state, z R and shifts S R under a decoder that turns them back are the same model
        for every orthogonal R, up to the prior of the mask.
        """
        r = self.rotation.due(progress)
        if r is None:
            return
        self.shifts.rotate(r)
        self.encoder.rotate_output(r)
        self.rotation.turn(self.decoder.input_layer(self.likelihood), slice(0, self.n_latent), r)
        if isinstance(self.encoder.hidden.first[2], nn.Linear):
            self.rotation.turn(self.encoder.hidden.first[2], slice(0, self.n_latent), r)
