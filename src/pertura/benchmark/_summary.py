"""Means over held-out conditions, paired bootstrap intervals, and the share of the gap that a model closes."""

from __future__ import annotations

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from pertura.metrics import Metric, gap_closed

from ._runner import CEILING
from ._score import benchmark_metric

_UNIT = ["perturbation", "dose", "context"]
_GROUP = ["dataset", "split", "metric"]
Floats = NDArray[np.float64]


def summarize(
    results: pd.DataFrame,
    *,
    baseline: str = "MeanEffect",
    ceiling: str = CEILING,
    level: float = 0.9,
    n_resamples: int = 2000,
    seed: int = 0,
) -> pd.DataFrame:
    """Summarize a benchmark.

    Values are averaged over runs (seeds, repeated splits) of each held-out condition, then over conditions.
    Intervals are percentiles of a bootstrap that draws conditions, and within each condition runs, the same
    conditions for every model. With few conditions (five cell types) they are rather too narrow.

    Parameters
    ----------
    results
        What :func:`run` returns.
    baseline
        Model that counts as 0 in the gap closed, and with which the others are compared.
    ceiling
        Model that counts as 1.
    level
        Level of the intervals.
    n_resamples, seed
        Number of bootstrap samples, and their seed.

    Returns
    -------
    One row per dataset, split, metric and model:

    - ``mean, low, high``: over conditions; ``n_conditions``, ``n_runs`` (largest number per condition);
    - ``gain, gain_low, gain_high``: difference to `baseline` on shared conditions, positive is better;
    - ``gap_closed, gap_low, gap_high``: (model - baseline) / (ceiling - baseline) of the means over shared
      conditions; NaN where the ceiling is not better than the baseline;
    - ``seconds``: per run; ``peak_mb``: the largest.

    Intervals are NaN where there is nothing to resample.
    """
    needed = {*_GROUP, *_UNIT, "model", "seed", "held_out", "value"}
    lacking = sorted(needed - set(results.columns))
    if lacking:
        raise ValueError(f"`results` lacks the columns {lacking}; pass what `run` returns.")
    if results.empty:
        raise ValueError("`results` is empty.")
    if not 0 < level < 1:
        raise ValueError(f"`level` must lie between 0 and 1, got {level!r}.")
    parts = [
        _one_metric(frame, metric, baseline, ceiling, level, n_resamples, seed).assign(
            dataset=dataset, split=split, metric=metric
        )
        for (dataset, split, metric), frame in results.groupby(_GROUP, sort=False, observed=True)
    ]
    table = pd.concat(parts, ignore_index=True)
    return table[[*_GROUP, *[c for c in table.columns if c not in _GROUP]]]


