r"""Measured effects, shrunk by how noisy they were measured and by what they have in common.

With :math:`y_t` the measured effects of perturbation t in units of each gene's sd within conditions, :math:`n_t` their noise
(one over the number of cells), and :math:`L` loadings on which genes vary together from cell to cell,

.. math::

    y_t \mid \delta_t \sim N(\delta_t, n_t I), \quad
    \delta_t = L a_t + r_t, \quad a_t \sim N(0, s_t \kappa I), \quad r_{tg} \sim N(0, s_t b_g + v_{tg}).

How strong a perturbation is (:math:`s_t`), how much a gene responds to perturbations at all (:math:`b_g`) and how much of the
responses follows the programs of the cells (:math:`\kappa`) are estimated from all perturbations by expectation maximization.
They have inverse-gamma priors, so that few perturbations or few genes do not decide; those of :math:`b_g` have the mode
:math:`\propto h_g^\beta`, with :math:`h_g` the share of a gene's variance that the programs explain. The strength of these
priors is chosen by what one half of the cells says about the other. A known variance :math:`v` is 0 but for combinations, where
it is that of the sum of the members' effects.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray
from sklearn.utils.extmath import randomized_svd

Matrix = NDArray[np.float64]

_N_PROGRAMS = 15
# weights of the priors, in numbers of perturbations (of a gene's response) and of genes (of a perturbation's strength)
_RESPONSE_WEIGHT, _STRENGTH_WEIGHTS = 6.0, (3.0, 30.0, 300.0)
_EXPONENTS = (0.0, 0.5, 1.0)
_MAX_COMPARED, _MAX_GENES = 64, 1000  # perturbations, and their genes, whose halves choose the priors


@dataclass(frozen=True)
class Shrunk:
    """Posterior of effects.

    Attributes
    ----------
    mean, sd
        ``(n_effects, n_genes)``.
    prior_sd
        Sd of the effects of a perturbation of usual strength, ``(n_genes,)``; without the known variance.
    """

    mean: Matrix
    sd: Matrix
    prior_sd: NDArray[np.float64]


@dataclass(frozen=True)
class Halves:
    """Effects measured in all cells, and in either half of them.

    Attributes
    ----------
    effect
        ``(n_effects, n_genes)``.
    noise
        Variance in units of that of one cell, controls included, ``(n_effects,)``.
    parts
        The same of the two halves; ``noise`` is infinite where a half has no cells.
    """

    effect: Matrix
    noise: NDArray[np.float64]
    parts: Sequence[tuple[Matrix, NDArray[np.float64]]] = ()

    def standardized(self, rows: NDArray, center: Matrix | float, unit: NDArray) -> Halves:
        """Some of the effects, less `center` and in units of `unit`."""
        parts = tuple(((effect[rows] - center) / unit, noise[rows]) for effect, noise in self.parts)
        return Halves((self.effect[rows] - center) / unit, self.noise[rows], parts)


def principal_programs(residuals: Matrix) -> Matrix:
    """Loadings of genes on what varies together from cell to cell.

    Parameters
    ----------
    residuals
        Expression less the mean of the cell's condition, each gene in units of its sd, ``(n_cells, n_genes)``.

    Returns
    -------
    Principal axes scaled by the root of their variance beyond that of the others, ``(n_genes, n_programs)``.
    """
    n_cells, n_genes = residuals.shape
    k = min(_N_PROGRAMS, n_genes // 2, n_cells // 2)
    if k < 1:
        return np.zeros((n_genes, 0))
    _, values, axes = randomized_svd(residuals, k, random_state=0)
    variance = values**2 / n_cells
    rest = (np.mean(residuals**2) * n_genes - variance.sum()) / (n_genes - k)
    return axes.T * np.sqrt(np.maximum(variance - rest, 0.0))


def shrink(measured: Halves, loadings: Matrix, known: Matrix | None = None) -> Shrunk:
    """Posterior of effects.

    Parameters
    ----------
    measured
        Effects in units of each gene's sd within conditions.
    loadings
        As :func:`principal_programs` gives them.
    known
        Prior variance of the effects beside the one that is estimated, ``(n_effects, n_genes)``; by default 0.
    """
    known = np.zeros(measured.effect.shape) if known is None else known
    settings = list(product(_EXPONENTS, _STRENGTH_WEIGHTS))
    scores = np.zeros(len(settings))
    n_genes = measured.effect.shape[1]
    genes = np.unique(np.linspace(0, n_genes - 1, min(n_genes, _MAX_GENES)).round().astype(int))
    for (effect, noise), (other, other_noise) in zip(measured.parts, measured.parts[::-1], strict=True):
        both = np.flatnonzero(np.isfinite(noise) & np.isfinite(other_noise))
        if not len(both):
            continue
        both = both[np.unique(np.linspace(0, len(both) - 1, _MAX_COMPARED).round().astype(int))]
        for i, (exponent, weight) in enumerate(settings):
            at = np.ix_(both, genes)
            found = _posterior(effect[at], noise[both], loadings[genes], known[at], exponent, weight)
            variance = found.sd**2 + other_noise[both, None]
            scores[i] -= 0.5 * (np.log(variance) + (other[at] - found.mean) ** 2 / variance).sum()
    exponent, weight = settings[int(scores.argmax())] if scores.any() else (_EXPONENTS[1], _STRENGTH_WEIGHTS[1])
    return _posterior(measured.effect, measured.noise, loadings, known, exponent, weight)


def _posterior(
    y: Matrix, noise: Matrix, loadings: Matrix, known: Matrix, exponent: float, weight: float, n_steps: int = 25
) -> Shrunk:
    """Expectation maximization, then the posterior."""
    n_effects, n_genes = y.shape
    k = loadings.shape[1]
    noise = noise[:, None]
    explained = (loadings**2).sum(1) if k else np.ones(n_genes)
    shape = np.maximum(explained, 1e-3) ** exponent
    shape /= shape.mean()
    level = max(float((y**2 - noise - known).mean()), 1e-4)
    response, strength, kappa = level * shape, np.ones((n_effects, 1)), 0.01 if k else 0.0
    # products of loadings are symmetric: half of them will do
    i, j = np.triu_indices(k)
    outer, twice = loadings[:, i] * loadings[:, j], np.where(i == j, 1.0, 2.0)
    precision = np.zeros((n_effects, k, k))
    for step in range(n_steps + 1):
        own = strength * response
        total = own + known + noise
        precision[:, i, j] = precision[:, j, i] = (1.0 / total) @ outer
        covariance = np.linalg.inv(precision + np.eye(k) / np.maximum(strength * kappa, 1e-12)[:, :, None])
        a = np.einsum("tkl,tl->tk", covariance, (y / total) @ loadings)
        common = a @ loadings.T
        spread = (covariance[:, i, j] * twice) @ outer.T
        if step == n_steps:
            break
        gain = own / total
        rest = (gain * (y - common)) ** 2 + own * (1.0 - gain) + gain**2 * spread
        moved = a**2 + np.einsum("tkk->tk", covariance)
        response = ((rest / strength).sum(0) + _RESPONSE_WEIGHT * level * shape) / (n_effects + _RESPONSE_WEIGHT)
        level = 1.0 / float(np.mean(shape / response))
        if k:
            kappa = float((moved / strength).mean())
        size = (rest / response).sum(1) + (moved.sum(1) / kappa if k else 0.0)
        strength = ((size + weight) / (n_genes + k + weight))[:, None]
        strength /= np.exp(np.log(strength).mean())
    gain = (own + known) / total
    mean = common + gain * (y - common)
    sd = np.sqrt((own + known) * (1.0 - gain) + (1.0 - gain) ** 2 * spread)
    return Shrunk(mean, sd, np.sqrt(float(strength.mean()) * (kappa * (loadings**2).sum(1) + response)))
