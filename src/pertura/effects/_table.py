r"""Means of all conditions, measured in one pass over the cells.

Everything of the form "mean of a condition less mean of its controls" comes from a :class:`ConditionTable`. It keeps sums of
groups of cells, so that its size does not depend on their number, and sparse data stay sparse.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import sparse
from scvi.data import AnnDataManager

from pertura.data._cells import CellDataset, Rows
from pertura.data._constants import CONTROL_ONLY, EFFECTS, KEYS
from pertura.data._scale import counts_of
from pertura.data._vocabulary import dose_units

from ._depth import Counted, Thinning, changes
from ._shrink import Halves, principal_programs
from ._sums import TARGET_SUM, Matrix, Sums, Values, chunks, codes_of

logger = logging.getLogger(__name__)

_MAX_SAMPLE = 3000
# few cells say little about a gene's variance: all conditions together lend as many degrees of freedom
_PRIOR_DF = 3.0


@dataclass(frozen=True, eq=False)
class Effects:
    """Effects of the treated conditions of a table.

    Attributes
    ----------
    effect
        Mean of a condition less that of its controls, ``(n_treated, n_genes)``; 0 where one of them has no cells.
    noise
        Variance of the effect in units of the variance of one cell: one over the number of treated cells, and of the
        controls that they are compared with, ``(n_treated,)``. Infinite where one of them has no cells.
    se
        Standard error, ``(n_treated, n_genes)``. The variance within a condition is averaged by degrees of freedom with
        that within all conditions, which counts for three.
    """

    effect: Matrix
    noise: NDArray[np.float64]
    se: Matrix

    @property
    def measured(self) -> NDArray[np.bool_]:
        """Whether a condition and controls of its context have cells, ``(n_treated,)``."""
        return np.isfinite(self.noise)


@dataclass(frozen=True, eq=False)
class ConditionMeans:
    """Means of treated conditions and, below them, of the controls of every context.

    Attributes
    ----------
    codes
        Members of each condition, sorted and padded with -1, ``(n_conditions, order)``.
    dose
        Their doses in the registered unit (1 without doses), padded with 0, ``(n_conditions, order)``.
    context
        Code of the context, ``(n_conditions,)``.
    mean, variance
        Mean expression and its squared standard error, ``(n_conditions + n_contexts, n_genes)``; the rows of contexts
        without controls are 0.
    has_control
        Whether a context has controls, ``(n_contexts,)``.
    """

    codes: NDArray[np.int64]
    dose: NDArray[np.float64]
    context: NDArray[np.int64]
    mean: NDArray[np.float32]
    variance: NDArray[np.float32]
    has_control: NDArray[np.bool_]


class Moments(NamedTuple):
    """Mean and variance of each gene over cells, both ``(n_genes,)``."""

    mean: NDArray[np.float64]
    variance: NDArray[np.float64]


class Sample(NamedTuple):
    """A random sample of cells: normalized expression, depth regressors ``(n, 2)`` and condition ``(n,)``."""

    x: Values
    depth: Matrix
    condition: NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class ConditionTable:
    """Sums over the cells of each condition: perturbation x dose x context, controls included.

    Expression is on the default scale of the models: log1p of counts per 10,000 of the cell's library for counts, else as
    registered. Make one by :meth:`measure`.

    Attributes
    ----------
    codes, dose, context
        Of each condition, as in :class:`ConditionMeans`; controls come first, one condition per context.
    n
        Number of cells in either half, ``(n_conditions, 2)``. Halves are random and have equal shares of each batch.
    mean
        Mean expression in either half, ``(n_conditions, 2, n_genes)``; 0 where there are no cells.
    within
        Sum of squared deviations from the mean of the condition, ``(n_conditions, n_genes)``.
    depth
        Mean of the depth regressors, log library - 8 and its square, ``(n_conditions, 2, 2)``.
    per_batch
        Number of cells in each batch, ``(n_conditions, 2, n_batches)``.
    control_context, control_batch
        Groups of controls: context and batch, ``(n_groups,)``.
    control_n, control_mean
        As `n` and `mean`, of these groups.
    slope
        Change of expression with the depth regressors within conditions, ``(2, n_genes)``; 0 for other data than counts.
    spread
        Sd of each gene within conditions, without what goes with depth, ``(n_genes,)``.
    normalized, raw
        Moments over all cells, of expression on the scale of the table and as registered.
    batch_mean
        Mean expression of the cells of each batch, ``(n_batches, n_genes)``; that of all cells where a batch has none.
    batch_n
        Number of cells in each batch, ``(n_batches,)``.
    sample
        At most 3,000 cells.
    n_contexts
        Number of contexts.
    are_effects
        Whether rows are effects: controls are then 0, without an error.
    library
        Mean library of the cells; 1 for other data than counts.
    linear_mean, linear_within
        As `mean` (of both halves together, ``(n_conditions, n_genes)``) and `within`, of counts per 10,000 before the
        logarithm; `None` unless asked for.
    linear_unit
        Mean over cells of what one count is in counts per 10,000.
    log_library, control_log_library
        Mean log library of conditions, ``(n_conditions,)``, and of groups of controls, ``(n_groups,)``. Up to a constant for data
        that are the logarithm of normalized counts; NaN where counts can not be recovered.
    thinning
        How deep conditions and controls are thinned for a comparison at equal depth; `None` where no depth is known.
    thinned, control_thinned
        What `mean` and `control_mean` change by: ``(n_conditions, 2, n_genes)`` and ``(n_steps, n_groups, 2, n_genes)``.
    """

    codes: NDArray[np.int64]
    dose: NDArray[np.float64]
    context: NDArray[np.int64]
    n: NDArray[np.int64]
    mean: NDArray[np.float32]
    within: NDArray[np.float32]
    depth: Matrix
    per_batch: NDArray[np.int64]
    control_context: NDArray[np.int64]
    control_batch: NDArray[np.int64]
    control_n: NDArray[np.int64]
    control_mean: NDArray[np.float32]
    slope: Matrix
    spread: NDArray[np.float64]
    normalized: Moments
    raw: Moments
    batch_mean: NDArray[np.float32]
    batch_n: NDArray[np.int64]
    sample: Sample
    n_contexts: int
    are_effects: bool = False
    library: float = 1.0
    linear_mean: Matrix | None = None
    linear_within: Matrix | None = None
    linear_unit: float = 1.0
    log_library: NDArray[np.float64] | None = None
    control_log_library: NDArray[np.float64] | None = None
    thinning: Thinning | None = None
    thinned: NDArray[np.float32] | None = None
    control_thinned: NDArray[np.float32] | None = None
    _cache: dict[Any, Any] = field(default_factory=dict, repr=False)

    # -- measuring --------------------------------------------------------------------------------------------------

    @classmethod
    def measure(
        cls,
        manager: AnnDataManager,
        rows: Rows,
        *,
        max_dose: NDArray[np.float64],
        n_contexts: int,
        seed: int = 0,
        linear: bool = False,
        dataset: CellDataset | None = None,
    ) -> ConditionTable:
        """Measure conditions in one pass over cells, in the order of `rows`.

        Cells of conditions that are sequenced more deeply than what they are compared with are read once more.

        Parameters
        ----------
        manager
            Registered data.
        rows
            Cells to use, ascending.
        max_dose
            Highest registered dose of each perturbation, ``(n_perturbations,)``.
        n_contexts
            Number of contexts.
        seed
            Of the halves and of the sample. Both follow the names of the cells: their order does not matter.
        linear
            Whether to measure counts per 10,000 before the logarithm, too.
        dataset
            The cells of `manager`, where they were opened already.
        """
        dataset = CellDataset(manager) if dataset is None else dataset
        rows = np.asarray(rows, dtype=np.int64)
        codes, dose = members(dataset.fields[KEYS.PERTURBATION][rows], max_dose)
        context, batch = (codes_of(dataset, key, rows) for key in (KEYS.CONTEXT, KEYS.BATCH))
        n_batches = int(dataset.fields[KEYS.BATCH].max(initial=0)) + 1 if KEYS.BATCH in dataset.fields else 1
        hashed, of_cells = _hashed(manager, rows, seed), slice(len(rows))
        kept = np.zeros(len(rows), dtype=bool)
        kept[np.argsort(hashed, kind="stable")[:_MAX_SAMPLE]] = True
        are_effects = dataset.expression.kind == EFFECTS
        if are_effects:  # the controls are 0: one for either half of each context, of which nothing is read
            zero = np.repeat(np.unique(context), 2)
            codes = np.pad(codes, ((0, len(zero)), (0, 0)), constant_values=CONTROL_ONLY)
            dose, batch, hashed = (np.pad(v, [(0, len(zero))] + [(0, 0)] * (v.ndim - 1)) for v in (dose, batch, hashed))
            context = np.append(context, zero)
        # codes first: controls, all of whose members are -1, sort before the treated
        keys = pd.DataFrame(np.concatenate([codes, dose, context[:, None]], axis=1))
        condition = keys.groupby(list(keys), sort=True).ngroup().to_numpy()
        _, first = np.unique(condition, return_index=True)
        codes, dose, context = codes[first], dose[first], context[first]
        is_control = (codes == CONTROL_ONLY).all(axis=1)
        group_key = condition * n_batches + np.where(is_control[condition], batch, 0)
        groups, group = np.unique(group_key, return_inverse=True)
        n_conditions, n_groups, group = len(codes), len(groups), group.ravel()

        half = _halves(condition, batch, hashed)
        sums = Sums(dataset, len(rows), n_groups, n_batches, linear and dataset.expression.kind == "counts")
        sums.add_all(rows, group, half, batch, kept)

        n = np.bincount(group * 2 + half, minlength=2 * n_groups).reshape(n_groups, 2)
        total = sums.total.reshape(n_groups, 2, -1)
        depth = sums.depth.reshape(n_groups, 2, 2)
        starts = np.searchsorted(groups // n_batches, np.arange(n_conditions))
        of_conditions = _Groups(*(np.add.reduceat(v, starts, axis=0) for v in (n, total, depth)))
        square = np.add.reduceat(sums.square, starts, axis=0)
        mean = of_conditions.total.sum(1) / of_conditions.n.sum(1)[:, None]
        within = np.maximum(square - of_conditions.n.sum(1)[:, None] * mean**2, 0.0)
        slope, spread = _regression(of_conditions, mean, within, sums)
        controls = np.flatnonzero(is_control[groups // n_batches])
        own = _Groups(n[controls], total[controls], depth[controls])
        known = np.isfinite(sums.log_library)
        log_library = (
            np.bincount(group[of_cells][known], sums.log_library[known], n_groups),
            np.bincount(group[of_cells][known], None, n_groups),
        )
        with np.errstate(invalid="ignore"):
            of_condition = np.divide(*(np.add.reduceat(v, starts) for v in log_library))
            of_controls = np.divide(*(v[controls] for v in log_library))
        linear_parts: dict[str, Any] = {}
        if sums.linear_total is not None:
            number = of_conditions.n.sum(1)[:, None]
            value = np.add.reduceat(sums.linear_total, starts, axis=0) / number
            rest = np.add.reduceat(sums.linear_square, starts, axis=0) - number * value**2
            linear_parts = {"linear_mean": value, "linear_within": np.maximum(rest, 0.0)}
        cells = np.bincount((condition * 2 + half) * n_batches + batch, minlength=n_conditions * 2 * n_batches)
        n_cells = max(len(rows), 1)
        overall = sums.total.sum(0) / n_cells
        batch_n = np.bincount(batch[of_cells], minlength=n_batches)
        batch_mean = sums.by_batch / np.maximum(batch_n, 1)[:, None] if n_batches > 1 else overall[None]
        table = cls(
            codes=codes,
            dose=dose,
            context=context,
            n=of_conditions.n,
            mean=of_conditions.means().astype(np.float32),
            within=within.astype(np.float32),
            depth=of_conditions.depths(),
            per_batch=cells.reshape(n_conditions, 2, n_batches),
            control_context=context[groups[controls] // n_batches],
            control_batch=groups[controls] % n_batches,
            control_n=own.n,
            control_mean=own.means().astype(np.float32),
            slope=slope,
            spread=spread,
            normalized=_moments(sums.total.sum(0), sums.square.sum(0), n_cells),
            raw=_moments(sums.raw, sums.raw_square, n_cells),
            batch_mean=np.where(batch_n[:, None] > 0, batch_mean, overall).astype(np.float32),
            batch_n=batch_n,
            sample=Sample(sums.sampled(), np.concatenate(sums.sample_depth), condition[of_cells][kept]),
            n_contexts=n_contexts,
            are_effects=are_effects,
            library=sums.library / n_cells,
            linear_unit=sums.unit / n_cells,
            log_library=of_condition,
            control_log_library=of_controls,
            **linear_parts,
        )
        place = np.full(n_groups, -1)
        place[controls] = np.arange(len(controls))
        return table._at_equal_depth(dataset, rows, condition, place[group], half)

    def _at_equal_depth(
        self, dataset: CellDataset, rows: Rows, condition: NDArray, control: NDArray, half: NDArray
    ) -> ConditionTable:
        """The table with what means change by at the depth of the shallower side; `control` is the group of controls of a cell."""
        treated = self.treated
        gap = np.zeros(len(treated))
        for own, groups, weight, _ in self._comparisons(None):
            gap[own] = self.log_library[treated[own]] - weight @ self.control_log_library[groups]
        if not np.isfinite(self.log_library).any():
            return self
        plan = Thinning.of(np.nan_to_num(gap), self.context[treated], self.n_contexts)
        log_p = np.zeros((len(self.codes), 1))
        log_p[treated, 0] = plan.treated
        deep = np.flatnonzero(log_p[condition, 0] < 0)
        thinned = changes(
            _counted(dataset, rows[deep]),
            log_p[condition[deep]],
            (condition * 2 + half)[deep],
            self.n.size,
            self.n_genes,
        )
        thinned = thinned.reshape(self.mean.shape) / np.maximum(self.n, 1)[..., None]
        here = self.context[condition]
        deep = np.flatnonzero((control >= 0) & (plan.step[here] < 0))
        steps, part = plan.steps[here[deep]], (control * 2 + half)[deep]
        of_controls = changes(_counted(dataset, rows[deep]), steps, part, self.control_n.size, self.n_genes)
        of_controls = of_controls.reshape(-1, *self.control_mean.shape) / np.maximum(self.control_n, 1)[..., None]
        return replace(
            self,
            thinning=plan,
            thinned=thinned.astype(np.float32),
            control_thinned=of_controls.astype(np.float32),
        )

    # -- what there is ----------------------------------------------------------------------------------------------

    @property
    def n_genes(self) -> int:
        """Number of genes."""
        return self.within.shape[1]

    @property
    def is_control(self) -> NDArray[np.bool_]:
        """Whether a condition is that of controls, ``(n_conditions,)``."""
        return (self.codes == CONTROL_ONLY).all(axis=1)

    @property
    def treated(self) -> NDArray[np.int64]:
        """Treated conditions: what the rows of :meth:`effects` are, ``(n_treated,)``."""
        return np.flatnonzero(~self.is_control)

    @property
    def members(self) -> list[tuple[int, ...]]:
        """Codes of the members of each treated condition."""
        return [tuple(c for c in line if c != CONTROL_ONLY) for line in self.codes[self.treated].tolist()]

    @property
    def has_control(self) -> NDArray[np.bool_]:
        """Whether a context has controls, ``(n_contexts,)``."""
        return np.isin(np.arange(self.n_contexts), self.context[self.is_control])

    @property
    def controls(self) -> Matrix:
        """Mean of the controls of each context, ``(n_contexts, n_genes)``; 0 where there are none."""
        result = np.zeros((self.n_contexts, self.n_genes))
        result[self.context[self.is_control]] = self.means(self.is_control)
        return result

    @property
    def control_halves(self) -> Matrix:
        """The same of either half of the controls, ``(2, n_contexts, n_genes)``; of all where a half has none."""
        result = np.repeat(self.controls[None], 2, axis=0)
        for i in np.flatnonzero(self.is_control):
            there = self.n[i] > 0
            result[there, self.context[i]] = self.mean[i, there]
        return result

    @property
    def control_moments(self) -> Moments:
        """Mean and variance over all controls."""
        own = self.is_control
        n, mean = self.n[own].sum(1)[:, None], self.means(own)
        overall = (n * mean).sum(0) / n.sum()
        between = (n * (mean - overall) ** 2).sum(0)
        return Moments(overall, (self.within[own].sum(0) + between) / n.sum())

    def means(self, conditions: NDArray) -> Matrix:
        """Mean of all cells of some conditions, ``(n, n_genes)``."""
        n = self.n[conditions][..., None].astype(np.float64)
        return (n * self.mean[conditions]).sum(1) / n.sum(1)

    # -- effects ----------------------------------------------------------------------------------------------------

    def effects(self, *, half: int | None = None, adjust_depth: bool = True) -> Effects:
        """Effects of all treated conditions.

        Treated cells are compared with the controls of their context, weighted by the batches of the treated cells; the
        share of the treated cells in batches without controls is compared with all controls of the context.

        Parameters
        ----------
        half
            0 or 1: of that half of the treated cells and of the controls; `None`: of all.
        adjust_depth
            Whether to compare at equal depth: the deeper side is thinned in expectation to the depth of the other.
        """
        key = (half, adjust_depth)
        if key not in self._cache:
            self._cache[key] = self._effects(half, adjust_depth)
        return self._cache[key]

    def _effects(self, half: int | None, adjust_depth: bool) -> Effects:
        treated, plan = self.treated, self.thinning if adjust_depth else None
        mean = _part(self.n, self.mean, half, treated)
        control_mean = _part(self.control_n, self.control_mean, half)
        if plan is not None:
            mean = mean + _part(self.n, self.thinned, half, treated)
            thinner = [_part(self.control_n, change, half) for change in self.control_thinned]
        effect, noise = np.zeros(mean.shape), np.full(len(treated), np.inf)
        variance = self._variances()
        of_control = dict(zip(self.context[self.is_control], np.flatnonzero(self.is_control), strict=True))
        se = np.full(mean.shape, np.inf)
        for own, groups, weight, n in self._comparisons(half):
            of_controls = (weight**2 / n[groups]).sum(1) * (not self.are_effects)
            effect[own] = mean[own] - weight @ control_mean[groups]
            if plan is not None:
                for share, change in zip(plan.weight[own].T, thinner, strict=True):
                    effect[own] -= share[:, None] * (weight @ change[groups])
            at, number = of_control[self.control_context[groups[0]]], _number(self.n, half, treated[own])
            noise[own] = 1.0 / number + of_controls
            se[own] = np.sqrt(variance[treated[own]] / number[:, None] + variance[at] * of_controls[:, None])
        return Effects(effect, noise, se)

    def _comparisons(self, half: int | None) -> Iterator[tuple[NDArray, NDArray, Matrix, NDArray]]:
        """Per context: places of treated conditions, groups of controls, weights of these, and number of cells of all groups."""
        treated = self.treated
        n, control_n = _number(self.n, half, treated), _number(self.control_n, half)
        cells = self.per_batch[treated]
        cells = cells.sum(1) if half is None else cells[:, half]
        for context in np.unique(self.context[self.is_control]):
            groups = np.flatnonzero((self.control_context == context) & (control_n > 0))
            own = np.flatnonzero((self.context[treated] == context) & (n > 0))
            if not len(groups) or not len(own):
                continue
            number = control_n[groups]
            weight = cells[own][:, self.control_batch[groups]] / n[own, None]
            # where a batch has no controls, all controls of the context stand in
            weight += (1.0 - weight.sum(1, keepdims=True)) * number / number.sum()
            yield own, groups, weight, control_n

    def _variances(self) -> Matrix:
        """Moderated variance within each condition, ``(n_conditions, n_genes)``."""
        certain = self.is_control & self.are_effects
        df = np.where(certain, 0.0, np.maximum(self.n.sum(1) - 1.0, 0.0))
        if not df.sum():
            if not self.are_effects:
                logger.warning("No condition has replicates: the standard errors of the means are not known.")
            return np.zeros(self.within.shape)
        pooled = self.within.sum(0, dtype=np.float64) / df.sum()
        return (self.within + _PRIOR_DF * pooled * ~certain[:, None]) / (df[:, None] + _PRIOR_DF)

    def pooled(
        self,
        which: NDArray[np.int64],
        n_rows: int,
        *,
        strength: NDArray[np.float64] | None = None,
        adjust_depth: bool = True,
    ) -> Halves:
        """Effects of perturbations: averages over contexts and doses by precision.

        Parameters
        ----------
        which
            Row of the result that each treated condition belongs to, -1 for none, ``(n_treated,)``.
        n_rows
            Number of rows.
        strength
            Dose response of each treated condition, ``(n_treated,)``: its effect is that many times the one sought. By
            default 1.
        adjust_depth
            See :meth:`effects`.

        Returns
        -------
        Effects in all cells and in either half; their noise is infinite where nothing was measured.
        """
        strength = np.ones(len(which)) if strength is None else np.asarray(strength, dtype=np.float64)
        parts = []
        for half in (None, 0, 1):
            found = self.effects(half=half, adjust_depth=adjust_depth)
            kept = np.flatnonzero((which >= 0) & found.measured & (strength > 0))
            weight = sparse.csr_matrix(
                (strength[kept] / found.noise[kept], (which[kept], kept)), shape=(n_rows, len(which))
            )
            precision = weight @ strength
            effect = (weight @ found.effect) / np.where(precision > 0, precision, 1.0)[:, None]
            parts.append((effect, np.divide(1.0, precision, out=np.full(n_rows, np.inf), where=precision > 0)))
        return Halves(*parts[0], tuple(parts[1:]))

    def programs(self) -> Matrix:
        """Loadings of genes on what varies together within conditions, in units of :attr:`spread`, ``(n_genes, k)``."""
        if "programs" not in self._cache:
            x = self.sample.x.toarray() if sparse.issparse(self.sample.x) else self.sample.x
            at = self.sample.condition
            n = self.n[..., None]
            depth = (n * self.depth).sum(1) / n.sum(1)
            left = x - self.means(at) - (self.sample.depth - depth[at]) @ self.slope
            self._cache["programs"] = principal_programs(left / self.spread)
        return self._cache["programs"]

    def condition_means(self) -> ConditionMeans:
        """Means of the conditions that have controls, and of the controls.

        The difference of a condition to the controls of its context is the effect that compares within batches at equal depth.

        Raises
        ------
        ValueError
            Where no perturbed cell shares its context with a control.
        """
        treated, has_control = self.treated, self.has_control
        kept = has_control[self.context[treated]]
        lost = int(self.n[treated[~kept]].sum())
        if not kept.any():
            raise ValueError(
                "`adata`: no perturbed training cell has a control of its context to compare with. "
                "Every context needs control cells; check `context_key`, `control` and the training rows."
            )
        if lost:
            logger.warning("%d perturbed cells are in contexts without control cells: they are not used.", lost)
        treated = treated[kept]
        n, squared = self.n.sum(1)[:, None], self._variances()
        control, found = self.controls, self.effects()
        mean = np.concatenate([control[self.context[treated]] + found.effect[kept], control])
        variance = np.zeros(mean.shape)
        variance[: len(treated)] = (squared / n)[treated]
        variance[len(treated) + self.context[self.is_control]] = (squared / n)[self.is_control]
        return ConditionMeans(
            self.codes[treated],
            self.dose[treated],
            self.context[treated],
            mean.astype(np.float32),
            variance.astype(np.float32),
            has_control,
        )


def members(encoded: NDArray, max_dose: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Codes and registered doses of cells, members without a dose left out.

    Parameters
    ----------
    encoded
        Component codes and relative doses side by side, ``(n_cells, 2 * order)``.
    max_dose
        Unit of the relative doses, per perturbation.

    Returns
    -------
    codes, dose
        Both ``(n_cells, order)``: members first, padded with -1 and 0.
    """
    codes, dose = np.split(np.asarray(encoded, dtype=np.float64), 2, axis=1)
    codes = codes.round().astype(np.int64)
    present = (codes != CONTROL_ONLY) & (dose > 0)
    unit = dose_units(max_dose)
    order = np.argsort(~present, axis=1, kind="stable")
    codes, dose = np.where(present, codes, CONTROL_ONLY), np.where(present, dose * unit[codes], 0.0)
    # relative doses are float32: give back the digits that were registered
    distinct, which = np.unique(dose, return_inverse=True)
    dose = np.array([float(f"{d:.6g}") for d in distinct])[which].reshape(codes.shape)
    return np.take_along_axis(codes, order, 1), np.take_along_axis(dose, order, 1)


