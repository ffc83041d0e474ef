r"""Effects of perturbations that were not measured: a Gaussian process over perturbations.

With :math:`y_t` the measured effects and :math:`x_{ts}` effects of the same perturbation from elsewhere (another context, a
signature), in coordinates of the principal components of the measured effects,

.. math::

    y_t = m + \sum_s b_s \odot x_{ts} + f(t) + e_t, \quad
    f_c \sim N\Big(0, v_c \sum_k w_k K_k\Big), \quad e_{tc} \sim N(0, v_c w_e + n_t u_c).

Each :math:`K_k` is the linear kernel of one block of features, :math:`v_c` the variance of a component, :math:`n_t` the noise of
a perturbation. Components of like variance share their weights, which maximize the marginal likelihood; a kernel that does not
improve it, nor the density of left-out perturbations with it, has weight 0. Amplitudes b are one number per source that each gene may
depart from.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg import lapack
from scipy.optimize import minimize
from torch import Tensor

logger = logging.getLogger(__name__)

Matrix = NDArray[np.float64]

_MAX_COMPONENTS, _MAX_CHOOSING, _FIRST_GROUP = 128, 500, 4
_MIN_PERTURBATIONS, _MAX_SOURCES = 5, 8
# Components have a variance each. As many of them as perturbations would say the same of every kernel: nothing.
_ROWS_PER_COMPONENT = 3
_MEAN_VARIANCE = 10.0  # prior variance of the mean effect, in units of that of effects
# What a kernel has to add: nats for each of its weights that is above the last number, standard errors of left-out densities.
_MIN_GAIN, _MIN_Z, _MIN_WEIGHT = 2.0, 2.0, 1e-3
_FREEDOM = 4.0  # degrees of freedom of these densities
_LEVELS = (0.03, 0.1, 0.3, 1.0)  # of all weights, in units of those of the marginal likelihood
# Prior strength of "a gene's amplitude is that of all genes", in units of what an average gene's perturbations tell.
_STRENGTHS = (0.1, 0.3, 1.0, 3.0, 1e6)


@dataclass(frozen=True, eq=False)
class KernelFit:
    """Effects of perturbations as a function of their features.

    Attributes
    ----------
    mean
        Effect where features say nothing, ``(n_genes,)``.
    left_out
        Effect of each perturbation as predicted from all others, ``(n, n_genes)``.
    sd
        Sd of the effect of an average perturbation that was not measured, ``(n_genes,)``.
    kernel_weights
        Share of each block in the variance of effects that the mean effect leaves, ``(n_blocks,)``. All 0: the mean effect is
        all there is.
    evidence
        Gain in log marginal likelihood of the kernels over the mean effect alone, in nats.
    gain
        Mean Pearson correlation of left-out effects, over that of the mean effect.
    share
        How much of what predictions differ from the mean effect left-out perturbations bear out, 0 to 1.
    strength
        Prior strength of one amplitude for all genes; `None`: no part is in proportion to a gene's own value elsewhere.
    """

    mean: NDArray[np.float64]
    left_out: Matrix
    sd: NDArray[np.float64]
    kernel_weights: NDArray[np.float64]
    evidence: float
    gain: float
    share: float
    strength: float | None
    _blocks: _Blocks
    _slopes: Matrix
    _fit: _Fit | None

    def predict(self, features: NDArray) -> tuple[Matrix, Matrix]:
        """Effects of perturbations with these features and their sd, ``(n, n_genes)`` each; a block that is all 0 is missing."""
        blocks, fit = self._blocks, self._fit
        z, missing = blocks.scale(np.asarray(features, dtype=np.float64))
        mean = self.mean + z @ self._slopes
        if fit is None:
            return mean, np.broadcast_to(self.sd, mean.shape)
        kernels = np.stack([z[:, block] @ own[:, block].T for block, own in blocks])
        # a perturbation that is not described is as far from the others as an average one
        alone = np.stack([(z[:, block] ** 2).sum(1) for block, _ in blocks]) + missing
        mean = mean + np.einsum("kin,kng->ig", kernels, fit.coefficients)
        ahead = np.empty((len(z), len(fit.axes)))
        for at, weights, inverse in fit.groups:
            with_others = np.tensordot(weights[:-1], kernels, 1) + _MEAN_VARIANCE
            explained = np.einsum("in,nm,im->i", with_others, inverse, with_others)
            ahead[:, at] = (weights[:-1] @ alone + _MEAN_VARIANCE + weights[-1] - explained)[:, None]
        return mean, np.sqrt((np.maximum(ahead, 0.0) * fit.variance) @ fit.axes**2 + fit.outside)

    @property
    def weight(self) -> Matrix:
        """The effect is ``features @ weight + intercept``, with :func:`fill_missing` of the features."""
        total = self._slopes.copy()
        if self._fit is not None:
            for (block, own), coefficients in zip(self._blocks, self._fit.coefficients, strict=True):
                total[block] += own[:, block].T @ coefficients
        return total / self._blocks.width[:, None]

    @property
    def intercept(self) -> NDArray[np.float64]:
        """See :attr:`weight`; ``(n_genes,)``."""
        return self.mean - self.center @ self.weight

    @property
    def center(self) -> NDArray[np.float64]:
        """Mean of each feature where its block is known, ``(n_features,)``."""
        return self._blocks.center

    @property
    def block(self) -> NDArray[np.int64]:
        """Number of the block of each feature, ``(n_features,)``."""
        result = np.zeros(len(self.center), dtype=np.int64)
        for number, columns in enumerate(self._blocks.columns):
            result[columns] = number
        return result


@dataclass
class _Fit:
    """Gaussian processes of components.

    Attributes
    ----------
    weights
        Of kernels and of what they leave, ``(n_groups, n_kernels + 1)``.
    share
        Of the kernels in the variance.
    coefficients
        What kernels with new perturbations are multiplied with, ``(n_kernels, n, n_genes)``.
    mean
        What is added to the mean effect.
    left_out, sd, evidence
        As in :class:`KernelFit`.
    axes, variance, groups, outside
        Components, their variances, the components of each group with weights and inverse covariance, and the variance of each
        gene that is in no component.
    """

    weights: Matrix
    share: NDArray[np.float64]
    coefficients: Matrix
    mean: NDArray[np.float64]
    left_out: Matrix
    sd: NDArray[np.float64]
    evidence: float
    axes: Matrix
    variance: NDArray[np.float64]
    groups: list[tuple[NDArray[np.int64], NDArray[np.float64], Matrix]]
    outside: NDArray[np.float64]


class _Blocks:
    """Features in blocks that have a mean square length of 1, and are 0 where they are missing.

    Parameters
    ----------
    features
        ``(n, n_features)``.
    columns
        Of each block.
    """

    def __init__(self, features: Matrix, columns: Sequence[slice | NDArray]) -> None:
        self.columns, n = columns, features.shape[1]
        self.center, self.width = np.zeros(n), np.ones(n)
        for block in columns:
            part = features[:, block]
            known = (part != 0).any(1)
            if known.any():
                self.center[block] = part[known].mean(0)
                self.width[block] = np.sqrt(((part[known] - self.center[block]) ** 2).sum() / len(part)) + 1e-12
        self.scaled, _ = self.scale(features)

    def __iter__(self) -> Iterator[tuple[slice | NDArray, Matrix]]:
        return ((block, self.scaled) for block in self.columns)

    def scale(self, features: Matrix) -> tuple[Matrix, NDArray[np.bool_]]:
        """Centered and scaled features, and where blocks are missing, ``(n_blocks, n)``."""
        scaled = (features - self.center) / self.width
        missing = np.stack([~(features[:, block] != 0).any(1) for block in self.columns])
        for block, absent in zip(self.columns, missing, strict=True):
            scaled[np.ix_(absent, np.arange(scaled.shape[1])[block])] = 0.0
        return scaled, missing

    def places(self, own: Sequence[NDArray]) -> list[tuple[NDArray, NDArray]]:
        """Columns of each block whose columns are genes, and these genes."""
        result = []
        for block, genes in zip(self.columns, own, strict=False):
            found = np.asarray(genes) >= 0
            if found.any():
                result.append((np.arange(len(self.center))[block][found], np.asarray(genes)[found]))
        return result


def fill_missing(features: Tensor, center: Tensor, block: Tensor) -> Tensor:
    """Features with the mean in place of blocks that are all 0, which are missing.

    Parameters
    ----------
    features
        ``(..., n_features)``.
    center, block
        As in :class:`KernelFit`.
    """
    if not len(block):
        return features
    known = features.new_zeros(*features.shape[:-1], int(block.max()) + 1)
    known = known.index_add(-1, block, (features != 0).to(features))
    return torch.where(known[..., block] > 0, features, center.to(features))


def feature_blocks(names: Sequence[str]) -> list[NDArray[np.int64]]:
    """Columns that come from one source: those whose names have the same part before the first colon, ``"source:column"``.

    Parameters
    ----------
    names
        Of the columns. Where they name more than eight sources, all columns are one block.
    """
    source = np.array([str(name).split(":", 1)[0] if ":" in str(name) else "" for name in names])
    sources = list(dict.fromkeys(source))
    if not 0 < len(sources) <= _MAX_SOURCES:
        return [np.arange(len(names))]
    return [np.flatnonzero(source == one) for one in sources]


def correlations(first: NDArray, second: NDArray) -> NDArray[np.float64]:
    """Pearson correlation of the rows of two matrices; 0 where a row is constant."""
    a, b = (v - v.mean(1, keepdims=True) for v in (first, second))
    scale = np.sqrt((a**2).sum(1) * (b**2).sum(1))
    return np.divide((a * b).sum(1), scale, out=np.zeros(len(a)), where=scale > 1e-12)


class _Process:
    """Independent Gaussian processes with the same kernels, one per column of `y`.

    Components are taken in groups, by how much of their variance is noise; those of a group share weights and a factorization.

    Parameters
    ----------
    kernels
        ``(n_kernels, n, n)``.
    y
        ``(n, n_components)``, by descending variance.
    noise
        Variance that is known of each row, ``(n,)``, times `unit` of each component, ``(n_components,)``.
    """

    def __init__(self, kernels: Matrix, y: Matrix, noise: NDArray, unit: NDArray) -> None:
        self.kernels = kernels
        total = (y**2).mean(0)
        self.variance = np.maximum(total - unit * noise.mean(), 0.02 * total)
        self.y = y / np.sqrt(self.variance)
        ratio = unit / self.variance
        order = np.argsort(ratio, kind="stable")
        ends = _FIRST_GROUP * (2 ** np.arange(1, 10) - 1)
        self.groups = [at for at in np.split(order, ends) if len(at)]
        self.group_of = np.empty(len(order), dtype=np.int64)
        for group, at in enumerate(self.groups):
            self.group_of[at] = group
        self.noise = [float(ratio[at].mean()) * noise for at in self.groups]

    def inverse(self, group: int, used: NDArray, weights: NDArray[np.float64]) -> tuple[Matrix, float]:
        """Inverse covariance of a group, and its log determinant."""
        covariance = np.tensordot(weights[:-1], self.kernels[used], 1) + _MEAN_VARIANCE
        covariance[np.diag_indices(len(covariance))] += weights[-1] + self.noise[group] + 1e-9
        factor, _ = lapack.dpotrf(covariance.T, lower=1, overwrite_a=1)
        log_determinant = 2.0 * float(np.log(np.diag(factor)).sum())
        inverse, _ = lapack.dpotri(factor, lower=1, overwrite_c=1)
        return np.tril(inverse) + np.tril(inverse, -1).T, log_determinant

    def fit(self, used: NDArray[np.bool_], start: Matrix | None = None) -> tuple[Matrix, float]:
        """Weights of kernels and of what they leave, ``(n_groups, n_kernels + 1)``; and the log likelihood.

        Parameters
        ----------
        used
            Kernels to use, ``(n_kernels,)``; the others have weight 0.
        start
            Weights to start from.
        """
        likelihood, kept = 0.0, np.append(used, True)
        start = np.full((len(self.groups), len(kept)), 0.5 / max(len(used), 1)) if start is None else start
        weights = np.zeros((len(self.groups), len(used) + 1))
        for group, at in enumerate(self.groups):
            y = self.y[:, at]

            def value(log_weights: NDArray, group: int = group, y: Matrix = y) -> tuple[float, NDArray]:
                inverse, log_determinant = self.inverse(group, used, np.exp(log_weights))
                dual = inverse @ y
                slope = y.shape[1] * inverse - dual @ dual.T
                gradient = np.append(np.tensordot(self.kernels[used], slope, 2), np.trace(slope))
                return 0.5 * (y.shape[1] * log_determinant + (dual * y).sum()), 0.5 * gradient * np.exp(log_weights)

            found = minimize(
                value,
                np.log(np.clip(start[group, kept], 1e-3, 1e2)),
                jac=True,
                method="L-BFGS-B",
                bounds=[(-10.0, 5.0)] * int(kept.sum()),
                options={"maxiter": 30, "ftol": 1e-7},
            )
            weights[group, kept] = np.exp(found.x)
            likelihood -= float(found.fun)
        return weights, likelihood

    def duals(self, weights: Matrix) -> tuple[Matrix, Matrix, list[tuple]]:
        """Inverse covariance times `y`, the diagonal of the inverse, ``(n, n_components)`` each, and components, weights, inverses."""
        every, groups = np.ones(len(self.kernels), dtype=bool), []
        dual, precision = np.empty_like(self.y), np.empty_like(self.y)
        for group, at in enumerate(self.groups):
            inverse, _ = self.inverse(group, every, weights[group])
            dual[:, at], precision[:, at] = inverse @ self.y[:, at], np.diag(inverse)[:, None]
            groups.append((at, weights[group], inverse))
        return dual, precision, groups

    def choose(self) -> tuple[Matrix, float]:
        """Weights of the kernels that help, and the log likelihood that they add."""
        used = np.ones(len(self.kernels), dtype=bool)
        weights, likelihood = self.fit(used)
        for k in np.argsort(weights[:, :-1].sum(0)):
            fewer = used & (np.arange(len(used)) != k)
            simpler, without = self.fit(fewer, weights)
            gain = self._densities(weights) - self._densities(simpler)
            few = likelihood - without < _MIN_GAIN * (weights[:, k] > _MIN_WEIGHT).sum()
            if few or gain.mean() <= _MIN_Z * gain.std(ddof=1) / np.sqrt(len(gain)):
                used, weights, likelihood = fewer, simpler, without
        evidence = likelihood - self.fit(np.zeros_like(used), weights)[1]
        if not used.any():
            return weights, evidence
        # directions of features in which perturbations hardly differ have little to say, whatever the likelihood makes of them
        level = np.append(np.ones(len(used)), 0.0)
        tried = [weights * np.where(level > 0, factor, 1.0) for factor in _LEVELS]
        return min(tried, key=self._error), evidence

    def _error(self, weights: Matrix) -> float:
        """Squared error of left-out rows, those that are known better counting more."""
        dual, precision, _ = self.duals(weights)
        return float(((dual / precision) ** 2 @ self.variance) @ (1.0 / (1.0 + self.noise[0])))

    def _densities(self, weights: Matrix) -> NDArray[np.float64]:
        """Log density of each row given the others, but for a constant, ``(n,)``.

        Of Student's t: some perturbations are much stronger than others, and one of them would outweigh all others in a Gaussian.
        """
        dual, precision, _ = self.duals(weights)
        distance = (dual**2 / precision).sum(1)
        return 0.5 * (np.log(precision).sum(1) - (_FREEDOM + dual.shape[1]) * np.log1p(distance / _FREEDOM))


def fit_kernels(
    features: NDArray,
    effects: NDArray,
    blocks: Sequence[slice | NDArray] | None = None,
    *,
    own: Sequence[NDArray] = (),
    noise: NDArray | None = None,
    unit: NDArray | None = None,
) -> KernelFit:
    """Predict effects from features as far as the measured perturbations support it.

    Parameters
    ----------
    features
        ``(n, n_features)``; a block that is all 0 is missing and taken as average.
    effects
        ``(n, n_genes)``.
    blocks
        Columns that belong together (gene sets, an embedding, effects in another context): one kernel each. By default all
        columns.
    own
        For each block whose columns are genes, the gene of each of its columns (-1: not among those of `effects`). Effects
        then have a part that is in proportion to the gene's own value there.
    noise
        Variance of the measured effects in units of that of one cell, ``(n,)``; by default 0.
    unit
        Sd of each gene in one cell, ``(n_genes,)``; by default 1.
    """
    n, n_genes = effects.shape
    features = np.asarray(features, dtype=np.float64)
    blocks = [slice(0, features.shape[1])] if blocks is None else blocks
    noise = np.zeros(n) if noise is None else np.asarray(noise, dtype=np.float64)
    unit = np.ones(n_genes) if unit is None else unit
    level = max(float(effects.var(0).mean() - (noise[:, None] * unit**2).mean()), 1e-12)
    row_weight = 1.0 / (noise * float((unit**2).mean()) + level)
    row_weight /= row_weight.sum()
    mean = row_weight @ effects
    others = (mean - row_weight[:, None] * effects) / np.maximum(1.0 - row_weight, 1e-12)[:, None]
    others = others if n > 1 else effects
    scaler, slopes = _Blocks(features, blocks), np.zeros((features.shape[1], n_genes))
    found, chosen = None, None
    if n >= _MIN_PERTURBATIONS and features.shape[1]:
        kernels = np.stack([z[:, block] @ z[:, block].T for block, z in scaler])
        found = _fit(kernels, effects - mean, noise, unit)
        places = scaler.places(own)
        if places:
            x = np.zeros((n, n_genes, len(places)))
            for i, (columns, genes) in enumerate(places):
                x[:, genes, i] = scaler.scaled[:, columns]
            found, chosen, amplitudes = _with_amplitudes(found, x, kernels, effects, mean, row_weight, noise, unit)
            for i, (columns, genes) in enumerate(places):
                slopes[columns, genes] = amplitudes[genes, i]
    if found is None or (chosen is None and not found.share.any()):
        if features.shape[1]:
            logger.info("The features do not predict left-out perturbations: unseen ones have the mean effect.")
        share = np.zeros(len(blocks))
        return KernelFit(
            mean, others, _sd(effects - others, noise, unit), share, 0.0, 0.0, 0.0, None, scaler, slopes, None
        )
    left_out, share = found.left_out + mean, found.share.copy()
    deviation, wanted = left_out - others, effects - others
    believed = float(np.clip((deviation * wanted).sum() / max((deviation**2).sum(), 1e-300), 0.0, 1.0))
    if chosen is not None:  # the amplitudes explain, too; they belong to the blocks that they are of
        explained = 1.0 - ((effects - left_out) ** 2).sum() / max((wanted**2).sum(), 1e-300)
        rows = [i for i, genes in enumerate(own) if (np.asarray(genes) >= 0).any()]
        share[rows] = np.maximum(share[rows], max(explained - share.sum(), 0.0) / len(rows))
        share /= max(1.0, share.sum())
    gain = float((correlations(left_out, effects) - correlations(others, effects)).mean())
    return KernelFit(
        mean + found.mean, left_out, found.sd, share, found.evidence, gain, believed, chosen, scaler, slopes, found
    )


def _fit(kernels: Matrix, y: Matrix, noise: NDArray, unit: NDArray, weights: Matrix | None = None) -> _Fit:
    """Gaussian processes of the principal components of centered effects; weights are chosen unless they are given."""
    n = len(y)
    _, values, axes = np.linalg.svd(y, full_matrices=False)
    axes = axes[: max(1, min(_MAX_COMPONENTS, n // _ROWS_PER_COMPONENT))]
    axes = axes[values[: len(axes)] > 1e-6 * values[0] + 1e-300]
    scores, noise_unit = y @ axes.T, axes**2 @ unit**2
    process, evidence = _Process(kernels, scores, noise, noise_unit), 0.0
    if weights is None and n > _MAX_CHOOSING:
        part = np.sort(np.random.default_rng(0).permutation(n)[:_MAX_CHOOSING])
        weights, evidence = _Process(kernels[:, part][..., part], scores[part], noise[part], noise_unit).choose()
    elif weights is None or len(weights) != len(process.groups):
        weights, evidence = process.choose()
    root, of_component = np.sqrt(process.variance), weights[process.group_of]
    dual, precision, groups = process.duals(weights)
    share = process.variance @ of_component
    # the axes were fitted to these rows: new ones have more outside of them
    outside = ((y - scores @ axes) ** 2).sum(0) / max(n - 1 - len(axes), 1)
    outside = np.maximum(outside - noise.mean() * (1.0 - (axes**2).sum(0)) * unit**2, 0.0)
    of_noise = np.stack(process.noise, 1)[:, process.group_of]
    ahead = np.maximum(1.0 / precision - of_noise, 0.0)
    # what left-out perturbations are off by, where that is more than the process expects
    off = ((dual / precision) ** 2 - of_noise).mean(0) @ process.variance
    variance = process.variance * max(1.0, off / max(ahead.mean(0) @ process.variance, 1e-300))
    return _Fit(
        weights,
        share[:-1] / max(share.sum(), 1e-300),
        np.stack([(kernel_weight * dual * root) @ axes for kernel_weight in of_component[:, :-1].T]),
        _MEAN_VARIANCE * (dual * root).sum(0) @ axes,
        ((process.y - dual / precision) * root) @ axes,
        np.sqrt((ahead.mean(0) * variance) @ axes**2 + outside),
        evidence,
        axes,
        variance,
        groups,
        outside,
    )


def _sd(error: Matrix, noise: NDArray, unit: NDArray) -> NDArray[np.float64]:
    """Root mean square of errors beyond their noise."""
    return np.sqrt(np.maximum((error**2).mean(0) - noise.mean() * unit**2, 1e-3 * (error**2).mean(0)))


def _with_amplitudes(
    plain: _Fit,
    x: Matrix,
    kernels: Matrix,
    effects: Matrix,
    mean: NDArray,
    row_weight: NDArray,
    noise: NDArray,
    unit: NDArray,
) -> tuple[_Fit, float | None, Matrix]:
    """Fit with or without amplitudes, whichever predicts left-out rows better; strength of their prior (`None`: without), amplitudes."""
    y = effects - mean

    def fit(strength: float, weights: Matrix | None) -> tuple[_Fit, float, Matrix]:
        own = _slopes(x, y, strength, row_weight)
        found = _fit(kernels, y - (x * own).sum(-1), noise, unit, weights)
        found.left_out += (x * _slopes(x, y, strength, row_weight, left_out=True)).sum(-1)
        return found, strength, own

    def score(each: tuple) -> float:
        # strong perturbations would decide a squared error
        return float(row_weight @ correlations(each[0].left_out + mean, effects))

    # the kernels' weights are chosen anew for the best of them alone
    _, strength, _ = max((fit(strength, plain.weights) for strength in _STRENGTHS), key=score)
    return max((plain, None, np.zeros(x.shape[1:])), fit(strength, None), key=score)


def _slopes(x: Matrix, y: Matrix, strength: float, row_weight: NDArray, *, left_out: bool = False) -> Matrix:
    """One slope per gene and signature, shrunk to one for all genes.

    Returns
    -------
    ``(n_genes, n_signatures)``, or with `left_out` one table per row, fitted without it.
    """
    n_genes, n_signatures = x.shape[1:]
    eye, weighted = np.eye(n_signatures), x * row_weight[:, None, None]
    gram, cross = np.einsum("ngi,ngj->gij", weighted, x), np.einsum("ngi,ng->gi", weighted, y)
    if left_out:
        gram = gram - weighted[..., None] * x[..., None, :]
        cross = cross - weighted * y[..., None]
    total = gram.sum(-3)
    level = np.trace(total, axis1=-2, axis2=-1)[..., None, None] / n_signatures
    common = np.linalg.solve(total + (1e-9 * level + 1e-12) * eye, cross.sum(-2)[..., None])[..., None, :, :]
    ridge = (strength * level / n_genes + 1e-12)[..., None, :, :] * eye
    rest = cross[..., None] - gram @ common
    return (common + np.linalg.solve(gram + ridge, rest))[..., 0]
