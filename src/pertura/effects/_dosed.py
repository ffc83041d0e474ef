"""Effects of perturbations at their highest dose, from conditions of several doses and combinations that are solved together."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray

from pertura.data._constants import CONTROL_ONLY
from pertura.data._vocabulary import dose_units

from ._table import ConditionTable

Matrix = NDArray[np.float64]

_LOG_K, _LOG_N = (-1.5, -0.75, 0.0, 0.75), (-0.5, 0.0, 0.5)
_KAPPA = np.geomspace(0.1, 1e4, 21)
_MAX_SOLVED = 500  # perturbations up to which the shape of the dose response is chosen
_AMPLITUDE_PRIOR = 5.0  # perturbations that an amplitude of 1 counts for


@dataclass(frozen=True)
class _Rest:
    """What conditions of one perturbation each differ by from the mean effect at their dose.

    Attributes
    ----------
    code, context, strength, noise
        Perturbation, context, dose response and squared standard error of each condition, ``(n_conditions,)``.
    value
        ``(n_conditions, n_genes)``.
    """

    code: NDArray[np.int64]
    context: NDArray[np.int64]
    strength: NDArray[np.float64]
    noise: NDArray[np.float64]
    value: Matrix


@dataclass(frozen=True)
class DoseEffects:
    """Effects at the highest dose.

    Attributes
    ----------
    effect
        ``(n_perturbations, n_contexts, n_genes)``. Where a perturbation was not measured in a context: the mean effect there,
        plus what it differs by from the mean effect elsewhere.
    mean
        Mean effect of the perturbations of each context, ``(n_contexts, n_genes)``; its average over contexts where none
        was measured.
    overall
        That average, ``(n_genes,)``.
    deviation
        What a perturbation differs by from the mean effect, averaged over contexts, ``(n_perturbations, n_genes)``. Where a
        context lacks a perturbation, `effect` takes it times what such averages over the other contexts are worth there.
    measured
        Whether a perturbation was measured, ``(n_perturbations,)``.
    log_k, log_n
        Shape of the dose response, for ``hill``.
    """

    effect: Matrix
    mean: Matrix
    overall: NDArray[np.float64]
    deviation: Matrix
    measured: NDArray[np.bool_]
    log_k: float
    log_n: float
    _rest: _Rest

    def amplitude(self, predicted: Matrix) -> NDArray[np.float64]:
        """What predicted deviations have to be multiplied with in each context to fit the measured ones best, ``(n_contexts, 2)``.

        First what goes with the dose response s, then with 4 s (1 - s). 1 and 0 in contexts without such perturbations; the
        first is 1 with a single context.

        Parameters
        ----------
        predicted
            ``(n_perturbations, n_genes)``, of each from others alone; 0: none is predicted.
        """
        return _amplitude(self._rest, predicted[self._rest.code], len(self.mean))


def _amplitude(rest: _Rest, predicted: Matrix, n_contexts: int) -> NDArray[np.float64]:
    agreed, length = ((v * predicted).mean(1) / rest.noise for v in (rest.value, predicted))
    terms = np.stack([rest.strength, halfway(rest.strength)], 1)
    found = np.tile([1.0, 0.0], (n_contexts, 1))
    prior = _AMPLITUDE_PRIOR * (length @ terms**2) / np.maximum(np.count_nonzero(length[:, None] * terms, axis=0), 1)
    prior[0] += np.inf if n_contexts == 1 else 0.0
    prior = np.minimum(prior, 1e12) + 1e-12
    for c in np.unique(rest.context):
        own = rest.context == c
        gram = (terms[own].T * length[own]) @ terms[own] + np.diag(prior)
        found[c] = np.linalg.solve(gram, terms[own].T @ agreed[own] + prior * (1.0, 0.0))
    return found


def hill(dose: NDArray, log_k: float, log_n: float) -> NDArray[np.float64]:
    """Hill curve that is 0 at dose 0 and 1 at dose 1."""
    k, power = np.exp(log_k) ** np.exp(log_n), np.maximum(dose, 0.0) ** np.exp(log_n)
    return power * (1.0 + k) / (power + k)


def halfway(strength: NDArray) -> NDArray[np.float64]:
    """1 where a dose response is one half, 0 at none, at the highest dose and beyond."""
    return np.maximum(4.0 * strength * (1.0 - strength), 0.0)


def fit_curvature(table: ConditionTable, max_dose: NDArray[np.float64]) -> NDArray[np.float64] | None:
    r"""Curvature of the dose response :math:`\log(1 + \kappa d) / \log(1 + \kappa)` of each perturbation.

    Conditions of one perturbation are multiples of one effect in each context. How frequent the curvatures of a grid are is learned from
    all perturbations, so that one of which little is known has a usual one.

    Parameters
    ----------
    table
        What was measured.
    max_dose
        Highest registered dose of each perturbation, ``(n_perturbations,)``; doses are in units of it.

    Returns
    -------
    Geometric posterior mean of kappa, ``(n_perturbations,)``; `None` where no perturbation was measured at several doses.
    """
    found = table.effects()
    codes, kept = table.codes[table.treated], found.measured
    kept &= (codes[:, 0] >= 0) & (codes[:, 1:] < 0).all(1)
    at, code = table.treated[kept], codes[kept, 0]
    dose = table.dose[at, 0] / max_dose[code]
    groups, group = np.unique(np.stack([code, table.context[at]], 1), axis=0, return_inverse=True)
    group = group.ravel()
    spread = np.full((2, len(groups)), [[np.inf], [-np.inf]])
    np.minimum.at(spread[0], group, dose)
    np.maximum.at(spread[1], group, dose)
    if not (spread[1] > 1.001 * spread[0]).any():
        return None
    effect, weight = found.effect[kept], 1.0 / np.maximum(found.se[kept] ** 2, 1e-12)
    gain = np.empty((len(max_dose), len(_KAPPA)))
    for k, kappa in enumerate(_KAPPA):
        strength = (np.log1p(kappa * dose) / np.log1p(kappa))[:, None]
        top, bottom = np.zeros((2, len(groups), effect.shape[1]))
        np.add.at(top, group, weight * strength * effect)
        np.add.at(bottom, group, weight * strength**2)
        # what the best effect explains, in units of noise
        gain[:, k] = 0.5 * np.bincount(groups[:, 0], (top**2 / bottom).sum(1), len(max_dose))
    likelihood = np.exp(gain - gain.max(1, keepdims=True))
    share = np.full(len(_KAPPA), 1.0 / len(_KAPPA))
    for _ in range(50):
        posterior = likelihood * share
        posterior /= posterior.sum(1, keepdims=True)
        share = (posterior.sum(0) + 1.0 / len(_KAPPA)) / (len(posterior) + 1.0)
    return np.exp(posterior @ np.log(_KAPPA))


def fit_dosed(table: ConditionTable, max_dose: NDArray[np.float64]) -> DoseEffects:
    """Effects of all perturbations at their highest dose, context by context.

    The effect of a condition is the sum of those of its members, each times its dose response. All perturbations share one
    Hill curve, the one of a grid that leaves least.

    Parameters
    ----------
    table
        What was measured.
    max_dose
        Highest registered dose of each perturbation, ``(n_perturbations,)``.
    """
    n, found = len(max_dose), table.effects()
    kept = np.flatnonzero(found.measured)
    at = table.treated[kept]
    codes, context = table.codes[at], table.context[at]
    effect, variance = found.effect[kept], found.se[kept] ** 2
    present = codes != CONTROL_ONLY
    relative = table.dose[at] / dose_units(max_dose)[codes]

    def solve(log_k: float, log_n: float) -> tuple[float, dict[int, tuple[NDArray, Matrix, Matrix]]]:
        design = np.zeros((len(at), n))
        np.add.at(design, (np.arange(len(at))[:, None], codes.clip(0)), hill(relative, log_k, log_n) * present)
        rest, result = 0.0, {}
        for c in np.unique(context):
            own = context == c
            seen = np.flatnonzero((design[own] > 0).any(0))
            effects, mean, left = solve_effects(design[own][:, seen], effect[own], variance[own])
            rest, result[int(c)] = rest + left, (seen, effects, mean)
        return rest, result

    curves = [(0.0, 0.0)]
    if n <= _MAX_SOLVED and len(np.unique(relative[present].round(6))) > 1:
        curves = list(product(_LOG_K, _LOG_N))
    solved = {curve: solve(*curve) for curve in curves}
    curve = min(solved, key=lambda c: solved[c][0])
    by_context = solved[curve][1]

    number, total = np.zeros(n), np.zeros((n, table.n_genes))
    own = np.zeros((n, table.n_contexts, table.n_genes))
    for c, (seen, effects, mean) in by_context.items():
        number[seen] += 1
        own[seen, c] = effects - mean
        total[seen] += own[seen, c]
    deviation = total / np.maximum(number, 1.0)[:, None]
    overall = np.mean([mean for _, _, mean in by_context.values()] or [np.zeros(table.n_genes)], axis=0)
    means = np.tile(overall, (table.n_contexts, 1))
    for c, (_, _, mean) in by_context.items():
        means[c] = mean
    alone = np.flatnonzero(present.sum(1) == 1)
    code, at = codes[alone].max(1), context[alone]
    strength = (hill(relative[alone], *curve) * present[alone]).sum(1)
    rest = _Rest(code, at, strength, variance[alone].mean(1) + 1e-8, effect[alone] - strength[:, None] * means[at])
    elsewhere = (total[code] - own[code, at]) / np.maximum(number[code] - 1, 1.0)[:, None]
    effect = means + _amplitude(rest, elsewhere, table.n_contexts)[:, :1] * deviation[:, None]
    for c, (seen, effects, _) in by_context.items():
        effect[seen, c] = effects
    return DoseEffects(effect, means, overall, deviation, number > 0, *curve, rest)


def solve_effects(
    design: NDArray, measured: NDArray, variance: NDArray
) -> tuple[NDArray[np.float64], NDArray[np.float64], float]:
    """Effects at the highest dose and their mean: normal, shrunk towards the mean by what noise there is.

    Parameters
    ----------
    design
        Dose response of each perturbation in each condition, ``(n_conditions, n_perturbations)``.
    measured, variance
        Effects of the conditions and their squared standard errors, ``(n_conditions, n_genes)``.

    Returns
    -------
    Effects ``(n_perturbations, n_genes)``, mean ``(n_genes,)``, and the weighted squared residual.
    """
    noise = variance.mean(1)
    noise = noise + 0.05 * measured.var() + 1e-8
    total = design.sum(1)
    mean = ((total / noise) @ measured) / max(float(total**2 @ (1 / noise)), 1e-12)
    rest = measured - total[:, None] * mean
    signal = max(float((rest**2).mean() - variance.mean()), 0.05 * float((measured**2).mean())) + 1e-8
    gram = (design.T / noise) @ design + np.eye(design.shape[1]) / signal
    effects = mean + np.linalg.solve(gram, (design.T / noise) @ rest)
    return effects, mean, float((((measured - design @ effects) ** 2).sum(1) / noise).sum())
