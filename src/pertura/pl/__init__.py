"""Plots not available in :mod:`scanpy.pl`: predicted against measured effects, calibration, benchmarks.

For everything else (expression in layers, ranked effects, embeddings) the results are where :mod:`scanpy.pl`
looks for them.
"""

from ._benchmark import benchmark
from ._biomarkers import contexts, gene_importance
from ._calibration import calibration
from ._drugs import dose_response, drug_map, target_ranking
from ._effect import effect_scatter

__all__ = [
    "benchmark",
    "calibration",
    "contexts",
    "dose_response",
    "drug_map",
    "effect_scatter",
    "gene_importance",
    "target_ranking",
]
