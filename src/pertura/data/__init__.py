"""Data fields, perturbation vocabularies, pairs, splits."""

from __future__ import annotations

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "_constants": ["KEYS"],
        "_datamodule": ["PerturbationDataModule"],
        "_fields": ["ContextField", "PerturbationField"],
        "_grn_splits": ["GRNSplit", "candidate_pairs", "make_grn_splits"],
        "_partition": ["Split", "as_obs"],
        "_splits": [
            "few_shot_context",
            "held_out_cells",
            "leave_context_out",
            "unseen_combination",
            "unseen_dose",
            "unseen_perturbation",
        ],
        "_vocabulary": ["Vocabulary", "build_vocabulary"],
    },
)
