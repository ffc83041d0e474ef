"""Effects in contexts and at doses in between: weights of the measured conditions.

An effect that was not measured is a weighted sum of measured ones. :class:`Conditions` gives the weights of doses; the functions
give those of contexts, by how alike the control profiles are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, product

import numpy as np
from numpy.typing import NDArray

from pertura.data._constants import CONTROL_ONLY, DOSE_TOLERANCE, UNKNOWN

from ._stacking import stack_shares

# of the ridge between contexts, in units of the mean variance of a component; without end is the mean over contexts
_STRENGTHS = (1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0, np.inf)
_MAX_GROUPS = 50  # perturbations from which strength and convergence are learned


@dataclass(frozen=True)
class Asked:
    """A perturbation whose effect is wanted.

    Attributes
    ----------
    codes, dose
        Members that are present, ascending by code, and their doses in the registered unit, ``(n_members,)``.
    features
        Their descriptions, ``(n_members, n_features)``, or `None`.
    label
        Which of the measured labels it is; -1 for none.
    at_dose
        Weight of each measured condition in its own label's effect at the asked dose, ``(n_conditions,)``.
    """

    codes: NDArray[np.int64]
    dose: NDArray[np.float64]
    features: NDArray[np.float32] | None
    label: int
    at_dose: NDArray[np.float64]


class Conditions:
    """Measured conditions, one per (label, doses, context), grouped into dose curves, one per (label, context).

    Parameters
    ----------
    codes, dose, context
        As in :class:`~pertura.effects.ConditionMeans`.
    n_contexts
        Number of contexts.
    """

    def __init__(
        self,
        codes: NDArray[np.int64],
        dose: NDArray[np.float64],
        context: NDArray[np.int64],
        n_contexts: int,
    ) -> None:
        self.codes, self.dose, self.context, self.n_contexts = codes, dose, context, n_contexts
        self.labels, label = np.unique(codes, axis=0, return_inverse=True)
        self.label = label.ravel()
        self.order = (codes != CONTROL_ONLY).sum(axis=1)
        self._known = frozenset(self.labels.ravel().tolist()) - {CONTROL_ONLY}
        self._lookup = {tuple(c[c != CONTROL_ONLY].tolist()): i for i, c in enumerate(self.labels)}
        curves, curve = np.unique(np.stack([self.label, context], axis=1), axis=0, return_inverse=True)
        self.curve = curve.ravel()
        self.curve_context = curves[:, 1]
        # conditions of a combination may differ in their doses, but not in the mean of their log doses; rounded, as these are
        # the same in any unit but for the last digits
        strength = self.strength(codes, dose).round(9)
        levels, level = np.unique(np.stack([self.curve, strength], axis=1), axis=0, return_inverse=True)
        self._level = level.ravel()
        self._ties = np.bincount(self._level)[self._level]
        self._level_strength = levels[:, 1]
        self._lowest = self._level_strength.min(initial=np.inf)
        self._span = self._level_strength.max(initial=-np.inf) - self._lowest + 1.0
        self._level_key = levels[:, 0] * self._span + levels[:, 1] - self._lowest
        self._first = np.searchsorted(levels[:, 0], np.arange(len(curves)))
        self._count = np.bincount(levels[:, 0].astype(np.int64), minlength=len(curves))

    def __len__(self) -> int:
        return len(self.context)

    @staticmethod
    def strength(codes: NDArray[np.int64], dose: NDArray[np.float64]) -> NDArray[np.float64]:
        """Mean over the members of log(dose)."""
        n = (codes != CONTROL_ONLY).sum(axis=-1)
        return np.log(np.where(dose > 0, dose, 1.0)).sum(axis=-1) / np.maximum(n, 1)

    def find(self, codes: NDArray[np.int64]) -> int:
        """Number of the label with these members; -1 if it was not measured."""
        return self._lookup.get(tuple(codes.tolist()), -1)

    def has_member(self, code: int) -> bool:
        """Whether a perturbation was measured, alone or in combination."""
        return code in self._known

    def ask(self, codes: NDArray, dose: NDArray, features: NDArray | None = None) -> Asked:
        """Look up one perturbation, given by codes and doses of its members (-1 and dose 0 are left out)."""
        kept = np.flatnonzero((codes != CONTROL_ONLY) & (dose > 0))
        # as the measured ones are sorted; those outside the vocabulary come last
        kept = kept[np.argsort(np.where(codes[kept] == UNKNOWN, codes.max() + 1, codes[kept]), kind="stable")]
        codes, dose = codes[kept].astype(np.int64), dose[kept].astype(np.float64)
        label = self.find(codes)
        weights = self.interpolate(float(self.strength(codes, dose)))
        if label >= 0 and len(codes) > 1:
            weights = self._prefer_exact(weights, label, dose)
        return Asked(codes, dose, None if features is None else features[kept], label, weights)

    def interpolate(self, strength: float) -> NDArray[np.float64]:
        """Weight of each condition in the effect of its curve at a dose, ``(n_conditions,)``.

        Linear in log(dose) between the doses that were measured, linear in the dose between 0, where there is no effect, and the
        lowest, constant above the highest: nothing depends on the unit.

        Parameters
        ----------
        strength
            Mean over the members of log(dose).
        """
        curve = np.arange(len(self._first))
        key = curve * self._span + np.clip(strength - self._lowest, -0.5, self._span - 0.5)
        above = np.searchsorted(self._level_key, key, side="right")
        below = above - 1
        has_below, has_above = above > self._first, above < self._first + self._count
        low = np.where(has_below, self._level_strength[below], -np.inf)
        high = np.where(has_above, self._level_strength[np.minimum(above, len(self._level_key) - 1)], np.inf)
        share = np.exp(np.minimum(strength - high, 0.0))
        inside = np.isfinite(low)
        share[inside] = (strength - low[inside]) / (high - low)[inside]  # 0 above the highest dose
        weights = np.zeros(len(self._level_key))
        weights[below[has_below]] += (1.0 - share)[has_below]
        weights[above[has_above]] += share[has_above]
        return weights[self._level] / self._ties

    def _prefer_exact(self, weights: NDArray[np.float64], label: int, dose: NDArray[np.float64]) -> NDArray[np.float64]:
        """The condition with exactly these doses of the members, where a context has it."""
        exact = (self.label == label) & np.isclose(self.dose[:, : len(dose)], dose, rtol=DOSE_TOLERANCE, atol=0.0).all(
            axis=1
        )
        replaced = np.isin(self.curve, self.curve[exact])
        return np.where(replaced, exact, weights)

    def in_context(self, asked: Asked, context: int) -> NDArray[np.float64]:
        """Weights of what was measured of a perturbation in one context, at the asked dose, ``(n_conditions,)``; 0 where nothing was."""
        return asked.at_dose * ((self.label == asked.label) & (self.context == context)) * (asked.label >= 0)

    def curves_per_context(self, mask: NDArray[np.bool_]) -> NDArray[np.int64]:
        """Number of labels that some conditions have in each context, ``(n_contexts,)``."""
        return np.bincount(self.curve_context[np.unique(self.curve[mask])], minlength=self.n_contexts)

    def average(
        self, weights: NDArray[np.float64], mask: NDArray[np.bool_], by_context: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """Unweighted mean over the labels of a context, weighted over contexts, ``(n_conditions,)``."""
        number = np.maximum(self.curves_per_context(mask), 1)
        return weights * mask * (by_context / number)[self.context]


# -- weights of contexts ------------------------------------------------------------------------------------------------


def profile_correlations(profiles: NDArray, others: NDArray) -> NDArray[np.float64]:
    """Pearson correlation over genes of each profile with each of the others, ``(n, n_others)``; 0 if one is constant."""
    return _normalized(profiles) @ _normalized(others).T


def effect_correlations(conditions: Conditions, effect: NDArray) -> NDArray[np.float64]:
    """Correlation of two contexts' effects, over the perturbations and doses that both have, ``(n_contexts, n_contexts)``.

    Parameters
    ----------
    conditions
        What was measured.
    effect
        Effects, ``(n_conditions, n_genes)``.
    """
    n_contexts, keys = conditions.n_contexts, np.concatenate([conditions.codes, conditions.dose], axis=1)
    key = np.unique(keys, axis=0, return_inverse=True)[1].ravel()
    row = np.full((n_contexts, key.max(initial=-1) + 1), -1)
    row[conditions.context, key] = np.arange(len(key))
    result, products = np.eye(n_contexts), effect @ effect.T
    for a, b in combinations(range(n_contexts), 2):
        i, j = row[[a, b]][:, (row[[a, b]] >= 0).all(0)]
        scale = np.sqrt(products[i, i].sum() * products[j, j].sum())
        result[a, b] = result[b, a] = products[i, j].sum() / max(scale, 1e-12)
    return result


def _normalized(profiles: NDArray) -> NDArray[np.float64]:
    centered = np.asarray(profiles, dtype=np.float64)
    centered = centered - centered.mean(1, keepdims=True)
    return centered / np.maximum(np.linalg.norm(centered, axis=1, keepdims=True), 1e-12)


def softmax_weights(affinity: NDArray[np.float64], temperature: float) -> NDArray[np.float64]:
    """Weights of contexts in proportion to exp(affinity / temperature), which sum to 1."""
    weights = np.exp((affinity - affinity.max()) / temperature)
    return weights / weights.sum()


def ridge_weights(
    gram: NDArray[np.float64], row: NDArray[np.float64], strength: float, n_components: int
) -> NDArray[np.float64]:
    """Weights of contexts in a ridge regression of effects on principal components of the control profiles.

    Parameters
    ----------
    gram
        Inner products of the control profiles of the contexts that are known, ``(n, n)``.
    row
        Those of the asked context with them, ``(n,)``.
    strength
        Penalty, in units of the mean variance of a component; infinite: the mean over contexts.
    n_components
        Number of components.
    """
    n = len(gram)
    weights = np.full(n, 1.0 / n)
    if n < 2 or not np.isfinite(strength):
        return weights
    row = row - row.mean() - gram.mean(0) + gram.mean()
    gram = gram - gram.mean(0) - gram.mean(1, keepdims=True) + gram.mean()
    values, vectors = np.linalg.eigh(gram)
    kept = (values > 1e-10 * values.max()) & (np.arange(n) >= n - n_components)
    values, vectors = values[kept], vectors[:, kept]
    ridge = strength * values.sum() / (n - 1)
    slope = vectors @ ((vectors.T @ row) / (values + ridge))
    return weights + slope - slope.mean()


def choose_strength(
    conditions: Conditions,
    effect: NDArray,
    gram: NDArray[np.float64],
    n_components: int,
    *,
    contexts: NDArray[np.bool_] | None = None,
) -> float:
    """Strength of :func:`ridge_weights` that predicts the effects of each context best from the other contexts'.

    Parameters
    ----------
    conditions
        What was measured.
    effect
        Effects, ``(n_conditions, n_genes)``; or ``(n_splits, n_conditions, n_genes)``, each compared with other controls than
        those of the profiles.
    gram
        Inner products of the control profiles, ``(n_contexts, n_contexts)``, or one table for each split.
    n_components
        Number of components.
    contexts
        Which contexts choose, ``(n_contexts,)``; default: all.
    """
    groups = _repeated(conditions, contexts)
    if not groups:
        return np.inf
    error = np.zeros(len(_STRENGTHS))
    for effects, products in zip(
        np.reshape(effect, (-1, *effect.shape[-2:])), np.reshape(gram, (-1, *gram.shape[-2:])), strict=True
    ):
        for rows in groups:
            own = effects[rows].astype(np.float64)
            error += _left_out_errors(
                own @ own.T, products[np.ix_(conditions.context[rows], conditions.context[rows])], n_components
            )
    # of equally good ones the most cautious
    return _STRENGTHS[len(error) - 1 - int(np.argmin(error[::-1]))]


def fit_convergence(conditions: Conditions, splits: Sequence[tuple[NDArray, NDArray]]) -> float:
    """How far a perturbation brings contexts together, by what left-out contexts say.

    The effect in a context is the mean effect of the others, less this share of what its control profile has more than theirs: 0 if
    contexts keep their distance, 1 if treated cells are alike everywhere. One number for all genes and perturbations; 0 where
    :func:`~pertura.effects.stack_shares` finds no gain, or no perturbation was measured in three contexts.

    Parameters
    ----------
    conditions
        What was measured.
    splits
        Control profiles, ``(n_contexts, n_genes)``, and effects, ``(n_conditions, n_genes)``, that are compared with other controls:
        the noise of a control profile is in its own effects with the opposite sign, and would look like convergence.
    """
    parts = []
    for (profiles, effects), rows in product(splits, _repeated(conditions)):
        at, scale = (
            conditions.context[rows],
            len(rows) / (len(rows) - 1),
        )  # of what a row differs from the mean of the others
        own, control = effects[rows], profiles[at]
        parts.append((scale * (own - own.mean(0)), scale * (control.mean(0) - control), at))
    if not parts:
        return 0.0
    target, predicted, context = (np.concatenate(part) for part in zip(*parts, strict=True))
    return float(stack_shares(target, [predicted], context)[0])


def _repeated(conditions: Conditions, contexts: NDArray[np.bool_] | None = None) -> list[NDArray[np.int64]]:
    """Rows of perturbations that three or more of the contexts have at the same dose; of at most 50 perturbations."""
    keys = np.concatenate([conditions.codes, conditions.dose], axis=1)
    group = np.unique(keys, axis=0, return_inverse=True)[1].ravel()
    if contexts is not None:
        group = np.where(contexts[conditions.context], group, -1)
    groups = np.flatnonzero(np.bincount(group[group >= 0], minlength=1) > 2)
    if not len(groups):
        return []
    chosen = groups[np.unique(np.linspace(0, len(groups) - 1, _MAX_GROUPS).round().astype(int))]
    return [np.flatnonzero(group == g) for g in chosen]


def _left_out_errors(
    products: NDArray[np.float64], gram: NDArray[np.float64], n_components: int
) -> NDArray[np.float64]:
    """Squared error of each strength in effects with these inner products, each context predicted from the others."""
    error = np.zeros(len(_STRENGTHS))
    for i, strength in enumerate(_STRENGTHS):
        residual = np.eye(len(gram))
        for k in range(len(gram)):
            others = np.delete(np.arange(len(gram)), k)
            residual[k, others] = -ridge_weights(gram[np.ix_(others, others)], gram[k, others], strength, n_components)
        error[i] = np.einsum("ki,ij,kj->", residual, products, residual)
    return error
