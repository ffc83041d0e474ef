"""Knock-outs measured in few cells: which estimate of their effect is closest to that of other cells.

Papalexi et al. 2021, confidently assigned cells. One half of the cells trains, thinned to so many of each knock-out; the other
half, controls included, is the truth.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from _common import Measured, options_of, parser, show, start, table_model

from pertura import benchmark
from pertura.data import Split
from pertura.metrics import bootstrap_interval

METRICS = ("pearson_effect", "energy_distance", "interval_coverage", "log_likelihood")
#: knock-outs with known effects: the interferon-gamma pathway, BRD4, CUL3, SMAD4 and NFKBIA
ACTIVE = ("BRD4", "CUL3", "IFNGR1", "IFNGR2", "IRF1", "JAK2", "NFKBIA", "SMAD4", "STAT1", "STAT2")


def screen() -> benchmark.Dataset:
    """Confidently assigned cells, with the replicate as batch."""
    from pertura import datasets

    adata = datasets.papalexi_2021()
    adata = adata[adata.obs["confident"].to_numpy(bool)].copy()
    return benchmark.Dataset.of(adata, setup={"batch_key": "replicate"})


def few_cells_splits(
    dataset: benchmark.Dataset, *, sizes: Sequence[int | None], seed: int = 0, min_cells: int = 100
) -> list[Split]:
    """One half of the cells to learn from, with no more than so many of each perturbation, the other half to score.

    Parameters
    ----------
    dataset
        Cells.
    sizes
        Training cells of each perturbation; `None`: all of its half. Controls are never thinned.
    seed
        Seed of the halves.
    min_cells
        Perturbations with fewer cells in total are left out.
    """
    label = dataset.labels
    names, number = np.unique(label, return_counts=True)
    kept = np.isin(label, names[(number >= min_cells) | (names == dataset.control)])
    order = np.random.default_rng(seed).permutation(len(label))
    half = np.zeros(len(label), dtype=bool)
    half[order[: len(label) // 2]] = True
    # cells of a perturbation in random order, so that the fewer are among the more
    learn = order[(half & kept)[order]]
    rank = np.zeros(len(label), dtype=np.intp)
    rank[learn] = pd.Series(label[learn]).groupby(label[learn]).cumcount().to_numpy()
    splits = []
    for size in sizes:
        own = half & kept & ((label == dataset.control) | (size is None) | (rank < (size or 0)))
        kind = f"{'all' if size is None else size} cells"
        test = np.flatnonzero(~half & kept)
        splits.append(Split(np.flatnonzero(own), test, name=f"half {seed}", kind=kind, seed=seed))
    return splits


def training_mean(found: Measured) -> tuple[Any, Any]:
    """Each perturbation's own measured effect."""
    return found.effect, {k: np.sqrt(v) for k, v in found.variance.items()}


def mean_of_perturbations(found: Measured) -> tuple[Any, Any]:
    """The mean effect of all perturbations; its interval is by how much they differ."""
    ((key, effect),) = found.effect.items()
    return tuple({key: effect * 0.0 + value} for value in (effect.mean(), effect.std()))


def genewise_eb(found: Measured) -> tuple[Any, Any]:
    r"""Measured effects shrunk gene by gene: :math:`\delta_{tg} \sim N(0, \tau_g^2)`, the variance by moments."""
    ((key, effect),) = found.effect.items()
    number = found.n[key]
    noise = (1.0 / number + 1.0 / found.n_control[key[0]]).to_numpy()[:, None]
    # the variance within conditions is the gene's, not the condition's: few cells estimate it badly
    own = np.average(found.variance[key] / noise, axis=0, weights=number)
    tau = np.maximum((effect.to_numpy() ** 2 - own * noise).mean(0), 1e-8)
    gain = tau / (tau + own * noise)
    return {key: effect * gain}, {key: pd.DataFrame(np.sqrt(gain * own * noise), *effect.axes)}


SIMPLE = {
    "MeanOfPerturbations": table_model(mean_of_perturbations),
    "TrainingMean": table_model(training_mean),
    "GenewiseEB": table_model(genewise_eb),
}


def default_models() -> dict[str, benchmark.ModelSpec]:
    """SAMSVAE, and as its published comparator a conditional VAE with the same neural networks."""
    conditional = "SAMSVAE:effect=conditional"
    return dict(benchmark.parse_model(text) for text in ("SAMSVAE", conditional))


def study(
    dataset: benchmark.Dataset,
    models: Mapping[str, Any],
    *,
    sizes: Sequence[int | None] = (10, 20, 50, None),
    seeds: int = 3,
    min_cells: int = 100,
    **options: Any,
) -> pd.DataFrame:
    """What :func:`pertura.benchmark.run` returns: ``split`` names the number of cells, ``held_out`` the half."""
    given = {"metrics": METRICS, "baselines": False, "max_asked": 300, **options}
    tables = []
    for seed in range(seeds):
        splits = few_cells_splits(dataset, sizes=sizes, seed=seed, min_cells=min_cells)
        tables.append(benchmark.run(dataset, {**SIMPLE, **models}, splits=splits, seeds=[seed], **given))
    return pd.concat(tables, ignore_index=True).drop_duplicates(ignore_index=True)


def summary(results: pd.DataFrame, active: Sequence[str] = ACTIVE) -> pd.DataFrame:
    """Means over knock-outs of means over halves, and the gain over the better of the two simple estimates."""
    rows = []
    for (split, metric), frame in results.groupby(["split", "metric"], sort=False):
        values = frame.groupby(["model", "perturbation"], sort=False)["value"].mean().unstack("perturbation")
        best = values.loc[max(("TrainingMean", "GenewiseEB"), key=lambda m: values.loc[m].mean())]
        for model, own in values.iterrows():
            halves = frame[frame["model"] == model].groupby("held_out")["value"].mean()
            row = {"split": split, "metric": metric, "model": model, "mean": own.mean()}
            row |= {"active": own[own.index.isin(active)].mean(), "sd": halves.std()}
            if metric == "pearson_effect" and model != "ceiling":
                gain = bootstrap_interval(own, best, level=0.95)
                row |= dict(zip(("gain", "gain_low", "gain_high"), gain, strict=True))
            rows.append(row)
    return pd.DataFrame(rows)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the study."""
    words = parser(__doc__, seeds=3)
    words.add_argument("--cells", nargs="+", default=["10", "20", "50", "all"], metavar="N")
    words.add_argument("--models", nargs="+", metavar="MODEL", help="default: SAMSVAE and a conditional VAE")
    options = start(words, argv)
    sizes = [None if text == "all" else int(text) for text in options.cells]
    models = options_of(options.models, default_models())
    show(summary(study(screen(), models, sizes=sizes, seeds=options.seeds, out=options.out)))


if __name__ == "__main__":
    main()
