r"""PertVAE: linear effects of perturbations on a latent state (Rampasek et al.).

.. math::

    W_p, b_p            &\sim N(0, \sigma_W^2),\; N(b_0, \sigma_b^2) \\
    z_1                 &\sim N(0, I) \\
    z_2 \mid z_1        &\sim N\Big(z_1 + \sum_{p} s_p(d_p)\,(W_p\, u + b_p),\; \sigma_2^2\Big) \\
    x_k \mid z_k        &\sim p_\theta(x \mid \mathrm{dec}(z_k)), \quad k = 1, 2

with :math:`u = z_1` (the paper) or :math:`u` the principal components of the mean control profile of the cell's context,
:math:`W_p = U_p V_p^\top` of low rank where there are many perturbations, and :math:`s_p(d) = \log(1 + \kappa_p d) / \log(1 + \kappa_p)` of the dose. The guide
:math:`q(z_k \mid x_k)` is one network for both k, a Gaussian followed by inverse autoregressive steps.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pertura.data._constants import UNKNOWN
from pertura.nn._flows import InverseAutoregressiveFlow
from pertura.nn._likelihoods import CountLikelihood, GaussianLikelihood
from pertura.nn._mlp import MLP

from ._base import Action, Basal, Cells, PerturbationModule


class PertVAE(PerturbationModule):
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
        Units that feed the flow's context.
    n_flow_steps, n_flow_hidden
        Autoregressive steps of the guide and the units in each.
    rank
        Rank of W for each perturbation; `n_latent` for full matrices.
    effect_input
        What W multiplies: the cell's own state, or the mean control profile of its context.
    n_context_components
        Number of principal components that describe a context.
    likelihood
        ``"nb"`` or ``"normal"``.
    link_sharpness
        See :class:`~pertura.nn.CountLikelihood`.
    heteroscedastic
        See :class:`~pertura.nn.GaussianLikelihood`.
    prior_sd_W, prior_sd_b
        Standard deviations of the normal priors of W and b.
    use_weight_norm, dropout_rate, input_noise
        Regularisation of the networks; `input_noise` is the sd of noise on the encoder's standardised input.
    prediction_weight
        Weight of :math:`E_{q(z_1 | x_1) p(z_2 | z_1)} \log p(x_2 | z_2)`, the term by which the reference implementation
        trains the prediction itself.
    n_features
        Number of features of a perturbation; 0 where none were registered.
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
        likelihood: Literal["nb", "normal"] = "nb",
        link_sharpness: float = 3.0,
        heteroscedastic: bool = False,
        prior_sd_W: float = 0.3,
        prior_sd_b: float = 10.0,
        use_weight_norm: bool = False,
        dropout_rate: float = 0.0,
        input_noise: float = 0.0,
        prediction_weight: float = 0.0,
        n_features: int = 0,
        effect_lr_factor: float = 5.0,
    ) -> None:
        super().__init__()
        self.n_latent, self.n_genes, self.n_batch = n_latent, n_genes, n_batch
        self.effect_input = effect_input
        self.prior_sd_W, self.prior_sd_b = prior_sd_W, prior_sd_b
        self.input_noise, self.prediction_weight = input_noise, prediction_weight
        self.lr_factors = {"effect_": effect_lr_factor}

        options: dict[str, Any] = {"use_weight_norm": use_weight_norm, "dropout_rate": dropout_rate}
        n_covariates = n_batch if n_batch > 1 else 0
        self.encoder = MLP(n_genes + n_covariates, [*encoder_hidden, n_flow_context], **options)
        self.flow = InverseAutoregressiveFlow(n_latent, n_flow_context, n_flow_steps, n_flow_hidden)
        self.decoder = MLP(n_latent + n_covariates, decoder_hidden, **options)
        if likelihood == "nb":
            self.likelihood = CountLikelihood(self.decoder.n_out, n_genes, link_sharpness)
        else:
            self.likelihood = GaussianLikelihood(self.decoder.n_out, n_genes, heteroscedastic)
        self.native_scale = self.likelihood.native_scale

        # W = U V^T; U = 0 starts as the identity. At full rank V is fixed to I and W is a matrix of its own
        n_inputs = n_latent if effect_input == "cell" else n_context_components
        self.rank = n_inputs if rank is None else min(rank, n_inputs)
        self.full_rank = self.rank == n_inputs
        self.effect_U = nn.Parameter(torch.zeros(n_perturbations, n_latent, self.rank))
        if not self.full_rank:
            self.effect_V = nn.Parameter(torch.randn(n_perturbations, n_inputs, self.rank) / n_inputs**0.5)
        # what all perturbations have in common is learned from all of them; each one's own part is shrunk towards it
        self.effect_common = nn.Parameter(torch.zeros(n_latent)) if n_perturbations > 1 else None
        self.effect_b = nn.Parameter(torch.zeros(n_perturbations, n_latent))
        self.effect_log_scale = nn.Parameter(torch.full((n_latent,), -1.0))
        self.dose_log_kappa = nn.Parameter(torch.zeros(n_perturbations))
        self.effect_features = nn.Linear(n_features, n_latent, bias=False) if n_features else None
        if self.effect_features is not None:
            nn.init.zeros_(self.effect_features.weight)
        self.register_buffer("features", torch.zeros(n_perturbations, n_features))

        self.register_buffer("input_mean", torch.zeros(n_genes))
        self.register_buffer("input_scale", torch.ones(n_genes))
        self.register_buffer("profile_mean", torch.zeros(n_genes))
        self.register_buffer("profile_basis", torch.zeros(n_genes, n_context_components))
        self.register_buffer("context_profile", torch.zeros(n_contexts, n_context_components))

    # -- generative model and guide ---------------------------------------------------------------------------------

    def model(self, cells: Cells, n_pairs: int, kl_weight: float = 1.0) -> None:
        """Joint density of a minibatch: rows are pre-treatment cells, singletons, post-treatment cells of the pairs."""
        n_first = len(cells) - n_pairs
        first, post = slice(0, n_first), slice(n_first, None)
        self._effect_prior(len(cells))
        with pyro.plate("cells", n_first), pyro.poutine.scale(scale=kl_weight):
            z1 = pyro.sample("z1", dist.Normal(cells.x.new_zeros(self.n_latent), 1.0).to_event(1))
        with pyro.plate("first", n_first):
            pyro.sample("x1", self.expression(z1, cells, first), obs=cells.x[first])
        if n_pairs == 0:
            return
        action = _rows(cells.action, post)
        state = z1[..., :n_pairs, :]
        u = state if self.effect_input == "cell" else self.context_profile[cells.context[post]]
        prior = dist.Normal(state + self.effect(u, action), self.effect_log_scale.exp()).to_event(1)
        with pyro.plate("pairs", n_pairs), pyro.poutine.scale(scale=kl_weight):
            z2 = pyro.sample("z2", prior)
        with pyro.plate("post", n_pairs):
            pyro.sample("x2", self.expression(z2, cells, post), obs=cells.x[post])
        if self.prediction_weight > 0:
            with pyro.poutine.scale(scale=self.prediction_weight):
                log_prob = self.expression(prior.rsample(), cells, post).log_prob(cells.x[post])
                pyro.factor("x2_predicted", log_prob.sum())

    def guide(self, cells: Cells, n_pairs: int, kl_weight: float = 1.0) -> None:
        """q(z_k | x_k), one encoder for pre- and post-treatment cells."""
        n_first = len(cells) - n_pairs
        h = self.encode(cells)
        with pyro.plate("cells", n_first), pyro.poutine.scale(scale=kl_weight):
            pyro.sample("z1", self.flow(h[:n_first]))
        if n_pairs:
            with pyro.plate("pairs", n_pairs), pyro.poutine.scale(scale=kl_weight):
                pyro.sample("z2", self.flow(h[n_first:]))

    def _effect_prior(self, n_cells: int) -> None:
        """Normal priors of W and b (the paper's L2), at the weight that one minibatch has in the data."""
        log_prior = -0.5 * (self.effect_W().square().sum() / self.prior_sd_W**2)
        log_prior = log_prior - 0.5 * self.effect_b.square().sum() / self.prior_sd_b**2
        pyro.factor("effect_prior", log_prior * n_cells / max(self.n_train, n_cells))

    def expression(self, z: Tensor, cells: Cells, rows: slice) -> dist.TorchDistribution:
        """p(x | z)."""
        return self.likelihood(self.decoder(self._with_batch(z, cells.batch[rows])), cells.library[rows])

    def encode(self, cells: Cells) -> Tensor:
        """Context of the flow, ``(n_cells, n_flow_context)``."""
        x = (self.normalised(cells.x) - self.input_mean) / self.input_scale
        if self.training and self.input_noise > 0:
            x = x + self.input_noise * torch.randn_like(x)
        return self.encoder(self._with_batch(x, cells.batch))

    def normalised(self, x: Tensor) -> Tensor:
        """Counts as log1p of counts per 10,000; other values as they are."""
        if self.native_scale != "counts":
            return x
        return torch.log1p(1e4 * x / x.sum(-1, keepdim=True).clamp(min=1.0))

    # -- effects of perturbations -----------------------------------------------------------------------------------

    def effect_W(self) -> Tensor:
        """W of every perturbation, ``(n_perturbations, n_latent, n_inputs)``."""
        return self.effect_U if self.full_rank else self.effect_U @ self.effect_V.mT

    def effect(self, u: Tensor, action: Action) -> Tensor:
        """Sum over components of s(dose) (W u + b), ``(..., n_cells, n_latent)``."""
        code = action.codes.clamp(min=0)
        strength = self.dose_response(code, action.dose) * (action.codes >= 0)
        U, b = self.effect_U[code], self.effect_b[code]
        if self.full_rank:
            moved = torch.einsum("nkij,...nj->...nki", U, u)
        else:
            moved = torch.einsum("nkir,nkjr,...nj->...nki", U, self.effect_V[code], u)
        if self.effect_common is not None:
            b = b + self.effect_common
        if self.effect_features is not None:
            b = b + self.effect_features(self.features[code])
        total = (strength[..., None] * (moved + b)).sum(-2)
        if action.features is not None and self.effect_features is not None:
            kappa = self.dose_kappa().mean()
            unknown = (action.codes == UNKNOWN) * (torch.log1p(kappa * action.dose) / torch.log1p(kappa))
            described = self.effect_features(action.features)
            if self.effect_common is not None:
                described = described + self.effect_common
            total = total + (unknown[..., None] * described).sum(-2)
        return total

    def dose_response(self, code: Tensor, dose: Tensor) -> Tensor:
        """Monotone, 0 at dose 0 and 1 at the highest registered dose."""
        kappa = self.dose_kappa()[code]
        return torch.log1p(kappa * dose) / torch.log1p(kappa)

    def dose_kappa(self) -> Tensor:
        """Curvature of the dose response, ``(n_perturbations,)``."""
        return F.softplus(self.dose_log_kappa) + 1e-3

    # -- counterfactuals --------------------------------------------------------------------------------------------

    def draw_globals(self, n_samples: int) -> dict[str, Tensor]:
        """W and b are point estimates: nothing to draw."""
        return {}

    def abduct(self, cells: Cells, n_samples: int, globals_: dict[str, Tensor]) -> Basal:
        """z1 of a cell from q(z | x), the effect of its own perturbation taken back."""
        z = self.flow(self.encode(cells)).sample((n_samples,))
        noise = self.likelihood.abduct(self._decoded(z, cells.batch), cells.library, cells.x)
        if cells.action.present.any():
            z = self._remove(z, cells, globals_)
        return Basal(z, noise, cells.context, cells.batch, cells.library)

    def _remove(self, z: Tensor, cells: Cells, globals_: dict[str, Tensor]) -> Tensor:
        """Solve z = z1 + effect(z1) for z1."""
        if self.effect_input == "context":
            return z - self.effect(self._context(cells.context, globals_), cells.action)
        zero = self.effect(torch.zeros_like(z), cells.action)
        eye = torch.eye(self.n_latent, device=z.device)
        columns = self.effect(eye[:, None, :].expand(-1, len(cells), -1), cells.action) - zero[0]
        jacobian = eye + columns.permute(1, 2, 0)  # (n_cells, i, j): d z_i / d z1_j
        return torch.linalg.solve(jacobian, (z - zero)[..., None]).squeeze(-1)

    def act(self, basal: Basal, action: Action, globals_: dict[str, Tensor]) -> Tensor:
        """z2 at the mean of p(z2 | z1)."""
        u = basal.z if self.effect_input == "cell" else self._context(basal.context, globals_)
        return basal.z + self.effect(u, action)

    def decode(self, z: Tensor, basal: Basal) -> Tensor:
        """Expression, the cell's own measurement noise replayed."""
        return self.likelihood.predict(self._decoded(z, basal.batch), basal.library, basal.noise)

    def _context(self, context: Tensor, globals_: dict[str, Tensor]) -> Tensor:
        return globals_.get("context_profile", self.context_profile)[context]

    def _decoded(self, z: Tensor, batch: Tensor) -> Tensor:
        return self.decoder(self._with_batch(z, batch))

    def _with_batch(self, values: Tensor, batch: Tensor) -> Tensor:
        if self.n_batch < 2:
            return values
        one_hot = F.one_hot(batch.clamp(max=self.n_batch - 1), self.n_batch).to(values)
        return torch.cat([values, one_hot.expand(*values.shape[:-1], -1)], dim=-1)

    # -- training ---------------------------------------------------------------------------------------------------

    @staticmethod
    def _get_fn_args_from_batch(batch: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        return (Cells.from_tensors(batch), int(batch["n_pairs"])), {}

    @torch.no_grad()
    def control_profiles(self, batches: Iterable[dict[str, Tensor]], n_contexts: int) -> tuple[Tensor, Tensor]:
        """Mean normalised expression of the control cells of each context, and their number.

        Returns
        -------
        ``(n_contexts, n_genes)``, zero where there is no control cell, and ``(n_contexts,)``.
        """
        device = self.input_mean.device
        total = torch.zeros(n_contexts, self.n_genes, device=device)
        number = torch.zeros(n_contexts, device=device)
        for tensors in batches:
            cells = Cells.from_tensors({k: v.to(device) for k, v in tensors.items()})
            control = ~cells.action.present.any(1)
            total.index_add_(0, cells.context[control], self.normalised(cells.x[control]))
            number.index_add_(0, cells.context[control], torch.ones(int(control.sum()), device=device))
        return total / number.clamp(min=1)[:, None], number

    @torch.no_grad()
    def project_profiles(self, profiles: Tensor, number: Tensor) -> Tensor:
        """Components of control profiles, 0 (the average context) where there were no control cells."""
        return ((profiles - self.profile_mean) @ self.profile_basis) * (number > 0)[:, None]


def _rows(action: Action, rows: slice) -> Action:
    return Action(action.codes[rows], action.dose[rows])
