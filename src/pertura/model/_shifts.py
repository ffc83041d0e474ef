"""Measured shifts of all genes by each perturbation, and the network that they start from."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from pertura.module._gpovae import N_QUANTILES
from pertura.nn._structural import fit_structural

from ._calibration import conditions
from ._engine import device_of, encode, rescale

if TYPE_CHECKING:
    from pertura.module._gpovae import GPOVAE as Module

    from ._gpovae import GPOVAE

_RIDGE, _CLEAR, _WEAK = 1e-3, 3.0, 0.3
_PSEUDO, _MAX_MATCHED = 0.05, 1000
Matrix = NDArray[np.float64]


@torch.no_grad()
def shift_table(model: GPOVAE, rows: NDArray[np.int64]) -> tuple[Matrix, Matrix]:
    """Shifts of single perturbations and their variances, both ``(n_perturbations, n_genes)``.

    Of counts, the shift is that of the log of the mean counts per 10,000, less the median over genes: expression is
    relative, and what half of the genes do is no shift. Of other data it is that of the mean. Conditions (contexts, doses,
    combinations) are weighted by how well they were measured; a combination is the sum of its members. Perturbations that
    were not measured have infinite variance.

    Parameters
    ----------
    model
        Whose cells.
    rows
        Cells to measure them in.
    """
    vocabulary, counts = model.vocabulary, model.data_kind == "counts"
    done, which = model._done(model.adata_manager, rows)
    context = model._contexts_of(model.adata_manager, rows)
    groups, group = np.unique(np.stack([context, which], 1), axis=0, return_inverse=True)
    mean, variance = _means(model, rows, group.ravel(), len(groups), counts)
    is_control = np.array([not q.dose for q in done])[groups[:, 1]]
    control = dict(zip(groups[is_control, 0].tolist(), np.flatnonzero(is_control).tolist(), strict=True))
    treated = np.array([i for i in np.flatnonzero(~is_control) if groups[i, 0] in control], dtype=np.int64)
    shape = (vocabulary.n_perturbations, mean.shape[1])
    if not len(treated):
        return np.zeros(shape), np.full(shape, np.inf)
    base = np.array([control[c] for c in groups[treated, 0]])
    strength = np.zeros((len(treated), shape[0]))
    for row, i in enumerate(groups[treated, 1]):
        action = encode(vocabulary, done[i]).to(device_of(model.module))
        known = action.codes[0] >= 0
        own = model.module.dose_response(action.codes.clamp(min=0), action.dose)[0][known]
        strength[row, action.codes[0][known].cpu().numpy()] = own.cpu().numpy()
    measured, variance = mean[treated] - mean[base], variance[treated] + variance[base]
    # the variance of a gene, and how many times that the mean of a condition has
    gene = variance.mean(0)
    weighted = strength.T / (variance / gene).mean(1)
    inverse = np.linalg.inv(weighted @ strength + _RIDGE * weighted.max() * np.eye(shape[0]))
    table, spread = inverse @ weighted @ measured, np.diag(inverse)[:, None] * gene
    if counts:
        table = table - np.median(table, axis=1, keepdims=True)
    spread[~(strength > 0).any(0)] = np.inf
    return table, spread


def _means(
    model: GPOVAE, rows: NDArray[np.int64], group: NDArray[np.int64], n_groups: int, counts: bool
) -> tuple[Matrix, Matrix]:
    """Means of groups of cells and squared standard errors; of counts, of the log of the mean."""
    n = np.maximum(np.bincount(group, minlength=n_groups), 1.0)[:, None]
    total = torch.zeros(n_groups, len(model.gene_names), dtype=torch.float64)
    square, start, unit = torch.zeros_like(total), 0, 0.0
    for cells in model._cells(model.adata_manager, rows, 1024):
        x = (cells.x * (1e4 / cells.library) if counts else cells.x).cpu().double()
        at = torch.as_tensor(group[start : start + len(x)])
        total.index_add_(0, at, x)
        square.index_add_(0, at, x.square())
        unit += float((1e4 / cells.library).sum())
        start += len(x)
    mean, second = total.numpy() / n, square.numpy() / n
    # groups of few cells lend the variance within all groups
    within = (n * (second - mean**2)).sum(0) / max(n.sum() - n_groups, 1.0)
    variance = ((n - 1) * (second - mean**2) * n / np.maximum(n - 1, 1) + 3.0 * within) / (n + 2.0)
    if not counts:
        return mean, np.maximum(variance, 1e-8) / n
    # no count at all is compatible with a few
    variance = np.maximum(variance, mean * unit / len(rows)) + _PSEUDO * unit / len(rows)
    return np.log(mean + _PSEUDO), variance / n / (mean + _PSEUDO) ** 2


@torch.no_grad()
def matched_differences(model: GPOVAE, rows: NDArray[np.int64], seed: int = 0) -> tuple[Matrix, Matrix]:
    """Quantiles of how much cells differ from a matched control, gene by gene.

    Each cell is matched to the control of its context that entropic optimal transport gives it most of (cost: Euclidean
    distance over 100, strength 1, as in the paper).

    Returns
    -------
    Quantiles of the absolute difference of log1p expression ``(n_perturbations, n_quantiles, n_rows)`` of the genes of the
    network's rows, and the share of each perturbation in the cells ``(n_perturbations,)``.
    """
    import ot

    module, manager, rng = model.module, model.adata_manager, np.random.default_rng(seed)
    genes = module.row_genes.cpu().numpy()
    table = conditions(model, rows)
    is_control = (table["label"] == model.vocabulary.control).to_numpy()

    def expression(chosen: NDArray[np.int64]) -> Matrix:
        chosen = chosen if len(chosen) <= _MAX_MATCHED else np.sort(rng.choice(chosen, _MAX_MATCHED, replace=False))
        parts = [
            rescale(c.x, module.native_scale, model._resolve_scale(None), c.library, None).cpu().numpy()
            for c in model._cells(manager, chosen, 1024)
        ]
        return np.concatenate(parts)[:, np.maximum(genes, 0)].astype(np.float64)

    n = model.vocabulary.n_perturbations
    found: list[list[Matrix]] = [[] for _ in range(n)]
    for _, cells in table.groupby("context"):
        own = cells[is_control[cells.index]]["row"].to_numpy()
        if not len(own):
            continue
        control = expression(own)
        for label, group in cells[~is_control[cells.index]].groupby("label"):
            x = expression(group["row"].to_numpy())
            cost = ot.dist(x, control, metric="euclidean") / 100.0
            partner = ot.sinkhorn(ot.unif(len(x)), ot.unif(len(control)), cost, 1.0).argmax(1)
            for member in model.vocabulary.parse(label):
                found[model.vocabulary.names.index(member)].append(np.abs(x - control[partner]))
    levels = (np.arange(N_QUANTILES) + 0.5) / N_QUANTILES
    difference = np.zeros((n, N_QUANTILES, len(genes)))
    for row, parts in enumerate(found):
        if parts:
            difference[row] = np.quantile(np.concatenate(parts), levels, axis=0)
    share = np.array([sum(map(len, parts)) for parts in found], dtype=np.float64)
    return difference, share / max(len(rows), 1)


def own_shifts(table: Matrix, variance: Matrix, genes: NDArray[np.int64]) -> Matrix:
    """What each row's perturbation does to its own gene, ``(n_rows,)``.

    A knock-out need not show in the messenger RNA: where its gene did not clearly change, what is usual is assumed.

    Parameters
    ----------
    table, variance
        Of :func:`shift_table`.
    genes
        Gene of each row, -1 for none; the first rows are those of the table.
    """
    rows = np.flatnonzero(genes[: len(table)] >= 0)
    own, error = table[rows, genes[rows]], np.sqrt(variance[rows, genes[rows]])
    clear = np.abs(own) > _CLEAR * error
    usual = float(np.median(own[clear])) if clear.any() else -1.0
    result = np.full(len(genes), usual)
    kept = clear & (np.abs(own) > _WEAK * abs(usual))
    result[rows[kept]] = own[kept]
    return result


@torch.no_grad()
def start_network(module: Module, listed: torch.Tensor | None, rate: float) -> None:
    """Set q(M) and q(E) of a module of the ``"resolvent"`` objective to the posterior given its shifts."""
    rows = module.row_genes >= 0
    genes = module.row_genes[rows]
    shift, precision = module.shift_table, module.shift_precision.clone()
    design = shift[:, genes].clone()
    n = len(shift)
    own = torch.arange(n, device=genes.device)[rows[:n]]
    # the row of a gene's own perturbation says nothing about what regulates it, and how strong it was is known
    precision[own, module.row_genes[own]] = 0.0
    column = torch.arange(len(own), device=genes.device)
    design[own, column] = module.effect_strength[own]
    other = torch.where(~rows)[0]
    if len(other):
        # a perturbation that is of no gene acts on its targets in its own condition alone
        design = torch.cat([design, torch.eye(n, device=genes.device)[:, other].to(design)], 1)
    order = torch.cat([torch.where(rows)[0], other])
    if module.covariation_precision.any():
        design, shift, precision = _with_covariation(module, rows, design, shift, precision)
    posterior = fit_structural(
        design,
        shift,
        precision,
        ~module.possible[order],
        listed=None if listed is None else listed[order],
        rate=rate,
    )
    module.mask_logits[order] = posterior.logits
    module.prior_logits[order] = posterior.prior_logits
    if module.effect_network is None:
        module.effect_loc[order] = posterior.mean
        module.effect_log_sd[order] = posterior.sd.clamp(min=1e-3).log()
    module.effect_log_prior_sd.fill_(float(np.log(posterior.slab)))


def _with_covariation(
    module: Module, rows: torch.Tensor, design: torch.Tensor, shift: torch.Tensor, precision: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Append rows that have the cross products of cells of one condition; any root of the covariance does."""
    cross = module.covariation[rows].double()
    inner = cross[:, module.row_genes[rows]]
    ridge = 1e-3 * inner.diagonal().mean().clamp(min=1e-6)
    root = torch.linalg.cholesky(inner + ridge * torch.eye(len(inner), device=inner.device, dtype=inner.dtype))
    more, targets = root.T.to(shift), torch.linalg.solve(root, cross).to(shift)
    more = torch.nn.functional.pad(more, (0, design.shape[1] - more.shape[1]))
    weight = module.covariation_precision.expand_as(targets)
    return torch.cat([design, more]), torch.cat([shift, targets]), torch.cat([precision, weight])


