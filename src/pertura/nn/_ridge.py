"""Effects of perturbations from their descriptions, in closed form, as far as left-out perturbations bear it out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_PENALTIES = tuple(np.logspace(-2.0, 2.0, 9))
_MIXTURES = 12


@dataclass
class DescriptionRidge:
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
    """

    weight: NDArray[np.float64]
    intercept: NDArray[np.float64]
    left_out: NDArray[np.float64]
    gain: float
    penalty: float
    mixture: tuple[float, ...]
    share: float


def correlations(first: NDArray, second: NDArray) -> NDArray[np.float64]:
    """Pearson correlation of the rows of two matrices; 0 where a row is constant."""
    a, b = (v - v.mean(1, keepdims=True) for v in (first, second))
    scale = np.sqrt((a**2).sum(1) * (b**2).sum(1))
    return np.divide((a * b).sum(1), scale, out=np.zeros(len(a)), where=scale > 1e-12)


def _left_out(kernel: NDArray, target: NDArray, penalty: float) -> NDArray[np.float64]:
    """Prediction of each row from the others, intercept included, by the hat matrix."""
    n = len(target)
    mean = target.mean(0)
    hat = kernel @ np.linalg.inv(kernel + penalty * np.eye(n))
    fitted = mean + hat @ (target - mean)
    leverage = np.minimum(np.diag(hat) + 1.0 / n, 1.0 - 1e-6)[:, None]
    return (fitted - leverage * target) / (1.0 - leverage)


def fit_descriptions(
    features: NDArray, effects: NDArray, blocks: Sequence[slice], *, own: Sequence[NDArray] = (), seed: int = 0
) -> DescriptionRidge:
    """Choose penalty and weights of the blocks by leaving perturbations out, one at a time.

    Parameters
    ----------
    features
        ``(n, n_features)``; a block that is all 0 is missing and taken as average.
    effects
        ``(n, n_genes)``.
    blocks
        Columns that belong together (text, a signature); each is scaled as a whole.
    own
        For each block that is a signature, the gene of each of its columns (-1: not among the model's). Effects then have
        a part that is in proportion to the gene's own value in the signature.
    seed
        Of the weights that are tried where there are several blocks.
    """
    n, n_genes = effects.shape
    features = np.asarray(features, dtype=np.float64)
    mean = effects.mean(0)
    if n < 5 or not features.shape[1]:
        return DescriptionRidge(
            np.zeros((features.shape[1], n_genes)), mean, _means(effects), 0.0, np.inf, (0.0,) * len(blocks), 0.0
        )
    centre, scaled, scale = np.zeros(features.shape[1]), np.zeros_like(features), np.ones(features.shape[1])
    for block in blocks:
        part = features[:, block]
        known = (part != 0).any(1)
        if not known.any():
            continue
        centre[block] = part[known].mean(0)
        part = (part - centre[block]) * known[:, None]
        scale[block] = np.sqrt((part**2).sum() / n) + 1e-12
        scaled[:, block] = part / scale[block]
    direct = _proportional(scaled, effects - mean, blocks, own)
    kernels = [scaled[:, block] @ scaled[:, block].T for block in blocks]
    baseline = correlations(_means(effects), effects)
    best: tuple[float, ...] | None = None
    for start in (np.zeros_like(direct), direct) if direct.any() else (direct,):
        # that of the left-out row must not depend on the row itself
        proportional = _left_out_proportional(scaled, effects, blocks, own) if start.any() else np.zeros_like(effects)
        rest = effects - scaled @ start
        for mixture in _mixtures(len(blocks), seed):
            kernel = sum(w * k for w, k in zip(mixture, kernels, strict=True))
            for penalty in _PENALTIES:
                predicted = _left_out(kernel, rest, penalty) + proportional
                score = correlations(predicted, effects)
                if best is None or score.mean() > best[0].mean():
                    best = (score, mixture, penalty, predicted, start)
    score, mixture, penalty, predicted, start = best
    gain = score - baseline
    # what is not clearly better than the mean effect is not believed
    if gain.mean() <= gain.std(ddof=1) / np.sqrt(n):
        zero = np.zeros((features.shape[1], n_genes))
        return DescriptionRidge(zero, mean, _means(effects), 0.0, np.inf, mixture, 0.0)
    others = _means(effects)
    deviation, wanted = predicted - others, effects - others
    share = float(np.clip((deviation * wanted).sum() / max((deviation**2).sum(), 1e-12), 0.0, 1.0))
    root = np.zeros(features.shape[1])
    for w, block in zip(mixture, blocks, strict=True):
        root[block] = np.sqrt(w)
    phi = scaled * root
    rest = effects - scaled @ start
    dual = np.linalg.solve(phi @ phi.T + penalty * np.eye(n), rest - rest.mean(0))
    weight = share * ((phi * root).T @ dual + start) / scale[:, None]
    intercept = mean - centre @ weight
    return DescriptionRidge(weight, intercept, others + share * deviation, float(gain.mean()), penalty, mixture, share)


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


def _proportional(scaled: NDArray, target: NDArray, blocks: Sequence[slice], own: Sequence[NDArray]) -> NDArray:
    """Weights, ``(n_features, n_genes)``, of each signature's own gene: one slope per gene, shrunk to one for all."""
    weight = np.zeros((scaled.shape[1], target.shape[1]))
    signatures = _signatures(blocks, own)
    if not signatures:
        return weight
    x = np.zeros((*target.shape, len(signatures)))
    for i, (columns, genes) in enumerate(signatures):
        x[:, genes, i] = scaled[:, columns]
    gram, cross = np.einsum("ngi,ngj->gij", x, x), np.einsum("ngi,ng->gi", x, target)
    total = gram.sum(0)
    common = np.linalg.solve(
        total + 1e-9 * np.trace(total) * np.eye(len(total)) + 1e-12 * np.eye(len(total)), cross.sum(0)
    )
    # a gene's slopes are worth as much as those of ten average genes' perturbations
    strength = 0.3 * np.trace(total) / len(total) / target.shape[1] + 1e-12
    slopes = common + np.linalg.solve(gram + strength * np.eye(len(total)), (cross - gram @ common)[..., None])[..., 0]
    for i, (columns, genes) in enumerate(signatures):
        weight[columns, genes] = slopes[genes, i]
    return weight


def _left_out_proportional(
    scaled: NDArray, effects: NDArray, blocks: Sequence[slice], own: Sequence[NDArray], n_parts: int = 10
) -> NDArray[np.float64]:
    """What the proportional part says of perturbations in parts that were left out."""
    result = np.zeros_like(effects)
    for part in np.array_split(np.random.default_rng(0).permutation(len(effects)), min(n_parts, len(effects))):
        rest = np.setdiff1d(np.arange(len(effects)), part)
        weight = _proportional(scaled[rest], effects[rest] - effects[rest].mean(0), blocks, own)
        result[part] = scaled[part] @ weight
    return result
