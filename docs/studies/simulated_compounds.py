"""Simulated compounds: where DrugAAE's neural networks gain on ridge regression on the descriptions.

Four programs move the genes. How much a compound moves each is either one number of its description, or a product or absolute
value of such numbers, which no linear map finds. A fifth of the compounds is held out; the truth has no noise.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from _common import CONTROL, measure, parser, show, start
from anndata import AnnData
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, WhiteKernel
from sklearn.linear_model import RidgeCV

from pertura.effects._kernels import correlations
from pertura.model import DrugAAE

N_PROGRAMS, N_NUMBERS, N_CELLS, N_CONTROL = 4, 10, 12, 200
KEYS = {"perturbation_key": "drug", "control": CONTROL}


def simulate(
    linear: bool, n_compounds: int = 300, n_genes: int = 80, seed: int = 0
) -> tuple[AnnData, pd.DataFrame, pd.DataFrame]:
    """Counts; descriptions and true effects on log1p of counts per 10,000 of all compounds."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n_compounds, N_NUMBERS))
    bent = [x[:, 0] * x[:, 1], np.maximum(x[:, 2] + x[:, 3], 0.0), x[:, 0] * x[:, 2], np.abs(x[:, 3])]
    strength = x[:, :N_PROGRAMS] if linear else np.stack(bent, 1)
    strength = (strength - strength.mean(0)) / strength.std(0)
    programs = rng.normal(size=(N_PROGRAMS, n_genes)) * (rng.random((N_PROGRAMS, n_genes)) < 0.4)
    moved = 0.5 * strength @ programs + 0.05 * rng.normal(size=(n_compounds, n_genes)) + 0.3 * (np.arange(n_genes) < 5)
    names = np.array([f"drug{i:03d}" for i in range(n_compounds)] + [CONTROL])
    moved, label = np.append(moved, np.zeros((1, n_genes)), 0), np.repeat(np.arange(n_compounds), N_CELLS)
    label = np.append(label, np.full(N_CONTROL, n_compounds))
    state = rng.normal(1.0, 0.7, n_genes) + rng.normal(size=(len(label), 2)) @ rng.normal(0.0, 0.3, (2, n_genes))
    rate = np.exp(state + moved[label])
    depth = rng.lognormal(7.0, 0.2, (len(label), 1))
    counts = rng.poisson(depth * rate / rate.sum(1, keepdims=True)).astype(np.float32)
    obs = pd.DataFrame({"drug": names[label]}, index=[f"cell{i}" for i in range(len(label))])
    adata = AnnData(counts, obs=obs, var=pd.DataFrame(index=[f"gene{i}" for i in range(n_genes)]))
    rate = np.exp(state[-N_CONTROL:] + moved[:, None])
    level = np.log1p(1e4 * rate / rate.sum(-1, keepdims=True)).mean(1)
    truth = pd.DataFrame(level[:-1] - level[-1], names[:-1], adata.var_names)
    return adata, pd.DataFrame(x, names[:-1], [f"number{i}" for i in range(N_NUMBERS)]), truth


def from_descriptions(x: NDArray, y: NDArray, new: NDArray) -> dict[str, NDArray]:
    """Mean effect, ridge, and Gaussian processes of squared distance of the first components of the effects."""
    mean = y.mean(0)
    _, _, axes = np.linalg.svd(y - mean, full_matrices=False)
    axes = axes[: N_PROGRAMS + 1]
    process = GaussianProcessRegressor(RBF(np.full(x.shape[1], 3.0)) + WhiteKernel(), normalize_y=True, random_state=0)
    scores = [process.fit(x, (y - mean) @ axis).predict(new) for axis in axes]
    return {
        "mean effect": np.tile(mean, (len(new), 1)),
        "ridge": RidgeCV(np.logspace(-2, 3, 11)).fit(x, y).predict(new),
        "process of squared distance": mean + np.stack(scores, 1) @ axes,
    }


def study(linear: bool, seed: int, *, n_compounds: int = 300, **train: Any) -> pd.DataFrame:
    """One row per method; ``share`` is how far the model believes its neural networks."""
    adata, described, truth = simulate(linear, n_compounds, seed=seed)
    held = described.index[np.random.default_rng(seed).permutation(n_compounds)[: n_compounds // 5]]
    adata = adata[~adata.obs["drug"].isin(held)].copy()
    (effect,) = measure(adata, KEYS).effect.values()
    found = from_descriptions(*(v.to_numpy() for v in (described.loc[effect.index], effect, described.loc[held])))
    adata.uns["features"] = described
    DrugAAE.setup_anndata(adata, **KEYS, perturbation_features_key="features")
    torch.manual_seed(seed)
    model = DrugAAE(adata)
    model.train(accelerator="cpu", enable_progress_bar=False, **train)
    chosen = model.module.vector_share.clone()
    for name, share in (("DrugAAE", chosen), ("DrugAAE, closed form alone", 0.0)):
        model.module.vector_share.fill_(float(share))
        table = model.get_perturbation_effect(list(held), n_samples=2)
        found[name] = table.pivot(index="perturbation", columns="gene", values="lfc_mean").loc[held, truth.columns]
    wanted = truth.loc[held].to_numpy()
    rows = []
    for name, predicted in found.items():
        values = np.asarray(predicted)
        error = ((values - wanted) ** 2).sum() / (wanted**2).sum()
        rows.append({"truth": "linear" if linear else "not linear", "method": name, "seed": seed})
        rows[-1] |= {"pearson": correlations(values, wanted).mean(), "error": error, "share": float(chosen)}
    return pd.DataFrame(rows)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the study."""
    words = parser(__doc__, seeds=3)
    words.add_argument("--compounds", type=int, default=300)
    options = start(words, argv)
    warnings.filterwarnings(
        "ignore", category=ConvergenceWarning
    )  # numbers that say nothing have infinite length scales
    given = [(linear, seed) for linear in (False, True) for seed in range(options.seeds)]
    tables = []
    for linear, seed in given:
        tables.append(study(linear, seed, n_compounds=options.compounds))
        if options.out:
            pd.concat(tables).to_csv(options.out, index=False)
    table = pd.concat(tables)
    show(
        table.groupby(["truth", "method"], sort=False)[["pearson", "error", "share"]].agg(["mean", "min"]).reset_index()
    )


if __name__ == "__main__":
    main()
