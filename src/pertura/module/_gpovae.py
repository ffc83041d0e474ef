r"""GPO-VAE: perturbation effects aligned with a gene regulatory network (Baek et al. 2025).

CRADLE-VAE whose latent shift has one coordinate per gene, so that E and M are the weights and edges of a network of genes and each
perturbation is that of a gene. Two objectives align effects with the network.

``"resolvent"``: what is done to gene r spreads through the network :math:`A = E \circ M` (rows: regulators),

.. math::

    z^p_r = s_r\, e_r (I - A)^{-1}, \qquad
    x_i \sim p_\theta\big(x \mid \mathrm{dec}([z^b_i;\; c_i a]) + z^p_i\big), \qquad
    L = \lambda \sum_{tg} \frac{(y_{tg} - z^p_{tg})^2}{2 (\sigma_{tg}^2 + \tau^2)},

with the table y of measured shifts of all genes and their standard errors :math:`\sigma`, computed once from the training cells. The
loss is the log density of that table and does not depend on the minibatch.

``"hops"`` is the paper's: the logits W of the edges, accumulated over paths, are fitted to what cells differ from matched controls,

.. math::

    S = W + \sum_{h=1}^{K} W^{h+1} / T^h, \qquad
    L = \lambda\, \mathrm{mean}_{i,j} \big| (d_i S)_j - (|y_i - y_{\mathrm{partner}(i)}|_j - c) \big| + \lambda_s\, \mathrm{mean}\, \sigma(W).

The decoder then sees :math:`[z^b; z^p; c a]`, as in CRADLE-VAE.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import pyro
import torch
from torch import Tensor, nn

from pertura.data._constants import UNKNOWN

from ._base import Action
from ._cradlevae import CRADLEVAE

OBJECTIVES = ("resolvent", "hops")
_RADIUS, _POWER_STEPS = 0.95, 20
N_QUANTILES = 9
_MAX_DRAWN = 2**28


class GPOVAE(CRADLEVAE):
    r"""Generative model and guide of GPO-VAE.

    Parameters
    ----------
    n_genes, n_perturbations, n_batch, **options
        As in :class:`CRADLEVAE`; `effect` is ``"sparse"``.
    row_genes
        The gene of each row of the network, -1 where a perturbation is of none: the perturbations first, then genes that no
        perturbation is of.
    objective
        See the head of this file.
    alignment_weight
        :math:`\lambda`.
    shift_floor
        :math:`\tau`: how far measured shifts are from the network's, beyond their standard errors.
    n_hops, shift_criterion, sparsity_weight
        K, c and :math:`\lambda_s` of ``"hops"``.
    """

    def __init__(
        self,
        n_genes: int,
        n_perturbations: int,
        n_batch: int = 1,
        *,
        row_genes: Sequence[int],
        objective: Literal["resolvent", "hops"] = "resolvent",
        alignment_weight: float = 1.0,
        shift_floor: float = 0.05,
        n_hops: int = 5,
        shift_criterion: float = 0.5,
        sparsity_weight: float = 5.0,
        **options: Any,
    ) -> None:
        self._sizes = (len(row_genes), n_genes)
        self.objective = objective
        super().__init__(n_genes, n_perturbations, n_batch, **options)
        self.alignment_weight, self.shift_floor = alignment_weight, shift_floor
        self.n_hops, self.shift_criterion, self.sparsity_weight = n_hops, shift_criterion, sparsity_weight
        self.register_buffer("row_genes", torch.as_tensor(list(row_genes), dtype=torch.long))
        self.register_buffer("prior_logits", torch.logit(torch.full_like(self.mask_logits, self.mask_prior)))
        self.register_buffer("possible", self._possible())
        if objective == "resolvent":
            self.likelihood = ShiftedLikelihood(self.likelihood, n_genes)
            self.effect_strength = nn.Parameter(-torch.ones(self.n_rows))
            # measured shifts and one over their squared errors; 0: not measured
            self.register_buffer("shift_table", torch.zeros(n_perturbations, n_genes))
            self.register_buffer("shift_precision", torch.zeros(n_perturbations, n_genes))
            # covariances of rows and genes between cells of one condition, over the variances of the genes
            self.register_buffer("covariation", torch.zeros(self.n_rows, n_genes))
            self.register_buffer("covariation_precision", torch.zeros(n_genes))
        else:
            # quantiles of the absolute differences from matched controls, and the share of cells of each perturbation
            self.register_buffer("difference", torch.zeros(n_perturbations, N_QUANTILES, self.n_rows))
            self.register_buffer("share", torch.zeros(n_perturbations))

    def _table_height(self) -> int:
        return self._sizes[0]

    def _shift_width(self) -> int:
        return self._sizes[self.objective == "resolvent"]

    def _state_width(self) -> int:
        # shifts of genes need no decoder
        return 2 * self.n_latent if self.objective == "resolvent" else super()._state_width()

    def _can_rotate(self) -> bool:
        return False  # coordinates are genes

    @property
    def column_genes(self) -> Tensor:
        """The gene of each latent coordinate of a perturbation, ``(n_shift,)``."""
        if self.objective == "hops":
            return self.row_genes
        return torch.arange(self.n_genes, device=self.row_genes.device)

    def _possible(self) -> Tensor:
        """Which pairs may be edges: no gene regulates itself."""
        rows = self.row_genes[:, None]
        if self.objective == "hops":
            return ~torch.eye(self.n_rows, dtype=torch.bool, device=rows.device)
        return (rows < 0) | (rows != self.column_genes)

    # -- network ----------------------------------------------------------------------------------------------------

    def mask_prior_logits(self) -> Tensor:
        """Prior log-odds of edges."""
        return self.prior_logits

    def total(self, weights: Tensor) -> Tensor:
        """Shift of all genes by each row's perturbation, through all paths, ``(..., n_rows, n_genes)``."""
        weights = weights * self.possible
        own = torch.where(self.row_genes >= 0)[0]
        genes = self.row_genes[own]
        direct = weights[..., own, :]
        inner = direct[..., genes]
        inner = inner * (_RADIUS / spectral_radius(inner.detach()).clamp(min=_RADIUS))[..., None, None]
        # what a unit change of each regulator does to all genes: (I - A_RR)^-1 A_R
        unit = torch.linalg.solve(torch.eye(len(own), device=inner.device) - inner, direct)
        strength = self.effect_strength[own, None]
        one_hot = unit.new_zeros(unit.shape[-2:]).scatter_(1, genes[:, None], 1.0)
        result = strength * (one_hot + unit)
        if len(own) == self.n_rows:
            return result
        # a gene that is not measured acts on its targets, and these on theirs: its weights hold how strongly, `s_r` the sign
        outer = self.effect_strength.detach()[:, None] * (weights + weights[..., genes] @ unit)
        return outer.index_copy(-2, own, result)

    def accumulated(self) -> Tensor:
        """Logits of edges over paths of up to K + 1 steps, of perturbations, ``(n_perturbations, n_rows)``."""
        logits = self.mask_logits * self.possible
        path = total = logits[: self.n_perturbations]
        for _ in range(self.n_hops):
            path = path @ logits / self.n_rows
            total = total + path
        return total

    def alignment(self, table: Tensor) -> Tensor:
        """Loss of a pass over all training cells, ``(...)``; `table` holds the shifts of all rows."""
        if self.objective == "resolvent":
            difference = self.shift_table - table[..., : self.n_perturbations, :]
            return 0.5 * self.alignment_weight * (self.shift_precision * difference.square()).sum((-2, -1))
        target = self.difference - self.shift_criterion
        loss = (self.accumulated()[:, None] - target).abs() * (self.row_genes >= 0)
        per_cell = (self.share * loss.mean((1, 2))).sum()
        sparsity = (self.mask_logits.sigmoid() * self.possible).mean()
        return self.n_train * (self.alignment_weight * per_cell + self.sparsity_weight * sparsity)

    def unexplained(self, weights: Tensor) -> Tensor:
        r"""Loss by what the regulators do not explain of how genes vary between cells of one condition, ``(...)``.

        Of :math:`x = x A + e` with covariances C of x it is :math:`\sum_g w_g (A^T C A - 2 A^T C)_{gg} / 2`.
        """
        weights = weights * self.possible
        own = torch.where(self.row_genes >= 0)[0]
        direct, cross = weights[..., own, :], self.covariation[own]
        explained = cross[:, self.row_genes[own]] @ direct - 2.0 * cross
        return 0.5 * self.alignment_weight * (self.covariation_precision * direct * explained).sum((-2, -1))

    def _global_prior(self, n_cells: int, kl_weight: float) -> dict[str, Tensor]:
        globals_ = super()._global_prior(n_cells, kl_weight)
        # the table is data: its weight is not annealed
        with self._weight(n_cells, 1.0):
            if self.objective == "resolvent":
                pyro.factor("covariation", -self.unexplained(globals_["table"]).mean())
            globals_ = self._with_total(globals_)
            pyro.factor("alignment", -self.alignment(globals_["table"]).mean())
        return globals_

    def _global_guide(self, n_cells: int, kl_weight: float) -> dict[str, Tensor]:
        return self._with_total(super()._global_guide(n_cells, kl_weight))

    def _with_total(self, globals_: dict[str, Tensor]) -> dict[str, Tensor]:
        if self.objective == "hops":
            return globals_
        return {**globals_, "table": self.total(globals_["table"])}

    # -- effects ----------------------------------------------------------------------------------------------------

    def shift(self, table: Tensor | None, action: Action) -> Tensor:
        """As of SAMS-VAE; a gene that no perturbation is of is named by its row (``features``, from 1)."""
        if action.features is None or self.objective == "hops":
            return super().shift(table, action)
        row = action.features[..., 0].round().long() - 1
        known = (action.codes == UNKNOWN) & (row >= 0)
        return super().shift(table, Action(torch.where(known, row, action.codes), action.dose))

    def draw_table(self, n_samples: int) -> Tensor:
        """Draws of the shifts of all rows; of networks too large for it their posterior mean."""
        if self.objective == "hops":
            return super().draw_table(n_samples)
        if n_samples * self.mask_logits.numel() > _MAX_DRAWN:
            return self.total(self.mean_network()).expand(n_samples, -1, -1)
        return self.total(super().draw_table(n_samples))

    def mean_network(self) -> Tensor:
        """Posterior mean of E o M, ``(n_rows, n_shift)``."""
        proba = self.mask_logits.sigmoid()
        return proba * self.effect_posterior(proba).loc * self.possible

    def _decoded(self, state: Tensor, batch: Tensor) -> Tensor:
        if self.objective == "hops":
            return super()._decoded(state, batch)
        basal, shift, artefact = state.split([self.n_latent, self.n_genes, self.n_latent], -1)
        return torch.cat([super()._decoded(torch.cat([basal, artefact], -1), batch), shift], -1)


