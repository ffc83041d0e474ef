"""Networks and distributions that the modules are made of."""

from __future__ import annotations

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "_flows": ["InverseAutoregressiveFlow"],
        "_likelihoods": ["CountLikelihood", "GaussianLikelihood"],
        "_masks": ["StraightThroughBernoulli"],
        "_mlp": ["MLP", "ResidualMLP"],
        "_selector": ["BagAggregation", "ConcreteSelector", "MemberLinear"],
    },
)
