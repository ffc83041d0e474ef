r"""InfoSEM: a structural-equation model with informative priors on its network (Cui et al.; DeepSEM without them).

.. math::

    M_{ik}              &= h_i^\top w_s + h_k^\top w_t + \kappa\, [\cos(h_i, h_k)]_+ \\
    A^e_{ik}            &\sim \mathrm{Laplace}(M_{ik}, \sigma_a), \qquad
    A^l_{ik} \sim N(m_{ik}, \sigma_p^2), \quad m_{ik} = \mathrm{logit}(.95, .05, .5) \\
    A                   &= A^e \odot \mathrm{sigmoid}(A^l) \\
    z                   &\sim N(0, I), \qquad \tilde x = z (I - A)^{-1} \\
    x_g \mid \tilde x_g &\sim N(f_\theta(\tilde x_g), s_g^2)

with gene embeddings h; without them :math:`M = 0` (DeepSEM), without known edges :math:`A = A^e` (InfoSEM-B). x is standardised
expression, i a regulator, k a target. The guide is :math:`q(z \mid x) = N(\mu(I - A), \exp(\lambda (I - A)))` with
:math:`(\mu_g, \lambda_g)` a network of :math:`x_g`, and A by MAP or normal. f and the guide's network are shared by all genes.

A knock-out of gene g is do(g): the cell keeps the z of all other genes, and :math:`\tilde x_g` is what no expression is encoded as.
That is a shift of :math:`z_g` alone. A cell that was knocked out is treated so in training: its :math:`z_g` has a flat prior.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from pertura.nn._scalar import ScalarNetwork
from pertura.nn._sem import propagate, remove_regulation

from ._base import Cells, PerturbationModule
from ._knockout import KnockOutMixin, standard_deviation

# logits of known edges, pairs known to be none, and all others
LOGITS = {1: math.log(0.95 / 0.05), -1: math.log(0.05 / 0.95), 0: 0.0}
_FLAT_SD = 10.0  # of the noise of a gene that an experimenter sets
_MIN_SCALE = 0.1  # of heteroscedastic noise, in standard deviations of the gene


@dataclass
class Inputs:
    """What a training step reads.

    Attributes
    ----------
    x
        Standardised expression, ``(n_members, n_cells, n_genes)``; members differ in what augmentation set to zero.
    intervened
        Genes that were knocked out, ``(n_cells, n_genes)``, or `None`.
    """

    x: Tensor
    intervened: Tensor | None


class InfoSEM(KnockOutMixin, PerturbationModule):
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
        h, ``(n_genes, n_dimensions)``, whitened; `None` for a prior mean of 0.
    similarity
        Cosine of the embeddings of regulators and genes, at least 0, ``(n_regulators, n_genes)``; `None` for an additive
        prior mean.
    known
        1 for known edges, -1 for known non-edges, 0 else, ``(n_regulators, n_genes)``; `None` for none.
    n_ensemble
        Models trained side by side on the same minibatches.
    posterior
        ``"map"`` or ``"variational"`` (normal) posterior of A.
    likelihood
        ``"mse"``: sd of half a gene's variance, as the squared error has it; ``"normal"``: sd a network of the state.
    hidden
        Widths of the networks.
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
        Spectral radius beyond which A is scaled down; `None` for no limit.
    n_grid
        See :class:`~pertura.nn.ScalarNetwork`.
    native_scale
        Scale of the expression that is modelled.
    """

    def __init__(
        self,
        n_genes: int,
        n_batch: int,
        *,
        regulators: NDArray[np.int64],
        knocked_out: NDArray[np.int64],
        embedding: NDArray[np.float32] | None = None,
        similarity: NDArray[np.float32] | None = None,
        known: NDArray[np.int8] | None = None,
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
        max_radius: float | None = 0.95,
        n_grid: int = 512,
        native_scale: str = "layer",
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
        start = self.unit * (1.0 + 0.164 * torch.rand(shape))
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
        self.additive = embedding is not None
        if embedding is not None:
            self.register_buffer("embedding", torch.as_tensor(embedding))
            self.prior_source = nn.Parameter(torch.zeros(n_ensemble, embedding.shape[1]))
            self.prior_target = nn.Parameter(torch.zeros(n_ensemble, embedding.shape[1]))
        if similarity is not None:
            self.register_buffer("similarity", torch.as_tensor(similarity) * self.no_loops)
            self.prior_kernel = nn.Parameter(torch.zeros(n_ensemble))

        self.encoder = ScalarNetwork(n_ensemble, hidden, 2, n_grid)
        self.decoder = ScalarNetwork(n_ensemble, hidden, 2 if self.heteroscedastic else 1, n_grid)
        self.noise_mean = self.noise_log_var = None
        if z_prior == "learned":
            self.noise_mean = nn.Parameter(1e-2 * torch.randn(n_ensemble, n_genes))
            self.noise_log_var = nn.Parameter(1e-2 * torch.randn(n_ensemble, n_genes))
        self.register_buffer("input_mean", torch.zeros(n_batch, n_genes))
        self.register_buffer("input_scale", torch.ones(n_genes))
        self.register_buffer("residual_sd", torch.ones(n_ensemble, n_genes))
        self.clip = 10.0

    @property
    def lr_factors(self) -> dict[str, float]:
        """Learning rates in units of that of the networks (5e-4); A and its prior mean move with 1 / (G - 1)."""
        return {"network_": 33.0 * self.unit, "prior_": 3.0, "edge_logit": 20.0}

    # -- the network ------------------------------------------------------------------------------------------------

    def prior_mean(self) -> Tensor | float:
        """M, ``(n_members, n_regulators, n_genes)``; 0 without embeddings."""
        mean: Tensor | float = 0.0
        if self.additive:
            h = self.embedding
            mean = (h[self.regulators] @ self.prior_source.mT).mT[..., None] + (h @ self.prior_target.mT).mT[:, None]
            mean = mean * self.no_loops
        if hasattr(self, "prior_kernel"):
            mean = mean + self.prior_kernel[:, None, None] * self.similarity
        return self.unit * mean

    def network(self, weight: Tensor | None = None, logit: Tensor | None = None) -> Tensor:
        """A, ``(n_members, n_regulators, n_genes)``, by default at the posterior mean of its factors."""
        weight = self.network_weight * self.no_loops if weight is None else weight * self.no_loops
        proba = self.edge_proba(logit)
        return weight if proba is None else weight * proba

    def edge_proba(self, logit: Tensor | None = None) -> Tensor | None:
        """sigmoid(A^l); `None` without known edges."""
        if not hasattr(self, "edge_logit"):
            return None
        return torch.sigmoid(self.edge_logit if logit is None else logit)

    def regulated(self, z: Tensor, weight: Tensor) -> Tensor:
        """State of the genes, z (I - A)^-1."""
        return propagate(z, weight, self.regulators)

    def unregulated(self, x: Tensor, weight: Tensor) -> Tensor:
        """What regulators do not explain, x (I - A)."""
        return remove_regulation(x, weight, self.regulators)

    # -- generative model and guide ---------------------------------------------------------------------------------

    def model(self, inputs: Inputs, kl_weight: float = 1.0) -> None:
        """Joint density of a minibatch, averaged over the members of the ensemble."""
        n_cells = inputs.x.shape[1]
        weight = self._sample_network(n_cells)
        with pyro.poutine.scale(scale=self.beta * kl_weight / self.n_ensemble):
            z = pyro.sample("z", dist.Normal(*self.noise_prior(weight, inputs)).to_event(3))
        state = self.regulated(z, weight)
        with pyro.poutine.scale(scale=1.0 / self.n_ensemble):
            pyro.sample("x", dist.Normal(*self.expression(state)).to_event(3), obs=inputs.x)

    def _sample_network(self, n_cells: int) -> Tensor:
        """A from its prior, at the weight that one minibatch has in the data; by MAP a parameter observed under its prior."""
        sd = self.n_genes / (max(self.n_train, n_cells) * self.alpha)
        mean = self.prior_mean()
        own, logit = self.network_weight * self.no_loops, getattr(self, "edge_logit", None)
        with pyro.poutine.scale(scale=self._share(n_cells)):
            prior = dist.Laplace(mean + torch.zeros_like(own), sd, validate_args=False).to_event(3)
            weight = pyro.sample("A_e", prior, obs=own if self.network_log_sd is None else None)
            if logit is not None:
                prior = dist.Normal(self.known_logit.expand_as(logit), self.edge_logit_sd, validate_args=False)
                pyro.sample("A_l", prior.to_event(3), obs=logit)
            if isinstance(mean, Tensor):
                # without this the deviation of A from M is dear, and M free: A then collapses onto M
                pyro.factor("M", -self.prior_shrinkage * mean.abs().sum() / sd)
        return self.network(weight, logit)

    def _share(self, n_cells: int) -> float:
        """Weight of the prior of A in a minibatch."""
        share = n_cells / max(self.n_train, n_cells) / self.n_ensemble
        return 1e-8 * share if self.training and self.progress < self.sparsity_delay else share

    def guide(self, inputs: Inputs, kl_weight: float = 1.0) -> None:
        """q(A), where it is not by MAP, and q(z | x, A)."""
        weight = None
        if self.network_log_sd is not None:
            with pyro.poutine.scale(scale=self._share(inputs.x.shape[1])):
                posterior = dist.Normal(self.network_weight * self.no_loops, self.network_log_sd.exp())
                weight = pyro.sample("A_e", posterior.to_event(3))
        with pyro.poutine.scale(scale=self.beta * kl_weight / self.n_ensemble):
            posterior = self.noise_posterior(inputs.x, self.network(weight))
            pyro.sample("z", dist.Normal(*posterior, validate_args=False).to_event(3))

    def noise_prior(self, weight: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Mean and sd of z."""
        mean, sd = torch.zeros_like(inputs.x), torch.ones_like(inputs.x)
        if self.noise_mean is not None:
            # the learned prior is one of the state's own scale, as the guide is
            loc = self.unregulated(self.noise_mean[:, None], weight)
            log_var = self.unregulated(self.noise_log_var[:, None], weight)
            mean, sd = loc.expand_as(mean), standard_deviation(log_var).expand_as(sd)
        if inputs.intervened is not None:
            sd = torch.where(inputs.intervened, torch.full_like(sd, _FLAT_SD), sd)
        return mean, sd

    def noise_posterior(self, x: Tensor, weight: Tensor, members: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """Mean and sd of q(z | x, A)."""
        mean, log_var = self.encoder(x, members)
        return self.unregulated(mean, weight), standard_deviation(self.unregulated(log_var, weight))

    def expression(self, state: Tensor, members: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """Mean and sd of standardised expression."""
        if self.heteroscedastic:
            loc, log_scale = self.decoder(state, members)
            return loc, _MIN_SCALE + F.softplus(log_scale)
        (loc,) = self.decoder(state, members)
        return loc, torch.full((), math.sqrt(0.5), device=loc.device)

    # -- training ---------------------------------------------------------------------------------------------------

    def on_step(self, progress: float) -> None:
        """Keep A stable; the share of the training that is done decides when sparsity sets in."""
        self.progress = progress
        if self.max_radius is None:
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

    def _get_fn_args_from_batch(self, batch: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        cells = Cells.from_tensors(batch)
        x = self.standardised(cells).clamp(-self.clip, self.clip)
        x = x.expand(self.n_ensemble, *x.shape)
        if self.training and self.augmentation > 0:
            zero = -(self.input_mean / self.input_scale)[self._batch(cells.batch)]
            dropped = torch.rand(x.shape, device=x.device) < self.augmentation
            x = torch.where(dropped, zero.clamp(-self.clip, self.clip), x)
        position, present = self.targets(cells.action)
        intervened = None
        if bool(present.any()):
            intervened = torch.zeros_like(cells.x, dtype=torch.bool)
            row, slot = present.nonzero(as_tuple=True)
            intervened[row, position[row, slot]] = True
        return (Inputs(x, intervened),), {}

    def normalised(self, x: Tensor) -> Tensor:
        """Counts as log1p of counts per 10,000; other values as they are."""
        if self.native_scale == "layer":
            return x
        return torch.log1p(1e4 * x / x.sum(-1, keepdim=True).clamp(min=1.0))

    def standardised(self, cells: Cells) -> Tensor:
        """Expression without the mean of the batch, in standard deviations of the gene."""
        return (self.normalised(cells.x) - self.input_mean[self._batch(cells.batch)]) / self.input_scale

    def _batch(self, batch: Tensor) -> Tensor:
        return batch.clamp(max=self.n_batch - 1)

    @torch.no_grad()
    def squared_residuals(self, cells: Cells) -> Tensor:
        """Of each gene, at the posterior mean, summed over the cells, ``(n_members, n_genes)``."""
        x = self.standardised(cells)
        weight = self.network()
        loc, _ = self.noise_posterior(x.expand(self.n_ensemble, *x.shape).clamp(-self.clip, self.clip), weight)
        found, _ = self.expression(self.regulated(loc, weight))
        return (x - found).square().sum(1)