@torch.no_grad()
def covariation(model: GPOVAE, rows: NDArray[np.int64]) -> tuple[Matrix, Matrix]:
    """How the log expression of cells varies around the mean of their condition.

    Returns
    -------
    Covariances of the genes of the network's rows with all genes ``(n_rows, n_genes)``, 0 for rows without a gene, and the
    variances of the genes ``(n_genes,)``.
    """
    module = model.module
    genes = module.row_genes.clamp(min=0).cpu()
    done, which = model._done(model.adata_manager, rows)
    group = which * (1 + len(model.contexts)) + model._contexts_of(model.adata_manager, rows)
    group = torch.as_tensor(np.unique(group, return_inverse=True)[1].ravel())
    n = torch.bincount(group).double()[:, None]
    total = torch.zeros(len(n), len(model.gene_names), dtype=torch.float64)
    cross, square, start = torch.zeros(len(genes), total.shape[1], dtype=torch.float64), 0.0, 0
    for cells in model._cells(model.adata_manager, rows, 1024):
        x = rescale(cells.x, module.native_scale, model._resolve_scale(None), cells.library, None).cpu().double()
        total.index_add_(0, group[start : start + len(x)], x)
        cross += x[:, genes].T @ x
        square = square + x.square().sum(0)
        start += len(x)
    mean = total / n
    cross = (cross - (n * mean)[:, genes].T @ mean) / len(rows)
    variance = (square - (n * mean.square()).sum(0)) / len(rows)
    return (cross * (module.row_genes.cpu() >= 0)[:, None]).numpy(), variance.numpy()
