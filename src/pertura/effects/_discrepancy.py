r"""How far predicted effects are from true ones, and how far a perturbation is from those that were trained.

The discrepancy of gene g is modeled as :math:`u_g \sim N(0, a^2 + k^2 m_g^2)` with predicted effect :math:`m_g`: an
error that every effect has, and one in proportion to its size. There is one pair (a, k) per kind of novelty.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from scipy.optimize import nnls

from pertura.data._perturbation import Perturbation
from pertura.data._vocabulary import Novelty, Vocabulary

from ._table import ConditionTable

# where nothing was measured to learn from, the effect may be absent or twice as large
UNINFORMED = (0.05, 1.0)
_STEPS = ("new dose", "new combination", "unseen with features")
_MAX_CONDITIONS, _TARGET_SUM = 60, 1e4


def fit_discrepancy(difference: NDArray, se: NDArray, effect: NDArray) -> tuple[float, float]:
    """Moment estimates of a and k.

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
        self._pairs: dict[tuple[str, bool], tuple[float, float]] = {}
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
        if not self.vocabulary.has_dose:
            return "seen"
        registered = self.vocabulary.doses
        doses = [registered[self._code[m]] if calibration is None else calibration["doses"][m] for m in members]
        pairs = zip(doses, dose, strict=False)
        seen = all(any(math.isclose(d, own, rel_tol=1e-4) for d in trained) for trained, own in pairs)
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

    def parameters(self, perturbation: Perturbation, context: str) -> tuple[float, float]:
        """A and k of a prediction."""
        step = self.step(perturbation)
        if self.calibration is None or step == "control":
            return 0.0, 0.0
        key = (step, self.is_new_context(perturbation.label, context))
        if key not in self._pairs:
            parts = [self.calibration["seen"]]
            if step in _STEPS:
                parts.append(self.calibration[step])
            if key[1]:
                parts.append(self.calibration["new context"])
            a2 = k2 = 0.0
            for a, k in parts:
                # each step adds an error of its own; what is in proportion to the effect is so to the true one, m^2 + a2 + k2 m^2
                a2, k2 = a2 + a**2 + k**2 * a2, k2 + k**2 + k**2 * k2
            self._pairs[key] = math.sqrt(a2), math.sqrt(k2)
        return self._pairs[key]

    @property
    def noise(self) -> NDArray[np.float64] | float:
        """Variance, per gene, that the noise of the measured effects leaves in the predicted ones."""
        return 0.0 if self.calibration is None else self.calibration.get("noise", 0.0)

    def variance(
        self, perturbation: Perturbation, context: str, effect: NDArray, unit: Any
    ) -> NDArray[np.float64] | float:
        """Variance of the discrepancy of predicted effects, ``(n_genes,)``; `unit` as of :meth:`unit`."""
        if self.step(perturbation) == "control":
            return 0.0
        a, k = self.parameters(perturbation, context)
        return (a**2 + self.noise) * unit**2 + (k * effect) ** 2

    def table(self, perturbations: Sequence[Perturbation], contexts: Sequence[str]) -> NDArray[np.float32]:
        """Parameters of all perturbations in all contexts, ``(n_perturbations, n_contexts, 2)``."""
        rows = [[self.parameters(p, c) for c in contexts] for p in perturbations]
        return np.array(rows, dtype=np.float32).reshape(len(perturbations), len(contexts), 2)

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


