"""A simulated screen with informative, partly informative and useless descriptions: perturbations that a context, or all, lack.

Profiles, not cells: four of each condition. What is predicted is compared with the planted effect.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from _common import CONTROL, parser, show, start
from anndata import AnnData

from pertura import baseline
from pertura.effects._kernels import correlations

KEYS = {"perturbation_key": "perturbation", "control": CONTROL, "context_key": "context"}
PROFILES, N_LATENT, N_FEATURES = 4, 4, 12
#: how much of the variance of effects is planted in each part: told in full, told in part, elsewhere alone, in one context alone
PARTS = {"informative": 0.35, "partly": 0.3, "hidden": 0.2, "context": 0.1, "gene": 0.05}


@dataclass(frozen=True)
class Screen:
    """A simulated screen.

    Attributes
    ----------
    adata
        Profiles, all conditions.
    effect
        Planted effects, ``(n_perturbations, n_contexts, n_genes)``.
    unseen
        Perturbations that no context has, ``(n_perturbations,)``.
    missing
        Conditions that do not train: the unseen ones, and others of which some contexts have a measurement, ``(n_perturbations,
        n_contexts)``.
    latent
        What the informative and the partly informative descriptions describe, ``(n_perturbations, 2 * N_LATENT)``.
    """

    adata: AnnData
    effect: np.ndarray
    unseen: np.ndarray
    missing: np.ndarray
    latent: np.ndarray


def simulate(
    n_perturbations: int = 400, n_contexts: int = 6, n_genes: int = 300, noise: float = 1.0, seed: int = 0
) -> Screen:
    """Planted effects, measured with noise; every fifth perturbation is unseen, every fifth other one is missing in a context."""
    rng = np.random.default_rng(seed)
    names = [f"p{i:03d}" for i in range(n_perturbations)]
    latent = rng.normal(size=(3, n_perturbations, N_LATENT))
    respond = np.sqrt(rng.gamma(1.0, 1.0, n_genes))
    deviation = np.zeros((n_perturbations, n_contexts, n_genes))
    for part, own in zip(("informative", "partly", "hidden"), latent, strict=True):
        loading = rng.normal(size=(N_LATENT, n_genes)) / np.sqrt(N_LATENT)
        deviation += np.sqrt(PARTS[part]) * (own @ loading)[:, None]
    deviation *= rng.uniform(0.6, 1.4, n_contexts)[:, None]
    there = rng.normal(size=(n_contexts, N_LATENT, n_genes)) / np.sqrt(N_LATENT)
    deviation += np.sqrt(PARTS["context"]) * np.einsum(
        "pk,ckg->pcg", rng.normal(size=(n_perturbations, N_LATENT)), there
    )
    deviation += np.sqrt(PARTS["gene"]) * rng.normal(size=deviation.shape)
    effect = (0.5 * rng.normal(size=(n_contexts, n_genes)) + deviation) * respond
    told = {"informative": (0.95, latent[0]), "partly": (0.5, latent[1]), "useless": (0.0, latent[2])}
    features = {}
    for source, (share, own) in told.items():
        signal = own @ rng.normal(size=(N_LATENT, N_FEATURES)) / np.sqrt(N_LATENT)
        values = np.sqrt(share) * signal + np.sqrt(1.0 - share) * rng.normal(size=signal.shape)
        features |= {f"{source}:{j}": column for j, column in enumerate(values.T)}
    level = 5.0 + rng.normal(size=(n_contexts, n_genes))
    label, context = (v.ravel() for v in np.meshgrid(np.arange(n_perturbations), np.arange(n_contexts), indexing="ij"))
    label = np.concatenate([np.repeat(label, PROFILES), np.full(20 * PROFILES * n_contexts, -1)])
    context = np.concatenate([np.repeat(context, PROFILES), np.tile(np.arange(n_contexts), 20 * PROFILES)])
    x = level[context] + np.where(label[:, None] >= 0, effect[label, context], 0.0)
    x += noise * rng.normal(size=x.shape)
    obs = pd.DataFrame({"perturbation": np.array([*names, CONTROL])[label], "context": [f"c{c}" for c in context]})
    obs.index = [f"profile{i}" for i in range(len(obs))]
    genes = pd.DataFrame(index=[f"gene{j}" for j in range(n_genes)])
    adata = AnnData(x.astype(np.float32), obs=obs, var=genes)
    adata.uns["features"] = pd.DataFrame(features, index=names)
    adata.obs["row"], adata.obs["column"] = label, context
    unseen = np.arange(n_perturbations) % 5 == 0
    missing = unseen[:, None] | (rng.random((n_perturbations, n_contexts)) < 0.2)
    return Screen(adata, effect, unseen, missing, np.concatenate(latent[:2], 1))


def oracle(screen: Screen) -> pd.DataFrame:
    """Features that are what the descriptions describe."""
    index = screen.adata.uns["features"].index
    columns = [f"{source}:{j}" for source in ("informative", "partly") for j in range(N_LATENT)]
    return pd.DataFrame(screen.latent, index=index, columns=columns)


def scores(screen: Screen, cls: type, features: pd.DataFrame | None) -> tuple[pd.DataFrame, Any]:
    """Scores of missing conditions, those of unseen perturbations apart; and the trained baseline."""
    adata = screen.adata.copy()
    if features is not None:
        adata.uns["features"] = features
    kept = (adata.obs["row"] < 0) | ~screen.missing[adata.obs["row"], adata.obs["column"]]
    described = {} if features is None else {"perturbation_features_key": "features"}
    train = adata[kept.to_numpy()].copy()
    cls.setup_anndata(train, **KEYS, **described)
    model = cls(train)
    model.train(enable_progress_bar=False)
    rows = []
    for kind, asked in (("unseen", screen.unseen), ("missing here", ~screen.unseen & screen.missing.any(1))):
        if features is None and kind == "unseen":
            continue
        at = np.flatnonzero(asked)
        table = model.get_perturbation_effect([f"p{i:03d}" for i in at])
        shape = (len(at), *screen.effect.shape[1:])
        order = table.set_index(["perturbation", "context"]).index.drop_duplicates()
        assert list(order[:2]) == [(f"p{at[0]:03d}", "c0"), (f"p{at[0]:03d}", "c1")]
        mean, low, high = (
            table[c].to_numpy().reshape(shape)[screen.missing[at]] for c in ("lfc_mean", "ci_low", "ci_high")
        )
        truth = screen.effect[at][screen.missing[at]]
        inside = (low <= truth) & (truth <= high)
        top = np.argsort(-np.abs(truth), axis=1)[:, : min(50, truth.shape[1] // 4)]
        rows.append(
            {
                "asked": kind,
                "mse": ((mean - truth) ** 2).mean(),
                "r": correlations(mean, truth).mean(),
                "coverage": inside.mean(),
                "coverage of top 50": np.take_along_axis(inside, top, 1).mean(),
            }
        )
    return pd.DataFrame(rows), model


def study(screen: Screen) -> pd.DataFrame:
    """All baselines, the Gaussian process from several descriptions."""
    features = screen.adata.uns["features"]
    informative = features.filter(like="informative:")
    runs = {
        "mean effect": (baseline.MeanEffect, features),
        "linear": (baseline.Linear, features),
        "empirical Bayes": (baseline.EmpiricalBayes, features),
        "Gaussian process": (baseline.GaussianProcess, features),
        "Gaussian process, informative source": (baseline.GaussianProcess, informative),
        "Gaussian process, useless source": (baseline.GaussianProcess, features.filter(like="useless:")),
        "Gaussian process, no features": (baseline.GaussianProcess, None),
        "Gaussian process, truth described": (baseline.GaussianProcess, oracle(screen)),
    }
    tables = []
    for name, (cls, given) in runs.items():
        found, model = scores(screen, cls, given)
        if isinstance(model, baseline.GaussianProcess):
            found = found.assign(sources=str(model.sources.mean().round(2).to_dict()))
        tables.append(found.assign(model=name))
    return pd.concat(tables, ignore_index=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the study."""
    words = parser(__doc__, seeds=1)
    words.add_argument("--perturbations", type=int, default=400)
    words.add_argument("--contexts", type=int, default=6)
    words.add_argument("--genes", type=int, default=300)
    options = start(words, argv)
    sizes = (options.perturbations, options.contexts, options.genes)
    table = pd.concat([study(simulate(*sizes, seed=seed)).assign(seed=seed) for seed in range(options.seeds)])
    if options.out:
        table.to_csv(options.out, index=False)
    show(table.groupby(["asked", "model", "sources"], sort=False, dropna=False).mean(numeric_only=True).reset_index())


if __name__ == "__main__":
    main()
