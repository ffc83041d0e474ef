"""Models against baselines and the technical ceiling of the data, on held-out perturbations, contexts and doses.

:func:`run` trains and scores, :func:`summarize` says how much of the gap between the mean effect and the
ceiling each model closes; :func:`pertura.pl.benchmark` draws it. On the command line: ``pertura benchmark kang``.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "_dataset": ["Dataset", "make_splits"],
        "_grn": ["GRN_SPLITS", "GivenNetwork", "NetworkModel", "run_grn", "summarize_grn"],
        "_phases": ["run_phases"],
        "_results": ["Results"],
        "_runner": ["DEFAULT_METRICS", "run"],
        "_spec": ["ModelSpec", "baselines", "parse_model"],
        "_speed": ["run_speed"],
        "_summary": ["summarize"],
    },
)
