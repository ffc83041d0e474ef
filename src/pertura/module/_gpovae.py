r"""GPO-VAE: perturbation effects aligned with a gene regulatory network (Baek et al. 2025).

CRADLE-VAE with shifts E o M of one coordinate per gene, so that they are weights and edges of a network of genes; each
perturbation is that of a gene. Two objectives align effects with the network, each has a module.

:class:`GPOVAE`: what is done to gene r spreads through the network :math:`A = E \circ M` (rows: regulators). The table y of
measured shifts of all genes, with standard errors :math:`\sigma`, is data:

.. math::

    \zeta_r = s_r\, e_r (I - A)^{-1}, \qquad y_{tg} \sim N(\zeta_{tg},\; \sigma_{tg}^2 + \tau^2), \qquad
    x_i \sim p_\theta\big(x \mid \mathrm{dec}([z^b_i;\; c_i a]) + c(\Delta_i)\big),

with measured effects :math:`\Delta_t` as in :mod:`pertura.module._samsvae`. Those of perturbations that were not measured are
shares of :math:`\zeta`, of the mean effect and of what features say (:func:`pertura.effects.fit_unseen`). With
``effects="latent"`` all act by :math:`\zeta`.

:class:`HopsGPOVAE` has the paper's: the logits W of the edges, accumulated over paths, are fitted to what cells differ from
matched controls,

.. math::

    S = W + \sum_{h=1}^{K} W^{h+1} / T^h, \qquad
    L = \lambda\, \mathrm{mean}_{i,j} \big| (d_i S)_j - (|y_i - y_{\mathrm{partner}(i)}|_j - c) \big| + \lambda_s\, \mathrm{mean}\, \sigma(W),

and the decoder sees :math:`[z^b; z^p; c a]`, as in CRADLE-VAE.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from pertura.data._constants import UNKNOWN

from ._artifact import Artifact, failed, infer_basal
from ._base import Action, Basal, Cells, Globals
from ._departures import RowNoise
from ._draws import run
from ._gene_effects import GeneEffects
from ._latent import Decoder, LatentModule, NormalEncoder, beside
from ._shifts import SparseShifts, share_of_data

N_QUANTILES = 9
_RADIUS, _POWER_STEPS = 0.95, 32
_PROBES = (1.0, 1.618, 2.414, 3.303)  # frequencies of the vectors of the power iteration
_MAX_DRAWN = 2**28


class GeneIndexed(LatentModule):
    """What the modules of both objectives consist of.

    Parameters
    ----------
    n_genes, n_perturbations, n_batch
        Sizes of the data.
    row_genes
        The gene of each row of the network, -1 where a perturbation is of none: the perturbations first, then genes that
        no perturbation is of.
    n_columns
        Number of targets of the network.
    n_decoded
        Width of what the decoder sees.
    n_seen
        Width of the shift that the encoder sees.
    alignment_weight
        Of the loss that aligns effects with the network.
    n_latent, n_layers, n_encoder_layers, n_hidden, likelihood, link_sharpness, normalize_input, effect_lr_factor, artifact_lr_factor
        As in :class:`CRADLEVAE`.
    combinations, counterfactual_weight, class_balance, match_quality
        Of the artifact; see :class:`~pertura.module._artifact.Artifact`.
    **shift_options
        Of the shifts; see :class:`SparseShifts`.
    """

    no_weight_decay = {"shifts.", "artifact.", "likelihood.log_theta"}
    possible: Tensor

    def __init__(
        self,
        n_genes: int,
        n_perturbations: int,
        n_batch: int,
        *,
        row_genes: Sequence[int],
        n_columns: int,
        n_decoded: int,
        n_seen: int,
        alignment_weight: float,
        n_latent: int = 30,
        n_layers: int = 0,
        n_encoder_layers: int = 1,
        n_hidden: int = 128,
        likelihood: Literal["nb", "normal"] = "nb",
        link_sharpness: float = 1.0,
        normalize_input: bool = True,
        effect_lr_factor: float = 0.3,
        artifact_lr_factor: float = 5.0,
        combinations: Sequence[Sequence[int]] = (),
        counterfactual_weight: float = 10.0,
        class_balance: bool = False,
        match_quality: bool = True,
        **shift_options: Any,
    ) -> None:
        super().__init__(n_genes, n_batch, normalize_input)
        self.n_perturbations, self.n_latent, self.alignment_weight = n_perturbations, n_latent, alignment_weight
        self.lr_factors = {
            **dict.fromkeys(("shifts.", "effect_strength"), effect_lr_factor),
            "artifact.": artifact_lr_factor,
        }
        self.register_buffer("row_genes", torch.as_tensor(list(row_genes), dtype=torch.long))
        self.shifts = SparseShifts(len(self.row_genes), n_columns, n_hidden=n_hidden, **shift_options)
        self.artifact = Artifact(
            n_perturbations,
            n_genes,
            n_latent,
            combinations,
            counterfactual_weight=counterfactual_weight,
            class_balance=class_balance,
            match_quality=match_quality,
        )
        n_in = [n_genes, self.n_covariates, n_seen, self.artifact.n_seen]
        self.encoder = NormalEncoder(n_in, n_latent, n_hidden, n_encoder_layers)
        self.decoder = Decoder([n_decoded, self.n_covariates], n_hidden, n_layers)
        self.make_likelihood(likelihood, self.decoder.n_out, link_sharpness)

    def strength(self, action: Action) -> Tensor:
        """Dose response of each member, 0 for those outside the vocabulary."""
        return self.shifts.strength(action)


class GPOVAE(GeneIndexed):
    r"""Generative model and guide of GPO-VAE with shifts that spread through the network.

    Parameters
    ----------
    n_genes, n_perturbations, n_batch, row_genes, **options
        As in ``GeneIndexed``; `n_columns`, `n_decoded` and `n_seen` follow.
    effects
        What measured perturbations do: ``"measured"``, their measured effect; ``"latent"``, what the network says.
    alignment_weight
        Weight of the log density of the table of shifts.
    shift_floor
        :math:`\tau`: how far measured shifts are from the network's, beyond their standard errors.

    Attributes
    ----------
    possible
        Which pairs may be edges, ``(n_rows, n_genes)``: no gene regulates itself.
    effect_strength
        :math:`s`, ``(n_rows,)``.
    shift_table, shift_precision
        y, and one over its squared errors, 0 where it was not measured; ``(n_rows, n_genes)``. Rows that were not measured
        may have what features say of them.
    gene_effects
        Effects of all rows, with ``effects="measured"``.
    covariation, covariation_precision
        Covariances of rows and genes between cells of one condition, ``(n_rows, n_genes)``, and their weight in units of
        the variances of the genes, ``(n_genes,)``.
    """

    def __init__(
        self,
        n_genes: int,
        n_perturbations: int,
        n_batch: int = 1,
        *,
        row_genes: Sequence[int],
        effects: Literal["measured", "latent"] = "measured",
        alignment_weight: float = 1.0,
        shift_floor: float = 0.05,
        n_latent: int = 30,
        combinations: Sequence[Sequence[int]] = (),
        **options: Any,
    ) -> None:
        super().__init__(
            n_genes,
            n_perturbations,
            n_batch,
            row_genes=row_genes,
            n_columns=n_genes,
            n_decoded=2 * n_latent,
            n_seen=n_genes * (effects == "latent"),
            alignment_weight=alignment_weight,
            n_latent=n_latent,
            combinations=combinations,
            **options,
        )
        self.shift_floor = shift_floor
        n_rows, rows = len(self.row_genes), self.row_genes[:, None]
        self.register_buffer("possible", (rows < 0) | (rows != torch.arange(n_genes)))
        self.effect_strength = nn.Parameter(-torch.ones(n_rows))
        self.register_buffer("shift_table", torch.zeros(n_rows, n_genes))
        self.register_buffer("shift_precision", torch.zeros(n_rows, n_genes))
        self.register_buffer("covariation", torch.zeros(n_rows, n_genes))
        self.register_buffer("covariation_precision", torch.zeros(n_genes))
        self.gene_effects: GeneEffects | None = None
        if effects == "measured":
            self.gene_effects = GeneEffects(n_rows, n_genes, 0, combinations, explained=False)

    # -- generative model and guide ---------------------------------------------------------------------------------

    def model(self, cells: Cells, kl_weight: float = 1.0) -> None:
        """Joint density of a minibatch, its share of the global terms included."""
        with share_of_data(self, len(cells), kl_weight):
            artifact, table = self.artifact.prior(), self.shifts.prior()
        total = self.sample_total(table)
        noise = None if self.gene_effects is None else self.gene_effects.sample_noise()
        if self.training:
            with share_of_data(self, len(cells), 1.0):  # the tables are data: their weight is not annealed
                pyro.factor("covariation", -self.unexplained(table).mean())
                pyro.factor("alignment", -self.alignment(total).mean())
        offset = self.offset(cells.action.one, total, noise)
        with pyro.plate("cells", len(cells)):
            with pyro.poutine.scale(scale=kl_weight):
                z = pyro.sample("z", dist.Normal(cells.x.new_zeros(self.n_latent), 1.0).to_event(1))
            at_fault = failed(cells) * artifact
            pyro.deterministic("state", beside(z, offset, at_fault), event_dim=1)
            pyro.deterministic("basal", beside(z, torch.zeros_like(offset), at_fault), event_dim=1)
            h = self.decoder(beside(z, at_fault), self.one_hot_batch(cells.batch))
            with pyro.poutine.scale(scale=self.artifact.class_weight(cells)):
                pyro.sample("x", self.likelihood(h, cells.library, offset), obs=cells.x)

    def guide(self, cells: Cells, kl_weight: float = 1.0) -> None:
        """q(A) q(M) q(E | M) q(z | x, ...), and in training the counterfactual loss."""
        with share_of_data(self, len(cells), kl_weight):
            artifact, table = self.artifact.guide(), self.shifts.guide()
        total, shift, effect = self.sample_total(table), None, 0.0
        if self.gene_effects is None:
            shift = self.offset(cells.action, total, None)
        else:
            self.gene_effects.sample_noise()
            action = self.by_row(cells.action)
            effect = self.gene_effects.delta(action, self.strength(action)) / self.input_scale
        infer_basal(self, cells, artifact, shift, effect, kl_weight)

    def sample_total(self, table: Tensor) -> Tensor:
        """Site of what follows from the network, so that it is computed once for all cells."""
        return pyro.sample("total", Computed(lambda: self.total(table)))

    def draw_globals(self, n_draws: int, cells: Cells) -> Globals:
        """As of all modules. The network is drawn where effects are its own; too large ones have their mean, with a warning."""
        one = self.possible.new_zeros(1, 1, self.n_genes, dtype=torch.float)
        if self.gene_effects is None and n_draws * self.possible.numel() <= _MAX_DRAWN:
            # what follows reads the total alone
            return {**super().draw_globals(n_draws, cells), "mask": one, "effect": one}
        fixed = {"mask": one, "effect": one, "total": one}
        if self.gene_effects is None:
            warnings.warn(
                f"{n_draws} draws of a network of {' x '.join(map(str, self.possible.shape))} genes are too large. Its posterior "
                "mean is used: intervals lack the uncertainty of the network. Ask for fewer `n_samples`.",
                stacklevel=2,
            )
            with torch.no_grad():
                fixed["total"] = self.total(self.mean_network())[None]
        nodes = run(self.guide, cells, n_draws, fixed).nodes
        names = {"artifact"} | ({"effect_noise"} if self.gene_effects is not None else set())
        return {**fixed, **{name: nodes[name]["value"] for name in names}}

    # -- effects ----------------------------------------------------------------------------------------------------

    def offset(self, action: Action, total: Tensor, noise: RowNoise | None) -> Tensor:
        """What is added to the activation of each gene, ``(..., n_cells, n_genes)``."""
        action = self.by_row(action)
        if self.gene_effects is None:
            return self.shifts(total, action)
        return self.gene_effects(action, self.strength(action), noise)

    def by_row(self, action: Action) -> Action:
        """The same with the rows of genes that no perturbation is of as codes; their number, from 1, is the first feature."""
        if action.features is None:
            return action
        row = action.features[..., 0].round().long() - 1
        codes = torch.where((action.codes == UNKNOWN) & (row >= 0), row, action.codes)
        return Action(codes, action.dose, action.features[..., 1:])

    def strength(self, action: Action) -> Tensor:
        """Dose response of each member; that of perturbations without a row is their dose."""
        return super().strength(action) + action.dose * (action.codes == UNKNOWN)

    def activation(self, basal: Basal) -> Tensor:
        """Activations of genes without any perturbation or artifact, ``(n_draws, n_cells, n_genes)``."""
        z = basal.state[..., : self.n_latent]
        return self.likelihood.linear(
            self.decoder(beside(z, torch.zeros_like(z)), self.one_hot_batch(basal.cells.batch))
        )

    # -- network ----------------------------------------------------------------------------------------------------

    def total(self, weights: Tensor, strength: Tensor | None = None) -> Tensor:
        r"""Shift of all genes by each row's perturbation, through all paths, ``(..., n_rows, n_genes)``.

        Networks whose loops would let shifts grow without bound are scaled down, all weights between regulators alike. `strength` is what
        is done to each row's own gene, by default :attr:`effect_strength`.
        """
        strength = self.effect_strength if strength is None else strength
        weights = weights * self.possible
        own = torch.where(self.row_genes >= 0)[0]
        genes = self.row_genes[own]
        direct = weights[..., own, :]
        inner = direct[..., genes]
        inner = inner * (_RADIUS / spectral_radius(inner.detach()).clamp(min=_RADIUS))[..., None, None]
        # what a unit change of each regulator does to all genes: (I - A_RR)^-1 A_R
        unit = torch.linalg.solve(torch.eye(len(own), device=inner.device, dtype=inner.dtype) - inner, direct)
        one_hot = unit.new_zeros(unit.shape[-2:]).scatter_(1, genes[:, None], 1.0)
        result = strength[own, None] * (one_hot + unit)
        if len(own) == len(self.row_genes):
            return result
        # a gene that is not measured acts on its targets, and these on theirs: its weights hold how strongly, `s_r` the sign
        outer = strength.detach()[:, None] * (weights + weights[..., genes] @ unit)
        return outer.index_copy(-2, own, result)

    def mean_network(self) -> Tensor:
        """Posterior mean of E o M, ``(n_rows, n_genes)``."""
        return self.shifts.mean() * self.possible

    def alignment(self, total: Tensor) -> Tensor:
        """Negative log density of the table of shifts, up to a constant, ``(...)``."""
        difference = self.shift_table - total
        return 0.5 * self.alignment_weight * (self.shift_precision * difference.square()).sum((-2, -1))

    def unexplained(self, weights: Tensor) -> Tensor:
        r"""Loss by what the regulators do not explain of how genes vary between cells of one condition, ``(...)``.

        Of :math:`x = x A + e` with covariances C of x it is :math:`\sum_g w_g (A^T C A - 2 A^T C)_{gg} / 2`.
        """
        own = torch.where(self.row_genes >= 0)[0]
        direct, cross = (weights * self.possible)[..., own, :], self.covariation[own]
        explained = cross[:, self.row_genes[own]] @ direct - 2.0 * cross
        return 0.5 * self.alignment_weight * (self.covariation_precision * direct * explained).sum((-2, -1))


class HopsGPOVAE(GeneIndexed):
    """Generative model and guide of GPO-VAE with the objective of the paper.

    Parameters
    ----------
    n_genes, n_perturbations, n_batch, row_genes, **options
        As in ``GeneIndexed``; `n_columns`, `n_decoded` and `n_seen` follow.
    alignment_weight, n_hops, shift_criterion, sparsity_weight
        Weight of the loss per cell, K, c, and the weight of the mean probability of edges.

    Attributes
    ----------
    possible
        Which pairs may be edges, ``(n_rows, n_rows)``: no gene regulates itself.
    difference
        Quantiles of the absolute differences from matched controls, ``(n_perturbations, n_quantiles, n_rows)``.
    share
        Share of each perturbation in the cells, ``(n_perturbations,)``.
    """

    def __init__(
        self,
        n_genes: int,
        n_perturbations: int,
        n_batch: int = 1,
        *,
        row_genes: Sequence[int],
        alignment_weight: float = 100.0,
        n_hops: int = 5,
        shift_criterion: float = 0.5,
        sparsity_weight: float = 5.0,
        n_latent: int = 30,
        **options: Any,
    ) -> None:
        n_rows = len(row_genes)
        super().__init__(
            n_genes,
            n_perturbations,
            n_batch,
            row_genes=row_genes,
            n_columns=n_rows,
            n_decoded=2 * n_latent + n_rows,
            n_seen=n_rows,
            alignment_weight=alignment_weight,
            n_latent=n_latent,
            **options,
        )
        self.n_hops, self.shift_criterion, self.sparsity_weight = n_hops, shift_criterion, sparsity_weight
        self.register_buffer("possible", ~torch.eye(n_rows, dtype=torch.bool))
        self.register_buffer("difference", torch.zeros(n_perturbations, N_QUANTILES, n_rows))
        self.register_buffer("share", torch.zeros(n_perturbations))

    def model(self, cells: Cells, kl_weight: float = 1.0) -> None:
        """Joint density of a minibatch, its share of the global terms included."""
        with share_of_data(self, len(cells), kl_weight):
            artifact, table = self.artifact.prior(), self.shifts.prior()
        if self.training:
            with share_of_data(self, len(cells), 1.0):
                pyro.factor("alignment", -self.alignment())
        with pyro.plate("cells", len(cells)):
            with pyro.poutine.scale(scale=kl_weight):
                z = pyro.sample("z", dist.Normal(cells.x.new_zeros(self.n_latent), 1.0).to_event(1))
            shift, at_fault = self.shifts(table, cells.action), failed(cells) * artifact
            state = pyro.deterministic("state", beside(z, shift, at_fault), event_dim=1)
            pyro.deterministic("basal", beside(z, torch.zeros_like(shift), at_fault), event_dim=1)
            h = self.decoder(state, self.one_hot_batch(cells.batch))
            with pyro.poutine.scale(scale=self.artifact.class_weight(cells)):
                pyro.sample("x", self.likelihood(h, cells.library), obs=cells.x)

    def guide(self, cells: Cells, kl_weight: float = 1.0) -> None:
        """q(A) q(M) q(E | M) q(z | x, shift, artifact), and in training the counterfactual loss."""
        with share_of_data(self, len(cells), kl_weight):
            artifact, table = self.artifact.guide(), self.shifts.guide()
        infer_basal(self, cells, artifact, self.shifts(table, cells.action), 0.0, kl_weight)

    def accumulated(self) -> Tensor:
        """Logits of edges over paths of up to K + 1 steps, of perturbations, ``(n_perturbations, n_rows)``."""
        logits = self.shifts.mask_logits * self.possible
        path = total = logits[: self.n_perturbations]
        for _ in range(self.n_hops):
            path = path @ logits / len(self.row_genes)
            total = total + path
        return total

    def alignment(self) -> Tensor:
        """Loss of a pass over all training cells."""
        target = self.difference - self.shift_criterion
        loss = (self.accumulated()[:, None] - target).abs() * (self.row_genes >= 0)
        per_cell = (self.share * loss.mean((1, 2))).sum()
        sparsity = (self.shifts.proba() * self.possible).mean()
        return self.n_train * (self.alignment_weight * per_cell + self.sparsity_weight * sparsity)


class Computed(TorchDistribution):
    """What follows from other variables, as a site: computed where it is not given, and with divergence 0.

    Parameters
    ----------
    compute
        Gives the value.
    """

    arg_constraints: dict[str, Any] = {}
    has_rsample = True

    def __init__(self, compute: Callable[[], Tensor], batch_shape: Sequence[int] = ()) -> None:
        self.compute = compute
        super().__init__(torch.Size(batch_shape), torch.Size(), validate_args=False)

    def expand(self, batch_shape: Sequence[int], _instance: None = None) -> Computed:
        """The same over a larger batch."""
        return Computed(self.compute, batch_shape)

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """The value."""
        return self.compute()

    def log_prob(self, value: Tensor) -> Tensor:
        """0: it cancels."""
        return torch.zeros(self.batch_shape, device=value.device)


def spectral_radius(matrix: Tensor) -> Tensor:
    """Spectral radius of matrices ``(..., n, n)``, 0 where there are no loops, ``(...)``.

    By how much powers of the matrix lengthen some vectors, signs included: that of the absolute values is up to the square root of n
    larger. The first powers are left out, in which weights that lead nowhere count.
    """
    n = matrix.shape[-1]
    at = torch.arange(1, n + 1, device=matrix.device, dtype=matrix.dtype)
    probe = torch.cos(torch.outer(at, at.new_tensor(_PROBES)))
    log_norm = matrix.new_zeros(*matrix.shape[:-2], len(_PROBES))
    if not n:
        return log_norm.amax(-1)
    for step in range(2 * _POWER_STEPS):
        probe = matrix @ probe
        norm = probe.norm(dim=-2)
        probe = probe / norm.clamp(min=1e-30)[..., None, :]
        if step >= _POWER_STEPS:
            log_norm = log_norm + norm.log()
    return (log_norm / _POWER_STEPS).exp().amax(-1)
