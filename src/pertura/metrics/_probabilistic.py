"""Scores of a predictive distribution, as draws ``(draws, ...)`` or intervals, against measured values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy.stats import norm

from ._arrays import Floats
from ._registry import register


def _draws(draws: ArrayLike, truth: ArrayLike) -> tuple[Floats, Floats]:
    x, y = np.asarray(draws, dtype=np.float64), np.asarray(truth, dtype=np.float64)
    if x.ndim < 1 or x.shape[1:] != y.shape:
        raise ValueError(f"`draws` must have shape (draws, *truth.shape) = (draws, *{y.shape}), got {x.shape}.")
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError("`draws` or `truth` has missing or infinite values; remove them.")
    return x, y


def _level(level: float) -> float:
    if not 0 < level < 1:
        raise ValueError(f"`level` must lie between 0 and 1, got {level!r}.")
    return float(level)


@register(best_value=0.0, higher_is_better=False, needs="draws")
def crps(draws: ArrayLike, truth: ArrayLike, *, fair: bool = True, reduce: bool = True) -> Any:
    r"""Continuous ranked probability score :math:`E|X-y| - E|X-X'|/2`, estimated from draws.

    Parameters
    ----------
    draws
        ``(draws, ...)``, in the units of `truth`.
    truth
        ``(...)``.
    fair
        Average :math:`|X-X'|` over pairs of different draws, which is unbiased for the predictive
        distribution; ``False`` gives the score of the empirical distribution of the draws (for one draw: the
        absolute error).
    reduce
        Mean over all values (default) or an array like `truth`.

    References
    ----------
    Gneiting & Raftery 2007; fair version: Ferro 2014. The spread is computed from the sorted draws,
    :math:`\sum_{ij}|x_i-x_j| = 2\sum_i (2i-n-1) x_{(i)}`, in O(n log n).
    """
    x, y = _draws(draws, truth)
    n = x.shape[0]
    if n < (2 if fair else 1):
        raise ValueError(f"`draws` holds {n} draw(s); the fair score needs at least 2 (or pass fair=False).")
    rank = (2 * np.arange(1, n + 1) - n - 1).reshape(-1, *([1] * y.ndim))
    spread = (rank * np.sort(x, axis=0)).sum(0) / (n * (n - 1) if fair else n * n)
    score = np.abs(x - y).mean(0) - spread
    return float(score.mean()) if reduce else score


def _interval(low: ArrayLike, high: ArrayLike, truth: ArrayLike) -> tuple[Floats, Floats, Floats]:
    lo, hi, y = (np.asarray(a, dtype=np.float64) for a in (low, high, truth))
    if not lo.shape == hi.shape == y.shape:
        raise ValueError(f"`low` {lo.shape}, `high` {hi.shape} and `truth` {y.shape} must have one shape.")
    if (lo > hi).any():
        raise ValueError(f"`low` exceeds `high` in {int((lo > hi).sum())} places; were they swapped?")
    return lo, hi, y


@register(best_value=0.9, higher_is_better=None, needs="draws")
def interval_coverage(
    low: ArrayLike,
    high: ArrayLike,
    truth: ArrayLike,
    *,
    truth_se: ArrayLike | None = None,
    level: float = 0.9,
) -> float:
    r"""Share of measured values inside their predicted intervals; best is the nominal level (0.9).

    An interval for the *expected* expression is compared with a mean over finitely many cells, which scatters
    around the expectation by its standard error. A perfectly calibrated interval would then be missed too
    often. With `truth_se`, each half-width :math:`h` becomes :math:`\sqrt{h^2 + (z s)^2}` with :math:`z` the
    normal quantile of `level`: exact for a normal posterior and normal measurement error, independent of each
    other. Intervals that already include measurement noise (predictive intervals for new data) must be scored
    without.

    Parameters
    ----------
    low, high, truth
        Arrays of one shape.
    truth_se
        Standard error of the measured values, broadcast to their shape (for a mean over n cells: sd /
        sqrt(n)).
    level
        Nominal level of the intervals; only used with `truth_se`.
    """
    lo, hi, y = _interval(low, high, truth)
    z = norm.ppf((1 + _level(level)) / 2)
    if truth_se is not None:
        se = np.asarray(truth_se, dtype=np.float64)
        if (se < 0).any() or not np.isfinite(se).all():
            raise ValueError("`truth_se` must be finite and not negative.")
        middle = (lo + hi) / 2
        half = np.sqrt(((hi - lo) / 2) ** 2 + (z * se) ** 2)
        lo, hi = middle - half, middle + half
    return float(np.mean((y >= lo) & (y <= hi)))


@register(best_value=0.0, higher_is_better=False, needs="draws")
def interval_width(low: ArrayLike, high: ArrayLike) -> float:
    """Mean width of the intervals (sharpness); only comparable at equal coverage.

    Parameters
    ----------
    low, high
        Arrays of one shape.
    """
    lo, hi, _ = _interval(low, high, low)
    return float(np.mean(hi - lo))


@register(best_value=0.0, higher_is_better=False, needs="draws")
def interval_score(low: ArrayLike, high: ArrayLike, truth: ArrayLike, *, level: float = 0.9) -> float:
    r"""Winkler score: width plus :math:`2/\alpha` times the distance by which a value is missed.

    Parameters
    ----------
    low, high, truth
        Arrays of one shape.
    level
        Nominal level :math:`1-\alpha` of the central intervals.
    """
    lo, hi, y = _interval(low, high, truth)
    miss = np.maximum(lo - y, 0.0) + np.maximum(y - hi, 0.0)
    return float(np.mean(hi - lo + 2.0 / (1.0 - _level(level)) * miss))


def calibration_curve(
    draws: ArrayLike, truth: ArrayLike, *, levels: Sequence[float] = tuple(np.linspace(0.05, 0.95, 19))
) -> pd.DataFrame:
    """Coverage of central intervals of the draws at several nominal levels.

    Parameters
    ----------
    draws
        ``(draws, ...)``.
    truth
        ``(...)``.
    levels
        Nominal levels in (0, 1).

    Returns
    -------
    DataFrame with columns ``level``, ``coverage`` and ``width`` (mean width of the intervals).
    """
    x, y = _draws(draws, truth)
    nominal = np.array([_level(level) for level in levels])
    # Type 6 quantiles (Weibull): a new draw falls below the p quantile with probability p at any number of
    # draws.
    lo, hi = (np.quantile(x, q, axis=0, method="weibull") for q in ((1 - nominal) / 2, (1 + nominal) / 2))
    over = tuple(range(1, lo.ndim))
    inside = ((y >= lo) & (y <= hi)).mean(axis=over)
    return pd.DataFrame({"level": nominal, "coverage": inside, "width": (hi - lo).mean(axis=over)})


@register(best_value=0.0, higher_is_better=False, needs="draws")
def calibration_error(
    draws: ArrayLike, truth: ArrayLike, *, levels: Sequence[float] = tuple(np.linspace(0.05, 0.95, 19))
) -> float:
    """Mean absolute difference between coverage and nominal level.

    Parameters
    ----------
    draws, truth, levels
        As in :func:`calibration_curve`.
    """
    curve = calibration_curve(draws, truth, levels=levels)
    return float((curve["coverage"] - curve["level"]).abs().mean())
