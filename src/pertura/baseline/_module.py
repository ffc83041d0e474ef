"""Effects as weighted sums of measured ones: what all baselines share."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pertura.effects import Asked, ConditionTable
from pertura.effects._contexts import effect_correlations, profile_correlations
from pertura.module._added_effects import AddedEffectModule, Distinct
from pertura.module._base import Globals


class BaselineModule(AddedEffectModule):
    """Adds a mean effect, a weighted sum of measured ones, to the expression of a cell.

    A subclass says in :meth:`combine` with which weights.
    """

    # -- estimator --------------------------------------------------------------------------------------------------

    def fit(self, table: ConditionTable) -> None:
        """Take over the means of the training data."""
        self.means.set(table.condition_means())

    def combine(self, asked: Asked, context: int, affinity: NDArray[np.float64]) -> NDArray[np.float64]:
        """Weight of each measured effect in the asked one, ``(n_conditions,)``.

        Parameters
        ----------
        asked
            The perturbation, not the control.
        context
            Code of the context; at least `n_contexts` where training did not have it.
        affinity
            Its row of :meth:`affinity`.
        """
        raise NotImplementedError

    def representable(self, asked: Asked) -> bool:
        """Whether the estimator has a way to predict a perturbation."""
        return True

    def affinity(self, control: Tensor) -> NDArray[np.float64]:
        """How alike contexts are: correlation of control profiles with those of training, ``(n, n_contexts)``.

        Where the controls are 0, correlation of the effects that training contexts share; new contexts are like none.
        """
        if not bool(self.means.control.any()):
            known = effect_correlations(self.conditions, self.means.effect.cpu().numpy())
            return np.pad(known, ((0, len(control) - len(known)), (0, 0)))
        return profile_correlations(control.cpu().numpy(), self.means.control.cpu().numpy())

    def weighted(self, weights: NDArray[np.float64]) -> tuple[Tensor, Tensor]:
        """Effects of given weights and their sampling variances, ``(n, n_genes)``."""
        return self.means.sums(weights)

    def _no_effect(self) -> NDArray[np.float64]:
        """The weights that give no effect."""
        return np.zeros(len(self.conditions))

    # -- effects ----------------------------------------------------------------------------------------------------

    def effects(self, asked: Distinct, globals_: Globals) -> tuple[Tensor, Tensor]:
        """Weighted sums of measured effects."""
        return self.weighted(self.combined(asked, globals_))

    def combined(self, asked: Distinct, globals_: Globals) -> NDArray[np.float64]:
        """:meth:`combine` of distinct perturbations in distinct contexts, one row each."""
        affinity = globals_["affinity"]
        rows = [
            self.combine(a, int(c), affinity[c]) if len(a.codes) else self._no_effect()
            for a, c in zip(asked.asked, asked.context, strict=True)
        ]
        return np.stack(rows)


def features_buffer(features: NDArray[np.float32] | None, n_perturbations: int) -> Tensor:
    """Features of perturbations as a buffer; without columns where there are none."""
    return torch.as_tensor(np.zeros((n_perturbations, 0), dtype=np.float32) if features is None else features)
