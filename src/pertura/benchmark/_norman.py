"""CRISPR activation of one and two genes in K562 (Norman et al. 2019): pairs whose members were seen, and genes that were not."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from numpy.typing import NDArray

from pertura.data import Split

from ._dataset import Dataset
from ._runner import run
from ._spec import ModelSpec
from ._summary import summarise

_FEATURES = "gene_features"
_METRICS = ("pearson_effect", "mae")
HARD = 0.8
"""Pairs for which adding the effects of the members correlates less than that are reported by themselves."""


def norman_screen(embedding: str | None = None, *, n_components: int = 10) -> Dataset:
    """The K562 cells of :func:`pertura.datasets.norman_mcfaline_mini`.

    Parameters
    ----------
    embedding
        Source of :func:`pertura.priors.gene_embeddings` for descriptions of the perturbed genes; `None`: without. Genes that have
        none are left out of the descriptions.
    n_components
        Principal components of the embedding.
    """
    from pertura import datasets
    from pertura.priors import gene_embeddings

    adata = datasets.norman_mcfaline_mini()
    adata = adata[adata.obs["study"].to_numpy(str) == "norman19"].copy()
    setup = {}
    if embedding is not None:
        labels = adata.obs["perturbation"].astype(str).unique()
        names = sorted({m for label in labels for m in label.split("+")} - {"control"})
        genes = AnnData(np.zeros((1, len(names)), np.float32), var=pd.DataFrame(index=names))
        gene_embeddings(genes, embedding, key_added=_FEATURES, n_components=n_components)
        table = pd.DataFrame(np.asarray(genes.varm[_FEATURES]), index=names)
        adata.uns[_FEATURES] = table.loc[(table != 0).any(axis=1)]
        setup = {"perturbation_features_key": _FEATURES}
    return Dataset(adata, "norman_2019", "perturbation", "control", setup=setup)


def control_halves(dataset: Dataset, seed: int) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Either half of the controls: effects in training and in test must not share the noise of the same cells."""
    rows = np.random.default_rng(seed).permutation(np.flatnonzero(dataset.labels == dataset.control))
    halves = np.zeros((2, dataset.adata.n_obs), dtype=bool)
    halves[0, rows[::2]] = halves[1, rows[1::2]] = True
    return halves[0], halves[1]


def pairs_split(dataset: Dataset, seed: int = 0) -> Split:
    """All pairs held out both of whose members were measured alone; other pairs stay in training."""
    label = dataset.labels
    single = {name for name in np.unique(label) if "+" not in name}
    pairs = [name for name in np.unique(label) if "+" in name and set(name.split("+")) <= single]
    _, there = control_halves(dataset, seed)
    test = np.isin(label, pairs)
    train, test = np.flatnonzero(~test & ~there), np.flatnonzero(test | there)
    return Split(train, test, name=f"half={seed}", kind="unseen_combination", seed=seed)


def singles_splits(dataset: Dataset, *, n_folds: int = 4, seed: int = 0) -> list[Split]:
    """Folds over the genes that were perturbed alone and have a description; pairs with a held-out gene are in neither part."""
    label = dataset.labels
    known = set(dataset.adata.uns[_FEATURES].index)
    names = np.array([name for name in np.unique(label) if name in known])
    parts = [set(name.split("+")) for name in label]
    _, there = control_halves(dataset, seed)
    splits = []
    for fold, out in enumerate(np.array_split(np.random.default_rng(seed).permutation(names), n_folds)):
        touched = np.array([not p.isdisjoint(out) for p in parts])
        train, test = np.flatnonzero(~touched & ~there), np.flatnonzero(np.isin(label, out) | there)
        splits.append(Split(train, test, name=f"half={seed}, fold={fold}", kind="unseen_perturbation", seed=seed))
    return splits


def norman_pairs(
    models: Mapping[str, Any] | None = None,
    *,
    seeds: int | Sequence[int] = 3,
    data: Dataset | None = None,
    **options: Any,
) -> pd.DataFrame:
    """Pairs of genes whose members were seen alone, beside adding up.

    Parameters
    ----------
    models
        As of :func:`~pertura.benchmark.run`; default SAMSVAE with and without pairwise terms. ``"Additive"`` is always there.
    seeds
        Number of random halves of the controls, or their seeds; models are trained once with each.
    data
        Default :func:`norman_screen`.
    **options
        Further arguments of :func:`~pertura.benchmark.run`.

    Returns
    -------
    What :func:`~pertura.benchmark.summarise` returns, against ``"Additive"``: of all pairs, of those on which adding up correlates less
    than 0.8 (``pairs`` is then ``"hard"``), and of each.
    """
    from pertura import baseline, model

    if models is None:
        models = {
            "SAMSVAE": ModelSpec(model.SAMSVAE),
            "SAMSVAE:interactions=True": ModelSpec(model.SAMSVAE, init={"interactions": True}),
        }
    dataset = norman_screen() if data is None else data
    models = {"Additive": ModelSpec(baseline.Additive, stochastic=False), **models}
    found = _each_half(dataset, models, pairs_split, seeds, options)
    added = found[(found["model"] == "Additive") & (found["metric"] == "pearson_effect")]
    value = added.groupby("perturbation")["value"].mean()
    groups = {"all": set(value.index), "hard": set(value.index[value < HARD]), **{p: {p} for p in value.index}}
    tables = [
        summarise(found[found["perturbation"].isin(chosen)], baseline="Additive").assign(pairs=name)
        for name, chosen in groups.items()
        if chosen
    ]
    return pd.concat(tables, ignore_index=True)[_COLUMNS]


def norman_singles(
    embedding: str = "go_bp", *, seeds: int | Sequence[int] = 2, data: Dataset | None = None, **options: Any
) -> pd.DataFrame:
    """Genes that were never perturbed in training, from their descriptions.

    Parameters
    ----------
    embedding
        See :func:`norman_screen`.
    seeds
        As of :func:`norman_pairs`.
    **options
        As of :func:`~pertura.benchmark.run`.
    data
        Default :func:`norman_screen` with `embedding`.

    Returns
    -------
    What :func:`~pertura.benchmark.summarise` returns, against the mean effect of the perturbations that were seen.
    """
    from pertura import baseline, model

    dataset = norman_screen(embedding) if data is None else data
    models = {
        "MeanEffect": ModelSpec(baseline.MeanEffect, stochastic=False),
        "Linear": ModelSpec(baseline.Linear, stochastic=False),
        "SAMSVAE": ModelSpec(model.SAMSVAE),
    }
    found = _each_half(dataset, models, lambda data, seed: singles_splits(data, seed=seed), seeds, options)
    return summarise(found).assign(pairs=embedding)[_COLUMNS].rename(columns={"pairs": "embedding"})


def _each_half(
    dataset: Dataset,
    models: Mapping[str, Any],
    splits: Callable[[Dataset, int], Split | list[Split]],
    seeds: int | Sequence[int],
    options: dict[str, Any],
) -> pd.DataFrame:
    numbers = list(range(seeds)) if isinstance(seeds, int) else [int(s) for s in seeds]
    options = {"metrics": _METRICS, "baselines": False} | options
    tables = [run(dataset, models, splits=splits(dataset, seed), seeds=[seed], **options) for seed in numbers]
    return pd.concat(tables, ignore_index=True)


_COLUMNS = ["pairs", "metric", "model", "mean", "low", "high", "gain", "gain_low", "gain_high", "n_conditions"]
