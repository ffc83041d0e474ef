"""Gene embeddings, propagated over a network of protein-protein interactions."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from scipy import sparse
from torch import Tensor, nn


def normalized_adjacency(network: sparse.spmatrix) -> sparse.coo_matrix:
    r"""Symmetric normalization with self-loops, :math:`D^{-1/2} (S + I) D^{-1/2}`.

    Parameters
    ----------
    network
        Weights of interactions, ``(n_genes, n_genes)``; made symmetric by the larger of both directions.

    Returns
    -------
    Sparse, ``(n_genes, n_genes)``; a gene without interactions keeps its self-loop.
    """
    network = sparse.csr_matrix(network, dtype=np.float64)
    network = network.maximum(network.T)
    network = network - sparse.diags(network.diagonal()) + sparse.identity(network.shape[0])
    scale = sparse.diags(1.0 / np.sqrt(np.asarray(network.sum(1)).ravel()))
    return sparse.coo_matrix(scale @ network @ scale)


class GeneEmbedding(nn.Module):
    r"""Embeddings of genes from expression, free parameters and a network of proteins.

    :math:`E = E_0 + \sum_{l=1}^{L} \gamma_l \hat A^l E_0` with :math:`E_0 = [T, P] W_0`, free T, fixed loadings P of what varies
    together from cell to cell, :math:`\hat A` of :func:`normalized_adjacency` and :math:`\gamma` on the simplex. The network stays sparse.

    Parameters
    ----------
    n_genes, n_out
        Shape of the embedding.
    n_loadings
        Columns of P.
    n_free
        Columns of T.
    n_steps
        L.
    """

    def __init__(
        self,
        n_genes: int,
        n_out: int,
        *,
        n_loadings: int = 30,
        n_free: int = 16,
        n_steps: int = 3,
        network: bool = True,
    ) -> None:
        super().__init__()
        self.free = nn.Parameter(0.1 * torch.randn(n_genes, n_free))
        self.mix = nn.Linear(n_free + n_loadings, n_out, bias=False)
        self.step_logits = nn.Parameter(torch.zeros(n_steps)) if network else None
        self.register_buffer("loadings", torch.zeros(n_genes, n_loadings))
        self.register_buffer("edges", torch.zeros(2, 0, dtype=torch.long))
        self.register_buffer("weights", torch.zeros(0))

    def set_network(self, network: sparse.spmatrix) -> None:
        """Store a network, ``(n_genes, n_genes)``."""
        matrix = normalized_adjacency(network)
        self.edges = torch.as_tensor(np.stack([matrix.row, matrix.col]).astype(np.int64))
        self.weights = torch.as_tensor(matrix.data.astype(np.float32))

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        for name in ("edges", "weights"):
            if prefix + name in state_dict:
                setattr(self, name, torch.empty_like(state_dict[prefix + name]))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def propagate(self, values: Tensor) -> Tensor:
        """One step over the network, ``(n_genes, n) -> (n_genes, n)``."""
        n = len(self.free)
        with torch.autocast(values.device.type, enabled=False):
            return torch.sparse.mm(
                torch.sparse_coo_tensor(self.edges, self.weights, (n, n), check_invariants=False), values
            )

    def forward(self) -> Tensor:
        """E, ``(n_genes, n_out)``."""
        start = self.mix(torch.cat([self.free, self.loadings], 1))
        if self.step_logits is None or not len(self.weights):
            return start
        total, step = start, start
        for gamma in self.step_logits.softmax(0):
            step = self.propagate(step)
            total = total + gamma * step
        return total
