"""The library of each cell: the number of all its counts, those of genes that are not registered included.

Scale ``"log1p"`` is per 10,000 of it. It is one of, in this order,

* the registered size factors: total counts of whole cells, or relative factors in units of the counts of the registered genes;
* what a log-normalized ``X`` beside the registered counts says: where x = log1p(t c / L) of a gene with c counts, L = t c / expm1(x);
* the total counts of the registered genes.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import sparse

if TYPE_CHECKING:
    from ._cells import Expression, Rows

logger = logging.getLogger(__name__)

LIBRARY_COLUMN = "_scvi_library"
TARGET_SUM = 1e4
_CHUNK = 4096
_SAMPLE = 2000  # cells that tell how X was made
_PROBES, _MIN_PROBES = 64, 20  # cells whose libraries must be whole numbers
_MAX_TARGET = 200_000
_MIN_REST = 1e-3  # share of the library that is worth a component of its own
_TOTALS = ("total_counts", "n_counts", "nCount_RNA")  # what scanpy and Seurat call them


@dataclass(frozen=True, eq=False)
class Library:
    """Library of any cells, where their counts are read.

    Attributes
    ----------
    state
        What registration found, see :func:`find_library`.
    values
        Library of every cell where it is known, ``(n_cells,)``.
    normalized
        Log-normalized expression from which it is recovered otherwise; its target sum is `target_sum`.
    """

    state: dict[str, Any]
    values: NDArray[np.float64] | None = None
    normalized: Expression | None = None
    target_sum: float = TARGET_SUM

    @classmethod
    def registered(cls, state: dict[str, Any], obs: pd.DataFrame) -> Library:
        """Of cells whose ``obs`` has what the state refers to."""
        if state["source"] == "X":
            return cls(state, obs[LIBRARY_COLUMN].to_numpy(np.float64))
        if state["source"] == "size_factor":
            return cls(state, obs[state["key"]].to_numpy(np.float64) * (state["unit"] or 1.0))
        return cls(state)

    @classmethod
    def of_query(
        cls, state: dict[str, Any], expression: Expression, x: Expression | None, obs: Any, rows: Rows
    ) -> Library:
        """Of cells that a model is asked about, by the rule with which its own were registered.

        Raises
        ------
        ValueError
            Where the rule needs a log-normalized ``X`` and there is none.
        """
        if state["source"] != "X":
            return cls.registered(state, obs)
        at = np.sort(rows)[np.unique(np.linspace(0, len(rows) - 1, _SAMPLE).astype(np.int64))]
        found = None if x is None else _made_of(expression.stored(at), x.stored(at), state["target_sum"])
        if found is None or found.target_sum is None or found.whole:
            what = "is not log1p of normalized counts"
            if found is not None and found.whole:
                what = "was normalized after genes had been selected"
            raise ValueError(
                f"`adata`: the model reads the libraries of cells from a log-normalized `adata.X`, but this one {what}. "
                "Run `sc.pp.normalize_total(adata, target_sum=1e4)` and `sc.pp.log1p(adata)` on all genes, before "
                "selecting some, and keep the counts in the registered layer."
            )
        return cls(state, normalized=x, target_sum=found.target_sum)

    def of(self, rows: Rows, counts: Any) -> NDArray[np.float64]:
        """Library of some cells, ``(n,)``; 1 for data that are not counts.

        Parameters
        ----------
        rows
            Their rows.
        counts
            Their counts of the model's genes, ``(n, n_genes)``, sparse or dense.
        """
        if self.state["source"] == "none":
            return np.ones(len(rows))
        kept = np.asarray(counts.sum(1), dtype=np.float64).ravel()
        if self.values is not None:
            found = self.values[rows]
            if self.state["source"] == "X" or self.state["unit"] is not None:
                return found
            wrong, what = found < 0.999 * kept, f"`size_factor_key`: the totals in `adata.obs[{self.state['key']!r}]`"
        elif self.normalized is not None:
            unit, consistent = unit_of_counts(counts, self.normalized.stored(rows))
            # totals of counts are whole numbers, but for the precision of X
            found = np.where(consistent, np.round(self.target_sum / unit), self.state["median"])
            wrong = (kept > 0) & (~consistent | (found < 0.999 * kept))
            what = f"`adata`: the libraries with which `adata.X` is log1p of counts per {self.target_sum:g}"
        else:
            return np.maximum(kept, 1.0)
        if wrong.any():
            raise ValueError(
                f"{what} do not fit the counts of the registered genes in {int(wrong.sum())} of {len(wrong)} cells that were read: "
                "they are smaller, or differ between genes. Make both of the same cells, before genes are selected: totals by "
                "`sc.pp.calculate_qc_metrics`, X by `sc.pp.normalize_total(adata, target_sum=1e4)` and `sc.pp.log1p`."
            )
        return np.maximum(found, kept)


def find_library(
    expression: Expression, x: Expression | None, obs: pd.DataFrame, layer: str | None, size_factor_key: str | None
) -> tuple[dict[str, Any], NDArray[np.float64] | None]:
    """How the libraries of cells are found.

    Parameters
    ----------
    expression, x
        Registered counts, and ``X`` where that is something else.
    obs
        Annotation of the cells.
    layer
        Name of the registered layer, for messages.
    size_factor_key
        Column of `obs`.

    Returns
    -------
    state
        ``source`` (``"size_factor"``, ``"X"``, ``"total"``, or ``"none"`` for data that are not counts), ``key``, ``unit`` (counts per unit
        of relative size factors, else `None`), ``target_sum`` of ``X``, ``median`` library, median ``share`` of the registered genes
        in it, and ``rest``, whether counts of other genes are in it.
    values
        Libraries, ``(n_cells,)``; `None` where they are total counts of the registered genes.
    """
    state = {"source": "total", "key": size_factor_key, "unit": None, "target_sum": TARGET_SUM, "rest": False}
    if expression.kind != "counts":
        return {**state, "source": "none"}, None
    if size_factor_key is not None:
        values, kept = obs[size_factor_key].to_numpy(np.float64), stream(Library(state), expression, len(obs))
        state["source"] = "size_factor"
        if (values < 0.999 * kept).any():
            state["unit"] = _unit_of_relative(values, kept, size_factor_key)
        values = np.maximum(values, kept) if state["unit"] is None else values * state["unit"]
        return _with_share(state, values, kept), values
    totals = [c for c in _TOTALS if c in obs and pd.api.types.is_numeric_dtype(obs[c])]
    if x is None and not totals:
        return state, None
    rows = np.unique(np.linspace(0, len(obs) - 1, _SAMPLE).astype(np.int64))
    counts = expression.stored(rows)
    made = None if x is None else _made_of(counts, x.stored(rows), None)
    if made is not None:
        _warn_of_x(made, layer)
    if made is not None and made.target_sum is not None and not made.whole:
        kept = stream(Library(state), expression, len(obs))
        state = {**state, "source": "X", "target_sum": made.target_sum, "median": made.median}
        values = stream(Library(state, normalized=x, target_sum=made.target_sum), expression, len(obs))
        return _with_share(state, values, kept), values
    if made is None or not made.whole:
        _warn_of_totals(obs[totals].iloc[rows], np.asarray(counts.sum(1)).ravel())
    return state, None


def _warn_of_x(made: _Made, layer: str | None) -> None:
    if made.target_sum is None:
        logger.warning(
            "`layer`: `adata.X` is not log1p of normalized counts of `adata.layers[%r]`, or its target sum can not be told: predictions "
            "are log1p of counts per 10,000 of the registered genes. If these are not all genes, register the total counts of "
            "whole cells as `size_factor_key`.",
            layer,
        )
    elif abs(made.target_sum / TARGET_SUM - 1.0) > 0.01:
        logger.warning(
            "`layer`: `adata.X` is log1p of counts per %g, predictions are log1p of counts per 10,000. To compare them, make X "
            "with `sc.pp.normalize_total(adata, target_sum=1e4)`.",
            made.target_sum,
        )


def _warn_of_totals(obs: pd.DataFrame, kept: NDArray[np.float64]) -> None:
    """Say where a column looks like the totals of whole cells."""
    larger = [c for c in obs if (obs[c] >= kept).all() and obs[c].median() > 1.05 * np.median(kept)]
    if larger:
        logger.warning(
            "`size_factor_key`: `adata.obs[%r]` is larger than the counts of the registered genes. If it is the total of whole "
            "cells, register it, so that predictions are per 10,000 of these.",
            larger[0],
        )


def describe(state: dict[str, Any], n_genes: int) -> str:
    """Which library was taken, in words."""
    total = f"total counts of the {n_genes:,} registered genes"
    if state["source"] in ("none", "total"):
        return total if state["source"] == "total" else "none (not counts)"
    share = f"median {state['median']:,.0f} counts, {state['share']:.0%} of them of the {n_genes:,} registered genes"
    if state["source"] == "X":
        return f"total counts of whole cells, recovered from the log-normalized X ({share})"
    if state["unit"] is None:
        return f"total counts of whole cells, obs[{state['key']!r}] ({share})"
    return f"relative size factors, obs[{state['key']!r}], times {state['unit']:,.4g}: on average the {total}"


def stream(library: Library, expression: Expression, n_cells: int) -> NDArray[np.float64]:
    """Library of all cells, some thousand at a time, ``(n_cells,)``."""
    parts = (np.arange(start, min(start + _CHUNK, n_cells)) for start in range(0, n_cells, _CHUNK))
    return np.concatenate([library.of(rows, expression.stored(rows)) for rows in parts])


def unit_of_counts(counts: Any, x: Any) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """What one count of each cell is before the logarithm.

    Parameters
    ----------
    counts
        ``(n_cells, n_genes)``, sparse or dense.
    x
        Log-normalized expression of the same genes.

    Returns
    -------
    unit, consistent
        Median over the genes of a cell with counts, not a number without any, ``(n_cells,)``; and whether 99 % of its genes agree with it.
    """
    counts = sparse.csr_matrix(counts, dtype=np.float64)
    counts.eliminate_zeros()
    n = np.diff(counts.indptr)
    cell = np.repeat(np.arange(len(n)), n)
    x = sparse.csr_matrix(x) if sparse.issparse(x) else np.asarray(x)
    unit = np.expm1(np.asarray(x[cell, counts.indices], dtype=np.float64).ravel()) / counts.data
    ordered = unit[np.lexsort((unit, cell))]
    has = n > 0
    median = np.full(len(n), np.nan)
    median[has] = ordered[counts.indptr[:-1][has] + (n[has] - 1) // 2]
    agrees = np.abs(unit - median[cell]) <= 1e-3 * median[cell]
    share = np.bincount(cell, agrees, len(n)) / np.maximum(n, 1)
    uncounted = np.asarray((x != 0).sum(1)).ravel() - np.bincount(cell, unit != 0, len(n))
    return median, has & (median > 0) & (share >= 0.99) & (uncounted <= 0.01 * n)


@dataclass(frozen=True)
class _Made:
    """How X was made of counts: its target sum (`None`: not by normalizing and log1p), whether from these genes alone, and the median library."""

    target_sum: float | None
    whole: bool = False
    median: float = 1.0


def _made_of(counts: Any, x: Any, expected: float | None) -> _Made | None:
    """How X was made of the counts; `None` where it is something else, such as counts, or scaled."""
    values = x.data if sparse.issparse(x) else np.asarray(x)
    if (values < 0).any() or (values == np.round(values)).all():
        return None
    unit, consistent = unit_of_counts(counts, x)
    kept = np.asarray(counts.sum(1), dtype=np.float64).ravel()
    filled = kept > 0
    if not filled.any() or consistent[filled].mean() < 0.99:
        return _Made(None)
    unit, kept = unit[consistent], kept[consistent]
    sums = unit * kept
    if expected is None and np.ptp(sums) <= 2e-3 * np.median(sums) and len(sums) > 1:
        return _Made(float(f"{np.median(sums):.5g}"), whole=True)
    target = _target_sum(unit, sums.max(), expected)
    if target is None:
        return _Made(None)
    return _Made(target, bool(np.median(kept * unit) > 0.9995 * target), float(np.median(target / unit)))


def _target_sum(unit: NDArray[np.float64], least: float, expected: float | None) -> float | None:
    """The smallest target sum with which libraries are whole numbers, as totals of counts are.

    scanpy's default, the median of totals, is a multiple of a half. Where libraries are too large or too few to tell, the usual one.
    """
    usual = TARGET_SUM if expected is None else expected
    plausible = usual >= 0.999 * least
    # the precision of float32 tells apart whole numbers up to here
    probes = np.sort(unit)[::-1]
    probes = probes[usual / probes < 5e4]
    probes = probes[np.unique(np.linspace(0, len(probes) - 1, _PROBES).astype(np.int64))] if len(probes) else probes
    if len(probes) < _MIN_PROBES:
        return usual if plausible else None
    steps = np.arange(np.ceil(2 * least * 0.999), 2 * _MAX_TARGET) / 2
    candidates = np.concatenate([steps, [1e6, usual] if plausible else [1e6]])
    for some in (probes[:: len(probes) // 4], probes):  # few probes leave few candidates
        libraries = candidates / some[:, None]
        off = np.abs(libraries - np.round(libraries)) - (0.01 + 1e-6 * libraries)
        candidates = candidates[(off < 0).mean(0) >= 0.95]
    if not len(candidates):
        return None
    near = candidates[candidates <= candidates.min() * 1.01]
    libraries = near / probes[:, None]
    return float(near[np.abs(libraries - np.round(libraries)).mean(0).argmin()])


def _unit_of_relative(values: NDArray[np.float64], kept: NDArray[np.float64], key: str) -> float:
    """Counts per unit of relative size factors; raises where they are totals, but too small."""
    middle = float(np.median(values))
    if middle >= 10 and middle >= 0.1 * np.median(kept):
        below = int((values < 0.999 * kept).sum())
        raise ValueError(
            f"`size_factor_key`: `adata.obs[{key!r}]` (median {middle:,.4g}) is smaller than the counts of the registered genes (median "
            f"{np.median(kept):,.4g}) in {below} of {len(kept)} cells. Register total counts of whole cells, taken before genes were "
            "selected, or relative factors, whose median is near 1."
        )
    return float(np.median(kept / values)) or 1.0


def _with_share(state: dict[str, Any], library: NDArray[np.float64], kept: NDArray[np.float64]) -> dict[str, Any]:
    rest = state["unit"] is None and bool((library - kept).sum() >= _MIN_REST * library.sum())
    share = float(np.median(kept / np.maximum(library, 1.0)))
    return {**state, "median": float(np.median(library)), "share": share, "rest": rest}
