"""One store of results: a tidy table that grows run by run, in a CSV file if one is named."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

_TEXT = ("dataset", "split", "held_out", "perturbation", "dose", "context", "controls", "model", "metric")
_TEXT += ("settings", "versions")
COLUMNS = [
    "dataset",
    "split",
    "held_out",
    "perturbation",
    "dose",
    "context",
    "controls",
    "model",
    "seed",
    "metric",
    "value",
    "n_cells",
    "seconds",
    "peak_mb",
    "settings",
    "versions",
]


class Results:
    """Scores of runs, one row per value.

    A run is named by any of the columns, e.g. ``dataset="kang", model="PertVAE", seed=0``. What a run has no value for
    is empty (text) or NaN (numbers).

    Parameters
    ----------
    path
        CSV file that is read if it exists and written after every run; `None` keeps the table in memory.

    Attributes
    ----------
    table
        DataFrame with the columns ``dataset``, ``split`` (the task), ``held_out`` (the split's name), ``perturbation``,
        ``dose``, ``context``, ``controls`` (shared by predictions and truth, or halves), ``model``, ``seed``, ``metric``, ``value``, ``n_cells``, ``seconds``, ``peak_mb``,
        ``settings`` (fingerprint of how the run was made) and ``versions`` of pertura, scvi-tools and torch.

    Raises
    ------
    ValueError
        If the file lacks one of the columns.

    Examples
    --------
    >>> results = Results("out.csv")
    >>> run = {"dataset": "kang", "model": "PertVAE", "seed": 0}
    >>> if not results.has(run):
    ...     results.add([{"metric": "mse", "value": 0.1}], run)
    """

    def __init__(self, path: str | Path | None = None) -> None:
        self.path = None if path is None else Path(path)
        self.table, self._rewrite = pd.DataFrame(columns=COLUMNS), False
        if self.path is not None and self.path.exists():
            # a perturbation may be called "NA"; an empty number is missing
            numbers = {c: [""] for c in COLUMNS if c not in _TEXT}
            table = pd.read_csv(self.path, dtype=dict.fromkeys(_TEXT, str), keep_default_na=False, na_values=numbers)
            self._rewrite = "controls" not in table  # a file of an older version
            table = table.assign(controls="") if self._rewrite else table
            lacking = [c for c in COLUMNS if c not in table]
            if lacking:
                raise ValueError(f"`out`: {str(self.path)!r} is no benchmark result, it lacks {lacking}.")
            self.table = table[COLUMNS].astype(dict.fromkeys(_TEXT, object))

    def has(self, run: Mapping[str, Any], *, settings: str = "", metrics: Sequence[str] = ()) -> bool:
        """Whether a run is in the table.

        Parameters
        ----------
        run
            Columns and values that name the run.
        settings
            Fingerprint of how it would be made now.
        metrics
            Metrics that it must have.

        Raises
        ------
        ValueError
            If the run was made with other settings.
        """
        found = self.table[self._of(run)]
        if found.empty:
            return False
        if (found["settings"] != settings).any():
            raise ValueError(
                f"`out`: {str(self.path)!r} has {dict(run)} made with other settings or data. Delete the file, or name another."
            )
        return set(metrics) <= set(found["metric"])

    def add(self, rows: pd.DataFrame | Sequence[Mapping[str, Any]], run: Mapping[str, Any], **same: Any) -> None:
        """Add a run, in place of an older one of the same name, and write the file.

        Parameters
        ----------
        rows
            Values, with at least ``metric`` and ``value``.
        run
            Columns and values that name the run.
        **same
            Further columns that are the same in all rows, e.g. ``settings`` and ``seconds``.
        """
        new = pd.DataFrame(rows).assign(**run, **same, versions=_versions())
        unknown = [c for c in new if c not in COLUMNS]
        if unknown:
            raise ValueError(f"`rows`: there is no column {unknown[0]!r}; columns are {COLUMNS}.")
        new = new.reindex(columns=COLUMNS).astype(dict.fromkeys(_TEXT, object)).fillna(dict.fromkeys(_TEXT, ""))
        new = new.astype(dict.fromkeys(("value", "n_cells", "seconds", "peak_mb"), float))
        old = self.table[~self._of(run)]
        replaced = len(old) < len(self.table)
        self.table = pd.concat([old, new], ignore_index=True) if len(old) else new
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            append = self.path.exists() and not replaced and not self._rewrite
            self._rewrite = False
            (new if append else self.table).to_csv(
                self.path, mode="a" if append else "w", header=not append, index=False
            )

    def select(self, **values: Any) -> pd.DataFrame:
        """Rows with these values of columns, each a value or a list of those allowed."""
        keep = np.ones(len(self.table), dtype=bool)
        for column, wanted in values.items():
            keep &= self.table[column].isin([wanted] if isinstance(wanted, str | int) else list(wanted)).to_numpy()
        return self.table[keep].astype({"value": float, "seed": int}).reset_index(drop=True)

    def _of(self, run: Mapping[str, Any]) -> np.ndarray:
        mask = np.ones(len(self.table), dtype=bool)
        for column, value in run.items():
            mask &= (self.table[column] == value).to_numpy()
        return mask


def _versions() -> str:
    return ", ".join(f"{name} {version(name)}" for name in ("pertura", "scvi-tools", "torch"))
