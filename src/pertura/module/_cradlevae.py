r"""CRADLE-VAE: SAMS-VAE with a latent for technical artefacts and counterfactual reasoning (Baek et al. 2024).

With :math:`c_i` 1 for cells that failed quality control,

.. math::

    A \sim N(0, I), \quad h_i = [z^b_i;\; z^p_i;\; c_i A], \quad x_i \sim p_\theta(x \mid \mathrm{dec}(h_i)),

and the basal state of a cell, had its label been the other, is that of cells of the same perturbation which have the other label:

.. math::

    L_{cf} = \beta\, \frac{1}{n} \sum_i
        \mathrm{KL}\big(q(z^b \mid x'_i, d_i, 1 - c_i) \,\|\, q(z^b \mid x_i, d_i, 1 - c_i)\big),

:math:`x'_i` the mean profile of those cells in the training data. The published code takes other cells for them, drops the variance of
the second normal from the KL and sums over the batch; none of this is repeated.

An encoder that is given the expression of failed cells passes on what they have in common, whatever the counterfactual loss says.
By default it is therefore given failed cells with each gene's mean and spread within perturbations brought to those of passed cells.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import kl_divergence

from ._base import Action, Basal, Cells
from ._samsvae import SAMSVAE, beside


@dataclass
class ArtefactBasal(Basal):
    """Basal states of cells of known quality.

    Attributes
    ----------
    qc
        1 for cells that failed quality control, ``(n_cells, 1)``.
    """

    qc: Tensor | None = None


class CRADLEVAE(SAMSVAE):
    r"""Generative model and guide of CRADLE-VAE.

    Parameters
    ----------
    n_genes, n_perturbations, n_batch, **options
        As in :class:`SAMSVAE`; `effect` is ``"sparse"`` or ``"dense"``.
    counterfactual_weight
        :math:`\beta`.
    class_balance
        Weigh the expression of cells that passed by the fraction of failed cells in the minibatch, and vice versa, as the paper does.
    match_quality
        Give the encoder failed cells with the mean and spread of passed ones, and not the artefact; the paper's sees the cell as it is.
    """

    def __init__(
        self,
        n_genes: int,
        n_perturbations: int,
        n_batch: int = 1,
        *,
        counterfactual_weight: float = 1.0,
        class_balance: bool = False,
        match_quality: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(n_genes, n_perturbations, n_batch, **options)
        self.counterfactual_weight, self.class_balance = counterfactual_weight, class_balance
        self.match_quality = match_quality
        self.effect_artefact_loc = nn.Parameter(torch.zeros(self.n_latent))
        self.effect_artefact_log_sd = nn.Parameter(torch.full((self.n_latent,), -1.0))
        # normalised mean profiles of passed and failed training cells: of controls, of each perturbation, of combinations
        n_groups = 1 + len(self.residual)
        self.register_buffer("profile", torch.zeros(n_groups, 2, n_genes))
        self.register_buffer("profile_cells", torch.zeros(n_groups, 2))
        # of failed cells less passed ones within groups, and the ratio of passed cells' spread to theirs; units of the encoder's input
        self.register_buffer("quality_centre", torch.zeros(2, n_genes))
        self.register_buffer("quality_ratio", torch.ones(n_genes))

    def _moves_width(self) -> int:
        return self.n_shift + self.n_latent

    def _state_width(self) -> int:
        return self.n_latent + self._moves_width()

    def _shift_columns(self) -> slice:
        return slice(self.n_latent, self.n_latent + self.n_shift)

    def _rotate_basal(self, r: Tensor) -> None:
        pass  # has coordinates of its own

    def state(self, z: Tensor, shift: Tensor) -> Tensor:
        """[basal; perturbation; artefact]."""
        return beside(z, shift)

    def moves(self, globals_: dict[str, Tensor], cells: Cells | Basal, action: Action) -> Tensor:
        """[perturbation; artefact]."""
        return self._moved(globals_, action, self._failed(cells))

    def _moved(self, globals_: dict[str, Tensor], action: Action, failed: Tensor) -> Tensor:
        return beside(self.shift(globals_.get("table"), action), failed * globals_["artefact"])

    def _failed(self, cells: Cells | Basal) -> Tensor:
        return cells.context[:, None] * 0.0 if cells.qc is None else cells.qc

    def likelihood_weight(self, cells: Cells) -> Tensor | float:
        """1, or the paper's balance of classes."""
        if not self.class_balance or cells.qc is None:
            return 1.0
        share = cells.qc.mean()
        return torch.where(cells.qc[:, 0] > 0, 1.0 - share, share) if 0 < share < 1 else 1.0

    def _global_prior(self, n_cells: int, kl_weight: float) -> dict[str, Tensor]:
        with self._weight(n_cells, kl_weight):
            prior = dist.Normal(torch.zeros_like(self.effect_artefact_loc), 1.0)
            artefact = self._one(pyro.sample("artefact", prior.to_event(1)))
        return {**super()._global_prior(n_cells, kl_weight), "artefact": artefact}

    def _global_guide(self, n_cells: int, kl_weight: float) -> dict[str, Tensor]:
        with self._weight(n_cells, kl_weight):
            posterior = dist.Normal(self.effect_artefact_loc, self.effect_artefact_log_sd.exp() + 1e-4)
            artefact = self._one(pyro.sample("artefact", posterior.to_event(1)))
        return {**super()._global_guide(n_cells, kl_weight), "artefact": artefact}

    @staticmethod
    def _one(artefact: Tensor) -> Tensor:
        """One row for all cells, ``(..., 1, n_latent)``."""
        return artefact if artefact.dim() > 1 else artefact[None]

    def guide(self, cells: Cells, kl_weight: float = 1.0) -> None:
        """That of SAMS-VAE, and the counterfactual loss."""
        globals_ = self._global_guide(len(cells), kl_weight)
        moved = self.moves(globals_, cells, cells.action)
        with pyro.plate("cells", len(cells)), pyro.poutine.scale(scale=kl_weight):
            pyro.sample("z", self.basal(cells, moved).to_event(1))
        if self.counterfactual_weight > 0 and cells.qc is not None:
            loss = self.counterfactual_weight * self.counterfactual(cells, globals_)
            pyro.factor("counterfactual", loss, has_rsample=True)

    def basal_given(self, u: Tensor, cells: Cells, shift: Tensor, failed: Tensor | None = None) -> dist.Normal:
        """q(z | x, perturbation, quality); `failed` says whose expression `u` is, by default the cells' own."""
        if not self.match_quality:
            return super().basal_given(u, cells, shift)
        failed = self._failed(cells) if failed is None else failed
        passed_centre, failed_centre = self.quality_centre
        u = torch.where(failed > 0, (u - failed_centre) * self.quality_ratio + passed_centre, u)
        own, artefact = shift.split([self.n_shift, self.n_latent], dim=-1)
        return super().basal_given(u, cells, beside(own, torch.zeros_like(artefact)))

    def counterfactual(self, cells: Cells, globals_: dict[str, Tensor]) -> Tensor:
        """Divergence of basal states from those of cells of the other quality, summed over cells; mean over draws."""
        other = (1.0 - cells.qc).long()[:, 0]
        group = self.group(cells.action)
        known = (group >= 0) & (self.profile_cells[group.clamp(min=0), other] > 0)
        moved = self._moved(globals_, cells.action, 1.0 - cells.qc)
        u = (self.profile[group.clamp(min=0), other] - self.input_mean) / self.input_scale
        factual = self.basal_given(self.normalised(cells.x), cells, moved)
        divergence = kl_divergence(self.basal_given(u, cells, moved, 1.0 - cells.qc), factual).sum(-1) * known
        return divergence.sum(-1).mean()

    def group(self, action: Action) -> Tensor:
        """Row of a cell's perturbation in :attr:`profile`, -1 where it has none, ``(n_cells,)``."""
        codes = torch.where(action.present, action.codes, -1)
        single = codes[:, 0] + 1
        if codes.shape[1] == 1:
            return torch.where(codes[:, 0] >= -1, single, -1)
        several = (codes >= 0).sum(1) > 1
        padded = F.pad(codes, (0, max(0, self.combinations.shape[1] - codes.shape[1])), value=-1)
        if not len(self.combinations) or padded.shape[1] > self.combinations.shape[1]:
            return torch.where(several, -1, single)
        same = (padded[:, None] == self.combinations).all(-1)
        row = torch.where(same.any(1), 1 + self.n_perturbations + same.float().argmax(1), -1)
        return torch.where(several, row, single)

    def draw_globals(self, n_samples: int) -> dict[str, Tensor]:
        """E o M and A."""
        shape = (n_samples, 1, self.n_latent)
        sd = self.effect_artefact_log_sd.exp() + 1e-4
        artefact = self.effect_artefact_loc + sd * torch.randn(shape, device=sd.device)
        return {**super().draw_globals(n_samples), "artefact": artefact}

    def _basal_of(self, cells: Cells, z: Tensor, noise: Tensor, globals_: dict[str, Tensor]) -> Basal:
        failed = self._failed(cells) * (0.0 if "artefact_removed" in globals_ else 1.0)
        return ArtefactBasal(z, noise, cells.context, cells.batch, cells.library, failed)
