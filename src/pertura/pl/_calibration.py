"""Whether intervals hold what they promise."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from ._utils import finish, new_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def calibration(
    curves: pd.DataFrame | Mapping[str, pd.DataFrame],
    *,
    title: str | None = None,
    ax: Axes | None = None,
    show: bool | None = None,
    save: str | bool | Path | None = None,
) -> Axes | None:
    """Coverage of intervals against their nominal level; below the diagonal they are too narrow.

    Parameters
    ----------
    curves
        What :func:`pertura.metrics.effect_calibration` or :func:`pertura.metrics.calibration_curve` returns, or
        several by name.
    title
        Of the axes.
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
    named = {"": curves} if isinstance(curves, pd.DataFrame) else dict(curves)
    for name, curve in named.items():
        lacking = sorted({"level", "coverage"} - set(curve.columns))
        if lacking:
            raise ValueError(f"`curves`: {name or 'the table'} lacks the columns {lacking}.")
    ax = new_axes(ax, (3.6, 3.4))
    ax.plot([0, 1], [0, 1], color="0.6", linewidth=0.8, zorder=0)
    for name, curve in named.items():
        ordered = curve.sort_values("level")
        ax.plot(ordered["level"], ordered["coverage"], marker="o", markersize=3, linewidth=1, label=name or None)
    ax.set(xlim=(0, 1), ylim=(0, 1), aspect="equal", xlabel="level of the interval", ylabel="share of genes inside")
    if any(named):
        ax.legend(frameon=False, fontsize="small")
    if title is not None:
        ax.set_title(title)
    return finish(ax, "calibration", given=given, show=show, save=save)
