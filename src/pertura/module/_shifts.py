r"""Latent shifts of perturbations, E o M, with prior and posterior: what SAMS-VAE and its relatives share.

.. math::

    E_{tj} \sim N(0, \sigma_j^2), \quad M_{tj} \sim \mathrm{Bernoulli}(\alpha), \quad
    z^p_i = \sum_t s_t(d_{it})\,(E_t \circ M_t)
"""

from __future__ import annotations

from typing import Any, Literal

import pyro
import pyro.distributions as dist
import torch
from statsmodels.multivariate.factor_rotation import rotate_factors
from torch import Tensor, nn

from pertura.data._constants import UNKNOWN
from pertura.nn._masks import StraightThroughBernoulli
from pertura.nn._mlp import ResidualMLP

from ._base import Action
from ._latent import log_dose_response

Rows = Tensor | slice
_MAX_ROTATED = 1000  # shifts, the largest, that say where to
_ROTATE_AT, _THRESHOLD, _LOGIT = 1 / 3, 0.4, 2.0


class SparseShifts(nn.Module):
    r"""Masked shifts of perturbations (Bereket & Karaletsos 2023).

    Parameters
    ----------
    n_rows
        Number of perturbations.
    n_latent
        Dimension of a shift.
    masked
        Whether there is a mask M; without it this is CPA-VAE.
    guide
        ``"mean_field"``: q(E) is normal; ``"correlated"``: a neural network gives its moments from the mask.
    mask_prior
        :math:`\alpha`: a number, or log-odds of each entry with ``logits=True``.
    prior_sd
        :math:`\sigma`; `None` learns one for each dimension.
    interactions
        Whether pairs of perturbations in one cell also shift it, by :math:`U_s \circ U_t`.
    n_features
        Number of features of a perturbation, which shift the prior mean of E; 0 for none.
    n_hidden
        Width of the network of a correlated guide.
    """

    def __init__(
        self,
        n_rows: int,
        n_latent: int,
        *,
        masked: bool = True,
        guide: Literal["mean_field", "correlated"] = "mean_field",
        mask_prior: float = 0.1,
        prior_sd: float | None = None,
        interactions: bool = False,
        n_features: int = 0,
        n_hidden: int = 128,
    ) -> None:
        super().__init__()
        self.n_rows, self.n_latent = n_rows, n_latent
        self.masked, self.correlated = masked, guide == "correlated"
        self.log_kappa = nn.Parameter(torch.zeros(n_rows))
        if self.correlated:
            self.network = ResidualMLP([n_latent, n_rows], n_hidden, 2)
            self.head = nn.Linear(n_hidden, 2 * n_latent)
        else:
            self.loc = nn.Parameter(torch.zeros(n_rows, n_latent))
            self.log_sd = nn.Parameter(torch.full((n_rows, n_latent), -1.0))
        self.log_prior_sd = nn.Parameter(torch.full((n_latent,), prior_sd or 1.0).log(), requires_grad=prior_sd is None)
        self.mask_logits = nn.Parameter(torch.zeros(n_rows, n_latent)) if masked else None
        self.register_buffer("prior_logits", torch.logit(torch.full((n_rows, n_latent), mask_prior)))
        self.interaction = nn.Parameter(0.05 * torch.randn(n_rows, n_latent)) if interactions else None
        self.register_buffer("features", torch.zeros(n_rows, n_features))
        self.from_features = nn.Linear(n_features, n_latent, bias=False) if n_features else None
        if self.from_features is not None:
            nn.init.zeros_(self.from_features.weight)

    # -- generative model and guide ---------------------------------------------------------------------------------

    def plate(self, at_most: int | None = None) -> pyro.plate:
        """All perturbations, or a random few of more that count for all: no sum over them grows with their number."""
        return pyro.plate("perturbations", self.n_rows, subsample_size=min(self.n_rows, at_most or self.n_rows))

    def prior(self, plate: pyro.plate | None = None) -> Tensor:
        """Sample M and E of all perturbations, or those of a plate, from their prior; E o M, ``(..., n_rows, n_latent)``."""
        if self.interaction is not None:
            pyro.factor("interaction_prior", -0.5 * self.interaction.square().sum() / 0.3**2)
        with plate or self.plate() as rows:
            rows, mask = self._some(rows), 1.0
            if self.masked:
                mask = pyro.sample("mask", dist.Bernoulli(logits=self.prior_logits[rows]).to_event(1))
            return mask * pyro.sample("effect", dist.Normal(self.prior_mean(rows), self.log_prior_sd.exp()).to_event(1))

    def guide(self, plate: pyro.plate | None = None) -> Tensor:
        """Sample M from q(M) and E from q(E | M)."""
        with plate or self.plate() as rows:
            rows, mask = self._some(rows), 1.0
            if self.masked:
                mask = pyro.sample("mask", self.mask_posterior(rows).to_event(1))
            return mask * pyro.sample("effect", self.effect_posterior(mask, rows).to_event(1))

    def _some(self, rows: Tensor) -> Rows:
        return slice(None) if len(rows) == self.n_rows else rows

    def mask_posterior(self, rows: Rows = slice(None)) -> StraightThroughBernoulli:
        """q(M)."""
        return StraightThroughBernoulli(self.mask_logits.new_tensor(1.0), logits=self.mask_logits[rows])

    def prior_mean(self, rows: Rows = slice(None)) -> Tensor:
        """Prior mean of E: 0, or what features say."""
        if self.from_features is None:
            return torch.zeros_like(self.prior_logits[rows])
        return self.from_features(self.features[rows])

    def effect_posterior(self, mask: Tensor | float, rows: Rows = slice(None)) -> dist.Normal:
        """q(E | M)."""
        if not self.correlated:
            return dist.Normal(self.loc[rows] + self.prior_mean(rows), self.log_sd[rows].exp() + 1e-4)
        mask = mask if torch.is_tensor(mask) else torch.ones_like(self.prior_logits[rows])
        one_hot = torch.eye(self.n_rows, device=mask.device)[rows]
        loc, log_variance = self.head(self.network(mask, one_hot)).chunk(2, dim=-1)
        return dist.Normal(loc + self.prior_mean(rows), (log_variance.exp() + 1e-4).sqrt())

    def proba(self) -> Tensor:
        """Posterior probability that the mask is on, ``(n_rows, n_latent)``."""
        return torch.ones_like(self.prior_logits) if self.mask_logits is None else self.mask_logits.sigmoid()

    def mean(self, n_draws: int = 200) -> Tensor:
        """Posterior mean of E o M, ``(n_rows, n_latent)``."""
        if not self.correlated:
            return self.proba() * self.effect_posterior(1.0).loc
        mask = torch.bernoulli(self.proba().expand(n_draws, -1, -1))
        return (mask * self.effect_posterior(mask).loc).mean(0)

    # -- what is done to cells --------------------------------------------------------------------------------------

    def forward(self, table: Tensor, action: Action) -> Tensor:
        """Sum over members of s(dose) (E o M), ``(..., n_cells, n_latent)``.

        Parameters
        ----------
        table
            E o M, ``(..., n_rows, n_latent)``.
        action
            What is done to each cell.
        """
        code = action.codes.clamp(min=0)
        strength = self.strength(action)
        total = (strength[..., None] * table[..., code, :]).sum(-2)
        if self.interaction is not None and code.shape[1] > 1:
            # sum over pairs of U_s o U_t: half of the squared sum less the sum of squares
            each = strength[..., None] * self.interaction[code]
            total = total + 0.5 * (each.sum(-2).square() - each.square().sum(-2))
        if action.features is not None and self.from_features is not None:
            unknown = (action.codes == UNKNOWN) * action.dose
            described = self.from_features(action.features) * self.proba().mean(0)
            total = total + (unknown[..., None] * described).sum(-2)
        return total

    def strength(self, action: Action) -> Tensor:
        """Dose response of each member, 0 for those outside the vocabulary, ``(n_cells, order)``."""
        known = action.codes >= 0
        return log_dose_response(self.log_kappa[action.codes.clamp(min=0)], action.dose) * known

    # -- rotation ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def rotate(self, r: Tensor) -> None:
        """Express shifts in rotated coordinates, and start masks at the entries that are large there.

        Parameters
        ----------
        r
            Orthogonal, ``(n_latent, n_latent)``.
        """
        prior = self.prior_mean()
        shifts = self.proba() * (self.loc + prior) @ r
        if self.from_features is not None:
            self.from_features.weight.copy_(r.T @ self.from_features.weight)
        self.loc.copy_(shifts - prior @ r)
        self.log_sd.copy_(0.5 * torch.log((2 * self.log_sd).exp() @ r.square()))
        if self.log_prior_sd.requires_grad:
            self.log_prior_sd.copy_(0.5 * torch.log((2 * self.log_prior_sd).exp() @ r.square()))
        large = shifts.abs() / (_THRESHOLD * shifts.abs().amax(1, keepdim=True)).clamp(min=1e-8)
        self.mask_logits.copy_((2 * _LOGIT * (large - 1.0)).clamp(-_LOGIT, _LOGIT))


