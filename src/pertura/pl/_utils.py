"""What the plots share: axes, saving and showing as scanpy does."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def new_axes(ax: Axes | None, figsize: tuple[float, float]) -> Axes:
    """`ax`, or the axes of a new figure of `figsize` inches."""
    return ax if ax is not None else plt.figure(figsize=figsize, layout="constrained").add_subplot()


def finish(ax: Axes, name: str, *, given: bool, show: bool | None, save: str | bool | Path | None) -> Axes | None:
    """Save and show as scanpy does.

    Parameters
    ----------
    ax
        What was drawn on.
    name
        Of the file, before the suffix.
    given
        Whether the caller brought the axes; they are then not shown unless asked for.
    show
        `None`: as :attr:`scanpy.settings.autoshow` says.
    save
        ``True``, or a string that is appended to the name of the file in :attr:`scanpy.settings.figdir`; a path
        with a folder is taken as it is.

    Returns
    -------
    The axes, or `None` if they were shown.
    """
    from scanpy import settings

    if save:
        if isinstance(save, Path) or (isinstance(save, str) and Path(save).parent != Path()):
            path = Path(save)
        else:
            suffix = "" if save is True else str(save)
            ending = "" if Path(suffix).suffix else f".{settings.file_format_figs}"
            path = Path(settings.figdir) / f"{name}{suffix}{ending}"
        path.parent.mkdir(parents=True, exist_ok=True)
        ax.figure.savefig(path, bbox_inches="tight")
    if show is None:
        show = settings.autoshow and not given and not save
    if not show:
        return ax
    plt.show()
    return None
