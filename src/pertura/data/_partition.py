"""A split into training, validation and test rows, and how it is written to an AnnData."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from anndata import AnnData
from numpy.typing import ArrayLike, NDArray

Rows = NDArray[np.intp]
SEPARATOR = "+"


def _empty() -> Rows:
    return np.empty(0, dtype=np.intp)


@dataclass(frozen=True, eq=False)
class Split:
    """Rows to train on and rows to test on.

    Parameters
    ----------
    train, test
        Positions of rows; neither may be empty.
    val
        Positions of rows for early stopping and tuning; may be empty.
    name
        Unique within its protocol, e.g. ``"context=B cells"``.
    kind
        The question, e.g. ``"unseen_context"``.
    held_out
        Labels that occur in no training row (for held-out cells: none).
    seed
        Seed of the random choices; ``None`` if there were none.

    Raises
    ------
    ValueError
        If `train` or `test` is empty, a row is repeated or two parts share a row.
    """

    train: Rows
    test: Rows
    val: Rows = field(default_factory=_empty)
    name: str = ""
    kind: str = ""
    held_out: tuple[str, ...] = ()
    seed: int | None = None

    def __post_init__(self) -> None:
        """Sort and check the parts."""
        for part in ("train", "test", "val"):
            rows = np.sort(np.asarray(getattr(self, part)))
            if rows.ndim != 1 or (rows.size and not np.issubdtype(rows.dtype, np.integer)):
                raise ValueError(f"`{part}` must be a vector of row positions, got {rows.dtype} of shape {rows.shape}.")
            if (np.diff(rows) == 0).any() or (rows.size and rows[0] < 0):
                raise ValueError(f"`{part}` of split {self.name!r} has repeated or negative positions.")
            object.__setattr__(self, part, rows.astype(np.intp))
        for part in ("train", "test"):
            if not getattr(self, part).size:
                raise ValueError(f"`{part}` of split {self.name!r} is empty; hold out less, or other labels.")
        for a, b in (("train", "test"), ("train", "val"), ("val", "test")):
            shared = np.intersect1d(getattr(self, a), getattr(self, b))
            if shared.size:
                raise ValueError(f"Leak in split {self.name!r}: `{a}` and `{b}` share {shared.size} rows.")

    def check_held_out(self, labels: ArrayLike, *, separator: str | None = SEPARATOR) -> None:
        """Raise if a held-out label occurs in a training or validation row.

        Parameters
        ----------
        labels
            Label of every row, e.g. ``adata.obs["perturbation"]``.
        separator
            A label also occurs as a part of a combination, ``A+B``; ``None`` for labels that do not combine.
        """
        found = pd.Series(np.asarray(labels)[np.concatenate([self.train, self.val])].astype(str)).drop_duplicates()
        parts = set(found)
        if separator is not None:
            parts |= set(found.str.split(separator, regex=False).explode())
        leaked = sorted(set(self.held_out) & parts)
        if leaked:
            raise ValueError(f"Leak in split {self.name!r}: held-out labels {leaked[:5]} occur in training rows.")


def as_obs(
    split: Split,
    adata: AnnData | pd.Index | Sequence[str],
    *,
    key_added: str | None = None,
    overwrite: bool = False,
) -> pd.Series:
    """Split as a column: ``"train"``, ``"val"``, ``"test"``, or ``"unused"``.

    Parameters
    ----------
    split
        The split.
    adata
        The AnnData it was made of, or the names of its rows.
    key_added
        Also write the column to ``adata.obs[key_added]``.
    overwrite
        Allow an existing column to be replaced.

    Returns
    -------
    Categorical Series indexed by row name.
    """
    names = adata.obs_names if isinstance(adata, AnnData) else pd.Index(adata)
    largest = max(part.max() for part in (split.train, split.test, split.val) if part.size)
    if largest >= len(names):
        raise ValueError(
            f"`adata` has {len(names)} rows, but the split names row {largest}; was it made of other data?"
        )
    values = np.full(len(names), "unused", dtype=object)
    for part in ("train", "val", "test"):
        values[getattr(split, part)] = part
    column = pd.Series(
        pd.Categorical(values, categories=["train", "val", "test", "unused"]), index=names, name=key_added
    )
    if key_added is not None:
        if not isinstance(adata, AnnData):
            raise ValueError("`key_added` needs an AnnData to write to.")
        if adata.is_view:
            raise ValueError("`adata` is a view; writing to it would copy it. Call `.copy()` first.")
        if key_added in adata.obs and not overwrite:
            raise ValueError(f"`key_added`: adata.obs has a column {key_added!r} already; pass overwrite=True.")
        adata.obs[key_added] = column
    return column
