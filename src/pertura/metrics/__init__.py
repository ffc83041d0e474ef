"""Scores of predicted responses and networks, their ceilings, and one call that computes them.

Every metric is in :data:`METRICS` with its best value and direction; :func:`list_metrics` shows them as a
table.
"""

from ._arrays import top_weights
from ._ceiling import Interval, bootstrap_interval, gap_closed, interpolated_duplicate, split_half_ceiling
from ._cells import energy_distance, median_distance, mmd_rbf, variance_ratio
from ._conditions import centroid_accuracy, discrimination_score, systematic_variation
from ._effects import effect_calibration, effects_to_anndata, measured_effect
from ._evaluate import evaluate
from ._network import (
    EdgeCandidates,
    auprc,
    auprc_per_regulator,
    auprc_ratio,
    auroc,
    edge_candidates,
    epr,
    hit_at,
    macro_auprc,
    score_network,
)
from ._probabilistic import (
    calibration_curve,
    calibration_error,
    crps,
    interval_coverage,
    interval_score,
    interval_width,
)
from ._pseudobulk import perturbed_mean
from ._registry import METRICS, Metric, get_metric, list_metrics, register
from ._response import (
    de_overlap,
    de_weights,
    direction_match,
    mae,
    mse,
    pearson_effect,
    pearson_effect_vs_reference,
    r2,
    r2_effect,
    spearman_effect,
    weighted_r2,
    wmse,
)

__all__ = [
    "METRICS",
    "EdgeCandidates",
    "Interval",
    "Metric",
    "auprc",
    "auprc_per_regulator",
    "auprc_ratio",
    "auroc",
    "bootstrap_interval",
    "calibration_curve",
    "calibration_error",
    "centroid_accuracy",
    "crps",
    "de_overlap",
    "de_weights",
    "direction_match",
    "discrimination_score",
    "edge_candidates",
    "effect_calibration",
    "effects_to_anndata",
    "energy_distance",
    "epr",
    "evaluate",
    "gap_closed",
    "get_metric",
    "hit_at",
    "interpolated_duplicate",
    "interval_coverage",
    "interval_score",
    "interval_width",
    "list_metrics",
    "macro_auprc",
    "mae",
    "measured_effect",
    "median_distance",
    "mmd_rbf",
    "mse",
    "pearson_effect",
    "pearson_effect_vs_reference",
    "perturbed_mean",
    "r2",
    "r2_effect",
    "register",
    "score_network",
    "spearman_effect",
    "split_half_ceiling",
    "systematic_variation",
    "top_weights",
    "variance_ratio",
    "weighted_r2",
    "wmse",
]
