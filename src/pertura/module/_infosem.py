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
from pertura.nn._sem import propagate, remove_regulation, total_effect

from ._base import Action, Basal, Cells, PerturbationModule

# logits of known edges, pairs known to be none, and all others
LOGITS = {1: math.log(0.95 / 0.05), -1: math.log(0.05 / 0.95), 0: 0.0}
_FLAT_SD = 10.0  # of the noise of a gene that an experimenter sets
_MIN_SCALE = 0.1  # of heteroscedastic noise, in standard deviations of the gene
_MAX_NETWORKS = 8  # drawn of a variational posterior for one prediction


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

    # -- generative model and guide ---------------------------------------------------------------------------------

    def model(self, inputs: Inputs, kl_weight: float = 1.0) -> None:
        """Joint density of a minibatch, averaged over the members of the ensemble."""
        n_cells = inputs.x.shape[1]
        weight = self._sample_network(n_cells)
        with pyro.poutine.scale(scale=self.beta * kl_weight / self.n_ensemble):
            z = pyro.sample("z", dist.Normal(*self.noise_prior(weight, inputs)).to_event(3))
        state = propagate(z, weight, self.regulators)
        with pyro.poutine.scale(scale=1.0 / self.n_ensemble):
            pyro.sample("x", dist.Normal(*self.expression(state)).to_event(3), obs=inputs.x)

    def _sample_network(self, n_cells: int) -> Tensor:
        """A from its prior, at the weight that one minibatch has in the data."""
        share = n_cells / max(self.n_train, n_cells) / self.n_ensemble
        if self.training and self.progress < self.sparsity_delay:
            share = 1e-8 * share
        sd = self.n_genes / (max(self.n_train, n_cells) * self.alpha)
        mean = self.prior_mean()
        shape = self.network_weight.shape
        with pyro.poutine.scale(scale=share):
            prior = dist.Laplace(mean + torch.zeros_like(self.network_weight), sd, validate_args=False)
            weight = pyro.sample("A_e", prior.to_event(3))
            logit = None
            if hasattr(self, "edge_logit"):
                prior = dist.Normal(self.known_logit.expand(shape), self.edge_logit_sd, validate_args=False)
                logit = pyro.sample("A_l", prior.to_event(3))
            if isinstance(mean, Tensor):
                # without this the deviation of A from M is dear, and M free: A then collapses onto M
                pyro.factor("M", -self.prior_shrinkage * mean.abs().sum() / sd)
        return self.network(weight, logit)

    def guide(self, inputs: Inputs, kl_weight: float = 1.0) -> None:
        """q(A) and q(z | x, A)."""
        n_cells = inputs.x.shape[1]
        share = n_cells / max(self.n_train, n_cells) / self.n_ensemble
        if self.training and self.progress < self.sparsity_delay:
            share = 1e-8 * share
        weight = self.network_weight * self.no_loops
        logit = None
        with pyro.poutine.scale(scale=share):
            if self.network_log_sd is None:
                weight = pyro.sample("A_e", dist.Delta(weight, validate_args=False).to_event(3))
            else:
                weight = pyro.sample("A_e", dist.Normal(weight, self.network_log_sd.exp()).to_event(3))
            if hasattr(self, "edge_logit"):
                logit = pyro.sample("A_l", dist.Delta(self.edge_logit).to_event(3))
        with pyro.poutine.scale(scale=self.beta * kl_weight / self.n_ensemble):
            posterior = self.noise_posterior(inputs.x, self.network(weight, logit))
            pyro.sample("z", dist.Normal(*posterior).to_event(3))

    def noise_prior(self, weight: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Mean and sd of z."""
        mean, sd = torch.zeros_like(inputs.x), torch.ones_like(inputs.x)
        if self.noise_mean is not None:
            # the learned prior is one of the state's own scale, as the guide is
            loc = remove_regulation(self.noise_mean[:, None], weight, self.regulators)
            log_var = remove_regulation(self.noise_log_var[:, None], weight, self.regulators)
            mean, sd = loc.expand_as(mean), _sd(log_var).expand_as(sd)
        if inputs.intervened is not None:
            sd = torch.where(inputs.intervened, torch.full_like(sd, _FLAT_SD), sd)
        return mean, sd

    def noise_posterior(self, x: Tensor, weight: Tensor, members: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """Mean and sd of q(z | x, A)."""
        mean, log_var = self.encoder(x, members)
        loc = remove_regulation(mean, weight, self.regulators)
        return loc, _sd(remove_regulation(log_var, weight, self.regulators))

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
        found, _ = self.expression(propagate(loc, weight, self.regulators))
        return (x - found).square().sum(1)

    # -- counterfactuals --------------------------------------------------------------------------------------------

    def draw_globals(self, n_samples: int) -> dict[str, Tensor]:
        """Networks, and which of them each draw has: those of the members in turn."""
        member = torch.arange(self.n_ensemble)
        if self.network_log_sd is not None:
            member = member.repeat(max(1, min(n_samples, _MAX_NETWORKS) // self.n_ensemble))
        weight = self.network_weight[member]
        if self.network_log_sd is not None:
            weight = weight + self.network_log_sd[member].exp() * torch.randn_like(weight)
        weight = self.network(weight, self.edge_logit[member] if hasattr(self, "edge_logit") else None)
        return {"member": member, "weight": weight, "total": total_effect(weight, self.regulators)}

    def abduct(self, cells: Cells, n_samples: int, globals_: dict[str, Tensor]) -> Basal:
        """Noise z of a cell from q(z | x), that of a gene which was knocked out at its prior mean, and what f leaves over."""
        x = self.standardised(cells)
        z = torch.randn(n_samples, *x.shape, device=x.device)
        noise = torch.empty_like(z)
        for draws, network, member in self._networks(n_samples, globals_):
            weight = globals_["weight"][network]
            loc, sd = self.noise_posterior(x.clamp(-self.clip, self.clip)[None], weight, member)
            z[draws] = loc + sd * z[draws]
            found, scale = self._measured(self._state(z[draws], globals_["total"][network]), member)
            noise[draws] = (x - found) / scale
            z[draws] *= self.sign(member)
        position, present = self.targets(cells.action)
        if bool(present.any()):
            row, slot = present.nonzero(as_tuple=True)
            z[:, row, position[row, slot]] = 0.0
        return Basal(z, noise, cells.context, cells.batch, cells.library)

    def act(self, basal: Basal, action: Action, globals_: dict[str, Tensor]) -> Tensor:
        """Noise under do(g): that of the knocked-out genes moves until their state is that of no expression."""
        position, present = self.targets(action)
        if not bool(present.any()):
            return basal.z
        strength = (action.dose.clamp(max=1.0) * present).to(basal.z)
        batch = self._batch(basal.batch)
        rows = torch.arange(len(position), device=position.device)[:, None]
        zero = -(self.input_mean[batch] / self.input_scale)[rows, position].clamp(-self.clip, self.clip)
        z = basal.z.clone()
        for draws, network, member in self._networks(len(z), globals_):
            sign, total = self.sign(member), globals_["total"][network]
            level, _ = self.encoder(zero[None], member)
            state = self._state(z[draws] * sign, total)[:, rows, position]
            wanted = (strength * (level - state))[..., None]  # (n_draws, n_cells, order, 1)
            # a unit of z_g moves the state of g itself, and through others that of all genes
            response = self._response(position, present, total)
            shift = torch.linalg.solve(response.mT, wanted)[..., 0] * present
            z[draws] = z[draws].scatter_add(-1, position.expand_as(shift), sign * shift)
        return z

    def _response(self, position: Tensor, present: Tensor, total: Tensor) -> Tensor:
        """Effects of the noise of knocked-out genes on their states, ``(n_cells, order, order)``, source first."""
        lookup = torch.full((self.n_genes,), -1, device=total.device)
        lookup[self.regulators] = torch.arange(len(self.regulators), device=total.device)
        row = lookup[position]
        effect = total[row.clamp(min=0)[:, :, None], position[:, None, :]] * (row >= 0)[:, :, None]
        both = present[:, :, None] & present[:, None, :]
        return effect * both + torch.eye(position.shape[1], device=total.device)

    def decode(self, z: Tensor, basal: Basal) -> Tensor:
        """Expression, what f left over of the cell's own measurement added."""
        return self._decode(z, basal, self.draw_globals(len(z)))

    def express(self, z: Tensor, basal: Basal, action: Action, globals_: dict[str, Tensor]) -> Tensor:
        """As :meth:`decode`, with the networks of the draws."""
        return self._decode(z, basal, globals_)

    def _decode(self, z: Tensor, basal: Basal, globals_: dict[str, Tensor]) -> Tensor:
        x = torch.empty_like(z)
        for draws, network, member in self._networks(len(z), globals_):
            state = self._state(z[draws] * self.sign(member), globals_["total"][network])
            loc, scale = self._measured(state, member)
            x[draws] = loc + scale * basal.noise[draws]
        return self._native(x, self.input_mean[self._batch(basal.batch)])

    def _native(self, x: Tensor, mean: Tensor) -> Tensor:
        x = x * self.input_scale + mean
        return x.clamp(min=0.0) if self.native_scale == "log1p" else x

    def fresh_noise(self, z: Tensor, basal: Basal) -> Tensor:
        """Noise of cells that were never measured."""
        return torch.randn_like(z)

    @torch.no_grad()
    def generate(self, n_cells: int) -> Tensor:
        """Cells that were never measured, batch by batch alike, on the native scale, ``(n_cells, n_genes)``."""
        globals_ = self.draw_globals(n_cells)
        x = torch.randn(n_cells, 1, self.n_genes, device=self.input_mean.device)
        for draws, network, member in self._networks(n_cells, globals_):
            weight = globals_["weight"][network][None]
            if self.noise_mean is not None:
                loc = remove_regulation(self.noise_mean[member][:, None], weight, self.regulators)
                log_var = remove_regulation(self.noise_log_var[member][:, None], weight, self.regulators)
                x[draws] = loc + _sd(log_var) * x[draws]
            loc, scale = self._measured(self._state(x[draws], globals_["total"][network]), member)
            x[draws] = loc + scale * torch.randn_like(loc)
        return self._native(x[:, 0], self.input_mean.mean(0))

    def targets(self, action: Action) -> tuple[Tensor, Tensor]:
        """Positions of the genes that an action knocks out, and whether it is one, ``(n_cells, order)`` each."""
        position = self.knocked_out[action.codes.clamp(min=0)] if len(self.knocked_out) else action.codes * 0 - 1
        if action.features is not None:
            # genes outside the vocabulary are described by their position, counted from 1
            position = torch.where(action.codes < -1, action.features[..., 0].round().long() - 1, position)
        present = action.present & (position >= 0)
        return position.clamp(min=0), present

    def sign(self, members: slice = slice(None)) -> Tensor:
        """1 where the state rises with expression, -1 where it falls, ``(n_members, 1, 1)``: the data can not tell."""
        ends = torch.tensor([[-1.0, 1.0]], device=self.input_mean.device).expand(len(self.residual_sd[members]), -1)
        mean, _ = self.encoder(ends, members)
        return torch.where(mean[:, 1] >= mean[:, 0], 1.0, -1.0)[:, None, None]

    def _networks(self, n_draws: int, globals_: dict[str, Tensor]) -> list[tuple[Tensor, int, slice]]:
        """Draws of each network, its number, and the member it belongs to."""
        member = globals_["member"]
        draws = torch.arange(n_draws) % len(member)
        found = [((draws == i).nonzero()[:, 0], i, int(m)) for i, m in enumerate(member.tolist())]
        return [(d, i, slice(m, m + 1)) for d, i, m in found if len(d)]

    def _state(self, z: Tensor, total: Tensor) -> Tensor:
        return z + z[..., self.regulators] @ total

    def _measured(self, state: Tensor, member: slice) -> tuple[Tensor, Tensor]:
        """Mean and sd of expression given the state of draws of one member."""
        loc, sd = self.expression(state.reshape(1, -1), member)
        loc = loc.reshape(state.shape)
        return loc, sd.reshape(state.shape) if self.heteroscedastic else self.residual_sd[member][:, None]


def _sd(log_var: Tensor) -> Tensor:
    return (0.5 * log_var.clamp(-10.0, 6.0)).exp()
