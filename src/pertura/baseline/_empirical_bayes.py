"""What other contexts say of an effect, corrected by what was measured of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pertura.effects import Asked, ConditionTable, fit_departures, stack_shares
from pertura.module._added_effects import Distinct, add_buffers, set_buffer, split_controls
from pertura.module._base import Globals
from pertura.module._perturbx import ContextRegression

from ._linear import Linear, LinearModule

Matrix = NDArray[np.float64]


class EmpiricalBayesModule(LinearModule):
    """Effects transferred from other contexts, and the posterior of what they differ from those measured in their own.

    Parameters
    ----------
    **kwargs
        Of :class:`~pertura.baseline._linear.LinearModule`.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.regression = ContextRegression(self.n_genes, self.n_components)
        empty = {name: torch.zeros(0, self.n_genes) for name in ("residual", "posterior", "posterior_variance")}
        add_buffers(self, **empty)
        # of the convergence, and of what other perturbations of the context differ from their transferred effects
        self.register_buffer("share", torch.zeros(2))

    @torch.no_grad()
    def fit(self, table: ConditionTable) -> None:
        """The regressions, the shares, and what transferred effects differ from measured ones."""
        super().fit(table)
        conditions = self.conditions
        asked = [conditions.ask(*one) for one in zip(conditions.codes, conditions.dose, strict=True)]
        contexts = np.bincount(np.unique(np.stack([conditions.label, conditions.context]), axis=1)[0])
        self.share.copy_(torch.as_tensor(self._shares(asked, table, contexts[conditions.label] > 2)))
        effect, control = (v.double().cpu().numpy() for v in (self.means.effect, self.means.control))
        weights = self._weights(asked, self._gram)
        residual, further = _differences(weights, effect, control, conditions.context)
        residual -= float(self.share[0]) * further
        transferred = contexts[conditions.label] > 1
        residual[~transferred] = 0.0
        set_buffer(self, "residual", residual)
        others = self._of_others(asked, conditions.context)
        left = residual - float(self.share[1]) * (others @ residual)
        mean, variance = fit_departures(table, effect - left, np.flatnonzero(transferred))
        set_buffer(self, "posterior", mean)
        variance[~transferred] = self.means.sums(np.eye(len(conditions))[~transferred])[1].double().cpu().numpy()
        set_buffer(self, "posterior_variance", variance)

    def _shares(self, asked: list[Asked], table: ConditionTable, repeated: NDArray[np.bool_]) -> Matrix:
        """Shares of convergence and of other perturbations, with controls of their own on either side."""
        if not repeated.any():
            return np.zeros(2)
        context = self.conditions.context
        found = []
        for profiles, effects in split_controls(self.means, table):
            found.append(_differences(self._weights(asked, profiles @ profiles.T), effects, profiles, context))
        others = self._of_others(asked, context)
        target = np.concatenate([left[repeated] for left, _ in found])
        further = np.concatenate([more[repeated] for _, more in found])
        alike = np.concatenate([(others @ left)[repeated] for left, _ in found[::-1]])
        return stack_shares(target, [further, alike], np.tile(context[repeated], len(found)))

    def _weights(self, asked: list[Asked], gram: Matrix) -> Matrix:
        """Weights of measured effects in each measured one, its context left out, ``(n_conditions, n_conditions)``."""
        return np.stack(
            [self._from_others(a, int(c), gram[c], gram) for a, c in zip(asked, self.conditions.context, strict=True)]
        )

    def _from_others(self, asked: Asked, context: int, row: Matrix, gram: Matrix) -> Matrix:
        return self.regression.weights(self.means, gram, asked, context, row, float(self.strength))

    def _of_others(self, asked: list[Asked], context: NDArray[np.int64]) -> Matrix:
        """Mean over the other perturbations of the context, one row for each that is asked, ``(n, n_conditions)``."""
        label, own = np.array([a.label for a in asked]), self.conditions
        others = (context[:, None] == own.context) & (label[:, None] != own.label)
        return others / np.maximum(others.sum(1, keepdims=True), 1)

    # -- estimator --------------------------------------------------------------------------------------------------

    def combine(self, asked: Asked, context: int, affinity: Matrix) -> Matrix:
        """Weights of effects in other contexts; those of perturbations that were not measured are as in the linear model."""
        if asked.label < 0:
            return super().combine(asked, context, affinity)
        return np.concatenate([self._from_others(asked, context, affinity, self._gram), np.zeros(len(self.conditions))])

    def effects(self, asked: Distinct, globals_: Globals) -> tuple[Tensor, Tensor]:
        """Transferred effects, and the posterior of what measured ones differ from them."""
        conditions, means = self.conditions, self.means
        weights = self.combined(asked, globals_)
        mean, variance = self.weighted(weights)
        measured = np.array([a.label >= 0 for a in asked.asked])[:, None]
        own = np.stack([conditions.in_context(*one) for one in zip(asked.asked, asked.context, strict=True)])
        convergence, alike = self.share.tolist()
        others = alike * measured * self._of_others(asked.asked, asked.context)
        transferred = weights[:, : len(conditions)] * measured
        mean = mean - convergence * means.distances(transferred, asked.context, globals_["control"])
        mean = mean + means.product(others, self.residual) + means.product(own, self.posterior)
        known = torch.as_tensor(own.any(1), device=variance.device)[:, None]
        return mean, torch.where(known, means.product(own**2, self.posterior_variance), variance)


def _differences(weights: Matrix, effect: Matrix, control: Matrix, context: NDArray[np.int64]) -> tuple[Matrix, Matrix]:
    """What measured effects differ from transferred ones, and what their contexts' controls have less than those of the others."""
    further = weights @ control[context] - weights.sum(1, keepdims=True) * control[context]
    return effect - weights @ effect, further


class EmpiricalBayes(Linear):
    r"""Effects transferred from other contexts, corrected by the cells that were measured in the context itself.

    For a context of which few cells, or few perturbations, were measured. The transferred effect :math:`T_{p,c}` is that of
    :class:`~pertura.baseline.Linear` from the contexts other than c, with two additions, each with a share that is learned by
    predicting training contexts from the others and is 0 where that shows no gain: contexts that start apart come together (see
    `converge` of :class:`~pertura.baseline.MeanEffect`), and the mean over the other perturbations measured in c of what they
    differ from their transferred effects.

    * A perturbation that was measured in c: :math:`T_{p,c} + \mathrm{E}[\delta \mid \Delta_{p,c} - T_{p,c}]`, with
      :math:`\Delta_{p,c}` the measured effect. The posterior mean is that of :func:`pertura.effects.shrink`: how far
      transferred effects are off, by gene and along the programs of the cells, is learned from the contexts that were measured
      well, and the fewer cells in c, the more weight :math:`T_{p,c}` has.
    * One that was measured elsewhere only: :math:`T_{p,c}`.
    * Others are as in :class:`~pertura.baseline.Linear`.

    Parameters
    ----------
    adata, registry, n_components, ridge
        As in :class:`~pertura.baseline.Linear`.
    """

    _module_cls = EmpiricalBayesModule
