"""Baselines whose predictions are averages of measured effects."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pertura.data._constants import UNKNOWN
from pertura.effects import Asked, ConditionTable, fit_convergence, softmax_weights
from pertura.effects._features import cosine, label_features, member_features
from pertura.model.base import Options, option
from pertura.module._added_effects import Distinct, split_controls
from pertura.module._base import Globals

from ._base import Baseline
from ._module import BaselineModule, features_buffer

Weights = NDArray[np.float64]


class NoChangeModule(BaselineModule):
    """Effects are 0."""

    def combine(self, asked: Asked, context: int, affinity: Weights) -> Weights:
        """No measured effect has weight."""
        return self._no_effect()


class MeanEffectModule(BaselineModule):
    """Averages over contexts, or over perturbations."""

    def __init__(self, *, use_own_context: bool = False, converge: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.use_own_context, self.converge = use_own_context, converge
        self.register_buffer("convergence", torch.tensor(0.0))

    def fit(self, table: ConditionTable) -> None:
        """Means, and how far contexts converge."""
        super().fit(table)
        if self.converge:
            self.convergence.fill_(fit_convergence(self.conditions, split_controls(self.means, table)))

    def effects(self, asked: Distinct, globals_: Globals) -> tuple[Tensor, Tensor]:
        """Weighted sums of measured effects, less the convergence."""
        weights = self.combined(asked, globals_)
        mean, variance = self.weighted(weights)
        if self.convergence > 0:
            distances = self.means.distances(weights, asked.context, globals_["control"])
            mean = mean - self.convergence * distances
        return mean, variance

    def combine(self, asked: Asked, context: int, affinity: Weights) -> Weights:
        """The perturbation's own effects where it was measured, else those of all perturbations of its order."""
        if asked.label >= 0:
            mask, own = self.conditions.label == asked.label, self.use_own_context
        else:
            mask, own = self._others(asked), True
        available = self.conditions.curves_per_context(mask) > 0
        return self.conditions.average(asked.at_dose, mask, self._contexts(available, context, affinity, own))

    def _others(self, asked: Asked) -> NDArray[np.bool_]:
        """Conditions that stand for a perturbation that was not measured."""
        same_order = self.conditions.order == len(asked.codes)
        return same_order if same_order.any() else np.ones(len(self.conditions), dtype=bool)

    def _contexts(self, available: NDArray[np.bool_], context: int, affinity: Weights, own: bool) -> Weights:
        if own and context < len(available) and available[context]:
            return (np.arange(len(available)) == context).astype(float)
        weights = np.zeros(len(available))
        weights[available] = self.weigh(affinity[available])
        return weights

    def weigh(self, affinity: Weights) -> Weights:
        """Weights of contexts, by their similarity to the one asked; they sum to 1."""
        return np.full(len(affinity), 1.0 / len(affinity))


