"""Binary latent variables that gradients pass."""

from __future__ import annotations

import torch.nn.functional as F
from pyro.distributions import RelaxedBernoulliStraightThrough
from torch import Tensor


class StraightThroughBernoulli(RelaxedBernoulliStraightThrough):
    """Hard draws with the gradient of relaxed ones, scored by the Bernoulli's own probability (Bereket & Karaletsos).

    Gradients reach the logits through the draw and through its probability.

    Parameters
    ----------
    temperature
        Of the relaxation; 1 in the paper.
    probs, logits
        As in :class:`torch.distributions.Bernoulli`.
    """

    def log_prob(self, value: Tensor) -> Tensor:
        """Log probability of hard draws."""
        return value * self.logits - F.softplus(self.logits)
