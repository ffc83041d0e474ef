"""The perturbations a model knows: names, combinations, doses, features.

A perturbation is not a plain categorical field, because new combinations, new doses and (where features describe them)
new perturbations are legitimate questions. The vocabulary lives in the model, is saved with it, and turns labels such
as ``"A+B"`` into the component codes and doses that modules compute with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
import pandas as pd

from ._constants import CONTROL_ONLY, DOSE_TOLERANCE, UNKNOWN

Novelty = Literal["control", "seen", "new dose", "new combination", "unseen with features", "unseen"]


@dataclass(frozen=True)
class Vocabulary:
    """Names and doses of the registered perturbations.

    Attributes
    ----------
    names
        Single perturbations, sorted; the code of a perturbation is its position. Perturbations that occur only in
        combinations are included.
    control
        Label of unperturbed cells.
    combinations
        Registered combinations, each a tuple of names in sorted order.
    delimiter
        Joins the members of a combination.
    max_dose
        Highest registered dose of each perturbation (1 where no dose was registered): the unit in which modules see
        doses.
    reference_dose
        Dose that a prediction assumes when none is asked: the most frequent registered one, the highest of equally
        frequent ones.
    doses
        All registered doses of each perturbation, ascending.
    has_dose
        Whether doses were registered.
    features
        Descriptions of perturbations, registered ones and others: rows are names, columns are features.
    """

    names: tuple[str, ...]
    control: str
    combinations: tuple[tuple[str, ...], ...] = ()
    delimiter: str = "+"
    max_dose: tuple[float, ...] = ()
    reference_dose: tuple[float, ...] = ()
    doses: tuple[tuple[float, ...], ...] = ()
    has_dose: bool = False
    features: pd.DataFrame | None = field(default=None, compare=False)

    @property
    def n_perturbations(self) -> int:
        """Number of single perturbations."""
        return len(self.names)

    @property
    def labels(self) -> list[str]:
        """Every registered label but the control: singles, applied alone or in combination, then combinations."""
        return [*self.names, *(self.delimiter.join(c) for c in self.combinations)]

    @property
    def order(self) -> int:
        """Number of members of the largest registered combination."""
        return max([1, *(len(c) for c in self.combinations)])

    def parse(self, label: str) -> tuple[str, ...]:
        """Members, sorted, without the control: ``"B+A"`` and ``"A+B"`` are one, ``"A+ctrl"`` is ``("A",)``."""
        return parse_label(label, self.control, self.delimiter)

    def canonical(self, label: str) -> str:
        """The one spelling of a label."""
        members = self.parse(label)
        return self.delimiter.join(members) if members else self.control

    def code(self, members: Sequence[str], order: int | None = None) -> np.ndarray:
        """Component codes of one perturbation, padded with -1; names outside the vocabulary get -2."""
        order = max(1, len(members)) if order is None else order
        lookup = self.lookup
        codes = np.full(order, CONTROL_ONLY, dtype=np.int64)
        codes[: len(members)] = [lookup.get(m, UNKNOWN) for m in members]
        return codes

    def novelty(self, label: str, dose: Sequence[float] = ()) -> Novelty:
        """How far a perturbation is from what was registered.

        Parameters
        ----------
        label
            Perturbation.
        dose
            Dose of each member, sorted by name; empty where doses play no part.
        """
        members = self.parse(label)
        if not members or (len(dose) and not any(dose)):
            return "control"
        lookup = self.lookup
        new = [m for m in members if m not in lookup]
        if new:
            described = all(m in self._described for m in new)
            return "unseen with features" if described else "unseen"
        if len(members) > 1 and members not in self._registered_combinations:
            return "new combination"
        if self.has_dose and any(
            not np.isclose(d, self.doses[lookup[m]], rtol=DOSE_TOLERANCE, atol=0.0).any()
            for m, d in zip(members, dose, strict=False)
        ):
            return "new dose"
        return "seen"

    def feature_matrix(self, names: Sequence[str]) -> np.ndarray:
        """Features of the named perturbations, shape ``(len(names), n_features)``; zero where a name has none."""
        if self.features is None:
            raise ValueError("no perturbation features were registered")
        values, index = self._feature_values
        at = np.array([index.get(name, -1) for name in names], dtype=np.int64)
        result, known = np.zeros((len(at), values.shape[1]), dtype=np.float32), at >= 0
        result[known] = values[at[known]]
        return result

    @cached_property
    def _feature_values(self) -> tuple[np.ndarray, dict[str, int]]:
        """Features as numbers, 0 for missing ones, and the row of each name."""
        values = self.features.fillna(0.0).to_numpy(np.float32)
        return values, {name: row for row, name in enumerate(self.features.index)}

    @cached_property
    def lookup(self) -> dict[str, int]:
        """Code of each name."""
        return {name: code for code, name in enumerate(self.names)}

    @cached_property
    def _registered_combinations(self) -> frozenset[tuple[str, ...]]:
        return frozenset(self.combinations)

    @cached_property
    def _described(self) -> frozenset[str]:
        return frozenset() if self.features is None else frozenset(self.features.index)

    def to_registry(self) -> dict[str, Any]:
        """Plain containers, which pickle and print well."""
        return {
            "names": np.array(self.names, dtype=object),
            "control": self.control,
            "combinations": [list(c) for c in self.combinations],
            "delimiter": self.delimiter,
            "max_dose": list(self.max_dose),
            "reference_dose": list(self.reference_dose),
            "doses": [list(d) for d in self.doses],
            "has_dose": self.has_dose,
            "features": self.features,
        }

    @classmethod
    def from_registry(cls, state: dict[str, Any]) -> Vocabulary:
        """Inverse of :meth:`to_registry`."""
        return cls(
            names=tuple(str(n) for n in state["names"]),
            control=state["control"],
            combinations=tuple(tuple(c) for c in state["combinations"]),
            delimiter=state["delimiter"],
            max_dose=tuple(state["max_dose"]),
            reference_dose=tuple(state["reference_dose"]),
            doses=tuple(tuple(d) for d in state["doses"]),
            has_dose=state["has_dose"],
            features=state["features"],
        )


def dose_units(max_dose: Sequence[float] | np.ndarray) -> np.ndarray:
    """Units of relative doses by component code: each highest registered dose.

    The codes -2 and -1 fall on the padding: a perturbation outside the vocabulary is measured by what is usual within it.
    """
    max_dose = np.asarray(max_dose, dtype=np.float64)
    return np.append(max_dose, [np.median(max_dose) if len(max_dose) else 1.0, 1.0])


def parse_label(label: str, control: str, delimiter: str = "+") -> tuple[str, ...]:
    """Members of a perturbation label without the control, sorted and unique."""
    if label == control:
        return ()
    return tuple(sorted({part.strip() for part in str(label).split(delimiter)} - {control, ""}))


def member_doses(labels: pd.Series, doses: pd.Series, control: str, delimiter: str) -> np.ndarray:
    """Doses of each cell's members, sorted by name, shape ``(n_cells, order)``, padded with 0.

    Numeric doses hold for every member; text such as ``"1+0.5"`` gives the members, as the label spells them, their
    own.
    """
    members = {label: parse_label(label, control, delimiter) for label in labels.unique()}
    order = max([1, *(len(m) for m in members.values())])
    n_members = labels.map(lambda label: len(members[label])).to_numpy()
    if pd.api.types.is_numeric_dtype(doses):
        filled = np.arange(order)[None, :] < n_members[:, None]
        return np.where(filled, doses.to_numpy(np.float64)[:, None], 0.0)
    code, pairs = pd.factorize(pd.MultiIndex.from_arrays([labels.to_numpy(), doses.astype(str).to_numpy()]))
    rows = np.zeros((len(pairs), order))
    for row, (label, text) in zip(rows, pairs, strict=True):
        spelled = [part.strip() for part in label.split(delimiter)]
        numbers = [float(part) for part in text.split(delimiter)]
        own = dict(zip(spelled, numbers * len(spelled) if len(numbers) == 1 else numbers, strict=True))
        row[: len(members[label])] = [own[m] for m in members[label]]
    return rows[code]


def build_vocabulary(
    labels: pd.Series,
    control: str,
    *,
    delimiter: str = "+",
    doses: pd.Series | None = None,
    features: pd.DataFrame | None = None,
) -> Vocabulary:
    """Vocabulary of the given cells.

    Parameters
    ----------
    labels
        One label per cell.
    control
        Label of unperturbed cells.
    delimiter
        Joins the members of a combination.
    doses
        One dose per cell, or `None`: a number holds for every member, text such as ``"1+0.5"`` gives the members, as the
        label spells them, their own.
    features
        Rows are perturbations.
    """
    labels = labels.astype(str)
    members = [parse_label(label, control, delimiter) for label in labels.unique()]
    names = sorted({m for label in members for m in label})
    known: dict[str, pd.Series] = {}
    if doses is not None:
        matrix = member_doses(labels, doses, control, delimiter)
        for slot in range(matrix.shape[1]):
            name = labels.map(lambda label, s=slot: dict(enumerate(parse_label(label, control, delimiter))).get(s))
            for key, own in pd.Series(matrix[:, slot]).groupby(name.to_numpy()):
                counts = own[own > 0].value_counts()
                known[key] = known[key].add(counts, fill_value=0) if key in known else counts
    tables = [known[n] if n in known and len(known[n]) else pd.Series([1], index=[1.0]) for n in names]
    return Vocabulary(
        names=tuple(names),
        control=control,
        combinations=tuple(sorted({m for m in members if len(m) > 1})),
        delimiter=delimiter,
        max_dose=tuple(float(max(t.index)) for t in tables),
        reference_dose=tuple(float(max(t.index[t == t.max()])) for t in tables),
        doses=tuple(tuple(sorted(map(float, t.index))) for t in tables),
        has_dose=doses is not None,
        features=features,
    )


def encode_cells(
    vocabulary: Vocabulary, labels: pd.Series, doses: pd.Series | None, order: int | None = None
) -> np.ndarray:
    """Component codes and doses of cells, side by side: shape ``(n_cells, 2 * order)``, float32.

    Doses are in units of the highest registered dose of the perturbation; without doses a member's is 1.
    """
    labels = labels.astype(str)
    code, unique = pd.factorize(labels)
    members = [vocabulary.parse(label) for label in unique]
    width = max([order or 1, *(len(m) for m in members)])
    codes = np.stack([vocabulary.code(m, width) for m in members])[code]
    amounts = np.where(codes == CONTROL_ONLY, 0.0, 1.0)
    if doses is not None:
        raw = member_doses(labels, doses, vocabulary.control, vocabulary.delimiter)
        amounts[:, : raw.shape[1]] = raw / dose_units(vocabulary.max_dose)[codes[:, : raw.shape[1]]]
    return np.concatenate([codes, amounts], axis=1).astype(np.float32)
