"""Knock-outs predicted by InfoSEM, trained on control cells alone, against measured ones.

``papalexi``: genes of THP-1 cells (Papalexi et al. 2021); ``sachs``: proteins of T cells under inhibitors (Sachs et al. 2005). Beside them
stand correlation with the target gene, and regression on it: its expression in control cells is set to 0 along the slope of each gene
on it. All learn from one half of the controls; measured effects are against the other. The target gene itself is left out of the scores.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from _common import ceiling, dense, from_target, held_out_controls, parser, show, start
from numpy.typing import NDArray

from pertura import benchmark, datasets, model
from pertura.metrics import bootstrap_interval, pearson_effect


_TOP = 50  # strongest genes


def scores(
    genes: pd.Index, target: str, cells: Mapping[str, NDArray[np.float64]], predicted: NDArray[np.float64]
) -> dict[tuple[str, str], float]:
    """Scores of all methods on one target, by (method, metric), and the correlation of two halves of the cells.

    `cells` are those of the target, ``"here"`` the controls to learn from, and ``"there"`` those of the truth.
    """
    at, none = genes.get_loc(target), np.zeros(len(genes))
    others, measured = np.arange(len(genes)) != at, cells[target].mean(0) - cells["there"].mean(0)
    found: dict[tuple[str, str], float] = {("measured", "size"): _size(measured[others])}
    methods = {"InfoSEM": predicted, **from_target(cells["here"], at)}
    for name, values in methods.items():
        found[name, "pearson"] = pearson_effect(values, measured, none, genes=others)
        if len(genes) > _TOP:
            found[name, "pearson_top"] = pearson_effect(values, measured, none, genes=others, top=_TOP)
        found[name, "size"] = _size(values[others])
    return {**found, ("ceiling", "pearson"): ceiling(cells[target], cells["there"], others)}


def _size(effect: NDArray[np.float64]) -> float:
    return float(np.sqrt(np.mean(effect**2)))


def study(
    dataset: benchmark.Dataset,
    *,
    seeds: int,
    results: benchmark.Results,
    train: Mapping[str, Any] | None = None,
    **init: Any,
) -> pd.DataFrame:
    """One row per seed, knocked-out gene, method and score."""
    adata, labels = dataset.adata, dataset.labels
    targets = [t for t in np.unique(labels) if t != dataset.control and t in adata.var_names]
    if not targets:
        raise ValueError("`dataset`: no perturbation bears the name of a gene.")
    cells = {t: dense(dataset, np.flatnonzero(labels == t)) for t in targets}
    spec = benchmark.ModelSpec(model.InfoSEM, init={"controls_only": True, **init}, train=train or {})
    setup = {k: dataset.keys[k] for k in ("perturbation_key", "control", "layer")}
    for seed in range(seeds):
        run = {"dataset": dataset.name, "split": "knock-outs from half of the controls", "seed": seed}
        if results.has(run, settings=repr(spec)):
            continue
        there = held_out_controls(dataset, seed)
        controls = np.flatnonzero((labels == dataset.control) & ~there)
        cells |= {"here": dense(dataset, controls), "there": dense(dataset, np.flatnonzero(there))}
        part = adata[~there].copy()
        fitted = spec(part, setup=setup, seed=seed)
        asked = np.flatnonzero(labels[~there] == dataset.control)
        table = fitted.get_perturbation_effect(targets, indices=asked, n_samples=10)
        wide = table.pivot_table(index="perturbation", columns="gene", values="lfc_mean")[list(adata.var_names)]
        rows = [
            {"perturbation": t, "model": method, "metric": metric, "value": value}
            for t in targets
            for (method, metric), value in scores(adata.var_names, t, cells, wide.loc[t].to_numpy()).items()
        ]
        results.add(rows, run, settings=repr(spec))
    return results.select(dataset=dataset.name, seed=range(seeds))


def summary(found: pd.DataFrame) -> pd.DataFrame:
    """Means over targets with 95 % intervals, and the paired differences to InfoSEM."""
    table = found.pivot_table(index="perturbation", columns=["model", "metric"], values="value", sort=False)
    for other in ("regression", "correlation"):
        for metric in table["InfoSEM"].columns.difference(["size"]):
            table[f"InfoSEM - {other}", metric] = table["InfoSEM", metric] - table[other, metric]
    rows = [(*key, *bootstrap_interval(values, level=0.95)) for key, values in table.items()]
    return pd.DataFrame(rows, columns=["method", "metric", "mean", "low", "high"])


def inhibitors() -> benchmark.Dataset:
    """Inhibitors of measured proteins, and stimulated cells without them."""
    adata = datasets.sachs_2005()
    keep = adata.obs["perturbation"].isin(["control", *adata.var_names])
    return benchmark.Dataset(adata[keep].copy(), "sachs_2005", "perturbation", "control")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the study."""
    from papalexi_few_cells import screen

    made = parser(__doc__, seeds=3)
    made.add_argument("data", nargs="?", choices=("papalexi", "sachs"), default="papalexi", help="default: %(default)s")
    options = start(made, argv)
    dataset = inhibitors() if options.data == "sachs" else screen()
    train = {"accelerator": "cpu"}
    show(summary(study(dataset, seeds=options.seeds, results=benchmark.Results(options.out), train=train)))


if __name__ == "__main__":
    main()
