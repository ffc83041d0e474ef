r"""Sparse regression of shifts on shifts: a gene regulatory network from a table of measured perturbation effects.

The shift :math:`y_t` of all genes under perturbation t of gene r is what it did to r, spread through the network:
:math:`y_t (I - A) = s_t e_r`. Gene by gene this is a regression of its shifts on those of its regulators,

.. math::

    y_{tg} = \sum_{r \ne g} y_{tr} A_{rg} + \epsilon_{tg}, \quad
    A_{rg} = M_{rg} E_{rg}, \quad M_{rg} \sim \mathrm{Bernoulli}(\pi_{rg}), \quad E_{rg} \sim N(0, \sigma^2),

over the perturbations of other genes. Its mean-field posterior is found by coordinate ascent (Carbonetto & Stephens 2012).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from scipy.optimize import nnls
from torch import Tensor

from pertura.data._cells import CellDataset, Rows
from pertura.data._constants import KEYS

from ._kernels import KernelFit, fit_kernels
from ._sums import add_groups, chunks, column_sums, squared
from ._table import ConditionTable

Matrix = NDArray[np.float64]

_RIDGE, _CLEAR, _WEAK, _PSEUDO = 1e-3, 3.0, 0.3, 0.05
_CHUNK, _SWEEPS, _TOLERANCE = 256, 60, 1e-4
_OPERATIONS = 2e11
_MIN_PERTURBATIONS = 5


@dataclass
class NetworkPosterior:
    """Mean-field posterior of a network.

    Attributes
    ----------
    logits
        Log-odds that there is an edge, ``(n_regulators, n_targets)``.
    mean, sd
        Weight, given that there is one, of the same shape.
    prior_logits
        Prior log-odds, of the same shape.
    slab
        Prior sd of weights.
    """

    logits: Tensor
    mean: Tensor
    sd: Tensor
    prior_logits: Tensor
    slab: float


def fit_network(
    design: Tensor,
    shift: Tensor,
    precision: Tensor,
    forbidden: Tensor,
    *,
    listed: Tensor | None = None,
    rate: float = 0.1,
    slab: float = 0.5,
    n_rounds: int = 4,
) -> NetworkPosterior:
    r"""Posterior of the network, with the rates of edges and the size of weights found from all of them.

    Parameters
    ----------
    design
        Shifts of the regulators, ``(n_perturbations, n_regulators)``.
    shift, precision
        Shifts of the targets, and one over their squared errors; 0 leaves an entry out, ``(n_perturbations, n_targets)``.
    forbidden
        Pairs that are no edges, ``(n_regulators, n_targets)``.
    listed
        How much a prior network says for an edge, between 0 and 1, of the same shape. How much that is worth shows in the
        data: listed pairs have a rate of their own.
    rate, slab
        First values of :math:`\pi` and :math:`\sigma`.
    n_rounds
        How often they are updated.
    """
    n, n_targets = shift.shape
    n_regulators = design.shape[1]
    gain = torch.zeros_like(forbidden, dtype=shift.dtype)
    mean, variance = torch.zeros_like(gain), torch.zeros_like(gain)
    sweeps = int(min(_SWEEPS, max(2, _OPERATIONS / (n * n_regulators * n_targets * n_rounds))))
    rates = (rate, min(0.5, 3.0 * rate))
    for _ in range(n_rounds):
        prior = _prior(rates, listed, gain)
        for start in range(0, n_targets, _CHUNK):
            part = slice(start, start + _CHUNK)
            _ascend(
                design, shift[:, part], precision[:, part], forbidden[:, part], prior[:, part], slab,
                gain[:, part], mean[:, part], variance[:, part], sweeps,
            )  # fmt: skip
        rates, slab = _update(gain, mean, variance, forbidden, listed, rate, slab)
    logits = prior + 0.5 * (torch.log(variance / slab**2) + mean.square() / variance)
    logits = torch.where(forbidden, -12.0, logits.clamp(-12.0, 12.0))
    return NetworkPosterior(logits, mean, variance.sqrt(), torch.where(forbidden, -12.0, prior), slab)


def _prior(rates: tuple[float, float], listed: Tensor | None, like: Tensor) -> Tensor:
    """Log-odds of edges before the data."""
    plain, known = (torch.logit(torch.tensor(r, dtype=like.dtype)) for r in rates)
    if listed is None:
        return plain.expand_as(like).clone()
    return plain + listed * (known - plain)


def _ascend(
    design: Tensor,
    shift: Tensor,
    precision: Tensor,
    forbidden: Tensor,
    prior: Tensor,
    slab: float,
    gain: Tensor,
    mean: Tensor,
    variance: Tensor,
    sweeps: int,
) -> None:
    """Coordinate ascent over regulators, all targets at once; the last three posteriors are updated in place."""
    variance.copy_(1.0 / (design.square().T @ precision + 1.0 / slab**2))
    residual = shift - design @ (gain * mean)
    for _ in range(sweeps):
        change = 0.0
        for r, x in enumerate(design.T[:, :, None]):
            old = gain[r] * mean[r]
            own = variance[r] * (x * precision * (residual + x * old)).sum(0)
            odds = prior[r] + 0.5 * (torch.log(variance[r] / slab**2) + own.square() / variance[r])
            inside = torch.sigmoid(odds).masked_fill(forbidden[r], 0.0)
            residual -= x * (inside * own - old)
            gain[r], mean[r] = inside, own
            change = max(change, float((inside * own - old).abs().max()))
        if change < _TOLERANCE:
            break


def _update(
    gain: Tensor,
    mean: Tensor,
    variance: Tensor,
    forbidden: Tensor,
    listed: Tensor | None,
    rate: float,
    slab: float,
) -> tuple[tuple[float, float], float]:
    """Rates of edges that are not, and that are, in the prior network, and the sd of weights (empirical Bayes)."""
    allowed = (~forbidden).to(gain)
    plain = allowed if listed is None else allowed * (1.0 - listed)
    # a few pseudo-pairs keep the rates away from 0 and 1
    rates = [(float((weight * gain).sum()) + 20.0 * rate) / (float(weight.sum()) + 20.0)
             for weight in (plain, allowed - plain)]  # fmt: skip
    total = float((allowed * gain).sum())
    square = float((allowed * gain * (mean.square() + variance)).sum())
    slab = (square + 20.0 * slab**2) / (total + 20.0)
    low, high = (min(max(r, 1e-4), 0.95) for r in rates)
    return (low, max(low, high)), min(max(slab**0.5, 0.05), 2.0)


def fit_rows(
    shift: Tensor,
    precision: Tensor,
    genes: Tensor,
    strength: Tensor,
    *,
    covariation: Tensor | None = None,
    covariation_precision: Tensor | None = None,
    listed: Tensor | None = None,
    rate: float = 0.1,
) -> NetworkPosterior:
    """Posterior of a network whose rows are perturbations, of a gene or of none, and further genes.

    Parameters
    ----------
    shift, precision
        Of :func:`fit_shifts`, and one over the squared errors, ``(n_perturbations, n_genes)``; 0: not measured.
    genes
        Gene of each row, -1 for none; the first rows are the perturbations, ``(n_rows,)``.
    strength
        What each row's perturbation does to its own gene; see :func:`own_shifts`.
    covariation, covariation_precision
        Covariances of the genes of the rows with all genes between cells of one condition, ``(n_rows, n_genes)``, and
        the weight of their regression, ``(n_genes,)``.
    listed, rate
        As in :func:`fit_network`.

    Returns
    -------
    Posterior with the rows of `genes`.
    """
    device, rows = shift.device, genes >= 0
    n, precision = len(shift), precision.clone()
    design = shift[:, genes[rows]].clone()
    own = torch.arange(n, device=device)[rows[:n]]
    # the row of a gene's own perturbation says nothing about what regulates it, and how strong it was is known
    precision[own, genes[own]] = 0.0
    design[own, torch.arange(len(own), device=device)] = strength[own]
    other = torch.where(~rows)[0]
    # a perturbation that is of no gene acts on its targets in its own condition alone
    alone = torch.eye(n, device=device)[:, other] * strength[other]
    design = torch.cat([design, alone.to(design)], 1)
    if covariation is not None and bool(covariation_precision.any()):
        # rows that have the cross products of cells of one condition: any root of the covariance does
        cross = covariation[rows].double()
        inner = cross[:, genes[rows]]
        ridge = 1e-3 * inner.diagonal().mean().clamp(min=1e-6)
        root = torch.linalg.cholesky(inner + ridge * torch.eye(len(inner), device=device, dtype=inner.dtype))
        more, targets = root.T.to(shift), torch.linalg.solve(root, cross).to(shift)
        design = torch.cat([design, torch.nn.functional.pad(more, (0, len(other)))])
        shift = torch.cat([shift, targets])
        precision = torch.cat([precision, covariation_precision.expand_as(targets)])
    order = torch.cat([torch.where(rows)[0], other])
    forbidden = rows[:, None] & (genes[:, None] == torch.arange(shift.shape[1], device=device))
    found = fit_network(
        design, shift, precision, forbidden[order], listed=None if listed is None else listed[order], rate=rate
    )
    back = order.argsort()
    parts = (getattr(found, name)[back] for name in ("logits", "mean", "sd", "prior_logits"))
    return NetworkPosterior(*parts, found.slab)


def measure_covariation(dataset: CellDataset, rows: Rows, genes: NDArray[np.int64]) -> tuple[Matrix, Matrix]:
    """How expression of cells varies around the mean of their condition, on the scale of a :class:`ConditionTable`.

    Parameters
    ----------
    dataset, rows
        Cells.
    genes
        Genes, -1 for none.

    Returns
    -------
    Covariances of `genes` with all genes ``(len(genes), n_genes)``, 0 for those of none, and the variances of all genes
    ``(n_genes,)``; all are 0 where there is no gene.
    """
    keys = [dataset.fields[key][rows] for key in (KEYS.PERTURBATION, KEYS.CONTEXT) if key in dataset.fields]
    _, group = np.unique(np.concatenate(keys, axis=1), axis=0, return_inverse=True)
    group, known = group.ravel(), genes >= 0
    n = np.bincount(group)[:, None].astype(np.float64)
    total = np.zeros((len(n), dataset.n_genes))
    cross, square = np.zeros((len(genes), dataset.n_genes)), np.zeros(dataset.n_genes)
    if not known.any():
        return cross, square
    kept = genes[known]
    for chunk in chunks(dataset, rows):
        x = chunk.x
        add_groups(total, group[chunk.positions], x)
        part = x[:, kept].T @ x
        cross[known] += part.toarray() if sparse.issparse(part) else part
        square += column_sums(squared(x))
    mean = total / n
    cross[known] -= (n * mean)[:, kept].T @ mean
    return cross / len(rows), (square - (n * mean**2).sum(0)) / len(rows)


# -- shifts of genes ----------------------------------------------------------------------------------------------------


def fit_shifts(
    table: ConditionTable,
    n_perturbations: int,
    strength: Callable[[NDArray[np.int64], NDArray[np.float64]], NDArray] | None = None,
) -> tuple[Matrix, Matrix]:
    """Shifts of single perturbations and their variances, both ``(n_perturbations, n_genes)``.

    Of counts, the shift is that of the log of the mean counts per 10,000, less the median over genes: expression is
    relative, and what half of the genes do is no shift. Of other data it is that of the mean. Conditions (contexts, doses,
    combinations) are weighted by how well they were measured; a combination is the sum of its members. Perturbations that
    were not measured have infinite variance.

    Parameters
    ----------
    table
        Measured with ``linear=True``, which has no effect on other data than counts.
    n_perturbations
        Number of single perturbations.
    strength
        Dose response, as in :func:`~pertura.effects.fit_measured`.
    """
    counts = table.linear_mean is not None
    mean, variance = _log_means(table) if counts else _plain_means(table)
    control = dict(zip(table.context[table.is_control].tolist(), np.flatnonzero(table.is_control), strict=True))
    treated = np.array([i for i in table.treated if table.context[i] in control], dtype=np.int64)
    shape = (n_perturbations, table.n_genes)
    if not len(treated):
        return np.zeros(shape), np.full(shape, np.inf)
    base = np.array([control[c] for c in table.context[treated].tolist()])
    codes, dose = table.codes[treated], table.dose[treated]
    response = np.ones(codes.shape) if strength is None else np.asarray(strength(codes, dose), dtype=np.float64)
    design = np.zeros((len(treated), n_perturbations))
    np.add.at(design, (np.arange(len(treated))[:, None], np.maximum(codes, 0)), response * (codes >= 0))
    measured, variance = mean[treated] - mean[base], variance[treated] + variance[base]
    # the variance of a gene, and how many times that the mean of a condition has
    gene = variance.mean(0)
    weighted = design.T / (variance / gene).mean(1)
    inverse = np.linalg.inv(weighted @ design + _RIDGE * weighted.max() * np.eye(n_perturbations))
    shift, spread = inverse @ weighted @ measured, np.diag(inverse)[:, None] * gene
    if counts:
        shift = shift - np.median(shift, axis=1, keepdims=True)
    spread[~(design > 0).any(0)] = np.inf
    return shift, spread


def _log_means(table: ConditionTable) -> tuple[Matrix, Matrix]:
    """Logs of the mean counts per 10,000, and their squared standard errors."""
    n, unit = table.n.sum(1)[:, None], table.linear_unit
    mean, variance = table.linear_mean, _lent(table.linear_within, n)
    # no count at all is compatible with a few
    variance = np.maximum(variance, mean * unit) + _PSEUDO * unit
    return np.log(mean + _PSEUDO), variance / n / (mean + _PSEUDO) ** 2


def _plain_means(table: ConditionTable) -> tuple[Matrix, Matrix]:
    n = table.n.sum(1)[:, None]
    return table.means(slice(None)), np.maximum(_lent(table.within.astype(np.float64), n), 1e-8) / n


def _lent(within: Matrix, n: NDArray) -> Matrix:
    """Variances within conditions; those with few cells lend the variance within all."""
    pooled = within.sum(0) / max(n.sum() - len(n), 1.0)
    return (within + 3.0 * pooled) / (n + 2.0)


def own_shifts(shift: Matrix, variance: Matrix, genes: NDArray[np.int64]) -> NDArray[np.float64]:
    """What each row's perturbation does to its own gene, ``(n_rows,)``.

    A knock-out need not show in the messenger RNA: where its gene did not clearly change, what is usual is assumed. Genes that
    are not measured have the usual sign (-1 for knock-outs), so that weights are positive where the gene activates, as those of the
    others; where no perturbation is of a measured gene, weights are effects (1).

    Parameters
    ----------
    shift, variance
        Of :func:`fit_shifts`.
    genes
        Gene of each row, -1 for none; the first rows are those of `shift`.
    """
    rows = np.flatnonzero(genes[: len(shift)] >= 0)
    own, error = shift[rows, genes[rows]], np.sqrt(variance[rows, genes[rows]])
    clear = np.abs(own) > _CLEAR * error
    usual = float(np.median(own[clear])) if clear.any() else -1.0
    result = np.where(genes >= 0, usual, np.sign(usual) if len(rows) else 1.0)
    kept = clear & (np.abs(own) > _WEAK * abs(usual))
    result[rows[kept]] = own[kept]
    return result


# -- perturbations that were not measured -------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class UnseenEffects:
    """Effects of perturbations that were not measured: a sum of what predicts measured ones that are left out.

    Attributes
    ----------
    share
        Of the mean effect, of what features say, and of the network; not negative, at most 1 together. The first row is of
        perturbations that the network does not have, ``(2, 3)``.
    widening
        Sd of what is left, in units of what the fit with features expects, ``(2,)``.
    mean, described
        Fits without and with features.
    """

    share: Matrix
    widening: NDArray[np.float64]
    mean: KernelFit
    described: KernelFit

    def predict(self, features: NDArray, spread: Matrix) -> tuple[Matrix, Matrix]:
        """Effects and their sd, ``(n, n_genes)`` each, given features and what the network says, 0 where it has no row."""
        said, sd = self.described.predict(features)
        which = spread.any(1).astype(int)
        share = self.share[which].T[..., None]
        return share[0] * self.mean.mean + share[1] * said + share[2] * spread, self.widening[which, None] * sd

    @property
    def of_features(self) -> dict[str, NDArray]:
        """What a :class:`MeasuredEffect` knows of perturbations outside the vocabulary, which the network does not have."""
        fit, (mean, described, _) = self.described, self.share[0]
        return {
            "intercept": mean * self.mean.mean + described * fit.intercept,
            "feature_weight": described * fit.weight,
            "feature_center": fit.center,
            "feature_block": fit.block,
            "unseen_sd": self.widening[0] * fit.sd,
        }

    @property
    def features_say_something(self) -> bool:
        """Whether predictions differ by features."""
        return bool(self.share[0, 1] > 0 and self.described.kernel_weights.any())


def fit_unseen(
    table: ConditionTable,
    genes: NDArray[np.int64],
    spread: Matrix,
    *,
    features: NDArray,
    feature_blocks: Sequence[NDArray] | None = None,
    strength: Callable[[NDArray[np.int64], NDArray[np.float64]], NDArray] | None = None,
) -> UnseenEffects | None:
    """How unseen perturbations are predicted best: by the mean effect, by features (:func:`fit_kernels`), by a network.

    Each has the share by which measured perturbations that are left out are predicted with the least squared error: what
    says nothing of them has none.

    Parameters
    ----------
    table
        What was measured.
    genes
        Gene of each perturbation, -1 for none, ``(n_perturbations,)``: its own effect is not predicted.
    spread
        Effects as a network says that was fitted without the perturbation, ``(n_perturbations, n_genes)``.
    features, feature_blocks
        ``(n_perturbations, n_features)``, without columns where there are none, and those that belong together.
    strength
        Dose response, as in :func:`~pertura.effects.fit_measured`.

    Returns
    -------
    `None` where fewer than five perturbations were measured alone.
    """
    codes, dose = table.codes[table.treated], table.dose[table.treated]
    response = np.ones(codes.shape) if strength is None else np.asarray(strength(codes, dose), dtype=np.float64)
    alone = (codes >= 0).sum(1) == 1
    measured = table.pooled(np.where(alone, codes.max(1), -1), len(genes), strength=response.max(1))
    rows = np.flatnonzero(np.isfinite(measured.noise))
    if len(rows) < _MIN_PERTURBATIONS:
        return None
    y, noise, unit = measured.effect[rows].copy(), measured.noise[rows], table.spread
    own = np.flatnonzero(genes[rows] >= 0), genes[rows][genes[rows] >= 0]
    y[own] = np.nan
    y[own] = np.nan_to_num(np.nanmean(y, axis=0))[own[1]]
    mean = fit_kernels(features[rows, :0], y, noise=noise, unit=unit)
    fit = fit_kernels(features[rows], y, feature_blocks, noise=noise, unit=unit) if features.shape[1] else mean
    parts = np.stack([mean.left_out, fit.left_out, spread[rows]])
    for values in (*parts, y):
        values[own] = 0.0
    # effects have the noise of the controls in common: what others say of it is no prediction
    n_control = table.n[table.is_control].sum(1)
    common = (1.0 / n_control).mean() / len(n_control) * (unit**2).sum()
    ruled = spread[rows].any(1)
    share, widening = np.zeros((2, 3)), np.ones(2)
    for which, kept in enumerate((slice(None), ruled if ruled.sum() >= _MIN_PERTURBATIONS else slice(None))):
        used, wanted = parts[:, kept].reshape(3, -1), y[kept].ravel()
        used = used * np.array([1.0, 1.0, which])[:, None]
        cross = used @ wanted - len(y[kept]) * common * np.array([1.0, 1.0, 0.0])
        root = np.linalg.cholesky(used @ used.T + 1e-6 * (wanted**2).sum() * np.eye(3))
        share[which], _ = nnls(root.T, np.linalg.solve(root, cross))
        share[which] /= max(1.0, share[which].sum())
        left = ((wanted - share[which] @ used) ** 2).mean()
        beyond = max(left - noise[kept].mean() * (unit**2).mean(), 1e-3 * left)
        widening[which] = np.sqrt(beyond / max((fit.sd**2).mean(), 1e-12))
    return UnseenEffects(share, widening, mean, fit)