class WeightedMeanEffectModule(MeanEffectModule):
    """Similar contexts count for more."""

    def __init__(self, *, temperature: float = 0.1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.temperature = temperature

    def weigh(self, affinity: Weights) -> Weights:
        """Softmax."""
        return softmax_weights(affinity, self.temperature)


class NearestNeighbourModule(MeanEffectModule):
    """The most similar context and perturbation."""

    def __init__(self, *, features: NDArray[np.float32] | None = None, **kwargs: Any) -> None:
        super().__init__(use_own_context=True, **kwargs)
        self.register_buffer("features", features_buffer(features, len(self.means.max_dose)))

    def weigh(self, affinity: Weights) -> Weights:
        """All weight on one; equal parts on equally similar ones."""
        nearest = affinity > affinity.max(initial=-np.inf) - 1e-9
        return nearest / max(nearest.sum(), 1)

    def representable(self, asked: Asked) -> bool:
        """Whether it is measured, described or shares a member with a measured one."""
        return asked.label >= 0 or self._similarity(asked) is not None

    def _others(self, asked: Asked) -> NDArray[np.bool_]:
        similarity = self._similarity(asked)
        return (similarity > similarity.max() - 1e-9)[self.conditions.label]

    def _similarity(self, asked: Asked) -> Weights | None:
        """Cosine with every measured label, `None` where nothing is known of the perturbation."""
        labels = self.conditions.labels
        known = self.features.cpu().numpy().astype(np.float64)
        own = member_features(asked, known)
        if own is not None:
            vectors, described = label_features(labels, known)
            if described.any():
                return np.where(described, cosine(vectors, own.sum(0)), -np.inf)
        # without descriptions, combinations are alike that share members
        codes = asked.codes[asked.codes != UNKNOWN]
        shared = cosine(_indicator(labels, len(known)), _indicator(codes[None], len(known))[0])
        return shared if len(codes) == len(asked.codes) and shared.max() > 0 else None


class AdditiveModule(MeanEffectModule):
    """Effects of the members of a combination add up."""

    def combine(self, asked: Asked, context: int, affinity: Weights) -> Weights:
        """Sum over members; those that were not measured alone have the mean effect of single perturbations."""
        if len(asked.codes) < 2:
            return super().combine(asked, context, affinity)
        single = [self.conditions.ask(asked.codes[i : i + 1], asked.dose[i : i + 1]) for i in range(len(asked.codes))]
        return np.sum([super(AdditiveModule, self).combine(a, context, affinity) for a in single], axis=0)


def _indicator(codes: NDArray[np.int64], n: int) -> NDArray:
    out = np.zeros((len(codes), n + 1))
    np.put_along_axis(out, np.where(codes >= 0, codes, n), 1.0, axis=1)
    return out[:, :n]


@dataclass(frozen=True)
class MeanEffectOptions(Options):
    """Options of :class:`MeanEffect`, which has their documentation."""

    use_own_context: bool = option(False, flag=True)
    converge: bool = option(False, flag=True)


@dataclass(frozen=True)
class WeightedMeanEffectOptions(Options):
    """Options of :class:`WeightedMeanEffect`, which has their documentation."""

    temperature: float = option(0.1, above=0)
    use_own_context: bool = option(False, flag=True)


@dataclass(frozen=True)
class AdditiveOptions(Options):
    """Options of :class:`Additive`, which has their documentation."""

    use_own_context: bool = option(True, flag=True)


class NoChange(Baseline):
    """Perturbations have no effect: the control is the prediction.

    Parameters
    ----------
    adata, registry
        As in :class:`~pertura.baseline.MeanEffect`.
    """

    _module_cls = NoChangeModule


class MeanEffect(Baseline):
    r"""The mean effect over training contexts, or over training perturbations.

    With :math:`\Delta_{p,c}` the measured effect of perturbation p in context c (mean of perturbed minus mean of
    control cells):

    * p was seen in training, in the contexts :math:`C_p`: :math:`\frac{1}{|C_p|} \sum_{c \in C_p} \Delta_{p,c}`, every
      context counting the same, the asked one (if it is among them) like any other.
    * p was not seen, or is a new combination: the unweighted mean over the perturbations measured in the context, of
      those with as many members if there are any; for a context without measured perturbations the mean of this over
      contexts.

    A dose between measured ones is interpolated linearly in log(dose), context by context. Below the lowest the effect
    is in proportion to the dose, above the highest it is constant. In a combination the members' mean log(dose)
    counts. The unit of the doses plays no part.

    Parameters
    ----------
    adata
        Set up by :meth:`setup_anndata`; `None` to make a baseline of a `registry` alone.
    registry
        Registry of a saved baseline.
    use_own_context
        Predict the effect that was measured in the asked context itself, where there is one.
    converge
        Add :math:`b\,(x_c - \bar x)`, with :math:`x_c` the mean control profile of the asked context and :math:`\bar x` that of
        the contexts of the mean effect: with :math:`b < 0` contexts that start apart come together. One b between -1 and 0 holds for
        all genes and perturbations. It is learned by predicting each training context from the others, with different halves of
        the controls in profiles and in effects, and is 0 where that does not predict better than the mean effect alone.

    Examples
    --------
    >>> pertura.baseline.MeanEffect.setup_anndata(
    ...     adata, perturbation_key="condition", control="ctrl", context_key="cell_type", layer="counts"
    ... )
    >>> model = pertura.baseline.MeanEffect(adata)
    >>> model.train()
    >>> model.predict_perturbation("stim", key_added="stim")
    """

    _module_cls = MeanEffectModule
    _options_cls = MeanEffectOptions


class WeightedMeanEffect(Baseline):
    r"""The mean effect, contexts weighted by the similarity of their controls.

    As :class:`~pertura.baseline.MeanEffect`, but training context k has the weight
    :math:`w_k \propto \exp(\rho_k / \tau)`, with :math:`\rho_k` the Pearson correlation over genes between the mean
    control profiles of k and of the asked context, whose controls come from training or, where training had none, from
    the query. A context in which no control is found is taken for the average of the training contexts.

    Parameters
    ----------
    adata, registry, use_own_context
        As in :class:`~pertura.baseline.MeanEffect`.
    temperature
        :math:`\tau`; the smaller, the more the most similar context counts.
    """

    _module_cls = WeightedMeanEffectModule
    _options_cls = WeightedMeanEffectOptions


class NearestNeighbour(Baseline):
    """The effect in the most similar training context, or of the most similar training perturbation.

    * The perturbation was seen: its effect in the asked context if it was measured there, else in the context whose
      mean control profile correlates most with the asked one's.
    * It was not: the effect of the measured perturbation whose registered features have the largest cosine with its
      own; those of a combination are summed over members. Combinations without features are like those with which
      they share members.

    Equally similar contexts or perturbations are averaged. Of data that are effects, which have no control profiles, contexts are as
    similar as the effects of the perturbations that they share.

    Doses are dealt with as in :class:`~pertura.baseline.MeanEffect`.

    Parameters
    ----------
    adata, registry
        As in :class:`~pertura.baseline.MeanEffect`.
    """

    _module_cls = NearestNeighbourModule
    _can_predict_features = True

    def _module_options(self) -> dict[str, Any]:
        return {"features": self._features()}


class Additive(Baseline):
    """The effect of a combination is the sum of its members' effects.

    The sum is predicted for every combination, also a measured one. A member that was not measured alone has the mean
    effect of the single perturbations. Single perturbations, contexts and doses (of each member) are dealt with as in
    :class:`~pertura.baseline.MeanEffect`.

    Parameters
    ----------
    adata, registry
        As in :class:`~pertura.baseline.MeanEffect`.
    use_own_context
        Add up effects measured in the asked context itself, where there are some; else means over contexts.
    """

    _module_cls = AdditiveModule
    _options_cls = AdditiveOptions
