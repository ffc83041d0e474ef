r"""CRADLE-VAE: SAMS-VAE with a latent for technical artifacts and counterfactual reasoning (Baek et al. 2024).

With :math:`c_i` 1 for cells that failed quality control,

.. math::

    E_{tj} &\sim N(0, \sigma_j^2), \quad M_{tj} \sim \mathrm{Bernoulli}(\alpha), \quad A \sim N(0, I) \\
    z^b_i &\sim N(0, I), \quad z^p_i = \sum_t s_t(d_{it})\,(E_t \circ M_t) \\
    x_i &\sim p_\theta(x \mid \mathrm{dec}([z^b_i;\; z^p_i;\; c_i A]))

and the basal state of a cell, had its label been the other, is that of cells of the same perturbation which have the other label:

.. math::

    L_{cf} = \beta\, \frac{1}{n} \sum_i
        \mathrm{KL}\big(q(z^b \mid x'_i, d_i, 1 - c_i) \,\|\, q(z^b \mid x_i, d_i, 1 - c_i)\big),

:math:`x'_i` the mean profile of those cells in the training data. The published code takes other cells for them, drops the variance of
the second normal from the KL and sums over the batch; none of this is repeated.

An encoder that sees the expression of failed cells passes on what they have in common, whatever the counterfactual loss says. By
default it therefore sees failed cells with each gene's mean and spread within perturbations brought to those of passed cells.

With ``effects="measured"`` perturbations act on genes as in :mod:`pertura.module._samsvae`, and :math:`z^p` explains these effects.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import kl_divergence

from pertura.data._constants import UNKNOWN

from ._base import Action, Basal, Cells
from ._gene_effects import GeneEffects, explain_effects
from ._latent import Decoder, LatentModule, NormalEncoder, beside
from ._shifts import RotateOnce, SparseShifts, share_of_data


class CRADLEVAE(LatentModule):
    r"""Generative model and guide of CRADLE-VAE.

    Parameters
    ----------
    n_genes, n_perturbations, n_batch
        Sizes of the data.
    counterfactual_weight
        :math:`\beta`.
    class_balance
        Weigh the expression of cells that passed by the fraction of failed cells in the minibatch, and vice versa, as the
        paper does.
    match_quality
        Give the encoder failed cells with the mean and spread of passed ones, and not the artifact; the paper's sees the
        cell as it is.
    **options
        As in :class:`SAMSVAE`.
    """

    no_weight_decay = {"shifts.", "artifact.", "likelihood.log_theta"}

    def __init__(
        self,
        n_genes: int,
        n_perturbations: int,
        n_batch: int = 1,
        *,
        n_latent: int = 30,
        n_layers: int = 0,
        n_hidden: int = 128,
        likelihood: Literal["nb", "normal"] = "nb",
        link_sharpness: float = 3.0,
        normalize_input: bool = True,
        rotate_shifts: bool = True,
        effect_lr_factor: float = 5.0,
        effects: Literal["measured", "latent"] = "latent",
        combinations: Sequence[Sequence[int]] = (),
        counterfactual_weight: float = 1.0,
        class_balance: bool = False,
        match_quality: bool = True,
        **shift_options: Any,
    ) -> None:
        super().__init__(n_genes, n_batch, normalize_input)
        self.n_latent = n_latent
        self.lr_factors = {"shifts.": effect_lr_factor, "artifact.": effect_lr_factor}
        self.shifts = SparseShifts(n_perturbations, n_latent, n_hidden=n_hidden, **shift_options)
        self.artifact = Artifact(n_perturbations, combinations, n_genes, n_latent)
        self.gene_effects: GeneEffects | None = None
        if effects == "measured":
            n_features = self.shifts.features.shape[1]
            self.gene_effects = GeneEffects(n_perturbations, n_genes, n_features, combinations)
        n_seen = n_latent * (1 if self.gene_effects is not None else 2)
        self.encoder = NormalEncoder([n_genes, self.n_covariates, n_seen], n_latent, n_hidden, max(1, n_layers))
        self.decoder = Decoder([3 * n_latent, self.n_covariates], n_hidden, n_layers)
        self.make_likelihood(likelihood, self.decoder.n_out, link_sharpness)
        self.counterfactual_weight, self.class_balance = counterfactual_weight, class_balance
        self.match_quality = match_quality
        self.rotation = RotateOnce(self.shifts, rotate_shifts)

    # -- generative model and guide ---------------------------------------------------------------------------------

    def model(self, cells: Cells, kl_weight: float = 1.0) -> None:
        """Joint density of a minibatch, its share of the global terms included."""
        with share_of_data(self, len(cells), kl_weight):
            artifact, table = self.artifact.prior(), self.shifts.prior()
        shift, offset = self.shifts(table, cells.action), 0.0
        if self.gene_effects is not None:
            noise = self.gene_effects.sample_noise()
            offset = self.gene_effects(cells.action.one, self.strength(cells.action.one), noise)
            if self.training:
                with share_of_data(self, len(cells), 1.0):
                    explain_effects(self, table)
        with pyro.plate("cells", len(cells)):
            with pyro.poutine.scale(scale=kl_weight):
                z = pyro.sample("basal", dist.Normal(cells.x.new_zeros(self.n_latent), 1.0).to_event(1))
            moved = shift if self.gene_effects is None else torch.zeros_like(shift)
            h = self.decoder(beside(z, moved, failed(cells) * artifact), self.one_hot_batch(cells.batch))
            pyro.deterministic("state", beside(z, shift, failed(cells) * artifact), event_dim=1)
            with pyro.poutine.scale(scale=self.class_weight(cells)):
                pyro.sample("x", self.likelihood(h, cells.library, offset), obs=cells.x)

    def guide(self, cells: Cells, kl_weight: float = 1.0) -> None:
        """q(A) q(M) q(E | M) q(z | x, shift, artifact), and in training the counterfactual loss."""
        with share_of_data(self, len(cells), kl_weight):
            artifact, table = self.artifact.guide(), self.shifts.guide()
        shift = self.shifts(table, cells.action)
        if self.gene_effects is not None:
            self.gene_effects.sample_noise()
        u = self.input_of(cells)
        with pyro.plate("cells", len(cells)), pyro.poutine.scale(scale=kl_weight):
            pyro.sample("basal", self.basal_posterior(u, cells, shift, failed(cells), artifact).to_event(1))
        if self.training and self.counterfactual_weight > 0 and cells.qc is not None:
            loss = self.counterfactual_weight * self.counterfactual_loss(u, cells, shift, artifact)
            pyro.factor("counterfactual", loss, has_rsample=True)

    def input_of(self, cells: Cells) -> Tensor:
        """Standardized expression, without the measured effect of the cell's own perturbation."""
        u = self.standardized(cells.x)
        if self.gene_effects is None:
            return u
        return u - self.gene_effects.delta(cells.action, self.strength(cells.action)) / self.input_scale

    def basal_posterior(
        self, u: Tensor, cells: Cells, shift: Tensor, quality: Tensor, artifact: Tensor, of: Tensor | None = None
    ) -> dist.Normal:
        """q(z | x, perturbation, quality) of standardized expression `u`.

        Parameters
        ----------
        quality
            1 where the cell is to be one that failed, ``(n_cells, 1)``.
        of
            1 where `u` is expression of failed cells; by default `quality`.
        """
        seen = [] if self.gene_effects is not None else [shift]
        if self.match_quality:
            u = self.artifact.matched(u, quality if of is None else of)
            seen.append(torch.zeros_like(shift))
        else:
            seen.append((quality * artifact).expand(*shift.shape[:-1], -1))
        return self.encoder(u, self.one_hot_batch(cells.batch), beside(*seen))

    def counterfactual_loss(self, u: Tensor, cells: Cells, shift: Tensor, artifact: Tensor) -> Tensor:
        """Divergence of basal states from those of cells of the other quality, summed over cells; mean over draws."""
        other = 1.0 - cells.qc
        profile, known = self.artifact.profile_of(cells.action, other)
        v = (profile - self.input_mean) / self.input_scale
        if self.gene_effects is not None:
            v = v - self.gene_effects.delta(cells.action, self.strength(cells.action)) / self.input_scale
        own = self.basal_posterior(u, cells, shift, other, artifact, of=cells.qc if self.match_quality else None)
        theirs = self.basal_posterior(v, cells, shift, other, artifact)
        return (kl_divergence(theirs, own).sum(-1) * known).sum(-1).mean()

    def class_weight(self, cells: Cells) -> Tensor | float:
        """1, or the paper's balance of classes."""
        if not (self.class_balance and self.training) or cells.qc is None:
            return 1.0
        share = cells.qc.mean()
        return torch.where(cells.qc[:, 0] > 0, 1.0 - share, share) if 0 < share < 1 else 1.0

    def strength(self, action: Action) -> Tensor:
        """Dose response of each member; of those outside the vocabulary, their dose."""
        return self.shifts.strength(action) + action.dose * (action.codes == UNKNOWN)

    def on_genes(self, shift: Tensor) -> Tensor:
        """What a latent shift adds to the activation of each gene, ``(..., n_genes)``."""
        zero = torch.zeros_like(shift)
        one_hot = self.one_hot_batch(torch.zeros(1, dtype=torch.long, device=shift.device))
        moved = self.decoder(beside(zero, shift, zero), one_hot)
        start = self.decoder(torch.zeros_like(moved[..., :1, : 3 * self.n_latent]), one_hot)
        return self.likelihood.linear(moved) - self.likelihood.linear(start)

    def activation(self, basal: Basal) -> Tensor:
        """Activations of genes without any perturbation, ``(n_draws, n_cells, n_genes)``."""
        zero = torch.zeros_like(basal.state)
        state = beside(basal.state, zero, failed(basal.cells) * basal.globals_["artifact"])
        return self.likelihood.linear(self.decoder(state, self.one_hot_batch(basal.cells.batch)))

    def on_step(self, progress: float) -> None:
        """Rotate the shifts once, a third of the first training being done; the basal state has coordinates of its own."""
        r = self.rotation.due(progress)
        if r is None:
            return
        self.shifts.rotate(r)
        k = self.n_latent
        self.rotation.turn(self.decoder.input_layer(self.likelihood), slice(k, 2 * k), r)
        if self.gene_effects is None:
            self.rotation.turn(self.encoder.hidden.first[2], slice(0, k), r)


