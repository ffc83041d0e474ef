"""Which control cell a perturbed cell is compared with in training.

A coupling is a sparse matrix (perturbed cells x control cells) of weights; every epoch draws one partner per perturbed cell
from it. Explicit pairs, random partners and optimal transport differ only in the weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import sparse

from ._cells import CHUNK

# exact transport is cubic in the number of cells: so many on either side are coupled at once, others in blocks
_MAX_EXACT, _BLOCK = 128, 64
_CONTROLS_PER_CELL = 2  # of many controls, as many as this per treated cell


@dataclass(frozen=True)
class Coupling:
    """Partners of perturbed cells.

    Attributes
    ----------
    treated
        Rows of perturbed cells that have partners.
    partners
        Rows of the candidate controls, one list for all of `treated`.
    start
        Where the candidates of each treated cell start in `partners`.
    count
        Number of candidates of each treated cell.
    cumulative
        Running sum of the candidates' probabilities, which add up to 1 per treated cell; `None` where all candidates of a
        cell are equally likely.
    """

    treated: NDArray[np.int64]
    partners: NDArray[np.int64]
    start: NDArray[np.int64]
    count: NDArray[np.int64]
    cumulative: NDArray[np.float64] | None = None

    def draw(self, rng: np.random.Generator) -> NDArray[np.int64]:
        """One partner for each treated cell."""
        u = rng.random(len(self.treated))
        if self.cumulative is None:
            return self.partners[self.start + (u * self.count).astype(np.int64)]
        at = np.searchsorted(self.cumulative, np.arange(len(self.treated)) + u, side="right")
        return self.partners[np.minimum(at, self.start + self.count - 1)]

    def reservoir(self, size: int, rng: np.random.Generator) -> Coupling:
        """The same with about `size` of the controls, of each stratum an equal number, from few places of the file.

        All controls are kept where they are few enough, where they are not equally likely, or where there are more strata than `size`.
        """
        first, stratum = np.unique(self.start, return_inverse=True)
        if self.cumulative is not None or not len(first) <= size < len(np.unique(self.partners)):
            return self
        count = np.zeros(len(first), dtype=np.int64)
        count[stratum] = self.count
        member = np.repeat(np.arange(len(first)), count)
        entry = np.arange(len(member)) + np.repeat(first - np.cumsum(count) + count, count)
        chunk = np.unique(self.partners[entry] // CHUNK, return_inverse=True)[1]
        # strata prefer the same places
        order = np.lexsort((rng.random(len(member)), rng.permutation(int(chunk.max()) + 1)[chunk], member))
        kept = np.minimum(count, size // len(first))
        place = np.arange(len(member)) - np.repeat(np.cumsum(count) - count, count)
        chosen = entry[order[place < np.repeat(kept, count)]]
        return Coupling(self.treated, self.partners[chosen], (np.cumsum(kept) - kept)[stratum], kept[stratum])


class Strata(NamedTuple):
    """Where partners are looked for.

    Attributes
    ----------
    wanted
        Stratum of each cell, -1 where no control could be found.
    pool
        Controls of each stratum: positions, ordered by stratum.
    pool_stratum
        Stratum of each entry of `pool`, ascending. A control is in a stratum of every level.
    """

    wanted: NDArray[np.int64]
    pool: NDArray[np.int64]
    pool_stratum: NDArray[np.int64]

    def members(self, stratum: int) -> NDArray[np.int64]:
        """Controls of a stratum."""
        first, last = np.searchsorted(self.pool_stratum, [stratum, stratum + 1])
        return self.pool[first:last]


def strata(obs: pd.DataFrame, is_control: NDArray[np.bool_], keys: list[str]) -> Strata:
    """The finest level (context; context and batch; ...) at which each cell finds controls."""
    wanted = np.full(len(obs), -1, dtype=np.int64)
    control = np.flatnonzero(is_control)
    pools, codes, offset = [], [], 0
    for k in range(1, len(keys) + 1):
        code = obs.groupby(keys[:k], observed=True, sort=False).ngroup().to_numpy() + offset
        wanted = np.where(np.isin(code, code[control]), code, wanted)
        pools.append(control)
        codes.append(code[control])
        offset = int(code.max(initial=offset)) + 1
    pool, stratum = np.concatenate(pools), np.concatenate(codes)
    order = np.argsort(stratum, kind="stable")
    return Strata(wanted, pool[order], stratum[order])


def random_coupling(rows: NDArray[np.int64], is_control: NDArray[np.bool_], where: Strata) -> Coupling:
    """Any control of the stratum; the arguments describe the cells `rows`, in that order."""
    levels, first, size = np.unique(where.pool_stratum, return_index=True, return_counts=True)
    treated = np.flatnonzero(~is_control & (where.wanted >= 0))
    at = np.searchsorted(levels, where.wanted[treated])
    return Coupling(rows[treated], rows[where.pool], first[at], size[at])


def explicit_coupling(rows: NDArray[np.int64], is_control: NDArray[np.bool_], pair: NDArray[np.object_]) -> Coupling:
    """Controls that carry the same pair identifier."""
    known = pd.notna(pair)
    chosen = strata(pd.DataFrame({"pair": pair[known]}), is_control[known], ["pair"])
    return random_coupling(rows[known], is_control[known], chosen)


def transport_coupling(
    rows: NDArray[np.int64],
    is_control: NDArray[np.bool_],
    where: Strata,
    group: NDArray[np.int64],
    embedding: NDArray[np.float32],
    rng: np.random.Generator,
) -> Coupling:
    """Optimal transport (POT) between the controls and each perturbation of a stratum.

    Both sides are centered first, so that cells are matched by what the perturbation did not change. Transport is exact where
    cells are few. Others are first parted into blocks that are small and alike on both sides: the time is then linear in their number.

    Parameters
    ----------
    rows, is_control, where
        Cells to couple.
    group
        Number of the perturbation of each cell.
    embedding
        Low-dimensional expression of these cells, ``(len(rows), n_components)``.
    rng
        Chooses controls where there are many more than treated cells.
    """
    import ot

    plans: list[tuple[NDArray, NDArray, NDArray]] = []
    asking = np.flatnonzero(~is_control & (where.wanted >= 0))
    asking = asking[np.lexsort((group[asking], where.wanted[asking]))]
    keys = np.stack([where.wanted[asking], group[asking]])
    for treated in np.split(asking, np.flatnonzero((np.diff(keys) != 0).any(0)) + 1) if len(asking) else ():
        control = where.members(where.wanted[treated[0]])
        base = embedding[control].mean(0)
        limit = max(_MAX_EXACT, _CONTROLS_PER_CELL * len(treated))
        if len(control) > limit:
            control = np.sort(rng.choice(control, limit, replace=False))
        moved, base = embedding[treated] - embedding[treated].mean(0), embedding[control] - base
        for t, c in _blocks(moved, base):
            plan = ot.emd(ot.unif(len(t)), ot.unif(len(c)), ot.dist(moved[t], base[c]))
            i, j = np.nonzero(plan)
            plans.append((treated[t[i]], control[c[j]], plan[i, j]))
    if not plans:
        empty = np.zeros(0, dtype=np.int64)
        return Coupling(empty, empty, empty, empty)
    treated, control, mass = (np.concatenate(part) for part in zip(*plans, strict=True))
    weights = sparse.csr_matrix((mass, (treated, control)), shape=(len(rows), len(rows)))
    used = np.flatnonzero(np.diff(weights.indptr))
    weights = weights[used]
    total = np.asarray(weights.sum(1)).ravel()
    count = np.diff(weights.indptr)
    probability = weights.data / np.repeat(total, count)
    running = np.cumsum(probability)
    # row r's candidates end at r + 1: one searchsorted draws for all cells
    return Coupling(
        rows[used],
        rows[weights.indices],
        weights.indptr[:-1].astype(np.int64),
        count.astype(np.int64),
        running,
    )


def _blocks(
    treated: NDArray[np.float32], control: NDArray[np.float32]
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Parts of both sides with equal shares of their cells: each is halved at its median along the widest axis, again and again."""
    largest = _MAX_EXACT if max(len(treated), len(control)) <= _MAX_EXACT else _BLOCK
    parts = [(np.arange(len(treated)), np.arange(len(control)))]
    while parts:
        t, c = parts.pop()
        if max(len(t), len(c)) <= largest or min(len(t), len(c)) < 2:
            yield t, c
            continue
        axis = int(np.argmax(treated[t].var(0) + control[c].var(0)))
        t, c = t[np.argsort(treated[t, axis], kind="stable")], c[np.argsort(control[c, axis], kind="stable")]
        half = len(t) // 2
        share = int(np.clip(round(len(c) * half / len(t)), 1, len(c) - 1))
        parts += [(t[half:], c[share:]), (t[:half], c[:share])]


def embed(
    x: sparse.spmatrix | NDArray, counts: bool, n_components: int = 30, *, seed: int = 0, return_basis: bool = False
) -> NDArray[np.float32] | tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Truncated SVD of log-normalized expression, which stays sparse: ``(n_cells, n_components)``, and the axes."""
    from sklearn.decomposition import TruncatedSVD
    from sklearn.preprocessing import normalize

    if counts:
        x = normalize(x, norm="l1", axis=1) * 1e4
        x = x.log1p() if sparse.issparse(x) else np.log1p(x)
    svd = TruncatedSVD(max(1, min(n_components, min(x.shape) - 1)), random_state=seed)
    embedding = svd.fit_transform(x).astype(np.float32)
    return (embedding, svd.components_.astype(np.float32)) if return_basis else embedding
