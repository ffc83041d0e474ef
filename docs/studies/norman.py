"""CRISPR activation of one and two genes in K562 (Norman et al. 2019).

``pairs``: pairs whose members were seen alone. ``singles``: genes that were never perturbed in training, from embeddings.
One half of the controls trains and is what predictions start from, the other is what the true effects are measured against.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from _common import held_out_controls, parser, show, start
from anndata import AnnData

from pertura import baseline, benchmark, model
from pertura.data import Split

FEATURES = "gene_features"
METRICS = ("pearson_effect", "mae")
#: pairs for which adding the effects of the members correlates less than this are reported by themselves
HARD = 0.8
COLUMNS = ["pairs", "metric", "model", "mean", "low", "high", "gain", "gain_low", "gain_high", "n_conditions"]
Splits = Callable[[benchmark.Dataset, int], list[Split]]


def screen(embedding: str | None = None, *, n_components: int = 10) -> benchmark.Dataset:
    """The K562 cells, with principal components of a gene embedding if one is named; genes without are left out of it."""
    from pertura import datasets
    from pertura.priors import gene_embeddings

    adata = datasets.norman_mcfaline_mini()
    adata = adata[adata.obs["study"].to_numpy(str) == "norman19"].copy()
    setup = {}
    if embedding is not None:
        labels = adata.obs["perturbation"].astype(str).unique()
        names = sorted({m for label in labels for m in label.split("+")} - {"control"})
        genes = AnnData(np.zeros((1, len(names)), np.float32), var=pd.DataFrame(index=names))
        gene_embeddings(genes, embedding, key_added=FEATURES, n_components=n_components)
        table = pd.DataFrame(np.asarray(genes.varm[FEATURES]), index=names)
        adata.uns[FEATURES] = table.loc[(table != 0).any(axis=1)]
        setup = {"perturbation_features_key": FEATURES}
    return benchmark.Dataset(adata, "norman_2019", "perturbation", "control", setup=setup)


def pairs_split(dataset: benchmark.Dataset, seed: int = 0) -> list[Split]:
    """All pairs held out both of whose members were measured alone; other pairs stay in training."""
    label = dataset.labels
    single = {name for name in np.unique(label) if "+" not in name}
    pairs = [name for name in np.unique(label) if "+" in name and set(name.split("+")) <= single]
    there, test = held_out_controls(dataset, seed), np.isin(label, pairs)
    rows = np.flatnonzero(~test & ~there), np.flatnonzero(test | there)
    return [Split(*rows, name=f"half={seed}", kind="unseen_combination", seed=seed)]


def singles_splits(dataset: benchmark.Dataset, seed: int = 0, *, n_folds: int = 4) -> list[Split]:
    """Folds over genes that were perturbed alone and have a description; pairs with a held-out gene are in neither part."""
    label = dataset.labels
    names = np.array([name for name in np.unique(label) if name in set(dataset.adata.uns[FEATURES].index)])
    parts, there = [set(name.split("+")) for name in label], held_out_controls(dataset, seed)
    splits = []
    for fold, out in enumerate(np.array_split(np.random.default_rng(seed).permutation(names), n_folds)):
        touched = np.array([not p.isdisjoint(out) for p in parts])
        rows = np.flatnonzero(~touched & ~there), np.flatnonzero(np.isin(label, out) | there)
        splits.append(Split(*rows, name=f"half={seed}, fold={fold}", kind="unseen_perturbation", seed=seed))
    return splits


def study(
    dataset: benchmark.Dataset, models: Mapping[str, Any], splits: Splits, *, seeds: int, **options: Any
) -> pd.DataFrame:
    """Models trained once with each half of the controls."""
    given = {"metrics": METRICS, "baselines": False, **options}
    tables = [benchmark.run(dataset, models, splits=splits(dataset, s), seeds=[s], **given) for s in range(seeds)]
    return pd.concat(tables, ignore_index=True).drop_duplicates(ignore_index=True)


def summarize_pairs(found: pd.DataFrame) -> pd.DataFrame:
    """Against adding up: all pairs, those on which it correlates less than ``HARD``, and each."""
    added = found[(found["model"] == "Additive") & (found["metric"] == "pearson_effect")]
    value = added.groupby("perturbation")["value"].mean()
    groups = {"all": set(value.index), "hard": set(value.index[value < HARD]), **{p: {p} for p in value.index}}
    tables = [
        benchmark.summarize(found[found["perturbation"].isin(chosen)], baseline="Additive").assign(pairs=name)
        for name, chosen in groups.items()
        if chosen
    ]
    return pd.concat(tables, ignore_index=True)[COLUMNS]


def main(argv: Sequence[str] | None = None) -> None:
    """Run the study."""
    words = parser(__doc__, seeds=3)
    words.add_argument("question", choices=("pairs", "singles"))
    words.add_argument("--embedding", default="go_bp", help="of singles (default: %(default)s)")
    options = start(words, argv)
    if options.question == "pairs":
        models = {"Additive": benchmark.ModelSpec(baseline.Additive, stochastic=False)}
        models |= dict(benchmark.parse_model(text) for text in ("SAMSVAE", "SAMSVAE:interactions=True"))
        show(summarize_pairs(study(screen(), models, pairs_split, seeds=options.seeds, out=options.out)))
        return
    simple = {n: benchmark.ModelSpec(getattr(baseline, n), stochastic=False) for n in ("MeanEffect", "Linear")}
    models = {**simple, "SAMSVAE": benchmark.ModelSpec(model.SAMSVAE)}
    found = study(screen(options.embedding), models, singles_splits, seeds=options.seeds, out=options.out)
    show(benchmark.summarize(found)[COLUMNS[1:]])


if __name__ == "__main__":
    main()
