r"""InfoSEM: a structural-equation model with informative priors on its network (Cui et al.; DeepSEM without them).

.. math::

    A_{ik}              &\sim \mathrm{Laplace}(0, \sigma_a \exp(b^\top f_{ik})) \\
    z                   &\sim N(0, I), \qquad \tilde x = z (I - A)^{-1} \\
    x_g \mid \tilde x_g &\sim N(f_\theta(\tilde x_g), s_g^2)

with features f of a pair of genes, see :mod:`pertura.module._pairs`; without them :math:`b = 0` (DeepSEM). b is learned from the weights
of a first part of the training without it, after which the weights start anew. The paper's prior is

.. math::

    A^e_{ik} \sim \mathrm{Laplace}(h_i^\top w_s + h_k^\top w_t, \sigma_a), \qquad
    A^l_{ik} \sim N(m_{ik}, \sigma_p^2), \quad m_{ik} = \mathrm{logit}(.95, .05, .5), \qquad
    A = A^e \odot \mathrm{sigmoid}(A^l)

with gene embeddings h; without known edges :math:`A = A^e`. x is standardized expression, i a regulator, k a target. The guide is :math:`q(z \mid x) = N(\mu(I - A), \exp(\lambda (I - A)))`, where an encoder
reads :math:`(\mu_g, \lambda_g)` from :math:`x_g`, and A by MAP or normal. All genes share f and the encoder.

A knock-out of gene g is do(g): the cell keeps the z of all other genes, and :math:`\tilde x_g` is what no expression is encoded as.
That is a shift of :math:`z_g` alone, which moves the states of all genes along the paths from g. Expression of g itself is set, not decoded:
to 0, or to the smallest registered value of data that have negative ones. A cell that was knocked out is treated so in training:
its :math:`z_g` has a flat prior.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from pertura.nn._likelihoods import Gaussian, Point, RectifiedGaussian
from pertura.nn._scalar import ScalarMLP
from pertura.nn._sem import propagate, remove_regulation, total_effect

from ._base import Action, Basal, Cells, Counterfactual, Globals, PerturbationModule
from ._pairs import PairPrior, edge_log_odds, ranks

# logits of known edges, pairs known to be none, and all others
LOGITS = {1: math.log(0.95 / 0.05), -1: math.log(0.05 / 0.95), 0: 0.0}
_FLAT_SD = 10.0  # of the noise of a gene that an experimenter sets
# of noise, in standard deviations of the gene: that of the squared error is the largest, as the state explains nothing where noise may be all
_MIN_SCALE, _MAX_SCALE = 0.1, math.sqrt(0.5)
_MAX_NETWORKS = 8  # drawn from a normal posterior for one prediction
_CLIP = 10.0  # of standardized expression
_INFORMED_AT = 0.5  # share of the training after which the weights so far teach the prior of the pairs


class InfoSEM(PerturbationModule):
    """Generative model and guide of InfoSEM, an ensemble side by side.

    Parameters
    ----------
    n_genes, n_batch
        Sizes of the data.
    regulators
        Positions of the genes that may regulate.
    knocked_out
        Position of the gene that each registered perturbation knocks out, -1 for none.
    embedding
        h of the paper's prior, ``(n_genes, n_dimensions)``, whitened; `None` for a prior mean of 0.
    known
        A^l of the paper's prior: 1 for known edges, -1 for known non-edges, 0 else, ``(n_regulators, n_genes)``; `None` for none.
    pairs
        Features of the pairs, of the prior of their size; `None` for none.
    combined
        Whether the log-odds of edges are set when training ends, by the weights and other networks.
    n_ensemble
        Models trained side by side on the same minibatches.
    posterior
        ``"map"`` or ``"variational"`` (normal) posterior of A.
    likelihood
        ``"mse"``: sd of half a gene's variance, as the squared error has it; ``"normal"``: sd a function of the state, at most that.
    hidden
        Widths of encoder and decoder.
    alpha, beta
        Weight of mean absolute A, and of the divergence of z; the sd of the Laplace prior is G / (N alpha).
    augmentation
        Share of entries set to zero in a training step.
    sparsity_delay
        Share of the training before the prior of A counts.
    z_prior
        ``"standard"`` or ``"learned"`` mean and variance of each gene's noise.
    prior_shrinkage
        Weight of the absolute prior mean in units of that of the deviation of A from it.
    edge_logit_sd
        Sd of the prior of the logits of known edges.
    max_radius
        Spectral radius beyond which A is scaled down; 0 for no limit.
    n_grid
        See :class:`~pertura.nn.ScalarMLP`.
    native_scale
        Scale of the expression that is modelled: ``"log1p"`` of counts per 10,000, or ``"layer"``.
    """

    def __init__(
        self,
        n_genes: int,
        n_batch: int,
        *,
        regulators: NDArray[np.int64],
        knocked_out: NDArray[np.int64],
        embedding: NDArray[np.float32] | None = None,
        known: NDArray[np.int8] | None = None,
        pairs: PairPrior | None = None,
        combined: bool = False,
        n_ensemble: int = 1,
        posterior: Literal["map", "variational"] = "map",
        likelihood: Literal["mse", "normal"] = "mse",
        hidden: Sequence[int] = (64, 64),
        alpha: float = 100.0,
        beta: float = 1.0,
        augmentation: float = 0.1,
        sparsity_delay: float = 0.05,
        z_prior: Literal["standard", "learned"] = "standard",
        prior_shrinkage: float = 0.5,
        edge_logit_sd: float = 1.0,
        max_radius: float = 0.95,
        n_grid: int = 512,
        native_scale: Literal["log1p", "layer"] = "layer",
    ) -> None:
        super().__init__()
        self.n_genes, self.n_latent, self.n_batch, self.n_ensemble = n_genes, n_genes, n_batch, n_ensemble
        self.native_scale, self.alpha, self.beta = native_scale, alpha, beta
        self.augmentation, self.sparsity_delay, self.prior_shrinkage = augmentation, sparsity_delay, prior_shrinkage
        self.edge_logit_sd, self.max_radius = edge_logit_sd, max_radius
        self.heteroscedastic = likelihood == "normal"
        self.progress, self._probe, self._growth = 0.0, None, None
        # entries start at, are measured in units of, and move in steps proportional to 1 / (G - 1)
        self.unit = 1.0 / max(n_genes - 1, 1)

        self.register_buffer("regulators", torch.as_tensor(regulators))
        self.register_buffer("knocked_out", torch.as_tensor(knocked_out))
        self.register_buffer("no_loops", torch.ones(len(regulators), n_genes))
        self.no_loops[torch.arange(len(regulators)), self.regulators] = 0.0
        shape = (n_ensemble, len(regulators), n_genes)
        start = self._start(shape)
        self.edge_logit = None
        if known is not None:
            logits = torch.zeros(shape[1:])
            for label, logit in LOGITS.items():
                logits[torch.as_tensor(known) == label] = logit
            self.register_buffer("known_logit", logits)
            self.edge_logit = nn.Parameter(logits.repeat(n_ensemble, 1, 1))
            start = start / logits.sigmoid()
        self.network_weight = nn.Parameter(start * self.no_loops)
        self.network_log_sd = None
        if posterior == "variational":
            self.network_log_sd = nn.Parameter(torch.full(shape, math.log(0.1 * self.unit)))
        self.pairs, self.additive = pairs, embedding is not None
        # whether the log-odds of edges are known
        self.register_buffer("informed", torch.tensor(False))
        if combined or pairs is not None:
            self.register_buffer("log_odds", torch.zeros(shape[1:]))
        if pairs is not None:
            self.register_buffer("log_size", torch.zeros(shape[1:]))
            self.register_buffer("first_size", torch.zeros(shape[1:]))
            self.register_buffer("pair_coefficients", torch.zeros(len(pairs.features), 3))
        if embedding is not None:
            self.register_buffer("embedding", torch.as_tensor(embedding))
            self.prior_source = nn.Parameter(torch.zeros(n_ensemble, embedding.shape[1]))
            self.prior_target = nn.Parameter(torch.zeros(n_ensemble, embedding.shape[1]))

        self.encoder = ScalarMLP(n_ensemble, hidden, 2, n_grid)
        self.decoder = ScalarMLP(n_ensemble, hidden, 2 if self.heteroscedastic else 1, n_grid)
        self.noise_mean = self.noise_log_var = None
        if z_prior == "learned":
            self.noise_mean = nn.Parameter(1e-2 * torch.randn(n_ensemble, n_genes))
            self.noise_log_var = nn.Parameter(1e-2 * torch.randn(n_ensemble, n_genes))
        self.register_buffer("input_mean", torch.zeros(n_batch, n_genes))
        self.register_buffer("input_scale", torch.ones(n_genes))
        self.register_buffer("least", torch.zeros(n_genes))
        self.register_buffer("residual_sd", torch.ones(n_ensemble, n_genes))

    @property
    def lr_factors(self) -> dict[str, float]:
        """Learning rates in units of that of encoder and decoder (5e-4); A and its prior mean move with 1 / (G - 1)."""
        return {"network_": 33.0 * self.unit, "prior_": 3.0, "edge_logit": 20.0}

    # -- the network ------------------------------------------------------------------------------------------------

    def _start(self, shape: Sequence[int]) -> Tensor:
        return self.unit * (1.0 + 0.164 * torch.rand(tuple(shape), device=self.no_loops.device))

    @torch.no_grad()
    def moved(self) -> tuple[float, float]:
        """Mean distance of the weights from where they start, and the largest weight, in units of the start."""
        weight = self.network()[:, self.no_loops.bool()] / self.unit
        return float((weight - 1.082).abs().mean()), float(weight.abs().max())

    @torch.no_grad()
    def learn_pair_prior(self) -> None:
        """Learn what features of pairs say of the size of the weights that were found without them, and start anew with it."""
        self.first_size.copy_(self.network().abs().mean(0))
        found = self.pairs.learn(self.first_size.cpu().numpy())
        self.log_size.copy_(torch.as_tensor(found.log_size))
        self.log_odds.copy_(torch.as_tensor(found.log_odds))
        self.pair_coefficients.copy_(torch.as_tensor(found.coefficients))
        self.network_weight.copy_(self._start(self.network_weight.shape) * self.no_loops)
        if self.network_log_sd is not None:
            self.network_log_sd.fill_(math.log(0.1 * self.unit))
        self.informed.fill_(True)

    @torch.no_grad()
    def rank_pairs(self, evidence: NDArray[np.float64]) -> None:
        """Set the log-odds of edges, which rise with the evidence, ``(n_regulators, n_genes)``."""
        if self.pairs is None:
            found = edge_log_odds(ranks(evidence))
        else:
            found = self.pairs.learn(self.first_size.cpu().numpy(), evidence).log_odds
        self.log_odds.copy_(torch.as_tensor(found))
        self.informed.fill_(True)

    @torch.no_grad()
    def mean_network(self) -> Tensor:
        """Mean size of the weights of the members, with the sign of their mean, ``(n_regulators, n_genes)``."""
        weight = self.network()
        return weight.abs().mean(0) * weight.mean(0).sign()

    def prior_mean(self) -> Tensor | float:
        """M, ``(n_members, n_regulators, n_genes)``; 0 but for the paper's prior."""
        if not self.additive:
            return 0.0
        h = self.embedding
        mean = (h[self.regulators] @ self.prior_source.mT).mT[..., None] + (h @ self.prior_target.mT).mT[:, None]
        return self.unit * (mean * self.no_loops)

    def network(self, weight: Tensor | None = None, logit: Tensor | None = None) -> Tensor:
        """A, ``(n_members, n_regulators, n_genes)``, by default at the posterior mean of its factors."""
        weight = self.network_weight * self.no_loops if weight is None else weight * self.no_loops
        return weight if self.edge_logit is None else weight * self.edge_proba(logit)

    def edge_proba(self, logit: Tensor | None = None) -> Tensor | None:
        """sigmoid(A^l) of the paper's prior; `None` without known edges."""
        return None if self.edge_logit is None else torch.sigmoid(self.edge_logit if logit is None else logit)

    def regulated(self, z: Tensor, weight: Tensor) -> Tensor:
        """State of the genes, z (I - A)^-1."""
        return propagate(z, weight, self.regulators)

    def unregulated(self, x: Tensor, weight: Tensor) -> Tensor:
        """What regulators do not explain, x (I - A)."""
        return remove_regulation(x, weight, self.regulators)

    # -- generative model and guide ---------------------------------------------------------------------------------

    def model(self, cells: Cells, kl_weight: float = 1.0, x: Tensor | None = None) -> None:
        """Joint density of a minibatch, averaged over the members of the ensemble.

        Parameters
        ----------
        cells
            Minibatch.
        kl_weight
            Weight of the divergence of z.
        x
            Standardized expression for each member, ``(n_members, n_cells, n_genes)``; members differ in what
            augmentation set to zero. By default that of the cells.
        """
        x = self.clipped(cells).expand(self.n_ensemble, -1, -1) if x is None else x
        weight = self._sample_network(len(cells))
        prior = dist.Normal(*self.noise_prior(weight, cells.action), validate_args=False).to_event(1)
        members = pyro.plate("members", self.n_ensemble, dim=-2)
        with pyro.poutine.scale(scale=1.0 / self.n_ensemble), members, pyro.plate("cells", len(cells), dim=-1):
            with pyro.poutine.scale(scale=self.beta * kl_weight):
                z = pyro.sample("z", prior)
            state = pyro.deterministic("state", self.regulated(z, weight), event_dim=1)
            pyro.sample("x", dist.Normal(*self.expression(state)).to_event(1), obs=x)

    def guide(self, cells: Cells, kl_weight: float = 1.0, x: Tensor | None = None) -> None:
        """q(A), where it is not by MAP, and q(z | x, A)."""
        x = self.clipped(cells).expand(self.n_ensemble, -1, -1) if x is None else x
        weight = None
        if self.network_log_sd is not None:
            with pyro.poutine.scale(scale=self._share(len(cells))):
                posterior = dist.Normal(self.network_weight * self.no_loops, self.network_log_sd.exp())
                weight = pyro.sample("A_e", posterior.to_event(3))
        posterior = dist.Normal(*self.noise_posterior(x, self.network(weight)), validate_args=False).to_event(1)
        members = pyro.plate("members", self.n_ensemble, dim=-2)
        with (
            pyro.poutine.scale(scale=self.beta * kl_weight / self.n_ensemble),
            members,
            pyro.plate("cells", len(cells), dim=-1),
        ):
            pyro.sample("z", posterior)

    def _sample_network(self, n_cells: int) -> Tensor:
        """A from its prior, at the weight that one minibatch has in the data; by MAP a parameter observed under its prior."""
        sd = self.n_genes / (max(self.n_train, n_cells) * self.alpha)
        if self.pairs is not None:
            sd = sd * self.log_size.exp()
        mean = self.prior_mean()
        own = self.network_weight * self.no_loops
        with pyro.poutine.scale(scale=self._share(n_cells)):
            prior = dist.Laplace(mean + torch.zeros_like(own), sd, validate_args=False).to_event(3)
            weight = pyro.sample("A_e", prior, obs=own if self.network_log_sd is None else None)
            if self.edge_logit is not None:
                prior = dist.Normal(self.known_logit.expand_as(own), self.edge_logit_sd, validate_args=False)
                pyro.sample("A_l", prior.to_event(3), obs=self.edge_logit)
            if isinstance(mean, Tensor):
                # without this the deviation of A from M is dear, and M free: A then collapses onto M
                pyro.factor("M", -self.prior_shrinkage * (mean.abs() / sd).sum())
        return self.network(weight)

    def _share(self, n_cells: int) -> float:
        """Weight of the prior of A in a minibatch."""
        share = n_cells / max(self.n_train, n_cells) / self.n_ensemble
        return 1e-8 * share if self.training and self.progress < self.sparsity_delay else share

    def noise_prior(self, weight: Tensor, action: Action, members: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """Mean and sd of z, to be broadcast over members, cells and genes."""
        mean, sd = weight.new_zeros(self.n_genes), weight.new_ones(self.n_genes)
        if self.noise_mean is not None:
            # the learned prior is one of the state's own scale, as the guide is
            mean = self.unregulated(self.noise_mean[members, None], weight)
            sd = _standard_deviation(self.unregulated(self.noise_log_var[members, None], weight))
        intervened = self.intervened(action)
        return mean, sd if intervened is None else torch.where(intervened, _FLAT_SD, sd)

    def noise_posterior(self, x: Tensor, weight: Tensor, members: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """Mean and sd of q(z | x, A)."""
        mean, log_var = self.encoder(x, members)
        return self.unregulated(mean, weight), _standard_deviation(self.unregulated(log_var, weight))

    def expression(self, state: Tensor, members: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """Mean and sd of standardized expression."""
        if self.heteroscedastic:
            loc, log_scale = self.decoder(state, members)
            return loc, _MIN_SCALE + (_MAX_SCALE - _MIN_SCALE) * log_scale.sigmoid()
        (loc,) = self.decoder(state, members)
        return loc, torch.full((), _MAX_SCALE, device=loc.device)

    # -- scales of expression ---------------------------------------------------------------------------------------

    def normalized(self, cells: Cells) -> Tensor:
        """Counts as log1p of counts per 10,000 of the library; other values as they are."""
        return cells.x if self.native_scale == "layer" else torch.log1p(1e4 * cells.x / cells.library)

    def clipped(self, cells: Cells) -> Tensor:
        """Normalized expression less the mean of the batch, in standard deviations of the gene, at most 10 of them."""
        return self._standardized(self.normalized(cells), cells)

    def no_expression(self, cells: Cells) -> Tensor:
        """What :meth:`clipped` gives where a gene is not expressed, ``(n_cells, n_genes)``."""
        return self._standardized(self.least, cells)

    def _standardized(self, value: Tensor | float, cells: Cells) -> Tensor:
        return ((value - self.input_mean[self._batch(cells)]) / self.input_scale).clamp(-_CLIP, _CLIP)

    def _batch(self, cells: Cells) -> Tensor:
        return cells.batch.clamp(max=self.n_batch - 1)

    # -- training ---------------------------------------------------------------------------------------------------

    def _get_fn_args_from_batch(self, batch: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        cells = Cells.from_tensors(batch)
        x = self.clipped(cells).expand(self.n_ensemble, -1, -1)
        if self.training and self.augmentation > 0:
            dropped = torch.rand(x.shape, device=x.device) < self.augmentation
            # 0 is also the mean of centered data, whose smallest values are outliers and not dropouts
            x = torch.where(dropped, self._standardized(0.0, cells), x)
        return (cells,), {"x": x}

    def on_step(self, progress: float) -> None:
        """Keep A stable; the share of the training that is done decides when sparsity sets in, and when pairs are looked at."""
        self.progress = progress
        if self.pairs is not None and progress >= _INFORMED_AT and not bool(self.informed):
            self.learn_pair_prior()
        if not self.max_radius:
            return
        with torch.no_grad():
            square = self.network()[..., self.regulators]
            growth = self._estimate_growth(square)
            excess = (growth - math.log(self.max_radius)).clamp(min=0.0)
            if bool((excess > 0).any()):
                self.network_weight.mul_((-excess).exp()[:, None, None])
                self._growth = growth - excess

    def _estimate_growth(self, square: Tensor) -> Tensor:
        """Log spectral radius of each member, by a power iteration that goes on over the training."""
        first = self._probe is None or self._probe.device != square.device
        if first:
            generator = torch.Generator().manual_seed(0)
            probe = torch.rand(1, 1, square.shape[-1], generator=generator) + 0.5
            self._probe = probe.expand(len(square), -1, -1).to(square)
        for step in range(20 if first else 1):
            moved = self._probe @ square
            size = moved.norm(dim=-1, keepdim=True).clamp(min=1e-12)
            growth = (size / self._probe.norm(dim=-1, keepdim=True).clamp(min=1e-12)).log()[:, 0, 0]
            self._growth = growth if first and step == 0 else 0.8 * self._growth + 0.2 * growth
            self._probe = moved / size
        return self._growth

    @torch.no_grad()
    def standardize(self, mean: Tensor, sd: Tensor, least: Tensor | float = 0.0) -> None:
        """Take over the mean of each gene in each batch, ``(n_batch, n_genes)``, its sd within batches, and the value of none."""
        self.input_mean.copy_(mean)
        self.least.copy_(torch.as_tensor(least))
        # a gene that does not vary must not enter blown up
        self.input_scale.copy_(sd.clamp(min=1e-3 * float(sd.max()) + 1e-6))

    @torch.no_grad()
    def fit_residuals(self, batches: Iterable[Cells]) -> None:
        """Measure what f leaves over of each gene at the posterior mean: the sd of expression in predictions."""
        weight, total, n_cells = self.network(), 0.0, 0
        for cells in batches:
            x = self.clipped(cells).expand(self.n_ensemble, -1, -1)
            loc, _ = self.noise_posterior(x, weight)
            found, _ = self.expression(self.regulated(loc, weight))
            total, n_cells = total + (x - found).square().sum(1), n_cells + len(cells)
        self.residual_sd.copy_((total / n_cells).sqrt().clamp(min=0.01))

    # -- counterfactuals --------------------------------------------------------------------------------------------
    # These steps replace the generic ones: draws of one member share its network, and do(g) solves for one number per gene
    # that is knocked out where a replayed model would invert a network for every draw and perturbation.

    def draw_globals(self, n_draws: int, cells: Cells) -> Globals:
        """Networks of the members, or draws of them, which the draws of a prediction take in turn.

        Returns
        -------
        ``member``, whose network it is; ``A``; and ``total``, the effects over all paths: ``(n_networks, …)`` each.
        """
        return self._draw_networks(n_draws)

    def _draw_networks(self, n_draws: int) -> Globals:
        member = torch.arange(self.n_ensemble)
        if self.network_log_sd is not None:
            member = member.repeat(max(1, min(n_draws, _MAX_NETWORKS) // self.n_ensemble))
        weight = self.network_weight[member]
        if self.network_log_sd is not None:
            weight = weight + self.network_log_sd[member].exp() * torch.randn_like(weight)
        weight = self.network(weight, None if self.edge_logit is None else self.edge_logit[member])
        return {"member": member, "A": weight, "total": total_effect(weight, self.regulators)}

    def abduct(self, cells: Cells, n_draws: int, globals_: Globals) -> Basal:
        """States of the genes had nothing been done, from q(z | x), and what f leaves over of the cell's expression.

        The noise of a gene that was knocked out, of which its expression says nothing, is at its prior mean. States are
        given the sign with which they rise with expression: the data do not determine it.
        """
        x, state = self.clipped(cells), cells.x.new_empty(n_draws, *cells.x.shape)
        intervened = self.intervened(cells.action)
        for draws, member, weight, total in self._in_turn(n_draws, globals_):
            z = _antithetic(*self.noise_posterior(x[None], weight, member), len(state[draws]))
            if intervened is not None:
                z = torch.where(intervened, self.noise_prior(weight, cells.action, member)[0], z)
            state[draws] = self.sign(member) * self._regulated(z, total)
        basal = Basal(cells, state, globals_=globals_, n_draws=n_draws)
        _, expression = self._decoded(basal, cells.action)
        basal.noise = expression.abduct(self.normalized(cells))
        return basal

    def counterfactual(self, basal: Basal, action: Action) -> Counterfactual:
        """do(g): the cell keeps the noise of all other genes, and the state of g is what no expression is encoded as.

        Expression of g is the share that is left of what it would be had nothing been done.
        """
        before, now = (self.left(a) for a in (basal.cells.action, action.one))
        state, expression = self._decoded(basal, action, now)
        if now is None:
            return Counterfactual(state, expression)
        measured = self.normalized(basal.cells)
        before = torch.ones_like(measured[:1]) if before is None else before
        return Counterfactual(state, KnockedDown(expression, now, self.least, before, measured))

    def _decoded(self, basal: Basal, action: Action, left: Tensor | None = None) -> tuple[Tensor, Gaussian]:
        """States under an action, and what is decoded of them: of genes of which less than all is `left`, had nothing been done."""
        state, loc = torch.empty_like(basal.state), torch.empty_like(basal.state)
        scale = torch.empty_like(basal.state if self.heteroscedastic else basal.state[:, :1])
        for draws, member, _, total in self._in_turn(basal.n_draws, basal.globals_):
            sign = self.sign(member)
            state[draws] = sign * self._do(sign * basal.state[draws], basal.cells, action.one, member, total)
            shown = state[draws] if left is None else torch.where(left < 1, basal.state[draws], state[draws])
            loc[draws], scale[draws] = self._measured(sign * shown, member)
        return state, self._on_native_scale(loc, scale, self.input_mean[self._batch(basal.cells)])

    def log_weights(self, cells: Cells, n_draws: int, globals_: Globals) -> Tensor:
        """Log p(x, z) - log q(z) of draws of z, ``(n_draws, n_cells)``; their average is one over the ensemble.

        x is expression on the scale that is modelled: the density of log1p of counts per 10,000 for counts, else of the
        layer. It does not compare with the probability of counts.
        """
        x, native = self.clipped(cells), self.normalized(cells)
        mean, result = self.input_mean[self._batch(cells)], x.new_empty(n_draws, len(cells))
        for draws, member, weight, total in self._in_turn(n_draws, globals_):
            q = dist.Normal(*self.noise_posterior(x[None], weight, member), validate_args=False)
            p = dist.Normal(*self.noise_prior(weight, cells.action, member), validate_args=False)
            z = _antithetic(q.loc, q.scale, len(result[draws]))
            measured = self._on_native_scale(*self._measured(self._regulated(z, total), member), mean)
            result[draws] = (measured.log_prob(native) + p.log_prob(z) - q.log_prob(z)).sum(-1)
        return result

    @torch.no_grad()
    def generate(self, n_cells: int) -> Tensor:
        """Cells that were never measured, of no batch, on the native scale, ``(n_cells, n_genes)``."""
        nothing = Action(*(torch.full((1, 1), v, device=self.input_mean.device) for v in (-1, 0.0)))
        x, globals_ = self.input_mean.new_empty(n_cells, self.n_genes), self._draw_networks(n_cells)
        for draws, member, weight, total in self._in_turn(n_cells, globals_):
            mean, sd = self.noise_prior(weight, nothing, member)
            z = mean + sd * torch.randn_like(x[draws])
            measured = self._measured(self._regulated(z, total)[None], member)
            x[draws] = self._on_native_scale(*measured, self.input_mean.mean(0)).sample()[0]
        return x

    def targets(self, action: Action) -> tuple[Tensor, Tensor]:
        """Positions of the genes that an action knocks out, and whether it is one, ``(n_cells, order)`` each."""
        position = self.knocked_out[action.codes.clamp(min=0)] if len(self.knocked_out) else action.codes * 0 - 1
        if action.features is not None:
            # genes outside the vocabulary are described by their position, counted from 1
            position = torch.where(action.codes < -1, action.features[..., 0].round().long() - 1, position)
        present = action.present & (position >= 0)
        return position.clamp(min=0), present

    def left(self, action: Action) -> Tensor | None:
        """Share of the expression of each gene that an action leaves, ``(n_cells, n_genes)``; `None` where it leaves all."""
        position, present = self.targets(action)
        if not bool(present.any()):
            return None
        share = torch.where(present, 1.0 - action.dose.clamp(max=1.0), 1.0)
        everything = share.new_ones(len(position), self.n_genes)
        return everything.scatter_reduce(1, position, share, "amin")

    def intervened(self, action: Action) -> Tensor | None:
        """Which genes were knocked out or down, ``(n_cells, n_genes)``; `None` where none was."""
        share = self.left(action)
        return None if share is None else share < 1

    def sign(self, members: slice = slice(None)) -> Tensor:
        """1 where the state rises with expression, -1 where it falls, ``(n_members, 1, 1)``: the data can not tell."""
        ends = torch.tensor([[-1.0, 1.0]], device=self.input_mean.device).expand(len(self.residual_sd[members]), -1)
        mean, _ = self.encoder(ends, members)
        return torch.where(mean[:, 1] >= mean[:, 0], 1.0, -1.0)[:, None, None]

    def _in_turn(self, n_draws: int, globals_: Globals) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
        """For each network: its draws, the member it belongs to, its weights, and its effects over all paths."""
        member = globals_["member"].tolist()
        for i, m in enumerate(member[:n_draws]):
            yield slice(i, n_draws, len(member)), slice(m, m + 1), globals_["A"][i], globals_["total"][i]

    def _regulated(self, z: Tensor, total: Tensor) -> Tensor:
        """As :meth:`regulated`, of one network whose effects over all paths are known."""
        return z + z[..., self.regulators] @ total

    def _do(self, state: Tensor, cells: Cells, action: Action, member: slice, total: Tensor) -> Tensor:
        """States once the noise of the knocked-out genes has moved until theirs are those of no expression.

        This solves the equations of all other genes, and is what cutting the edges into the genes gives. A dose is the
        share of that way.
        """
        position, present = self.targets(action)
        if not bool(present.any()):
            return state
        own = position.expand(len(cells), -1)
        level, _ = self.encoder(self.no_expression(cells).gather(1, own)[None], member)
        missing = action.dose.clamp(max=1.0) * present * (level - state.gather(-1, own.expand(len(state), -1, -1)))
        # a unit of z_g moves the state of g itself, and through others that of all genes
        row = torch.full((self.n_genes,), -1, device=total.device)
        row[self.regulators] = torch.arange(len(self.regulators), device=total.device)
        row = row[position]
        moved = total[row.clamp(min=0)] * (row >= 0)[..., None] + F.one_hot(position, self.n_genes).to(total)
        moved = moved * present[..., None]
        response = moved.gather(2, position[:, None].expand(-1, position.shape[1], -1)) * present[:, None]
        response = response + torch.diag_embed((~present).to(total))
        per_unit = torch.linalg.solve(response, moved)  # what a unit of the states of these genes moves
        return state + (
            missing @ per_unit[0] if len(per_unit) == 1 else torch.einsum("dno,nog->dng", missing, per_unit)
        )

    def _measured(self, state: Tensor, member: slice) -> tuple[Tensor, Tensor]:
        """Mean and sd of standardized expression given states of one member, with the measured residual sd."""
        loc, sd = self.expression(state.reshape(1, -1), member)
        loc = loc.reshape(state.shape)
        return loc, sd.reshape(state.shape) if self.heteroscedastic else self.residual_sd[member][:, None]

    def _on_native_scale(self, loc: Tensor, scale: Tensor, mean: Tensor) -> Gaussian:
        """Distribution of expression whose standardized mean and sd are given; `mean` is that of the batch."""
        family = RectifiedGaussian if self.native_scale == "log1p" else Gaussian
        return family(mean + self.input_scale * loc, self.input_scale * scale, validate_args=False)


class KnockedDown:
    """Expression of cells some of whose genes keep a share of it alone, whatever their state.

    What was measured of a gene that was knocked out need not be what a knock-out makes of it. The difference counts where the same is
    done again: asked for its own perturbation a cell gets its own expression back. It counts less where a gene is knocked down
    more or less than it was, and not at all for a complete knock-out.

    Parameters
    ----------
    base
        Expression had nothing been done to these genes, batch shape ``(n_draws, n_cells, n_genes)``.
    left
        Share of each gene that is left, ``(n_cells or 1, n_genes)``.
    least
        Value that means no expression, ``(n_genes,)``.
    before
        Share of each gene that was left in the cell when it was measured, as `left`.
    measured
        Expression of the cell, ``(n_cells, n_genes)``.
    """

    def __init__(self, base: Gaussian, left: Tensor, least: Tensor, before: Tensor, measured: Tensor) -> None:
        self.genes = (left < 1).any(0).nonzero()[:, 0]
        self.base, self.least, self.measured = base, least[self.genes], measured[:, self.genes]
        self.left, self.before = left[:, self.genes], before[:, self.genes]
        self.scale = "log1p" if isinstance(base, RectifiedGaussian) else "layer"

    def _replace(self, x: Tensor, values: Tensor) -> Tensor:
        return x.index_copy(-1, self.genes, values)

    def _scaled(self, x: Tensor, share: Tensor, scale: str) -> Tensor:
        """A share of the genes' expression `x`."""
        if scale == "log1p":
            return torch.log1p(share * torch.expm1(x))
        least = 0.0 if scale == "counts" else self.least
        return torch.where(share < 1, least + share * (x - least), x)

    def replay(self, noise: Tensor) -> Tensor:
        """Expression under this distribution, noise and differences kept."""
        whole = self.base.replay(noise)
        x = whole[..., self.genes]
        difference = self.measured - self._scaled(x, self.before, self.scale)
        # 1 where the same is done as before, 0 at both ends
        same = (
            torch.minimum((1 - self.left) / (1 - self.before), self.left / self.before).nan_to_num(1.0).clamp(max=1.0)
        )
        x = self._scaled(x, self.left, self.scale) + torch.where(self.before < 1, same, 0.0) * difference
        return self._replace(whole, x.clamp(min=0.0) if self.scale == "log1p" else x)

    def conditional_mean(self, noise: Tensor, scale: str, depth: Tensor | None = None) -> Tensor:
        """The same as :meth:`replay`, as the noise leaves nothing open."""
        return Point(self.replay(noise), self.scale).expectation(scale, depth)

    def expectation(self, scale: str, depth: Tensor | None = None) -> Tensor:
        """Mean on a scale; of genes that keep a share of the counts, that of their mean on the scale."""
        x = self.base.expectation(scale, depth)
        return self._replace(x, self._scaled(x[..., self.genes], self.left, scale))

    def sample(self) -> Tensor:
        """Draws."""
        x = self.base.sample()
        return self._replace(x, self._scaled(x[..., self.genes], self.left, self.scale))


def _antithetic(loc: Tensor, scale: Tensor, n: int) -> Tensor:
    """Normal draws in pairs whose deviates are each other's negative, for parameters ``(1, n_cells, n_genes)``."""
    half = torch.randn((n + 1) // 2, *loc.shape[1:], device=loc.device)
    return loc + scale * torch.cat([half, -half])[:n]


def _standard_deviation(log_var: Tensor) -> Tensor:
    """Of a log variance, within what float32 can hold."""
    return (0.5 * log_var.clamp(-10.0, 6.0)).exp()
