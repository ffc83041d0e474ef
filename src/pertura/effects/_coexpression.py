"""Networks of genes in closed form, and which of several networks predicts cells that it was not learned from."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]

_EVEN = 0.5  # share of the weight that all networks have alike: who predicts better need not have the better edges


def clr(correlation: Matrix) -> Matrix:
    """Mutual information of two normal variables against that of each with all others (Faith et al. 2007), ``(n_genes, n_genes)``."""
    information = -0.5 * np.log1p(-(np.minimum(np.abs(correlation), 1 - 1e-9) ** 2))
    np.fill_diagonal(information, 0.0)
    above = np.maximum((information - information.mean(1)) / np.maximum(information.std(1), 1e-12), 0)
    return np.sqrt(above**2 + above.T**2)


def shrunken_power(x: Matrix, exponent: float) -> Matrix:
    """Power of the covariance of centered `x`, shrunk by Ledoit and Wolf, with ones on the diagonal, ``(n_genes, n_genes)``."""
    from sklearn.covariance import ledoit_wolf

    value, vector = np.linalg.eigh(ledoit_wolf(x, assume_centered=True)[0])
    power = (vector * np.maximum(value, 1e-9) ** exponent) @ vector.T
    d = np.sqrt(np.diag(power))
    return power / np.outer(d, d)


def closed_form_networks(x: Matrix) -> list[Matrix]:
    r"""Signed weights of pairs of genes, 0 on the diagonal.

    CLR, and :math:`-\Sigma^{-1/2}`: what a linear structural equation model :math:`x = z (I - A)^{-1}` with unit noise and a symmetric
    A converges to, without a prior.
    """
    correlation = x.T @ x / len(x)
    sd = np.sqrt(np.maximum(np.diag(correlation), 1e-12))
    correlation = correlation / np.outer(sd, sd)
    networks = [clr(correlation) * np.sign(correlation), -shrunken_power(x, -0.5)]
    for network in networks:
        np.fill_diagonal(network, 0.0)
    return networks


def stack_networks(networks: Sequence[Matrix], train: Matrix, left_out: Matrix) -> NDArray[np.float64]:
    """How much each network counts, ``(n_networks,)``, sum 1.

    Each gene is predicted from the others by the network's weights, times a slope that is fitted to the cells it was learned from; the
    predictions are stacked on left-out cells (Breiman 1996). Half of the weight is shared evenly.

    Parameters
    ----------
    networks
        Weights, ``[source, target]``, ``(n_genes, n_genes)``, 0 on the diagonal, of `train`.
    train, left_out
        Standardized expression, ``(n_cells, n_genes)``.
    """
    from scipy.optimize import nnls

    design = np.stack([_predicted(weight, train, left_out).ravel() for weight in networks], 1)
    found = nnls(design, left_out.ravel())[0]
    even = np.full(len(networks), 1 / len(networks))
    return even if not found.any() else _EVEN * even + (1 - _EVEN) * found / found.sum()


def explained(network: Matrix, x: Matrix) -> float:
    """Share of the variance of standardized expression that a network explains in its own cells, as :func:`stack_networks` does."""
    return 1 - float(((x - _predicted(network, x, x)) ** 2).sum() / max((x**2).sum(), 1e-12))


def _predicted(weight: Matrix, train: Matrix, asked: Matrix) -> Matrix:
    """Each gene by the others, with a slope of its own."""
    own = train @ weight
    slope = (own * train).sum(0) / np.maximum((own**2).sum(0), 1e-12)
    return asked @ weight * slope


def combine_networks(networks: Sequence[Matrix], share: NDArray[np.float64], pairs: NDArray[np.bool_]) -> Matrix:
    r"""Evidence for each pair: mean of :math:`-\log` of the share of pairs with a larger weight, 0 for what is no pair.

    Parameters
    ----------
    networks
        Weights of any sign and unit, ``(n_regulators, n_genes)``.
    share
        Of :func:`stack_networks`.
    pairs
        Which are pairs of two genes, of the same shape.
    """
    from scipy.stats import rankdata

    result = np.zeros(pairs.shape)
    for weight, own in zip(networks, share, strict=True):
        rank = (rankdata(np.abs(weight[pairs])) - 0.5) / pairs.sum()
        result[pairs] -= own * np.log1p(-rank)
    return result