def halves(manager: AnnDataManager, rows: Rows, condition: NDArray, batch: NDArray, seed: int = 0) -> NDArray[np.int64]:
    """Half of each cell, 0 or 1, as in a :class:`ConditionTable` of the same seed.

    Parameters
    ----------
    manager
        Registered data.
    rows
        Cells: all of each condition.
    condition, batch
        Of each cell.
    seed
        Of the halves.
    """
    return _halves(condition, batch, _hashed(manager, rows, seed))


def _hashed(manager: AnnDataManager, rows: Rows, seed: int) -> NDArray[np.uint64]:
    """Random numbers that follow the names of the cells."""
    names = np.asarray(manager.adata.obs_names.astype(str), dtype=object)[rows]
    return pd.util.hash_array(names, hash_key=f"{seed:016d}"[-16:], categorize=False)


class _Groups(NamedTuple):
    """Number of cells and sums of expression and depth in either half of groups of cells."""

    n: NDArray[np.int64]
    total: Matrix
    depth: Matrix

    def means(self) -> Matrix:
        return self.total / np.maximum(self.n, 1)[..., None]

    def depths(self) -> Matrix:
        return self.depth / np.maximum(self.n, 1)[..., None]


def _halves(condition: NDArray, batch: NDArray, hashed: NDArray) -> NDArray[np.int64]:
    """Half of each cell: every other one, in the order of the hashes, within a condition, batch after batch."""
    order = np.lexsort((hashed, batch, condition))
    ranked = condition[order]
    start = np.searchsorted(ranked, ranked)
    half = np.empty(len(condition), dtype=np.int64)
    half[order] = (np.arange(len(order)) - start + 1) % 2
    return half


