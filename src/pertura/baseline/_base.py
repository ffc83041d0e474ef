"""What the baselines share: training in one pass, closed-form effects, contexts learned from the query."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any, ClassVar

import numpy as np
import torch
from anndata import AnnData
from scvi.data import AnnDataManager

from pertura.data._constants import UNKNOWN
from pertura.data._perturbation import Perturbation
from pertura.data._vocabulary import Vocabulary
from pertura.effects._contexts import Asked, Conditions
from pertura.effects._discrepancy import Discrepancy
from pertura.effects._sums import control_means
from pertura.effects._table import ConditionTable
from pertura.model._base import PerturbationModel

from ._module import BaselineModule

logger = logging.getLogger(__name__)

# arguments of training that change no result
_HARMLESS = {"accelerator", "devices", "enable_progress_bar"}


def check_positive(name: str, value: Any) -> None:
    """Raise unless an argument is a finite number above 0."""
    number = isinstance(value, (int, float, np.number)) and not isinstance(value, bool)
    if not number or not 0 < value < np.inf:
        raise ValueError(f"`{name}` must be a number above 0, got {value!r}.")


class Baseline(PerturbationModel):
    """Base of the baselines.

    A baseline is trained, asked, saved and loaded like every model. Its effects are weighted sums of those measured
    in training: differences between the means of perturbed and control cells of a context, on the scale log1p of
    counts per 10,000 for counts and on the registered one for other data. Their standard errors make its intervals,
    together with the distance from measured effects that every model learns after training.

    A baseline has no latent space: its basal state is the expression of a cell without the mean effect of the cell's
    own perturbation, ``(n_cells, n_genes)``. It has no distribution of cells around their mean either, so that
    ``posterior_predictive_sample`` is refused. Perturbed cells are compared with controls of their own batches, where there
    are any.

    Parameters
    ----------
    adata
        Set up by :meth:`setup_anndata`; `None` to make a baseline of a `registry` alone.
    registry
        Registry of a saved baseline.
    **options
        Of the estimator.
    """

    _draws_effects = True

    _module_cls: ClassVar[type[BaselineModule]] = BaselineModule
    module: BaselineModule

    def __init__(self, adata: AnnData | None = None, registry: dict | None = None, **options: Any) -> None:
        super().__init__(adata, registry)
        self.module = self._module_cls(
            n_genes=len(self.gene_names),
            n_contexts=len(self.contexts),
            max_dose=np.asarray(self.vocabulary.max_dose, dtype=np.float64),
            native_scale="log1p" if self.data_kind == "counts" else "layer",
            **self._module_options(),
            **options,
        )
        self._model_summary_string = (
            f"{type(self).__name__}: {self.vocabulary.n_perturbations} perturbations, {len(self.contexts)} contexts"
        )

    def _module_options(self) -> dict[str, Any]:
        """What the estimator takes from the registered data."""
        return {}

    def _features(self) -> np.ndarray | None:
        """Registered features of the vocabulary's perturbations, ``(n_perturbations, n_features)``."""
        vocabulary = self.vocabulary
        return None if vocabulary.features is None else vocabulary.feature_matrix(vocabulary.names)

    # -- training ---------------------------------------------------------------------------------------------------

    def train(
        self,
        max_epochs: int | None = None,
        *,
        train_size: float | None = None,
        validation_size: float | None = None,
        seed: int | None = None,
        datasplitter_kwargs: dict[str, Any] | None = None,
        **trainer_kwargs: Any,
    ) -> None:
        """Fit the baseline in one pass over the training cells.

        Parameters
        ----------
        max_epochs
            There are no epochs: taken so that a baseline can stand in for a model, with a warning that it has no
            effect.
        train_size, validation_size
            Fractions of the cells; by default all cells train.
        seed
            Of the split; by default ``scvi.settings.seed``, else 0.
        datasplitter_kwargs
            ``{"external_indexing": [train, validation, test]}`` imposes a split by row numbers.
        **trainer_kwargs
            Further arguments of :meth:`pertura.model.PerturbationModel.train`: taken like `max_epochs`, those about
            the device and the progress bar without the warning.

        Raises
        ------
        ValueError
            Where no perturbed training cell has a control in its context.
        """
        if self.adata is None:
            raise ValueError("`adata`: the model was loaded without data. Load it with `adata=` to train it.")
        unused = sorted({*trainer_kwargs, *(["max_epochs"] if max_epochs is not None else [])} - _HARMLESS)
        if unused:
            logger.warning("%s is fitted in one pass: %s has no effect.", type(self).__name__, ", ".join(unused))
        train_idx, val_idx = self._split(train_size, validation_size, False, self._seed(seed), datasplitter_kwargs)
        self.adata_manager.validate()
        table = ConditionTable.measure(
            self.adata_manager,
            train_idx,
            max_dose=np.asarray(self.vocabulary.max_dose, dtype=np.float64),
            n_contexts=len(self.contexts),
        )
        self.module.fit(table.condition_means())
        self.module.n_train = len(train_idx)
        self.module.eval()
        self.train_indices, self.validation_indices = train_idx, val_idx
        self.test_indices = np.setdiff1d(np.arange(self.adata.n_obs), np.concatenate([train_idx, val_idx]))
        self.history_ = {}
        self.is_trained_ = True
        self._after_training(train_idx)

    # -- what can be asked ------------------------------------------------------------------------------------------

    def _ask(self, label: str) -> Asked:
        vocabulary = self.vocabulary
        members = vocabulary.parse(label)
        features = None if vocabulary.features is None else vocabulary.feature_matrix(members)
        return self.module.conditions.ask(vocabulary.code(members), np.ones(max(1, len(members))), features)

    def _check_representable(self, label: str) -> None:
        self._check_if_trained(warn=False, message="The model is not trained. Call `train()` before predicting.")
        vocabulary, conditions = self.vocabulary, self.module.conditions
        members = vocabulary.parse(label)
        asked = self._ask(label)
        if not members or asked.label >= 0:
            return
        codes = dict(zip(members, vocabulary.code(members), strict=False))
        new = [m for m in members if not conditions.has_member(int(codes[m]))]
        close = get_close_matches(new[0], vocabulary.names, n=1) if new else []
        hint = f" Did you mean {close[0]!r}?" if close and close[0] not in new else ""
        if self.module.representable(asked):
            if new and not self._can_predict_features:
                logger.warning(
                    "%s: %s was not seen in training, so no effect of its own is predicted.%s",
                    type(self).__name__,
                    ", ".join(map(repr, new)),
                    hint,
                )
            return
        what = ", ".join(map(repr, new)) if new else f"the combination {label!r}"
        known = ", ".join(vocabulary.names[:8])
        raise ValueError(
            f"`perturbation`: {what} was not seen in training and has no features (known: {known}"
            f"{', …' if len(vocabulary.names) > 8 else ''}).{hint} Register descriptions of perturbations, this one "
            "included, with `perturbation_features_key`; baseline.MeanEffect and baseline.Additive do without."
        )

    def _is_known(self, name: str) -> bool:
        return True  # what is representable is looked at member by member below

    def _check_known(self, user: AnnData, manager: AnnDataManager, rows: np.ndarray) -> None:
        super()._check_known(user, manager, rows)
        codes, _ = self._actions(manager, rows)
        kinds, number = np.unique(codes, axis=0, return_counts=True)
        for members, n_cells in zip(kinds, number, strict=True):
            asked = self.module.conditions.ask(members, np.ones(len(members)))
            if len(asked.codes) and not self.module.representable(asked):
                label = self.vocabulary.delimiter.join(self.vocabulary.names[c] for c in asked.codes)
                raise ValueError(
                    f"`adata`: {n_cells} cells carry the perturbation {label!r}, which was not among the training "
                    "cells; their basal state can not be inferred. Ask control cells with `indices`."
                )

    # -- prediction -------------------------------------------------------------------------------------------------

    def _globals(self, manager: AnnDataManager, n_samples: int, seed: int) -> dict[str, torch.Tensor]:
        """Controls of the query stand in where training had none of a context."""
        globals_ = super()._globals(manager, n_samples, seed)
        known = np.flatnonzero(self.module.has_control.cpu().numpy())
        n_contexts = len(self._context_names(manager))
        new = np.setdiff1d(self._contexts_of(manager, np.arange(manager.adata.n_obs)), known)
        if not len(new):
            return globals_
        control = globals_["control"]
        extra = control[known].mean(0).expand(max(0, n_contexts - len(control)), -1)
        control = torch.cat([control, extra])
        found, mean = control_means(manager, new)
        if not found.all():
            names = self._context_names(manager)
            logger.warning(
                "No control cells in %s: taken for an average context.",
                ", ".join(repr(names[c]) for c in new[~found]),
            )
        control[new[found]] = torch.as_tensor(mean[found], device=control.device)
        return {**globals_, "control": control, "affinity": self.module.affinity(control)}

    @property
    def _discrepancy(self) -> Discrepancy:
        conditions, made = self.module.conditions, self.__dict__.get("_made")
        # made once per training: what it looks up, it keeps
        if made is None or made.calibration is not self.calibration_ or made.conditions is not conditions:
            made = _Discrepancy(self.calibration_, self.vocabulary, self.contexts, conditions)
            self._made = made
        return made


class _Discrepancy(Discrepancy):
    """Also of perturbations that were registered but not trained, and of those about which nothing is known."""

    def __init__(
        self,
        calibration: dict[str, Any] | None,
        vocabulary: Vocabulary,
        contexts: Sequence[str],
        conditions: Conditions,
    ) -> None:
        super().__init__(calibration, vocabulary, contexts)
        self.conditions = conditions

    def parameters(self, perturbation: Perturbation, context: str) -> tuple[float, float]:
        """A and k of a prediction."""
        a, k = super().parameters(perturbation, context)
        members = self.members(perturbation.label)
        if self.calibration is None or not members:
            return a, k
        codes = [self._code.get(m, UNKNOWN) for m in members]
        if self.conditions.find(np.array(codes)) >= 0:
            return a, k
        known = all(self.conditions.has_member(c) for c in codes)
        more = self.calibration["new combination" if known else "unseen with features"]
        return max(a, more[0]), max(k, more[1])
