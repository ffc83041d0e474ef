r"""What is known of two genes as a prior on the edge between them: whether it exists and how large it is, not its sign.

The size of the weights of a fit without prior is regressed on features of the pairs,

.. math::

    \mathrm{E}|A_{ik}| \propto \exp(b^\top f_{ik}), \qquad A_{ik} \sim \mathrm{Laplace}(0, \sigma_a \exp(b^\top f_{ik})),

with f the similarity of the embeddings and, where edges are known, what a classifier of the other known edges says of the pair. The
coefficients of a pair come from pairs of other genes (cross-fitting), and are shrunk by their error over genes: features that have
nothing to do with the weights have no coefficient, and the prior is that of DeepSEM.

The posterior of an edge is that of two groups of sizes whose proportion depends on the features (Efron's local false discovery rate
with covariates), or, with known edges, of a classifier of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

_FOLDS, _MAX_PAIRS, _MIN_EDGES = 10, 100_000, 10
_DOUBT = 2.0  # standard errors below which a coefficient is not used at all
_RIDGE = 0.01  # inverse strength of the ridge penalty of the classifier, on standardized features
_LOWEST, _HIGHEST = 0.01, 0.9  # share of edges among the pairs that are least and most likely
_MIN_RATIO = 3.0  # edges are at least so much larger than other pairs
_MAX_LOG_SIZE = 4.0
_BINS = 20
_TIES = 0.05  # log-odds by which the largest weight is ahead of the smallest where sizes say nothing


@dataclass(frozen=True)
class Informed:
    """What :meth:`PairPrior.learn` found.

    Attributes
    ----------
    log_size
        Log of the prior sd of a weight in units of that of a pair of which nothing is known, ``(n_regulators, n_genes)``.
    log_odds
        Posterior log-odds of an edge, of the same shape.
    coefficients
        b, its standard error over genes, and the share of it that is kept, ``(n_features, 3)``.
    """

    log_size: Floats
    log_odds: Floats
    coefficients: Floats


@dataclass(frozen=True)
class PairPrior:
    """Features of the pairs of regulators and genes.

    Parameters
    ----------
    similarity
        Similarity of the embeddings, at least 0, ``(n_regulators, n_genes)``.
    embedding
        Whitened embeddings, ``(n_genes, n_dimensions)``: features of the classifier of known edges.
    regulators
        Positions of the regulators among the genes.
    known
        1 for known edges, -1 for pairs that are known to be none, 0 else; `None` for none.
    """

    similarity: Floats
    embedding: Floats
    regulators: NDArray[np.int64]
    known: NDArray[np.int8] | None = None

    @property
    def features(self) -> tuple[str, ...]:
        """Names of the features."""
        return ("similarity",) if self._labels is None else ("similarity", "known_edges")

    def learn(self, size: Floats, evidence: Floats | None = None) -> Informed:
        """Learn from the size of weights of a fit without prior.

        Pairs are judged by features and that size, and as far as features are not trusted by other evidence. All are
        ``(n_regulators, n_genes)``.
        """
        labels, values = self._labels, [self.similarity]
        if labels is not None:
            values.append(labels.worth * labels.of_pair)
        f = np.stack(values, -1)
        log_size, coefficients = self._size_of(size, f)
        trust, rank = float(coefficients[:, 2].max()), ranks(size)
        if evidence is not None:
            rank = ranks(trust * rank + (1 - trust) * ranks(evidence))
        log_odds = edge_log_odds(rank, log_size, trust)
        if labels is not None:
            log_odds = labels.posterior(rank, self.similarity)
        if self.known is not None:
            own = np.select([self.known > 0, self.known < 0], [np.log(0.95 / 0.05), np.log(0.05 / 0.95)])
            log_odds = log_odds + own
            log_size = log_size + np.select([self.known > 0, self.known < 0], [np.log(0.95 / 0.5), np.log(0.05 / 0.5)])
        log_size = np.clip(log_size, -_MAX_LOG_SIZE, _MAX_LOG_SIZE)
        return Informed(log_size.astype(np.float32), log_odds.astype(np.float32), coefficients.astype(np.float32))

    @cached_property
    def _labels(self) -> _Labels | None:
        return None if self.known is None else _Labels.learn(self)

    @cached_property
    def fold(self) -> NDArray[np.int64]:
        """Group of each gene."""
        return np.random.default_rng(0).permutation(len(self.embedding)) % _FOLDS

    def _size_of(self, size: Floats, f: Floats) -> tuple[Floats, Floats]:
        """Log size of pairs by coefficients from other genes, and the coefficients."""
        flat = np.arange(size.size)
        if size.size > _MAX_PAIRS:
            flat = np.random.default_rng(1).integers(size.size, size=_MAX_PAIRS)
        row, column = np.unravel_index(flat, size.shape)
        pair = self.regulators[row] != column
        row, column = row[pair], column[pair]
        y, x = size[row, column].astype(np.float64), f[row, column].astype(np.float64)
        source, target = self.fold[self.regulators[row]], self.fold[column]
        found = np.zeros((_FOLDS, _FOLDS, x.shape[1]))
        for a in range(_FOLDS):
            for b in range(a, _FOLDS):
                keep = (source != a) & (source != b) & (target != a) & (target != b)
                found[a, b] = found[b, a] = _gamma_regression(x[keep], y[keep])
        alone = found[np.arange(_FOLDS), np.arange(_FOLDS)]
        mean, error = alone.mean(0), np.sqrt((_FOLDS - 1) * alone.var(0))  # delete-a-group jackknife
        kept = np.maximum(0.0, 1 - (_DOUBT * error / np.where(mean == 0, 1.0, mean)) ** 2) * (mean != 0)
        of_pair = (found * kept)[self.fold[self.regulators]][:, self.fold]
        return (of_pair * f).sum(-1), np.stack([mean, error, kept], 1)


@dataclass(frozen=True)
class _Labels:
    """A classifier of known edges by the embeddings of their genes, and how far it holds for genes it was not trained on.

    Attributes
    ----------
    of_pair
        Its log-odds but for a constant, ``(n_regulators, n_genes)``.
    worth
        What they are to be multiplied with for other genes; 0 where the embeddings say nothing of them.
    row, column, label, unseen
        Labeled pairs, and their log-odds by classifiers that were trained without either of their genes.
    """

    of_pair: Floats
    worth: float
    row: NDArray[np.int64]
    column: NDArray[np.int64]
    label: NDArray[np.bool_]
    unseen: Floats

    @classmethod
    def learn(cls, prior: PairPrior) -> _Labels | None:
        """`None` where there are too few known edges to learn from."""
        row, column, label = _labeled(prior.known, prior.regulators)
        if not _both(label):
            return None
        h, s = prior.embedding, prior.similarity
        own, other = h[prior.regulators][row], h[column]
        x = np.concatenate([own, other, own * other, s[row, column, None]], 1)
        sd = np.maximum(x.std(0), 1e-6)
        x = ((x - x.mean(0)) / sd).astype(np.float32)
        source, target = prior.fold[prior.regulators[row]], prior.fold[column]
        unseen = np.full(len(row), np.nan, np.float32)
        for fold in range(_FOLDS):
            train, test = (source != fold) & (target != fold), (source == fold) & (target == fold)
            if test.any() and _both(label[train]):
                unseen[test] = _logistic(x[train], label[train], _RIDGE).decision_function(x[test])
        scored = np.isfinite(unseen)
        if not _both(label[scored]):
            return None
        a, b, c, d = np.split(
            _logistic(x, label, _RIDGE).coef_[0].astype(np.float32) / sd, h.shape[1] * np.arange(1, 4)
        )
        of_pair = (h[prior.regulators] @ a)[:, None] + h @ b + (h[prior.regulators] * c) @ h.T + d * s
        row, column, label, unseen = row[scored], column[scored], label[scored], unseen[scored]
        worth = max(float(_logistic(unseen[:, None], label, 1.0).coef_[0, 0]), 0.0)
        return cls(of_pair - of_pair[row, column].mean(), worth, row, column, label, unseen - unseen.mean())

    def posterior(self, rank: Floats, similarity: Floats) -> Floats:
        """Log-odds of all pairs by this, the similarity and the size of weights, weighted on pairs of held-out genes."""
        at = self.row, self.column
        fitted = _logistic(np.stack([self.unseen, similarity[at], rank[at]], 1), self.label, 1.0)
        a, b, c = fitted.coef_[0]
        return fitted.intercept_[0] + max(a, 0.0) * self.of_pair + b * similarity + (max(c, 0.0) + _TIES) * rank


def edge_log_odds(rank: Floats, log_size: Floats | float = 0.0, trust: float = 0.0) -> Floats:
    """Posterior log-odds: edges are as frequent as the expected size says, and differ in size from other pairs as it tells.

    The data do not determine how many edges there are: among the pairs whose expected size is least and largest the shares
    are set, which is the lowest share where there are no features. As far as features are not trusted, the ratio of the densities is one that only grows with the size.
    """
    expected = np.exp(log_size - np.min(log_size))
    span = max(np.quantile(expected, 0.999), _MIN_RATIO) - 1.0
    share = _LOWEST + (_HIGHEST - _LOWEST) * np.clip((expected - 1.0) / span, 0, 1)
    at = np.minimum((rank * _BINS).astype(int), _BINS - 1)
    grid = (np.arange(_BINS) + 0.5) / _BINS
    ratio = np.log(1 - np.log1p(-grid)) - 0.7  # of the default: a slow rise over the quantiles
    if trust > 0:
        # the share of a bin is linear in the share of edges: one density where it is 0, one where it is 1
        x = np.stack([1 - share.ravel(), share.ravel()], 1).astype(np.float64)
        of_bin = np.stack([np.bincount(at.ravel(), weights=c, minlength=_BINS) for c in x.T])
        density = np.clip(np.linalg.lstsq(x.T @ x, of_bin, rcond=None)[0], 0.1 / _BINS, None)
        density /= density.sum(1, keepdims=True)
        ratio = (1 - trust) * ratio + trust * _increasing(np.log(density[1] / density[0]))
    # straight on to the ends: the largest weights are not alike
    ends = 1.5 * ratio[[0, -1]] - 0.5 * ratio[[1, -2]]
    ratio = np.interp(rank, np.r_[0, grid, 1], np.r_[ends[0], ratio, ends[1]])
    return np.log(share / (1 - share)) + ratio + _TIES * rank


def _gamma_regression(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    """Coefficients of log E y, by Fisher scoring, whose information does not change; sizes of 0 are allowed."""
    if len(x) < 10 * x.shape[1] or not y.any():
        return np.zeros(x.shape[1])
    design = np.c_[np.ones(len(x)), x]
    information = design.T @ design + 1e-6 * len(x) * np.eye(design.shape[1])
    beta, y = np.zeros(design.shape[1]), y / y.mean()
    for _ in range(100):
        step = np.linalg.solve(information, design.T @ (y * np.exp(-design @ beta) - 1))
        beta = beta + np.clip(step, -1.0, 1.0)
        if np.abs(step).max() < 1e-6:
            break
    return beta[1:]


def _labeled(
    known: NDArray[np.int8], regulators: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
    """Labeled pairs. Without pairs that are known to be none, those of regulators and genes with an edge count as such."""
    use = known != 0
    if not (known < 0).any():
        genes = (known > 0).any(0)
        genes[regulators[(known > 0).any(1)]] = True
        use = use | ((known > 0).any(1)[:, None] & genes)
    use &= regulators[:, None] != np.arange(known.shape[1])
    row, column = np.nonzero(use)
    some = np.random.default_rng(2).permutation(len(row))[:_MAX_PAIRS]
    row, column = row[some], column[some]
    return row, column, known[row, column] > 0


def ranks(size: Floats) -> Floats:
    """Ranks from 0 to 1."""
    order = np.argsort(size, axis=None, kind="stable")
    rank = np.empty(size.size, np.float32)
    rank[order] = (np.arange(size.size, dtype=np.float32) + 0.5) / size.size
    return rank.reshape(size.shape)


def _both(label: NDArray[np.bool_]) -> bool:
    """Whether there are enough edges and enough other pairs."""
    return min(label.sum(), (~label).sum()) >= _MIN_EDGES


def _increasing(values: Floats) -> Floats:
    from sklearn.isotonic import IsotonicRegression

    return IsotonicRegression().fit_transform(np.arange(len(values)), values)


def _logistic(x: Floats, label: NDArray[np.bool_], c: float):
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(C=c, max_iter=500).fit(x, label)
