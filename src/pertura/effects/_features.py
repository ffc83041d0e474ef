"""Effects of perturbations from their features, in closed form, as far as left-out perturbations support it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pertura.data._constants import UNKNOWN

from ._contexts import Asked

_PENALTIES = tuple(np.logspace(-2.0, 2.0, 9))
_MIXTURES = 12
# Prior strength of "a gene's slopes are those of all genes", in units of what an average gene's perturbations tell.
_STRENGTHS = (0.1, 0.3, 1.0, 3.0, 1e6)


@dataclass
class FeatureRidge:
    """Ridge regression of effects on blocks of features, shrunk towards the mean effect.

    Attributes
    ----------
    weight, intercept
        ``features @ weight + intercept`` is the effect; ``(n_features, n_genes)`` and ``(n_genes,)``.
    left_out
        Effect of each perturbation as predicted from all others, ``(n, n_genes)``.
    gain
        Mean Pearson correlation of left-out effects, over that of the mean effect. 0: the mean effect is all there is.
    penalty, mixture, share
        What was chosen: ridge penalty (infinite: the mean effect), weights of the blocks, part of the deviation from the mean
        effect that is believed.
    strength
        What was chosen for the part in proportion to a gene's own value in the signatures: prior strength of one slope for all
        genes; `None`: there is no such part.
    """

    weight: NDArray[np.float64]
    intercept: NDArray[np.float64]
    left_out: NDArray[np.float64]
    gain: float
    penalty: float
    mixture: tuple[float, ...]
    share: float
    strength: float | None = None


def correlations(first: NDArray, second: NDArray) -> NDArray[np.float64]:
    """Pearson correlation of the rows of two matrices; 0 where a row is constant."""
    a, b = (v - v.mean(1, keepdims=True) for v in (first, second))
    scale = np.sqrt((a**2).sum(1) * (b**2).sum(1))
    return np.divide((a * b).sum(1), scale, out=np.zeros(len(a)), where=scale > 1e-12)


class _LeaveOneOut:
    """Predictions of each row from the others, intercept included, by the hat matrix of kernel ridge.

    Parameters
    ----------
    kernel
        ``(n, n)``, of centered features.
    penalty
        Of the ridge.
    target
        ``(n, n_genes)``.
    x
        Values that slopes gene by gene multiply, ``(n, n_genes, n_signatures)``; ridge is on what they leave.
    """

    def __init__(self, kernel: NDArray, penalty: float, target: NDArray, x: NDArray | None = None) -> None:
        n = len(target)
        hat = kernel @ np.linalg.inv(kernel + penalty * np.eye(n))
        self.smoother = hat + (1.0 - hat.sum(1, keepdims=True)) / n
        self.leverage = np.minimum(np.diag(self.smoother), 1.0 - 1e-6)[:, None]
        self.plain = self._without_own(target)
        self.x = x
        if x is not None:
            self.smooth_x = np.stack([self._without_own(x[..., i]) for i in range(x.shape[-1])], -1)

    def _without_own(self, values: NDArray) -> NDArray[np.float64]:
        return (self.smoother @ values - self.leverage * values) / (1.0 - self.leverage)

    def __call__(self, slopes: NDArray | None = None) -> NDArray[np.float64]:
        """Predictions with slopes ``(n, n_genes, n_signatures)``, each row's fitted without the row."""
        if slopes is None:
            return self.plain
        # linear in the target: what is left to ridge when row i is out is target - x * slopes[i]
        return self.plain + ((self.x - self.smooth_x) * slopes).sum(-1)


