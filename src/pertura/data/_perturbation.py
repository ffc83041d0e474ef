"""One perturbation at given doses, and how it is encoded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ._vocabulary import Vocabulary, dose_units


@dataclass(frozen=True)
class Perturbation:
    """A perturbation at given doses.

    Attributes
    ----------
    label
        Canonical name, such as ``"A"``, ``"A+B"`` or the label of the controls.
    dose
        Dose of each member in the registered unit; empty for the control.
    """

    label: str
    dose: tuple[float, ...] = ()

    @property
    def dose_text(self) -> str:
        """Doses as text, joined like a combination."""
        return "+".join(f"{d:g}" for d in self.dose)


def tells_doses(vocabulary: Vocabulary, perturbations: Sequence[Perturbation]) -> bool:
    """Whether results name doses: where they were registered, and where one was asked without."""
    return vocabulary.has_dose or any(d != 1.0 for p in perturbations for d in p.dose)


def encode(
    vocabulary: Vocabulary, perturbation: Perturbation
) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.float32] | None]:
    """Encode one perturbation as modules read it.

    Parameters
    ----------
    vocabulary
        Perturbations that are known.
    perturbation
        What to encode.

    Returns
    -------
    codes
        Component codes of the members, ``(order,)``; -1 for the control, -2 for names outside the vocabulary.
    dose
        Doses in units of the highest registered dose of each member, ``(order,)``; 0 where none is given.
    features
        Registered features of the members, ``(order, n_features)``, 0 where a member has none; `None` without features.
    """
    members = vocabulary.parse(perturbation.label)
    codes = vocabulary.code(members)
    dose = np.zeros(codes.shape, dtype=np.float32)
    n = len(perturbation.dose)
    dose[:n] = np.asarray(perturbation.dose) / dose_units(vocabulary.max_dose)[codes[:n]]
    if vocabulary.features is None:
        return codes, dose, None
    names = [*members, *[""] * (len(codes) - len(members))]
    return codes, dose, vocabulary.feature_matrix(names)
