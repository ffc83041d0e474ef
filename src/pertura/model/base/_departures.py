"""Effects in single contexts, beyond what a model predicts there from other contexts; fitted once it is trained."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from scipy import stats

from pertura.effects import Asked, ConditionTable, fit_departures
from pertura.effects._discrepancy import perturbations_of
from pertura.module._added_effects import MeasuredMeans
from pertura.module._departures import Departures

from ._protocol import Model
from ._validation import some_controls

Matrix = NDArray[np.float64]
Without = Callable[[NDArray[np.int64]], AbstractContextManager[None]]

_MAX_FOLDS, _N_DRAWS = 5, 1
_MAX_CONTROLS, _MAX_PREDICTED = 128, 20_000  # of a context, and these times its perturbations
_MAX_LACKING = 3000  # pairs of perturbation and context; of more, none is filled in
# what is added to activations, to see how mean expression follows
_STEPS = (-4.0, -2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0, 4.0)


class ContextEffects:
    """Conditions of which other contexts say something, and what a model predicts of them.

    Parameters
    ----------
    model
        Trained.
    table
        Its training conditions.

    Attributes
    ----------
    rows
        Treated conditions of the table whose perturbation was measured in contexts of another fold, too.
    folds
        Contexts that are left out together.
    """

    def __init__(self, model: Model, table: ConditionTable) -> None:
        self.model, self.table = model, table
        self.context = table.context[table.treated]
        known, own = table.has_control[self.context], np.unique(self.context)
        own = own[table.has_control[own]]
        self.folds = [own[i::_MAX_FOLDS] for i in range(min(len(own), _MAX_FOLDS))]
        fold = np.zeros(table.n_contexts, dtype=np.int64)
        for number, contexts in enumerate(self.folds):
            fold[contexts] = number
        where: dict[tuple[int, ...], set[int]] = {}
        for members, context, ok in zip(table.members, self.context, known, strict=True):
            if ok:
                where.setdefault(members, set()).add(int(fold[context]))
        self.number = np.array([len(where.get(m, ())) * bool(ok) for m, ok in zip(table.members, known, strict=True)])
        self.rows = np.flatnonzero(self.number > 1)
        self._done = perturbations_of(table, model.vocabulary)
        self._max_dose = np.asarray(model.vocabulary.max_dose, dtype=np.float32)
        cells, rng = model._registered_cells(model.train_indices), np.random.default_rng(0)
        self._controls = {}
        for c in np.unique(self.context[self.rows]):
            most = max(20, min(_MAX_CONTROLS, _MAX_PREDICTED // int((self.context[self.rows] == c).sum())))
            self._controls[c] = some_controls(cells, int(c), most, rng)

    def __len__(self) -> int:
        return len(self.rows)

    def predict(self, without: Without | None = None) -> Matrix:
        """Effects of the conditions, each as the model is `without` its fold of contexts; ``(n_treated, n_genes)``, 0 elsewhere."""
        result = np.zeros((len(self.context), self.table.n_genes))
        for fold in self.folds:
            if not np.isin(self.context[self.rows], fold).any():
                continue
            with nullcontext() if without is None else without(fold):
                for c in fold:
                    own = np.flatnonzero((self.context == c) & np.isin(np.arange(len(self.context)), self.rows))
                    result[own] = self._predict(c, own)
        return result

    def against_other_half(self) -> tuple[list[Matrix], NDArray[np.float64]]:
        """Measured effects of which the controls of half 0 have no part, and of half 1, and how noisy they are beside left-out ones.

        Returns
        -------
        Twice ``(n_treated, n_genes)``; and ``(n_treated,)``, the sampling variance of such an effect less the mean effect in the
        other folds, summed over genes.
        """
        table, found = self.table, self.table.effects()
        effects = [found.effect + (table.controls - other)[self.context] for other in table.control_halves[::-1]]
        variance = np.where(found.measured, (found.se**2).sum(1), 0.0)
        of_controls = 1.0 - 1.0 / (table.n[table.treated].sum(1) * found.noise)
        noise = variance * (1.0 + of_controls)  # half of the controls have twice the variance
        keys = [(m, tuple(d)) for m, d in zip(table.members, table.dose[table.treated].tolist(), strict=True)]
        group = pd.factorize(pd.Series(keys))[0]
        number, total = np.bincount(group), np.bincount(group, variance)
        return effects, noise + (total[group] - variance) / np.maximum(number[group] - 1, 1) ** 2

    def _predict(self, context: int, rows: NDArray[np.int64]) -> Matrix:
        """Effects in a context of the perturbations of some treated conditions."""
        if not len(rows):
            return np.zeros((0, self.table.n_genes))
        return self.model._effects_on(self._controls[context], [self._done[i] for i in rows], _N_DRAWS)

    def lacking(self) -> tuple[NDArray[np.int64], NDArray[np.int64], Matrix, Matrix]:
        """What other perturbations of a context say of those that it lacks (:class:`~pertura.effects.Transfer`).

        Returns
        -------
        Treated conditions of other contexts with these perturbations, the contexts that lack them, their effects there, and the
        sd of these: how far off known effects are that follow from the others of their context.
        """
        table, means = self.table, MeasuredMeans(self.table.n_genes, self.table.n_contexts, self._max_dose)
        means.set(table.condition_means())
        conditions = means.conditions

        def elsewhere(asked: Asked, context: int) -> NDArray[np.float64]:
            mask = (conditions.label == asked.label) & (conditions.context != context)
            available = conditions.curves_per_context(mask) > 0
            return conditions.average(asked.at_dose, mask, available / max(available.sum(), 1))

        transfer, kept = means.transfer(elsewhere), np.flatnonzero(table.has_control[self.context])
        keys = np.concatenate([conditions.codes, conditions.dose], axis=1)
        first = np.sort(np.unique(keys, axis=0, return_index=True)[1])
        found = []
        for c in self._controls:
            there = set(conditions.label[conditions.context == c].tolist())
            if transfer.knows(int(c)):
                found += [(kept[i], c, i) for i in first if conditions.label[i] not in there]
        if not found or len(found) > _MAX_LACKING:
            return (*np.zeros((2, 0), dtype=np.int64), *np.zeros((2, 0, table.n_genes)))
        rows, contexts, at = (np.array(part) for part in zip(*found, strict=True))
        asked = [conditions.ask(conditions.codes[i], conditions.dose[i]) for i in at]
        weights = [transfer(a, int(c)) for a, c in zip(asked, contexts, strict=True)]
        known = [transfer.left_out(int(c)) for c in np.unique(contexts)]
        off, noise = (
            means.sums(np.concatenate([np.eye(len(conditions))[own] - w for own, w in known]))[0],
            means.variance,
        )
        square = (
            (off.square().mean(0) - noise[np.concatenate([own for own, _ in known])].mean(0)).double().cpu().numpy()
        )
        sd = np.sqrt(np.maximum(square, 0.1 * max(square.mean(), 0.0)))
        wanted = means.sums(np.stack(weights))[0].double().cpu().numpy()
        return rows, contexts, wanted, np.broadcast_to(sd, wanted.shape)

    @torch.no_grad()
    def set_departures(self, site: Departures, expected: Matrix) -> None:
        """Let a site bring the model from what it predicts to what is expected and measured together.

        Parameters
        ----------
        site
            Of the model.
        expected
            As :meth:`predict` gives them, of the model without their contexts.
        """
        site.clear()
        if not len(self):
            return
        table, lacking = self.table, self.lacking()
        kept = table.has_control[self.context]
        place = (np.cumsum(kept) - 1)[self.rows]
        mean, variance = fit_departures(table, expected[kept], place)
        wanted = np.concatenate([expected[self.rows] + mean[place], lacking[2]])
        sd = np.concatenate([np.sqrt(variance[place]), lacking[3]])
        rows = np.concatenate([self.rows, lacking[0]])
        context = np.concatenate([self.context[self.rows], lacking[1]])
        at = table.treated[rows]
        site.set(codes=table.codes[at], dose=table.dose[at], context=context, max_dose=self._max_dose)
        site.set(**{name: torch.zeros(wanted.shape) for name in ("delta", "mean", "low", "high")})
        for c in self._controls:
            own = np.flatnonzero(context == c)
            self._solve(site, int(c), own, rows[own], wanted[own], sd[own])

    def _solve(
        self,
        site: Departures,
        context: int,
        own: NDArray[np.int64],
        rows: NDArray[np.int64],
        wanted: Matrix,
        sd: Matrix,
    ) -> None:
        """What is added to activations so that mean expression of the controls moves by the wanted effects."""

        def reached(added: Matrix | float) -> Matrix:
            for buffer in (site.mean, site.low, site.high):
                buffer[own] = torch.as_tensor(added, dtype=buffer.dtype, device=buffer.device)
            return self._predict(context, rows)

        def keep(**values: Matrix) -> None:
            for name, value in values.items():
                buffer = getattr(site, name)
                buffer[own] = torch.as_tensor(value, dtype=buffer.dtype, device=buffer.device)

        start = reached(0.0)
        if not self.model.registered.is_counts:  # added to the mean itself
            left = wanted - start
            keep(delta=left, mean=left, low=left - sd, high=left + sd)
            return
        # a gene's own activation changes its own expression alone, which rises with it
        moved = np.stack([start if step == 0.0 else reached(step) for step in _STEPS], -1)
        moved = np.maximum.accumulate(moved, axis=-1) + 1e-6 * np.arange(len(_STEPS))
        upward = sd * mean_of_clipped((wanted - moved[..., 0]) / (sd + 1e-9))
        low, mean, high = (inverse(level, moved, np.array(_STEPS)) for level in (wanted - sd, wanted, wanted + upward))
        # between the steps the curve is not straight
        off = (wanted - reached(mean)) * (high - low) / (sd + upward + 1e-9)
        off = off.clip(-0.5, 0.5)
        keep(delta=wanted - start, mean=mean + off, low=low + off, high=high + off)


def mean_of_clipped(end: Matrix) -> Matrix:
    """Mean of the size of a normal deviate that ends at `end`, in units of that of one without end.

    Expression ends at 0. Where that is near, draws above the mean must not reach farther than those below can, lest their mean be off.
    """
    end = np.maximum(end, 0.0)
    return 1.0 - np.exp(-(end**2) / 2) + np.sqrt(2 * np.pi) * end * stats.norm.sf(end)


def inverse(level: Matrix, curve: Matrix, steps: NDArray[np.float64]) -> Matrix:
    """Where increasing curves reach levels, by linear interpolation; the ends where they do not.

    Parameters
    ----------
    level
        ``(n, n_genes)``.
    curve
        Values at the steps, ``(n, n_genes, n_steps)``.
    steps
        ``(n_steps,)``.
    """
    right = (curve < level[..., None]).sum(-1).clip(1, len(steps) - 1)
    low, high = (np.take_along_axis(curve, at[..., None], -1)[..., 0] for at in (right - 1, right))
    share = ((level - low) / (high - low)).clip(0.0, 1.0)
    return steps[right - 1] + share * (steps[right] - steps[right - 1])
