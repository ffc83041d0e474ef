"""Pyro models and guides, one file each; they read like the equations of the papers."""

from __future__ import annotations

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "_base": ["Action", "Basal", "Cells", "Counterfactual", "PerturbationModule"],
        "_comparators": ["ConditionalVAE", "SVAEPlus"],
        "_cpa": ["CPA"],
        "_cradlevae": ["CRADLEVAE"],
        "_drugaae": ["DrugAAE"],
        "_gene_effects": ["GeneEffects"],
        "_gpovae": ["GPOVAE", "HopsGPOVAE"],
        "_infosem": ["InfoSEM"],
        "_perturbx": ["PerturbX"],
        "_pertvae": ["PertVAE"],
        "_samsvae": ["SAMSVAE"],
        "_shifts": ["SparseShifts"],
    },
)
