"""Network models: how fast they are, and whether the knock-outs they predict are those that were measured."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from pyro.infer import TraceMeanField_ELBO
from torch import Tensor

from pertura.metrics import bootstrap_interval, pearson_effect
from pertura.module import Action, Cells, InfoSEM

logger = logging.getLogger(__name__)

_BATCH = 64


class _Dense(InfoSEM):
    """The same model, with the inverse of the matrix of all genes in every step."""

    def _full(self, weight: Tensor) -> Tensor:
        full = weight.new_zeros(len(weight), self.n_genes, self.n_genes).index_copy(1, self.regulators, weight)
        return torch.eye(self.n_genes, device=weight.device) - full

    def regulated(self, z: Tensor, weight: Tensor) -> Tensor:
        return z @ torch.linalg.inv(self._full(weight))

    def unregulated(self, x: Tensor, weight: Tensor) -> Tensor:
        return x @ self._full(weight)


def grn_speed(
    n_genes: Sequence[int] = (800, 2000, 5000),
    *,
    n_regulators: int = 300,
    n_cells: int = 1024,
    n_steps: int = 3,
    seed: int = 0,
) -> pd.DataFrame:
    """Time of an epoch of InfoSEM, against the same model with a dense inverse of genes x genes.

    Random expression; both start at the same parameters and see the same minibatches of 64 cells.

    Parameters
    ----------
    n_genes
        Numbers of genes.
    n_regulators
        Genes that regulate.
    n_cells
        Cells of an epoch.
    n_steps
        Steps that are timed, after one that is not; of the dense model of more than 3,000 genes one step, untimed steps left out.
    seed
        Of expression and parameters.

    Returns
    -------
    One row per number of genes: ``seconds_per_epoch``, ``seconds_per_epoch_dense``, ``faster`` (ratio), ``max_difference`` of the
    states that both compute, relative to their largest.
    """
    rows = []
    for n in n_genes:
        regulators = np.arange(min(n_regulators, n))
        generator = torch.Generator().manual_seed(seed)
        batches = [torch.randn(_BATCH, n, generator=generator) for _ in range(n_steps + 1)]
        took, models = {}, {}
        for cls in (InfoSEM, _Dense):
            torch.manual_seed(seed)
            module = cls(n, 1, regulators=regulators, knocked_out=np.zeros(0, np.int64), alpha=0.12 * n)
            module.n_train, models[cls] = n_cells, module
            many = cls is InfoSEM or n <= 3000
            took[cls] = _seconds_per_step(module, batches if many else batches[:1], warm=many)
            logger.info("%d genes, %s: %.3f s per step", n, cls.__name__, took[cls])
        steps = n_cells / _BATCH
        rows.append(
            {
                "n_genes": n,
                "n_regulators": len(regulators),
                "seconds_per_epoch": took[InfoSEM] * steps,
                "seconds_per_epoch_dense": took[_Dense] * steps,
                "faster": took[_Dense] / took[InfoSEM],
                "max_difference": _difference(models[InfoSEM], models[_Dense], batches[0][None]),
            }
        )
    return pd.DataFrame(rows)


def _seconds_per_step(module: InfoSEM, batches: Sequence[Tensor], *, warm: bool) -> float:
    elbo = TraceMeanField_ELBO()
    optimiser = torch.optim.Adam(module.parameters(), lr=1e-4)
    start = time.perf_counter()
    for i, x in enumerate(batches):
        if warm and i == 1:
            start = time.perf_counter()
        module.on_step(1.0)
        optimiser.zero_grad()
        none = torch.zeros(len(x), 1)
        cells = Cells(x, Action(none.long() - 1, none), none[:, 0].long(), none[:, 0].long(), none + 1)
        elbo.differentiable_loss(module.model, module.guide, cells).backward()
        optimiser.step()
    return (time.perf_counter() - start) / max(1, len(batches) - int(warm))


@torch.no_grad()
def _difference(fast: InfoSEM, dense: InfoSEM, z: Tensor) -> float:
    weight = fast.network()
    expected = dense.regulated(z, weight)
    return float((fast.regulated(z, weight) - expected).abs().max() / expected.abs().max())


def grn_knockouts(
    adata: AnnData | None = None,
    *,
    perturbation_key: str = "perturbation",
    control: str = "control",
    layer: str | None = "counts",
    train: dict[str, Any] | None = None,
    seeds: int = 1,
    **options: Any,
) -> pd.DataFrame:
    """Knock-outs predicted by InfoSEM, trained on control cells alone, against measured ones.

    Beside them stands regression on the target gene: its expression in control cells is set to 0 along the slope of each gene on
    it, which is correlation with the target gene times the spread of the other. The target itself is left out.

    Parameters
    ----------
    adata
        Knock-outs of genes that are among the genes; by default the confident cells of :func:`pertura.datasets.papalexi_2021`.
    perturbation_key, control, layer
        As in :meth:`pertura.model.InfoSEM.setup_anndata`.
    train
        Arguments of ``train``.
    seeds
        Number of models.
    **options
        Of :class:`pertura.model.InfoSEM`.

    Returns
    -------
    One row per seed and target gene: ``n_cells``; ``pearson`` and ``pearson_top`` (50 genes with the largest measured effects) of
    predicted and measured effects for both methods (``_sem``, ``_regression``); ``size_sem``, ``size_regression``, ``size_measured``:
    root mean squares of the effects; ``ceiling``: Pearson of the measured effects of two halves of the cells, Spearman-Brown
    corrected.
    """
    from pertura import datasets, model

    from ._runner import quiet

    if adata is None:
        adata = datasets.papalexi_2021()
        adata = adata[adata.obs["confident"].to_numpy(bool)].copy()
    labels = adata.obs[perturbation_key].astype(str).to_numpy()
    targets = [t for t in np.unique(labels) if t != control and t in adata.var_names]
    if not targets:
        raise ValueError(f"`adata`: no perturbation in `obs[{perturbation_key!r}]` bears the name of a gene.")
    x = _log_normalised(adata, layer)
    base = x[labels == control]
    rows = []
    for seed in range(seeds):
        with quiet(), torch.random.fork_rng():
            torch.manual_seed(seed)
            model.InfoSEM.setup_anndata(adata, perturbation_key=perturbation_key, control=control, layer=layer)
            fitted = model.InfoSEM(adata, controls_only=True, **options)
            fitted.train(**{"seed": seed, "accelerator": "cpu", "enable_progress_bar": False, **(train or {})})
        effects = fitted.get_perturbation_effect(targets, indices=np.flatnonzero(labels == control), n_samples=10)
        for target in targets:
            own = effects[effects["perturbation"] == target].set_index("gene")["lfc_mean"].reindex(adata.var_names)
            rows.append({"seed": seed, "target": target, **_compared(adata, x, base, labels, target, own.to_numpy())})
    return pd.DataFrame(rows)


def _log_normalised(adata: AnnData, layer: str | None) -> np.ndarray:
    values = adata.X if layer is None else adata.layers[layer]
    values = np.asarray(values.todense() if hasattr(values, "todense") else values, dtype=np.float64)
    if layer is None:
        return values
    return np.log1p(1e4 * values / np.maximum(values.sum(1, keepdims=True), 1.0))


def _compared(
    adata: AnnData, x: np.ndarray, base: np.ndarray, labels: np.ndarray, target: str, sem: np.ndarray
) -> dict[str, Any]:
    at = adata.var_names.get_loc(target)
    others = np.arange(adata.n_vars) != at
    treated = x[labels == target]
    measured = (treated.mean(0) - base.mean(0))[others]
    gene = base[:, at] - base[:, at].mean()
    slope = gene @ (base - base.mean(0)) / max(gene @ gene, 1e-12)
    regression = -(base[:, at].mean() * slope)[others]
    order = np.random.default_rng(0).permutation(len(treated))
    halves = [treated[part].mean(0) - base[i::2].mean(0) for i, part in enumerate(np.array_split(order, 2))]
    none = np.zeros(adata.n_vars)
    r = float(pearson_effect(halves[0], halves[1], none, genes=others))
    row: dict[str, Any] = {"n_cells": len(treated)}
    for name, values in (("sem", sem[others]), ("regression", regression)):
        row[f"pearson_{name}"] = float(pearson_effect(values, measured, none[others]))
        row[f"pearson_top_{name}"] = float(pearson_effect(values, measured, none[others], top=50))
        row[f"size_{name}"] = float(np.sqrt(np.mean(values**2)))
    return {**row, "size_measured": float(np.sqrt(np.mean(measured**2))), "ceiling": 2 * r / (1 + r)}


def summarise_knockouts(results: pd.DataFrame, *, n_resamples: int = 2000, seed: int = 0) -> pd.DataFrame:
    """Means over targets with bootstrap intervals, and the paired difference of the two methods.

    Parameters
    ----------
    results
        What :func:`grn_knockouts` returns.
    n_resamples, seed
        Of the bootstrap over targets.

    Returns
    -------
    One row per score: ``metric, mean, ci_low, ci_high``.
    """
    table = results.groupby("target").mean(numeric_only=True)
    for kind in ("pearson", "pearson_top"):
        table[f"{kind}_difference"] = table[f"{kind}_sem"] - table[f"{kind}_regression"]
    table = table.drop(columns=["seed", "n_cells"])
    intervals = [bootstrap_interval(v, level=0.95, n_resamples=n_resamples, seed=seed) for v in table.to_numpy().T]
    return pd.DataFrame(intervals, columns=["mean", "ci_low", "ci_high"]).assign(metric=table.columns)[
        ["metric", "mean", "ci_low", "ci_high"]
    ]
