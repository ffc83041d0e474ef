r"""How far predicted effects are from true ones, and how far a perturbation is from those that were trained.

The true effect of gene g is :math:`(1 + b)\, m_g + u_g` with predicted effect :math:`m_g`, an amplitude
:math:`b \sim (0, \beta^2)` that all genes share ("does this context respond at all, and how strongly?") and an error of the gene
:math:`u_g \sim (0, s_g^2 + k^2 m_g^2)`. There is one such :class:`Error` per kind of novelty, learned from conditions that were
left out. Their distribution is taken as it is: an interval reaches as far as left-out errors did (split conformal prediction,
Lei et al. 2018, JASA 113:1094-1111, with the sd without the condition's own group, as jackknife+ has it).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from scipy import stats
from scipy.optimize import nnls

from pertura.data._constants import CONTROL_ONLY, DOSE_TOLERANCE
from pertura.data._perturbation import Perturbation
from pertura.data._vocabulary import Novelty, Vocabulary

from ._contexts import Conditions
from ._table import ConditionTable

Matrix = NDArray[np.float64]

_MAX_CONDITIONS, _TARGET_SUM = 60, 1e4
_ABOVE = "higher dose"  # than any that was trained: an effect is extrapolated
# level of the interval from which the sd is taken, and levels at which the reach of intervals is learned
_SD_LEVEL, _LEVELS = 0.9, (0.25, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98)
_PRIOR_GROUPS = 2.0  # weight of all genes in the error of one, in left-out groups
# strongest genes of a condition, and by how much coverage of these and of all genes may differ from the level
_N_STRONG, _TOLERANCE = 50, 0.05


@dataclass(frozen=True)
class Error:
    """Error of predicted effects of one kind of novelty.

    Attributes
    ----------
    gene
        Sd of each gene whatever the effect, ``(n_genes,)`` or a number.
    effect
        Sd of each gene as a fraction of the predicted effect.
    response
        Sd of the amplitude that all genes share: 0.4 says that the whole response may be 40 % stronger or weaker.
    reach
        Half-width of intervals of the levels 0.25, 0.5, 0.7, 0.8, 0.9, 0.95 and 0.98, in units of the sd; by default that of a
        normal distribution.
    """

    gene: NDArray[np.float64] | float = 0.0
    effect: float = 0.0
    response: float = 0.0
    reach: tuple[float, ...] = tuple(stats.norm.ppf((1 + np.array(_LEVELS)) / 2).tolist())

    def half_width(self, level: float) -> float:
        """Half-width of an interval in units of the sd."""
        z, known = (stats.norm.ppf((1 + np.asarray(v)) / 2) for v in (level, _LEVELS))
        return float(np.interp(z, [0.0, *known], [0.0, *self.reach]) * max(1.0, z / known[-1]))

    def spread(self, level: float) -> Spread:
        """Variances of the normal distribution whose interval reaches as far."""
        factor = (self.half_width(level) / stats.norm.ppf((1 + level) / 2)) ** 2
        gene = np.asarray(self.gene, dtype=np.float64) ** 2
        return Spread(factor * gene, factor * self.effect**2, factor * self.response**2)


# where nothing was measured to learn from, the response may be absent or twice as large
UNINFORMED = Error(0.05, 0.3, 1.0)


@dataclass(frozen=True)
class Spread:
    """Variances: of each gene whatever the effect, and in units of the squared effect, own and shared by all genes."""

    gene: NDArray[np.float64] | float = 0.0
    effect: float = 0.0
    response: float = 0.0

    def after(self, other: Spread) -> Spread:
        """Of two errors one after the other: what is in proportion to the effect is so to the true one."""
        own = other.effect * (1.0 + self.effect + self.response) + other.response * self.effect
        return Spread(
            self.gene + other.gene + (other.effect + other.response) * self.gene,
            self.effect + own,
            self.response + other.response * (1.0 + self.response),
        )

    def at_least(self, other: Spread) -> Spread:
        """The larger of either."""
        return Spread(
            np.maximum(self.gene, other.gene), max(self.effect, other.effect), max(self.response, other.response)
        )


class Discrepancy:
    """Discrepancies of a trained model. Make one per training: what it looks up, it keeps.

    Parameters
    ----------
    calibration
        As :func:`calibrate` gives it. `None`: there is none.
    vocabulary
        Perturbations of the model.
    contexts
        Contexts of the model.
    """

    def __init__(self, calibration: dict[str, Any] | None, vocabulary: Vocabulary, contexts: Sequence[str]) -> None:
        self.calibration, self.vocabulary, self.contexts = calibration, vocabulary, frozenset(contexts)
        self._code = {name: code for code, name in enumerate(vocabulary.names)}
        self._combinations = frozenset(vocabulary.combinations)
        self._described = frozenset() if vocabulary.features is None else frozenset(vocabulary.features.index)
        self._members: dict[str, tuple[str, ...]] = {}
        self._steps: dict[tuple[str, tuple[float, ...]], Novelty] = {}
        self._spreads: dict[tuple[str, bool, float], Spread] = {}
        self._observed: dict[str, frozenset[str]] = {}
        # contexts in which a perturbation was trained, alone or in a combination
        self._contexts_of_member: dict[str, set[str]] = {}
        if calibration is not None:
            self._observed = {label: frozenset(found) for label, found in calibration["observed"].items()}
            for label, found in self._observed.items():
                for member in self.members(label):
                    self._contexts_of_member.setdefault(member, set()).update(found)

    def members(self, label: str) -> tuple[str, ...]:
        """Members of a perturbation, sorted."""
        if label not in self._members:
            self._members[label] = self.vocabulary.parse(label)
        return self._members[label]

    @property
    def trained(self) -> list[str]:
        """Perturbations that were trained, alone or in a combination."""
        return list(self.vocabulary.names if self.calibration is None else sorted(self._contexts_of_member))

    def step(self, perturbation: Perturbation) -> Novelty:
        """How far a perturbation is from those that were trained; not all that were registered need be among them."""
        key = (perturbation.label, perturbation.dose)
        if key not in self._steps:
            self._steps[key] = self._step(*key)
        return self._steps[key]

    def _step(self, label: str, dose: tuple[float, ...]) -> Novelty:
        members, calibration = self.members(label), self.calibration
        if not members or (len(dose) and not any(dose)):
            return "control"
        known = self._code if calibration is None else self._contexts_of_member
        new = [m for m in members if m not in known]
        if new:
            return "unseen with features" if all(m in self._described for m in new) else "unseen"
        if calibration is None:
            is_new = len(members) > 1 and members not in self._combinations
        else:
            is_new = label not in self._observed
        if is_new:
            return "new combination"
        if not self.vocabulary.has_dose and all(d == 1.0 for d in dose):
            return "seen"
        registered = self.vocabulary.doses
        doses = [registered[self._code[m]] if calibration is None else calibration["doses"][m] for m in members]
        pairs = zip(doses, dose, strict=False)
        seen = all(any(math.isclose(d, own, rel_tol=DOSE_TOLERANCE) for d in trained) for trained, own in pairs)
        return "seen" if seen else "new dose"

    def is_new_context(self, label: str, context: str) -> bool:
        """Whether a perturbation was not trained in a context: neither itself nor all of its known members."""
        members = self.members(label)
        if self.calibration is None or not members:
            return context not in self.contexts
        if context in self._observed.get(label, ()):
            return False
        known = [self._contexts_of_member[m] for m in members if m in self._contexts_of_member]
        if not known:
            return context not in self.contexts
        return not all(context in contexts for contexts in known)

    def novelty(self, perturbation: Perturbation, context: str) -> str:
        """How far a prediction is from the data, such as ``"new combination, new context"``."""
        step = self.step(perturbation)
        if step == "control" or not self.is_new_context(perturbation.label, context):
            return step
        return "new context" if step == "seen" else f"{step}, new context"

    def spread(self, perturbation: Perturbation, context: str, level: float = _SD_LEVEL) -> Spread:
        """What is added to the variance of a predicted effect.

        Parameters
        ----------
        perturbation, context
            What is predicted.
        level
            Of the interval that is to hold the true effect: errors have heavier tails than a normal distribution, whose
            variance this is.
        """
        step = self.step(perturbation)
        if self.calibration is None or step == "control":
            return Spread()
        kind = _ABOVE if step == "new dose" and self._is_above(perturbation) else step
        key = (kind, self.is_new_context(perturbation.label, context), level)
        if key not in self._spreads:
            total = self._error("seen").spread(level)
            if key[1]:
                # what a model does not fit is much of what it does not transfer
                total = total.at_least(self._error("new context").spread(level))
            self._spreads[key] = total if kind == "seen" else total.after(self._error(kind).spread(level))
        return self._spreads[key]

    def _is_above(self, perturbation: Perturbation) -> bool:
        """Whether a dose is higher than those that were trained."""
        trained, members = self.calibration["doses"], self.members(perturbation.label)
        return any(d > max(trained[m]) for m, d in zip(members, perturbation.dose, strict=False))

    def _error(self, kind: str) -> Error:
        return Error(**self.calibration["unseen with features" if kind == "unseen" else kind])

    def variance(
        self, perturbation: Perturbation, context: str, effect: NDArray, unit: Any, level: float = _SD_LEVEL
    ) -> Matrix | float:
        """Variance of the discrepancy of predicted effects, ``(n_genes,)``; `unit` as of :meth:`unit`."""
        if self.calibration is None or self.step(perturbation) == "control":
            return 0.0
        found = self.spread(perturbation, context, level)
        return (found.gene + self.noise) * unit**2 + (found.effect + found.response) * effect**2

    @property
    def noise(self) -> Matrix | float:
        """Variance, per gene, that the noise of the measured effects leaves in the predicted ones."""
        return 0.0 if self.calibration is None else self.calibration.get("noise", 0.0)

    def unit(self, scale: str, mean: Any, library: Any) -> Any:
        """What one unit of the calibrated scale is on another: the derivative of counts by log1p of counts."""
        if self.calibration is None or scale == self.calibration["scale"]:
            return 1.0
        return mean + library / _TARGET_SUM


def widened(
    mean: torch.Tensor, low: torch.Tensor, high: torch.Tensor, half: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ends of an interval to which an independent error of half-width `half` is added."""
    below, above = (mean - low).clamp(min=0.0), (high - mean).clamp(min=0.0)
    return mean - (below**2 + half**2).sqrt(), mean + (above**2 + half**2).sqrt()


