"""Predicted against measured effects."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from pertura.metrics import pearson_effect
from pertura.metrics._effects import match_effects

from ._utils import finish, new_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def effect_scatter(
    predicted: pd.DataFrame,
    measured: pd.DataFrame,
    *,
    perturbation: str | None = None,
    context: str | None = None,
    genes: Sequence[str] | None = None,
    n_labels: int = 10,
    n_intervals: int = 100,
    color: str = "C0",
    title: str | None = None,
    ax: Axes | None = None,
    show: bool | None = None,
    save: str | bool | Path | None = None,
) -> Axes | None:
    """Scatter of predicted against measured effects, with intervals and the names of the strongest genes.

    Parameters
    ----------
    predicted
        What a model's ``get_perturbation_effect`` returns.
    measured
        What :func:`pertura.metrics.measured_effect` returns.
    perturbation, context
        Which of several to draw.
    genes
        Genes to name; default the `n_labels` of largest measured absolute effect.
    n_labels
        Number of genes to name.
    n_intervals
        Number of genes, by measured absolute effect, whose predicted interval is drawn.
    color
        Of points and intervals.
    title
        Default: the perturbation and context.
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
    chosen = []
    for name, table in (("predicted", predicted), ("measured", measured)):
        for key, value in (("perturbation", perturbation), ("context", context)):
            if value is None or key not in table:
                continue
            found = table[key].astype(str)
            table = table[found == value]
            if table.empty:
                raise ValueError(f"`{key}`: `{name}` has no {value!r}, it has {sorted(found.unique())[:8]}.")
        chosen.append(table)
    data = match_effects(*chosen)
    for key in ("perturbation", "context"):
        if key in data and data[key].nunique() > 1:
            raise ValueError(f"`{key}`: there are {sorted(data[key].astype(str).unique())[:8]}; name one.")
    data = data.iloc[np.argsort(-data["effect"].abs().to_numpy(), kind="stable")]
    if genes is not None:
        missing = sorted(set(genes) - set(data["gene"]))
        if missing:
            raise ValueError(f"`genes`: {missing[:5]} have no effect in the tables.")
    named = data["gene"].head(n_labels) if genes is None else list(genes)
    ax = new_axes(ax, (4.2, 4.0))
    x, y = data["effect"].to_numpy(), data["lfc_mean"].to_numpy()
    ends = np.concatenate([x, y])
    margin = 0.05 * max(float(np.ptp(ends)), 1e-6)
    limits = (ends.min() - margin, ends.max() + margin)
    ax.axline((0, 0), slope=1, color="0.6", linewidth=0.8, zorder=0)
    ax.axhline(0, color="0.85", linewidth=0.8, zorder=0)
    top = data.head(n_intervals)
    ax.vlines(top["effect"], top["ci_low"], top["ci_high"], color=color, alpha=0.35, linewidth=0.8)
    ax.scatter(x, y, s=6, color=color, linewidth=0, rasterized=True)
    ax.set(xlim=limits, ylim=limits, xlabel="measured effect", ylabel="predicted effect", aspect="equal")
    _label(ax, data[data["gene"].isin(named)])
    r = pearson_effect(y, x, np.zeros_like(x))
    ax.text(0.97, 0.03, f"r = {r:.2f}", transform=ax.transAxes, ha="right")
    about = [str(data[k].iloc[0]) for k in ("perturbation", "context") if k in data]
    ax.set_title(", ".join(a for a in about if a != "all") if title is None else title)
    return finish(ax, "effect_scatter", given=given, show=show, save=save)


def _label(ax: Axes, data: pd.DataFrame) -> None:
    """Write names at the edge of the side of the diagonal that a point is on, in order, with a line to the point."""
    low, high = ax.get_ylim()
    step = 0.045 * (high - low)
    for sign, edge, align in ((1, low, "left"), (-1, high, "right")):  # above the diagonal, below it
        side = data[np.sign(data["lfc_mean"] - data["effect"]).replace(0, -1) == sign]
        side = side.sort_values("lfc_mean", ascending=sign > 0)
        previous = -np.inf
        for gene, x, y in zip(side["gene"], side["effect"], side["lfc_mean"], strict=True):
            previous = max(sign * y + step, previous + step)
            ax.annotate(
                gene,
                (x, y),
                xytext=(edge + sign * 0.2 * step, sign * previous),
                fontsize="x-small",
                ha=align,
                va="center",
                arrowprops={"arrowstyle": "-", "color": "0.6", "linewidth": 0.5, "shrinkA": 1, "shrinkB": 1},
            )
