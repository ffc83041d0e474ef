"""Effects as measured in the training cells of a model, in all of them and in either half."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ._calibration import conditions
from ._engine import Question, rescale
from ._shrinkage import Halves, Matrix, programmes

if TYPE_CHECKING:
    from ._base import PerturbationModel

_MAX_CONTROLS, _MAX_CELLS = 300, 3000
Rows = NDArray[np.int64]


class MeasuredEffects:
    """Measured effects of the training conditions, and how a model predicts them now.

    Effects are measured at equal library, because a prediction keeps the library of its cell: what expression on the scale log1p changes
    with the log library within conditions (a quadratic regression) is taken off.

    Parameters
    ----------
    model
        Trained.
    train_idx
        Training cells.
    seed
        Of the halves and of which cells are used where not all are.

    Attributes
    ----------
    members, questions, contexts
        Of each condition.
    controls
        Some controls of each context.
    base
        Mean of the controls, ``(n_conditions, n_genes)``.
    effect, noise
        Mean of a condition less that of the controls of its context, ``(n_conditions, n_genes)``, and
        :math:`1 / n_t + 1 / n_0`, ``(n_conditions,)``.
    spread
        Sd of genes within conditions, ``(n_genes,)``.
    """

    def __init__(self, model: PerturbationModel, train_idx: Rows, seed: int) -> None:
        self.model, self.seed, self.scale = model, seed, model._resolve_scale(None)
        cells = conditions(model, train_idx)
        rng = np.random.default_rng(seed)
        is_control = cells["label"] == model.vocabulary.control
        own = {c: g.to_numpy() for c, g in cells[is_control].groupby("context")["row"]}
        self.controls = {c: _some(rows, _MAX_CONTROLS, rng) for c, rows in own.items()}
        treated = cells[~is_control & cells["context"].isin(list(own))]
        groups = list(treated.groupby(["condition", "context"]))
        self.questions = [Question(g["label"].iloc[0], g["dose"].iloc[0]) for _, g in groups]
        self.contexts: list[int] = [context for (_, context), _ in groups]
        self.members = [model.vocabulary.parse(q.label) for q in self.questions]
        self._rows: list[Rows] = [*own.values(), *(g["row"].to_numpy() for _, g in groups)]
        halves = [[_Sums.of(self._read(part)) for part in _halves(rows, rng)] for rows in self._rows]
        whole = [a + b for a, b in halves]
        self._by_library, self.spread = self._regression(whole)
        n = len(own)
        base = {c: whole[i].mean() for i, c in enumerate(own)}
        self.base = np.array([base[c] for c in self.contexts]).reshape(len(groups), len(self.spread))
        self.effect, self.noise = self._effects(whole[n:], dict(zip(own, whole[:n], strict=True)))
        self._parts = [
            self._effects([h[k] for h in halves[n:]], {c: halves[i][k] for i, c in enumerate(own)}) for k in (0, 1)
        ]

    def _read(self, rows: Rows) -> Iterator[tuple[Matrix, Matrix]]:
        """Expression, and log library with its square, minibatch by minibatch."""
        model = self.model
        counts, sized = model.data_kind == "counts", model._argument("size_factor_key") is not None
        for cells in model._cells(model.adata_manager, np.sort(rows), 512):
            depth = cells.library if sized else None
            x = rescale(cells.x, "counts" if counts else "layer", self.scale, cells.library, depth)
            # about a common origin, so that the square says something else
            log_library = cells.library.cpu().double().log().numpy() - 8.0
            yield x.cpu().double().numpy(), np.concatenate([log_library, log_library**2], axis=1)

    def _regression(self, sums: list[_Sums]) -> tuple[Matrix, Matrix]:
        """Slope of expression by log library and its square within conditions, ``(2, n_genes)``, and the sd left."""
        xx, qq, qx = (np.sum(parts, axis=0) for parts in zip(*(s.within() for s in sums if s.n), strict=True))
        freedom = max(sum(s.n - 1 for s in sums if s.n), 1)
        slope = np.zeros_like(qx)
        if freedom > 20 and np.linalg.eigvalsh(qq)[0] > 1e-6 * freedom:
            slope = np.linalg.solve(qq, qx)
        return slope, np.sqrt(np.maximum((xx - (slope * qx).sum(0)) / freedom, 1e-8))

    def _effects(self, sums: list[_Sums], base: dict[int, _Sums]) -> tuple[Matrix, Matrix]:
        """Effects and their noise, infinite where there are no cells."""
        effect, noise = np.zeros((len(sums), len(self.spread))), np.full(len(sums), np.inf)
        for i, (own, context) in enumerate(zip(sums, self.contexts, strict=True)):
            if own.n and base[context].n:
                effect[i] = own.mean(self._by_library) - base[context].mean(self._by_library)
                noise[i] = 1.0 / own.n + 1.0 / base[context].n
        return effect, noise

    def pooled(self, chosen: list[int], which: Rows) -> tuple[Matrix, Halves]:
        """Effects of perturbations: averages, by precision, over conditions.

        Parameters
        ----------
        chosen, which
            Conditions, and the number of the perturbation that each is of.

        Returns
        -------
        Share of each condition in each perturbation, and the effects.
        """
        share, effect, noise = _average(self.effect, self.noise, chosen, which)
        return share, Halves(effect, noise, tuple(_average(*part, chosen, which)[1:] for part in self._parts))

    def predicted(self, chosen: list[int]) -> Matrix:
        """Predicted effects of some conditions, ``(n_chosen, n_genes)``."""
        result = np.zeros((len(chosen), self.effect.shape[1]))
        contexts = np.array([self.contexts[i] for i in chosen])
        for context in np.unique(contexts):
            at = np.flatnonzero(contexts == context)
            questions = [self.questions[chosen[i]] for i in at]
            result[at] = self.model._mean_effects(self.controls[context], questions, self.scale, self.seed)
        return result

    @cached_property
    def programmes(self) -> Matrix:
        """Loadings of genes on what varies together within conditions; see :func:`~pertura.model._shrinkage.programmes`."""
        sizes = np.array([len(rows) for rows in self._rows])
        share = min(1.0, _MAX_CELLS / sizes.sum())
        rng = np.random.default_rng(self.seed)
        kept = [_some(rows, int(np.ceil(share * len(rows))), rng) for rows in self._rows]
        return programmes(np.concatenate([self._residuals(rows) for rows in kept]) / self.spread)

    def _residuals(self, rows: Rows) -> Matrix:
        left = np.concatenate([x - q @ self._by_library for x, q in self._read(rows)])
        return left - left.mean(0)


class _Sums:
    """Sums over cells: of expression x and covariates q, and of their squares and products."""

    def __init__(self, n: int, *sums: Matrix | float) -> None:
        self.n, self.sums = n, sums

    @classmethod
    def of(cls, batches: Iterator[tuple[Matrix, Matrix]]) -> _Sums:
        n, sums = 0, [0.0] * 5
        for x, q in batches:
            more = (x.sum(0), (x**2).sum(0), q.sum(0), q.T @ q, q.T @ x)
            n, sums = n + len(x), [a + b for a, b in zip(sums, more, strict=True)]
        return cls(n, *sums)

    def __add__(self, other: _Sums) -> _Sums:
        return _Sums(self.n + other.n, *(a + b for a, b in zip(self.sums, other.sums, strict=True)))

    def within(self) -> tuple[Matrix, Matrix, Matrix]:
        """Sums about the means: of squares of x, products of q, and products of q and x."""
        x, xx, q, qq, qx = self.sums
        return xx - x**2 / self.n, qq - np.outer(q, q) / self.n, qx - np.outer(q, x) / self.n

    def mean(self, slope: Matrix | None = None) -> Matrix:
        """Mean of x, less what goes with q."""
        return self.sums[0] / self.n - (0.0 if slope is None else (self.sums[2] / self.n) @ slope)


def _average(effect: Matrix, noise: Matrix, chosen: list[int], which: Rows) -> tuple[Matrix, Matrix, Matrix]:
    share = np.zeros((which.max() + 1, len(chosen)))
    share[which, np.arange(len(chosen))] = 1.0 / noise[chosen]
    precision = share.sum(1)
    with np.errstate(divide="ignore"):
        pooled = 1.0 / precision
    share /= np.where(precision > 0, precision, 1.0)[:, None]
    return share, share @ effect[chosen], pooled


def _halves(rows: Rows, rng: np.random.Generator) -> tuple[Rows, Rows]:
    order = rng.permutation(rows)
    return order[: len(rows) // 2], order[len(rows) // 2 :]


def _some(rows: Rows, n: int, rng: np.random.Generator) -> Rows:
    return rows if len(rows) <= n else np.sort(rng.choice(rows, n, replace=False))
