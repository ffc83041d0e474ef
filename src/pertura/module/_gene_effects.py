r"""What perturbations do to genes, as measured: a site of a generative model with a posterior in closed form.

The effect of a perturbation on mean expression has the posterior :math:`\Delta_t \sim N(m_t, s_t^2)` that
:class:`~pertura.effects.MeasuredEffect` gives, on the scale on which effects are measured (log1p of counts per 10,000). A
decoder adds to activations: :math:`r_t = c(\Delta_t)`, with c the curve on which expected expression of a control cell moves
by the effect.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pertura.effects import MeasuredEffect

from ._base import Action
from ._departures import Departures, RowNoise, RowNormal

_N_LEVELS, _LOWEST, _TOP = 97, 1e-6, 9.6
_LOW, _HIGH, _N_GRID = -8.0, 8.0, 65
MAX_ROWS = 64


class GeneEffects(nn.Module):
    """Measured effects of perturbations as a site of a model.

    Parameters
    ----------
    n_perturbations, n_genes, n_features
        Sizes.
    combinations
        Codes of the members of registered combinations.
    explained
        Whether latent shifts are to explain the effects; see ``explain_effects``.

    Attributes
    ----------
    measured
        Posterior of the effects.
    departures
        What effects in single contexts differ from them.
    base
        Mean expression of controls, ``(n_genes,)``.
    curve
        Change of the activation by which mean expression becomes each of some levels, ``(n_genes, n_levels)``. Empty
        where expression is linear in the decoder's output.
    """

    def __init__(
        self,
        n_perturbations: int,
        n_genes: int,
        n_features: int = 0,
        combinations: Sequence[Sequence[int]] = (),
        *,
        explained: bool = True,
    ) -> None:
        super().__init__()
        self.n_genes = n_genes
        self.measured = MeasuredEffect(n_perturbations, n_genes, combinations, n_features)
        self.departures = Departures(n_genes)
        self.register_buffer("base", torch.zeros(n_genes))
        self.register_buffer("curve", torch.zeros(n_genes, _N_LEVELS))
        # how far measured effects are from what latent shifts explain
        self.log_tau = nn.Parameter(torch.full((n_genes,), -2.0)) if explained else None
        self.is_counts = True

    def sample_noise(self) -> RowNoise:
        """Site of the noise of effects."""
        return pyro.sample("effect_noise", RowNormal(self.n_genes, not self.training, self.base.device))

    def delta(self, action: Action, strength: Tensor, context: Tensor | None = None) -> Tensor:
        """Mean effects on mean expression, ``(n_cells, n_genes)``.

        Parameters
        ----------
        action
            What is done to each cell.
        strength
            Dose response of each member, ``(n_cells, order)``; that of members outside the vocabulary is their dose.
        context
            Codes of the contexts, ``(n_cells,)``; `None`: those of an average one.
        """
        effect = self._once(self._delta, action, strength, None)
        return effect if context is None else effect + self.departures.change(action, context)

    def forward(
        self, action: Action, strength: Tensor, noise: RowNoise | None = None, context: Tensor | None = None
    ) -> Tensor:
        """What is added to the activation of each gene, ``(..., n_cells, n_genes)``; `noise` as :meth:`sample_noise` gives it."""
        added = self._once(self._activation, action, strength, noise)
        own = None if context is None else self.departures(action, context, noise, len(self.measured.mean) + 2)
        if own is None:
            return added
        # the posterior of a departure is that of the whole effect
        certain = self._once(self._activation, action, strength, None)
        return torch.where(own[1], certain, added) + own[0]

    @staticmethod
    def _once(function: Callable[..., Tensor], action: Action, strength: Tensor, noise: RowNoise | None) -> Tensor:
        """A function of actions, evaluated once for each distinct one."""
        action, strength, which = _distinct(action, strength)
        return function(action, strength, noise).index_select(-2, which)

    def _activation(self, action: Action, strength: Tensor, noise: RowNoise | None) -> Tensor:
        return self.to_activation(self._delta(action, strength, noise))

    def _delta(self, action: Action, strength: Tensor, noise: RowNoise | None) -> Tensor:
        measured = self.measured
        features = action.features if measured.feature_weight.shape[0] else None
        return measured.offset(action.codes, strength, None if noise is None else noise.rows, features)

    def to_activation(self, delta: Tensor) -> Tensor:
        """Change of activations by which mean expression of controls changes by `delta`, ``(..., n_genes)``."""
        if not self.is_counts:
            return delta
        # less the curve at the level of controls: no effect is no change, and a small one is small
        return self._at_level(self.base + delta) - self._at_level(self.base.clone())

    def from_activation(self, change: Tensor) -> Tensor:
        """Change of mean expression of controls where activations change, the inverse of :meth:`to_activation`, ``(n, n_genes)``."""
        if not self.is_counts:
            return change
        levels = self._levels().expand(self.n_genes, -1)
        return _interpolate((change + self._at_level(self.base.clone())).T, self.curve, levels).T - self.base

    def _at_level(self, level: Tensor) -> Tensor:
        """The curve at levels of expression, ``(..., n_genes)``, which are overwritten: new memory takes longer than arithmetic."""
        # the root has no slope at 0
        at = level.clamp_(min=_LOWEST, max=_TOP).div_(_TOP).sqrt_() * (_N_LEVELS - 1)
        low = at.detach().int().clamp_(max=_N_LEVELS - 2)
        at, flat = at.sub_(low), self.curve.flatten()
        index = low.add_(torch.arange(0, len(flat), _N_LEVELS, dtype=low.dtype, device=low.device)).flatten()
        below = flat.index_select(0, index).view_as(at)
        above = flat.index_select(0, index.add_(1)).view_as(at)
        return torch.lerp(below, above, at)

    def _levels(self) -> Tensor:
        """Levels of expression of the curve: the lower, the closer, as activations are logs there."""
        return _TOP * torch.linspace(0.0, 1.0, _N_LEVELS, device=self.base.device).square()

    def of_rows(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Effects of single perturbations on activations, and their sd, ``(n_rows, n_genes)`` each."""
        mean, sd = self.measured.mean[rows], self.measured.sd[rows]
        return self.to_activation(mean), sd.clamp(min=1e-3)

    @torch.no_grad()
    def set_curve(self, base: Tensor, likelihood: nn.Module, activation: Tensor, library: Tensor) -> None:
        """Tabulate by how much activations must change for mean expression to reach a level.

        Parameters
        ----------
        base
            Mean expression of controls as measured, ``(n_genes,)``.
        likelihood
            A likelihood of :mod:`pertura.nn`.
        activation
            Activations of control cells, ``(n_cells, n_genes)``.
        library
            Their library, ``(n_cells, 1)``.
        """
        self.base.copy_(base)
        self.is_counts = likelihood.native_scale == "counts"
        if not self.is_counts:
            return
        steps = torch.linspace(_LOW, _HIGH, _N_GRID, device=base.device)
        moved = [likelihood.moved_by(activation, library, step).expectation("log1p", library).mean(0) for step in steps]
        reached = torch.stack(moved, 1)
        # where the decoder is off the measured mean of controls, change counts and not level
        start = _interpolate(torch.zeros_like(base)[:, None], steps.expand_as(reached), reached)
        levels = self._levels().expand(self.n_genes, -1)
        wanted = levels - base[:, None] + start
        self.curve.copy_(_interpolate(wanted, reached, steps.expand_as(reached)).clamp(_LOW, _HIGH))


