"""Data fields, perturbation vocabularies, pairs, splits."""

from __future__ import annotations

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "_constants": ["KEYS"],
        "_datamodule": ["PerturbationDataModule"],
        "_fields": ["ContextField", "PerturbationField"],
        "_splits": [
            "Split",
            "held_out_cells",
            "leave_context_out",
            "make_grn_splits",
            "unseen_combination",
            "unseen_dose",
            "unseen_perturbation",
        ],
        "_vocabulary": ["Vocabulary", "build_vocabulary"],
    },
)