def fit_features(
    features: NDArray,
    effects: NDArray,
    blocks: Sequence[slice] | None = None,
    *,
    own: Sequence[NDArray] = (),
    seed: int = 0,
) -> FeatureRidge:
    """Choose penalty and weights of the blocks by leaving perturbations out, one at a time.

    Parameters
    ----------
    features
        ``(n, n_features)``; a block that is all 0 is missing and taken as average.
    effects
        ``(n, n_genes)``.
    blocks
        Columns that belong together (text, a signature); each is scaled as a whole. By default all columns.
    own
        For each block that is a signature, the gene of each of its columns (-1: not among the model's). Effects then have
        a part that is in proportion to the gene's own value in the signature.
    seed
        Of the weights that are tried where there are several blocks.
    """
    n, n_genes = effects.shape
    features = np.asarray(features, dtype=np.float64)
    blocks = [slice(0, features.shape[1])] if blocks is None else blocks
    mean = effects.mean(0)
    if n < 5 or not features.shape[1]:
        return FeatureRidge(
            np.zeros((features.shape[1], n_genes)), mean, _means(effects), 0.0, np.inf, (0.0,) * len(blocks), 0.0
        )
    center, scaled, scale = np.zeros(features.shape[1]), np.zeros_like(features), np.ones(features.shape[1])
    for block in blocks:
        part = features[:, block]
        known = (part != 0).any(1)
        if not known.any():
            continue
        center[block] = part[known].mean(0)
        part = (part - center[block]) * known[:, None]
        scale[block] = np.sqrt((part**2).sum() / n) + 1e-12
        scaled[:, block] = part / scale[block]
    kernels = [scaled[:, block] @ scaled[:, block].T for block in blocks]
    baseline = correlations(_means(effects), effects)
    x = _own_values(scaled, n_genes, blocks, own)
    # with and without a part gene by gene: left-out perturbations decide
    slopes: dict[float | None, NDArray | None] = {None: None}
    if x is not None:
        slopes |= {s: _slopes(x, effects, s, left_out=True) for s in _STRENGTHS}
    best: tuple | None = None
    for mixture in _mixtures(len(blocks), seed):
        kernel = sum(w * k for w, k in zip(mixture, kernels, strict=True))
        for penalty in _PENALTIES:
            leave_out = _LeaveOneOut(kernel, penalty, effects, x)
            for strength, slope in slopes.items():
                predicted = leave_out(slope)
                score = correlations(predicted, effects)
                if best is None or score.mean() > best[0].mean():
                    best = (score, mixture, penalty, predicted, strength)
    score, mixture, penalty, predicted, strength = best
    gain = score - baseline
    # what is not clearly better than the mean effect is not believed
    if gain.mean() <= gain.std(ddof=1) / np.sqrt(n):
        zero = np.zeros((features.shape[1], n_genes))
        return FeatureRidge(zero, mean, _means(effects), 0.0, np.inf, mixture, 0.0)
    others = _means(effects)
    deviation, wanted = predicted - others, effects - others
    share = float(np.clip((deviation * wanted).sum() / max((deviation**2).sum(), 1e-12), 0.0, 1.0))
    root = np.zeros(features.shape[1])
    for w, block in zip(mixture, blocks, strict=True):
        root[block] = np.sqrt(w)
    phi = scaled * root
    start = np.zeros((scaled.shape[1], n_genes))
    if strength is not None:
        for i, (columns, genes) in enumerate(_signatures(blocks, own)):
            start[columns, genes] = _slopes(x, effects, strength)[genes, i]
    rest = effects - scaled @ start
    dual = np.linalg.solve(phi @ phi.T + penalty * np.eye(n), rest - rest.mean(0))
    weight = share * ((phi * root).T @ dual + start) / scale[:, None]
    intercept = mean - center @ weight
    return FeatureRidge(
        weight, intercept, others + share * deviation, float(gain.mean()), penalty, mixture, share, strength
    )


def _means(effects: NDArray) -> NDArray[np.float64]:
    """Mean of all other rows."""
    n = len(effects)
    return (effects.sum(0) - effects) / max(n - 1, 1) if n > 1 else effects.copy()


def _mixtures(n_blocks: int, seed: int) -> list[tuple[float, ...]]:
    if n_blocks == 1:
        return [(1.0,)]
    drawn = np.random.default_rng(seed).dirichlet(np.ones(n_blocks), _MIXTURES)
    return [tuple(w) for w in np.concatenate([np.eye(n_blocks), np.full((1, n_blocks), 1 / n_blocks), drawn])]


def _signatures(blocks: Sequence[slice], own: Sequence[NDArray]) -> list[tuple[NDArray, NDArray]]:
    """Columns of each signature and their genes."""
    result = []
    for block, genes in zip(blocks, own, strict=False):
        columns = np.arange(block.start, block.stop)
        found = np.asarray(genes) >= 0
        if found.any():
            result.append((columns[found], np.asarray(genes)[found]))
    return result


