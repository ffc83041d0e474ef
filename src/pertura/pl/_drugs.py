"""Dose responses, maps of drugs, ranked targets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from ._utils import finish, new_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_Save = str | bool | Path | None


def dose_response(
    effects: pd.DataFrame,
    genes: Sequence[str],
    *,
    perturbation: str | None = None,
    context: str | None = None,
    measured: pd.DataFrame | None = None,
    log: bool = True,
    n_columns: int = 3,
    ax: Axes | None = None,
    show: bool | None = None,
    save: _Save = None,
) -> Axes | list[Axes] | None:
    """Effect of perturbations on some genes over the dose, with intervals; a panel per perturbation and context.

    Parameters
    ----------
    effects
        What ``get_perturbation_effect(perturbation, dose=[…])`` returns.
    genes
        Genes to draw.
    perturbation, context
        One of several; by default all are drawn, each in its own panel.
    measured
        Table with ``gene``, ``dose`` and ``lfc_mean`` (or ``effect``) to draw as points, of every panel or, with the columns
        ``perturbation`` and ``context``, of its own.
    log
        Logarithmic axis of doses; dose 0 is then left out.
    n_columns
        Panels in a row.
    ax, show, save
        As in :func:`effect_scatter`. `ax` holds one panel.

    Returns
    -------
    The axes (a list, where there are several panels), or `None` if they were shown.

    Raises
    ------
    ValueError
        Where nothing is left to draw, or `ax` is given and there are several panels.
    """
    table = effects[effects["gene"].isin(list(genes))]
    keys = [key for key in ("perturbation", "context") if key in table]
    for key, value in (("perturbation", perturbation), ("context", context)):
        table = table if value is None else table[table[key].astype(str) == value]
    table = table.assign(dose=pd.to_numeric(table["dose"], errors="coerce")).dropna(subset="dose")
    table = table[table["dose"] > 0] if log else table
    if not len(table):
        raise ValueError("`effects` has no row of these genes with a dose. Ask with `dose=[...]`, and check `genes`.")
    panels = list(table.groupby(table[keys].astype(str).agg(", ".join, axis=1), sort=False))
    given = ax is not None
    if given and len(panels) > 1:
        raise ValueError(
            f"`ax` holds one panel, but there are {len(panels)} ({'; '.join(name for name, _ in panels[:4])}, …). "
            "Name `perturbation` and `context`, or leave `ax` out."
        )
    several = {key for key in keys if table[key].nunique() > 1} or {"perturbation"}
    grid = [ax] if given else _panels(len(panels), n_columns)
    for at, (_, own) in zip(grid, panels, strict=True):
        title = ", ".join(str(own[key].iloc[0]) for key in keys if key in several)
        _dose_panel(at, own, genes, _of_panel(measured, own, keys), log=log, title=title)
    grid[0].legend(frameon=False, fontsize="small")
    # those of a grid share their figure
    shown = finish(grid[0], "dose_response", given=given, show=show, save=save)
    return shown if shown is None or len(grid) == 1 else grid


def _panels(number: int, n_columns: int) -> list[Axes]:
    """Axes side by side that share both scales."""
    if number == 1:
        return [new_axes(None, (4.5, 3.2))]
    import matplotlib.pyplot as plt

    columns = min(number, n_columns)
    rows = -(-number // columns)
    figure, axes = plt.subplots(
        rows,
        columns,
        figsize=(3.2 * columns, 2.8 * rows),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for empty in axes.flat[number:]:
        figure.delaxes(empty)
    return list(axes.flat[:number])


def _of_panel(measured: pd.DataFrame | None, own: pd.DataFrame, keys: Sequence[str]) -> pd.DataFrame | None:
    """Measured effects of a panel."""
    for key in keys:
        if measured is not None and key in measured:
            measured = measured[measured[key].astype(str) == str(own[key].iloc[0])]
    return measured


def _dose_panel(
    ax: Axes, own: pd.DataFrame, genes: Sequence[str], measured: pd.DataFrame | None, *, log: bool, title: str
) -> None:
    for i, gene in enumerate(genes):
        curve = own[own["gene"] == gene].sort_values("dose")
        ax.plot(curve["dose"], curve["lfc_mean"], color=f"C{i}", label=gene)
        ax.fill_between(curve["dose"], curve["ci_low"], curve["ci_high"], color=f"C{i}", alpha=0.2, lw=0)
        if measured is not None:
            points = measured[measured["gene"] == gene]
            height = points["lfc_mean" if "lfc_mean" in points else "effect"]
            ax.plot(pd.to_numeric(points["dose"]), height, "o", color=f"C{i}", ms=4)
    if log:
        ax.set_xscale("log")
    ax.axhline(0.0, color="0.7", lw=0.8, zorder=0)
    ax.set(xlabel="dose", ylabel="effect", title=title)
    ax.label_outer()


def drug_map(
    embedding: pd.DataFrame,
    *,
    color: pd.Series | None = None,
    labels: Sequence[str] = (),
    ax: Axes | None = None,
    show: bool | None = None,
    save: _Save = None,
) -> Axes | None:
    """Two principal components of the vectors of drugs; drugs that were not trained are open circles.

    Parameters
    ----------
    embedding
        What :meth:`pertura.model.DrugAAE.get_drug_embedding` returns.
    color
        Class of each drug, by name.
    labels
        Drugs to name.
    ax, show, save
        As in :func:`effect_scatter`.
    """
    values = embedding.drop(columns="trained").to_numpy(float)
    centred = values - values.mean(0)
    _, _, axes = np.linalg.svd(centred, full_matrices=False)
    place = centred @ axes[:2].T
    trained = embedding["trained"].to_numpy(bool)
    given, ax = ax is not None, new_axes(ax, (4.2, 3.8))
    classes = pd.Series("", index=embedding.index) if color is None else color.reindex(embedding.index).fillna("other")
    for i, name in enumerate(sorted(classes.unique())):
        own = (classes == name).to_numpy()
        ax.scatter(*place[own & trained].T, color=f"C{i % 10}", s=18, label=name or None)
        ax.scatter(*place[own & ~trained].T, facecolors="none", edgecolors=f"C{i % 10}", s=28)
    for name in labels:
        ax.annotate(name, place[embedding.index.get_loc(name)], fontsize="x-small")
    if color is not None:
        ax.legend(frameon=False, fontsize="x-small", loc="center left", bbox_to_anchor=(1, 0.5))
    ax.set(xlabel="PC1", ylabel="PC2")
    return finish(ax, "drug_map", given=given, show=show, save=save)


def target_ranking(
    scores: pd.DataFrame,
    perturbation: str,
    *,
    known: Sequence[str] = (),
    n_genes: int = 15,
    ax: Axes | None = None,
    show: bool | None = None,
    save: _Save = None,
) -> Axes | None:
    """Genes with the highest target scores of a drug; known targets are marked.

    Parameters
    ----------
    scores
        What :meth:`pertura.model.DrugAAE.get_drug_target_scores` returns.
    perturbation
        Row to draw.
    known
        Known targets.
    n_genes
        How many genes.
    ax, show, save
        As in :func:`effect_scatter`.
    """
    if perturbation not in scores.index:
        raise ValueError(
            f"`perturbation`: {perturbation!r} is not a row of `scores` ({', '.join(scores.index[:5])}, …)."
        )
    top = scores.loc[perturbation].nlargest(n_genes)[::-1]
    given, ax = ax is not None, new_axes(ax, (3.6, 0.22 * len(top) + 0.8))
    ax.barh(top.index, top, color=["C3" if g in set(known) else "0.6" for g in top.index])
    ax.set(xlabel="target score", title=perturbation)
    return finish(ax, "target_ranking", given=given, show=show, save=save)
