"""Models, baselines and ceiling side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from pertura.metrics import METRICS

from ._utils import finish, new_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BASELINES = ("NoChange", "MeanEffect", "WeightedMeanEffect", "NearestNeighbour", "Additive", "Linear")


def benchmark(
    summary: pd.DataFrame,
    metric: str,
    *,
    models: Sequence[str] | None = None,
    baseline: str = "MeanEffect",
    ceiling: str = "ceiling",
    title: str | None = None,
    ax: Axes | None = None,
    show: bool | None = None,
    save: str | bool | Path | None = None,
) -> Axes | None:
    """Dots with intervals for one metric; lines mark the baseline and the technical ceiling.

    Parameters
    ----------
    summary
        What :func:`pertura.benchmark.summarize` returns, of one dataset and split.
    metric
        Which metric to draw.
    models
        Models from top to bottom; default all, best first.
    baseline
        Model whose mean is marked by a dotted line. Baselines are grey.
    ceiling
        Model whose mean is marked by a dashed line.
    title
        Default: the metric.
    ax
        Axes to draw on.
    show
        Show the figure; `None` does as :attr:`scanpy.settings.autoshow` says, and not for given axes or a saved figure.
    save
        ``True`` or a suffix saves to :attr:`scanpy.settings.figdir` as scanpy does, a path to that file.

    Returns
    -------
    The axes, or `None` if they were shown.
    """
    given = ax is not None
    data = summary[summary["metric"] == metric]
    if data.empty:
        raise ValueError(f"`metric`: `summary` has no {metric!r}, it has {list(summary['metric'].unique())}.")
    if data["model"].duplicated().any():
        raise ValueError("`summary` holds several datasets or splits; choose one before drawing.")
    data = data.set_index("model")
    lines = {n: float(data.loc[n, "mean"]) for n in (baseline, ceiling) if n in data.index}
    data = data[data["mean"].notna()].drop(index=ceiling, errors="ignore")
    if models is None:
        described = METRICS.get(metric, METRICS.get(metric.rpartition("_top")[0]))
        score = data["mean"] if described is None or described.best_value is None else described.orient(data["mean"])
        models = list(score.sort_values(ascending=False, kind="stable").index)
    missing = [m for m in models if m not in data.index]
    if missing:
        raise ValueError(f"`models`: {missing} have no {metric!r}; there are {list(data.index)}.")
    ax = new_axes(ax, (4.2, 0.8 + 0.35 * len(models)))
    place = -np.arange(len(models))
    for y, name in zip(place, models, strict=True):
        row = data.loc[name]
        color = "0.5" if name.split(":")[0] in _BASELINES else "C0"
        if np.isfinite(row["low"]):
            ax.plot([row["low"], row["high"]], [y, y], color=color, linewidth=1.5, solid_capstyle="butt")
        ax.plot([row["mean"]], [y], marker="o", color=color, linestyle="none")
    for name, style in ((baseline, ":"), (ceiling, "--")):
        if np.isfinite(lines.get(name, np.nan)):
            ax.axvline(lines[name], color="0.4", linestyle=style, linewidth=1, label=name, zorder=0)
    if metric.startswith("interval_coverage"):
        ax.axvline(METRICS["interval_coverage"].best_value, color="0.4", linewidth=1, label="nominal", zorder=0)
    ax.set(yticks=place, yticklabels=models, ylim=(place[-1] - 0.6, 0.6), xlabel=metric)
    if ax.get_legend_handles_labels()[0]:
        ax.legend(frameon=False, fontsize="x-small", loc="best")
    if title is not None:
        ax.set_title(title)
    return finish(ax, "benchmark", given=given, show=show, save=save)
