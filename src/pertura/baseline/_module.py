"""Counterfactuals from measured mean effects: what all baselines share."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor

from pertura.data._vocabulary import dose_units
from pertura.effects._contexts import Asked, Conditions, profile_correlations
from pertura.effects._table import ConditionMeans
from pertura.module._base import Action, Basal, Cells, PerturbationModule

_TARGET_SUM = 1e4


class BaselineModule(PerturbationModule):
    """Adds a mean effect, a weighted sum of measured ones, to the expression of a cell.

    A subclass says in :meth:`combine` with which weights; means, standard errors, doses and cells are dealt with here.

    On the scale log1p an increase is added to every cell, and a decrease scales it, by what the mean over the controls
    of its context is scaled: so no expression falls below 0, and the mean over the controls moves by exactly the effect
    (but not below 0).

    Parameters
    ----------
    n_genes, n_contexts
        Sizes of the data.
    max_dose
        Highest registered dose of each perturbation, ``(n_perturbations,)``.
    native_scale
        ``"log1p"`` for counts, else ``"layer"``.
    """

    # set by a fit: their sizes are not known before
    _fitted = ("mean", "variance", "codes", "dose", "context", "has_control")

    def __init__(self, n_genes: int, n_contexts: int, max_dose: NDArray[np.float64], native_scale: str) -> None:
        super().__init__()
        self.n_genes, self.n_contexts = n_genes, n_contexts
        self.native_scale = native_scale
        self.register_buffer("max_dose", torch.as_tensor(np.asarray(max_dose, dtype=np.float32)))
        empty = {
            "mean": torch.zeros(0, n_genes),
            "variance": torch.zeros(0, n_genes),
            "codes": torch.zeros(0, 1, dtype=torch.long),
            "dose": torch.zeros(0, 1),
            "context": torch.zeros(0, dtype=torch.long),
            "has_control": torch.zeros(n_contexts, dtype=torch.bool),
        }
        for name, value in empty.items():
            self.register_buffer(name, value)
        self._derived: dict[str, Any] = {}

    # -- estimator --------------------------------------------------------------------------------------------------

    def combine(self, asked: Asked, context: int, affinity: NDArray[np.float64]) -> NDArray[np.float64]:
        """Weight of each measured effect in the asked one, ``(n_conditions,)``.

        Parameters
        ----------
        asked
            The perturbation, not the control.
        context
            Code of the context; at least `n_contexts` where training did not have it.
        affinity
            Its row of :meth:`affinity`.
        """
        raise NotImplementedError

    def _nothing(self) -> NDArray[np.float64]:
        """The weights that give no effect."""
        return np.zeros(len(self.conditions))

    def affinity(self, control: Tensor) -> Tensor:
        """How alike contexts are: correlation of control profiles with those of training, ``(n, n_contexts)``, on CPU."""
        return torch.as_tensor(profile_correlations(control.cpu().numpy(), self.control.cpu().numpy()))

    def representable(self, asked: Asked) -> bool:
        """Whether the estimator has a way to predict a perturbation."""
        return True

    # -- fit --------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def fit(self, means: ConditionMeans) -> None:
        """Take over the means of the training data."""
        for name in BaselineModule._fitted:
            self._set(name, getattr(means, name))
        self._derived = {}

    def _set(self, name: str, value: Any) -> None:
        """Replace a buffer by one of another size."""
        setattr(self, name, torch.as_tensor(value).to(getattr(self, name)))

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        for name in self._fitted:
            if prefix + name in state_dict:
                self._set(name, torch.empty_like(state_dict[prefix + name]))
        self._derived = {}
        super()._load_from_state_dict(state_dict, prefix, *args)

    @property
    def conditions(self) -> Conditions:
        """The measured conditions."""
        if "conditions" not in self._derived:
            codes, dose, context = (b.cpu().numpy() for b in (self.codes, self.dose, self.context))
            self._derived["conditions"] = Conditions(codes, dose.astype(np.float64), context, self.n_contexts)
        return self._derived["conditions"]

    @property
    def control(self) -> Tensor:
        """Control profiles of the training contexts, ``(n_contexts, n_genes)``; where there were none, their mean."""
        own = self.mean[len(self.context) :]
        return torch.where(self.has_control[:, None], own, own[self.has_control].mean(0))

    # -- effects ----------------------------------------------------------------------------------------------------

    def effects(
        self, action: Action, context: Tensor, affinity: Tensor
    ) -> tuple[Tensor, Tensor, NDArray[np.int64], NDArray[np.int64]]:
        """Mean and standard error of the effects of distinct perturbations in distinct contexts.

        Returns
        -------
        mean, sd, contexts, which
            ``(n_distinct, n_genes)`` twice, codes of the contexts, ``(n_distinct,)``, and the row of each cell in them,
            ``(n_cells,)``.
        """
        asked, contexts, which = self._distinct(action, context)
        table = affinity.numpy()
        rows = [
            self.combine(a, int(c), table[c]) if len(a.codes) else self._nothing()
            for a, c in zip(asked, contexts, strict=True)
        ]
        mean, variance = self._weighted(np.stack(rows))
        return mean, variance.clamp(min=0.0).sqrt(), contexts, which

    def _distinct(self, action: Action, context: Tensor) -> tuple[list[Asked], NDArray[np.int64], NDArray[np.int64]]:
        parts = [action.codes.double(), action.dose.double(), context[:, None].double()]
        described = action.features is not None and action.any_unknown
        if described:
            parts.append(action.features.flatten(1).double())
        keys = torch.cat(parts, dim=1).cpu().numpy()
        rows, which = np.unique(keys, axis=0, return_inverse=True)
        order = action.codes.shape[1]
        codes = rows[:, :order].astype(np.int64)
        dose = rows[:, order : 2 * order] * dose_units(self.max_dose.cpu().numpy())[codes]
        features = rows[:, 2 * order + 1 :].reshape(len(rows), order, -1) if described else [None] * len(rows)
        asked = [self.conditions.ask(*one) for one in zip(codes, dose, features, strict=True)]
        return asked, rows[:, 2 * order].astype(np.int64), which.ravel()

    def _weighted(self, weights: NDArray[np.float64]) -> tuple[Tensor, Tensor]:
        """Weighted sums of measured effects and their sampling variances, ``(n, n_genes)``."""
        weights = self._of_means(weights)
        return self._product(weights, self.mean), self._product(weights**2, self.variance)

    def _of_means(self, weights: NDArray[np.float64]) -> NDArray[np.float64]:
        """Weights of treated and control means: effects of one context share its control, and the error of it."""
        control = np.zeros((len(weights), self.n_contexts))
        np.add.at(control.T, self.conditions.context, -weights.T)
        return np.concatenate([weights, control], axis=1)

    def _product(self, weights: NDArray[np.float64], values: Tensor) -> Tensor:
        """Product with weights most of which are 0."""
        entries = sparse.coo_array(weights)
        index = np.stack(entries.coords)
        matrix = torch.sparse_coo_tensor(
            torch.as_tensor(index),
            torch.as_tensor(entries.data, dtype=values.dtype),
            weights.shape,
            check_invariants=True,
        )
        return torch.sparse.mm(matrix.to(values.device), values)

    # -- counterfactuals --------------------------------------------------------------------------------------------

    def draw_globals(self, n_samples: int) -> dict[str, Tensor]:
        """Standard normal deviates of the mean effects, and what is known of the training contexts.

        The deviates of a gene are equally spaced quantiles in random order: their mean is 0 and their standard
        deviation 1, so that predictions have no Monte Carlo error.
        """
        control = self.control
        share = (torch.arange(n_samples, dtype=torch.float64) + 0.5) / n_samples
        deviate = torch.special.ndtri(share)
        if n_samples > 1:
            deviate = deviate / deviate.std()
        order = torch.rand(n_samples, self.n_genes).argsort(0)
        return {
            "deviate": deviate.float()[order].to(control.device),
            "control": control,
            "affinity": self.affinity(control),
        }

    def abduct(self, cells: Cells, n_samples: int, globals_: dict[str, Tensor]) -> Basal:
        """Basal state: the cell's own expression without the mean effect of its own perturbation.

        The noise is what brings the cell back to its own expression under its own perturbation.
        """
        x = cells.x
        if self.native_scale == "log1p":
            x = torch.log1p(x * (_TARGET_SUM / cells.library))
        z = x.expand(n_samples, *x.shape)
        noise = x.new_zeros(n_samples, len(cells), 1)
        if cells.action.present.any():
            effect, control, which = self._drawn(cells.action, cells.context, globals_)
            z = z - effect[:, which]
            noise = x - self._move(z, effect, control, which)
        return Basal(z, noise, cells.context, cells.batch, cells.library)

    def act(self, basal: Basal, action: Action, globals_: dict[str, Tensor]) -> Tensor:
        """Expression under the perturbation."""
        return self._move(basal.z, *self._drawn(action, basal.context, globals_))

    def decode(self, z: Tensor, basal: Basal) -> Tensor:
        """Expression on :attr:`native_scale`; log1p of counts is not negative."""
        x = z + basal.noise
        return x.clamp(min=0.0) if self.native_scale == "log1p" else x

    def fresh_noise(self, z: Tensor, basal: Basal) -> Tensor:
        """Refused: how cells vary around their mean is not modeled.

        Raises
        ------
        ValueError
            Always.
        """
        raise ValueError(
            "A baseline has no distribution of single cells to draw from. Use `predict_perturbation`, or a model."
        )

    def _drawn(self, action: Action, context: Tensor, globals_: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Draws of distinct effects, ``(n_samples, n_distinct, n_genes)``, control profiles, and the row of each cell."""
        mean, sd, contexts, which = self.effects(action, context, globals_["affinity"])
        effect = mean + sd * globals_["deviate"][:, None, :]
        return effect, globals_["control"][contexts], torch.as_tensor(which, device=mean.device)

    def _move(self, z: Tensor, effect: Tensor, control: Tensor, which: Tensor) -> Tensor:
        """Cells, ``(n_samples, n_cells, n_genes)``, with the effects in row `which` of the distinct ones."""
        if self.native_scale != "log1p":
            return z + _rows(effect, which)
        factor = (1.0 + effect.clamp(max=0.0) / control.clamp(min=1e-6)).clamp(min=0.0)
        return z * _rows(factor, which) + _rows(effect.clamp(min=0.0), which)


def _rows(values: Tensor, which: Tensor) -> Tensor:
    """Row of each cell; where all cells have the same, it is not copied."""
    return values if values.shape[1] == 1 else values[:, which]
