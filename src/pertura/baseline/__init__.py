"""Baselines with the interface of the models: what a model has to beat."""

from __future__ import annotations

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "_base": ["Baseline"],
        "_estimators": ["Additive", "MeanEffect", "NearestNeighbour", "NoChange", "WeightedMeanEffect"],
        "_linear": ["Linear"],
    },
)
