"""How well a model predicts cells that it was not trained on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from pertura.data._perturbation import Perturbation
from pertura.data._vocabulary import Vocabulary
from pertura.effects import ConditionTable
from pertura.effects._discrepancy import perturbations_of

from ._query import Query

# every epoch waits for it: enough conditions and cells to tell two epochs apart
_MAX_CONDITIONS, _MAX_CONTROLS, _N_DRAWS = 40, 50, 2


class Predict(Protocol):
    """Mean effects on control cells, ``(n_perturbations, n_genes)``."""

    def __call__(
        self, controls: Query, perturbations: Sequence[Perturbation], n_samples: int
    ) -> NDArray[np.float64]: ...


class PredictionError:
    """Mean squared error of predicted effects against those of validation cells.

    Each condition of the validation cells is predicted from validation controls of its context, or from training controls where
    there are none. A condition counts by its precision, one over the variance that the numbers of its cells leave. The noise of
    the measured effects is in the error: it is the same in all epochs.

    Parameters
    ----------
    cells
        Training and validation cells.
    held_out
        Which of them are validation cells, ``(n_cells,)``.
    vocabulary
        What perturbations are called.
    measure
        :meth:`~pertura.effects.ConditionTable.measure` of rows, with doses in units of `max_dose`.
    predict
        Predicts effects on control cells.
    """

    def __init__(
        self,
        cells: Query,
        held_out: NDArray[np.bool_],
        vocabulary: Vocabulary,
        measure: Callable[..., ConditionTable],
        predict: Predict,
    ) -> None:
        control, context = cells.is_control, cells.context
        known = np.isin(context, context[held_out & control])
        asked = cells.at(cells.rows[held_out | (control & ~known)])
        table = measure(asked.rows, max_dose=np.asarray(vocabulary.max_dose, dtype=np.float64))
        effects, rng = table.effects(), np.random.default_rng(0)
        chosen = np.flatnonzero(effects.measured)
        chosen = chosen[np.argsort(effects.noise[chosen], kind="stable")[:_MAX_CONDITIONS]]
        self._predict, self._done = predict, perturbations_of(table, vocabulary)
        self._effect, self._weight = effects.effect, 1.0 / effects.noise
        where = table.context[table.treated]
        self._parts = [
            (some_controls(asked, code, _MAX_CONTROLS, rng), chosen[where[chosen] == code])
            for code in np.unique(where[chosen])
        ]

    def __len__(self) -> int:
        """Number of conditions."""
        return sum(len(own) for _, own in self._parts)

    def __call__(self) -> float:
        """Of the model as it is now."""
        total = weight = 0.0
        for controls, own in self._parts:
            predicted = self._predict(controls, [self._done[i] for i in own], n_samples=_N_DRAWS)
            error = np.square(predicted - self._effect[own]).mean(1)
            total, weight = total + self._weight[own] @ error, weight + self._weight[own].sum()
        return float(total / weight)


def some_controls(cells: Query, context: int, most: int, rng: np.random.Generator) -> Query:
    """Controls of a context, a random part of them where they are many."""
    rows = cells.rows[cells.is_control & (cells.context == context)]
    return cells.at(rows if len(rows) <= most else np.sort(rng.choice(rows, most, replace=False)))
