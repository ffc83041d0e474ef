"""Keys under which the registered fields reach a minibatch."""

from __future__ import annotations

from typing import NamedTuple

from scvi import REGISTRY_KEYS


class _Keys(NamedTuple):
    """Registry keys; those that scvi-tools has keep its name."""

    X: str = REGISTRY_KEYS.X_KEY
    BATCH: str = REGISTRY_KEYS.BATCH_KEY
    PERTURBATION: str = "perturbation"
    CONTEXT: str = "context"
    QC: str = "qc"
    LIBRARY: str = "library"  # computed per minibatch, not registered


KEYS = _Keys()

CONTROL_ONLY = -1  # component code of an empty slot: nothing was done
EFFECTS = "effects"  # kind of values that are differences from a control of 0
UNKNOWN = -2  # component code of a perturbation that the model's vocabulary does not hold

DOSE_TOLERANCE = 1e-4  # relative difference up to which two doses are one: cells hold them as float32
