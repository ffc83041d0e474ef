"""Signatures without cells: a context of which some perturbations are known, and pairs of perturbation and context that are not.

``python docs/studies/signatures.py op3``: rankings of genes as normal scores; of one cell type at a time a share of the compounds is
known, all of the others. Correlation of predicted and measured effects over all genes, mean over the compounds that are not known.
Brackets are 95 % bootstrap intervals over compounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from _common import parser, show, start
from anndata import AnnData
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from sklearn.linear_model import RidgeCV

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
RIDGE = "ridge on ten components of the profile elsewhere"
SCORES = ("pearson_effect", "spearman_effect", "mse")


def predict(adata: AnnData, train: NDArray, test: NDArray, cls: type) -> NDArray:
    """Effects of the conditions that are asked, all of one context."""
    cls.setup_anndata(adata, **SETUP)
    one = cls(adata)
    one.train(datasplitter_kwargs={"external_indexing": [train]}, enable_progress_bar=False)
    asked = list(adata.obs["perturbation"].astype(str).iloc[test])
    predicted = one.predict_perturbation(asked, indices=test[:1], by="context", ci=None)
    return np.asarray(predicted[pd.Index(predicted.obs["perturbation"].astype(str)).get_indexer(asked)].X)


def ridge(adata: AnnData, train: NDArray, test: NDArray) -> NDArray:
    """Ridge of the known effects of the context on components of the compounds' mean effects elsewhere."""
    label, context = (adata.obs[c].astype(str).to_numpy() for c in ("perturbation", "cell_type"))
    here = context[train] == context[test[0]]
    elsewhere = pd.DataFrame(adata.X[train[~here]], index=label[train[~here]]).groupby(level=0).mean()
    components = PCA(10, random_state=0).fit_transform(elsewhere)
    x = pd.DataFrame(components / components.std(0)[0], index=elsewhere.index)
    known = train[here][np.isin(label[train[here]], x.index)]
    fitted = RidgeCV(np.logspace(-1, 3, 9)).fit(x.loc[label[known]], adata.X[known])
    return fitted.predict(x.reindex(label[test], fill_value=0.0))


def scores(adata: AnnData, test: NDArray, predicted: NDArray) -> pd.DataFrame:
    """Scores of the conditions that are asked, one row each."""
    truth = np.asarray(adata.X[test])
    found = {name: METRICS[name](predicted, truth, np.zeros_like(truth)) for name in SCORES[:2]}
    asked = adata.obs["perturbation"].astype(str).iloc[test].to_numpy()
    return pd.DataFrame({"perturbation": asked, **found, "mse": ((predicted - truth) ** 2).mean(1)})


def gains(table: pd.DataFrame, over: str = "PerturbX") -> pd.DataFrame:
    """How much better the model is than each other method, paired over conditions; compounds are drawn with replacement."""
    wide = table.pivot_table(index=["share", "perturbation"], columns="model", values="pearson_effect")
    rng, rows = np.random.default_rng(0), []
    for share, part in wide.groupby(level="share"):
        for name in wide.columns.drop(over):
            gain = (part[over] - part[name]).to_numpy()
            low, high = np.quantile(rng.choice(gain, (2000, len(gain))).mean(1), [0.025, 0.975])
            rows.append({"share": share, "over": name, "gain": f"{gain.mean():+.3f} ({low:.3f}, {high:.3f})"})
    return pd.DataFrame(rows)


def study(
    adata: AnnData,
    *,
    shares: Sequence[float],
    seeds: int,
    contexts: Sequence[str] | None = None,
    models: Sequence[str] = (*MODELS, RIDGE),
    out: str | None = None,
) -> pd.DataFrame:
    """Every model, for every context, share of known perturbations and choice of them; what is in the file `out` is not repeated."""
    keys = {key: SETUP[key] for key in ("perturbation_key", "context_key")}
    splits = few_shot_context(adata, control=None, shots=shares, contexts=contexts, n_splits=seeds, **keys)
    tables = [pd.read_csv(out)] if out and Path(out).exists() else []
    done = set() if not tables else set(tables[0]["split"] + tables[0]["model"])
    for split in splits:
        for name in models:
            if split.name + name in done:
                continue
            own = (adata, split.train, split.test)
            predicted = ridge(*own) if name == RIDGE else predict(*own, MODELS[name])
            tables.append(scores(adata, split.test, predicted).assign(model=name, split=split.name))
        print(split.name, flush=True)
        if out:
            pd.concat(tables).to_csv(out, index=False)
    return pd.concat(tables, ignore_index=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    made = parser(__doc__, seeds=3)
    made.add_argument("data", choices=DATA)
    made.add_argument("--shares", nargs="+", type=float, default=[0.1, 0.2, 0.5])
    made.add_argument("--contexts", nargs="+")
    made.add_argument("--models", nargs="+", choices=(*MODELS, RIDGE), default=(*MODELS, RIDGE))
    asked = start(made, argv)
    adata = getattr(datasets, DATA[asked.data])()
    table = study(
        adata, shares=asked.shares, seeds=asked.seeds, contexts=asked.contexts, models=asked.models, out=asked.out
    )
    parts = table["split"].str.extract(r"context=(?P<context>.*), (?P<share>\d+%) of")
    table = table.assign(**parts)
    show(table.groupby(["share", "model"], sort=False)[list(SCORES)].mean().reset_index())
    by = table.pivot_table(index=["share", "context"], columns="model", values="pearson_effect", sort=False)
    show(by.reset_index())
    if "PerturbX" in asked.models:
        show(gains(table))


if __name__ == "__main__":
    main()
