"""What a user should know of data before training, each as a finding; nothing here raises."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
from anndata import AnnData
from numpy.typing import NDArray
from scipy import sparse

from ._scale import counts_of
from ._validation import _names

logger = logging.getLogger(__name__)

Status = Literal["ok", "warning", "problem"]
# what a perturbation is called that does nothing
_NO_PERTURBATION = re.compile(
    r"(non[-_ .]?target|safe[-_ ]?(target|harbou?r)|scrambled?|neg(ative)?[-_ ]?(ctrl|control)|nt[-_ ]?c?|ctrl|control|"
    r"unperturbed|untreated|dmso|vehicle|mock|pbs)([-_ .]?(ing|ed|guide|sgrna|grna))*[-_ .#]*\d*",
    re.IGNORECASE,
)
_MAX_RATIO = 1.5
_ALL_GENES = 0.95  # share of the library from which on genes are all there are
_MIN_ARM = 10  # cells of which the depth is told
_SCALE_ROWS, _BLOCK = 2000, 4096
_said: set[str] = set()


class Finding(NamedTuple):
    """What one check found.

    Attributes
    ----------
    check, status, where, found, do
        Name of the check, how serious it is, what was looked at, what is there and what to do.
    """

    check: str
    status: Status
    where: str
    found: str
    do: str = ""


class Cells(NamedTuple):
    """Cells that are looked at.

    Attributes
    ----------
    adata
        All cells.
    layer
        Layer with the expression; `None` for ``X``.
    rows
        Positions of the cells that are read, ascending.
    label, context
        Of these cells; a label is missing where the cell has none.
    control
        Label of unperturbed cells.
    """

    adata: AnnData
    layer: str | None
    rows: NDArray[np.int64]
    label: pd.Series
    context: pd.Series
    control: str

    @classmethod
    def of(
        cls,
        adata: AnnData,
        layer: str | None,
        perturbation_key: str,
        control: str,
        context_key: str | None,
        max_cells: int,
        seed: int = 0,
    ) -> Cells:
        """At most `max_cells` random ones."""
        rows = np.arange(adata.n_obs)
        if adata.n_obs > max_cells:
            rows = np.sort(np.random.default_rng(seed).choice(adata.n_obs, max_cells, replace=False))
        label = _text(adata.obs[perturbation_key].iloc[rows])
        context = pd.Series("all", label.index) if context_key is None else _text(adata.obs[context_key].iloc[rows])
        return cls(adata, layer, rows, label, context, control)

    @property
    def where(self) -> str:
        """How a user names the expression."""
        return "adata.X" if self.layer is None else f"adata.layers[{self.layer!r}]"


def _text(column: pd.Series) -> pd.Series:
    return column.astype(object).where(column.notna()).map(str, na_action="ignore").reset_index(drop=True)


def blocks(values: Any, rows: NDArray[np.int64]) -> Iterator[tuple[slice, Any]]:
    """Some thousand cells at a time, dense or CSR, from memory or from a file."""
    for start in range(0, len(rows), _BLOCK):
        own = slice(start, min(start + _BLOCK, len(rows)))
        part = values[rows[own]]
        part = part.compute() if hasattr(part, "compute") else part
        yield own, part.tocsr() if sparse.issparse(part) else np.asarray(part)


def scale_of(values: Any, rows: NDArray[np.int64]) -> str:
    """``"counts"``, ``"log1p"`` (of normalized counts), ``"positive"``, ``"negative"`` or ``"not finite"``, by some of the rows."""
    rows = rows[np.linspace(0, len(rows) - 1, min(len(rows), _SCALE_ROWS)).astype(int)]
    whole, logarithm = True, True
    for _, part in blocks(values, np.unique(rows)):
        stored = part.data if sparse.issparse(part) else part.ravel()
        if stored.dtype.kind not in "biuf" or not np.isfinite(stored).all():
            return "not finite"
        if len(stored) and stored.min() < 0:
            return "negative"
        whole = whole and bool((stored == np.round(stored)).all())
        logarithm = logarithm and not whole and counts_of(part) is not None
    return "counts" if whole else "log1p" if logarithm else "positive"


def log_libraries(cells: Cells, scale: str, size_factor: NDArray | None = None) -> NDArray[np.float64] | None:
    """Log library of each cell, up to a constant for logarithms; `None` where the values do not hold it."""
    if size_factor is not None and scale == "counts":
        return np.log(np.asarray(size_factor, dtype=np.float64)[cells.rows])
    if scale not in ("counts", "log1p"):
        return None
    result = np.full(len(cells.rows), np.nan)
    for own, part in blocks(_values(cells.adata, cells.layer), cells.rows):
        if scale == "counts":
            result[own] = np.log(np.maximum(np.asarray(part.sum(1), dtype=np.float64).ravel(), 1.0))
        elif (found := counts_of(part)) is not None:
            result[own] = -np.log(found[1])
    return result


def depth_of(
    cells: Cells, scale: str, size_factor: NDArray | None = None
) -> tuple[NDArray[np.float64] | None, float | None]:
    """Log library of each cell, of all genes where the data tell it, and the share that the genes of `adata` have in it.

    The whole library is told by ``raw``, or by a log-normalized ``X`` beside counts.
    """
    own = log_libraries(cells, scale, size_factor)
    if scale != "counts" or size_factor is not None:
        return own, None
    adata, whole = cells.adata, None
    if adata.raw is not None and adata.raw.n_vars > adata.n_vars and scale_of(adata.raw.X, cells.rows) == "counts":
        whole = log_libraries(cells._replace(adata=adata.raw, layer=None), "counts")
    elif cells.layer is not None and adata.X is not None and scale_of(adata.X, cells.rows) == "log1p":
        whole = log_libraries(cells._replace(layer=None), "log1p") + np.log(1e4)
    if whole is None:
        return own, None
    share = float(np.exp(np.nanmedian(own - whole)))
    # normalized to another total than 10,000, the share is not told
    return (whole, share) if share < _ALL_GENES else (own, share if share <= 1.001 else None)


def _values(adata: AnnData, layer: str | None) -> Any:
    return adata.X if layer is None else adata.layers[layer]


# -- checks ---------------------------------------------------------------------------------------------------------------


def check_scale(cells: Cells, scale: str) -> Finding:
    """What the values are, and where counts are instead."""
    if scale == "counts":
        return Finding("scale", "ok", cells.where, "counts")
    found = {
        "log1p": "log1p of normalized counts",
        "positive": "fractional values that are not the log1p of normalized counts",
        "negative": "negative values, as scaled or centered data have",
        "not finite": "values that are not finite numbers",
    }[scale]
    status: Status = "problem" if scale in ("negative", "not finite") else "warning"
    elsewhere = _counts_elsewhere(cells)
    if elsewhere:
        return Finding("scale", status, cells.where, found, f"Counts are in {elsewhere[0]}: {elsewhere[1]}")
    again = (
        "Register counts, or log1p of normalized counts."
        if status == "problem"
        else "Add a layer with the counts if you have them."
    )
    return Finding("scale", status, cells.where, f"{found}; no layer holds counts, nor does `adata.raw`", again)


def _counts_elsewhere(cells: Cells) -> tuple[str, str] | None:
    adata = cells.adata
    for name in (None, *adata.layers):
        if (
            name != cells.layer
            and _values(adata, name) is not None
            and scale_of(_values(adata, name), cells.rows) == "counts"
        ):
            where = "`adata.X`" if name is None else f"`adata.layers[{name!r}]`"
            return where, "leave `layer` out." if name is None else f"use `layer={name!r}`."
    # a file's `raw` can be read row by row, but that of a view has the rows of the view already
    if adata.raw is not None and scale_of(adata.raw.X, cells.rows) == "counts":
        return "`adata.raw`", "`adata = adata.raw.to_adata()` has them in `X`."
    return None


def check_likelihood(cells: Cells, scale: str) -> Finding:
    """What a model takes by default."""
    if scale == "counts":
        return Finding("likelihood", "ok", cells.where, "negative binomial, since these are counts")
    do = "Name the layer with counts for a negative binomial likelihood."
    return Finding("likelihood", "warning", cells.where, "Gaussian, since these are no counts", do)


def check_depth(cells: Cells, log_library: NDArray | None) -> Finding:
    """Sequencing depth of the arms of a context."""
    if log_library is None:
        found = "not known: these values do not tell the library, so that effects can not be compared at equal depth"
        return Finding("depth", "warning", cells.where, found, "Register counts, or log1p of normalized counts.")
    arms = pd.DataFrame({"label": cells.label, "context": cells.context, "value": log_library}).dropna()
    arms = arms.groupby(["context", "label"], sort=True)["value"].agg(["mean", "var", "size"])
    arms = arms[arms["size"] >= _MIN_ARM].reset_index()
    control = arms[arms["label"] == cells.control].set_index("context").reindex(arms["context"])
    gap = (arms["mean"] - control["mean"].to_numpy()).to_numpy()
    se = np.sqrt(arms["var"] / arms["size"] + (control["var"] / control["size"]).to_numpy()).to_numpy()
    order = [
        i for i in np.argsort(-np.abs(np.nan_to_num(gap))) if np.isfinite(gap[i]) and arms["label"][i] != cells.control
    ]
    if not order:
        return Finding(
            "depth", "ok", cells.where, f"no context has {_MIN_ARM} cells of a perturbation and of its controls"
        )

    def ratio(i: int) -> str:
        inside = "" if (cells.context == "all").all() else f" in {arms['context'][i]!r}"
        return f"{arms['label'][i]!r}{inside} has {np.exp(gap[i]):.2g} times the depth of its controls"

    large = [i for i in order if abs(gap[i]) > np.log(_MAX_RATIO) and abs(gap[i]) > 4 * se[i]]
    if not large:
        return Finding("depth", "ok", cells.where, f"at most: {ratio(order[0])}")
    do = "Effects are compared at equal depth. Prefer arms that were sequenced alike."
    return Finding("depth", "warning", cells.where, _names([ratio(i) for i in large], 4), do)


def check_controls(label: pd.Series, context: pd.Series, control: str, where: str) -> Finding:
    """Contexts without controls; all cells are needed."""
    bare = sorted(set(context[label.notna()].dropna()) - set(context[label == control]))
    if not bare:
        return Finding("controls", "ok", where, "every context has controls")
    return Finding(
        "controls",
        "warning",
        where,
        f"no controls in {_names(bare)}",
        "Their perturbed cells have nothing to be compared with: add controls, or merge contexts.",
    )


def check_non_targeting(labels: pd.Index, control: str, delimiter: str, where: str) -> Finding:
    """Labels beside the control that mean no perturbation."""
    members = {m for label in labels for m in str(label).split(delimiter)} - {control}
    found = sorted(m for m in members if _NO_PERTURBATION.fullmatch(m))
    if not found:
        return Finding("non-targeting", "ok", where, f"{control!r} is the only label of controls")
    do = f"If they are controls, rename them to {control!r}; as they are, each is a perturbation."
    return Finding("non-targeting", "warning", where, f"beside {control!r} there is {_names(found)}", do)


def warn_at_setup(adata: AnnData, args: dict[str, Any], kind: str, max_cells: int = 20_000) -> None:
    """Warn, once for each message, of what makes results wrong or weak though the data can be registered."""
    key, control = args["perturbation_key"], args["control"]
    label = _text(adata.obs[key])
    context_key = args["context_key"]
    cells = Cells.of(adata, args["layer"], key, control, context_key, max_cells)
    scale = kind if kind == "counts" else scale_of(_values(adata, args["layer"]), cells.rows)
    size_factor = None if args["size_factor_key"] is None else adata.obs[args["size_factor_key"]].to_numpy()
    context = pd.Series("all", label.index) if context_key is None else _text(adata.obs[context_key])
    where = f"adata.obs[{key!r}]"
    findings = [
        check_scale(cells, scale),
        check_depth(cells, depth_of(cells, scale, size_factor)[0]),
        check_controls(label, context, control, where),
        check_non_targeting(pd.Index(label.unique()), control, args["delimiter"], where),
    ]
    if scale != "counts":
        findings[0] = findings[0]._replace(found=findings[0].found + "; the likelihood is Gaussian")
        if scale in ("positive", "negative"):  # said with the scale
            del findings[1]
    say(findings)


def say(findings: list[Finding]) -> None:
    """Log what is not well, each message once."""
    lines = [f"{f.where}: {f.found}. {f.do}".strip() for f in findings if f.status != "ok"]
    lines = [line for line in lines if line not in _said]
    _said.update(lines)
    if lines:
        logger.warning("%s", "\n".join([*lines, "`pertura.pp.check` says more."]))
