"""Perturbations measured in few cells: which estimate of their effect is closest to that of other cells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from numpy.typing import NDArray
from scipy.stats import norm

from pertura.data import Split
from pertura.metrics import bootstrap_interval
from pertura.metrics._pseudobulk import moments

from ._dataset import Dataset
from ._runner import CEILING, run
from ._spec import Factory, ModelSpec

FEW_CELLS = "few_cells"
DEFAULT_SIZES = (10, 20, 50, None)
FEW_CELLS_METRICS = ("pearson_effect", "energy_distance", "interval_coverage", "log_likelihood")
ACTIVE = ("BRD4", "CUL3", "IFNGR1", "IFNGR2", "IRF1", "JAK2", "NFKBIA", "SMAD4", "STAT1", "STAT2")
"""Knock-outs of Papalexi et al. 2021 with known effects: the interferon-gamma pathway, BRD4, CUL3, SMAD4 and NFKBIA."""

_ALL = "all"


def papalexi_screen() -> Dataset:
    """Confidently assigned cells of Papalexi et al. 2021, with the replicate as batch."""
    from pertura import datasets

    adata = datasets.papalexi_2021()
    adata = adata[adata.obs["confident"].to_numpy(bool)].copy()
    return Dataset(adata, "papalexi_2021", "perturbation", "control", layer="counts", setup={"batch_key": "replicate"})


def few_cells_splits(
    dataset: Dataset, *, sizes: Sequence[int | None] = DEFAULT_SIZES, seed: int = 0, min_cells: int = 100
) -> list[Split]:
    """One half of the cells to learn from, with no more than so many of each perturbation, the other half to score.

    Parameters
    ----------
    dataset
        Cells.
    sizes
        Training cells of each perturbation; `None`: all of its half. Controls are never thinned.
    seed
        Of the halves.
    min_cells
        Perturbations with fewer cells in total are left out.
    """
    for size in sizes:
        if size is not None and (isinstance(size, bool) or int(size) != size or size < 1):
            raise ValueError(f"`sizes` must be whole numbers above 0, or None for all cells, got {size!r}.")
    label = dataset.labels
    names, number = np.unique(label, return_counts=True)
    kept = np.isin(label, names[(number >= min_cells) | (names == dataset.control)])
    if not (kept & (label != dataset.control)).any():
        raise ValueError(f"`min_cells`: no perturbation has {min_cells} cells; ask for fewer.")
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(label))
    half = np.zeros(len(label), dtype=bool)
    half[order[: len(label) // 2]] = True
    # cells of a perturbation in random order, so that the fewer are among the more
    rank = np.empty(len(label), dtype=np.intp)
    learn = order[(half & kept)[order]]
    rank[learn] = pd.Series(label[learn]).groupby(label[learn]).cumcount().to_numpy()
    splits = []
    for size in sizes:
        own = half & kept
        if size is not None:
            own = own & ((label == dataset.control) | (rank < size))
        splits.append(
            Split(
                np.flatnonzero(own),
                np.flatnonzero(~half & kept),
                name=f"half {seed}",
                kind=f"{_ALL if size is None else size} cells",
                seed=seed,
            )
        )
    return splits


def run_few_cells(
    data: Dataset | AnnData | str = "papalexi",
    models: Mapping[str, ModelSpec | type | Factory] | None = None,
    *,
    sizes: Sequence[int | None] = DEFAULT_SIZES,
    seeds: int | Sequence[int] = 3,
    metrics: Sequence[str] = FEW_CELLS_METRICS,
    min_cells: int = 100,
    max_asked: int = 300,
    out: str | Path | None = None,
    **options: Any,
) -> pd.DataFrame:
    """Learn from few cells of each perturbation, score effects in the other half of the cells.

    Parameters
    ----------
    data
        ``"papalexi"`` (:func:`papalexi_screen`), or what :func:`~pertura.benchmark.run` takes.
    models
        As of :func:`~pertura.benchmark.run`; default SAMSVAE, and a conditional VAE of the same size. Beside them stand
        the mean of the training cells (``"TrainingMean"``), the same shrunk gene by gene (``"GenewiseEB"``) and the mean effect of all
        perturbations (``"MeanOfPerturbations"``).
    sizes, min_cells
        See :func:`few_cells_splits`.
    seeds
        Number of random halves, or their seeds; models are trained once in each.
    metrics
        Names. ``"log_likelihood"`` is the importance-weighted bound (IWELBO) of models that have ``get_marginal_ll``.
    max_asked
        Effects are asked of so many of the held-out controls; the truth is against all of them.
    out
        CSV file, as of :func:`~pertura.benchmark.run`.
    **options
        Further arguments of :func:`~pertura.benchmark.run`.

    Returns
    -------
    What :func:`~pertura.benchmark.run` returns; ``split`` names the number of cells, ``held_out`` the half.
    """
    dataset = papalexi_screen() if isinstance(data, str) and data == "papalexi" else Dataset.of(data)
    chosen: dict[str, Any] = {
        "MeanOfPerturbations": mean_of_perturbations,
        "TrainingMean": training_mean,
        "GenewiseEB": genewise_eb,
        **(default_models() if models is None else models),
    }
    numbers = list(range(seeds)) if isinstance(seeds, int) else [int(s) for s in seeds]
    tables = [
        run(
            dataset,
            chosen,
            splits=few_cells_splits(dataset, sizes=sizes, seed=seed, min_cells=min_cells),
            seeds=[seed],
            metrics=metrics,
            baselines=False,
            max_asked=max_asked,
            out=out,
            **options,
        )
        for seed in numbers
    ]
    return pd.concat(tables, ignore_index=True).drop_duplicates(ignore_index=True)


def default_models() -> dict[str, ModelSpec]:
    """SAMSVAE, and as its published comparator a conditional VAE with the same networks."""
    from pertura.model import SAMSVAE

    return {
        "SAMSVAE": ModelSpec(SAMSVAE),
        "SAMSVAE:effect=conditional,shrinkage=False": ModelSpec(
            SAMSVAE, init={"effect": "conditional", "shrinkage": False}
        ),
    }


def summarise_few_cells(results: pd.DataFrame, *, active: Sequence[str] = ACTIVE) -> pd.DataFrame:
    """Means over perturbations and halves.

    Parameters
    ----------
    results
        What :func:`run_few_cells` returns.
    active
        Perturbations that are averaged apart as well.

    Returns
    -------
    One row per number of cells, metric and model: ``mean``, the mean over perturbations of means over halves; ``active``, the same of
    the active perturbations; ``gain`` of the mean over the better of ``"TrainingMean"`` and ``"GenewiseEB"`` with its 95 % bootstrap
    interval over perturbations, and ``sd``, that of the mean over halves.
    """
    rows = []
    for (split, metric), frame in results.groupby(["split", "metric"], sort=False):
        values = frame.groupby(["model", "perturbation"], sort=False)["value"].mean().unstack("perturbation")
        simple = [m for m in ("TrainingMean", "GenewiseEB") if m in values.index]
        best = values.loc[max(simple, key=lambda m: values.loc[m].mean())] if simple else None
        for model, own in values.iterrows():
            halves = frame[frame["model"] == model].groupby("held_out")["value"].mean()
            row = {
                "split": split,
                "metric": metric,
                "model": model,
                "mean": own.mean(),
                "active": own[own.index.isin(active)].mean(),
                "sd": halves.std(),
            }
            if best is not None and metric == "pearson_effect" and model != CEILING:
                gain = bootstrap_interval(own, best, level=0.95)
                row |= dict(zip(("gain", "gain_low", "gain_high"), gain, strict=True))
            rows.append(row)
    return pd.DataFrame(rows)


@dataclass(frozen=True)
class EffectTable:
    """Predicts by adding an effect to control cells.

    Attributes
    ----------
    mean, sd
        Effects on the scale of the evaluation and their standard deviations, perturbations x genes.
    dataset
        How to read cells.
    """

    mean: pd.DataFrame
    sd: pd.DataFrame
    dataset: Dataset

    def predict_perturbation(self, perturbation: Sequence[str], *, adata: AnnData, **asked: Any) -> AnnData:
        """Control cells with the effects added, perturbation after perturbation."""
        keys = self.dataset.perturbation_key, self.dataset.control
        x = Dataset(adata, "", *keys, layer=self.dataset.layer).expression(np.arange(adata.n_obs))
        x = x.toarray() if hasattr(x, "toarray") else np.asarray(x)
        shifted = (self.mean.loc[list(perturbation)].to_numpy()[:, None] + x).reshape(-1, x.shape[1])
        names = [f"{cell}-{p}" for p in perturbation for cell in adata.obs_names]
        obs = pd.DataFrame({"perturbation": np.repeat(list(perturbation), len(x))}, index=names)
        return AnnData(shifted, obs=obs, var=adata.var.copy())

    def get_perturbation_effect(self, perturbation: Sequence[str], *, ci: float, **asked: Any) -> pd.DataFrame:
        """Normal intervals."""
        wide = self.mean.loc[list(perturbation)].rename_axis(index="perturbation", columns="gene")
        table = wide.stack().rename("lfc_mean").reset_index()
        half = norm.ppf((1 + ci) / 2) * self.sd.loc[list(perturbation)].to_numpy().ravel()
        return table.assign(ci_low=table["lfc_mean"] - half, ci_high=table["lfc_mean"] + half)


def _measured(adata: AnnData, setup: Mapping[str, Any]) -> tuple[Dataset, pd.DataFrame, pd.DataFrame]:
    """Effects and their squared standard errors, perturbations x genes."""
    dataset = Dataset(adata, "", setup["perturbation_key"], setup["control"], layer=setup.get("layer"))
    codes, names = pd.factorize(dataset.labels, sort=True)
    found = moments(dataset.expression(np.arange(adata.n_obs)), codes, pd.Index(names))
    error = found.var / found.n[:, None]
    base = names.tolist().index(dataset.control)
    rest = np.arange(len(names)) != base
    effect, variance = found.mean[rest] - found.mean[base], error[rest] + error[base]
    return dataset, *(pd.DataFrame(v, names[rest], adata.var_names) for v in (effect, variance))


def training_mean(adata: AnnData, *, setup: Mapping[str, Any], seed: int) -> EffectTable:
    """Each perturbation's own measured effect."""
    dataset, effect, variance = _measured(adata, setup)
    return EffectTable(effect, np.sqrt(variance), dataset)


