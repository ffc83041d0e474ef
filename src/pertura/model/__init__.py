"""The models."""

from __future__ import annotations

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "base": ["PerturbationModel"],
        "_cpa": ["CPA"],
        "_cradlevae": ["CRADLEVAE"],
        "_drugaae": ["DrugAAE"],
        "_gpovae": ["GPOVAE"],
        "_infosem": ["InfoSEM"],
        "_perturbx": ["PerturbX"],
        "_pertvae": ["PertVAE"],
        "_samsvae": ["SAMSVAE"],
    },
)