class RotateOnce(nn.Module):
    """Says when, in the first training, shifts are to be rotated to where they are sparse, and by what.

    Training does not find the rotation under which few entries of the shifts are needed, because each mask alone gains next to
    nothing. So the shifts are rotated once, a third of the training being done, and training goes on from there.

    Parameters
    ----------
    shifts
        Masked shifts with a mean-field guide and without interactions; others are not rotated.
    wanted
        Whether to rotate at all.
    """

    def __init__(self, shifts: SparseShifts, wanted: bool) -> None:
        super().__init__()
        self._shifts = (shifts,)  # not a submodule: its parameters belong to the model
        self.wanted = wanted and shifts.masked and not shifts.correlated and shifts.interaction is None
        self.register_buffer("done", torch.zeros(()))

    @torch.no_grad()
    def due(self, progress: float) -> Tensor | None:
        """Orthogonal rotation after which few entries of the shifts are large (quartimax), where now is the time."""
        if not self.wanted or progress < _ROTATE_AT or bool(self.done):
            return None
        self.done.fill_(1.0)
        shifts = self._shifts[0]
        found = shifts.proba() * (shifts.loc + shifts.prior_mean())
        if len(found) > _MAX_ROTATED:
            found = found[torch.linalg.vector_norm(found, dim=1).topk(_MAX_ROTATED).indices]
        _, r = rotate_factors(found.cpu().double().numpy(), "quartimax")
        return torch.as_tensor(r).to(found)

    @staticmethod
    @torch.no_grad()
    def turn(layer: nn.Linear, columns: slice, r: Tensor) -> None:
        """Let a layer read some of its inputs in rotated coordinates."""
        layer.weight[:, columns] = layer.weight[:, columns] @ r


def share_of_data(module: Any, n_cells: int, kl_weight: float) -> Any:
    """Weight of global terms in a minibatch: they count once per pass over the data."""
    return pyro.poutine.scale(scale=kl_weight * n_cells / max(module.n_train, n_cells))
