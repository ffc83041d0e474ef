r"""Effects in a context where other perturbations were measured: a Gaussian process over perturbations.

With :math:`x_p` what other contexts say of perturbation p (its mean effect there, or a regression on control profiles),

.. math::

    y_{pc} = r x_p + z_p + e_p, \quad z \sim N\big(0,\; (v_m \mathbf{1}\mathbf{1}^\top + v_k K + v_e I) \otimes I\big),
    \quad e \sim N\big(0,\; (\mathrm{diag}(n) + s \mathbf{1}\mathbf{1}^\top) \otimes I\big), \quad K_{pq} \propto x_p^\top x_q,

with n the noise of treated cells and s that of the controls, which all effects of a context share and which is not predicted. So perturbations that did the same elsewhere are off by the same here, and what all
effects of a context have in common is found from those that are known. The variances and r maximize the marginal likelihood of
the known effects of the context; genes share them, so that a prediction is a weighted sum of measured effects. Where one or two effects
are known, the variances, relative to their mean square, are those of the other contexts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve
from scipy.optimize import minimize

from ._contexts import Asked, Conditions

Matrix = NDArray[np.float64]
Weights = NDArray[np.float64]

_MIN_KNOWN = 3  # perturbations from which variances are learned
_MAX_CHOOSING = 300  # and that choose the variances
_BOUNDS = [(-9.0, 3.0)] * 3


@dataclass(frozen=True)
class _Fit:
    """What the known effects of a context say: their rows, those of elsewhere, variances of mean, kernel and rest, slope."""

    rows: NDArray[np.int64]
    elsewhere: Matrix
    unit: float
    level: float
    variance: NDArray[np.float64]
    slope: float
    inverse: Matrix
    left: Matrix
    shared: float


class Transfer:
    """Weights of measured effects in those of contexts where some perturbations were measured.

    Parameters
    ----------
    conditions
        What was measured.
    products
        Inner products of the measured effects, per gene, ``(n_conditions, n_conditions)``.
    noise
        Mean squared standard errors of treated cells, ``(n_conditions,)``.
    shared
        Those of the controls that they were compared with, ``(n_conditions,)``; alike within a context.
    elsewhere
        Weights of measured effects in what other contexts say of a perturbation, its own context left out.
    """

    def __init__(
        self,
        conditions: Conditions,
        products: Matrix,
        noise: NDArray[np.float64],
        shared: NDArray[np.float64],
        elsewhere: Callable[[Asked, int], Weights],
    ) -> None:
        self.conditions, self.products, self.elsewhere = conditions, products, elsewhere
        self.noise, self.shared = noise, shared
        pairs = np.unique(np.stack([conditions.label, conditions.context], axis=1), axis=0)
        self.repeated = np.bincount(pairs[:, 0], minlength=1)[conditions.label] > 1
        self._fits: dict[int, _Fit | None] = {}

    def __call__(self, asked: Asked, context: int) -> Weights:
        """Weights in the effect of a perturbation that was not measured in the context, ``(n_conditions,)``.

        Those of elsewhere where no perturbation of the context is known, or fewer than three in each context.
        """
        x, fit = self.elsewhere(asked, context), self._fit(context)
        if fit is None or not x.any():
            return x
        mean, kernel, _ = fit.variance
        covariance = mean + kernel / fit.unit * (fit.elsewhere @ (self.products @ x))
        return fit.slope * x + covariance @ fit.inverse @ fit.left

    def knows(self, context: int) -> bool:
        """Whether enough perturbations of a context are known."""
        return self._fit(context) is not None

    def left_out(self, context: int) -> tuple[NDArray[np.int64], Matrix]:
        """Known conditions of a context, and weights in the prediction of each from all others, ``(n, n_conditions)``."""
        fit = self._fit(context)
        if fit is None:
            rows = self._known(context)
            return rows, self._of_elsewhere(rows, context)
        precision, total = np.diag(fit.inverse)[:, None], fit.inverse.sum(0)
        others = np.eye(len(fit.rows)) - fit.inverse / precision
        # what the others say of the controls' noise is no part of the effect
        others -= fit.shared * (total - fit.inverse * (total[:, None] / precision))
        return fit.rows, fit.slope * fit.elsewhere + others @ fit.left

    def _known(self, context: int) -> NDArray[np.int64]:
        return np.flatnonzero((self.conditions.context == context) & self.repeated)

    def _of_elsewhere(self, rows: NDArray[np.int64], context: int) -> Matrix:
        own = self.conditions
        found = [self.elsewhere(own.ask(own.codes[i], own.dose[i]), context) for i in rows]
        return np.stack(found) if found else np.zeros((0, len(own)))

    def _fit(self, context: int) -> _Fit | None:
        if context not in self._fits:
            rows = self._known(context)
            self._fits[context] = self._learn(rows, context) if len(rows) else None
        return self._fits[context]

    def _in_other_contexts(self, context: int) -> NDArray[np.float64] | None:
        """Mean log variances, in units of the mean square of known effects, of the other contexts in which they were learned."""
        others = [int(c) for c in np.unique(self.conditions.context) if c != context]
        found = [f for c in others if len(self._known(c)) >= _MIN_KNOWN and (f := self._fit(c)) is not None]
        return np.mean([np.log(f.variance / f.level) for f in found], axis=0) if found else None

    def _learn(self, rows: NDArray[np.int64], context: int) -> _Fit | None:
        x, noise, shared = self._of_elsewhere(rows, context), self.noise[rows], float(self.shared[rows].mean())
        similar, across = x @ self.products @ x.T, x @ self.products[:, rows]
        own = self.products[np.ix_(rows, rows)]
        unit, level = float(np.diag(similar).mean()), float(np.diag(own).mean())
        if unit <= 0 or level <= 0:
            return None
        some = np.unique(np.linspace(0, len(rows) - 1, _MAX_CHOOSING).round().astype(int))
        parts = [m[np.ix_(some, some)] for m in (own, (across + across.T) / 2, similar)]

        def covariance(log_variance: NDArray[np.float64], at: NDArray) -> Matrix:
            mean, kernel, rest = np.exp(log_variance) * level
            return mean + shared + kernel / unit * similar[np.ix_(at, at)] + np.diag(rest + noise[at])

        def slope_of(inverse: Matrix) -> float:
            return float((inverse * parts[1]).sum() / (inverse * parts[2]).sum())

        def deviance(log_variance: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
            factor = cho_factor(covariance(log_variance, some), lower=True)
            inverse = cho_solve(factor, np.eye(len(some)))
            r = slope_of(inverse)
            left = parts[0] - 2 * r * parts[1] + r**2 * parts[2]
            value = 2.0 * np.log(np.diag(factor[0])).sum() + (inverse * left).sum()
            slope = inverse - inverse @ left @ inverse
            kernel = (slope * parts[2]).sum() / unit
            return value, np.array([slope.sum(), kernel, np.trace(slope)]) * np.exp(log_variance) * level

        if len(rows) < _MIN_KNOWN:
            log_variance = self._in_other_contexts(context)
            if log_variance is None:
                return None
        else:
            start = np.log([0.1, 0.3, 0.5])
            log_variance = minimize(deviance, start, jac=True, method="L-BFGS-B", bounds=_BOUNDS).x
        slope = slope_of(np.linalg.inv(covariance(log_variance, some)))
        inverse = np.linalg.inv(covariance(log_variance, np.arange(len(rows))))
        left = np.eye(len(self.conditions))[rows] - slope * x
        return _Fit(rows, x, unit, level, np.exp(log_variance) * level, slope, inverse, left, shared)
