"""Generative models of how cells respond to perturbations.

The submodules are imported on first use, so that ``import pertura`` costs next to nothing and loads neither torch
nor scvi-tools.
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
    "metrics",
    "model",
    "module",
    "nn",
    "pl",
    "pp",
    "train",
)

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__, submodules=[name for name in _SUBMODULES if find_spec(f"{__name__}.{name}") is not None]
)
__all__ = [*__all__, "__version__"]
__version__ = version("pertura")
