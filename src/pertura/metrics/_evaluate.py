"""One call from predicted and measured cells to a tidy table of scores."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd
from anndata import AnnData
from numpy.typing import ArrayLike

from ._arrays import Floats
from ._pseudobulk import ALL, Moments, at_equal_depth, conditions, expression, moments, perturbed_mean, welch
from ._registry import DEFAULT_TOP, Metric, get_metric
from ._response import de_weights

logger = logging.getLogger(__name__)

DEFAULT_MEAN = (
    "pearson_effect",
    "pearson_effect_top",
    "spearman_effect",
    "r2_top",
    "r2_effect",
    "mse",
    "mae",
    "wmse",
    "weighted_r2",
    "direction_match",
    "de_overlap",
)
DEFAULT_TABLE = ("centroid_accuracy", "discrimination_score_l1")
DEFAULT_CELLS = ("energy_distance", "mmd_rbf", "variance_ratio")
_INTERVAL = ("interval_coverage", "interval_width", "interval_score")


def evaluate(
    pred: AnnData | pd.DataFrame,
    truth: AnnData,
    *,
    perturbation_key: str,
    control: str,
    context_key: str | None = None,
    layer: str | None = None,
    pred_layer: str | None = None,
    controls: Literal["own", "shared"] | None = None,
    reference: AnnData | pd.DataFrame | pd.Series | ArrayLike | None = None,
    metrics: Sequence[str | Metric] | None = None,
    top: int = DEFAULT_TOP,
    fdr: float = 0.05,
    low: pd.DataFrame | None = None,
    high: pd.DataFrame | None = None,
    level: float = 0.9,
    max_cells: int | None = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """Score predictions against measured cells, condition by condition.

    All expression is on one scale, normally log1p of counts per 10,000. Measured means are at the sequencing depth of the controls,
    where the values tell counts. Means are compared as they are (``"mse"``, ``"r2_top"``).
    The true effect is the mean of perturbed less that of control cells in `truth`. The predicted effect is the predicted
    mean less that of the control cells in `pred`, where there are some. Put there the cells that the prediction started from, and
    other control cells in `truth`: where both effects are against the same cells, the noise of these passes for agreement.

    Parameters
    ----------
    pred
        Predicted cells (AnnData with the same `perturbation_key` and `context_key` in ``obs``), or predicted
        means: a DataFrame of genes in columns, indexed by perturbation, or by (perturbation, context) with a
        `context_key`. Cells or rows labelled `control` are what predicted effects are against; see `controls`.
    truth
        Measured cells, with the control cells of every context that is scored.
    perturbation_key, context_key
        Columns of ``obs``. Without contexts the column ``context`` of the result says ``"all"``.
    control
        Label of control cells in `perturbation_key`.
    layer, pred_layer
        Layers of `truth` and `pred` to score; default ``X``.
    controls
        What predicted effects are against: ``"own"``, the controls in `pred`, of every context that is scored; ``"shared"``, those
        in `truth`. `None`: ``"own"`` where `pred` has any.
    reference
        Mean perturbed profile of the *training* data: training cells (AnnData with the same keys), a
        DataFrame (contexts, genes) as :func:`~pertura.metrics.perturbed_mean` returns, or one profile. A
        context that is not in it uses the mean over the contexts that are. Needed for
        ``"pearson_effect_vs_reference"``, which is then part of the default.
    metrics
        Names (see :func:`~pertura.metrics.list_metrics`; ``"_top"`` and ``"_top<k>"`` allowed) or metrics.
        Default: profile metrics, metrics across the conditions of a context if it has several, and cell
        metrics if `pred` has cells.
    top
        Number of genes meant by ``"_top"`` and used by ``"de_overlap"``.
    fdr
        Genes with a Benjamini-Hochberg adjusted p below this (Welch t test, measured cells against control in `truth`)
        count as truly changed in ``"direction_match"``.
    low, high
        Bounds of the predicted means, shaped like a DataFrame `pred`; add the interval metrics. Coverage
        allows for the sampling error of the measured means.
    level
        Nominal level of `low` and `high`.
    max_cells, seed
        Cell metrics use a random subsample of at most `max_cells` cells per condition.

    Returns
    -------
    DataFrame with columns ``condition, context, metric, value``, and in ``attrs["controls"]`` which controls. Conditions that were predicted but not
    measured are left out. Weighted metrics weigh genes by their t statistic against all other cells of the
    context.

    Raises
    ------
    ValueError
        If nothing predicted was measured, genes are missing, a context has no control cells, or an argument
        does not fit the data.
    """
    if context_key is None and not isinstance(pred, AnnData) and isinstance(pred.index, pd.MultiIndex):
        raise ValueError("`pred` is indexed by (perturbation, context); name the `context_key` of `truth`.")
    codes, groups = conditions(truth, perturbation_key, context_key, "truth")
    true_x = expression(truth, layer, "truth")
    true = at_equal_depth(moments(true_x, codes, groups), true_x, codes, control)
    genes = truth.var_names
    if isinstance(pred, AnnData):
        order = _gene_order(pred.var_names, genes, "pred")
        pred_x = expression(pred, pred_layer, "pred")[:, order]
        pred_codes, pred_groups = conditions(pred, perturbation_key, context_key, "pred")
        predicted = pd.DataFrame(moments(pred_x, pred_codes, pred_groups).mean, pred_groups, genes)
    else:
        predicted = _means(pred, genes, perturbation_key, context_key, "pred")
    keys = _scored(predicted.index, groups, str(control))
    data = _Arrays(true, keys, predicted.loc[keys].to_numpy(), str(control), fdr)
    controls = _which_controls(controls, predicted.index, str(control))
    if controls == "own":
        data.predicted_controls = _own_controls(predicted, keys, str(control))
    bounds = None
    if low is not None or high is not None:
        if low is None or high is None:
            raise ValueError("`low` and `high` belong together; pass both.")
        tables = [_means(t, genes, perturbation_key, context_key, n) for t, n in ((low, "low"), (high, "high"))]
        for name, table in zip(("low", "high"), tables, strict=True):
            if not keys.isin(table.index).all():
                raise ValueError(f"`{name}` lacks {int((~keys.isin(table.index)).sum())} of the predicted conditions.")
        bounds = [table.loc[keys].to_numpy() for table in tables]
    if reference is not None:
        data.reference = _reference(reference, genes, keys, perturbation_key, str(control), context_key, layer)

    if metrics is None:
        several = groups[groups.get_level_values(0) != str(control)].get_level_values(1).value_counts().max() > 1
        metrics = [
            *DEFAULT_MEAN,
            *(["pearson_effect_vs_reference"] if reference is not None else []),
            *(DEFAULT_TABLE if several else []),
            *(DEFAULT_CELLS if isinstance(pred, AnnData) else []),
            *(_INTERVAL if bounds is not None else []),
        ]
    frames = []
    for metric in (get_metric(m, top=top) for m in ([metrics] if isinstance(metrics, str | Metric) else metrics)):
        if metric.needs == "mean":
            values = data.score_means(metric, top)
        elif metric.needs == "table" and "predicted" in metric.parameters:
            values = data.score_tables(metric, genes)
        elif metric.needs == "cells":
            if not isinstance(pred, AnnData):
                raise ValueError(f"`metrics`: {metric.name!r} reads cells, but `pred` holds means; pass an AnnData.")
            options = {k: v for k, v in {"max_cells": max_cells, "seed": seed}.items() if k in metric.parameters}
            pairs = zip(pred_groups.get_indexer(keys), groups.get_indexer(keys), strict=True)
            values = [
                metric(pred_x[np.flatnonzero(pred_codes == i)], true_x[np.flatnonzero(codes == j)], **options)
                for i, j in pairs
            ]
        elif metric.name in _INTERVAL and bounds is not None:
            values = data.score_intervals(metric, bounds, level)
        else:
            raise ValueError(
                f"`metrics`: {metric.name!r} (needs {metric.needs}) cannot be computed from what was passed."
            )
        frames.append(pd.DataFrame({"metric": metric.name, "value": np.asarray(values, dtype=np.float64)}, index=keys))
    table = pd.concat(frames).reset_index()[["condition", "context", "metric", "value"]]
    table.attrs["controls"] = controls
    return table


class _Arrays:
    """Arrays (conditions, genes) of the scored conditions, and what the metrics derive from them."""

    def __init__(self, true: Moments, keys: pd.MultiIndex, predicted: Floats, control: str, fdr: float) -> None:
        self.keys, self.predicted, self.control_label = keys, predicted, control
        self.all = true
        self.true = true.take(keys)
        context = keys.get_level_values("context")
        control_keys = pd.MultiIndex.from_arrays([[control] * len(keys), context], names=keys.names)
        self.controls = true.take(control_keys)
        self.predicted_controls: Floats = self.controls.mean
        self.reference: Floats | None = None
        self.fdr = fdr
        self._cache: dict[str, Floats] = {}

    def _lazy(self, name: str, make: Callable[[], Floats]) -> Floats:
        if name not in self._cache:
            self._cache[name] = make()
        return self._cache[name]

    def _weights(self) -> Floats:
        pooled = self.all.pool(self.all.groups.get_level_values("context"))
        at = pd.Index(pooled.groups).get_indexer(self.keys.get_level_values("context"))
        whole = Moments(self.keys, pooled.n[at], pooled.mean[at], pooled.var[at])
        return de_weights(welch(self.true, whole.minus(self.true))[0])

    def score_means(self, metric: Metric, top: int) -> Any:
        given: dict[str, Callable[[], Any]] = {
            "control": lambda: self.controls.mean,
            "predicted_control": lambda: self.predicted_controls,
            "reference": lambda: self.reference,
            "weights": lambda: self._lazy("weights", self._weights),
            "de": lambda: self._lazy("de", lambda: welch(self.true, self.controls)[1]) < self.fdr,
            "k": lambda: top,
        }
        if "reference" in metric.required and self.reference is None:
            raise ValueError(f"`reference` is missing: {metric.name!r} needs the mean perturbed training profile.")
        options = {k: make() for k, make in given.items() if k in metric.parameters}
        return metric(self.predicted, self.true.mean, **options)

    def score_tables(self, metric: Metric, genes: pd.Index) -> Floats:
        values = np.full(len(self.keys), np.nan)
        measured = self.all.groups
        for context in self.keys.get_level_values("context").unique():
            rows = np.flatnonzero(self.keys.get_level_values("context") == context)
            control, own = self.controls.mean[rows[0]], self.predicted_controls[rows[0]]
            inside = (measured.get_level_values("context") == context) & ~measured.isin(self.keys)
            others = self.all.mean[inside & (measured.get_level_values("condition") != self.control_label)] - control
            if len(rows) + len(others) < 2:
                continue
            options: dict[str, Any] = {"others": others}
            if "exclude" in metric.parameters:
                # The targets of all candidates: leaving out only the own one would favour the own truth.
                named = measured[measured.get_level_values("context") == context].get_level_values("condition")
                targets = genes.get_indexer(sorted({part for name in named for part in name.split("+")}))
                options["exclude"] = targets[targets >= 0]
            values[rows] = metric(self.predicted[rows] - own, self.true.mean[rows] - control, **options)
        return values

    def score_intervals(self, metric: Metric, bounds: list[Floats], level: float) -> list[float]:
        se = np.sqrt(self.true.var / self.true.n[:, None])
        if "truth_se" in metric.parameters and not np.isfinite(se).all():
            raise ValueError("`truth` has conditions of a single cell; interval coverage needs at least two.")
        out = []
        for i, truth in enumerate(self.true.mean):
            options = {"truth": truth, "truth_se": se[i], "level": level}
            out.append(
                metric(bounds[0][i], bounds[1][i], **{k: v for k, v in options.items() if k in metric.parameters})
            )
        return out


def _gene_order(found: pd.Index, genes: pd.Index, name: str) -> Any:
    """Position in `found` of each of `genes`."""
    if not (found.is_unique and genes.is_unique):
        raise ValueError(
            f"Gene names of `{name}` or `truth` are repeated; make them unique (adata.var_names_make_unique)."
        )
    order = found.get_indexer(genes)
    if (order < 0).any():
        missing = list(genes[order < 0])
        raise ValueError(f"`{name}` lacks {len(missing)} of the {len(genes)} genes of `truth`, e.g. {missing[:5]}.")
    return order


def _means(
    frame: pd.DataFrame, genes: pd.Index, perturbation_key: str, context_key: str | None, name: str
) -> pd.DataFrame:
    """Predicted means indexed by (condition, context), genes in the order of `truth`."""
    if not isinstance(frame, pd.DataFrame):
        raise ValueError(f"`{name}` must be an AnnData or a DataFrame, got {type(frame).__name__}.")
    index = frame.index
    if context_key is not None and index.nlevels != 2:
        raise ValueError(f"`{name}` must be indexed by (perturbation, context) as there is a `context_key`.")
    if index.nlevels == 2 and set(index.names) == {perturbation_key, context_key}:
        index = index.reorder_levels([perturbation_key, context_key])
    condition = index.get_level_values(0).astype(str)
    context = index.get_level_values(1).astype(str) if index.nlevels == 2 else [ALL] * len(index)
    keys = pd.MultiIndex.from_arrays([condition, context], names=["condition", "context"])
    if keys.has_duplicates:
        raise ValueError(f"`{name}` has several rows for one condition, e.g. {keys[keys.duplicated()][0]}.")
    values = frame.to_numpy(np.float64)[:, _gene_order(frame.columns, genes, name)]
    return pd.DataFrame(values, keys, genes)


def _scored(predicted: pd.MultiIndex, measured: pd.MultiIndex, control: str) -> pd.MultiIndex:
    """Conditions that were predicted and measured, in the order of the prediction."""
    wanted = predicted[predicted.get_level_values("condition") != control]
    keys = wanted[wanted.isin(measured)]
    if keys.empty:
        raise ValueError(
            f"`pred`: none of the {len(wanted)} predicted conditions, e.g. {list(wanted[:3])}, is in "
            "`truth`, "
            f"which has e.g. {list(measured[:3])}."
        )
    if len(keys) < len(wanted):
        logger.info(
            "%d of %d predicted conditions were not measured and are not scored.",
            len(wanted) - len(keys),
            len(wanted),
        )
    context = keys.get_level_values("context").unique()
    bare = [c for c in context if (control, c) not in measured]
    if bare:
        raise ValueError(f"`control`: `truth` has no cells labelled {control!r} in context(s) {bare}.")
    return keys


def _which_controls(controls: str | None, predicted: pd.MultiIndex, control: str) -> str:
    if controls not in (None, "own", "shared"):
        raise ValueError(f"`controls` must be 'own', 'shared' or None, got {controls!r}.")
    there = control in predicted.get_level_values("condition")
    return controls or ("own" if there else "shared")


def _own_controls(predicted: pd.DataFrame, keys: pd.MultiIndex, control: str) -> Floats:
    """Mean of the controls of `pred` in the context of each scored condition (conditions, genes)."""
    context = keys.get_level_values("context")
    own = pd.MultiIndex.from_arrays([[control] * len(keys), context], names=keys.names)
    bare = context[~own.isin(predicted.index)].unique()
    if len(bare):
        raise ValueError(
            f"`pred` has no control cells labelled {control!r} in context(s) {list(bare)}. Add the cells that its "
            "predictions started from, or pass controls='shared' to compare with the controls of `truth`."
        )
    return predicted.loc[own].to_numpy()


def _reference(
    reference: Any,
    genes: pd.Index,
    keys: pd.MultiIndex,
    perturbation_key: str,
    control: str,
    context_key: str | None,
    layer: str | None,
) -> Floats:
    """Look up the reference profile of each scored condition (conditions, genes)."""
    if isinstance(reference, AnnData):
        reference = perturbed_mean(
            reference,
            perturbation_key=perturbation_key,
            control=control,
            context_key=context_key,
            layer=layer,
        )
    if isinstance(reference, pd.Series):
        reference = reference.iloc[_gene_order(reference.index, genes, "reference")].to_numpy()
    if isinstance(reference, pd.DataFrame):
        table = reference.iloc[:, _gene_order(reference.columns, genes, "reference")]
        table.index = table.index.astype(str)
        values = table.reindex(keys.get_level_values("context")).to_numpy(np.float64, copy=True)
        absent = ~keys.get_level_values("context").isin(table.index)
        values[absent] = table.to_numpy(np.float64).mean(axis=0)
        return values
    profile = np.asarray(reference, dtype=np.float64)
    if profile.shape != (len(genes),):
        raise ValueError(
            f"`reference` must be one profile ({len(genes)},), a table or an AnnData, got {profile.shape}."
        )
    return np.broadcast_to(profile, (len(keys), len(genes)))
