"""Splits of the candidate edges of a known network, from "every gene was seen" to "no gene was seen"."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from ._partition import Rows, Split
from ._splits import _fraction, _rank_within

GRNSplitKind = Literal["edge", "edge_balanced", "unseen_tf", "unseen_target", "unseen_both"]
_TRAIN, _VAL = 0.67, 0.10
_BALANCED_TRAIN, _BALANCED_VAL = 2 / 3, 1 / 5


@dataclass(frozen=True, eq=False)
class GRNSplit:
    """Split of the candidate pairs of a network.

    Parameters
    ----------
    pairs
        All candidates: columns ``source``, ``target`` and boolean ``label``.
    split
        Row positions in `pairs`. Pairs in no part are *unknown*, not negative.
    regulators, targets
        Held-out regulators and targets.
    """

    pairs: pd.DataFrame
    split: Split
    regulators: tuple[str, ...] = ()
    targets: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check that held-out genes are in no training or validation pair in their role."""
        seen = self.pairs.iloc[np.concatenate([self.split.train, self.split.val])]
        for column, held in (("source", self.regulators), ("target", self.targets)):
            leaked = sorted(set(held) & set(seen[column]))
            if leaked:
                raise ValueError(
                    f"Leak in split {self.split.name!r}: held-out {column} {leaked[:5]} in training pairs."
                )

    @property
    def train(self) -> pd.DataFrame:
        """Training pairs."""
        return self.pairs.iloc[self.split.train]

    @property
    def val(self) -> pd.DataFrame:
        """Validation pairs."""
        return self.pairs.iloc[self.split.val]

    @property
    def test(self) -> pd.DataFrame:
        """Test pairs."""
        return self.pairs.iloc[self.split.test]


def candidate_pairs(
    truth: pd.DataFrame | Iterable[tuple[str, str]],
    *,
    genes: Sequence[str] | None = None,
    regulators: Sequence[str] | None = None,
) -> pd.DataFrame:
    """All pairs (regulator, gene) without self loops, labelled by a known network.

    Parameters
    ----------
    truth
        Known edges: table with columns ``source, target``, or pairs.
    genes
        Candidate targets, e.g. all measured genes; default all genes of the network. Known edges outside are
        dropped.
    regulators
        Candidate sources; default those with a known edge.

    Returns
    -------
    DataFrame ``source, target, label``, sorted by source and target.
    """
    table = truth if isinstance(truth, pd.DataFrame) else pd.DataFrame(list(truth), columns=["source", "target"])
    if not {"source", "target"} <= set(table.columns):
        raise ValueError(f"`truth` needs columns 'source' and 'target'; it has {list(table.columns)[:10]}.")
    edges = table[["source", "target"]].astype(str).drop_duplicates()
    edges = edges[edges["source"] != edges["target"]]
    if genes is not None:
        measured = pd.Index(genes).astype(str)
        edges = edges[edges["source"].isin(measured) & edges["target"].isin(measured)]
    if regulators is not None:
        edges = edges[edges["source"].isin(pd.Index(regulators).astype(str))]
    if edges.empty:
        raise ValueError("`truth`: no edge is left among `genes` and `regulators`; check names and upper/lower case.")
    sources = sorted(set(edges["source"] if regulators is None else map(str, regulators)))
    targets = sorted(set(edges.to_numpy().ravel() if genes is None else map(str, genes)))
    pairs = pd.MultiIndex.from_product([sources, targets], names=["source", "target"])
    frame = pairs.to_frame(index=False)
    frame["label"] = pairs.isin(pd.MultiIndex.from_frame(edges))
    return frame[frame["source"] != frame["target"]].reset_index(drop=True)


def make_grn_splits(
    truth: pd.DataFrame | Iterable[tuple[str, str]],
    *,
    kind: GRNSplitKind,
    genes: Sequence[str] | None = None,
    regulators: Sequence[str] | None = None,
    fraction: float = 1 / 3,
    disjoint_genes: bool = True,
    n_splits: int = 1,
    seed: int = 0,
) -> list[GRNSplit]:
    """Random splits of a known network into training and test pairs.

    With ``"edge"`` and ``"edge_balanced"`` every test gene was seen in training, and the identity of
    regulator and target alone predicts well; with ``"unseen_tf"`` and ``"unseen_target"`` one of the two
    still does. Only ``"unseen_both"`` asks for what transfers between genes; report all, lead with it.

    Parameters
    ----------
    truth, genes, regulators
        Known edges and candidates, see :func:`candidate_pairs`.
    kind
        * ``"edge"``: for each regulator, 67 % of the positives and of the negatives train, 10 % validation, rest test; a
          regulator's only positive goes to train or test by a coin, of two each gets one. Regulators without a
          positive contribute nothing.
        * ``"edge_balanced"``: for each regulator, 2/3 of the positives train, of which 1/5 validation; as many
          negatives of the same regulator; test negatives from all regulators until the test set has the density of
          the network.
        * ``"unseen_tf"``, ``"unseen_target"``: a fraction of the regulators or of the targets is test.
        * ``"unseen_both"``: held-out regulators x held-out targets are test, the others x the others are train, the
          mixed pairs are in neither.
    fraction
        Share of regulators and of targets to hold out. Regulators are stratified by tertiles of their number
        of targets, so that train and test have comparable density.
    disjoint_genes
        For ``"unseen_both"``: a held-out regulator is a held-out target as well, so that no test gene occurs
        in training in either role. Otherwise roles are held out independently.
    n_splits
        Number of splits; 10 or more, because they differ much.
    seed
        Of the first split; split i uses ``seed + i``.
    """
    if kind not in get_args(GRNSplitKind):
        raise ValueError(f"`kind` must be one of {get_args(GRNSplitKind)}, got {kind!r}.")
    _fraction(fraction, "fraction")
    pairs = candidate_pairs(truth, genes=genes, regulators=regulators)
    out = []
    for s in range(seed, seed + n_splits):
        rng = np.random.default_rng(s)
        about = {"name": f"seed={s}", "kind": kind, "seed": s}
        if kind == "edge":
            out.append(GRNSplit(pairs, Split(*_edge(pairs, rng), **about)))
        elif kind == "edge_balanced":
            out.append(GRNSplit(pairs, Split(*_edge_balanced(pairs, rng), **about)))
        else:
            out.append(_unseen(pairs, kind, fraction, disjoint_genes, rng, about))
    return out


