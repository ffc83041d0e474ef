r"""How far predicted effects are from true ones, and how far a question is from the data.

The discrepancy of gene g is modelled as :math:`u_g \sim N(0, a^2 + k^2 m_g^2)` with predicted effect :math:`m_g`: an
error that every effect has, and one in proportion to its size. There is one pair (a, k) per kind of novelty.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import nnls

from pertura.data._vocabulary import Novelty, Vocabulary

from ._engine import TARGET_SUM, Question

# where nothing was measured to learn from, the effect may be absent or twice as large
UNINFORMED = (0.05, 1.0)
_STEPS = ("new dose", "new combination", "unseen with features")


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
    """Discrepancies of a trained model.

    Parameters
    ----------
    calibration
        ``scale``; ``observed``, the contexts in which each label was trained; ``(a, k)`` by novelty. `None`: there is
        none.
    vocabulary
        Perturbations of the model.
    contexts
        Contexts of the model.
    """

    def __init__(self, calibration: dict[str, Any] | None, vocabulary: Vocabulary, contexts: Sequence[str]) -> None:
        self.calibration, self.vocabulary, self.contexts = calibration, vocabulary, frozenset(contexts)

    @cached_property
    def _contexts_of_member(self) -> dict[str, set[str]]:
        """Contexts in which a perturbation was trained, alone or in a combination."""
        found: dict[str, set[str]] = {}
        for label, contexts in self.calibration["observed"].items():
            for member in self.vocabulary.parse(label):
                found.setdefault(member, set()).update(contexts)
        return found

    @property
    def trained(self) -> list[str]:
        """Perturbations that were trained, alone or in a combination."""
        return list(self.vocabulary.names if self.calibration is None else sorted(self._contexts_of_member))

    def step(self, question: Question) -> Novelty:
        """How far a perturbation is from those that were trained; not all that were registered need be among them."""
        vocabulary = self.vocabulary
        novelty = vocabulary.novelty(question.label, question.dose)
        if self.calibration is None or novelty not in ("seen", "new dose", "new combination"):
            return novelty
        members = vocabulary.parse(question.label)
        new = [m for m in members if m not in self._contexts_of_member]
        if new:
            described = vocabulary.features is not None and all(m in vocabulary.features.index for m in new)
            return "unseen with features" if described else "unseen"
        if question.label not in self.calibration["observed"]:
            return "new combination"
        trained = self.calibration["doses"]
        if vocabulary.has_dose and any(
            not np.isclose(d, trained[m], rtol=1e-4, atol=0.0).any()
            for m, d in zip(members, question.dose, strict=False)
        ):
            return "new dose"
        return "seen"

    def is_new_context(self, label: str, context: str) -> bool:
        """Whether a perturbation was not trained in a context: neither itself nor all of its known members."""
        members = self.vocabulary.parse(label)
        if self.calibration is None or not members:
            return context not in self.contexts
        if context in self.calibration["observed"].get(label, ()):
            return False
        known = [self._contexts_of_member[m] for m in members if m in self._contexts_of_member]
        if not known:
            return context not in self.contexts
        return not all(context in contexts for contexts in known)

    def novelty(self, question: Question, context: str) -> str:
        """How far a question is from the data, such as ``"new combination, new context"``."""
        step = self.step(question)
        if step == "control" or not self.is_new_context(question.label, context):
            return step
        return "new context" if step == "seen" else f"{step}, new context"

    def parameters(self, question: Question, context: str) -> tuple[float, float]:
        """A and k of a question."""
        step = self.step(question)
        if self.calibration is None or step == "control":
            return 0.0, 0.0
        parts = [self.calibration["seen"]]
        if step in _STEPS:
            parts.append(self.calibration[step])
        if self.is_new_context(question.label, context):
            parts.append(self.calibration["new context"])
        a2 = k2 = 0.0
        for a, k in parts:
            # each step adds an error of its own; what is in proportion to the effect is so to the true one, m^2 + a2 + k2 m^2
            a2, k2 = a2 + a**2 + k**2 * a2, k2 + k**2 + k**2 * k2
        return math.sqrt(a2), math.sqrt(k2)

    @property
    def noise(self) -> NDArray[np.float64] | float:
        """Variance, per gene, that the noise of the measured effects leaves in the predicted ones."""
        return 0.0 if self.calibration is None else self.calibration.get("noise", 0.0)

    def variance(self, question: Question, context: str, effect: NDArray, unit: Any) -> NDArray[np.float64] | float:
        """Variance of the discrepancy of predicted effects, ``(n_genes,)``; `unit` as of :meth:`unit`."""
        if self.step(question) == "control":
            return 0.0
        a, k = self.parameters(question, context)
        return (a**2 + self.noise) * unit**2 + (k * effect) ** 2

    def table(self, questions: Sequence[Question], contexts: Sequence[str]) -> NDArray[np.float32]:
        """Parameters of all questions in all contexts, ``(n_questions, n_contexts, 2)``."""
        rows = [[self.parameters(q, c) for c in contexts] for q in questions]
        return np.array(rows, dtype=np.float32).reshape(len(questions), len(contexts), 2)

    def unit(self, scale: str, mean: Any, library: Any) -> Any:
        """What one unit of the calibrated scale is on another: the derivative of counts by log1p of counts."""
        if self.calibration is None or scale == self.calibration["scale"]:
            return 1.0
        return mean + library / TARGET_SUM


def widened(
    mean: torch.Tensor, low: torch.Tensor, high: torch.Tensor, half: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ends of an interval to which an independent error of half-width `half` is added."""
    below, above = (mean - low).clamp(min=0.0), (high - mean).clamp(min=0.0)
    return mean - (below**2 + half**2).sqrt(), mean + (above**2 + half**2).sqrt()
