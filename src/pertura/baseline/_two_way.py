"""Baselines on the table of perturbations x contexts, some of whose conditions were measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pertura.effects import Asked
from pertura.model.base import Options, option

from ._base import Baseline
from ._module import BaselineModule

Weights = NDArray[np.float64]


class ContextMeanModule(BaselineModule):
    """The mean over the other perturbations of a context."""

    def combine(self, asked: Asked, context: int, affinity: Weights) -> Weights:
        """Each perturbation measured in the context counts the same; without any, the mean effect over contexts."""
        mask = (self.conditions.context == context) & (self.conditions.label != asked.label)
        return self._mean(mask) if mask.any() else self._elsewhere(asked, context)

    def _mean(self, mask: NDArray[np.bool_]) -> Weights:
        """Unweighted mean over labels, and over the conditions of a label."""
        label = self.conditions.label
        weights = mask / np.maximum(np.bincount(label, mask, len(self.conditions.labels)), 1)[label]
        return weights / weights.sum()

    def _elsewhere(self, asked: Asked, context: int) -> Weights:
        """The mean effect over other contexts; of a perturbation that was not measured there, over all perturbations."""
        mask = (self.conditions.label == asked.label) & (self.conditions.context != context)
        if not mask.any():
            return np.zeros(len(self.conditions))
        available = self.conditions.curves_per_context(mask) > 0
        return self.conditions.average(asked.at_dose, mask, available / available.sum())


class TwoWayAdditiveModule(ContextMeanModule):
    """Effect of the perturbation elsewhere, and what the others differ from theirs."""

    def combine(self, asked: Asked, context: int, affinity: Weights) -> Weights:
        """Additive in perturbation and context."""
        elsewhere = self._elsewhere(asked, context)
        if not elsewhere.any():
            return super().combine(asked, context, affinity)
        return elsewhere + self._offset(asked, context)

    def _offset(self, asked: Asked, context: int) -> Weights:
        """Mean over the other known perturbations of the context of what they differ from their effects elsewhere."""
        own, cache = self.conditions, self.means.cache
        if ("offset", context) not in cache:
            rows = np.flatnonzero(own.context == context)
            others = [self._elsewhere(own.ask(own.codes[i], own.dose[i]), context) for i in rows]
            found = [(np.arange(len(own)) == i) - x for i, x in zip(rows, others, strict=True) if x.any()]
            labels = [own.label[i] for i, x in zip(rows, others, strict=True) if x.any()]
            cache["offset", context] = np.array(labels), np.reshape(found, (-1, len(own)))
        labels, differences = cache["offset", context]
        kept = differences[labels != asked.label]
        return kept.mean(0) if len(kept) else np.zeros(len(own))


class LowRankCompletionModule(TwoWayAdditiveModule):
    """Few components of perturbations complete the table."""

    def __init__(self, *, n_components: int = 10, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.n_components = n_components

    def combine(self, asked: Asked, context: int, affinity: Weights) -> Weights:
        """What the table is completed by; at another dose than those elsewhere, in proportion to the effects there."""
        if asked.label < 0 or context >= self.n_contexts:
            return super().combine(asked, context, affinity)
        completed = self._completed()
        return completed[context, asked.label]

    def _completed(self, n_steps: int = 30) -> NDArray[np.float64]:
        """Weights of measured effects in each cell of the table, ``(n_contexts, n_labels, n_conditions)``."""
        own, cache = self.conditions, self.means.cache
        if "completed" in cache:
            return cache["completed"]
        effect = self.means.effect.double().cpu().numpy()
        products, n_labels = effect @ effect.T, len(own.labels)
        table = np.zeros((self.n_contexts, n_labels, len(own)))
        table[own.context, own.label, np.arange(len(own))] = 1.0
        number = table.sum(-1, keepdims=True)
        table /= np.maximum(number, 1)
        missing = number[..., 0] == 0
        for context, label in zip(*np.nonzero(missing), strict=True):
            one = own.ask(own.labels[label], own.dose[np.flatnonzero(own.label == label)[0]])
            table[context, label] = super().combine(one, int(context), np.zeros(0))
        for _ in range(n_steps if missing.any() else 0):
            gram = sum(part @ products @ part.T for part in table)
            axes = np.linalg.eigh(gram)[1][:, -self.n_components :]
            for part, gaps in zip(table, missing, strict=True):
                part[gaps] = axes[gaps] @ (axes.T @ part)
        cache["completed"] = table
        return table


class ContextMean(Baseline):
    """The mean effect over the other perturbations that were measured in the context.

    Every perturbation counts the same. In a context without measured perturbations the effect is the mean over the contexts where
    the perturbation was measured.

    Parameters
    ----------
    adata, registry
        As in :class:`~pertura.baseline.MeanEffect`.
    """

    _module_cls = ContextMeanModule


class TwoWayAdditive(Baseline):
    r"""Additive in perturbation and context.

    For perturbation p in context c: :math:`\bar\Delta_p + \frac{1}{|Q_c|} \sum_{q \in Q_c} (\Delta_{qc} - \bar\Delta_q)`, with
    :math:`\bar\Delta` the mean effect over the other contexts and :math:`Q_c` the other perturbations that were measured in c and
    elsewhere. A perturbation that was measured nowhere else has the mean effect of the context. Doses are dealt with as in
    :class:`~pertura.baseline.MeanEffect`.

    Parameters
    ----------
    adata, registry
        As in :class:`~pertura.baseline.MeanEffect`.
    """

    _module_cls = TwoWayAdditiveModule


@dataclass(frozen=True)
class LowRankCompletionOptions(Options):
    """Options of :class:`LowRankCompletion`, which has their documentation."""

    n_components: int = option(10, whole=1)


class LowRankCompletion(Baseline):
    """A table of perturbations x (contexts and genes), completed by its first singular vectors.

    What is missing starts from :class:`TwoWayAdditive` and is replaced, 30 times, by the projection on the first left singular
    vectors. Doses of a perturbation are averaged.

    Parameters
    ----------
    adata, registry
        As in :class:`~pertura.baseline.MeanEffect`.
    n_components
        Number of singular vectors.
    """

    _module_cls = LowRankCompletionModule
    _options_cls = LowRankCompletionOptions
