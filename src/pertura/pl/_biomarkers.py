"""Genes that predict a response, and the contexts they tell apart."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from ._utils import finish, new_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def gene_importance(
    table: pd.DataFrame,
    *,
    n_genes: int = 15,
    title: str | None = None,
    ax: Axes | None = None,
    show: bool | None = None,
    save: str | bool | Path | None = None,
) -> Axes | None:
    """Bars of the most important genes, coloured by the direction in which their expression acts.

    Parameters
    ----------
    table
        What :meth:`pertura.model.PerturbX.get_gene_importance` returns.
    n_genes
        Number of bars.
    title
        Of the axes.
    ax, show, save
        As in :func:`~pertura.pl.effect_scatter`.

    Returns
    -------
    The axes, or `None` if they were shown.
    """
    missing = {"importance", "direction"} - set(table.columns)
    if missing:
        raise ValueError(f"`table` lacks the columns {sorted(missing)}; pass what `get_gene_importance` returns.")
    given = ax is not None
    data = table.sort_values("importance", ascending=False, kind="stable").head(n_genes)[::-1]
    ax = new_axes(ax, (3.6, 0.24 * len(data) + 1.0))
    color = np.where(data["direction"] >= 0, "C3", "C0")
    ax.barh(data.index.astype(str), data["importance"], color=color)
    ax.set(xlabel="mean |Shapley value|", title="" if title is None else title)
    ax.plot([], [], "s", color="C3", label="more expression, higher coordinate")
    ax.plot([], [], "s", color="C0", label="more expression, lower coordinate")
    # below the axes: bars may be equally long
    ax.legend(fontsize="x-small", frameon=False, loc="upper center", bbox_to_anchor=(0.4, -0.14))
    ax.margins(y=0.01)
    return finish(ax, "gene_importance", given=given, show=show, save=save)


def contexts(
    table: pd.DataFrame,
    *,
    color: Mapping[str, float] | pd.Series | None = None,
    label: str = "",
    title: str | None = None,
    ax: Axes | None = None,
    show: bool | None = None,
    save: str | bool | Path | None = None,
) -> Axes | None:
    """Contexts on the first two components of what a model sees in their control cells.

    Parameters
    ----------
    table
        What :meth:`pertura.model.PerturbX.get_context_representation` returns.
    color
        Number for each context, such as the size of its measured response.
    label
        What `color` is.
    title
        Of the axes.
    ax, show, save
        As in :func:`~pertura.pl.effect_scatter`.

    Returns
    -------
    The axes, or `None` if they were shown.
    """
    if "PC1" not in table:
        raise ValueError("`table` has no column 'PC1'; pass what `get_context_representation` returns.")
    given = ax is not None
    ax = new_axes(ax, (5.2, 3.6))
    second = table["PC2"] if "PC2" in table else pd.Series(0.0, index=table.index)
    value = None if color is None else pd.Series(color).reindex(table.index).to_numpy(dtype=float)
    shown = {"color": "C0"} if value is None else {"c": value, "cmap": "viridis"}
    points = ax.scatter(table["PC1"], second, s=40, **shown)
    if value is not None:
        ax.figure.colorbar(points, ax=ax, label=label)
    for name, x, y in zip(table.index, table["PC1"], second, strict=True):
        ax.annotate(str(name), (x, y), xytext=(4, 4), textcoords="offset points", fontsize="x-small")
    ax.set(xlabel="PC1", ylabel="PC2", title="" if title is None else title)
    ax.margins(0.2)
    return finish(ax, "contexts", given=given, show=show, save=save)
