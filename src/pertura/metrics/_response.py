r"""Scores of a predicted mean profile.

Notation, shared by every function: `predicted` :math:`x`, `truth` :math:`t` and `control` :math:`c` are mean
profiles (pseudobulks) over the same genes and on the same scale, normally log1p of counts per 10,000. Effects are
:math:`t - c` and :math:`x - c_x`, where `predicted_control` :math:`c_x` is the mean of the control cells that the prediction
started from. These should be other cells than those of `control`: the noise of the same cells is in both effects, and their
correlation counts it as agreement. Without `predicted_control` it is `control`.

Arrays are ``(genes,)``, giving a float, or ``(conditions, genes)``, giving one value per condition. `top`
restricts a score to the genes of largest \|t - c\|; genes tied at the cut share the remaining places, so the
order of the genes never matters. `genes` restricts it to a boolean mask or integer positions.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import rankdata

from ._arrays import Floats, gene_weights, profiles, result, rms, top_weights, weighted_mean, weighted_pearson
from ._registry import DEFAULT_TOP, register


def _effects(
    predicted: ArrayLike, truth: ArrayLike, control: ArrayLike, predicted_control: ArrayLike | None
) -> tuple[Floats, Floats, Floats, Floats]:
    own = control if predicted_control is None else predicted_control
    x, t, c, c_x = profiles(predicted=predicted, truth=truth, control=control, predicted_control=own)
    return x - c_x, t - c, t, c


@register(best_value=1.0, higher_is_better=True, needs="mean", duplicate="spearman_brown")
def pearson_effect(
    predicted: ArrayLike,
    truth: ArrayLike,
    control: ArrayLike,
    predicted_control: ArrayLike | None = None,
    *,
    top: int | None = None,
    genes: ArrayLike | None = None,
) -> Any:
    """Pearson correlation of the predicted with the true effect against control.

    An effect shared by all perturbations is enough to score high here; read it next to
    :func:`pearson_effect_vs_reference`.

    Parameters
    ----------
    predicted, truth, control
        Mean profiles ``(genes,)`` or ``(conditions, genes)``.
    predicted_control
        Mean of the control cells that the prediction started from; default `control`.
    top
        Only the genes of largest true absolute effect.
    genes
        Only these genes (mask or positions).

    Returns
    -------
    float or array of shape ``(conditions,)``
        0 for a prediction without any effect, NaN where the truth has none.
    """
    e, d, t, c = _effects(predicted, truth, control, predicted_control)
    return result(weighted_pearson(e, d, gene_weights(t, c, top=top, genes=genes), scale=rms(t)))


@register(best_value=1.0, higher_is_better=True, needs="mean", duplicate="spearman_brown")
def pearson_effect_vs_reference(
    predicted: ArrayLike,
    truth: ArrayLike,
    reference: ArrayLike,
    control: ArrayLike | None = None,
    *,
    top: int | None = None,
    genes: ArrayLike | None = None,
) -> Any:
    """Pearson correlation of predicted and true departure from the mean perturbed profile.

    Removes what all perturbations have in common, which the correlation against control rewards.

    Parameters
    ----------
    predicted, truth
        Mean profiles ``(genes,)`` or ``(conditions, genes)``.
    reference
        Average of the perturbation centroids of the *training* data (see
        :func:`~pertura.metrics.perturbed_mean`).
    control
        Needed with `top`, which ranks by the effect against control.
    top, genes
        As in :func:`pearson_effect`.

    References
    ----------
    Systema: Vinas Torne et al., Nat Biotechnol 2025.
    """
    x, t, m = profiles(predicted=predicted, truth=truth, reference=reference)
    c = None if control is None else profiles(truth=t, control=control)[1]
    return result(weighted_pearson(x - m, t - m, gene_weights(t, c, top=top, genes=genes), scale=rms(t)))


@register(best_value=1.0, higher_is_better=True, needs="mean", duplicate="spearman_brown")
def spearman_effect(
    predicted: ArrayLike,
    truth: ArrayLike,
    control: ArrayLike,
    predicted_control: ArrayLike | None = None,
    *,
    top: int | None = None,
    genes: ArrayLike | None = None,
) -> Any:
    """Spearman correlation of the predicted with the true effect against control.

    Parameters
    ----------
    predicted, truth, control, predicted_control, top, genes
        As in :func:`pearson_effect`; ranks are taken among the chosen genes, ties get their average rank.
    """
    e, d, t, c = _effects(predicted, truth, control, predicted_control)
    weights = np.broadcast_to(gene_weights(t, c, top=top, genes=genes), np.broadcast_shapes(e.shape, d.shape))
    # Effects that are single-precision rounding of "no effect" would otherwise get a random but full ranking.
    e = np.where(np.abs(e) <= 1e-6 * rms(t)[..., None], 0.0, e)
    ranks = [np.nan_to_num(rankdata(np.where(weights > 0, v, np.nan), axis=-1, nan_policy="omit")) for v in (e, d)]
    return result(weighted_pearson(ranks[0], ranks[1], weights))


@register(best_value=1.0, higher_is_better=True, needs="mean")
def r2(
    predicted: ArrayLike,
    truth: ArrayLike,
    control: ArrayLike | None = None,
    predicted_control: ArrayLike | None = None,
    *,
    on: Literal["mean", "effect"] = "mean",
    top: int | None = None,
    genes: ArrayLike | None = None,
) -> Any:
    r"""Coefficient of determination over genes, :math:`1 - \sum (t-x)^2 / \sum (t-\bar t)^2`.

    Parameters
    ----------
    predicted, truth, control
        Mean profiles ``(genes,)`` or ``(conditions, genes)``; `control` is needed with `top` or
        ``on="effect"``.
    predicted_control
        As in :func:`pearson_effect`; only matters with ``on="effect"``.
    on
        ``"mean"`` (the usual definition in the field) compares post-perturbation means, so differences
        *between genes* count as explained and the value over all genes is close to 1 for any predictor; use
        it with `top`. ``"effect"`` compares the effects.
    top, genes
        As in :func:`pearson_effect`.

    Returns
    -------
    float or array of shape ``(conditions,)``; can be negative, NaN where the truth does not vary over the
    genes.
    """
    if on not in ("mean", "effect"):
        raise ValueError(f"`on` must be 'mean' or 'effect', got {on!r}.")
    if on == "effect":
        if control is None:
            raise ValueError("`on='effect'` needs `control`.")
        e, d, t, c = _effects(predicted, truth, control, predicted_control)
        return result(_r2(e, d, gene_weights(t, c, top=top, genes=genes)))
    given = {} if control is None else {"control": control}
    x, t, *c = profiles(predicted=predicted, truth=truth, **given)
    return result(_r2(x, t, gene_weights(t, *(c or [None]), top=top, genes=genes)))


@register("r2_effect", best_value=1.0, higher_is_better=True, needs="mean")
def r2_effect(
    predicted: ArrayLike,
    truth: ArrayLike,
    control: ArrayLike,
    predicted_control: ArrayLike | None = None,
    *,
    top: int | None = None,
    genes: ArrayLike | None = None,
) -> Any:
    """Coefficient of determination of the effect against control.

    Parameters
    ----------
    predicted, truth, control, predicted_control, top, genes
        As in :func:`r2`, of which this is ``on="effect"``.
    """
    return r2(predicted, truth, control, predicted_control, on="effect", top=top, genes=genes)


def _r2(x: Floats, t: Floats, weights: Floats) -> Floats:
    spread = weighted_mean((t - weighted_mean(t, weights)[..., None]) ** 2, weights)
    with np.errstate(invalid="ignore", divide="ignore"):
        value = 1.0 - weighted_mean((t - x) ** 2, weights) / spread
    return np.where(spread > 0, value, np.nan)


def _error(
    predicted: ArrayLike,
    truth: ArrayLike,
    control: ArrayLike | None,
    top: int | None,
    genes: ArrayLike | None,
) -> tuple[Floats, Floats]:
    if control is None:
        x, t = profiles(predicted=predicted, truth=truth)
        return x - t, gene_weights(t, None, top=top, genes=genes)
    x, t, c = profiles(predicted=predicted, truth=truth, control=control)
    return x - t, gene_weights(t, c, top=top, genes=genes)


@register(best_value=0.0, higher_is_better=False, needs="mean", duplicate="half")
def mse(
    predicted: ArrayLike,
    truth: ArrayLike,
    control: ArrayLike | None = None,
    *,
    top: int | None = None,
    genes: ArrayLike | None = None,
) -> Any:
    """Mean squared error over genes.

    Parameters
    ----------
    predicted, truth, control, top, genes
        As in :func:`pearson_effect`; `control` only matters with `top`.
    """
    error, weights = _error(predicted, truth, control, top, genes)
    return result(weighted_mean(error**2, weights))


@register(best_value=0.0, higher_is_better=False, needs="mean")
def mae(
    predicted: ArrayLike,
    truth: ArrayLike,
    control: ArrayLike | None = None,
    *,
    top: int | None = None,
    genes: ArrayLike | None = None,
) -> Any:
    """Mean absolute error over genes.

    Parameters
    ----------
    predicted, truth, control, top, genes
        As in :func:`pearson_effect`; `control` only matters with `top`.
    """
    error, weights = _error(predicted, truth, control, top, genes)
    return result(weighted_mean(np.abs(error), weights))


def de_weights(scores: ArrayLike) -> Floats:
    """Gene weights from differential-expression scores: absolute, scaled to [0, 1], squared, summing to 1.

    Parameters
    ----------
    scores
        ``(..., genes)``, e.g. t statistics of one perturbation against the rest. NaN counts as 0.

    Returns
    -------
    ``(..., genes)``; equal weights where all scores are equal.

    References
    ----------
    Mejia et al., arXiv 2506.22641; Miller et al., bioRxiv 2025.10.20.683304.
    """
    size = np.abs(np.nan_to_num(np.asarray(scores, dtype=np.float64)))
    low, high = size.min(-1, keepdims=True), size.max(-1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        weights = np.where(high > low, (size - low) / (high - low), 1.0) ** 2
    return weights / weights.sum(-1, keepdims=True)


def _resolve_weights(weights: ArrayLike | None, t: Floats, control: ArrayLike | None) -> Floats:
    if weights is None:
        if control is None:
            raise ValueError("`weights` is missing: pass weights (genes,) or `control` to weight by the true effect.")
        return de_weights(t - profiles(truth=t, control=control)[1])
    w = profiles(truth=t, weights=weights)[1]
    if (w < 0).any():
        raise ValueError("`weights` has negative values; pass e.g. the result of `de_weights(scores)`.")
    return w


@register(best_value=0.0, higher_is_better=False, needs="mean")
def wmse(
    predicted: ArrayLike,
    truth: ArrayLike,
    control: ArrayLike | None = None,
    *,
    weights: ArrayLike | None = None,
) -> Any:
    """Mean squared error with genes weighted by how differentially expressed they truly are.

    Parameters
    ----------
    predicted, truth, control
        Mean profiles ``(genes,)`` or ``(conditions, genes)``.
    weights
        Non-negative ``(genes,)`` or ``(conditions, genes)``, normally :func:`de_weights` of scores against
        the rest (what :func:`~pertura.metrics.evaluate` passes). Default: :func:`de_weights` of ``truth -
        control``.

    References
    ----------
    Mejia et al., arXiv 2506.22641.
    """
    x, t = profiles(predicted=predicted, truth=truth)
    return result(weighted_mean((x - t) ** 2, _resolve_weights(weights, t, control)))


@register(best_value=1.0, higher_is_better=True, needs="mean")
def weighted_r2(
    predicted: ArrayLike,
    truth: ArrayLike,
    control: ArrayLike,
    predicted_control: ArrayLike | None = None,
    *,
    weights: ArrayLike | None = None,
) -> Any:
    """Coefficient of determination of the effect with genes weighted as in :func:`wmse`.

    Parameters
    ----------
    predicted, truth, control, weights
        As in :func:`wmse`.
    predicted_control
        As in :func:`pearson_effect`.
    """
    e, d, t, c = _effects(predicted, truth, control, predicted_control)
    return result(_r2(e, d, _resolve_weights(weights, t, c)))


@register(best_value=1.0, higher_is_better=True, needs="mean")
def direction_match(
    predicted: ArrayLike,
    truth: ArrayLike,
    control: ArrayLike,
    predicted_control: ArrayLike | None = None,
    *,
    de: ArrayLike | None = None,
    top: int | None = None,
) -> Any:
    """Share of the truly changed genes whose predicted effect has the right sign.

    Parameters
    ----------
    predicted, truth, control, predicted_control
        As in :func:`pearson_effect`.
    de
        Boolean mask of the truly differentially expressed genes, ``(genes,)`` or ``(conditions, genes)``;
        default all genes whose true effect is not zero.
    top
        Only the genes of largest true absolute effect.

    Returns
    -------
    float or array; a predicted effect of exactly zero counts one half (the expectation of a coin toss), NaN
    where no gene changed.
    """
    e, d, t, c = _effects(predicted, truth, control, predicted_control)
    weights = gene_weights(t, c, top=top)
    if de is not None:
        mask = np.asarray(de)
        if mask.dtype != bool or mask.shape[-1] != t.shape[-1]:
            raise ValueError(f"`de` must be a boolean mask over {t.shape[-1]} genes, got {mask.dtype} {mask.shape}.")
        weights = weights * mask
    e = np.where(np.abs(e) <= 1e-6 * rms(t)[..., None], 0.0, e)
    return result(weighted_mean((1.0 + np.sign(e) * np.sign(d)) / 2.0, weights * (d != 0)))


@register(best_value=1.0, higher_is_better=True, needs="mean")
def de_overlap(
    predicted: ArrayLike,
    truth: ArrayLike,
    control: ArrayLike,
    predicted_control: ArrayLike | None = None,
    *,
    k: int = DEFAULT_TOP,
) -> Any:
    """Overlap of the k genes of largest predicted and largest true absolute effect, divided by k.

    Parameters
    ----------
    predicted, truth, control, predicted_control
        As in :func:`pearson_effect`.
    k
        Size of both sets (at most the number of genes). Ties at the cut are counted in expectation, so that a
        prediction without effect scores ``k / genes``.
    """
    e, d, t, _ = _effects(predicted, truth, control, predicted_control)
    e = np.where(np.abs(e) <= 1e-6 * rms(t)[..., None], 0.0, e)
    chosen = [top_weights(np.abs(v), k) for v in (e, d)]
    return result((chosen[0] * chosen[1]).sum(-1) / min(k, t.shape[-1]))
