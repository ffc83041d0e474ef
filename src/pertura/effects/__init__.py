"""Effects on mean expression: measured once from the cells, and estimated in closed form."""

from __future__ import annotations

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "_coexpression": [
            "closed_form_networks",
            "clr",
            "combine_networks",
            "explained",
            "shrunken_power",
            "stack_networks",
        ],
        "_contexts": [
            "Asked",
            "Conditions",
            "choose_strength",
            "fit_convergence",
            "ridge_weights",
            "softmax_weights",
        ],
        "_discrepancy": ["Discrepancy", "Error", "Spread", "calibrate", "fit_discrepancy", "fit_error", "widened"],
        "_dosed": ["DoseEffects", "fit_curvature", "fit_dosed"],
        "_kernels": ["KernelFit", "feature_blocks", "fill_missing", "fit_kernels"],
        "_measured": ["MeasuredEffect", "fit_departures", "fit_measured"],
        "_matching": ["matched_differences"],
        "_network": [
            "NetworkPosterior",
            "UnseenEffects",
            "fit_network",
            "fit_rows",
            "fit_shifts",
            "fit_unseen",
            "measure_covariation",
            "own_shifts",
        ],
        "_shrink": ["Halves", "Shrunk", "principal_programs", "shrink"],
        "_stacking": ["share_of_differences", "stack_shares"],
        "_transfer": ["Transfer"],
        "_table": ["ConditionMeans", "ConditionTable", "Effects"],
    },
)
