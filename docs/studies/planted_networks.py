"""Is a planted network found by GPOVAE, and are knock-outs predicted that nobody made.

Screens of :func:`pertura.datasets.simulate` in which every fourth regulator was never perturbed. The prior network holds nothing, the
true edges, half of them, or as many between the wrong genes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from _common import CONTROL, parser, show, start
from numpy.typing import NDArray
from scipy import sparse

from pertura import benchmark, datasets, model
from pertura.metrics import pearson_effect, score_network

PRIORS = ("none", "right", "half", "wrong")
SCREEN = {
    "n_genes": 100,
    "n_perturbations": 20,
    "n_cells_per_condition": 60,
    "n_contexts": 1,
    "n_unresponsive_contexts": 0,
    "n_truth_cells": 50,
}
FIRST_SEED = 100  # seeds below were looked at while the model was made
Scores = dict[str, float]


class Planted:
    """A screen without some knock-outs, its network, and the effects those knock-outs would have had."""

    def __init__(self, screen: Mapping[str, Any], seed: int) -> None:
        full = datasets.simulate(**{**SCREEN, **screen, "seed": seed})
        effects = datasets.true_effects(full).droplevel("cell_type")
        self.seed, self.unseen = seed, sorted(effects.index)[::4]
        self.effects = effects.loc[self.unseen]
        self.adata = full[~full.obs["perturbation"].isin(self.unseen).to_numpy()].copy()
        self.adata.obs["perturbation"] = self.adata.obs["perturbation"].astype(str)
        self.network = datasets.true_network(full)
        self.labels = self.adata.obs["perturbation"].to_numpy()
        self.seen = sorted(set(self.labels) - {CONTROL})
        self.others = effects.columns.to_numpy()[None] != np.array(self.unseen)[:, None]

    def edges(self, scores: pd.DataFrame) -> Scores:
        """AUPRC of absolute scores of edges ``[source, target]``, of the perturbed regulators and of all."""
        found = {}
        for name, regulators in (("auprc", self.seen), ("auprc_all", [*self.seen, *self.unseen])):
            if set(regulators) <= set(scores.index):
                found[name] = float(score_network(scores.abs(), self.network, regulators=regulators)["auprc"])
        return found

    def knockouts(self, predicted: NDArray[np.float64]) -> Scores:
        """Scores of effects of the knock-outs that nobody made, on all genes but the target."""
        truth = self.effects.to_numpy()
        none = np.zeros(truth.shape[1])
        pearson = [pearson_effect(p, t, none, genes=m) for p, t, m in zip(predicted, truth, self.others, strict=True)]
        return {"pearson": float(np.mean(pearson)), "mse": float(((predicted - truth)[self.others] ** 2).mean())}

    def simple_methods(self) -> Iterator[tuple[str, Scores]]:
        """Correlation of genes, shifts of the perturbed genes, their z scores; no effect, and the mean effect."""
        x, genes = self.adata.to_df(), self.adata.var_names
        groups = x.groupby(self.labels)
        mean, error = groups.mean(), groups.var(ddof=0).div(groups.size(), axis=0)
        shift = (mean - mean.loc[CONTROL]).loc[self.seen]
        se = np.sqrt(error + error.loc[CONTROL]).loc[self.seen]
        self_edge = genes.to_numpy()[None] == np.array(self.seen)[:, None]
        yield "shift", self.edges(shift.mask(self_edge, 0.0))
        yield "z score of the shift", self.edges((shift / np.maximum(se, 1e-6)).mask(self_edge, 0.0))
        yield "correlation", self.edges(x.corr().fillna(0.0).loc[[*self.seen, *self.unseen]])
        average = np.tile(shift.mean(), (len(self.unseen), 1))
        yield "mean effect", self.knockouts(average)
        yield "no change", self.knockouts(0.0 * average)

    def gpovae(self, prior: str, train: Mapping[str, Any], options: Mapping[str, Any]) -> Scores:
        """Scores of the model with a prior network."""
        adata, setup = self.adata.copy(), {"perturbation_key": "perturbation", "control": CONTROL, "layer": "counts"}
        if prior != "none":
            adata.varp["prior"] = self._prior(prior)
            setup["network_key"] = "prior"
        init = {"regulators": self.unseen, **options}
        fitted: Any = benchmark.ModelSpec(model.GPOVAE, init=init, train={"accelerator": "cpu", **train})(
            adata, setup=setup, seed=self.seed
        )
        controls = np.flatnonzero(self.labels == CONTROL)
        table = fitted.get_perturbation_effect(self.unseen, indices=controls, n_samples=20)
        weights = fitted.get_grn(key_added=None).pivot(index="source", columns="target", values="weight")
        weights = weights.reindex([*self.seen, *self.unseen], columns=adata.var_names).fillna(0.0)
        wide = table.pivot(index="perturbation", columns="gene", values=["ci_low", "lfc_mean", "ci_high"])
        low, mean, high = (
            wide[c].loc[self.unseen, self.effects.columns].to_numpy() for c in ("ci_low", "lfc_mean", "ci_high")
        )
        truth = self.effects.to_numpy()
        inside = ((low <= truth) & (truth <= high))[self.others]
        return {**self.edges(weights), **self.knockouts(mean), "coverage": float(inside.mean())}

    def _prior(self, kind: str) -> sparse.csr_matrix:
        right = sparse.csr_matrix(self.adata.varp["true_grn"] != 0).astype(float)
        rng = np.random.default_rng(self.seed)
        if kind == "half":
            right.data[rng.random(right.nnz) < 0.5] = 0.0
            right.eliminate_zeros()
        return right[:, rng.permutation(right.shape[1])] if kind == "wrong" else right


def study(
    *,
    seeds: int,
    results: benchmark.Results,
    priors: Sequence[str] = PRIORS,
    screen: Mapping[str, Any] | None = None,
    train: Mapping[str, Any] | None = None,
    **options: Any,
) -> pd.DataFrame:
    """One row per screen, method and score: AUPRC of edges, and scores of knock-outs that nobody made."""
    settings = repr((screen, train, options))
    for seed in range(FIRST_SEED, FIRST_SEED + seeds):
        planted = Planted(screen or {}, seed)
        for name in ("simple", *(f"GPOVAE, prior: {p}" for p in priors)):
            run = {"dataset": "simulated", "split": name, "seed": seed}
            if results.has(run, settings=settings):
                continue
            if name == "simple":
                found = dict(planted.simple_methods())
            else:
                found = {name: planted.gpovae(name.removeprefix("GPOVAE, prior: "), train or {}, options)}
            rows = [{"model": m, "metric": k, "value": v} for m, s in found.items() for k, v in s.items()]
            results.add(rows, run, settings=settings)
    return results.select(dataset="simulated", seed=range(FIRST_SEED, FIRST_SEED + seeds))


def summary(found: pd.DataFrame) -> pd.DataFrame:
    """Mean, smallest and largest value over the screens."""
    groups = found.groupby(["metric", "model"], sort=False)["value"]
    return groups.agg(mean="mean", lowest="min", highest="max", screens="size").reset_index()


def main(argv: Sequence[str] | None = None) -> None:
    """Run the study."""
    words = parser(__doc__, seeds=4)
    words.add_argument("--genes", type=int, default=SCREEN["n_genes"])
    words.add_argument("--regulators", type=int, default=SCREEN["n_perturbations"])
    words.add_argument("--priors", nargs="+", choices=PRIORS, default=PRIORS)
    words.add_argument("--epochs", type=int, default=20)
    options = start(words, argv)
    screen = {"n_genes": options.genes, "n_regulators": options.regulators, "n_perturbations": options.regulators}
    given = {"screen": screen, "train": {"max_epochs": options.epochs}, "priors": options.priors}
    show(summary(study(seeds=options.seeds, results=benchmark.Results(options.out), **given)))


if __name__ == "__main__":
    main()
