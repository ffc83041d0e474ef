"""Knock-outs that nobody made: each of a screen is left out and predicted from the others.

Papalexi et al. 2021, confidently assigned cells. GPOVAE learns from one half of the controls and all other knock-outs, with and
without what gene sets say of the genes (and with the sets of other genes); InfoSEM, and regression on the target gene, from these
controls alone. The truth is the left-out knock-out against the other half of the controls, on all genes but the target. The
screen has one context, so that there is no effect of the same knock-out elsewhere to compare with. Most targets are not among
the measured genes: what needs their expression is scored on the others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from _common import ceiling, dense, from_target, held_out_controls, parser, show, start
from anndata import AnnData
from numpy.typing import NDArray

from pertura import benchmark, model, priors
from pertura.metrics import bootstrap_interval, pearson_effect

MIN_CELLS = 100  # of a knock-out that is scored
PLAIN, SETS, OTHERS = "GPOVAE", "GPOVAE, gene sets", "GPOVAE, gene sets of other genes"
Values = NDArray[np.float64]
Prediction = tuple[Values, Values | None, Values | None]
"""Effects, and the ends of 90 % intervals."""


def describe(names: Sequence[str], sources: Mapping[str, Any]) -> pd.DataFrame:
    """Gene sets of genes, measured or not, as features of knock-outs: columns ``"source:number"``."""
    tables = []
    for source, sets in sources.items():
        genes = AnnData(np.zeros((1, len(names)), np.float32), var=pd.DataFrame(index=list(names)))
        priors.gene_embeddings(genes, sets)
        values = genes.varm["gene_embedding"]
        tables.append(pd.DataFrame(values, list(names), [f"{source}:{i}" for i in range(values.shape[1])]))
    return pd.concat(tables, axis=1)


class LeftOut:
    """A screen whose controls are in two halves: one to learn from, one for the truth."""

    def __init__(
        self, dataset: benchmark.Dataset, features: pd.DataFrame, seed: int, options: Mapping[str, Any], permuted: bool
    ) -> None:
        self.dataset, self.features, self.seed, self.options = dataset, features, seed, dict(options)
        self.permuted = permuted
        labels, there = dataset.labels, held_out_controls(dataset, seed)
        self.genes, self.rows = dataset.adata.var_names, np.flatnonzero(~there)
        here = np.flatnonzero((labels == dataset.control) & ~there)
        self.here, self.there = dense(dataset, here), dense(dataset, np.flatnonzero(there))
        cells = {n: dense(dataset, np.flatnonzero(labels == n)) for n in np.unique(labels[labels != dataset.control])}
        self.cells, self.effect = cells, {n: x.mean(0) - self.here.mean(0) for n, x in cells.items()}
        self.setup = {k: dataset.keys[k] for k in ("perturbation_key", "control", "layer")}

    def gpovae(self, target: str, features: pd.DataFrame | None) -> Prediction:
        """Without the cells of the target."""
        adata = self.dataset.adata[self.rows[self.dataset.labels[self.rows] != target]].copy()
        setup = dict(self.setup)
        if features is not None:
            adata.uns["features"], setup["perturbation_features_key"] = features, "features"
        init = {"regulators": [target] if target in self.genes else []}
        spec = benchmark.ModelSpec(model.GPOVAE, init=init, train=self.options)
        return self._ask(spec(adata, setup=setup, seed=self.seed), [target])[target]

    def infosem(self, targets: Sequence[str]) -> dict[str, Prediction]:
        """From control cells alone: one network for all targets."""
        spec = benchmark.ModelSpec(
            model.InfoSEM,
            init={"controls_only": True},
            train={k: v for k, v in self.options.items() if k != "max_epochs"},
        )
        return self._ask(spec(self.dataset.adata[self.rows].copy(), setup=self.setup, seed=self.seed), targets)

    def _ask(self, fitted: Any, targets: Sequence[str]) -> dict[str, Prediction]:
        controls = fitted.adata.obs[self.dataset.perturbation_key].astype(str) == self.dataset.control
        table = fitted.get_perturbation_effect(list(targets), indices=np.flatnonzero(controls), n_samples=20)
        wide = table.pivot(index="perturbation", columns="gene", values=["lfc_mean", "ci_low", "ci_high"])
        columns = ("lfc_mean", "ci_low", "ci_high")
        return {t: tuple(wide[c].loc[t, self.genes].to_numpy() for c in columns) for t in targets}

    def predictions(self, target: str, infosem: Mapping[str, Prediction]) -> dict[str, Prediction]:
        """Of all methods that can predict the target."""
        others = [effect for name, effect in self.effect.items() if name != target]
        found: dict[str, Prediction] = {"mean effect": (np.mean(others, axis=0), None, None)}
        found["no change"] = np.zeros(len(self.genes)), None, None
        found[SETS] = self.gpovae(target, self.features)
        if self.permuted:
            names = np.random.default_rng(self.seed).permutation(self.features.index)
            found[OTHERS] = self.gpovae(target, self.features.set_axis(names))
        if target in self.genes:
            found[PLAIN] = self.gpovae(target, None)
            found |= {name: (e, None, None) for name, e in from_target(self.here, self.genes.get_loc(target)).items()}
            found["InfoSEM"] = infosem[target]
        return found

    def scores(self, target: str, found: Mapping[str, Prediction]) -> list[dict[str, Any]]:
        """Pearson correlation; squared error beyond the noise of the truth; coverage of intervals of the effect as measured."""
        x, base, others = self.cells[target], self.there, self.genes != target
        truth = (x.mean(0) - base.mean(0))[others]
        squared_error = (x.var(0) / len(x) + base.var(0) / len(base))[others]
        values = {("ceiling", "pearson"): ceiling(x, base, others)}
        for name, prediction in found.items():
            mean, low, high = (None if v is None else v[others] for v in prediction)
            values[name, "pearson"] = pearson_effect(mean, truth, np.zeros(len(truth)))
            if name == "correlation":  # in no unit
                continue
            values[name, "error"] = float((((mean - truth) ** 2) - squared_error).sum())
            if low is not None and name != "InfoSEM":
                noise = 1.645**2 * squared_error
                below, above = (np.sqrt((end - mean) ** 2 + noise) for end in (low, high))
                values[name, "coverage"] = float(((mean - below <= truth) & (truth <= mean + above)).mean())
        return [
            {"perturbation": target, "model": name, "metric": metric, "value": value}
            for (name, metric), value in values.items()
        ]


def study(
    dataset: benchmark.Dataset,
    features: pd.DataFrame,
    *,
    seeds: int,
    results: benchmark.Results,
    targets: Sequence[str] | None = None,
    min_cells: int = MIN_CELLS,
    permuted: bool = False,
    **train: Any,
) -> pd.DataFrame:
    """One row per seed, knock-out, method and score."""
    names, number = np.unique(dataset.labels, return_counts=True)
    known = [n for n in names[number >= min_cells] if n != dataset.control]
    targets = known if targets is None else list(targets)
    if missing := set(targets) - set(known):
        raise ValueError(f"`targets`: {sorted(missing)} are no knock-outs of {min_cells} cells; there are {known}.")
    measured = [t for t in targets if t in dataset.adata.var_names]
    for seed in range(seeds):
        part: LeftOut | None = None
        for target in targets:
            run = {"dataset": dataset.name, "split": "knock-out left out", "held_out": target, "seed": seed}
            settings = repr((train, list(features.columns)))
            if results.has(run, settings=settings):
                continue
            if part is None:
                part = LeftOut(dataset, features, seed, train, permuted)
                infosem = part.infosem(measured) if measured else {}
            results.add(part.scores(target, part.predictions(target, infosem)), run, settings=settings)
    found = results.select(dataset=dataset.name, seed=range(seeds))
    return found[found["perturbation"].isin(targets)]


def summary(found: pd.DataFrame, genes: Sequence[str]) -> pd.DataFrame:
    """Means over knock-outs with 95 % intervals: of those whose genes are measured, and of all.

    The error is that of all knock-outs together, in units of that of no change.
    """
    table = found.groupby(["perturbation", "model", "metric"])["value"].mean().unstack(["model", "metric"])
    rows = []
    for group, part in (("measured genes", table[table.index.isin(genes)]), ("all", table)):
        for name, metric in part.columns[part.notna().all()]:
            own = part[name, metric]
            row = {"knock-outs": f"{group} ({len(part)})", "method": name, "metric": metric}
            if metric == "error":
                none = part["no change", "error"]
                draws = np.random.default_rng(0).integers(len(part), size=(2000, len(part)))
                ratio = own.to_numpy()[draws].sum(1) / none.to_numpy()[draws].sum(1)
                estimate = (own.sum() / none.sum(), *np.quantile(ratio, [0.025, 0.975]))
            else:
                estimate = bootstrap_interval(own, level=0.95)
            rows.append({**row, **dict(zip(("mean", "low", "high"), estimate, strict=True))})
            if metric == "pearson" and name != "mean effect":
                gain = bootstrap_interval(own, part["mean effect", metric], level=0.95)
                rows[-1] |= dict(zip(("gain", "gain_low", "gain_high"), gain, strict=True))
    return pd.DataFrame(rows).sort_values(["knock-outs", "metric"], kind="stable")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the study."""
    from papalexi_few_cells import screen

    words = parser(__doc__, seeds=1)
    words.add_argument("--knockouts", nargs="+", metavar="GENE", help="default: all of at least 100 cells")
    words.add_argument(
        "--sets",
        nargs="+",
        default=["go_bp", "coessential_modules"],
        help="of genes: names or GMT files (default: %(default)s)",
    )
    words.add_argument("--permuted", action="store_true", help="also with the gene sets of other genes")
    words.add_argument("--epochs", type=int, default=2, help="of GPOVAE (default: %(default)s)")
    options = start(words, argv)
    dataset = screen()
    sources = {Path(text).stem: text for text in options.sets}
    features = describe([n for n in np.unique(dataset.labels) if n != dataset.control], sources)
    given = {
        "targets": options.knockouts,
        "permuted": options.permuted,
        "max_epochs": options.epochs,
        "accelerator": "cpu",
    }
    results = benchmark.Results(options.out)
    found = study(dataset, features, seeds=options.seeds, results=results, enable_progress_bar=False, **given)
    show(found.pivot_table(index=["metric", "perturbation"], columns="model", values="value").reset_index())
    show(summary(found, dataset.adata.var_names))


if __name__ == "__main__":
    main()
