r"""Measured effects, shrunk by how noisy they were measured and by what they have in common.

With :math:`y_t` the measured effects of perturbation t in units of each gene's sd within conditions, :math:`n_t` what one over the
number of cells would be, and :math:`L` loadings on which genes vary together from cell to cell,

.. math::

    y_t \mid \delta_t \sim N(\delta_t, n_t I), \quad
    \delta_t = L a_t + r_t, \quad a_t \sim N(0, s_t \kappa I), \quad r_{tg} \sim N(0, s_t b_g).

How strong a perturbation is (:math:`s_t`), how much a gene responds to perturbations at all (:math:`b_g`) and how much of the responses
follows the programmes of the cells (:math:`\kappa`) are estimated from all perturbations by expectation maximisation. They have
inverse-gamma priors, so that few perturbations or few genes do not decide; those of :math:`b_g` have the mode
:math:`\propto h_g^\beta`, with :math:`h_g` the share of a gene's variance that the programmes explain. The strength of these priors is
chosen by what one half of the cells says about the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray
from sklearn.utils.extmath import randomized_svd

Matrix = NDArray[np.float64]

_N_PROGRAMMES, _MAX_CELLS = 15, 3000
# weights of the priors, in numbers of perturbations (of a gene's response) and of genes (of a perturbation's strength)
_RESPONSE_WEIGHT, _STRENGTH_WEIGHTS = 6.0, (3.0, 30.0, 300.0)
_EXPONENTS = (0.0, 0.5, 1.0)


@dataclass(frozen=True)
class Shrunk:
    """Posterior of effects.

    Attributes
    ----------
    mean, sd
        ``(n_effects, n_genes)``.
    """

    mean: Matrix
    sd: Matrix


@dataclass(frozen=True)
class Halves:
    """Effects measured in all cells, and in either half of them.

    Attributes
    ----------
    effect
        ``(n_effects, n_genes)``.
    noise
        What one over the number of cells would be, that of the controls included, ``(n_effects,)``.
    parts
        The same of the two halves; ``noise`` is infinite where a half has no cells.
    """

    effect: Matrix
    noise: Matrix
    parts: Sequence[tuple[Matrix, Matrix]] = ()


def programmes(residuals: Matrix) -> Matrix:
    """Loadings of genes on what varies together from cell to cell.

    Parameters
    ----------
    residuals
        Expression less the mean of the cell's condition, each gene in units of its sd, ``(n_cells, n_genes)``.

    Returns
    -------
    Principal axes scaled by the root of their variance beyond that of the others, ``(n_genes, n_programmes)``.
    """
    n_cells, n_genes = residuals.shape
    k = min(_N_PROGRAMMES, n_genes // 2, n_cells // 2)
    if k < 1:
        return np.zeros((n_genes, 0))
    _, values, axes = randomized_svd(residuals, k, random_state=0)
    variance = values**2 / n_cells
    rest = (np.mean(residuals**2) * n_genes - variance.sum()) / (n_genes - k)
    return axes.T * np.sqrt(np.maximum(variance - rest, 0.0))


def shrink(measured: Halves, loadings: Matrix) -> Shrunk:
    """Posterior of effects.

    Parameters
    ----------
    measured
        Effects in units of each gene's sd within conditions.
    loadings
        As :func:`programmes` gives them.
    """
    settings = list(product(_EXPONENTS, _STRENGTH_WEIGHTS))
    scores = np.zeros(len(settings))
    for (effect, noise), (other, other_noise) in zip(measured.parts, measured.parts[::-1], strict=True):
        both = np.isfinite(noise) & np.isfinite(other_noise)
        if not both.any():
            continue
        for i, (exponent, weight) in enumerate(settings):
            found = _posterior(effect[both], noise[both], loadings, exponent, weight)
            variance = found.sd**2 + other_noise[both, None]
            scores[i] -= 0.5 * (np.log(variance) + (other[both] - found.mean) ** 2 / variance).sum()
    exponent, weight = settings[int(scores.argmax())] if scores.any() else (_EXPONENTS[1], _STRENGTH_WEIGHTS[1])
    return _posterior(measured.effect, measured.noise, loadings, exponent, weight)


def _posterior(y: Matrix, noise: Matrix, loadings: Matrix, exponent: float, weight: float, n_steps: int = 25) -> Shrunk:
    """Expectation maximisation, then the posterior."""
    n_effects, n_genes = y.shape
    k = loadings.shape[1]
    noise = noise[:, None]
    explained = (loadings**2).sum(1) if k else np.ones(n_genes)
    shape = np.maximum(explained, 1e-3) ** exponent
    shape /= shape.mean()
    level = max(float((y**2 - noise).mean()), 1e-4)
    response, strength, kappa = level * shape, np.ones((n_effects, 1)), 0.01 if k else 0.0
    outer = (loadings[:, :, None] * loadings[:, None, :]).reshape(n_genes, -1)
    for step in range(n_steps + 1):
        prior = strength * response
        gain = prior / (prior + noise)
        precision = ((1.0 / (prior + noise)) @ outer).reshape(n_effects, k, k)
        covariance = np.linalg.inv(precision + np.eye(k) / np.maximum(strength * kappa, 1e-12)[:, :, None])
        a = np.einsum("tkl,tl->tk", covariance, (y / (prior + noise)) @ loadings)
        common = a @ loadings.T
        spread = covariance.reshape(n_effects, -1) @ outer.T
        if step == n_steps:
            break
        rest = (gain * (y - common)) ** 2 + gain * noise + gain**2 * spread
        moved = a**2 + np.einsum("tkk->tk", covariance)
        response = ((rest / strength).sum(0) + _RESPONSE_WEIGHT * level * shape) / (n_effects + _RESPONSE_WEIGHT)
        level = 1.0 / float(np.mean(shape / response))
        if k:
            kappa = float((moved / strength).mean())
        total = (rest / response).sum(1) + (moved.sum(1) / kappa if k else 0.0)
        strength = ((total + weight) / (n_genes + k + weight))[:, None]
        strength /= np.exp(np.log(strength).mean())
    mean = common + gain * (y - common)
    return Shrunk(mean, np.sqrt(gain * noise + (1.0 - gain) ** 2 * spread))
