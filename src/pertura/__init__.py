"""Generative models of how cells respond to perturbations.

Submodules are imported on first use: ``import pertura`` costs next to nothing and loads neither torch nor
scvi-tools.
"""

from __future__ import annotations

from importlib.metadata import version
from importlib.util import find_spec

import lazy_loader

_SUBMODULES = (
    "baseline",
    "benchmark",
    "data",
    "datasets",
    "effects",
    "metrics",
    "model",
    "module",
    "nn",
    "pl",
    "pp",
    "priors",
    "train",
)


def _exists(name: str) -> bool:
    # A folder without __init__.py has a spec as well, but no origin.
    spec = find_spec(f"{__name__}.{name}")
    return spec is not None and spec.origin is not None


__getattr__, __dir__, __all__ = lazy_loader.attach(__name__, submodules=filter(_exists, _SUBMODULES))
__all__ = [*__all__, "__version__"]
__version__ = version("pertura")
