r"""SAMS-VAE: sparse additive shifts of a latent basal state (Bereket & Karaletsos).

.. math::

    E_{tj} &\sim N(0, \sigma_j^2), \quad M_{tj} \sim \mathrm{Bernoulli}(\alpha) \\
    z^b_i &\sim N(0, I), \quad z^p_i = \sum_t d_{it}\,(E_t \circ M_t) \\
    x_i &\sim p_\theta(x \mid \mathrm{dec}(z^b_i + z^p_i))

The guide is :math:`q(M)\,q(E \mid M)\,q(z^b \mid x, z^p)`. Settings of the same module are its published comparators:
``effect="dense"`` has no mask (CPA-VAE), ``"svae+"`` draws :math:`z_i \sim N(M_t \circ a_t, I)` with point estimates a and a
Beta prior of the mask, ``"conditional"`` gives d itself to decoder and encoder (conditional VAE).
"""

from __future__ import annotations

from typing import Any, Literal

import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pertura.data._constants import UNKNOWN
from pertura.nn._likelihoods import CountLikelihood, GaussianLikelihood
from pertura.nn._masks import StraightThroughBernoulli
from pertura.nn._mlp import ResidualMLP

from ._base import Action, Basal, Cells, PerturbationModule
from ._rotation import RotatedShiftsMixin

EFFECTS = ("sparse", "dense", "svae+", "conditional")


