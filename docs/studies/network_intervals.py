"""Is a network better than InfoSEM's without prior, or would other genes have said otherwise.

All candidates at once; AUPRC over that of a random order, and intervals of the differences over targets, of which as many are drawn with
replacement, the same for both networks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from _common import parser, show, start
from anndata import AnnData

from pertura.benchmark._grn import NETWORK_DATA, Scorer, grn_models, network_data
from pertura.data import candidate_pairs
from pertura.metrics import EdgeCandidates, auprc_ratio

REFERENCE = "InfoSEM none"
OTHERS = ("correlation", "partial correlation", "whitening", "CLR", "trees")


def study(
    adata: AnnData, truths: Mapping[str, pd.DataFrame], models: Mapping[str, Scorer], *, n_resamples: int, seed: int = 0
) -> pd.DataFrame:
    """One row per known network and model; differences are to the first model."""
    fitted, rows = {name: model.fit(adata) for name, model in models.items()}, []
    for truth, edges in truths.items():
        pairs = candidate_pairs(edges)
        label, source, target = (pairs[c].to_numpy() for c in ("label", "source", "target"))
        score = {name: model.score(pairs) for name, model in fitted.items()}
        groups = [np.flatnonzero(target == name) for name in pd.unique(target)]
        rng = np.random.default_rng(seed)
        drawn = [
            np.concatenate([groups[k] for k in rng.integers(len(groups), size=len(groups))]) for _ in range(n_resamples)
        ]
        drawn = [np.arange(len(pairs)), *(rows_ for rows_ in drawn if label[rows_].any())]
        ratio = {
            name: np.array([auprc_ratio(EdgeCandidates(label[i], own[i], source[i])) for i in drawn])
            for name, own in score.items()
        }
        first = next(iter(ratio.values()))
        for name, own in ratio.items():
            low, high = np.quantile(own[1:] - first[1:], [0.025, 0.975])
            rows.append(
                {"truth": truth, "model": name, "auprc_ratio": own[0], "difference_low": low, "difference_high": high}
            )
    return pd.DataFrame(rows)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the study."""
    words = parser(__doc__, seeds=1)
    words.add_argument("data", nargs="?", choices=NETWORK_DATA, default="gsd")
    words.add_argument("--resamples", type=int, default=1000)
    options, known = start(words, argv), grn_models()
    models = {name: known[name] for name in (REFERENCE, *OTHERS)}
    show(study(*network_data(options.data), models, n_resamples=options.resamples))


if __name__ == "__main__":
    main()
