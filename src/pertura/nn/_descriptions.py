"""Encoder of what is known of a perturbation: a text and signatures."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._mlp import MLP


class DescriptionEncoder(nn.Module):
    r"""One vector for a perturbation, from its signature, its text, or both.

    Branches :math:`s` (signature, read through gene embeddings) and :math:`t` (text) are mixed by a gate,
    :math:`v = g \odot s + (1 - g) \odot t`; a missing one is left out. There are no parameters for single perturbations, so
    that one which training never saw is described like the others.

    Parameters
    ----------
    n_gene_embedding
        Width of gene embeddings.
    n_text
        Number of text features; 0: no text branch.
    n_out
        Width of the result.
    n_hidden
        Units of the hidden layers.
    """

    def __init__(self, n_gene_embedding: int, n_text: int, n_out: int, n_hidden: int = 64) -> None:
        super().__init__()
        self.n_text = n_text
        self.signature = nn.Sequential(
            nn.LayerNorm(n_gene_embedding), MLP(n_gene_embedding, [n_hidden]), nn.Linear(n_hidden, n_out)
        )
        self.text = nn.Sequential(MLP(n_text, [n_hidden]), nn.Linear(n_hidden, n_out)) if n_text else None
        self.gate = nn.Linear(2 * n_out, n_out) if n_text else None

    def read_signature(self, signature: Tensor, embedding: Tensor) -> Tensor:
        """Signature branch of ``(..., n_genes)``; its length does not depend on the number of genes."""
        norm = signature.square().sum(-1, keepdim=True).sqrt().clamp(min=1e-6)
        return self.signature(signature @ embedding / norm)

    def forward(
        self,
        signature: Tensor,
        text: Tensor | None,
        embedding: Tensor,
        lot: Tensor | None = None,
        drop: Sequence[float] = (0.0, 0.0),
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Vector and both branches, each ``(..., n_out)``.

        Parameters
        ----------
        signature
            ``(..., n_genes)``; rows of zeros are missing.
        text
            ``(..., n_text)``; rows of zeros are missing.
        embedding
            Of genes.
        lot
            A uniform random number for each perturbation, ``(...)``: signature or text of a perturbation that has both is
            taken away with the probabilities `drop`. `None`: neither is.
        drop
            See `lot`.
        """
        s = self.read_signature(signature, embedding)
        has_s = (signature != 0).any(-1, keepdim=True)
        if self.text is None or text is None:
            return s * has_s, s, None
        t, has_t = self.text(text), (text != 0).any(-1, keepdim=True)
        use_s, use_t = has_s, has_t
        if lot is not None:
            lot = lot[..., None]
            use_s = has_s & ~(has_t & (lot < drop[0]))
            use_t = has_t & ~(has_s & (lot >= drop[0]) & (lot < drop[0] + drop[1]))
        g = torch.sigmoid(self.gate(torch.cat([s * use_s, t * use_t], -1)))
        g = torch.where(use_s & use_t, g, use_s.to(g))
        return g * s * use_s + (1.0 - g) * t * use_t, s, t


def contrast(first: Tensor, second: Tensor, temperature: float = 0.1) -> Tensor:
    """InfoNCE of paired rows: each row of one should be closest to its own row of the other."""
    if len(first) < 2:
        return first.sum() * 0.0
    logits = F.normalize(first, dim=-1) @ F.normalize(second, dim=-1).mT / temperature
    target = torch.arange(len(first), device=first.device)
    return 0.5 * (F.cross_entropy(logits, target) + F.cross_entropy(logits.mT, target))
