"""Checks of what a user hands to ``setup_anndata``: each error names the argument, what was found and what to do."""

from __future__ import annotations

import logging
from difflib import get_close_matches
from typing import Any, Literal

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse

from ._collection import shards_of

logger = logging.getLogger(__name__)

DataKind = Literal["counts", "continuous"]
_CHECK_ROWS = 4096


def _names(values: Any, limit: int = 8) -> str:
    values = [str(v) for v in values]
    return ", ".join(values[:limit]) + (f", … ({len(values)} in all)" if len(values) > limit else "")


def check_obs_key(adata: AnnData, argument: str, key: str | None) -> None:
    """Raise unless `key` is a column of ``obs`` without missing values."""
    if key is None:
        return
    if not isinstance(key, str):
        raise ValueError(f"`{argument}` must be the name of a column of `adata.obs`, got {key!r}.")
    if key not in adata.obs:
        close = get_close_matches(key, map(str, adata.obs.columns), n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(
            f"`{argument}`: {key!r} is not a column of `adata.obs`, which has {_names(adata.obs.columns)}.{hint}"
        )
    missing = int(adata.obs[key].isna().sum())
    if missing:
        raise ValueError(
            f"`{argument}`: {missing} of {adata.n_obs} cells have no value in `adata.obs[{key!r}]`. "
            "Fill them in or drop those cells."
        )


def check_perturbations(
    adata: AnnData, perturbation_key: str, control: str, delimiter: str, effects: bool = False
) -> None:
    """Raise unless there are control cells and at least one perturbation; rows of effects have no controls."""
    check_obs_key(adata, "perturbation_key", perturbation_key)
    if not isinstance(delimiter, str) or not delimiter:
        raise ValueError(f"`delimiter` must be a non-empty string such as '+', got {delimiter!r}.")
    counts = adata.obs[perturbation_key].astype(str).value_counts()
    counts = counts[counts > 0]
    if effects:
        if control in counts.index:
            raise ValueError(
                f"`values`: effects are differences from the control, but {counts[control]} rows of "
                f"`adata.obs[{perturbation_key!r}]` are {control!r} themselves. Drop them, or use values='expression'."
            )
        return
    if not isinstance(control, str) or control not in counts.index:
        close = get_close_matches(str(control), list(counts.index), n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(
            f"`control`: no cell of `adata.obs[{perturbation_key!r}]` is {control!r}; it holds {_names(counts.index)}. "
            f"Name the label of the unperturbed cells.{hint}"
        )
    if len(counts) < 2:
        raise ValueError(
            f"`perturbation_key`: every cell of `adata.obs[{perturbation_key!r}]` is {control!r}. "
            "There is no perturbation to learn from: add perturbed cells or name another column."
        )


def check_doses(adata: AnnData, dose_key: str | None, perturbation_key: str, control: str, delimiter: str) -> None:
    """Raise unless every dose is a finite number >= 0 (or several, joined by the delimiter, for a combination)."""
    if dose_key is None:
        return
    check_obs_key(adata, "dose_key", dose_key)
    column = adata.obs[dose_key]
    if not pd.api.types.is_numeric_dtype(column):
        pairs = pd.DataFrame(
            {"label": adata.obs[perturbation_key].astype(str), "dose": column.astype(str)}
        ).drop_duplicates()
        parts = pairs["dose"].str.split(delimiter, regex=False)
        numbers = pd.to_numeric(parts.explode(), errors="coerce")
        if numbers.isna().any():
            raise ValueError(
                f"`dose_key`: `adata.obs[{dose_key!r}]` holds {parts.explode()[numbers.isna()].iloc[0]!r}, not a "
                f"number. Give doses as numbers, or as text joined by {delimiter!r} for the members of a combination."
            )
        members = pairs["label"].str.split(delimiter, regex=False).str.len()
        bad = (parts.str.len() > 1) & (parts.str.len() != members)
        if bad.any():
            label, dose = pairs.loc[bad, ["label", "dose"]].iloc[0]
            raise ValueError(
                f"`dose_key`: perturbation {label!r} carries the doses {dose!r} in `adata.obs[{dose_key!r}]`. "
                "Give one dose, or one for each member."
            )
    else:
        numbers = column
    values = np.asarray(numbers, dtype=float)
    if not np.isfinite(values).all() or (values < 0).any():
        worst = values[~np.isfinite(values) | (values < 0)][0]
        raise ValueError(
            f"`dose_key`: `adata.obs[{dose_key!r}]` holds {worst:g}; doses must be finite and not negative (0 for "
            "control)."
        )
    treated = adata.obs[perturbation_key].astype(str) != control
    if pd.api.types.is_numeric_dtype(column) and treated.any() and not (column[treated] > 0).any():
        raise ValueError(
            f"`dose_key`: every perturbed cell has dose 0 in `adata.obs[{dose_key!r}]`. "
            "Give the doses, or leave `dose_key` out if there was only one."
        )


def check_expression(adata: AnnData, layer: str | None, rows: np.ndarray | None = None) -> DataKind:
    """Kind of the values of a layer; raises where they can not be expression.

    Parameters
    ----------
    adata, layer
        Cells and the layer to look at; `None` for ``X``.
    rows
        Cells to look at, ascending; by default all.

    Returns
    -------
    ``"counts"`` where all values are non-negative integers, else ``"continuous"``.
    """
    if layer is not None and (not isinstance(layer, str) or layer not in adata.layers):
        available = [name for name in adata.layers if name is not None]
        raise ValueError(
            f"`layer`: {layer!r} is not in `adata.layers`, which has {_names(available) or 'no entries'}. "
            "Name one of them, or leave `layer` out to use `adata.X`."
        )
    if adata.n_obs == 0 or adata.n_vars == 0:
        raise ValueError(
            f"`adata` is empty ({adata.n_obs} cells x {adata.n_vars} genes). Check the filtering before it."
        )
    values = adata.X if layer is None else adata.layers[layer]
    if values is None:
        raise ValueError("`layer`: `adata.X` is empty. Name the layer that holds the expression.")
    values = shards_of(values)
    where = "adata.X" if layer is None else f"adata.layers[{layer!r}]"
    rows = np.arange(adata.n_obs) if rows is None else rows
    counts = True
    for start in range(0, len(rows), _CHECK_ROWS):
        part = rows[start : start + _CHECK_ROWS]
        contiguous = part[-1] - part[0] == len(part) - 1
        block = values[int(part[0]) : int(part[-1]) + 1] if contiguous else values[part]
        block = block.compute() if hasattr(block, "compute") else block
        block = block.data if sparse.issparse(block) else np.asarray(block)
        if block.dtype.kind not in "biuf":
            raise ValueError(f"`layer`: `{where}` holds {block.dtype} values, not numbers.")
        if not np.isfinite(block).all():
            raise ValueError(
                f"`layer`: `{where}` holds NaN or infinite values. Remove or impute them before `setup_anndata`."
            )
        counts = counts and bool((block >= 0).all() and (block == np.round(block)).all())
    return "counts" if counts else "continuous"


def smallest_value(adata: AnnData, layer: str | None) -> float:
    """Smallest value of a layer, which may be on disk; `None` for ``X``."""
    values = shards_of(adata.X if layer is None else adata.layers[layer])
    smallest = np.inf
    for start in range(0, adata.n_obs, _CHECK_ROWS):
        block = values[start : start + _CHECK_ROWS]
        smallest = min(smallest, float((block.compute() if hasattr(block, "compute") else block).min()))
    return smallest


def check_names(adata: AnnData) -> None:
    """Raise unless cells and genes have unique names."""
    if not adata.var_names.is_unique:
        doubled = adata.var_names[adata.var_names.duplicated()].unique()
        raise ValueError(
            f"`adata`: {len(doubled)} gene names occur more than once ({_names(doubled)}), and genes are matched by "
            "name. Call `adata.var_names_make_unique()` first."
        )
    if not adata.obs_names.is_unique:
        raise ValueError("`adata`: cell names occur more than once. Call `adata.obs_names_make_unique()` first.")


def check_size_factor(adata: AnnData, size_factor_key: str | None, kind: DataKind) -> None:
    """Raise unless size factors are positive numbers, and scale counts."""
    if size_factor_key is None:
        return
    check_obs_key(adata, "size_factor_key", size_factor_key)
    values = adata.obs[size_factor_key]
    if kind != "counts":
        raise ValueError(
            "`size_factor_key`: size factors scale counts, but the registered layer holds negative or fractional "
            "values. Leave the argument out, or name the layer with the counts."
        )
    if not pd.api.types.is_numeric_dtype(values) or not (np.isfinite(values) & (values > 0)).all():
        raise ValueError(
            f"`size_factor_key`: `adata.obs[{size_factor_key!r}]` must hold positive numbers. "
            "Total counts per cell are the default: leave the argument out to use them."
        )


def check_features(adata: AnnData, key: str | None, names: list[str]) -> pd.DataFrame | None:
    """Feature table of perturbations: a DataFrame in ``uns`` or gene embeddings in ``varm``.

    Raises where the key is not found, has values that are not finite, or describes none of the registered
    perturbations.
    """
    if key is None:
        return None
    if not isinstance(key, str):
        raise ValueError(f"`perturbation_features_key` must be a key of `adata.uns` or `adata.varm`, got {key!r}.")
    if key in adata.uns:
        table = adata.uns[key]
        if not isinstance(table, pd.DataFrame):
            raise ValueError(
                f"`perturbation_features_key`: `adata.uns[{key!r}]` is a {type(table).__name__}. "
                "It must be a DataFrame with one row per perturbation, named in its index."
            )
    elif key in adata.varm:
        table = adata.varm[key]
        if not isinstance(table, pd.DataFrame):
            table = table.toarray() if sparse.issparse(table) else np.asarray(table)
            table = pd.DataFrame(table, index=adata.var_names)
    else:
        raise ValueError(
            f"`perturbation_features_key`: {key!r} is neither in `adata.uns` ({_names(adata.uns) or 'no entries'}) "
            f"nor in `adata.varm` ({_names(adata.varm) or 'no entries'})."
        )
    words = [str(c) for c, dtype in table.dtypes.items() if not pd.api.types.is_numeric_dtype(dtype)]
    if words:
        raise ValueError(
            f"`perturbation_features_key`: columns {_names(words)} of {key!r} are not numeric. Drop or encode them."
        )
    table = table.astype(np.float32)
    table.index = table.index.astype(str)
    table.columns = table.columns.astype(str)
    if not table.index.is_unique:
        doubled = table.index[table.index.duplicated()].unique()
        raise ValueError(
            f"`perturbation_features_key`: {key!r} has several rows of {_names(doubled)}. Keep one row per "
            "perturbation."
        )
    if not np.isfinite(table.to_numpy()).all():
        raise ValueError(f"`perturbation_features_key`: {key!r} holds NaN or infinite values. Drop those rows.")
    empty = table.index[~table.to_numpy().any(1)]
    if len(empty) == len(table):
        raise ValueError(f"`perturbation_features_key`: every value of {key!r} is 0. It describes no perturbation.")
    if len(empty) and table.shape[1] > 1:
        logger.warning("`perturbation_features_key`: all features of %s are 0 in %r.", _names(empty), key)
    if not set(names) & set(table.index):
        raise ValueError(
            f"`perturbation_features_key`: none of the perturbations ({_names(names)}) is a row of {key!r} "
            f"({_names(table.index)}). Rows are matched by name."
        )
    return table