def _moments(total: NDArray, square: NDArray, n: int) -> Moments:
    return Moments(total / n, np.maximum(square / n - (total / n) ** 2, 0.0))


def _regression(groups: _Groups, mean: Matrix, within: Matrix, sums: Sums) -> tuple[Matrix, NDArray[np.float64]]:
    """Slope of expression on the depth regressors within conditions, and the sd that is left."""
    n = groups.n.sum(1)
    depth = groups.depth.sum(1) / n[:, None]
    qq = sums.depth_square - (depth * n[:, None]).T @ depth
    qx = sums.depth_x - (depth * n[:, None]).T @ mean
    freedom = max(int((n - 1).sum()), 1)
    slope = np.zeros_like(qx)
    if freedom > 20 and np.linalg.eigvalsh(qq)[0] > 1e-6 * freedom:
        slope = np.linalg.solve(qq, qx)
    return slope, np.sqrt(np.maximum((within.sum(0) - (slope * qx).sum(0)) / freedom, 1e-8))


def _number(n: NDArray[np.int64], half: int | None, at: Any = slice(None)) -> NDArray[np.float64]:
    """Number of all cells or of those of one half."""
    return (n[at].sum(1) if half is None else n[at][:, half]).astype(np.float64)


def _part(n: NDArray[np.int64], mean: NDArray, half: int | None, at: Any = slice(None)) -> Matrix:
    """Means of all cells or of those of one half."""
    n, mean = n[at].astype(np.float64), mean[at].astype(np.float64)
    if half is not None:
        return mean[:, half]
    return ((n / np.maximum(n.sum(1, keepdims=True), 1))[..., None] * mean).sum(1)


def _counted(dataset: CellDataset, rows: Rows) -> Iterator[Counted]:
    """Counts of some cells, recovered where normalized ones are registered."""
    for chunk in chunks(dataset, rows):
        if dataset.expression.kind == "counts":
            yield Counted(chunk.positions, chunk.raw, TARGET_SUM / chunk.library)
        elif (found := counts_of(chunk.raw)) is not None:
            yield Counted(chunk.positions, *found)
