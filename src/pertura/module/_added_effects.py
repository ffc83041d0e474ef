"""Measured mean effects, and modules that add an effect on mean expression to the cells themselves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor, nn

from pertura.data._constants import CONTROL_ONLY, DOSE_TOLERANCE, UNKNOWN
from pertura.data._vocabulary import dose_units
from pertura.effects import Asked, ConditionMeans, Conditions, ConditionTable, Transfer
from pertura.nn._likelihoods import Point

from ._base import Action, Basal, Cells, Counterfactual, Globals, PerturbationModule

_TARGET_SUM = 1e4


# -- buffers whose size the data decide ---------------------------------------------------------------------------------


def add_buffers(module: nn.Module, **buffers: Tensor) -> None:
    """Register buffers that take the size of what is set or loaded."""
    if not hasattr(module, "_resized"):
        module._resized = ()
        module.register_load_state_dict_pre_hook(_take_sizes)
    module._resized += tuple(buffers)
    for name, value in buffers.items():
        module.register_buffer(name, value)


def set_buffer(module: nn.Module, name: str, value: Any) -> None:
    """Replace a buffer by one of another size."""
    setattr(module, name, torch.as_tensor(value).to(getattr(module, name)))


def _take_sizes(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    for name in module._resized:
        if prefix + name in state_dict:
            set_buffer(module, name, torch.empty_like(state_dict[prefix + name]))


# -- measured effects ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Distinct:
    """The distinct perturbations and contexts of some cells.

    Attributes
    ----------
    asked
        Perturbations.
    action
        The same as an action, one row each.
    context
        Codes of the contexts, ``(n_distinct,)``; from the number of training contexts on, those of the query.
    which
        Row of each cell in them, ``(n_cells,)``.
    """

    asked: list[Asked]
    action: Action
    context: NDArray[np.int64]
    which: Tensor


class KnownConditions(nn.Module):
    """The conditions that something is known of.

    Parameters
    ----------
    **more
        Buffers beside them, whose size is that of what is set.
    """

    def __init__(self, **more: Tensor) -> None:
        super().__init__()
        add_buffers(
            self,
            codes=torch.zeros(0, 1, dtype=torch.long),
            dose=torch.zeros(0, 1),
            context=torch.zeros(0, dtype=torch.long),
            max_dose=torch.zeros(0),
            **more,
        )
        self._cache: tuple[Tensor, dict[str, Any]] = (self.codes, {})

    def __len__(self) -> int:
        return len(self.codes)

    @property
    def n_contexts(self) -> int:
        """Number of contexts."""
        return int(self.context.max()) + 1 if len(self) else 0

    @property
    def cache(self) -> dict[str, Any]:
        """What was derived from the conditions since they were set or loaded."""
        if self._cache[0] is not self.codes:
            self._cache = (self.codes, {})
        return self._cache[1]

    @property
    def unit(self) -> NDArray[np.float64]:
        """Unit of the relative doses of each perturbation; see :func:`pertura.data._vocabulary.dose_units`."""
        return dose_units(self.max_dose.cpu().numpy())

    @property
    def conditions(self) -> Conditions:
        """The conditions."""
        if "conditions" not in self.cache:
            codes, dose, context = (b.cpu().numpy() for b in (self.codes, self.dose, self.context))
            self.cache["conditions"] = Conditions(codes, dose.astype(np.float64), context, self.n_contexts)
        return self.cache["conditions"]

    def distinct(self, action: Action, context: Tensor) -> Distinct:
        """The distinct pairs of perturbation and context among cells."""
        parts = [action.codes.double(), action.dose.double(), context[:, None].double()]
        described = action.features is not None and action.any_unknown
        if described:
            parts.append(action.features.flatten(1).double())
        keys = torch.cat(parts, dim=1).cpu().numpy()
        rows, first, which = np.unique(keys, axis=0, return_index=True, return_inverse=True)
        order = action.codes.shape[1]
        codes = rows[:, :order].astype(np.int64)
        dose = rows[:, order : 2 * order] * self.unit[codes]
        features = rows[:, 2 * order + 1 :].reshape(len(rows), order, -1) if described else [None] * len(rows)
        asked = [self.conditions.ask(*one) for one in zip(codes, dose, features, strict=True)]
        return Distinct(
            asked,
            action[torch.as_tensor(first, device=action.codes.device)],
            rows[:, 2 * order].astype(np.int64),
            torch.as_tensor(which.ravel(), device=self.codes.device),
        )


class MeasuredMeans(KnownConditions):
    """Means of the training conditions and of their controls, and weighted sums of the differences.

    Parameters
    ----------
    n_genes, n_contexts
        Sizes of the data.
    max_dose
        Highest registered dose of each perturbation, ``(n_perturbations,)``.
    """

    def __init__(self, n_genes: int, n_contexts: int, max_dose: NDArray[np.float64]) -> None:
        super().__init__(
            mean=torch.zeros(0, n_genes),
            variance=torch.zeros(0, n_genes),
            has_control=torch.zeros(n_contexts, dtype=torch.bool),
        )
        self.n_genes = n_genes
        set_buffer(self, "max_dose", np.asarray(max_dose, dtype=np.float32))

    @torch.no_grad()
    def set(self, means: ConditionMeans) -> None:
        """Take over the means of the training data."""
        for name in ("codes", "dose", "context", "mean", "variance", "has_control"):
            set_buffer(self, name, getattr(means, name))

    @property
    def n_contexts(self) -> int:
        """Number of contexts."""
        return len(self.has_control)

    @property
    def control(self) -> Tensor:
        """Control profiles of the training contexts, ``(n_contexts, n_genes)``; where there were none, their mean."""
        own = self.mean[len(self.context) :]
        return torch.where(self.has_control[:, None], own, own[self.has_control].mean(0))

    @property
    def effect(self) -> Tensor:
        """Measured effects, ``(n_conditions, n_genes)``."""
        n = len(self.context)
        return self.mean[:n] - self.mean[n:][self.context]

    def sums(self, weights: NDArray[np.float64]) -> tuple[Tensor, Tensor]:
        """Weighted sums of measured effects and their sampling variances, ``(n, n_genes)``; weights ``(n, n_conditions)``."""
        weights = self.of_means(weights)
        return self.product(weights, self.mean), self.product(weights**2, self.variance)

    def transfer(self, elsewhere: Callable[[Asked, int], NDArray[np.float64]]) -> Transfer:
        """What known effects of a context say of its others; `elsewhere` as in :class:`~pertura.effects.Transfer`."""
        n, effect = len(self.context), self.effect
        of_mean = self.variance.mean(1)
        products = effect @ effect.mT / max(self.n_genes, 1)
        values = (v.double().cpu().numpy() for v in (products, of_mean[:n], of_mean[n:][self.context]))
        return Transfer(self.conditions, *values, elsewhere)

    def of_means(self, weights: NDArray[np.float64]) -> NDArray[np.float64]:
        """Weights of treated and control means: effects of one context share its control, and the error of it."""
        control = np.zeros((len(weights), self.n_contexts))
        np.add.at(control.T, self.conditions.context, -weights.T)
        return np.concatenate([weights, control], axis=1)

    def distances(self, weights: NDArray[np.float64], context: NDArray[np.int64], control: Tensor) -> Tensor:
        """What control profiles have more than those of the contexts that weighted sums of effects come from.

        Parameters
        ----------
        weights
            Of measured effects, ``(n, n_conditions)``.
        context
            Codes of the contexts, ``(n,)``.
        control
            Profiles of all of them, ``(n_all_contexts, n_genes)``.

        Returns
        -------
        ``(n, n_genes)``, times the sum of the weights.
        """
        total = torch.as_tensor(weights.sum(1), dtype=control.dtype, device=control.device)
        own = self.of_means(weights)
        own[:, : len(self.context)] = 0.0
        return total[:, None] * control[context] + self.product(own, self.mean)

    @staticmethod
    def product(weights: NDArray[np.float64], values: Tensor) -> Tensor:
        """Product with weights most of which are 0."""
        entries = sparse.coo_array(weights)
        matrix = torch.sparse_coo_tensor(
            torch.as_tensor(np.stack(entries.coords)),
            torch.as_tensor(entries.data, dtype=values.dtype),
            weights.shape,
            check_invariants=True,
        )
        return torch.sparse.mm(matrix.to(values.device), values)


def split_controls(
    means: MeasuredMeans, table: ConditionTable
) -> list[tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """Control profiles and effects that do not share their noise: half of the controls is in either.

    The noise of a control profile is in the effect of the same controls, with the opposite sign: what predicts one from the other
    would take it for a relation.

    Parameters
    ----------
    means, table
        What was measured.

    Returns
    -------
    Twice, with the halves exchanged: profiles, ``(n_contexts, n_genes)``, and effects, ``(n_conditions, n_genes)``. Where a half
    has no controls, those of the other stand in.
    """
    control, effect = (v.double().cpu().numpy() for v in (means.control, means.effect))
    profiles = np.where(table.has_control[:, None], table.control_halves, control)
    own = means.conditions.context
    return [(profiles[half], effect + (control - profiles[1 - half])[own]) for half in (0, 1)]


# -- cells --------------------------------------------------------------------------------------------------------------


def add_effect(x: Tensor, effect: Tensor, control: Tensor, which: Tensor, nonnegative: bool) -> Tensor:
    """Cells with an effect on mean expression.

    Where expression is never negative an increase is added to every cell, and a decrease scales it, by what the mean over
    the controls of its context is scaled: so no expression falls below 0, and the mean over the controls moves by exactly
    the effect (but not below 0). Elsewhere the effect is added.

    Parameters
    ----------
    x
        Expression, ``(n_draws, n_cells, n_genes)``.
    effect
        Distinct effects, ``(n_draws, n_distinct, n_genes)``.
    control
        Mean of the controls of their contexts, ``(n_distinct, n_genes)``.
    which
        Effect of each cell, ``(n_cells,)``.
    nonnegative
        Whether expression is never negative.
    """

    def rows(values: Tensor) -> Tensor:
        # where all cells have the same, it is not copied
        return values if values.shape[1] == 1 else values[:, which]

    if not nonnegative:
        return x + rows(effect)
    factor = (1.0 + effect.clamp(max=0.0) / control.clamp(min=1e-6)).clamp(min=0.0)
    return x * rows(factor) + rows(effect.clamp(min=0.0))


class MovedCells(Point):
    """Expression of cells that an effect was added to: where it did not change, it is what was measured, without rounding.

    Parameters
    ----------
    value
        Expression, ``(n_draws, n_cells, n_genes)``.
    native_scale
        ``"log1p"`` or ``"layer"``.
    own
        The cells' own on the same scale, ``(n_cells, n_genes)``.
    measured
        The cells' own as registered, ``(n_cells, n_genes)``.
    """

    def __init__(self, value: Tensor, native_scale: str, own: Tensor, measured: Tensor) -> None:
        super().__init__(value, native_scale)
        self.own, self.measured = own, measured

    def expectation(self, scale: str | None = None, depth: Tensor | None = None) -> Tensor:
        """Expression on a scale; see :meth:`pertura.nn._likelihoods.Point.expectation`."""
        x = super().expectation(scale, depth)
        return torch.where(self.v == self.own, self.measured, x) if scale == "counts" else x

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Refused: how cells vary around their mean is not modeled.

        Raises
        ------
        ValueError
            Always.
        """
        raise ValueError(
            "This model predicts effects on mean expression: it has no distribution of single cells to draw from or to "
            "evaluate. Use `predict_perturbation`, or a generative model such as model.SAMSVAE."
        )


