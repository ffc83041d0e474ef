"""Baselines with the interface of the models: what a model has to beat; and scores of pairs of genes for networks."""

from __future__ import annotations

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "_base": ["Baseline"],
        "_empirical_bayes": ["EmpiricalBayes"],
        "_gaussian_process": ["GaussianProcess"],
        "_estimators": ["Additive", "MeanEffect", "NearestNeighbour", "NoChange", "WeightedMeanEffect"],
        "_linear": ["Linear"],
        "_two_way": ["ContextMean", "LowRankCompletion", "TwoWayAdditive"],
        "_network": [
            "Correlation",
            "EmbeddingCosine",
            "EmbeddingLogistic",
            "NetworkBaseline",
            "OneHotLogistic",
            "RegulatorRate",
            "TreeEnsemble",
        ],
    },
)