def _own_values(
    scaled: NDArray, n_genes: int, blocks: Sequence[slice], own: Sequence[NDArray]
) -> NDArray[np.float64] | None:
    """Each gene's own value in each signature, ``(n, n_genes, n_signatures)``."""
    signatures = _signatures(blocks, own)
    if not signatures:
        return None
    x = np.zeros((len(scaled), n_genes, len(signatures)))
    for i, (columns, genes) in enumerate(signatures):
        x[:, genes, i] = scaled[:, columns]
    return x


def _slopes(x: NDArray, target: NDArray, strength: float, *, left_out: bool = False) -> NDArray[np.float64]:
    """One slope per gene and signature, shrunk to one for all genes.

    Returns
    -------
    ``(n_genes, n_signatures)``, or with `left_out` one table per row, fitted without it.
    """
    n, n_genes, n_signatures = x.shape
    eye = np.eye(n_signatures)
    y = target - target.mean(0)
    gram, cross = np.einsum("ngi,ngj->gij", x, x), np.einsum("ngi,ng->gi", x, y)
    if left_out:
        others = _means(target) - target.mean(0)
        gram = gram - x[..., None] * x[..., None, :]
        cross = cross - x * y[..., None] - (x.sum(0) - x) * others[..., None]
    total = gram.sum(-3)
    level = np.trace(total, axis1=-2, axis2=-1)[..., None, None] / n_signatures
    common = np.linalg.solve(total + (1e-9 * level + 1e-12) * eye, cross.sum(-2)[..., None])[..., None, :, :]
    ridge = (strength * level / n_genes + 1e-12)[..., None, :, :] * eye
    rest = cross[..., None] - gram @ common
    return (common + np.linalg.solve(gram + ridge, rest))[..., 0]


# -- features of measured and of asked perturbations --------------------------------------------------------------------


def member_features(asked: Asked, known: NDArray) -> NDArray | None:
    """Features of the members, ``(n_members, n_features)``; `None` where one has none.

    Parameters
    ----------
    asked
        Perturbation.
    known
        Features of the vocabulary's perturbations, ``(n_perturbations, n_features)``.
    """
    if not known.shape[1]:
        return None
    features = known[np.maximum(asked.codes, 0)]
    if asked.features is not None:
        features = np.where((asked.codes == UNKNOWN)[:, None], asked.features, features)
    elif (asked.codes == UNKNOWN).any():
        return None
    return features if features.any(axis=1).all() else None


def label_features(
    codes: NDArray[np.int64], known: NDArray, amount: NDArray | float = 1.0
) -> tuple[NDArray, NDArray[np.bool_]]:
    """Sums of the members' features, each times its amount, for rows of codes, and whether all members have some."""
    present = codes >= 0
    features = known[np.maximum(codes, 0)]
    described = known.any(axis=1)[np.maximum(codes, 0)] & bool(known.shape[1])
    return np.einsum("nm,nmf->nf", amount * present, features), (described | ~present).all(1)


def cosine(vectors: NDArray, one: NDArray) -> NDArray:
    """Cosine of each row with a vector; 0 where one of them is 0."""
    norm = np.linalg.norm(vectors, axis=1) * np.linalg.norm(one)
    return vectors @ one / np.maximum(norm, 1e-12)


def linear_slope(
    features: NDArray, described: NDArray[np.bool_], context: NDArray[np.int64], ridge: float
) -> NDArray[np.float64]:
    r"""P (P^T P + ridge)^-1 of each context, ``(n_conditions, n_features)``; 0 for conditions without features.

    Parameters
    ----------
    features
        P of each condition, ``(n_conditions, n_features)``.
    described
        Whether a condition has features, ``(n_conditions,)``.
    context
        Its context, ``(n_conditions,)``.
    ridge
        Penalty.
    """
    slope = np.zeros_like(features)
    for code in np.unique(context[described]):
        own = np.flatnonzero(described & (context == code))
        x = features[own]
        if len(own) < x.shape[1]:
            slope[own] = np.linalg.solve(x @ x.T + ridge * np.eye(len(own)), x)
        else:
            slope[own] = np.linalg.solve(x.T @ x + ridge * np.eye(x.shape[1]), x.T).T
    return slope
