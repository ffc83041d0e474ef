"""Arguments of :func:`pertura.datasets.simulate` and their checks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from numbers import Integral, Real
from typing import Any, Literal

import numpy as np

_INTEGERS = {
    "n_cells_per_condition": 1,
    "n_control_cells": 1,
    "n_genes": 2,
    "n_regulators": 1,
    "n_perturbations": 1,
    "n_contexts": 1,
    "n_unresponsive_contexts": 0,
    "n_biomarkers": 0,
    "n_artefact_genes": 0,
    "n_targets": 1,
    "n_drug_classes": 0,
    "n_batches": 1,
    "n_truth_cells": 2,
    "seed": 0,
    "cell_seed": 0,
}
_MAY_BE_NONE = {"n_control_cells", "n_targets", "cell_seed"}

_Rule = tuple[Callable[[float], bool], str]
_NOT_NEGATIVE: _Rule = (lambda v: v >= 0, "a finite number, zero or more")
_POSITIVE: _Rule = (lambda v: v > 0, "a finite number above zero")
_NUMBERS: dict[str, _Rule] = {
    "network_density": (lambda v: 0 < v <= 1, "a share of regulator-gene pairs in (0, 1]"),
    "network_gain": (lambda v: 0 < v < 1, "in (0, 1), so that the propagated shifts stay bounded"),
    "frac_qc_failed": (lambda v: 0 <= v < 1, "a share of cells in [0, 1)"),
    "qc_library_factor": (lambda v: 0 < v <= 1, "a factor in (0, 1]"),
    "library_size": _POSITIVE,
    "hill": _POSITIVE,
} | dict.fromkeys(
    (
        "effect_size",
        "interaction",
        "response_slope",
        "baseline_sd",
        "context_sd",
        "state_sd",
        "batch_sd",
        "library_size_sd",
        "dispersion",
        "artefact_size",
        "noise_sd",
    ),
    _NOT_NEGATIVE,
)
_CHOICES = {"perturbation_type": ("knockout", "activation", "drug"), "modality": ("counts", "log")}


def require(ok: bool, name: str, found: Any, need: str) -> None:
    if not ok:
        raise ValueError(f"`{name}` is {found!r}; it must be {need}.")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Arguments of :func:`pertura.datasets.simulate`, checked; that docstring says what they mean."""

    n_cells_per_condition: int
    n_control_cells: int | None
    n_genes: int
    n_regulators: int
    network_density: float
    network_gain: float
    acyclic: bool
    perturbation_type: Literal["knockout", "activation", "drug"]
    n_perturbations: int
    effect_size: float
    n_targets: int | None
    n_drug_classes: int
    combinations: int | Sequence[str | tuple[str, str]]
    interaction: float
    doses: Sequence[float] | None
    hill: float
    n_contexts: int
    n_unresponsive_contexts: int
    n_biomarkers: int
    response_slope: float
    baseline_sd: float
    context_sd: float
    state_sd: float
    n_batches: int
    batch_sd: float
    frac_qc_failed: float
    n_artefact_genes: int
    artefact_size: float
    qc_library_factor: float
    modality: Literal["counts", "log"]
    library_size: float
    library_size_sd: float
    dispersion: float
    noise_sd: float
    paired: bool
    n_truth_cells: int
    seed: int
    cell_seed: int | None

    def __post_init__(self) -> None:
        """Check every argument on its own, then against the others."""
        for name, low in _INTEGERS.items():
            value = getattr(self, name)
            if value is None and name in _MAY_BE_NONE:
                continue
            integer = isinstance(value, Integral) and not isinstance(value, bool)
            require(integer and value >= low, name, value, f"an integer of at least {low}")
        for name, (rule, need) in _NUMBERS.items():
            value = getattr(self, name)
            number = isinstance(value, Real) and not isinstance(value, bool) and np.isfinite(value)
            require(number and rule(value), name, value, need)
        for name, choices in _CHOICES.items():
            require(getattr(self, name) in choices, name, getattr(self, name), f"one of {choices}")
        for name in ("acyclic", "paired"):
            require(isinstance(getattr(self, name), bool), name, getattr(self, name), "True or False")
        self._check_together()
        self._check_doses()

    def _check_together(self) -> None:
        room = self.n_genes - self.n_biomarkers - self.n_artefact_genes
        require(
            self.n_regulators <= room,
            "n_regulators",
            self.n_regulators,
            f"at most {room}, what `n_genes` leaves beside `n_biomarkers` and `n_artefact_genes`",
        )
        require(
            self.n_unresponsive_contexts <= self.n_contexts,
            "n_unresponsive_contexts",
            self.n_unresponsive_contexts,
            f"at most `n_contexts` ({self.n_contexts})",
        )
        if self.perturbation_type == "drug":
            require(
                (self.n_targets or 1) <= self.n_regulators,
                "n_targets",
                self.n_targets,
                f"at most `n_regulators` ({self.n_regulators})",
            )
            require(
                self.n_drug_classes <= self.n_perturbations,
                "n_drug_classes",
                self.n_drug_classes,
                f"at most `n_perturbations` ({self.n_perturbations})",
            )
        else:
            only_drugs = "left alone unless perturbation_type='drug': a gene perturbation has one target"
            require(self.n_targets in (None, 1), "n_targets", self.n_targets, only_drugs)
            require(self.n_drug_classes == 0, "n_drug_classes", self.n_drug_classes, only_drugs)
            require(
                self.n_perturbations <= self.n_regulators,
                "n_perturbations",
                self.n_perturbations,
                f"at most `n_regulators` ({self.n_regulators}), as every one targets its own regulator",
            )

    def _check_doses(self) -> None:
        if self.doses is None:
            return
        need = "None or a list of different finite numbers, zero or more, at least one of them positive"
        listed = not isinstance(self.doses, str) and np.iterable(self.doses)
        require(listed and all(isinstance(u, Real) for u in self.doses), "doses", self.doses, need)
        found = np.asarray(self.doses, dtype=float)
        different = len(np.unique(found)) == len(found)
        good = np.isfinite(found).all() and (found >= 0).all() and (found > 0).any() and different
        require(bool(good), "doses", self.doses, need)

    @property
    def targets_per_drug(self) -> int:
        """Number of targets a drug or drug class hits; three where the user did not say."""
        return self.n_targets or min(3, self.n_regulators)

    def storable(self) -> dict[str, Any]:
        """Give the settings in a form that an h5ad file can hold; those that are None are left out."""
        stored = {name: value for name, value in asdict(self).items() if value is not None}
        if not isinstance(self.combinations, Integral):
            stored["combinations"] = np.array(
                [c if isinstance(c, str) else "+".join(c) for c in self.combinations], dtype=object
            )
        if self.doses is not None:
            stored["doses"] = np.asarray(self.doses, dtype=float)
        return stored
