"""Compares predicted effects with measured ones, after training.

The posterior of a model says how well its parameters are known if the model is right. Whether it is right shows where
predictions can be compared with measurements: in training conditions for what was seen, and across contexts, doses and
perturbations, each predicted from the others, for what was not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from ._discrepancy import UNINFORMED, fit_discrepancy
from ._engine import Question

if TYPE_CHECKING:
    from ._base import PerturbationModel

_MAX_CONDITIONS, _MAX_CONTROLS, _MAX_TREATED, _MIN_CELLS = 60, 200, 2000, 10


@dataclass
class Measured:
    """Measured effects on means.

    Attributes
    ----------
    table
        ``label, dose, context, n_members`` of each condition.
    effect
        Mean of the condition minus mean of the controls of its context, ``(n_conditions, n_genes)``.
    se
        Standard errors.
    """

    table: pd.DataFrame
    effect: NDArray[np.float64]
    se: NDArray[np.float64]

    def others(self, rows: NDArray[np.bool_], within: list[str], differ: str) -> tuple[float, float] | None:
        """Discrepancy of predicting a condition by the mean of those that share `within` and differ in `differ`."""
        index = np.flatnonzero(rows)
        if not len(index):
            return None
        table = self.table.iloc[index]
        group = table.groupby(within, observed=True, sort=False).ngroup().to_numpy()
        other = pd.factorize(table[differ])[0]
        weights = ((group[:, None] == group) & (other[:, None] != other)).astype(np.float64)
        number = weights.sum(1, keepdims=True)
        return self._compare(index, weights / np.maximum(number, 1), number.ravel() > 0, index)

    def additive(self, delimiter: str) -> tuple[float, float] | None:
        """Discrepancy of predicting a measured combination by the sum of its members."""
        lookup = {(row.label, row.dose, row.context): i for i, row in enumerate(self.table.itertuples(index=False))}
        combined = np.flatnonzero((self.table["n_members"] > 1).to_numpy())
        weights = np.zeros((len(combined), len(self.table)))
        complete = np.ones(len(combined), dtype=bool)
        for row, i in enumerate(combined):
            label, dose, context = self.table.loc[i, ["label", "dose", "context"]]
            for member, own in zip(label.split(delimiter), dose, strict=True):
                at = lookup.get((member, (own,), context))
                complete[row] &= at is not None
                weights[row, 0 if at is None else at] = 1.0
        return self._compare(combined, weights, complete, np.arange(len(self.table)))

    def _compare(
        self, target: NDArray, weights: NDArray, usable: NDArray[np.bool_], source: NDArray
    ) -> tuple[float, float] | None:
        if not usable.any():
            return None
        weights, target = weights[usable], target[usable]
        predicted = weights @ self.effect[source]
        variance = weights**2 @ self.se[source] ** 2 + self.se[target] ** 2
        return fit_discrepancy(predicted - self.effect[target], np.sqrt(variance), predicted)


def conditions(model: PerturbationModel, rows: NDArray[np.int64]) -> pd.DataFrame:
    """What was done to each of the given cells: ``condition, label, dose, context, row``."""
    done, which = model._done(model.adata_manager, rows)
    table = pd.DataFrame({"condition": which, "context": model._contexts_of(model.adata_manager, rows), "row": rows})
    table["label"] = pd.Series([q.label for q in done], dtype=object).to_numpy()[which]
    table["dose"] = pd.Series([q.dose for q in done], dtype=object).to_numpy()[which]
    return table


def calibrate(model: PerturbationModel, train_idx: NDArray[np.int64], seed: int = 0) -> dict[str, Any]:
    """Discrepancies of a trained model, by novelty, on its default scale.

    Returns
    -------
    ``scale``; ``observed`` (label to contexts); ``doses`` (perturbation to doses); ``noise`` (mean squared standard
    error of the measured effects, per gene); ``(a, k)`` of ``"seen"``, ``"new dose"``, ``"new context"``, ``"new
    combination"`` and ``"unseen with features"``.
    """
    scale = model._resolve_scale(None)
    control = model.vocabulary.control
    cells = conditions(model, train_idx)
    treated = cells[cells["label"] != control]
    seen = treated[["label", "context"]].drop_duplicates()
    result: dict[str, Any] = {
        "scale": scale,
        "observed": {label: sorted(model.contexts[c] for c in own) for label, own in seen.groupby("label")["context"]},
        "doses": _trained_doses(model, treated),
        "seen": (0.0, 0.0),
        **dict.fromkeys(("new dose", "new context", "new combination", "unseen with features"), UNINFORMED),
    }
    measured, predicted = _effects(model, cells, treated, scale, seed)
    if measured is None:
        return result
    # an effect has `n_latent` free coordinates for `n_genes` genes: as projections do, the model took up that share of the
    # noise of the measured effects, and its differences from them lack it
    share = 0.0 if model._draws_effects else min(1.0, model.module.n_latent / predicted.shape[1])
    result["noise"] = share * (measured.se**2).mean(0)
    result["seen"] = fit_discrepancy(predicted - measured.effect, np.sqrt(1 - share) * measured.se, predicted)
    single = (measured.table["n_members"] == 1).to_numpy()
    every = np.ones(len(single), dtype=bool)
    unseen = measured.others(single, ["context"], "label") or UNINFORMED
    result["unseen with features"] = unseen
    result["new context"] = measured.others(every, ["label", "dose"], "context") or UNINFORMED
    result["new dose"] = measured.others(every, ["label", "context"], "dose") or UNINFORMED
    result["new combination"] = measured.additive(model.vocabulary.delimiter) or unseen
    return result


def _effects(
    model: PerturbationModel, cells: pd.DataFrame, treated: pd.DataFrame, scale: str, seed: int
) -> tuple[Measured | None, NDArray[np.float64] | None]:
    """Measured and predicted effects of training conditions that have enough cells."""
    rng = np.random.default_rng(seed)
    # bulk: replicates are few, and a profile is a mean already
    floor = _MIN_CELLS if model.data_kind == "counts" else 2
    is_control = cells["label"] == model.vocabulary.control
    controls = {c: own.to_numpy() for c, own in cells[is_control].groupby("context")["row"]}
    groups = treated.groupby(["condition", "context"])["row"]
    sizes = groups.size()
    enough = [key[1] in controls and len(controls[key[1]]) >= floor for key in sizes.index]
    keep = list(sizes.index[(sizes >= floor).to_numpy() & np.array(enough, dtype=bool)])
    if not keep:
        return None, None
    if len(keep) > _MAX_CONDITIONS:
        keep = [keep[i] for i in np.sort(rng.choice(len(keep), _MAX_CONDITIONS, replace=False))]
    described = treated.drop_duplicates("condition").set_index("condition")
    lines, measured, predicted, se = [], [], [], []
    for context in sorted({key[1] for key in keep}):
        own = [condition for condition, c in keep if c == context]
        questions = [Question(described["label"][i], described["dose"][i]) for i in own]
        base_mean, base_variance = model._moments(_some(controls[context], _MAX_TREATED, rng), scale)
        effects = model._mean_effects(_some(controls[context], _MAX_CONTROLS, rng), questions, scale, seed)
        for condition, effect in zip(own, effects, strict=True):
            rows = _some(groups.get_group((condition, context)).to_numpy(), _MAX_TREATED, rng)
            mean, variance = model._moments(rows, scale)
            measured.append(mean - base_mean)
            se.append(np.sqrt(variance + base_variance))
            predicted.append(effect)
            dose = described["dose"][condition]
            lines.append((described["label"][condition], dose, context, len(dose)))
    table = pd.DataFrame(lines, columns=["label", "dose", "context", "n_members"])
    return Measured(table, np.stack(measured), np.stack(se)), np.stack(predicted)


def _trained_doses(model: PerturbationModel, treated: pd.DataFrame) -> dict[str, list[float]]:
    """Doses at which each perturbation was trained, alone or in a combination."""
    found: dict[str, set[float]] = {}
    for row in treated.drop_duplicates("condition").itertuples():
        for member, dose in zip(model.vocabulary.parse(row.label), row.dose, strict=True):
            found.setdefault(member, set()).add(dose)
    return {member: sorted(doses) for member, doses in found.items()}


def _some(rows: NDArray[np.int64], n: int, rng: np.random.Generator) -> NDArray[np.int64]:
    return rows if len(rows) <= n else np.sort(rng.choice(rows, n, replace=False))
