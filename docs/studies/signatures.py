"""Signatures without cells: a context of which some perturbations are known, and pairs of perturbation and context that are not.

``python docs/studies/signatures.py op3``: rankings of genes as normal scores; of one cell type at a time a share of the compounds is
known, all of the others. Correlation of predicted and measured effects over all genes, mean over the compounds that are not known.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from _common import parser, show, start
from anndata import AnnData

from pertura import baseline, datasets, model
from pertura.data import few_shot_context
from pertura.metrics import METRICS

DATA = {"op3": "op3_2023", "tahoe": "tahoe_2025", "sciplex": "sciplex_2020"}
SETUP: dict[str, Any] = {
    "perturbation_key": "perturbation",
    "context_key": "cell_type",
    "values": "effects",
    "delimiter": "|",
}
MODELS: dict[str, type] = {
    "mean effect": baseline.MeanEffect,
    "mean of the context": baseline.ContextMean,
    "two-way additive": baseline.TwoWayAdditive,
    "nearest context": baseline.NearestNeighbour,
    "low-rank completion": baseline.LowRankCompletion,
    "PerturbX": model.PerturbX,
}
SCORES = ("pearson_effect", "spearman_effect", "mse")


def scores(adata: AnnData, test: np.ndarray, trained: Any) -> pd.DataFrame:
    """Scores of the conditions that are asked, one row each."""
    own = adata[test]
    asked = list(own.obs["perturbation"].astype(str))
    predicted = trained.predict_perturbation(asked, indices=test[:1], by="context", ci=None)
    x = predicted[pd.Index(predicted.obs["perturbation"].astype(str)).get_indexer(asked)].X
    none = np.zeros_like(own.X)
    found = {name: METRICS[name](np.asarray(x), own.X, none) for name in SCORES[:2]}
    return pd.DataFrame({"perturbation": asked, **found, "mse": ((x - own.X) ** 2).mean(1)})


def study(
    adata: AnnData, *, shares: Sequence[float], seeds: int, contexts: Sequence[str] | None = None
) -> pd.DataFrame:
    """Every model, for every context, share of known perturbations and choice of them."""
    keys = {key: SETUP[key] for key in ("perturbation_key", "context_key")}
    splits = few_shot_context(adata, control=None, shots=shares, contexts=contexts, n_splits=seeds, **keys)
    tables = []
    for split in splits:
        for name, cls in MODELS.items():
            cls.setup_anndata(adata, **SETUP)
            one = cls(adata)
            one.train(datasplitter_kwargs={"external_indexing": [split.train]}, enable_progress_bar=False)
            tables.append(scores(adata, split.test, one).assign(model=name, split=split.name))
        print(split.name, flush=True)
    return pd.concat(tables, ignore_index=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    made = parser(__doc__, seeds=3)
    made.add_argument("data", choices=DATA)
    made.add_argument("--shares", nargs="+", type=float, default=[0.1, 0.2, 0.5])
    made.add_argument("--contexts", nargs="+")
    asked = start(made, argv)
    adata = getattr(datasets, DATA[asked.data])()
    table = study(adata, shares=asked.shares, seeds=asked.seeds, contexts=asked.contexts)
    if asked.out:
        table.to_csv(asked.out, index=False)
    parts = table["split"].str.extract(r"context=(?P<context>.*), (?P<share>\d+%) of")
    table = table.assign(**parts)
    show(table.groupby(["share", "model"], sort=False)[list(SCORES)].mean().reset_index())
    by = table.pivot_table(index=["share", "context"], columns="model", values="pearson_effect", sort=False)
    show(by.reset_index())


if __name__ == "__main__":
    main()