def _one_metric(
    frame: pd.DataFrame, metric: str, baseline: str, ceiling: str, level: float, n_resamples: int, seed: int
) -> pd.DataFrame:
    unit = frame.groupby(_UNIT, sort=False, observed=True, dropna=False).ngroup().to_numpy()
    n_units = int(unit.max()) + 1
    rng = np.random.default_rng(seed)
    drawn = rng.integers(n_units, size=(n_resamples, n_units))
    models = list(dict.fromkeys(frame["model"]))
    values, resampled = {}, {}
    for name in models:
        own = (frame["model"] == name).to_numpy()
        values[name] = _by_unit(frame["value"].to_numpy(np.float64)[own], unit[own], n_units)
        resampled[name] = _resample(values[name], drawn, rng)
    described = benchmark_metric(metric, 1)
    rows = []
    for name in models:
        own, boot = _unit_means(values[name]), resampled[name]
        used = frame[frame["model"] == name]
        row = {
            "model": name,
            "n_conditions": int(np.isfinite(own).sum()),
            "n_runs": int(np.isfinite(values[name]).sum(1).max()),
            "mean": _mean(own),
        }
        row["low"], row["high"] = _ends(_mean(boot), level, values[name])
        pair = [name, baseline]
        if baseline in values and name not in (baseline, ceiling) and described.best_value is not None:
            a, b = _shared([_unit_means(values[m]) for m in pair])
            row["gain"] = _gain(a, b, described)
            difference = _gain(*_shared([resampled[m] for m in pair]), described)
            row["gain_low"], row["gain_high"] = _ends(difference, level, values[name])
        if {baseline, ceiling} <= set(models):
            row["gap_closed"] = _gap(*_shared([_unit_means(values[m]) for m in (*pair, ceiling)]), described)
            if name not in (baseline, ceiling):  # by definition 0 and 1
                gaps = _gap(*_shared([resampled[m] for m in (*pair, ceiling)]), described)
                row["gap_low"], row["gap_high"] = _ends(gaps, level, values[name])
        for column, reduce in (("seconds", "mean"), ("peak_mb", "max")):
            row[column] = float(getattr(used[column], reduce)()) if column in used else np.nan
        rows.append(row)
    columns = ["gain", "gain_low", "gain_high", "gap_closed", "gap_low", "gap_high"]
    head = ["model", "n_conditions", "n_runs", "mean", "low", "high"]
    return pd.DataFrame(rows).reindex(columns=[*head, *columns, "seconds", "peak_mb"])


def _by_unit(values: Floats, unit: NDArray[np.intp], n_units: int) -> Floats:
    """Table (units, runs), each row's values first and NaN after."""
    keep = np.isfinite(values)
    values, unit = values[keep], unit[keep]
    order = np.argsort(unit, kind="stable")
    counts = np.bincount(unit, minlength=n_units)
    column = np.arange(len(unit)) - np.repeat(np.cumsum(counts) - counts, counts)
    table = np.full((n_units, max(1, int(counts.max(initial=1)))), np.nan)
    table[unit[order], column] = values[order]
    return table


def _resample(values: Floats, drawn: NDArray[np.intp], rng: np.random.Generator) -> Floats:
    """Unit means of each resample, (resamples, units): units as drawn, runs drawn anew within each."""
    count = np.isfinite(values).sum(1)
    n_runs = values.shape[1]
    total = np.zeros(drawn.shape)
    for k in range(n_runs):  # over runs, of which there are few
        pick = (rng.random(drawn.shape) * count[drawn]).astype(np.intp)
        total += np.where(k < count[drawn], values[drawn, pick], 0.0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(count[drawn] > 0, total / count[drawn], np.nan)


def _unit_means(values: Floats) -> Floats:
    count = np.isfinite(values).sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(count > 0, np.nansum(values, axis=1) / count, np.nan)


def _mean(values: Floats) -> Floats:
    """Mean over the last axis without NaN."""
    count = np.isfinite(values).sum(-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.nansum(values, axis=-1) / np.where(count > 0, count, np.nan)


def _shared(tables: list[Floats]) -> list[Floats]:
    """Only units that every table has."""
    missing = np.logical_or.reduce([np.isnan(t) for t in tables])
    return [np.where(missing, np.nan, t) for t in tables]


def _gain(model: Floats, baseline: Floats, metric: Metric) -> Floats:
    return metric.orient(_mean(model)) - metric.orient(_mean(baseline))


def _gap(model: Floats, baseline: Floats, ceiling: Floats, metric: Metric) -> Floats:
    if metric.best_value is None:
        return np.full(model.shape[:-1], np.nan)
    return gap_closed(_mean(model), _mean(baseline), _mean(ceiling), metric=metric)


def _ends(values: Floats, level: float, table: Floats) -> tuple[float, float]:
    """Percentile interval; none where one value was all there was, or most resamples have none."""
    good = np.asarray(values)[np.isfinite(values)]
    if np.isfinite(table).sum() < 2 or len(good) < len(values) / 2:
        return np.nan, np.nan
    low, high = np.quantile(good, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