def _distinct(action: Action, strength: Tensor) -> tuple[Action, Tensor, Tensor]:
    """The distinct actions of cells, their dose responses, and which of them each cell has: a minibatch has few."""
    if len(action) == 1 or action.features is not None:
        return action, strength, torch.arange(len(action), device=strength.device)
    keys = torch.cat([action.codes.to(strength), strength.detach()], 1)
    if keys.shape[1] == 2 and bool(
        (keys[:, 1] == (keys[:, 0] >= 0)).all()
    ):  # at one dose: numbers sort faster than rows
        _, which = torch.unique(action.codes[:, 0], return_inverse=True)
    else:
        _, which = torch.unique(keys, dim=0, return_inverse=True)
    one = torch.zeros(int(which.max()) + 1, dtype=torch.long, device=which.device)
    one[which] = torch.arange(len(which), device=which.device)
    return action[one], strength[one], which


def explain_effects(module: Any, table: Tensor, plate: pyro.plate | None = None) -> None:
    """Measured effects of perturbations given their latent shifts, some hundred rows at a time.

    Parameters
    ----------
    module
        Has ``gene_effects``, and ``on_genes(shift)``, what a latent shift adds to activations.
    table
        Latent shifts of all perturbations, or of those in a plate, ``(..., n_perturbations, n_latent)``.
    plate
        Those; `None`: some of all.
    """
    site, n_rows = module.gene_effects, table.shape[-2]
    with plate or pyro.plate("measured", n_rows, subsample_size=min(n_rows, MAX_ROWS)) as rows:
        effect, sd = site.of_rows(rows)
        scale = (sd.square() + site.log_tau.exp().square()).sqrt()
        given = dist.Normal(module.on_genes(table if plate else table[..., rows, :]), scale).to_event(1)
        pyro.sample("measured_effect", given.mask(site.measured.measured[rows]), obs=effect)


def _interpolate(x: Tensor, xp: Tensor, fp: Tensor) -> Tensor:
    """Row-wise linear interpolation of increasing `xp` to `fp`, constant beyond the ends."""
    xp = xp.contiguous()
    right = torch.searchsorted(xp, x.contiguous()).clamp(1, xp.shape[1] - 1)
    x0, x1 = xp.gather(1, right - 1), xp.gather(1, right)
    f0, f1 = fp.gather(1, right - 1), fp.gather(1, right)
    share = ((x - x0) / (x1 - x0).clamp(min=1e-9)).clamp(0.0, 1.0)
    return torch.lerp(f0, f1, share)
