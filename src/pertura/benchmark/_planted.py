"""Is a planted network found, and are knock-outs foretold that nobody made."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from scipy import sparse

from pertura.metrics import pearson_effect

logger = logging.getLogger(__name__)

#: What the prior network holds: nothing, the true edges, half of them, or as many between the wrong genes.
PRIORS = ("none", "right", "half", "wrong")
_SCREEN = {
    "n_genes": 100,
    "n_perturbations": 20,
    "n_cells_per_condition": 60,
    "n_contexts": 1,
    "n_unresponsive_contexts": 0,
    "n_truth_cells": 50,
}
_CONTROL = "control"
# seeds below were looked at while the model was made
_FIRST_SEED = 100


def run_planted(
    *,
    priors: Sequence[str] = PRIORS,
    seeds: int = 3,
    screen: Mapping[str, Any] | None = None,
    train: Mapping[str, Any] | None = None,
    **options: Any,
) -> pd.DataFrame:
    """GPOVAE on screens of :func:`pertura.datasets.simulate` in which every fourth regulator was never perturbed.

    Parameters
    ----------
    priors
        Prior networks it is given, any of ``"none"``, ``"right"``, ``"half"`` (every other edge, at random), ``"wrong"`` (targets
        permuted).
    seeds
        Number of screens.
    screen, train
        Arguments of :func:`pertura.datasets.simulate` and of ``train``.
    **options
        Arguments of :class:`pertura.model.GPOVAE`.

    Returns
    -------
    One row per screen, method and prior: ``auprc`` of edges of perturbed regulators and ``auprc_all`` of all regulators; of knock-outs of
    the regulators that nobody perturbed, on all other genes: ``pearson`` and ``mse`` of the effect (log1p of counts per 10,000), and the
    ``coverage`` of 90 % intervals.
    """
    unknown = sorted(set(priors) - set(PRIORS))
    if unknown:
        raise ValueError(f"`priors`: {unknown} are none of {list(PRIORS)}.")
    rows: list[dict[str, Any]] = []
    for seed in range(_FIRST_SEED, _FIRST_SEED + seeds):
        planted = _Planted({**_SCREEN, **(screen or {})}, seed)
        rows += ({"seed": seed, **row} for row in planted.simple_methods())
        for prior in priors:
            logger.info("screen %d, prior network: %s", seed, prior)
            rows.append({"seed": seed, **planted.gpovae(prior, train or {}, options)})
    return pd.DataFrame(rows)


class _Planted:
    """A screen without some knock-outs, its network, and the effects those knock-outs would have had."""

    def __init__(self, screen: Mapping[str, Any], seed: int) -> None:
        from pertura import datasets

        full = datasets.simulate(**{**screen, "seed": seed})
        effects = datasets.true_effects(full).droplevel("cell_type")
        self.seed = seed
        self.unseen = sorted(effects.index)[::4]
        self.effects = effects.loc[self.unseen]
        self.adata = full[~full.obs["perturbation"].isin(self.unseen).to_numpy()].copy()
        self.adata.obs["perturbation"] = self.adata.obs["perturbation"].astype(str)
        self.network = datasets.true_network(full)
        self.labels = self.adata.obs["perturbation"].to_numpy()
        self.seen = sorted(set(self.labels) - {_CONTROL})
        self.others = effects.columns.to_numpy()[None] != np.array(self.unseen)[:, None]

    def edges(self, scores: pd.DataFrame) -> dict[str, float]:
        """Of |scores| of edges, ``[source, target]``."""
        from pertura.metrics import score_network

        found = {}
        for name, regulators in (("auprc", self.seen), ("auprc_all", [*self.seen, *self.unseen])):
            if set(regulators) <= set(scores.index):
                found[name] = float(score_network(scores.abs(), self.network, regulators=regulators)["auprc"])
        return found

    def knockouts(self, predicted: NDArray[np.float64]) -> dict[str, float]:
        truth = self.effects.to_numpy()
        error = ((predicted - truth)[self.others] ** 2).mean()
        none = np.zeros(truth.shape[1])
        pearson = [pearson_effect(p, t, none, genes=m) for p, t, m in zip(predicted, truth, self.others, strict=True)]
        return {"pearson": float(np.mean(pearson)), "mse": float(error)}

    def simple_methods(self) -> Iterator[dict[str, Any]]:
        """Correlation of genes, shifts of the perturbed genes, their z scores; no effect, and the mean effect."""
        x = np.asarray(self.adata.X.todense(), dtype=np.float64)
        genes = self.adata.var_names
        control = x[self.labels == _CONTROL]
        groups = [x[self.labels == name] for name in self.seen]
        shift = np.stack([g.mean(0) - control.mean(0) for g in groups])
        error = np.stack([np.sqrt(g.var(0) / len(g) + control.var(0) / len(control)) for g in groups])
        self_edge = genes.to_numpy()[None] == np.array(self.seen)[:, None]
        tables = {"shift": shift, "z score of the shift": shift / np.maximum(error, 1e-6)}
        for name, values in tables.items():
            yield {"method": name, **self.edges(pd.DataFrame(np.where(self_edge, 0, values), self.seen, genes))}
        regulators = [*self.seen, *self.unseen]
        correlation = pd.DataFrame(np.nan_to_num(np.corrcoef(x.T)), genes, genes).loc[regulators]
        yield {"method": "correlation", **self.edges(correlation)}
        mean = np.tile(shift.mean(0), (len(self.unseen), 1))
        yield {"method": "mean effect", **self.knockouts(mean)}
        yield {"method": "no change", **self.knockouts(np.zeros_like(mean))}

    def gpovae(self, prior: str, train: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
        from pertura.model import GPOVAE

        from ._runner import quiet

        adata = self.adata.copy()
        if prior != "none":
            adata.varp["prior"] = self._prior(prior)
        with quiet(), torch.random.fork_rng():
            torch.manual_seed(self.seed)
            key = None if prior == "none" else "prior"
            GPOVAE.setup_anndata(
                adata, perturbation_key="perturbation", control=_CONTROL, layer="counts", network_key=key
            )
            model = GPOVAE(adata, regulators=self.unseen, **options)
            model.train(**{"seed": self.seed, "accelerator": "cpu", "enable_progress_bar": False, **train})
            controls = np.flatnonzero(self.labels == _CONTROL)
            table = model.get_perturbation_effect(self.unseen, indices=controls, n_samples=20)
        network = model.get_grn(key_added=None)
        weights = network.pivot(index="source", columns="target", values="weight")
        weights = weights.reindex([*self.seen, *self.unseen], columns=adata.var_names).fillna(0.0)
        low, mean, high = (
            table.pivot(index="perturbation", columns="gene", values=column)
            .loc[self.unseen, self.effects.columns]
            .to_numpy()
            for column in ("ci_low", "lfc_mean", "ci_high")
        )
        truth = self.effects.to_numpy()
        inside = ((low <= truth) & (truth <= high))[self.others]
        return {
            "method": "GPOVAE",
            "prior": prior,
            **self.edges(weights),
            **self.knockouts(mean),
            "coverage": float(inside.mean()),
        }

    def _prior(self, kind: str) -> sparse.csr_matrix:
        right = sparse.csr_matrix(self.adata.varp["true_grn"] != 0).astype(float)
        generator = np.random.default_rng(self.seed)
        if kind == "wrong":
            return right[:, generator.permutation(right.shape[1])].tocsr()
        if kind == "half":
            right.data[generator.random(right.nnz) < 0.5] = 0.0
            right.eliminate_zeros()
        return right


def summarise_planted(results: pd.DataFrame) -> pd.DataFrame:
    """Mean and range over screens of every method and prior.

    Parameters
    ----------
    results
        What :func:`run_planted` returns.

    Returns
    -------
    One row per method, prior and score: ``method, prior, metric, mean, lowest, highest, screens``.
    """
    tidy = results.fillna({"prior": ""}).melt(["seed", "method", "prior"], var_name="metric").dropna(subset=["value"])
    groups = tidy.groupby(["metric", "method", "prior"], sort=False)["value"]
    return groups.agg(mean="mean", lowest="min", highest="max", screens="size").reset_index()