def _part(rank: Rows, size: Rows, train: float, val: float, rng: np.random.Generator) -> NDArray[np.int8]:
    """Part (0 train, 1 validation, 2 test) of rows with a random rank within groups of the given size."""
    part = (rank >= np.floor(train * size)).astype(np.int8) + (rank >= np.floor((train + val) * size))
    part = np.where(size == 2, 2 * rank, part)
    return np.where(size == 1, 2 * rng.integers(2, size=len(size)), part)


def _edge(pairs: pd.DataFrame, rng: np.random.Generator) -> tuple[Rows, Rows, Rows]:
    groups = pd.MultiIndex.from_frame(pairs[["source", "label"]]).factorize()[0]
    part = _part(*_rank_within(groups, rng), _TRAIN, _VAL, rng)
    part[~pairs.groupby("source")["label"].transform("any").to_numpy()] = -1
    return tuple(np.flatnonzero(part == i) for i in (0, 2, 1))


def _edge_balanced(pairs: pd.DataFrame, rng: np.random.Generator) -> tuple[Rows, Rows, Rows]:
    label, source = pairs["label"].to_numpy(), pairs["source"].factorize()[0]
    positive, negative = np.flatnonzero(label), np.flatnonzero(~label)
    part = np.full(len(pairs), -1)
    part[positive] = _part(*_rank_within(source[positive], rng), _BALANCED_TRAIN, 0.0, rng)
    train = np.flatnonzero(part == 0)
    part[rng.choice(train, int(_BALANCED_VAL * len(train)), replace=False)] = 1
    need = [np.bincount(source[part == i], minlength=source.max() + 1)[source[negative]] for i in (0, 1)]
    rank, _ = _rank_within(source[negative], rng)
    part[negative[rank < need[0]]] = 0
    part[negative[(rank >= need[0]) & (rank < need[0] + need[1])]] = 1
    free = negative[part[negative] == -1]
    density = label.mean()
    wanted = round((part == 2).sum() * (1 - density) / density)
    part[rng.choice(free, min(wanted, len(free)), replace=False)] = 2
    return tuple(np.flatnonzero(part == i) for i in (0, 2, 1))


def _unseen(
    pairs: pd.DataFrame, kind: str, fraction: float, disjoint: bool, rng: np.random.Generator, about: dict
) -> GRNSplit:
    held_tf: tuple[str, ...] = ()
    held_target: tuple[str, ...] = ()
    if kind != "unseen_target":
        held_tf = tuple(sorted(_stratified(pairs.groupby("source")["label"].sum(), fraction, rng)))
    if kind != "unseen_tf":
        targets = np.array(sorted(set(pairs["target"])), dtype=object)
        if kind == "unseen_both" and disjoint:
            # A regulator keeps its side in both roles; the other genes fill up the share.
            targets = np.array(sorted(set(targets) - set(pairs["source"])), dtype=object)
            own = set(held_tf) & set(pairs["target"])
        else:
            own = set()
        chosen = rng.choice(targets, round(fraction * len(targets)), replace=False)
        held_target = tuple(sorted(own | set(chosen)))
    tf = pairs["source"].isin(held_tf).to_numpy()
    target = pairs["target"].isin(held_target).to_numpy()
    test = {"unseen_tf": tf, "unseen_target": target, "unseen_both": tf & target}[kind]
    split = Split(
        np.flatnonzero(~(tf | target)),
        np.flatnonzero(test),
        held_out=tuple(sorted({*held_tf, *held_target})),
        **about,
    )
    return GRNSplit(pairs, split, held_tf, held_target)


def _stratified(degree: pd.Series, fraction: float, rng: np.random.Generator) -> NDArray[np.object_]:
    """Systematic sample of regulators, ordered by tertile of out-degree and at random within."""
    tertile = np.ceil(3 * degree.rank(method="first").to_numpy() / len(degree))
    order = np.lexsort((rng.random(len(degree)), tertile))
    steps = np.floor(fraction * np.arange(len(degree) + 1) + rng.random())
    chosen = degree.index.to_numpy(dtype=object)[order[np.diff(steps) > 0]]
    if not 0 < len(chosen) < len(degree):
        raise ValueError(
            f"`fraction`={fraction:g} of {len(degree)} regulators leaves none to test or none to train on."
        )
    return chosen