def failed(cells: Cells) -> Tensor:
    """1 for cells that failed quality control, ``(n_cells, 1)``; 0 where that is not known."""
    return cells.context[:, None] * 0.0 if cells.qc is None else cells.qc


class Artifact(nn.Module):
    """Latent of the artifact, and what passed and failed training cells look like.

    Parameters
    ----------
    n_perturbations, n_genes, n_latent
        Sizes.
    combinations
        Codes of the members of registered combinations.

    Attributes
    ----------
    profile, profile_cells
        Mean normalized profiles of passed and failed training cells and their number: of controls, of each perturbation,
        of combinations; ``(n_groups, 2, n_genes)`` and ``(n_groups, 2)``.
    center, ratio
        Of failed cells less passed ones within groups, and the ratio of passed cells' spread to theirs, in units of the
        encoder's input; ``(2, n_genes)`` and ``(n_genes,)``.
    """

    def __init__(
        self, n_perturbations: int, combinations: Sequence[Sequence[int]], n_genes: int, n_latent: int
    ) -> None:
        super().__init__()
        self.n_perturbations = n_perturbations
        self.loc = nn.Parameter(torch.zeros(n_latent))
        self.log_sd = nn.Parameter(torch.full((n_latent,), -1.0))
        order = max([1, *map(len, combinations)])
        padded = [[*sorted(c), *[-1] * (order - len(c))] for c in combinations]
        self.register_buffer("combinations", torch.tensor(padded, dtype=torch.long).reshape(len(padded), order))
        n_groups = 1 + n_perturbations + len(padded)
        self.register_buffer("profile", torch.zeros(n_groups, 2, n_genes))
        self.register_buffer("profile_cells", torch.zeros(n_groups, 2))
        self.register_buffer("center", torch.zeros(2, n_genes))
        self.register_buffer("ratio", torch.ones(n_genes))

    def prior(self) -> Tensor:
        """Sample A, ``(..., 1, n_latent)``."""
        return _one_row(pyro.sample("artifact", dist.Normal(torch.zeros_like(self.loc), 1.0).to_event(1)))

    def guide(self) -> Tensor:
        """Sample A from q(A)."""
        return _one_row(pyro.sample("artifact", dist.Normal(self.loc, self.log_sd.exp() + 1e-4).to_event(1)))

    def matched(self, u: Tensor, quality: Tensor) -> Tensor:
        """Expression of failed cells with the mean and spread of passed ones."""
        passed_center, failed_center = self.center
        return torch.where(quality > 0, (u - failed_center) * self.ratio + passed_center, u)

    def profile_of(self, action: Action, quality: Tensor) -> tuple[Tensor, Tensor]:
        """Mean profile of training cells of a perturbation and quality, and whether there were any."""
        group, at = self.group(action), quality[:, 0].long()
        known = (group >= 0) & (self.profile_cells[group.clamp(min=0), at] > 0)
        return self.profile[group.clamp(min=0), at], known

    def group(self, action: Action) -> Tensor:
        """Row of a cell's perturbation in :attr:`profile`, -1 where it has none, ``(n_cells,)``."""
        codes = torch.where(action.present, action.codes, -1).sort(1, descending=True).values
        single = codes[:, 0] + 1
        several = (codes >= 0).sum(1) > 1
        if not len(self.combinations):
            return torch.where(several | (codes[:, 0] < -1), -1, single)
        width = max(codes.shape[1], self.combinations.shape[1])
        padded, known = (
            F.pad(c, (0, width - c.shape[1]), value=-1).sort(1, descending=True).values
            for c in (codes, self.combinations)
        )
        same = (padded[:, None] == known).all(-1)
        row = torch.where(same.any(1), 1 + self.n_perturbations + same.float().argmax(1), -1)
        return torch.where(several, row, torch.where(codes[:, 0] < -1, -1, single))

    @torch.no_grad()
    def describe(self, number: Tensor, total: Tensor, square: Tensor, mean: Tensor, scale: Tensor) -> None:
        """Take over sums over the training cells of each group and quality.

        Parameters
        ----------
        number, total, square
            Number, sums and sums of squares of normalized expression.
        mean, scale
            Of the encoder's standardization.
        """
        profile = total / number.clamp(min=1.0)[..., None]
        self.profile.copy_(profile)
        self.profile_cells.copy_(number)
        weight = number.prod(1) / number.sum(1).clamp(min=1.0)
        if not weight.any():
            return
        center = torch.einsum("g,gqi->qi", weight / weight.sum(), self.profile)
        self.center.copy_((center - mean) / scale)
        freedom = (number - 1.0).clamp(min=0.0).sum(0)
        if freedom.min() < 10:
            return
        within = square - total**2 / number.clamp(min=1.0)[..., None]
        # a gene that hardly varies in failed cells must not be blown up
        sd = (within.sum(0) / freedom[:, None]).clamp(min=0.0).sqrt() + 0.05 * scale
        self.ratio.copy_((sd[0] / sd[1]).clamp(max=1.0))


def _one_row(artifact: Tensor) -> Tensor:
    return artifact if artifact.dim() > 1 else artifact[None]
