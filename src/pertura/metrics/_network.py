r"""Scores of an inferred gene regulatory network against known edges.

The candidate set is BEELINE's: every pair (regulator of the known network) x (gene of the known network,
regulators and targets alike), without self loops; all pairs that are not known edges count as negative. Known
edges whose genes the inferred network does not contain are dropped first. Pairs are ranked by \|weight\|,
pairs without a weight come last with score 0. Equal scores are never ordered by position: a constant score
gets the density, not luck.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from sklearn.metrics import average_precision_score, roc_auc_score

from ._arrays import Floats, top_weights
from ._registry import register

Network = Any
"""Edge table (source, target, weight), or matrix of weights [source, target] with gene names."""


@dataclass(frozen=True)
class EdgeCandidates:
    """Candidate pairs with their label and score.

    Parameters
    ----------
    label
        ``(pairs,)``, true for known edges.
    score
        ``(pairs,)``, larger is more confident.
    source
        ``(pairs,)`` regulator of each pair; needed for :func:`macro_auprc` only.
    """

    label: NDArray[np.bool_]
    score: Floats
    source: NDArray[Any] | None = None

    def __post_init__(self) -> None:
        """Convert and check."""
        label, score = np.asarray(self.label, dtype=bool), np.asarray(self.score, dtype=np.float64)
        if label.ndim != 1 or label.shape != score.shape:
            raise ValueError(f"`label` {label.shape} and `score` {score.shape} must be vectors of equal length.")
        if not np.isfinite(score).all():
            raise ValueError(f"`score` has {int((~np.isfinite(score)).sum())} missing or infinite values.")
        if self.source is not None and np.shape(self.source) != label.shape:
            raise ValueError(f"`source` {np.shape(self.source)} must be as long as `label` {label.shape}.")
        object.__setattr__(self, "label", label)
        object.__setattr__(self, "score", score)

    @property
    def density(self) -> float:
        """Share of known edges among the candidates: the precision of a random ranking."""
        return float(self.label.mean()) if self.label.size else float("nan")


def _columns(table: pd.DataFrame, name: str, needed: Sequence[str]) -> None:
    missing = [c for c in needed if c not in table.columns]
    if missing:
        raise ValueError(f"`{name}` lacks the column(s) {missing}; it has {list(table.columns)[:10]}.")


def _truth_table(truth: Any) -> pd.DataFrame:
    if isinstance(truth, pd.DataFrame):
        _columns(truth, "truth", ("source", "target"))
        table = truth[["source", "target"]]
    else:
        pairs = list(truth)
        if any(len(pair) != 2 for pair in pairs):
            raise ValueError("`truth` must be a table with columns source, target, or pairs (source, target).")
        table = pd.DataFrame(pairs, columns=["source", "target"])
    table = table.astype(str)
    return table[table["source"] != table["target"]].drop_duplicates()


def _is_table(scores: Any) -> bool:
    return isinstance(scores, pd.DataFrame) and {"source", "target"} <= set(scores.columns)


def edge_candidates(
    scores: Network,
    truth: pd.DataFrame | Iterable[tuple[str, str]],
    *,
    genes: Sequence[str] | None = None,
    regulators: Sequence[str] | None = None,
    targets: Sequence[str] | None = None,
    absolute: bool = True,
) -> EdgeCandidates:
    r"""Candidate pairs of a known network with the scores an inferred network gives them.

    Parameters
    ----------
    scores
        Edge table with columns ``source, target, weight`` (pairs that are not listed have weight 0), or a
        matrix ``[source, target]``: a DataFrame named on both axes, or an array ``(genes, genes)`` with
        `genes`.
    truth
        Known edges: table with columns ``source, target`` or pairs. Self loops and repeats are dropped.
    genes
        Names of a matrix' rows and columns. With an edge table: the genes the method was given; known edges
        outside them are dropped (default: none is).
    regulators, targets
        Candidate sources and targets; default those of the known network that the inferred one contains.
    absolute
        Rank by \|weight\|. With ``False``, by the weight, e.g. a probability.

    Raises
    ------
    ValueError
        If no known edge is left, names are repeated, or an argument does not fit.
    """
    known = _truth_table(truth)
    if _is_table(scores):
        _columns(scores, "scores", ("weight",))
        table = scores[["source", "target", "weight"]].astype({"source": str, "target": str})
        if table.duplicated(["source", "target"]).any():
            raise ValueError("`scores` lists some edges twice; aggregate them first, e.g. by their largest weight.")
        rows = cols = None if genes is None else pd.Index(genes).astype(str)
    else:
        if isinstance(scores, pd.DataFrame):
            rows, cols, values = (
                scores.index.astype(str),
                scores.columns.astype(str),
                scores.to_numpy(np.float64),
            )
        else:
            values = np.asarray(scores.todense() if hasattr(scores, "todense") else scores, dtype=np.float64)
            if genes is None or values.shape != (len(genes), len(genes)):
                raise ValueError(
                    f"`scores` is an array of shape {values.shape}; pass `genes`, the names of its rows and columns."
                )
            rows = cols = pd.Index(genes).astype(str)
        if not (rows.is_unique and cols.is_unique):
            raise ValueError("`scores`: gene names are repeated; make them unique.")
    if rows is not None:
        known = known[known["source"].isin(rows) & known["target"].isin(cols)]
    sources = pd.Index(known["source"].unique() if regulators is None else regulators).astype(str).unique()
    everyone = pd.Index(pd.unique(known[["source", "target"]].to_numpy().ravel()))
    if cols is not None:
        everyone = everyone[everyone.isin(cols)]
    sinks = (everyone if targets is None else pd.Index(targets)).astype(str).unique()
    label = _matrix(known, sources, sinks, None) > 0
    if not label.any():
        raise ValueError(
            "`truth`: no known edge is left among the genes of `scores`; check names and upper/lower case."
        )
    if _is_table(scores):
        score = _matrix(table, sources, sinks, table["weight"].to_numpy(np.float64))
    else:
        absent = [g for g in sources if g not in rows] + [g for g in sinks if g not in cols]
        if absent:
            raise ValueError(f"`regulators`/`targets` name {len(absent)} genes that `scores` lacks, e.g. {absent[:5]}.")
        score = values[np.ix_(rows.get_indexer(sources), cols.get_indexer(sinks))]
    keep = sources.to_numpy()[:, None] != sinks.to_numpy()[None, :]
    source = np.broadcast_to(sources.to_numpy()[:, None], keep.shape)
    return EdgeCandidates(label[keep], (np.abs(score) if absolute else score)[keep], source[keep])


def _matrix(table: pd.DataFrame, rows: pd.Index, cols: pd.Index, weights: Floats | None) -> Floats:
    """Dense (rows, cols) matrix of the edges of a table."""
    i, j = rows.get_indexer(table["source"]), cols.get_indexer(table["target"])
    inside = (i >= 0) & (j >= 0)
    out = np.zeros((len(rows), len(cols)))
    out[i[inside], j[inside]] = 1.0 if weights is None else weights[inside]
    return out


def _resolve(scores: Network | EdgeCandidates, truth: Any, kwargs: dict[str, Any]) -> EdgeCandidates:
    if isinstance(scores, EdgeCandidates):
        if truth is not None or kwargs:
            raise ValueError("`truth` and its options are already part of EdgeCandidates; leave them out.")
        found = scores
    elif truth is None:
        raise ValueError("`truth` is missing: pass the known edges, or EdgeCandidates as `scores`.")
    else:
        found = edge_candidates(scores, truth, **kwargs)
    if not found.label.any():
        raise ValueError("`truth` holds no known edge among the candidates; the score is not defined.")
    return found


@register(best_value=1.0, higher_is_better=True, needs="network")
def auprc(scores: Network | EdgeCandidates, truth: Any = None, **kwargs: Any) -> float:
    """Area under the precision-recall curve (average precision), a block of equal scores being one step.

    Parameters
    ----------
    scores, truth, **kwargs
        See :func:`edge_candidates`; or :class:`EdgeCandidates` alone.
    """
    c = _resolve(scores, truth, kwargs)
    return float(average_precision_score(c.label, c.score))


@register(best_value=None, higher_is_better=True, needs="network")
def auprc_ratio(scores: Network | EdgeCandidates, truth: Any = None, **kwargs: Any) -> float:
    """AUPRC divided by the density, the value of a random or constant ranking.

    Parameters
    ----------
    scores, truth, **kwargs
        See :func:`edge_candidates`; or :class:`EdgeCandidates` alone.
    """
    c = _resolve(scores, truth, kwargs)
    return auprc(c) / c.density


@register(best_value=1.0, higher_is_better=True, needs="network")
def auroc(scores: Network | EdgeCandidates, truth: Any = None, **kwargs: Any) -> float:
    """Area under the ROC curve; ties count one half, NaN if every candidate is an edge.

    Parameters
    ----------
    scores, truth, **kwargs
        See :func:`edge_candidates`; or :class:`EdgeCandidates` alone.
    """
    c = _resolve(scores, truth, kwargs)
    return float("nan") if c.label.all() else float(roc_auc_score(c.label, c.score))


@register(best_value=None, higher_is_better=True, needs="network")
def epr(
    scores: Network | EdgeCandidates,
    truth: Any = None,
    *,
    ties: Literal["include", "strict", "expected"] = "include",
    **kwargs: Any,
) -> float:
    """Early precision ratio: precision among the top E pairs over the density, E the number of known edges.

    Parameters
    ----------
    scores, truth, **kwargs
        See :func:`edge_candidates`; or :class:`EdgeCandidates` alone.
    ties
        ``"include"``: keep every pair that ties with the E-th and divide by the number kept (BEELINE, except
        that pairs of weight 0 are ties like others, so that a network of a few edges is not scored on these
        alone). ``"strict"``: keep only pairs above the (E+1)-th score and divide by E (DeepSEM's code).
        ``"expected"``: tied pairs share the places that are left. All agree without ties.
    """
    if ties not in ("include", "strict", "expected"):
        raise ValueError(f"`ties` must be 'include', 'strict' or 'expected', got {ties!r}.")
    c = _resolve(scores, truth, kwargs)
    n_edges = int(c.label.sum())
    if ties == "expected":
        return _expected_precision(c, n_edges) / c.density
    if n_edges == c.label.size:
        return 1.0
    ordered = -np.sort(-c.score)
    if ties == "include":
        kept = c.score >= ordered[n_edges - 1]
        return float(c.label[kept].mean()) / c.density
    return float(c.label[c.score > ordered[n_edges]].sum() / n_edges) / c.density


@register(best_value=1.0, higher_is_better=True, needs="network")
def hit_at(scores: Network | EdgeCandidates, truth: Any = None, *, fraction: float = 0.01, **kwargs: Any) -> float:
    """Precision among the highest-scored share of pairs (default the top 1 %), ties counted in expectation.

    Parameters
    ----------
    scores, truth, **kwargs
        See :func:`edge_candidates`; or :class:`EdgeCandidates` alone.
    fraction
        Share of the candidates, rounded up to whole pairs.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"`fraction` must lie in (0, 1], got {fraction!r}.")
    c = _resolve(scores, truth, kwargs)
    return _expected_precision(c, int(np.ceil(fraction * c.label.size)))


