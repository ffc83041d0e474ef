"""The former place of :mod:`pertura.effects._table`."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scvi.data import AnnDataManager

from pertura.effects._table import ConditionMeans as Pseudobulk
from pertura.effects._table import ConditionTable

__all__ = ["Pseudobulk", "pseudobulk"]


def pseudobulk(manager: AnnDataManager, rows: NDArray[np.int64], **sizes: Any) -> Pseudobulk:
    """Means of conditions and controls."""
    return ConditionTable.measure(manager, rows, **sizes).condition_means()