def calibrate(
    table: ConditionTable,
    predict: Callable[[int, Sequence[Perturbation]], NDArray],
    vocabulary: Vocabulary,
    contexts: Sequence[str],
    *,
    scale: str,
    min_cells: int = 10,
    noise_share: float = 0.0,
    adjust_depth: bool = True,
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
    adjust_depth
        See :meth:`ConditionTable.effects`.
    seed
        Of which conditions are used where there are more than 60.

    Returns
    -------
    ``scale``; ``observed`` (label to contexts); ``doses`` (perturbation to doses); ``noise`` (mean squared standard
    error of the measured effects times the share, per gene); ``(a, k)`` of ``"seen"``, ``"new dose"``, ``"new context"``,
    ``"new combination"`` and ``"unseen with features"``.
    """
    treated, done = table.treated, perturbations_of(table, vocabulary)
    observed: dict[str, set[str]] = {}
    doses: dict[str, set[float]] = {}
    for perturbation, context in zip(done, table.context[treated], strict=True):
        observed.setdefault(perturbation.label, set()).add(contexts[context])
        for member, dose in zip(vocabulary.parse(perturbation.label), perturbation.dose, strict=True):
            doses.setdefault(member, set()).add(dose)
    result: dict[str, Any] = {
        "scale": scale,
        "observed": {label: sorted(found) for label, found in observed.items()},
        "doses": {member: sorted(found) for member, found in doses.items()},
        "seen": (0.0, 0.0),
        **dict.fromkeys(("new dose", "new context", "new combination", "unseen with features"), UNINFORMED),
    }
    controls = np.zeros(table.n_contexts)
    controls[table.context[table.is_control]] = table.n[table.is_control].sum(1)
    chosen = np.flatnonzero(
        (table.n[treated].sum(1) >= min_cells) & (controls[table.context[treated]] >= max(min_cells, 1))
    )
    if not len(chosen):
        return result
    if len(chosen) > _MAX_CONDITIONS:
        chosen = np.sort(np.random.default_rng(seed).choice(chosen, _MAX_CONDITIONS, replace=False))
    found = table.effects(adjust_depth=adjust_depth)
    measured = _Measured(
        [done[i] for i in chosen], table.context[treated[chosen]], found.effect[chosen], found.se[chosen]
    )
    predicted = np.zeros(measured.effect.shape)
    for context in np.unique(measured.context):
        own = np.flatnonzero(measured.context == context)
        predicted[own] = predict(int(context), [measured.perturbations[i] for i in own])
    # differences from predictions that took up a share of the noise lack it
    result["noise"] = noise_share * (measured.se**2).mean(0)
    result["seen"] = fit_discrepancy(predicted - measured.effect, np.sqrt(1 - noise_share) * measured.se, predicted)
    unseen = measured.others(["context"], "label", measured.frame["order"] == 1) or UNINFORMED
    result["unseen with features"] = unseen
    result["new context"] = measured.others(["label", "dose"], "context") or UNINFORMED
    result["new dose"] = measured.others(["label", "context"], "dose") or UNINFORMED
    result["new combination"] = measured.additive(vocabulary.delimiter) or unseen
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

    def __init__(
        self, perturbations: list[Perturbation], context: NDArray[np.int64], effect: NDArray, se: NDArray
    ) -> None:
        self.perturbations, self.context, self.effect, self.se = perturbations, context, effect, se
        self.frame = pd.DataFrame({"label": [p.label for p in perturbations], "context": context})
        self.frame["dose"] = pd.Series([p.dose for p in perturbations], dtype=object)
        self.frame["order"] = [len(p.dose) for p in perturbations]

    def others(self, within: list[str], differ: str, rows: pd.Series | None = None) -> tuple[float, float] | None:
        """Discrepancy of predicting a condition by the mean of those that share `within` and differ in `differ`."""
        index = np.arange(len(self.frame)) if rows is None else np.flatnonzero(rows)
        if not len(index):
            return None
        frame = self.frame.iloc[index]
        group = frame.groupby(within, observed=True, sort=False).ngroup().to_numpy()
        other = pd.factorize(frame[differ])[0]
        weights = ((group[:, None] == group) & (other[:, None] != other)).astype(np.float64)
        number = weights.sum(1, keepdims=True)
        return self._compare(index, weights / np.maximum(number, 1), number.ravel() > 0, index)

    def additive(self, delimiter: str) -> tuple[float, float] | None:
        """Discrepancy of predicting a measured combination by the sum of its members."""
        lookup = {
            (p.label, p.dose, c): i for i, (p, c) in enumerate(zip(self.perturbations, self.context, strict=True))
        }
        combined = np.flatnonzero(self.frame["order"] > 1)
        weights = np.zeros((len(combined), len(self.frame)))
        complete = np.ones(len(combined), dtype=bool)
        for row, i in enumerate(combined):
            whole = self.perturbations[i]
            for member, own in zip(whole.label.split(delimiter), whole.dose, strict=True):
                at = lookup.get((member, (own,), self.context[i]))
                complete[row] &= at is not None
                weights[row, 0 if at is None else at] = 1.0
        return self._compare(combined, weights, complete, np.arange(len(self.frame)))

    def _compare(
        self, target: NDArray, weights: NDArray, usable: NDArray[np.bool_], source: NDArray
    ) -> tuple[float, float] | None:
        if not usable.any():
            return None
        weights, target = weights[usable], target[usable]
        predicted = weights @ self.effect[source]
        variance = weights**2 @ self.se[source] ** 2 + self.se[target] ** 2
        return fit_discrepancy(predicted - self.effect[target], np.sqrt(variance), predicted)
