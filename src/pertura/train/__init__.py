"""Training plans and objectives."""

from __future__ import annotations

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "_adversarial": ["AdversarialModule", "AdversarialPlan"],
        "_alternating": ["AlternatingPlan"],
        "_elbo": ["FreeBitsELBO"],
        "_plan": ["PyroPlan", "TrainingHooks"],
    },
)