# -- calibration --------------------------------------------------------------------------------------------------------


def fit_discrepancy(difference: NDArray, se: NDArray, effect: NDArray) -> tuple[float, float]:
    """Moment estimates of a and k, where differences have the variance ``a**2 + (k * effect)**2 + se**2``.

    Parameters
    ----------
    difference
        Predicted minus measured effects, any shape.
    se
        Standard errors of the measured effects, same shape.
    effect
        Predicted effects, same shape.
    """
    square, noise, magnitude = (v.ravel() for v in (difference**2, se**2, effect**2))
    order = np.argsort(magnitude)
    # bins of equal size: means of squares are stable enough to regress on
    bins = np.array_split(order, min(40, max(1, len(order) // 25)))
    y = np.array([(square[b] - noise[b]).mean() for b in bins])
    design = np.array([[1.0, magnitude[b].mean()] for b in bins])
    error = np.array([noise[b].mean() for b in bins])
    solution = np.array([max(y.mean(), 0.0), 0.0])
    for _ in range(10):
        # the square of a normal deviate varies as the square of its variance, which is what is being fitted
        weight = 1.0 / (design @ solution + error + 1e-9)
        solution = nnls(design * weight[:, None], y * weight)[0]
    return float(np.sqrt(solution[0])), float(np.sqrt(solution[1]))


def fit_error(
    difference: Matrix,
    se: Matrix,
    effect: Matrix,
    group: NDArray,
    strong: tuple[NDArray[np.bool_], Matrix, Matrix] | None = None,
) -> Error:
    """Error of predictions that were made without the conditions they are compared with.

    Parameters
    ----------
    difference
        Predicted minus measured effects, ``(n_conditions, n_genes)``.
    se
        Standard errors of the differences, same shape.
    effect
        Predicted effects, same shape.
    group
        Conditions that were left out together, ``(n_conditions,)``: their errors are alike.
    strong
        Which genes respond most in one half of the cells, and difference and standard error in the other half. Intervals are
        made to hold at most 5 % less of these than the level, as far as they then hold at most 5 % more of all genes: few
        genes respond, and an interval that misses a tenth of the genes may miss just these.
    """
    energy = (effect**2).sum(1) + 1e-12
    amplitude = (difference * effect).sum(1) / energy
    rest = difference - amplitude[:, None] * effect
    # by how much the amplitude varies by chance, as the errors of its genes are
    chance = (rest**2 * effect**2).sum(1) / energy**2
    response2 = max(0.0, float((energy * (amplitude**2 - chance)).sum() / energy.sum()))
    a, k = fit_discrepancy(rest, se, effect)
    _, code = np.unique(group, return_inverse=True)
    number = np.bincount(code)
    own = np.zeros((len(number), difference.shape[1]))
    np.add.at(own, code, rest**2 - se**2 - (k * effect) ** 2)
    own /= number[:, None]

    def gene2(total: Matrix, n: int) -> Matrix:
        return np.maximum((total + _PRIOR_GROUPS * a**2) / (n + _PRIOR_GROUPS), (0.3 * a) ** 2)

    total = own.sum(0)
    without = gene2(total - own, len(number) - 1)[code]
    sd = np.sqrt(without + (k**2 + response2) * effect**2) + 1e-9
    # how far intervals must reach to hold the measured effect: the noise of the measurement is normal
    z = stats.norm.ppf((1 + np.array(_LEVELS)) / 2)

    def needed(difference: Matrix, se: Matrix, sd: Matrix, own_z: float) -> Matrix:
        return np.sqrt(np.maximum(difference**2 - (own_z * se) ** 2, 0.0)) / sd

    reach = []
    for level, own_z in zip(_LEVELS, z, strict=True):
        most = level + min(_TOLERANCE, (1.0 - level) / 2)
        low, high = np.quantile(needed(difference, se, sd, own_z), [level, most])
        if strong is not None:
            mask, other, other_se = strong
            low = np.clip(
                np.quantile(needed(other[mask], other_se[mask], sd[mask], own_z), level - _TOLERANCE), low, high
            )
        reach.append(low)
    reach = np.maximum.accumulate(np.maximum(reach, 0.3 * z))
    return Error(np.sqrt(gene2(total, len(number))), k, math.sqrt(response2), tuple(reach.tolist()))


def calibrate(
    table: ConditionTable,
    predict: Callable[[int, Sequence[Perturbation]], NDArray],
    vocabulary: Vocabulary,
    contexts: Sequence[str],
    *,
    scale: str,
    min_cells: int = 10,
    noise_share: float = 0.0,
    seed: int = 0,
) -> dict[str, Any]:
    """Compare predicted with measured effects, by novelty.

    The posterior of a model says how well its parameters are known if the model is right. Whether it is right shows where
    predictions can be compared with measurements: in training conditions for what was seen, and across contexts, doses and
    perturbations, each predicted from the others, for what was not.

    Parameters
    ----------
    table
        Training conditions.
    predict
        ``predict(context, perturbations)`` gives the predicted effects in the context of that code, on the scale of the table,
        ``(n_perturbations, n_genes)``.
    vocabulary, contexts
        Of the model.
    scale
        Name of the scale of the table.
    min_cells
        Conditions with fewer cells, or fewer controls, are left out.
    noise_share
        Share of the noise of the measured effects that the predicted ones have taken up, between 0 and 1. For a model whose draws
        do not hold that noise: its number of free coordinates per gene.
    seed
        Of which conditions are used where there are more than 60.

    Returns
    -------
    ``scale``; ``observed`` (label to contexts); ``doses`` (perturbation to doses); ``noise`` (mean squared standard
    error of the measured effects times the share, per gene); :class:`Error`, as a dict, of ``"seen"``, ``"new dose"``,
    ``"higher dose"`` (above all others), ``"new context"``, ``"new combination"`` and ``"unseen with features"``, which also stands for perturbations without.
    """
    treated, done = table.treated, perturbations_of(table, vocabulary)
    observed: dict[str, set[str]] = {}
    doses: dict[str, set[float]] = {}
    for perturbation, context in zip(done, table.context[treated], strict=True):
        observed.setdefault(perturbation.label, set()).add(contexts[context])
        for member, dose in zip(vocabulary.parse(perturbation.label), perturbation.dose, strict=True):
            doses.setdefault(member, set()).add(dose)
    kinds = ("new dose", _ABOVE, "new context", "new combination", "unseen with features")
    result: dict[str, Any] = {
        "scale": scale,
        "observed": {label: sorted(found) for label, found in observed.items()},
        "doses": {member: sorted(found) for member, found in doses.items()},
        "seen": asdict(Error()),
        **{kind: asdict(UNINFORMED) for kind in kinds},
    }
    controls = np.zeros(table.n_contexts)
    controls[table.context[table.is_control]] = table.n[table.is_control].sum(1)
    usable = np.flatnonzero(
        (table.n[treated].sum(1) >= min_cells) & (controls[table.context[treated]] >= max(min_cells, 1))
    )
    if not len(usable):
        return result
    measured = _Measured(table, usable, np.random.default_rng(seed))
    at = measured.some(np.ones(len(usable), dtype=bool))
    effect, se = measured.effect[at], np.sqrt(measured.variance[at])
    predicted, context = np.zeros(effect.shape), measured.conditions.context[at]
    for code in np.unique(context):
        own = np.flatnonzero(context == code)
        predicted[own] = predict(int(code), [done[i] for i in usable[at[own]]])
    # differences from predictions that took up a share of the noise lack it
    result["noise"] = noise_share * (se**2).mean(0)
    left = (1 - noise_share) * se**2
    strong = measured.strong(at, predicted, left)
    result["seen"] = asdict(fit_error(predicted - effect, np.sqrt(left), predicted, np.arange(len(at)), strong))
    for kind in kinds:
        found = measured.left_out(kind)
        if found is None and kind == "new combination":
            found = measured.left_out("unseen with features")
        if found is not None:
            result[kind] = asdict(found)
    return result


def perturbations_of(table: ConditionTable, vocabulary: Vocabulary) -> list[Perturbation]:
    """The perturbation of each treated condition."""
    names, delimiter = vocabulary.names, vocabulary.delimiter
    dose = table.dose[table.treated].tolist()
    return [
        Perturbation(delimiter.join(names[c] for c in members), tuple(own[: len(members)]))
        for members, own in zip(table.members, dose, strict=True)
    ]


class _Measured:
    """Measured effects of some conditions, to be predicted from one another."""

    def __init__(self, table: ConditionTable, usable: NDArray[np.int64], rng: np.random.Generator) -> None:
        found, at = table.effects(), table.treated[usable]
        self.effect, self.variance, self.rng = found.effect[usable], found.se[usable] ** 2, rng
        self.halves = [table.effects(half=half).effect[usable] for half in (0, 1)]
        # the part of the treated cells; that of the controls is the same for all conditions of a context
        self.treated = self.variance * (1.0 / table.n[at].sum(1) / found.noise[usable])[:, None]
        self.conditions = Conditions(table.codes[at], table.dose[at], table.context[at], table.n_contexts)

    def some(self, wanted: NDArray[np.bool_]) -> NDArray[np.int64]:
        """At most 60 of the wanted conditions."""
        at = np.flatnonzero(wanted)
        return at if len(at) <= _MAX_CONDITIONS else np.sort(self.rng.choice(at, _MAX_CONDITIONS, replace=False))

    def strong(
        self, at: NDArray[np.int64], predicted: Matrix, variance: Matrix
    ) -> tuple[NDArray[np.bool_], Matrix, Matrix]:
        """Genes that respond most in one half of the cells, and differences with their standard errors in the other."""
        size = np.abs(self.halves[0][at])
        least = np.sort(size, axis=1)[:, -min(_N_STRONG, max(1, size.shape[1] // 4))]
        # half of the cells have twice the variance
        return size >= least[:, None], predicted - self.halves[1][at], np.sqrt(variance + self.variance[at])

    def left_out(self, kind: str) -> Error | None:
        """Error of predicting conditions from others, as the baselines do; `None` where there are no others."""
        conditions = self.conditions
        strength = Conditions.strength(conditions.codes, conditions.dose)
        highest = strength > pd.Series(strength).groupby(conditions.curve).transform("max").to_numpy() - DOSE_TOLERANCE
        wanted, predict = {
            "new dose": (~highest, self._interpolated),
            _ABOVE: (highest, self._interpolated),
            "new context": (np.ones(len(conditions), dtype=bool), self._other_contexts),
            "new combination": (conditions.order > 1, self._sum_of_members),
            "unseen with features": (conditions.order == 1, self._other_perturbations),
        }[kind]
        rows, weights = [], []
        for i in self.some(wanted):
            found = predict(i)
            if found is not None and found.any():
                rows.append(i)
                weights.append(found)
        if not rows:
            return None
        at, weight = np.array(rows), np.stack(weights)
        predicted = weight @ self.effect
        same = conditions.context == conditions.context[at][:, None]
        variance = self.treated[at] + weight**2 @ self.treated
        # noise of the controls is that of the prediction where it is of the same context
        control = self.variance - self.treated
        variance += (1.0 - (weight * same).sum(1, keepdims=True)) ** 2 * control[at] + (weight * ~same) ** 2 @ control
        group = conditions.context if kind == "new context" else conditions.label
        strong = self.strong(at, predicted, variance)
        return fit_error(predicted - self.effect[at], np.sqrt(variance), predicted, group[at], strong)

    def _other_contexts(self, i: int) -> Matrix | None:
        """The mean over other contexts."""
        conditions = self.conditions
        mask = (conditions.label == conditions.label[i]) & (conditions.context != conditions.context[i])
        return self._average(i, mask, conditions.curves_per_context(mask) > 0)

    def _other_perturbations(self, i: int) -> Matrix | None:
        """The mean over other perturbations of the context."""
        conditions = self.conditions
        mask = (conditions.label != conditions.label[i]) & (conditions.order == 1)
        return self._average(i, mask, np.arange(conditions.n_contexts) == conditions.context[i])

    def _average(self, i: int, mask: NDArray[np.bool_], contexts: NDArray[np.bool_]) -> Matrix | None:
        if not mask.any() or not contexts.any():
            return None
        return self.conditions.average(self._at_dose(self.conditions, i), mask, contexts / contexts.sum())

    def _interpolated(self, i: int) -> Matrix | None:
        """Interpolation between other doses."""
        conditions = self.conditions
        others = np.flatnonzero((conditions.curve == conditions.curve[i]) & (np.arange(len(conditions)) != i))
        if not len(others):
            return None
        rest = Conditions(
            *(v[others] for v in (conditions.codes, conditions.dose, conditions.context)), conditions.n_contexts
        )
        result = np.zeros(len(conditions))
        result[others] = self._at_dose(rest, i)
        return result

    def _sum_of_members(self, i: int) -> Matrix | None:
        """The sum of the members."""
        conditions, result = self.conditions, np.zeros(len(self.conditions))
        present = conditions.codes[i] != CONTROL_ONLY
        for code, dose in zip(conditions.codes[i][present], conditions.dose[i][present], strict=True):
            own = (conditions.context == conditions.context[i]) & (conditions.order == 1)
            own &= conditions.codes[:, 0] == code
            if not own.any():
                return None
            result += conditions.interpolate(math.log(dose)) * own
        return result

    def _at_dose(self, conditions: Conditions, i: int) -> Matrix:
        return conditions.interpolate(float(Conditions.strength(self.conditions.codes[i], self.conditions.dose[i])))
