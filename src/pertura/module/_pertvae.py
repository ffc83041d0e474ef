r"""PertVAE: linear effects of perturbations on a latent state (Rampasek et al.).

.. math::

    W_p, b_p            &\sim N(0, \sigma_W^2),\; N(0, \sigma_b^2) \\
    z_1                 &\sim N(0, I) \\
    z_2 \mid z_1        &\sim N\Big(z_1 + \sum_{p} s_p(d_p)\,(W_p\, u + b_0 + b_p),\; \sigma_2^2\Big) \\
    x_k \mid z_k        &\sim p_\theta(x \mid \mathrm{dec}(z_k)), \quad k = 1, 2

with :math:`u = z_1` (the paper) or :math:`u` the principal components of the mean control profile of the cell's context,
:math:`W_p = U_p V_p^\top` of low rank where there are many perturbations, and
:math:`s_p(d) = \log(1 + \kappa_p d) / \log(1 + \kappa_p)` of the dose. The guide :math:`q(z_k \mid x_k)` is one for both k, a
Gaussian followed by inverse autoregressive steps.

A cell alone, which is no member of a pair, has one latent state, that in which it was measured. For a treated cell this is
:math:`z_2`, whose prior is :math:`\int p(z_2 \mid z_1)\, p(z_1)\, dz_1`.

In contexts where a perturbation was measured, what its effect differs from that of :math:`z_2` is added to what the decoder says
(:mod:`pertura.module._departures`), once the rest is trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from pertura.data._constants import DOSE_TOLERANCE, UNKNOWN
from pertura.nn._flows import InverseAutoregressiveFlow
from pertura.nn._mlp import MLP

from ._base import Action, Basal, Cells, Counterfactual, Globals
from ._departures import Departures, RowNoise
from ._draws import run, unwrapped
from ._latent import LatentModule, log_dose_response


class PertVAE(LatentModule):
    r"""Generative model and guide of PertVAE.

    Parameters
    ----------
    n_genes, n_perturbations, n_contexts, n_batch
        Sizes of the data.
    n_latent
        Dimension of the latent state.
    encoder_hidden, decoder_hidden
        Widths of the layers; no decoder layers make the decoder (log-)linear.
    n_flow_context
        Units beside the mean and the scale of the guide that feed its flow.
    n_flow_steps, n_flow_hidden
        Autoregressive steps of the guide and the units in each.
    rank
        Rank of W for each perturbation; `None` for full matrices.
    effect_input
        What W multiplies: the cell's own state, or the mean control profile of its context.
    n_context_components
        Number of principal components that describe a context.
    transition_noise
        Standard deviation of :math:`z_2 \mid z_1`: ``"constant"``, one for each dimension, or ``"state"``,
        :math:`\exp f(z_1)` with f linear, as in the paper.
    likelihood
        ``"nb"`` or ``"normal"``.
    link_sharpness
        See :class:`~pertura.nn.CountLikelihood`.
    heteroscedastic
        See :class:`~pertura.nn.GaussianLikelihood`.
    prior_sd_W, prior_sd_b
        Standard deviations of the normal priors of W and b.
    use_weight_norm
        Whether all layers of encoder, flow, decoder and likelihood are weight-normalized.
    n_features
        Number of features of a perturbation; 0 where none were registered.
    effect_lr_factor
        Learning rate of effects in units of that of the neural networks.
    """

    no_weight_decay = {"effect_", "likelihood.log_theta"}

    def __init__(
        self,
        n_genes: int,
        n_perturbations: int,
        n_contexts: int = 1,
        n_batch: int = 1,
        *,
        n_latent: int = 30,
        encoder_hidden: Sequence[int] = (128, 128),
        decoder_hidden: Sequence[int] = (),
        n_flow_context: int = 64,
        n_flow_steps: int = 2,
        n_flow_hidden: int = 64,
        rank: int | None = None,
        effect_input: Literal["cell", "context"] = "context",
        n_context_components: int = 30,
        transition_noise: Literal["constant", "state"] = "constant",
        likelihood: Literal["nb", "normal"] = "nb",
        link_sharpness: float = 3.0,
        heteroscedastic: bool = False,
        prior_sd_W: float = 0.3,
        prior_sd_b: float = 10.0,
        use_weight_norm: bool = False,
        n_features: int = 0,
        effect_lr_factor: float = 5.0,
    ) -> None:
        super().__init__(n_genes, n_batch)
        self.n_latent, self.effect_input = n_latent, effect_input
        self.prior_sd_W, self.prior_sd_b = prior_sd_W, prior_sd_b
        self.lr_factors = {"effect_": effect_lr_factor}

        self.encoder = MLP(n_genes + self.n_covariates, encoder_hidden, use_weight_norm=use_weight_norm)
        self.flow = InverseAutoregressiveFlow(
            n_latent, self.encoder.n_out, n_flow_context, n_flow_steps, n_flow_hidden, use_weight_norm
        )
        self.decoder = MLP(n_latent + self.n_covariates, decoder_hidden, use_weight_norm=use_weight_norm)
        self.make_likelihood(likelihood, self.decoder.n_out, link_sharpness, heteroscedastic)
        if use_weight_norm:
            for layer in [m for m in self.likelihood.modules() if isinstance(m, nn.Linear)]:
                weight_norm(layer)

        # W = U V^T; U = 0 starts as the identity. At full rank V is fixed to I and W is a matrix of its own
        n_inputs = n_latent if effect_input == "cell" else n_context_components
        rank = n_inputs if rank is None else min(rank, n_inputs)
        self.effect_U = nn.Parameter(torch.zeros(n_perturbations, n_latent, rank))
        V = torch.randn(n_perturbations, n_inputs, rank) / n_inputs**0.5
        self.effect_V = nn.Parameter(V) if rank < n_inputs else None
        # what all perturbations have in common is learned from all of them; each one's own part is shrunk toward it
        self.effect_common = nn.Parameter(torch.zeros(n_latent)) if n_perturbations > 1 else None
        self.effect_b = nn.Parameter(torch.zeros(n_perturbations, n_latent))
        self.effect_log_scale = nn.Parameter(torch.full((n_latent,), -1.0))
        state_noise = transition_noise == "state"
        self.effect_log_scale_slope = nn.Parameter(torch.zeros(n_latent, n_latent)) if state_noise else None
        self.departures = Departures(n_genes)
        # of W that left-out contexts support; W has it
        self.register_buffer("share", torch.tensor(1.0))
        self.dose_log_kappa = nn.Parameter(torch.zeros(n_perturbations))
        self.effect_features = nn.Linear(n_features, n_latent, bias=False) if n_features else None
        if self.effect_features is not None:
            nn.init.zeros_(self.effect_features.weight)
        self.register_buffer("features", torch.zeros(n_perturbations, n_features))
        self.register_buffer("profile_mean", torch.zeros(n_genes))
        self.register_buffer("profile_basis", torch.zeros(n_genes, n_context_components))
        self.register_buffer("context_profile", torch.zeros(n_contexts, n_context_components))
        # of the contexts by the first half of their controls, then by the second
        self.register_buffer("half_profile", torch.zeros(2 * n_contexts, n_context_components))

    @staticmethod
    def _get_fn_args_from_batch(batch: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        return (Cells.from_tensors(batch), int(batch["n_pairs"])), {"half": batch.get("half")}

    # -- generative model and guide ---------------------------------------------------------------------------------

    def model(self, cells: Cells, n_pairs: int = 0, kl_weight: float = 1.0, half: Tensor | None = None) -> None:
        """Joint density of a minibatch: rows are cells before a perturbation, cells alone, the same pairs' cells after it.

        `half`: of the controls of its context that a cell is in, 0 or 1. The profile of the context is then that of the other half
        than the cell before a perturbation: the noise of these would be in the profile and in the effect.
        """
        first, post = _split(cells, n_pairs)
        if self.training:
            self._prior_of_effects(len(cells))
        noise = self.departures.sample_noise()
        with pyro.plate("cells", len(first)):
            with pyro.poutine.scale(scale=kl_weight):
                z1 = pyro.sample("z1", self.prior(first))
            pyro.deterministic("state", z1, event_dim=1)
            pyro.sample("x", self.expression(z1, first, noise), obs=first.x)
        if n_pairs == 0:
            return
        before = z1[..., :n_pairs, :]
        profiles = None
        if half is not None:
            at = post.context + len(self.context_profile) * (1 - half[:n_pairs, 0].long())
            post, profiles = replace(post, context=at), self.half_profile
        after = self.transition(before, post, profiles)
        with pyro.plate("pairs", n_pairs):
            with pyro.poutine.scale(scale=kl_weight):
                z2 = pyro.sample("z2", after.to_event(1))
            pyro.sample("x2", self.expression(z2, post, noise), obs=post.x)

    def guide(self, cells: Cells, n_pairs: int = 0, kl_weight: float = 1.0, half: Tensor | None = None) -> None:
        """q(z | x), one encoder for cells before and after a perturbation."""
        self.departures.sample_noise()
        h = self.encode(cells)
        n_first = len(cells) - n_pairs
        with pyro.plate("cells", n_first), pyro.poutine.scale(scale=kl_weight):
            pyro.sample("z1", self.flow(h[:n_first]))
        if n_pairs:
            with pyro.plate("pairs", n_pairs), pyro.poutine.scale(scale=kl_weight):
                pyro.sample("z2", self.flow(h[n_first:]))

    def prior(self, cells: Cells, profiles: Tensor | None = None) -> dist.TorchDistribution:
        r"""Prior of the state in which cells alone were measured, batch shape ``(n_cells,)``.

        Normal, with :math:`J = I + \sum_p s_p W_p` and :math:`b = \sum_p s_p (b_0 + b_p)`: mean b and covariance
        :math:`J J^\top + \sigma_2^2`. Where the noise depends on the state these are the moments, and the prior is not normal.
        Cells alone do not train the effect: nothing says that those of a context without controls differ from others
        by the perturbation only.
        """
        treated = cells.action.present.any(1, keepdim=True)
        if not bool(treated.any()):
            return dist.Normal(cells.x.new_zeros(len(cells), self.n_latent), 1.0).to_event(1)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.training):
            jacobian, loc = self.linear(cells, profiles)
            variance = treated * self.mean_noise_variance()
            if jacobian is None:
                return dist.Normal(loc, (1.0 + variance).sqrt()).to_event(1)
            return dist.MultivariateNormal(loc, jacobian @ jacobian.mT + torch.diag_embed(variance))

    def transition(self, z1: Tensor, cells: Cells, profiles: Tensor | None = None) -> dist.Normal:
        """p(z2 | z1), batch shape ``(..., n_cells, n_latent)``; arguments as of :meth:`effect`."""
        return dist.Normal(z1 + self.effect(z1, cells, profiles), self.noise_sd(z1))

    def expression(self, z: Tensor, cells: Cells, noise: RowNoise | None = None) -> dist.TorchDistribution:
        """p(x | z); without `noise` at the mean of the departures."""
        own = self.departures(cells.action, cells.context, noise)
        return self.likelihood(
            self.decoder(self.with_batch(z, cells.batch)), cells.library, 0.0 if own is None else own[0]
        )

    def encode(self, cells: Cells) -> Tensor:
        """Hidden layer that the guide reads, ``(n_cells, encoder_hidden[-1])``."""
        x = self.standardized(cells.x, cells.library)
        x = x - self.departures.change(cells.action, cells.context) / self.input_scale
        return self.encoder(self.with_batch(x, cells.batch))

    def _prior_of_effects(self, n_cells: int) -> None:
        """Normal priors of W and b (the paper's L2), at the weight that one minibatch has in the data."""
        log_prior = -0.5 * self.effect_W().square().sum() / self.prior_sd_W**2
        log_prior = log_prior - 0.5 * self.effect_b.square().sum() / self.prior_sd_b**2
        pyro.factor("effect_prior", log_prior * n_cells / max(self.n_train, n_cells))

    # -- effects of perturbations -----------------------------------------------------------------------------------

    def effect_W(self) -> Tensor:
        """W of every perturbation, ``(n_perturbations, n_latent, n_inputs)``."""
        return self.effect_U if self.effect_V is None else self.effect_U @ self.effect_V.mT

    def slope(self, action: Action) -> Tensor:
        """Sum over members of s(dose) W, ``(n_cells, n_latent, n_inputs)``."""
        code, strength = action.codes.clamp(min=0), self.strength(action) * (action.codes >= 0)
        W = self.effect_U[code] if self.effect_V is None else self.effect_U[code] @ self.effect_V[code].mT
        return (strength[..., None, None] * W).sum(1)

    def shift(self, action: Action) -> Tensor:
        """Sum over members of s(dose) b, ``(n_cells, n_latent)``."""
        code, known = action.codes.clamp(min=0), action.codes >= 0
        b, described = self.effect_b[code], torch.zeros_like(self.effect_b[code])
        if self.effect_features is not None:
            features = self.features[code]
            if action.features is not None:
                features = torch.where(known[..., None], features, action.features)
                known = known | (action.codes == UNKNOWN)
            described = self.effect_features(features)
        if self.effect_common is not None:
            described = described + self.effect_common
        each = torch.where((action.codes >= 0)[..., None], b, torch.zeros_like(b)) + described
        return ((self.strength(action) * known)[..., None] * each).sum(1)

    def strength(self, action: Action) -> Tensor:
        """Dose response of each member, ``(n_cells, order)``; of those that are new, with the mean curvature."""
        known = action.codes >= 0
        log_kappa = torch.where(known, self.dose_log_kappa[action.codes.clamp(min=0)], self.dose_log_kappa.mean())
        return log_dose_response(log_kappa, action.dose)

    def linear(self, cells: Cells, profiles: Tensor | None = None) -> tuple[Tensor | None, Tensor]:
        """The effect as a linear map: z1 + effect(z1) = J z1 + b; J is `None` where it is the identity.

        Parameters
        ----------
        cells
            With the perturbations.
        profiles
            Profiles of contexts, if they are not those of training.

        Returns
        -------
        J ``(n_cells, n_latent, n_latent)`` and b ``(n_cells, n_latent)``.
        """
        slope, shift = self.slope(cells.action), self.shift(cells.action)
        if self.effect_input == "cell":
            return slope + torch.eye(self.n_latent, device=slope.device), shift
        u = (self.context_profile if profiles is None else profiles)[cells.context]
        return None, _times(slope, u) + shift

    def effect(self, z1: Tensor, cells: Cells, profiles: Tensor | None = None) -> Tensor:
        """Sum over members of s(dose) (W u + b), ``(..., n_cells, n_latent)``; arguments as of :meth:`linear`."""
        jacobian, b = self.linear(cells, profiles)
        return (b if jacobian is None else _times(jacobian, z1) - z1 + b).expand_as(z1)

    def noise_sd(self, z1: Tensor) -> Tensor:
        """Standard deviation of z2 given z1, of the shape of `z1` or of its last dimension."""
        if self.effect_log_scale_slope is None:
            return self.effect_log_scale.exp()
        return (self.effect_log_scale + z1 @ self.effect_log_scale_slope.mT).clamp(-7.0, 3.0).exp()

    def mean_noise_variance(self) -> Tensor:
        """Mean over z1 of the squared standard deviation, ``(n_latent,)``."""
        if self.effect_log_scale_slope is None:
            return (2 * self.effect_log_scale).exp()
        # the mean of a log-normal variable
        return (2 * self.effect_log_scale + 2 * self.effect_log_scale_slope.square().sum(1)).exp()

    # -- counterfactuals --------------------------------------------------------------------------------------------

    def abduct(self, cells: Cells, n_draws: int, globals_: Globals) -> Basal:
        """The state of a cell from q(z | x), the effect of its own perturbation taken back.

        As in the paper the basal state of a treated cell solves z = z1 + effect(z1). It does not follow from the generic
        abduction, in which z1 and z2 of a cell would be apart.
        """
        z = run(self.guide, cells, n_draws).nodes["z1"]["value"]
        half = torch.randn((n_draws + 1) // 2, *z.shape[1:], device=z.device)
        noise = torch.cat([half, -half])[:n_draws]
        own = unwrapped(self.expression(z, cells, globals_.get("departure_noise"))).abduct(cells.x)
        basal = self._take_back(z, cells, globals_.get("context_profile"))
        return Basal(cells, basal, {"measured": z, "noise": noise}, own, globals_, n_draws)

    def _take_back(self, z: Tensor, cells: Cells, profiles: Tensor | None) -> Tensor:
        """Solve z = z1 + effect(z1) for z1."""
        if not bool(cells.action.present.any()):
            return z
        jacobian, b = self.linear(cells, profiles)
        return z - b if jacobian is None else torch.linalg.solve(jacobian, (z - b)[..., None]).squeeze(-1)

    def counterfactual(self, basal: Basal, action: Action) -> Counterfactual:
        """The state at the mean of p(z2 | z1); draws of single cells also have its noise.

        The noise is a cell's own, the same under all perturbations, and is unknown: drawn from its prior. It enters where a
        control is asked under a perturbation or a treated cell without one, and a cell's own perturbation gives back its own state.
        """
        profiles, own = basal.globals_.get("context_profile"), basal.cells
        departing = basal.globals_.get("departure_noise")
        cells = replace(own, action=action)
        same = _same(own.action, action)[:, None]
        state = basal.state + self.effect(basal.state, cells, profiles)
        state = torch.where(same, basal.latents["measured"], state)

        def drawn() -> Any:
            noise = self.noise_sd(basal.state) * basal.latents["noise"]
            before = noise * own.action.present.any(1)[:, None]
            (own_jacobian, _), (jacobian, _) = self.linear(own, profiles), self.linear(cells, profiles)
            if own_jacobian is not None:
                before = _times(jacobian, torch.linalg.solve(own_jacobian, before[..., None]).squeeze(-1))
            moved = torch.where(same, 0.0, noise * action.present.any(1)[:, None] - before)
            return unwrapped(self.expression(state + moved, cells, departing))

        return Counterfactual(state, unwrapped(self.expression(state, cells, departing)), drawn)

    def log_weights(self, cells: Cells, n_draws: int, globals_: Globals) -> Tensor:
        """Log p(x, z) - log q(z | x) of the state in which a cell was measured, ``(n_draws, n_cells)``.

        z1 of a treated cell is integrated out: in closed form, or where the noise of the transition depends on z1 with a draw of
        z1 given z2 for each draw of z2.
        """
        profiles = globals_.get("context_profile")
        site = run(self.guide, cells, n_draws).nodes["z1"]
        z = site["value"]
        total = self.expression(z, cells, globals_.get("departure_noise")).log_prob(cells.x) - site["fn"].log_prob(z)
        treated, prior = cells.action.present.any(1), self.prior(cells, profiles)
        if self.effect_log_scale_slope is None or not bool(treated.any()):
            return total + prior.log_prob(z)
        alone = dist.Normal(torch.zeros_like(z), 1.0).to_event(1).log_prob
        return total + torch.where(treated, self._log_marginal(z, cells, profiles), alone(z))

    def _log_marginal(self, z2: Tensor, cells: Cells, profiles: Tensor | None) -> Tensor:
        """Log p(z2), estimated with one draw of z1 from what its posterior is where the noise is constant."""
        jacobian, b = self.linear(cells, profiles)
        eye = torch.eye(self.n_latent, device=z2.device)
        jacobian = eye.expand(len(cells), -1, -1) if jacobian is None else jacobian
        weighted = jacobian.mT / self.mean_noise_variance()
        precision = eye + weighted @ jacobian
        loc = torch.linalg.solve(precision, _times(weighted, z2 - b)[..., None]).squeeze(-1)
        q = dist.MultivariateNormal(loc, precision_matrix=precision)
        z1 = q.sample()
        p1 = dist.Normal(torch.zeros_like(z1), 1.0).to_event(1)
        p2 = dist.Normal(_times(jacobian, z1) + b, self.noise_sd(z1)).to_event(1)
        return p1.log_prob(z1) + p2.log_prob(z2) - q.log_prob(z1)

    @torch.no_grad()
    def project_profiles(self, profiles: Tensor, found: Tensor) -> Tensor:
        """Components of mean control profiles, 0 (the average context) where there are no control cells.

        Parameters
        ----------
        profiles
            ``(n_contexts, n_genes)``.
        found
            Whether a context has control cells, ``(n_contexts,)``.
        """
        return ((profiles - self.profile_mean) @ self.profile_basis) * found[:, None]


def _split(cells: Cells, n_pairs: int) -> tuple[Cells, Cells]:
    """The cells without those after a perturbation, and those."""
    if n_pairs == 0:
        return cells, cells
    parts = []
    for rows in (slice(0, len(cells) - n_pairs), slice(len(cells) - n_pairs, None)):
        own = {name: getattr(cells, name)[rows] for name in ("x", "action", "context", "batch", "library")}
        parts.append(Cells(**own))
    return parts[0], parts[1]


def _times(matrix: Tensor, vector: Tensor) -> Tensor:
    """A matrix for each cell times a vector for each cell and draw, ``(..., n_cells, n)``."""
    return torch.einsum("nij,...nj->...ni", matrix, vector)


def _same(one: Action, other: Action) -> Tensor:
    """Whether cells have the same perturbations at the same doses, ``(n_cells,)``."""
    n = max(one.codes.shape[1], other.codes.shape[1])
    sorted_ = []
    for action in (one, other):
        codes = torch.where(action.present, action.codes, -1)
        codes, order = nn.functional.pad(codes, (0, n - codes.shape[1]), value=-1).sort(1)
        dose = nn.functional.pad(torch.where(action.present, action.dose, 0.0), (0, n - action.dose.shape[1]))
        sorted_.append((codes, dose.gather(1, order)))
    (codes, dose), (other_codes, other_dose) = sorted_
    # relative doses are float32
    alike = (codes == other_codes) & (codes != UNKNOWN) & torch.isclose(dose, other_dose, rtol=DOSE_TOLERANCE, atol=0.0)
    return alike.all(1)
