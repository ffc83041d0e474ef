"""Scores across conditions, which ask whether each prediction is closest to its own truth.

Inputs are tables of effects (or means) ``(conditions, genes)``, rows of prediction and truth in the same
order.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy.spatial.distance import cdist

from ._arrays import Floats, profiles
from ._registry import register

# Distances that agree to this precision are ties; their differences are rounding.
_TIE = 1e-9


def _tables(predicted: ArrayLike, truth: ArrayLike, others: ArrayLike | None) -> tuple[Floats, Floats]:
    p, t = profiles(predicted=predicted, truth=truth)
    if p.ndim != 2 or p.shape != t.shape:
        raise ValueError(
            f"`predicted` {p.shape} and `truth` {t.shape} must be tables (conditions, genes) of equal shape."
        )
    if others is not None:
        (o,) = profiles(others=others)
        if o.ndim != 2 or o.shape[1] != t.shape[1]:
            raise ValueError(f"`others` must be a table (conditions, {t.shape[1]}), got {o.shape}.")
        t = np.vstack([t, o])
    return p, t


def _pairwise(p: Floats, t: Floats, metric: str) -> Floats:
    if metric != "cosine":
        return cdist(p, t, {"l1": "cityblock", "l2": "euclidean"}[metric])
    with np.errstate(invalid="ignore", divide="ignore"):
        cosine = (p @ t.T) / (np.linalg.norm(p, axis=1)[:, None] * np.linalg.norm(t, axis=1))
    return 1.0 - np.nan_to_num(cosine)


def _distances(p: Floats, t: Floats, metric: str, exclude: Sequence[Sequence[int]] | None = None) -> Floats:
    """Distance of each row of `p` to each row of `t`, without the genes excluded for that row of `p`."""
    distance = _pairwise(p, t, metric)
    for i, genes in enumerate(exclude or ()):
        if len(genes):
            distance[i] = _pairwise(np.delete(p[i : i + 1], genes, 1), np.delete(t, genes, 1), metric)[0]
    return distance


def _rank(distance: Floats) -> tuple[Floats, Floats]:
    """Count the candidates that are nearer than the own one, and that tie with it, for each row."""
    own = np.diagonal(distance)[:, None]
    tied = np.isclose(distance, own, rtol=_TIE, atol=_TIE * 1e-3)
    np.fill_diagonal(tied, False)
    nearer = (distance < own) & ~tied
    return nearer.sum(1).astype(np.float64), tied.sum(1).astype(np.float64)


@register(best_value=1.0, higher_is_better=True, needs="table")
def centroid_accuracy(
    predicted: ArrayLike,
    truth: ArrayLike,
    *,
    others: ArrayLike | None = None,
    against: Literal["truth", "prediction"] = "truth",
) -> Floats:
    """Share of the other conditions that lie farther from a prediction than its own truth (Euclidean).

    Also known as nearest-identity rank (NIR). Chance, and any prediction equal for all conditions, is 0.5 on
    average.

    Parameters
    ----------
    predicted, truth
        ``(conditions, genes)``, rows in the same order; means or effects against one control give the same
        value.
    others
        Further true profiles ``(more, genes)`` to tell the truth from, e.g. the training perturbations.
    against
        ``"truth"``: for each prediction, rank the true profiles (Systema). ``"prediction"``: for each truth,
        rank the predictions (PerturBench); `others` is then not allowed.

    Returns
    -------
    ``(conditions,)`` in [0, 1]; ties count one half, NaN if there is only one candidate.
    """
    if against not in ("truth", "prediction"):
        raise ValueError(f"`against` must be 'truth' or 'prediction', got {against!r}.")
    if against == "prediction":
        if others is not None:
            raise ValueError("`others` are true profiles; they have no role with against='prediction'.")
        predicted, truth = truth, predicted
    p, t = _tables(predicted, truth, others)
    nearer, tied = _rank(_distances(p, t, "l2"))
    n_others = t.shape[0] - 1
    return 1.0 - (nearer + tied / 2) / n_others if n_others else np.full(p.shape[0], np.nan)


def discrimination_score(
    predicted: ArrayLike,
    truth: ArrayLike,
    *,
    metric: Literal["l1", "l2", "cosine"] = "l1",
    exclude: Sequence[int] | Sequence[Sequence[int]] | None = None,
    others: ArrayLike | None = None,
) -> Floats:
    """One minus the relative rank of the own truth among all true effects by distance to the prediction.

    Parameters
    ----------
    predicted, truth
        Effects ``(conditions, genes)``, rows in the same order.
    metric
        ``"l1"`` (Virtual Cell Challenge), ``"l2"`` or ``"cosine"``.
    exclude
        Positions of genes to leave out, normally the perturbed genes, whose trivial change gives the identity
        away. One list leaves the same genes out everywhere; pass the targets of *all* candidates. A list per
        condition leaves out its own genes only (cell-eval, Virtual Cell Challenge): this brings each
        prediction nearer to its own truth than to the others, which keep theirs, so that even "no change" can
        score near 1.
    others
        Further true effects ``(more, genes)`` among the candidates.

    Returns
    -------
    ``(conditions,)``: ``1 - rank / candidates``, best 1 (rank 0), ties counted in expectation; chance is
    ``(candidates + 1) / (2 * candidates)``.

    References
    ----------
    cell-eval (Arc Institute), ``discrimination_score``.
    """
    if metric not in ("l1", "l2", "cosine"):
        raise ValueError(f"`metric` must be 'l1', 'l2' or 'cosine', got {metric!r}.")
    p, t = _tables(predicted, truth, others)
    if exclude is not None and all(np.ndim(e) == 0 for e in exclude):
        genes = np.asarray(exclude, dtype=np.intp)
        p, t, exclude = np.delete(p, genes, 1), np.delete(t, genes, 1), None
    if exclude is not None and len(exclude) != p.shape[0]:
        raise ValueError(f"`exclude` lists {len(exclude)} conditions, the tables have {p.shape[0]}.")
    nearer, tied = _rank(_distances(p, t, metric, exclude))
    return 1.0 - (nearer + tied / 2) / t.shape[0]


for _metric in ("l1", "l2", "cosine"):
    register(f"discrimination_score_{_metric}", best_value=1.0, higher_is_better=True, needs="table")(
        partial(discrimination_score, metric=_metric)
    )


@register(best_value=None, higher_is_better=None, needs="table")
def systematic_variation(effects: ArrayLike) -> float:
    """Mean cosine of each effect with the mean effect: how much all perturbations have in common.

    A property of the data, not a score: near 1, the mean effect predicts every perturbation well against
    control.

    Parameters
    ----------
    effects
        True effects ``(conditions, genes)``.

    Returns
    -------
    float in [-1, 1]; effects of length zero count 0.

    References
    ----------
    Systema: Vinas Torne et al., Nat Biotechnol 2025.
    """
    (e,) = profiles(effects=effects)
    if e.ndim != 2:
        raise ValueError(f"`effects` must be a table (conditions, genes), got shape {e.shape}.")
    return float(1.0 - _distances(e, e.mean(0, keepdims=True), "cosine").mean())