class AddedEffectModule(PerturbationModule):
    """A module that adds an effect on mean expression to a cell; a subclass says which one in :meth:`effects`.

    There is no latent space: the basal state is the expression of a cell without the mean effect of its own perturbation,
    ``(n_cells, n_genes)``. Nor is there a distribution of cells around their mean.

    Parameters
    ----------
    n_genes, n_contexts
        Sizes of the data.
    max_dose
        Highest registered dose of each perturbation, ``(n_perturbations,)``.
    native_scale
        ``"log1p"`` for counts, else ``"layer"``.
    """

    def __init__(self, n_genes: int, n_contexts: int, max_dose: NDArray[np.float64], native_scale: str) -> None:
        super().__init__()
        self.n_genes, self.n_contexts, self.native_scale = n_genes, n_contexts, native_scale
        self.nonnegative = native_scale == "log1p"
        self.means = MeasuredMeans(n_genes, n_contexts, max_dose)

    def effects(self, asked: Distinct, globals_: Globals) -> tuple[Tensor, Tensor]:
        """Mean and variance of the effects of distinct perturbations in distinct contexts, ``(n_distinct, n_genes)`` each."""
        raise NotImplementedError

    def affinity(self, control: Tensor) -> NDArray[np.float64]:
        """How alike contexts with these control profiles and those of training are, ``(n, n_contexts)``."""
        raise NotImplementedError

    @property
    def conditions(self) -> Conditions:
        """The measured conditions."""
        return self.means.conditions

    def normalized(self, cells: Cells) -> Tensor:
        """Counts as log1p of counts per 10,000; other values as they are."""
        return torch.log1p(cells.x * (_TARGET_SUM / cells.library)) if self.native_scale == "log1p" else cells.x

    # -- counterfactuals --------------------------------------------------------------------------------------------

    def draw_globals(self, n_draws: int, cells: Cells | None = None) -> Globals:
        """Standard normal deviates of the mean effects, and what is known of the training contexts.

        The deviates of a gene are equally spaced quantiles in random order: their mean is 0 and their standard
        deviation 1, so that predictions have no Monte Carlo error.
        """
        control = self.means.control
        deviate = torch.special.ndtri((torch.arange(n_draws, dtype=torch.float64) + 0.5) / n_draws)
        if n_draws > 1:
            deviate = deviate / deviate.std()
        order = torch.rand(n_draws, self.n_genes).argsort(0)
        return {
            "deviate": deviate.float()[order].to(control.device),
            "control": control,
            "affinity": self.affinity(control),
        }

    def abduct(self, cells: Cells, n_draws: int, globals_: Globals) -> Basal:
        """Take the mean effect of a cell's own perturbation off its expression.

        Closed-form effects have no guide to trace. What rounding and the floor at 0 leave is kept as ``"residual"``.
        """
        x = self.normalized(cells)
        basal = Basal(cells, x.expand(n_draws, *x.shape), globals_=globals_, n_draws=n_draws)
        basal.latents["residual"] = x.new_zeros(n_draws, len(cells), 1)
        if cells.action.present.any():
            effect, control, which = self._drawn(cells.action, cells.context, globals_)
            basal.state = basal.state - effect[:, which]
            moved = add_effect(basal.state, effect, control, which, self.nonnegative)
            basal.latents["residual"] = x - moved
        return basal

    def counterfactual(self, basal: Basal, action: Action) -> Counterfactual:
        """Add the effect of another perturbation; under its own, a cell is as it was measured."""
        cells, own = basal.cells, self.normalized(basal.cells)
        drawn = self._drawn(action, cells.context, basal.globals_)
        state = add_effect(basal.state, *drawn, self.nonnegative)
        x = state + basal.latents["residual"]
        x = x.clamp(min=0.0) if self.nonnegative else x
        x = torch.where(_same(action, cells.action)[:, None], own, x)
        return Counterfactual(state, MovedCells(x, self.native_scale, own, cells.x))

    def log_weights(self, cells: Cells, n_draws: int, globals_: Globals) -> Tensor:
        """Refused, as are draws of cells.

        Raises
        ------
        ValueError
            Always.
        """
        own = self.normalized(cells)
        return MovedCells(own[None], self.native_scale, own, cells.x).sample()

    def _drawn(self, action: Action, context: Tensor, globals_: Globals) -> tuple[Tensor, Tensor, Tensor]:
        """Draws of distinct effects, ``(n_draws, n_distinct, n_genes)``, control profiles, and the row of each cell."""
        asked = self.means.distinct(action, context)
        mean, variance = self.effects(asked, globals_)
        effect = mean + variance.clamp(min=0.0).sqrt() * globals_["deviate"][:, None, :]
        return effect, globals_["control"][asked.context], asked.which


def _same(one: Action, other: Action) -> Tensor:
    """Whether two actions do the same to a cell, ``(n_cells,)``; of unknown perturbations it is not known."""
    width = max(one.codes.shape[1], other.codes.shape[1])
    codes, dose = [], []
    for action in (one, other):
        present = action.present
        padding = (0, width - present.shape[1])
        own = F.pad(torch.where(present, action.codes, CONTROL_ONLY), padding, value=CONTROL_ONLY)
        own, order = own.sort(dim=1)
        codes.append(own)
        dose.append(F.pad(action.dose * present, padding).gather(1, order))
    alike = (codes[0] == codes[1]) & (codes[0] != UNKNOWN) & torch.isclose(*dose, rtol=DOSE_TOLERANCE, atol=0.0)
    return alike.all(1)
