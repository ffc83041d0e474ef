r"""Latent of technical artifacts: what cells that failed quality control have in common (Baek et al. 2024).

With :math:`c_i` 1 for cells that failed, decoders see :math:`c_i A`, :math:`A \sim N(0, I)`. The basal states of cells of one
perturbation are to have the same distribution whether they failed or passed. The paper draws them together through mean profiles:
that can be had by a basal state that is empty. Here the distributions themselves are compared, by their energy distance within
each perturbation p of a minibatch (a maximum mean discrepancy, :math:`k(z, z') = -\lVert z - z' \rVert`):

.. math::

    L_{cf} = \beta \sum_p F_p \big( 2\, \mathrm{E} \lVert z_f - z_s \rVert - \mathrm{E} \lVert z_f - z_f' \rVert
        - \mathrm{E} \lVert z_s - z_s' \rVert \big),

:math:`z_f` draws of the :math:`F_p` failed cells and :math:`z_s` of those that passed, through which no gradient goes: failed cells
move to passed ones, not the other way around.

An encoder that sees the expression of failed cells passes on what they have in common, whatever the counterfactual loss
says. By default it therefore sees failed cells with each gene's mean and spread within perturbations brought to those of
passed cells.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._base import Action, Cells


def failed(cells: Cells) -> Tensor:
    """1 for cells that failed quality control, ``(n_cells, 1)``; 0 where that is not known."""
    return torch.zeros_like(cells.library) if cells.qc is None else cells.qc


class Artifact(nn.Module):
    r"""Latent of the artifact, and what passed and failed training cells look like.

    Parameters
    ----------
    n_perturbations, n_genes, n_latent
        Sizes.
    combinations
        Codes of the members of registered combinations.
    counterfactual_weight
        :math:`\beta`, per failed cell.
    class_balance
        Weigh the expression of cells that passed by the share of failed cells in the minibatch, and vice versa, as the
        paper does.
    match_quality
        Give encoders failed cells with the mean and spread of passed ones, and not the artifact; the paper's sees the cell
        as it is.

    Attributes
    ----------
    n_seen
        Width of what encoders see of the artifact.
    center, ratio
        Of failed cells less passed ones within groups, and the ratio of passed cells' spread to theirs, in units of the
        encoder's input; ``(2, n_genes)`` and ``(n_genes,)``.
    """

    def __init__(
        self,
        n_perturbations: int,
        n_genes: int,
        n_latent: int,
        combinations: Sequence[Sequence[int]] = (),
        *,
        counterfactual_weight: float = 10.0,
        class_balance: bool = False,
        match_quality: bool = True,
    ) -> None:
        super().__init__()
        self.n_perturbations = n_perturbations
        self.counterfactual_weight, self.class_balance = counterfactual_weight, class_balance
        self.match_quality = match_quality
        self.n_seen = 0 if match_quality else n_latent
        self.loc = nn.Parameter(torch.zeros(n_latent))
        self.log_sd = nn.Parameter(torch.full((n_latent,), -1.0))
        order = max([1, *map(len, combinations)])
        padded = [[*sorted(c), *[-1] * (order - len(c))] for c in combinations]
        self.register_buffer("combinations", torch.tensor(padded, dtype=torch.long).reshape(len(padded), order))
        self.n_groups = 1 + n_perturbations + len(padded)
        self.register_buffer("center", torch.zeros(2, n_genes))
        self.register_buffer("ratio", torch.ones(n_genes))

    def prior(self) -> Tensor:
        """Sample A, ``(..., 1, n_latent)``."""
        return _one_row(pyro.sample("artifact", dist.Normal(torch.zeros_like(self.loc), 1.0).to_event(1)))

    def guide(self) -> Tensor:
        """Sample A from q(A)."""
        return _one_row(pyro.sample("artifact", dist.Normal(self.loc, self.log_sd.exp() + 1e-4).to_event(1)))

    def class_weight(self, cells: Cells) -> Tensor | float:
        """Weight of the expression of each cell in training: 1, or the paper's balance of classes."""
        if not (self.class_balance and self.training) or cells.qc is None:
            return 1.0
        share = cells.qc.mean()
        return torch.where(cells.qc[:, 0] > 0, 1.0 - share, share) if 0 < share < 1 else 1.0

    def shown(self, u: Tensor, quality: Tensor, artifact: Tensor) -> tuple[Tensor, Tensor | None]:
        """What encoders see: expression, and the artifact.

        Parameters
        ----------
        u
            Standardized expression, ``(n_cells, n_genes)``.
        quality
            1 for cells that failed, ``(n_cells, 1)``.
        artifact
            Draws of A.
        """
        return (self.matched(u, quality), None) if self.match_quality else (u, quality * artifact)

    def counterfactual(self, cells: Cells, z: Tensor) -> None:
        """In training, add the counterfactual loss; for guides.

        Parameters
        ----------
        z
            Draws of the basal states of the cells, ``(..., n_cells, n_latent)``.
        """
        if self.training and self.counterfactual_weight > 0 and cells.qc is not None:
            loss = self.counterfactual_weight * self.divergence(cells, z)
            pyro.factor("counterfactual", loss, has_rsample=True)

    def divergence(self, cells: Cells, z: Tensor) -> Tensor:
        """Energy distance of failed from passed cells within perturbations: summed over failed cells, mean over draws.

        Perturbations with fewer than two cells of either quality in the minibatch are left out.
        """
        group, at = self.group(cells.action), failed(cells)[:, 0] > 0
        group = torch.where(group < 0, self.n_groups, group)
        # cells x groups, either quality
        member = F.one_hot(group, self.n_groups + 1)[:, : self.n_groups].to(z)
        ours, theirs = member * at[:, None], member * ~at[:, None]
        n_failed, n_passed = ours.sum(0), theirs.sum(0)
        use = (n_failed > 1) & (n_passed > 1)
        if not use.any():
            return z.sum() * 0.0
        ours, theirs, n_failed, n_passed = ours[:, use], theirs[:, use], n_failed[use], n_passed[use]
        fixed, kept = z.detach(), (ours.sum(1) > 0).nonzero()[:, 0]
        ours, own = ours[kept], z[..., kept, :]
        # weights of pairs: groups count by their failed cells, and no cell is its own pair
        across = torch.einsum("ig,jg,g->ij", ours, theirs, 2.0 / n_passed)
        within = torch.einsum("ig,jg,g->ij", ours, ours, 1.0 / (n_failed - 1.0)).fill_diagonal_(0.0)
        between = torch.einsum("ig,jg,g->ij", theirs, theirs, n_failed / (n_passed * (n_passed - 1.0))).fill_diagonal_(
            0.0
        )
        total = (across * torch.cdist(own, fixed)).sum((-2, -1)) - (within * torch.cdist(own, own)).sum((-2, -1))
        return (total - (between * torch.cdist(fixed, fixed)).sum((-2, -1))).mean()

    def matched(self, u: Tensor, quality: Tensor) -> Tensor:
        """Expression of failed cells with the mean and spread of passed ones."""
        passed_center, failed_center = self.center
        return torch.where(quality > 0, (u - failed_center) * self.ratio + passed_center, u)

    def group(self, action: Action) -> Tensor:
        """Number of a cell's perturbation: controls, perturbations, combinations; -1 for others, ``(n_cells,)``."""
        codes = torch.where(action.present, action.codes, -1).sort(1, descending=True).values
        unknown, several = (codes < -1).any(1), (codes >= 0).sum(1) > 1
        single = torch.where(unknown, -1, codes[:, 0] + 1)
        if not len(self.combinations):
            return torch.where(several, -1, single)
        width = max(codes.shape[1], self.combinations.shape[1])
        padded, known = (
            F.pad(c, (0, width - c.shape[1]), value=-1).sort(1, descending=True).values
            for c in (codes, self.combinations)
        )
        same = (padded[:, None] == known).all(-1)
        row = torch.where(same.any(1), 1 + self.n_perturbations + same.float().argmax(1), -1)
        return torch.where(several, row, single)

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
        weight = number.prod(1) / number.sum(1).clamp(min=1.0)
        if not weight.any():
            return
        center = torch.einsum("g,gqi->qi", weight / weight.sum(), profile)
        self.center.copy_((center - mean) / scale)
        freedom = (number - 1.0).clamp(min=0.0).sum(0)
        if freedom.min() < 10:
            return
        within = square - total**2 / number.clamp(min=1.0)[..., None]
        # a gene that hardly varies in failed cells must not be blown up
        sd = (within.sum(0) / freedom[:, None]).clamp(min=0.0).sqrt() + 0.05 * scale
        self.ratio.copy_((sd[0] / sd[1]).clamp(max=1.0))


def infer_basal(
    module: Any, cells: Cells, artifact: Tensor, shift: Tensor | None, effect: Tensor | float, kl_weight: float
) -> None:
    """Guide of the basal state, q(z | x, shift, artifact), and in training the counterfactual loss.

    Parameters
    ----------
    module
        Has ``artifact`` and ``encoder``, whose inputs are expression, batch, shift and artifact.
    artifact
        Draws of A.
    shift
        Latent shift that the encoder sees, or `None`.
    effect
        Measured effect on standardized expression, which is taken off.
    """
    u = module.standardized(cells.x, cells.library) - effect
    u, seen = module.artifact.shown(u, failed(cells), artifact)
    with pyro.plate("cells", len(cells)), pyro.poutine.scale(scale=kl_weight):
        z = pyro.sample("z", module.encoder(u, module.one_hot_batch(cells.batch), shift, seen).to_event(1))
    module.artifact.counterfactual(cells, z)


def _one_row(artifact: Tensor) -> Tensor:
    return artifact if artifact.dim() > 1 else artifact[None]
