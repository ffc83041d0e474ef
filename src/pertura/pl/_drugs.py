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
    ax: Axes | None = None,
    show: bool | None = None,
    save: _Save = None,
) -> Axes | None:
    """Effect of a perturbation on some genes over its dose, with intervals.

    Parameters
    ----------
    effects
        What ``get_perturbation_effect(perturbation, dose=[…])`` returns.
    genes
        Genes to draw.
    perturbation, context
        Which of several.
    measured
        Table with ``gene``, ``dose`` and ``lfc_mean`` to draw as points.
    log
        Logarithmic axis of doses; dose 0 is then left out.
    ax, show, save
        As in :func:`effect_scatter`.

    Raises
    ------
    ValueError
        Where nothing is left to draw.
    """
    table = effects[effects["gene"].isin(list(genes))]
    for column, value in (("perturbation", perturbation), ("context", context)):
        if value is not None:
            table = table[table[column].astype(str) == value]
        elif table[column].nunique() > 1:
            raise ValueError(f"`{column}`: `effects` has {table[column].nunique()} of them. Name one.")
    table = table.assign(dose=pd.to_numeric(table["dose"], errors="coerce")).dropna(subset="dose")
    table = table[table["dose"] > 0] if log else table
    if not len(table):
        raise ValueError("`effects` has no row of these genes with a dose. Ask with `dose=[...]`, and check `genes`.")
    given, ax = ax is not None, new_axes(ax, (4.5, 3.2))
    for i, gene in enumerate(genes):
        own = table[table["gene"] == gene].sort_values("dose")
        ax.plot(own["dose"], own["lfc_mean"], color=f"C{i}", label=gene)
        ax.fill_between(own["dose"], own["ci_low"], own["ci_high"], color=f"C{i}", alpha=0.2, lw=0)
        if measured is not None:
            points = measured[measured["gene"] == gene]
            ax.plot(pd.to_numeric(points["dose"]), points["lfc_mean"], "o", color=f"C{i}", ms=4)
    if log:
        ax.set_xscale("log")
    ax.axhline(0.0, color="0.7", lw=0.8, zorder=0)
    ax.set(xlabel="dose", ylabel="effect", title=perturbation or str(table["perturbation"].iloc[0]))
    ax.legend(frameon=False, fontsize="small")
    return finish(ax, "dose_response", given=given, show=show, save=save)


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
