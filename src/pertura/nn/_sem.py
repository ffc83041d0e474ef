r"""Linear structural-equation models in which only some genes regulate.

Cells are rows: :math:`\tilde x = \tilde x A + z`, so that ``A[i, k]`` is the effect of regulator i on target k. Where only T of G
genes regulate, A has T rows that are not zero, and with :math:`A_{TT}` its columns of regulators

.. math::

    z = \tilde x - \tilde x_T A, \qquad
    \tilde x_T (I - A_{TT}) = z_T, \quad \tilde x = z + \tilde x_T A,

which is exactly :math:`z (I - A)^{-1}` of the full matrix, for a factorization of T x T instead of G x G.
"""

from __future__ import annotations

import torch
from torch import Tensor


def remove_regulation(x: Tensor, weight: Tensor, regulators: Tensor) -> Tensor:
    """What is left of each gene without what its regulators explain, ``x (I - A)``.

    Parameters
    ----------
    x
        ``(..., n_cells, n_genes)``.
    weight
        Rows of A of the regulators, ``(..., n_regulators, n_genes)``.
    regulators
        Positions of the regulators among the genes, ``(n_regulators,)``.
    """
    return x - x[..., regulators] @ weight


def propagate(z: Tensor, weight: Tensor, regulators: Tensor) -> Tensor:
    """State that noise `z` leads to, ``z (I - A)^{-1}``; shapes as in :func:`remove_regulation`."""
    state = torch.linalg.solve(_unregulated(weight, regulators), z[..., regulators], left=False)
    return z + state @ weight


def total_effect(weight: Tensor, regulators: Tensor) -> Tensor:
    """Effect of a unit of each regulator's noise on every gene over all paths, less the unit itself.

    Returns
    -------
    Rows of ``(I - A)^{-1} - I`` of the regulators, ``(..., n_regulators, n_genes)``.
    """
    return torch.linalg.solve(_unregulated(weight, regulators), weight)


def _unregulated(weight: Tensor, regulators: Tensor) -> Tensor:
    eye = torch.eye(len(regulators), device=weight.device, dtype=weight.dtype)
    return eye - weight[..., regulators]
