"""Choice of few input genes, and small neural networks side by side: the members of an ensemble."""

from __future__ import annotations

import pyro.distributions as dist
import torch
from torch import Tensor, nn


class ConcreteSelector(nn.Module):
    r"""Rows of relaxed one-hot choices of a gene (Balın, Abid & Zou 2019).

    Every member has `n_selected` rows of logits over the genes. Training draws a row from the concrete distribution
    at a temperature that falls from 10 to 0.1; afterwards a row is its most probable gene.

    Parameters
    ----------
    n_members, n_selected, n_genes
        Sizes.
    temperature
        First and last.
    """

    def __init__(
        self, n_members: int, n_selected: int, n_genes: int, temperature: tuple[float, float] = (10.0, 0.1)
    ) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.empty(n_members, n_selected, n_genes))
        nn.init.xavier_normal_(self.logits)
        self.bounds = temperature
        self.register_buffer("temperature", torch.tensor(float(temperature[0])))

    def anneal(self, progress: float) -> None:
        """Set the temperature for a share of the training steps, exponential between the bounds."""
        first, last = self.bounds
        self.temperature.fill_(first * (last / first) ** min(max(progress, 0.0), 1.0))

    def distribution(self, n_bags: int) -> dist.TorchDistribution:
        """Selections for each bag, ``(n_bags, n_members, n_selected)`` choices over the genes."""
        choice = dist.RelaxedOneHotCategorical(self.temperature, logits=self.logits, validate_args=False)
        # as in the papers the choice has no divergence: the temperature alone makes it hard
        return choice.expand([n_bags, *self.logits.shape[:2]]).to_event(2).mask(False)

    def chosen(self) -> Tensor:
        """Gene of each row, ``(n_members, n_selected)``."""
        return self.logits.argmax(-1)

    def duplicates(self) -> Tensor:
        """By how much the rows of each member choose a gene more than once, ``(n_members,)``."""
        return (self.logits.softmax(-1).sum(1) - 1.0).relu().sum(-1)

    def entropy(self) -> Tensor:
        """Mean entropy of the rows of each member in nats, ``(n_members,)``."""
        log_p = self.logits.log_softmax(-1)
        return -(log_p.exp() * log_p).sum(-1).mean(-1)

    def certainty(self) -> Tensor:
        """Mean over the rows of the probability of their most probable gene, ``(n_members,)``."""
        return self.logits.softmax(-1).amax(-1).mean(-1)


class MemberLinear(nn.Module):
    """Linear layers of several members, ``(..., n_members, n_in)`` to ``(..., n_members, n_out)``."""

    def __init__(self, n_members: int, n_in: int, n_out: int, *, bias: bool = True, zero: bool = False) -> None:
        super().__init__()
        bound = 0.0 if zero else n_in**-0.5
        self.weight = nn.Parameter(torch.empty(n_members, n_in, n_out).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(n_members, n_out)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Apply each member's layer to its own input."""
        y = torch.einsum("...ei,eio->...eo", x, self.weight)
        return y if self.bias is None else y + self.bias


class BagAggregation(nn.Module):
    """Weighted mean over the cells of a bag (attention-based multiple-instance learning, Ilse et al. 2018).

    Parameters
    ----------
    n_members, n_latent
        Sizes.
    kind
        ``"mean"``, ``"attention"`` or ``"gated"``.
    n_hidden
        Units of the attention.
    """

    def __init__(self, n_members: int, n_latent: int, kind: str = "attention", n_hidden: int = 16) -> None:
        super().__init__()
        self.kind = kind
        if kind != "mean":
            self.V = MemberLinear(n_members, n_latent, n_hidden)
            self.w = MemberLinear(n_members, n_hidden, 1, bias=False)
        if kind == "gated":
            self.U = MemberLinear(n_members, n_latent, n_hidden)

    def weights(self, z: Tensor) -> Tensor:
        """Weights of the cells, ``(n_bags, n_cells, n_members, 1)``; they sum to 1 over the cells."""
        if self.kind == "mean":
            return torch.full_like(z[..., :1], 1.0 / z.shape[-3])
        h = torch.tanh(self.V(z))
        if self.kind == "gated":
            h = h * torch.sigmoid(self.U(z))
        return self.w(h).softmax(-3)

    def forward(self, z: Tensor) -> Tensor:
        """``(n_bags, n_cells, n_members, n_latent)`` to ``(n_bags, n_members, n_latent)``."""
        return (self.weights(z) * z).sum(-3)
