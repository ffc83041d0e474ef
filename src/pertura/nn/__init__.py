"""Networks and distributions that the modules are made of."""

from __future__ import annotations

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "_descriptions": ["DescriptionEncoder"],
        "_flows": ["InverseAutoregressiveFlow"],
        "_likelihoods": ["CountLikelihood", "GaussianLikelihood"],
        "_masks": ["StraightThroughBernoulli"],
        "_mlp": ["MLP", "ResidualMLP"],
        "_propagation": ["GeneEmbedding", "normalized_adjacency"],
        "_scalar": ["ScalarMLP"],
        "_selector": ["BagAggregation", "ConcreteSelector", "MemberLinear"],
        "_sem": ["propagate", "remove_regulation", "total_effect"],
    },
)