class SAMSVAE(RotatedShiftsMixin, PerturbationModule):
    r"""Generative model and guide of SAMS-VAE.

    Parameters
    ----------
    n_genes, n_perturbations, n_batch
        Sizes of the data.
    n_latent
        Dimension of the latent state.
    n_layers, n_hidden
        Layers of decoder and encoder, and their width. No layers make the decoder (log-)linear; the encoder has at least one.
    effect
        What a perturbation does; see the head of this file.
    effect_guide
        ``"mean_field"``: q(E) is normal; ``"correlated"``: a network gives its moments from the mask.
    basal_guide
        ``"amortised"``: q(z | x); ``"correlated"``: q(z | x, shift).
    mask_prior
        :math:`\alpha`; in ``"svae+"`` :math:`\alpha = 1 / (1 + K)` of the prior Beta(1, K).
    prior_sd_E
        :math:`\sigma`; `None` learns one of each latent dimension.
    interactions
        Whether pairs of perturbations in one cell also shift it by :math:`U_s \circ U_t`.
    likelihood, link_sharpness
        ``"nb"`` or ``"normal"``; see :class:`~pertura.nn.CountLikelihood`.
    normalise_input
        Whether the encoder sees counts per 10,000, or raw counts as in the paper, both as standardised log1p.
    rotate_shifts
        See :class:`~pertura.module._rotation.RotatedShiftsMixin`.
    n_features
        Number of features of a perturbation; 0 where none were registered. Features shift the prior mean of E.
    n_combinations, order
        Number of registered combinations, and of members of the largest.
    """

    no_weight_decay = {"effect_", "mask_", "likelihood.log_theta"}

    def __init__(
        self,
        n_genes: int,
        n_perturbations: int,
        n_batch: int = 1,
        *,
        n_latent: int = 30,
        n_layers: int = 0,
        n_hidden: int = 128,
        effect: Literal["sparse", "dense", "svae+", "conditional"] = "sparse",
        effect_guide: Literal["mean_field", "correlated"] = "mean_field",
        basal_guide: Literal["amortised", "correlated"] = "correlated",
        mask_prior: float = 0.1,
        prior_sd_E: float | None = None,
        interactions: bool = False,
        likelihood: Literal["nb", "normal"] = "nb",
        link_sharpness: float = 3.0,
        normalise_input: bool = True,
        rotate_shifts: bool = True,
        n_features: int = 0,
        n_combinations: int = 0,
        order: int = 1,
        effect_lr_factor: float = 5.0,
    ) -> None:
        super().__init__()
        self.n_genes, self.n_perturbations, self.n_batch = n_genes, n_perturbations, n_batch
        self.n_latent, self.effect, self.normalise_input = n_latent, effect, normalise_input
        self.n_rows, self.n_shift = self._table_height(), self._shift_width()
        self.mask_prior, self.lr_factors = mask_prior, {"effect_": effect_lr_factor, "mask_": effect_lr_factor}

        n_covariates = n_batch if n_batch > 1 else 0
        sees_shift = basal_guide == "correlated" or effect == "conditional"
        n_seen = self._moves_width() if sees_shift else 0
        self.encoder = ResidualMLP([n_genes, n_covariates, n_seen], n_hidden, max(1, n_layers))
        self.basal_loc = nn.Linear(self.encoder.n_out, n_latent)
        self.basal_log_variance = nn.Linear(self.encoder.n_out, n_latent)
        state = self._state_width()
        self.decoder = ResidualMLP([state, n_covariates], n_hidden, n_layers) if n_layers else None
        n_decoded = n_hidden if n_layers else state + n_covariates
        if likelihood == "nb":
            self.likelihood = CountLikelihood(n_decoded, n_genes, link_sharpness)
        else:
            self.likelihood = GaussianLikelihood(n_decoded, n_genes)
        self.native_scale = self.likelihood.native_scale
        self._make_effects(effect_guide, prior_sd_E, interactions, n_features, n_hidden)
        self._prepare_rotation(rotate_shifts)

        self.register_buffer("input_mean", torch.zeros(n_genes))
        self.register_buffer("input_scale", torch.ones(n_genes))
        # effects on genes beyond the latent shift, set from measured effects after training
        self.register_buffer("residual", torch.zeros(n_perturbations + n_combinations, n_genes))
        self.register_buffer("residual_sd", torch.zeros(n_perturbations + n_combinations, n_genes))
        # the same of perturbations that were not seen, from their features: of features of 0, by feature, and its sd
        self.register_buffer("described", torch.zeros(n_genes))
        self.register_buffer("described_weight", torch.zeros(n_features, n_genes))
        self.register_buffer("described_sd", torch.zeros(n_genes))
        self.register_buffer("combinations", torch.full((n_combinations, max(order, 1)), -1))

    def _table_height(self) -> int:
        """Rows of E and M."""
        return self.n_perturbations

    def _shift_width(self) -> int:
        return self.n_perturbations if self.effect == "conditional" else self.n_latent

    def _moves_width(self) -> int:
        return self.n_shift

    def _state_width(self) -> int:
        return self.n_latent + (self.n_shift if self.effect == "conditional" else 0)

    def _make_effects(
        self, effect_guide: str, prior_sd_E: float | None, interactions: bool, n_features: int, n_hidden: int
    ) -> None:
        n, k = self.n_rows, self.n_shift
        self.dose_log_kappa = nn.Parameter(torch.zeros(n))
        self.register_buffer("features", torch.zeros(n, n_features))
        self.effect_features = self.effect_network = self.effect_interaction = None
        if self.effect == "conditional":
            return
        if self.effect == "svae+":
            self.effect_loc = nn.Parameter(0.1 * torch.randn(n, k))
        else:
            if effect_guide == "correlated":
                self.effect_network = ResidualMLP([k, n], n_hidden, 2)
                self.effect_head = nn.Linear(n_hidden, 2 * k)
            else:
                self.effect_loc = nn.Parameter(torch.zeros(n, k))
                self.effect_log_sd = nn.Parameter(torch.full((n, k), -1.0))
            self.effect_log_prior_sd = nn.Parameter(
                torch.full((k,), prior_sd_E or 1.0).log(), requires_grad=prior_sd_E is None
            )
        if self.effect in ("sparse", "svae+"):
            self.mask_logits = nn.Parameter(torch.zeros(n, k))
        if self.effect == "svae+":
            self.mask_rate = nn.Parameter(torch.full((n, k), -1.0))
        if n_features:
            self.effect_features = nn.Linear(n_features, k, bias=False)
            nn.init.zeros_(self.effect_features.weight)
        if interactions:
            self.effect_interaction = nn.Parameter(0.05 * torch.randn(n, k))

    # -- generative model and guide ---------------------------------------------------------------------------------

    def model(self, cells: Cells, kl_weight: float = 1.0) -> None:
        """Joint density of a minibatch, its share of the global terms included."""
        shift = self.moves(self._global_prior(len(cells), kl_weight), cells, cells.action)
        prior_loc = shift if self.effect == "svae+" else cells.x.new_zeros(self.n_latent)
        with pyro.plate("cells", len(cells)):
            with pyro.poutine.scale(scale=kl_weight):
                z = pyro.sample("z", dist.Normal(prior_loc, 1.0).to_event(1))
            with pyro.poutine.scale(scale=self.likelihood_weight(cells)):
                pyro.sample("x", self.expression(self.state(z, shift), cells), obs=cells.x)

    def guide(self, cells: Cells, kl_weight: float = 1.0) -> None:
        """q(M) q(E | M) q(z | x, shift)."""
        shift = self.moves(self._global_guide(len(cells), kl_weight), cells, cells.action)
        with pyro.plate("cells", len(cells)), pyro.poutine.scale(scale=kl_weight):
            pyro.sample("z", self.basal(cells, shift).to_event(1))

    def likelihood_weight(self, cells: Cells) -> Tensor | float:
        """Weight of each cell's expression."""
        return 1.0

    def moves(self, globals_: dict[str, Tensor], cells: Cells | Basal, action: Action) -> Tensor:
        """What is done to the basal state of cells, ``(..., n_cells, n_moves)``."""
        return self.shift(globals_.get("table"), action)

    def _weight(self, n_cells: int, kl_weight: float) -> Any:
        """What one minibatch is of the data: global terms count once per pass."""
        return pyro.poutine.scale(scale=kl_weight * n_cells / max(self.n_train, n_cells))

    def _global_prior(self, n_cells: int, kl_weight: float) -> dict[str, Tensor]:
        if self.effect == "conditional":
            return {}
        mask: Tensor | float = 1.0
        with self._weight(n_cells, kl_weight):
            if self.effect_interaction is not None:
                pyro.factor("interaction_prior", -0.5 * self.effect_interaction.square().sum() / 0.3**2)
            if self.effect == "svae+":
                n_failures = 1.0 / self.mask_prior - 1.0
                pyro.factor("rate_prior", -(n_failures - 1.0) * F.softplus(self.mask_rate).sum())
            with pyro.plate("perturbations", self.n_rows):
                if self.effect in ("sparse", "svae+"):
                    mask = pyro.sample("mask", dist.Bernoulli(logits=self.mask_prior_logits()).to_event(1))
                if self.effect == "svae+":
                    return {"table": mask * self.effect_loc}
                prior = dist.Normal(self.effect_prior_mean(), self.effect_log_prior_sd.exp())
                return {"table": mask * pyro.sample("effect", prior.to_event(1))}

    def _global_guide(self, n_cells: int, kl_weight: float) -> dict[str, Tensor]:
        if self.effect == "conditional":
            return {}
        mask: Tensor | float = 1.0
        with self._weight(n_cells, kl_weight), pyro.plate("perturbations", self.n_rows):
            if self.effect in ("sparse", "svae+"):
                mask = pyro.sample("mask", self.mask_posterior().to_event(1))
            if self.effect == "svae+":
                return {"table": mask * self.effect_loc}
            return {"table": mask * pyro.sample("effect", self.effect_posterior(mask).to_event(1))}

    def mask_prior_logits(self) -> Tensor:
        """Prior log-odds of the mask, ``(n_perturbations, n_shift)``."""
        if self.effect == "svae+":
            return self.mask_rate
        return torch.logit(self.mask_logits.new_full(self.mask_logits.shape, self.mask_prior))

    def mask_posterior(self) -> StraightThroughBernoulli:
        """q(M)."""
        return StraightThroughBernoulli(self.mask_logits.new_tensor(1.0), logits=self.mask_logits)

    def effect_prior_mean(self) -> Tensor:
        """Prior mean of E: 0, or what features say."""
        if self.effect_features is None:
            return self.input_mean.new_zeros(self.n_rows, self.n_shift)
        return self.effect_features(self.features)

    def effect_posterior(self, mask: Tensor | float) -> dist.Normal:
        """q(E | M)."""
        if self.effect_network is None:
            return dist.Normal(self.effect_loc + self.effect_prior_mean(), self.effect_log_sd.exp() + 1e-4)
        mask = mask if torch.is_tensor(mask) else self.input_mean.new_ones(self.n_rows, self.n_shift)
        one_hot = torch.eye(self.n_rows, device=mask.device)
        loc, log_variance = self.effect_head(self.effect_network(mask, one_hot)).chunk(2, dim=-1)
        return dist.Normal(loc + self.effect_prior_mean(), (log_variance.exp() + 1e-4).sqrt())

    def basal(self, cells: Cells, shift: Tensor) -> dist.Normal:
        """q(z | x, shift)."""
        return self.basal_given(self.normalised(cells.x), cells, shift)

    def basal_given(self, u: Tensor, cells: Cells, shift: Tensor) -> dist.Normal:
        """As :meth:`basal`, of the normalised expression `u`."""
        h = self.encoder(u, self._one_hot_batch(cells.batch), shift)
        return dist.Normal(self.basal_loc(h), (self.basal_log_variance(h).clamp(max=10.0).exp() + 1e-4).sqrt())

    def state(self, z: Tensor, shift: Tensor) -> Tensor:
        """What is decoded."""
        if self.effect == "svae+":
            return z
        if self.effect == "conditional":
            return beside(z, shift)
        return z + shift

    def expression(self, state: Tensor, cells: Cells) -> dist.TorchDistribution:
        """p(x | state)."""
        return self.likelihood(self._decoded(state, cells.batch), cells.library)

    def normalised(self, x: Tensor) -> Tensor:
        """The encoder's input."""
        if self.native_scale == "counts":
            x = torch.log1p(1e4 * x / x.sum(-1, keepdim=True).clamp(min=1.0) if self.normalise_input else x)
        return (x - self.input_mean) / self.input_scale

    # -- shifts -----------------------------------------------------------------------------------------------------

    def shift(self, table: Tensor | None, action: Action) -> Tensor:
        """Sum over members of s(dose) (E o M), ``(..., n_cells, n_shift)``; `table` is E o M of every perturbation."""
        code = action.codes.clamp(min=0)
        strength = self.dose_response(code, action.dose) * (action.codes >= 0)
        if table is None:
            one_hot = F.one_hot(code, self.n_perturbations).to(strength)
            return (strength[..., None] * one_hot).sum(-2)
        total = (strength[..., None] * table[..., code, :]).sum(-2)
        if self.effect_interaction is not None and code.shape[1] > 1:
            # sum over pairs of U_s o U_t: half of the squared sum less the sum of squares
            each = strength[..., None] * self.effect_interaction[code]
            total = total + 0.5 * (each.sum(-2).square() - each.square().sum(-2))
        if action.features is not None and self.effect_features is not None and not self.described.any():
            unknown = (action.codes == UNKNOWN) * action.dose
            described = self.effect_features(action.features) * self.mask_rate_overall()
            total = total + (unknown[..., None] * described).sum(-2)
        return total

    def mask_rate_overall(self) -> Tensor | float:
        """Mean probability of the mask in each dimension: what a perturbation without data has."""
        return self.mask_logits.sigmoid().mean(0) if self.effect in ("sparse", "svae+") else 1.0

    def dose_response(self, code: Tensor, dose: Tensor) -> Tensor:
        """Monotone, 0 at dose 0 and 1 at the highest registered dose."""
        kappa = F.softplus(self.dose_log_kappa)[code] + 1e-3
        return torch.log1p(kappa * dose) / torch.log1p(kappa)

    def offset(self, action: Action, globals_: dict[str, Tensor]) -> Tensor | float:
        """Measured effects beyond the latent shift, ``(..., n_cells or 1, n_genes)``; see :attr:`residual`."""
        if not self.residual.any():
            return 0.0
        codes, dose = action.codes, action.dose
        if len(codes) > 1 and bool((codes == codes[:1]).all()) and bool((dose == dose[:1]).all()):
            codes, dose = codes[:1], dose[:1]
        code = codes.clamp(min=0)
        strength = self.dose_response(code, dose) * (codes >= 0)
        mean = (strength[..., None] * self.residual[code]).sum(-2)
        variance = (strength[..., None] * self.residual_sd[code]).square().sum(-2)
        if len(self.combinations) and codes.shape[1] <= self.combinations.shape[1]:
            padded = F.pad(codes, (0, self.combinations.shape[1] - codes.shape[1]), value=-1)
            same = (padded[:, None] == self.combinations).all(-1).to(mean)
            same = same * strength.masked_fill(codes < 0, torch.inf).amin(-1, keepdim=True).clamp(max=1.0)
            mean = mean + same @ self.residual[self.n_perturbations :]
            variance = variance + same.square() @ self.residual_sd[self.n_perturbations :].square()
        if action.features is not None and self.described.any():
            unknown = ((codes == UNKNOWN) * dose)[..., None]
            own = action.features[: len(codes)].to(mean) @ self.described_weight + self.described
            mean, variance = mean + (unknown * own).sum(-2), variance + (unknown * self.described_sd).square().sum(-2)
        return mean + globals_["residual_noise"] * variance.sqrt() if "residual_noise" in globals_ else mean

    # -- counterfactuals --------------------------------------------------------------------------------------------

    def draw_globals(self, n_samples: int) -> dict[str, Tensor]:
        """E o M, and the noise of measured effects; one draw for all cells."""
        drawn = {}
        if self.residual_sd.any():
            drawn["residual_noise"] = torch.randn(n_samples, 1, self.n_genes, device=self.residual.device)
        return drawn if self.effect == "conditional" else {**drawn, "table": self.draw_table(n_samples)}

    def draw_table(self, n_samples: int) -> Tensor:
        """Draws of E o M."""
        table: Tensor | float = 1.0
        if self.effect in ("sparse", "svae+"):
            table = torch.bernoulli(self.mask_logits.sigmoid().expand(n_samples, -1, -1))
        effect = self.effect_loc if self.effect == "svae+" else self._draw_effect(table, n_samples)
        return table * effect

    def _draw_effect(self, mask: Tensor | float, n_samples: int) -> Tensor:
        posterior = self.effect_posterior(mask)
        return posterior.sample(() if posterior.batch_shape[:-2] else (n_samples,))

    def abduct(self, cells: Cells, n_samples: int, globals_: dict[str, Tensor]) -> Basal:
        """Draw of the basal state and of the noise of the cell's own measurement."""
        shift = self.moves(globals_, cells, cells.action)
        posterior = self.basal(cells, shift)
        shape = (n_samples, len(cells), self.n_latent)
        z = torch.distributions.Normal(posterior.loc.expand(shape), posterior.scale.expand(shape)).sample()
        h = self._decoded(self.state(z, shift), cells.batch)
        noise = self.likelihood.abduct(h, cells.library, cells.x, self.offset(cells.action, globals_))
        basal = self._basal_of(cells, z - shift if self.effect == "svae+" else z, noise, globals_)
        basal.z = self.act(basal, cells.action.control(), globals_)
        return basal

    def _basal_of(self, cells: Cells, z: Tensor, noise: Tensor, globals_: dict[str, Tensor]) -> Basal:
        return Basal(z, noise, cells.context, cells.batch, cells.library)

    def act(self, basal: Basal, action: Action, globals_: dict[str, Tensor]) -> Tensor:
        """State under a perturbation."""
        shift = self.moves(globals_, basal, action)
        z = basal.z[..., : self.n_latent]
        return z + shift if self.effect == "svae+" else self.state(z, shift)

    def decode(self, z: Tensor, basal: Basal) -> Tensor:
        """Expression, the cell's own measurement noise replayed."""
        return self.likelihood.predict(self._decoded(z, basal.batch), basal.library, basal.noise)

    def express(self, z: Tensor, basal: Basal, action: Action, globals_: dict[str, Tensor]) -> Tensor:
        """As :meth:`decode`, with what the perturbation does to genes beyond its latent shift."""
        h = self._decoded(z, basal.batch)
        return self.likelihood.predict(h, basal.library, basal.noise, self.offset(action, globals_))

    def log_weight(self, cells: Cells, n_samples: int, globals_: dict[str, Tensor]) -> Tensor:
        """Log p(x, z) - log q(z) of draws of the local variables, ``(n_samples, n_cells)``."""
        shift = self.moves(globals_, cells, cells.action)
        posterior = self.basal(cells, shift)
        shape = (n_samples, len(cells), self.n_latent)
        posterior = torch.distributions.Normal(posterior.loc.expand(shape), posterior.scale.expand(shape))
        z = posterior.sample()
        prior = torch.distributions.Normal(shift if self.effect == "svae+" else 0.0, 1.0)
        h = self._decoded(self.state(z, shift), cells.batch)
        # without measured residuals: the basal state of a perturbed cell has taken up what its shift left over
        log_p = self.likelihood(h, cells.library).log_prob(cells.x)
        return log_p + (prior.log_prob(z) - posterior.log_prob(z)).sum(-1)

    def _decoded(self, state: Tensor, batch: Tensor) -> Tensor:
        one_hot = self._one_hot_batch(batch)
        if self.decoder is not None:
            return self.decoder(state, one_hot)
        return state if one_hot is None else torch.cat([state, one_hot.expand(*state.shape[:-1], -1)], dim=-1)

    def _one_hot_batch(self, batch: Tensor) -> Tensor | None:
        if self.n_batch < 2:
            return None
        return F.one_hot(batch.clamp(max=self.n_batch - 1), self.n_batch).to(self.input_mean)

    @staticmethod
    def _get_fn_args_from_batch(batch: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        return (Cells.from_tensors(batch),), {}


def beside(*parts: Tensor) -> Tensor:
    """Parts of a state side by side, broadcast over draws and cells."""
    shape = torch.broadcast_shapes(*(part.shape[:-1] for part in parts))
    return torch.cat([part.expand(*shape, -1) for part in parts], dim=-1)
