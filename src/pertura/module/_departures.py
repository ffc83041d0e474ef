r"""What effects in single contexts differ from those that a model predicts there without them.

With :math:`T_{p,c}` the effect of a perturbation in a context as the model predicts it from other contexts, and
:math:`\Delta_{p,c}` the measured one, the effect is :math:`T_{p,c} + \delta_{p,c}` with the posterior of :math:`\delta` that
:func:`~pertura.effects.fit_departures` gives: near 0 where cells are few, near :math:`\Delta - T` where they are many. A decoder
adds to activations what moves the mean expression of the context's controls so far.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyro
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor

from pertura.effects import Asked

from ._added_effects import KnownConditions, set_buffer
from ._base import Action

_MAX_NOISE = 64


class RowNoise:
    """Standard normal noise of rows of a table, made when it is needed.

    Parameters
    ----------
    n_genes
        Width of a row.
    seed
        Rows then have the same noise each time; `None`: new noise each time (training).
    n_draws
        Draws of each row.
    device
        Where.
    """

    def __init__(self, n_genes: int, seed: int | None, n_draws: int, device: torch.device) -> None:
        self.n_genes, self.seed, self.n_draws, self.device = n_genes, seed, n_draws, device

    def rows(self, index: Tensor) -> Tensor:
        """Noise of some rows, ``(n_draws, n_rows, n_genes)``; without a seed ``(n_rows, n_genes)``."""
        if self.seed is None:
            few = torch.randn(min(len(index), _MAX_NOISE), self.n_genes, device=self.device)
            # drawing noise takes longer than all else that is done to a row; that of one step may be alike for some rows
            if len(few) == len(index):
                return few
            return few.index_select(0, torch.arange(len(index), device=self.device) % _MAX_NOISE)
        # equally spaced quantiles in random order: means over draws have hardly a Monte Carlo error
        deviate = torch.special.ndtri((torch.arange(self.n_draws, dtype=torch.float64) + 0.5) / self.n_draws)
        deviate = (deviate / deviate.square().mean().sqrt().clamp(min=1e-9)).float()
        drawn = torch.empty(self.n_draws, len(index), self.n_genes)
        for at, row in enumerate(index.tolist()):
            generator = torch.Generator().manual_seed((self.seed * 1_000_003 + row) % (2**63))
            order = torch.rand(self.n_draws, self.n_genes, generator=generator).argsort(0)
            drawn[:, at] = deviate[order] if self.n_draws > 1 else torch.randn(1, self.n_genes, generator=generator)
        return drawn.to(self.device)


class RowNormal(TorchDistribution):
    """Distribution of :class:`RowNoise`: prior and posterior are the same, so that its divergence is 0.

    Parameters
    ----------
    n_genes
        Width of a row.
    fixed
        Whether rows have the same noise each time they are used.
    device
        Where.
    """

    arg_constraints: dict[str, Any] = {}
    has_rsample = True

    def __init__(self, n_genes: int, fixed: bool, device: torch.device, batch_shape: Sequence[int] = ()) -> None:
        self.n_genes, self.fixed, self.device = n_genes, fixed, device
        super().__init__(torch.Size(batch_shape), torch.Size(), validate_args=False)

    def expand(self, batch_shape: Sequence[int], _instance: None = None) -> RowNormal:
        """The same over a larger batch."""
        return RowNormal(self.n_genes, self.fixed, self.device, batch_shape)

    def rsample(self, sample_shape: Sequence[int] = ()) -> RowNoise:
        """Noise with a new seed."""
        n_draws = self.batch_shape[0] if self.batch_shape else 1
        seed = int(torch.randint(2**40, ()).item()) if self.fixed else None
        return RowNoise(self.n_genes, seed, n_draws, self.device)

    def log_prob(self, value: RowNoise) -> Tensor:
        """0: it cancels."""
        return torch.zeros(self.batch_shape, device=self.device)


class Departures(KnownConditions):
    """Departures of the measured conditions, as a site of a model; without conditions there are none.

    Parameters
    ----------
    n_genes
        Number of genes.

    Attributes
    ----------
    delta
        What effects differ from those of the model without this site, ``(n_conditions, n_genes)``.
    mean, low, high
        What is added to activations at the posterior mean, and one sd below and above it, ``(n_conditions, n_genes)``.
    """

    def __init__(self, n_genes: int) -> None:
        super().__init__(**{name: torch.zeros(0, n_genes) for name in ("delta", "mean", "low", "high")})

    @torch.no_grad()
    def set(self, **values: Any) -> None:
        """Take over some buffers."""
        for name, value in values.items():
            set_buffer(self, name, value)

    def clear(self) -> None:
        """Forget all conditions."""
        self.set(
            **{name: getattr(self, name)[:0] for name in ("codes", "dose", "context", "delta", "mean", "low", "high")}
        )

    def sample_noise(self) -> RowNoise | None:
        """Site of the noise of departures; `None` without any."""
        if not len(self):
            return None
        return pyro.sample("departure_noise", RowNormal(self.mean.shape[1], True, self.mean.device))

    def known(self, action: Action, context: Tensor) -> tuple[Tensor, Tensor] | None:
        """Weights of the conditions in distinct perturbations and contexts, and the row of each cell; `None` where all are 0.

        A combination that was not measured in a context departs as its members do.
        """
        if not len(self) or not bool(action.present.any()):
            return None
        if len(action) != len(context):
            action = action.expand(len(context))
        asked, conditions = self.distinct(action, context), self.conditions
        weights = np.zeros((len(asked.asked), len(self)))
        for row, (whole, c) in enumerate(zip(asked.asked, asked.context, strict=True)):
            weights[row] = conditions.in_context(whole, int(c))
            if not weights[row].any() and len(whole.codes) > 1:
                weights[row] = sum(conditions.in_context(one, int(c)) for one in self._members(whole))
        if not weights.any():
            return None
        return torch.as_tensor(weights, dtype=self.mean.dtype, device=self.mean.device), asked.which

    def _members(self, asked: Asked) -> list[Asked]:
        return [self.conditions.ask(asked.codes[i : i + 1], asked.dose[i : i + 1]) for i in range(len(asked.codes))]

    def forward(
        self, action: Action, context: Tensor, noise: RowNoise | None = None, first: int = 0
    ) -> tuple[Tensor, Tensor] | None:
        """What is added to activations, ``(..., n_cells, n_genes)``, and which cells have it, ``(n_cells, 1)``.

        Parameters
        ----------
        action, context
            Of the cells.
        noise
            `None`: the posterior mean.
        first
            Number of the first row of the noise.
        """
        found = self.known(action, context)
        if found is None:
            return None
        weights, which = found
        used = torch.where((weights != 0).any(0))[0]
        rows = self.mean[used]
        if noise is not None:
            deviate = noise.rows(used + first)
            rows = rows + deviate.abs() * (torch.where(deviate > 0, self.high[used], self.low[used]) - rows)
        added, has = weights[:, used] @ rows, (weights != 0).any(1, keepdim=True)
        if len(weights) > 1:
            return added[..., which, :], has[which]
        return added, has

    def change(self, action: Action, context: Tensor) -> Tensor | float:
        """What mean expression differs by, ``(n_cells, n_genes)``, or 0."""
        found = self.known(action, context)
        return 0.0 if found is None else (found[0] @ self.delta)[found[1]]