def _expected_precision(c: EdgeCandidates, k: int) -> float:
    return float((top_weights(c.score, k) * c.label).sum() / k)


def auprc_per_regulator(scores: Network | EdgeCandidates, truth: Any = None, **kwargs: Any) -> pd.DataFrame:
    """Average precision within the candidates of each regulator.

    Parameters
    ----------
    scores, truth, **kwargs
        See :func:`edge_candidates`; or :class:`EdgeCandidates` with `source` alone.

    Returns
    -------
    DataFrame indexed by regulator: ``auprc``, ``density``, ``n_edges``, ``n_candidates``; regulators without
    a known edge have NaN.
    """
    c = _resolve(scores, truth, kwargs)
    if c.source is None:
        raise ValueError("`source` of EdgeCandidates is needed to score each regulator.")
    codes, names = pd.factorize(np.asarray(c.source), sort=True)
    order = np.lexsort((-c.score, codes))
    group, score, label = codes[order], c.score[order], c.label[order]
    size = np.bincount(group, minlength=len(names))
    positives = np.bincount(group, weights=label, minlength=len(names))
    start = np.cumsum(size) - size
    # Counts within the group, up to and including each pair; only the last pair of a block of ties is a
    # threshold.
    hits = np.cumsum(label) - (np.cumsum(positives) - positives)[group]
    rank = np.arange(1, len(group) + 1) - start[group]
    last = np.append((np.diff(group) != 0) | (np.diff(score) != 0), True)
    g, hits, rank = group[last], hits[last], rank[last]
    gained = np.diff(hits, prepend=0.0)
    first = np.append(True, np.diff(g) != 0)
    gained[first] = hits[first]
    area = np.bincount(g, weights=gained * hits / rank, minlength=len(names))
    with np.errstate(invalid="ignore", divide="ignore"):
        table = {"auprc": area / positives, "density": positives / size}
    frame = pd.DataFrame(table | {"n_edges": positives.astype(int), "n_candidates": size}, index=names)
    return frame.rename_axis("source")