def mean_of_perturbations(adata: AnnData, *, setup: Mapping[str, Any], seed: int) -> EffectTable:
    """The mean effect of all perturbations; its interval is by how much they differ."""
    dataset, effect, _ = _measured(adata, setup)
    mean, sd = np.broadcast_to(effect.mean(), effect.shape), np.broadcast_to(effect.std(), effect.shape)
    return EffectTable(*(pd.DataFrame(v, effect.index, effect.columns) for v in (mean, sd)), dataset)


def genewise_eb(adata: AnnData, *, setup: Mapping[str, Any], seed: int) -> EffectTable:
    r"""Measured effects shrunk gene by gene: :math:`\delta_{tg} \sim N(0, \tau_g^2)`, the variance by moments."""
    dataset, effect, variance = _measured(adata, setup)
    label = pd.Series(dataset.labels)
    number = label.value_counts()
    noise = (1.0 / number[effect.index] + 1.0 / number[dataset.control]).to_numpy()[:, None]
    # the variance within conditions is the gene's, not the condition's: few cells estimate it badly
    weights = number[effect.index].to_numpy(np.float64)[:, None] * np.ones(effect.shape)
    own: NDArray[np.float64] = np.average(variance.to_numpy() / noise, axis=0, weights=weights[:, 0])
    tau = np.maximum((effect.to_numpy() ** 2 - own * noise).mean(0), 1e-8)
    gain = tau / (tau + own * noise)
    return EffectTable(effect * gain, pd.DataFrame(np.sqrt(gain * own * noise), *effect.axes), dataset)