class ShiftedLikelihood(nn.Module):
    """A likelihood whose input ends in a shift of each gene.

    Parameters
    ----------
    likelihood
        One of :mod:`pertura.nn`; the shift is its `offset`.
    n_genes
        Number of genes.
    """

    def __init__(self, likelihood: nn.Module, n_genes: int) -> None:
        super().__init__()
        self.inner, self.n_genes, self.native_scale = likelihood, n_genes, likelihood.native_scale

    def _apart(self, h: Tensor) -> tuple[Tensor, Tensor]:
        return h[..., : -self.n_genes], h[..., -self.n_genes :]

    def initialise(self, mean: Tensor, scale: Tensor) -> None:
        """As of the likelihood."""
        self.inner.initialise(mean, scale)

    def forward(self, h: Tensor, library: Tensor, offset: Tensor | float = 0.0) -> Any:
        """Distribution of expression."""
        h, shift = self._apart(h)
        return self.inner(h, library, shift + offset)

    def abduct(self, h: Tensor, library: Tensor, x: Tensor, offset: Tensor | float = 0.0) -> Tensor:
        """Noise of the cell's own measurement."""
        h, shift = self._apart(h)
        return self.inner.abduct(h, library, x, shift + offset)

    def predict(self, h: Tensor, library: Tensor, noise: Tensor, offset: Tensor | float = 0.0) -> Tensor:
        """Expression with the noise replayed."""
        h, shift = self._apart(h)
        return self.inner.predict(h, library, noise, shift + offset)

    def fresh_noise(self, h: Tensor, library: Tensor) -> Tensor:
        """Noise of a cell that was never measured."""
        return self.inner.fresh_noise(self._apart(h)[0], library)


def spectral_radius(matrix: Tensor) -> Tensor:
    """Upper bound of the spectral radius of matrices ``(..., n, n)``, 0 where there are no loops, ``(...)``.

    The k-th root of the largest row sum of the k-th power of the absolute values.
    """
    total = matrix.new_ones(*matrix.shape[:-1], 1)
    log_norm = matrix.new_zeros(matrix.shape[:-2])
    for _ in range(_POWER_STEPS):
        total = matrix.abs() @ total
        norm = total.amax((-2, -1)) if matrix.shape[-1] else log_norm
        log_norm = log_norm + norm.log()
        total = total / norm.clamp(min=1e-30)[..., None, None]
    return (log_norm / _POWER_STEPS).exp()