@register(best_value=1.0, higher_is_better=True, needs="network")
def macro_auprc(scores: Network | EdgeCandidates, truth: Any = None, **kwargs: Any) -> float:
    """AUPRC averaged over the regulators that have a known edge, so that large regulons do not decide alone.

    Parameters
    ----------
    scores, truth, **kwargs
        See :func:`edge_candidates`; or :class:`EdgeCandidates` with `source` alone.
    """
    return float(auprc_per_regulator(scores, truth, **kwargs)["auprc"].mean())


def score_network(scores: Network | EdgeCandidates, truth: Any = None, **kwargs: Any) -> pd.Series:
    """All network scores at once, the candidate set being built once.

    Parameters
    ----------
    scores, truth, **kwargs
        See :func:`edge_candidates`; or :class:`EdgeCandidates` alone (without `source`, no macro AUPRC).

    Returns
    -------
    Series: ``auprc, auprc_ratio, auroc, epr, hit_at, macro_auprc, density, n_edges, n_candidates``.
    """
    c = _resolve(scores, truth, kwargs)
    functions = [auprc, auprc_ratio, auroc, epr, hit_at] + ([macro_auprc] if c.source is not None else [])
    values = {f.__name__: f(c) for f in functions}
    return pd.Series(values | {"density": c.density, "n_edges": int(c.label.sum()), "n_candidates": c.label.size})
