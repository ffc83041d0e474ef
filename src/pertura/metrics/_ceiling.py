"""How much there was to win: technical ceilings, the share of the gap a model closes, its interval."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import scipy.sparse as sp
from numpy.typing import ArrayLike
from scipy.stats import bootstrap

from ._arrays import Floats, profiles, result
from ._registry import DEFAULT_TOP, Metric, get_metric

DEFAULT_CEILING = ("pearson_effect", "pearson_effect_top", "r2_top", "mse", "mae")


def split_half_ceiling(
    cells: Any,
    control: Any,
    metrics: str | Metric | Sequence[str | Metric] = DEFAULT_CEILING,
    *,
    reference: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    n_splits: int = 50,
    seed: int = 0,
    top: int = DEFAULT_TOP,
    spearman_brown: bool = False,
) -> pd.DataFrame:
    """Score one random half of the measured cells as a prediction of the other (technical duplicate).

    Parameters
    ----------
    cells
        Cells of one condition ``(cells, genes)``, dense or sparse, on the scale of the evaluation.
    control
        Control cells ``(cells, genes)``, which are halved as well: either half of the cells then has an effect against controls
        of its own, and the noise of controls is not mistaken for agreement. Or one mean profile ``(genes,)`` for both halves.
    metrics
        Names (also with ``"_top"``) or metrics that read mean profiles.
    reference
        Mean perturbed profile, for ``"pearson_effect_vs_reference"``.
    weights
        Gene weights for the weighted metrics, see :func:`~pertura.metrics.wmse`.
    n_splits
        Number of random halvings.
    seed
        Seed of the halvings.
    top
        Number of genes meant by ``"_top"``.
    spearman_brown
        Extend the value from two halves to two samples of the full size: correlations by Spearman-Brown
        ``2 r / (1 + r)`` where r > 0, mean squared errors by one half (exact for means of independent cells);
        NaN for metrics without such a rule. The truth of a model is the full sample, so this is the fairer
        ceiling, and a more optimistic one.

    Returns
    -------
    DataFrame ``(n_splits, metrics)``; ``.mean()`` is the ceiling.
    """
    if n_splits < 1:
        raise ValueError(f"`n_splits` must be at least 1, got {n_splits}.")
    rng = np.random.default_rng(seed)
    half, other = halves(cells, "cells", n_splits, rng)
    own = control = control if sp.issparse(control) else np.asarray(control, dtype=np.float64)
    if control.ndim > 1:
        own, control = halves(control, "control", n_splits, rng)
    chosen = [get_metric(m, top=top) for m in ([metrics] if isinstance(metrics, str | Metric) else metrics)]
    wrong = [m.name for m in chosen if m.needs != "mean"]
    if wrong:
        raise ValueError(f"`metrics`: {wrong} do not read mean profiles; a split-half ceiling is not defined for them.")
    given = {"control": control, "predicted_control": own, "reference": reference, "weights": weights}
    columns: dict[str, Floats] = {}
    for metric in chosen:
        options = {k: v for k, v in given.items() if k in metric.parameters and v is not None}
        lacking = metric.required - {"predicted", "truth"} - set(options)
        if lacking:
            raise ValueError(f"`metrics`: {metric.name!r} also needs {sorted(lacking)}; pass it.")
        columns[metric.name] = np.asarray(metric(half, other, **options))
        if spearman_brown:
            columns[metric.name] = full_size(columns[metric.name], metric)
    return pd.DataFrame(columns, index=pd.RangeIndex(n_splits, name="split"))


def halves(cells: Any, name: str, n_splits: int, rng: np.random.Generator) -> tuple[Floats, Floats]:
    """Means of random halves of the cells and of the other halves, ``(n_splits, genes)`` each."""
    x = sp.csr_matrix(cells) if sp.issparse(cells) else np.asarray(cells, dtype=np.float64)
    if x.ndim != 2 or x.shape[0] < 4:
        raise ValueError(f"`{name}` must be a matrix (cells, genes) with at least 4 cells, got shape {x.shape}.")
    n = x.shape[0]
    first = rng.permuted(np.tile(np.arange(n) < n // 2, (n_splits, 1)), axis=1).astype(np.float64)
    sum_first = np.asarray((x.T @ first.T).T)
    total = np.asarray(x.sum(axis=0), dtype=np.float64).ravel()
    return sum_first / (n // 2), (total - sum_first) / (n - n // 2)


def full_size(values: Floats, metric: Metric) -> Floats:
    if metric.duplicate == "spearman_brown":
        # The formula assumes a reliability; for r <= 0 there is none to extend.
        return np.where(values > 0, 2 * values / (1 + np.maximum(values, 0.0)), values)
    return values / 2 if metric.duplicate == "half" else np.full_like(values, np.nan)


def interpolated_duplicate(duplicate: ArrayLike, mean_prediction: ArrayLike, adjusted_p: ArrayLike) -> Floats:
    """Technical duplicate where a gene is differentially expressed, the mean prediction where it is not.

    Takes the noise of the duplicate out of the genes that do not respond, which makes it a stricter ceiling
    for errors over all genes.

    Parameters
    ----------
    duplicate
        Mean profile of one half of the cells ``(..., genes)``.
    mean_prediction
        Profile predicted by the mean effect ``(..., genes)``.
    adjusted_p
        Adjusted p value of each gene in [0, 1]; the weight of the duplicate is ``1 - adjusted_p``.

    References
    ----------
    Miller et al., bioRxiv 2025.10.20.683304.
    """
    d, m, p = profiles(duplicate=duplicate, mean_prediction=mean_prediction, adjusted_p=adjusted_p)
    if (p < 0).any() or (p > 1).any():
        raise ValueError("`adjusted_p` must lie in [0, 1].")
    return (1 - p) * d + p * m


def gap_closed(
    model: Any,
    baseline: Any,
    ceiling: Any,
    *,
    metric: str | Metric | None = None,
    higher_is_better: bool = True,
) -> Any:
    """Share of the distance from a baseline to the ceiling that a model covers.

    ``(model - baseline) / (ceiling - baseline)``, for scores where larger is better and where smaller is.

    Parameters
    ----------
    model, baseline, ceiling
        Values of one metric: numbers, arrays or pandas objects of matching shape.
    metric
        The metric; decides the direction, and measures the distance to the best value where that is inside
        the range.
    higher_is_better
        Direction, if no `metric` is given.

    Returns
    -------
    1 at the ceiling, 0 at the baseline, negative for a model that loses to it; NaN where the ceiling is not
    better than the baseline, since then the task leaves nothing to win.
    """
    if metric is not None:
        orient = get_metric(metric).orient
        model, baseline, ceiling = orient(model), orient(baseline), orient(ceiling)
    elif not higher_is_better:
        model, baseline, ceiling = -model, -baseline, -ceiling
    room = ceiling - baseline
    if isinstance(room, pd.Series | pd.DataFrame):
        return (model - baseline) / room.where(room > 0)
    room = np.asarray(room, dtype=np.float64)
    return result((model - baseline) / np.where(room > 0, room, np.nan))


class Interval(NamedTuple):
    """Estimate with its bootstrap interval."""

    estimate: float
    low: float
    high: float


def bootstrap_interval(
    values: ArrayLike,
    paired: ArrayLike | None = None,
    *,
    level: float = 0.9,
    n_resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Mean with a percentile bootstrap interval over conditions, folds or seeds.

    Parameters
    ----------
    values
        One value per independent unit ``(units,)``. NaN are left out.
    paired
        Values of a second model on the same units: the interval is then of the mean *difference* ``values -
        paired``.
    level
        Coverage of the interval.
    n_resamples
        Number of bootstrap samples.
    seed
        Seed of the resampling.

    Returns
    -------
    ``(estimate, low, high)``; the bounds are NaN with fewer than two units, all are NaN with none.
    """
    if not 0 < level < 1:
        raise ValueError(f"`level` must lie between 0 and 1, got {level!r}.")
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != 1:
        raise ValueError(f"`values` must be one value per unit, got shape {x.shape}.")
    if paired is not None:
        y = np.asarray(paired, dtype=np.float64)
        if y.shape != x.shape:
            raise ValueError(f"`paired` has shape {y.shape}, `values` {x.shape}; they must be the same units in order.")
        x = x - y
    x = x[~np.isnan(x)]
    if x.size < 2:
        return Interval(float(x[0]) if x.size else np.nan, np.nan, np.nan)
    found = bootstrap(
        (x,),
        np.mean,
        confidence_level=level,
        n_resamples=n_resamples,
        method="percentile",
        random_state=np.random.default_rng(seed),
    )
    return Interval(float(x.mean()), *map(float, found.confidence_interval))
