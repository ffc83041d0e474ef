"""What the baselines share: training in one pass, closed-form effects, contexts learned from the query."""

from __future__ import annotations

import logging
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from pertura.data._datamodule import PerturbationDataModule
from pertura.effects import ConditionTable
from pertura.model.base import Options, PerturbationModel
from pertura.model.base._arguments import did_you_mean
from pertura.model.base._contexts import check_combinations, control_profiles
from pertura.model.base._query import Query

from ._module import BaselineModule

logger = logging.getLogger(__name__)

# arguments of training that change no result
_HARMLESS = {"accelerator", "devices", "enable_progress_bar"}


class Baseline(PerturbationModel):
    """Base of the baselines.

    A baseline is trained, asked, saved and loaded like every model. Its effects are weighted sums of those measured
    in training: differences between the means of perturbed and control cells of a context, on the scale log1p of
    counts per 10,000 for counts and on the registered one for other data. Their standard errors make its intervals,
    together with the distance from measured effects that every model learns after training.

    A baseline has no latent space: its basal state is the expression of a cell without the mean effect of the cell's
    own perturbation, ``(n_cells, n_genes)``. It has no distribution of cells around their mean either, so that
    ``posterior_predictive_sample`` and ``get_marginal_ll`` are refused. Perturbed cells are compared with controls of
    their own batches, where there are any.

    Parameters
    ----------
    adata
        Set up by :meth:`setup_anndata`; `None` to make a baseline of a `registry` alone.
    registry
        Registry of a saved baseline.
    """

    _draws_effects = True
    _takes_effects = True
    _module_cls: ClassVar[type[BaselineModule]] = BaselineModule
    _options_cls = Options
    module: BaselineModule

    def _make_module(self) -> None:
        self.module = self._module_cls(
            n_genes=len(self.gene_names),
            n_contexts=len(self.contexts),
            max_dose=np.asarray(self.registered.vocabulary.max_dose, dtype=np.float64),
            native_scale="log1p" if self.registered.is_counts else "layer",
            **self._module_options(),
            **vars(self.options),
        )
        self._model_summary_string = (
            f"{type(self).__name__}: {self.vocabulary.n_perturbations} perturbations, {len(self.contexts)} contexts"
        )

    def _module_options(self) -> dict[str, Any]:
        """What the estimator takes from the registered data."""
        return {}

    def _features(self) -> np.ndarray | None:
        """Registered features of the vocabulary's perturbations, ``(n_perturbations, n_features)``."""
        vocabulary = self.registered.vocabulary
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
        self._fit_in_closed_form(train_size, validation_size, seed, datasplitter_kwargs, trainer_kwargs)

    def _initialize(self, data: PerturbationDataModule, table: ConditionTable) -> None:
        self.module.fit(table)

    # -- what can be asked ------------------------------------------------------------------------------------------

    def _check_representable(self, label: str) -> None:
        self._check_if_trained(warn=False, message="The model is not trained. Call `train()` before predicting.")
        vocabulary, conditions = self.vocabulary, self.module.conditions
        members = vocabulary.parse(label)
        features = None if vocabulary.features is None else vocabulary.feature_matrix(members)
        asked = conditions.ask(vocabulary.code(members), np.ones(max(1, len(members))), features)
        if not members or asked.label >= 0:
            return
        codes = dict(zip(members, vocabulary.code(members), strict=False))
        new = [m for m in members if not conditions.has_member(int(codes[m]))]
        trained = [name for code, name in enumerate(vocabulary.names) if conditions.has_member(code)]
        hint = did_you_mean(new[0], trained) if new else ""
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
        raise ValueError(
            f"`perturbation`: {what} was not seen in training and has no features (known: {', '.join(trained[:8])}"
            f"{', …' if len(trained) > 8 else ''}).{hint} Register descriptions of perturbations, this one "
            "included, with `perturbation_features_key`; baseline.MeanEffect and baseline.Additive do without."
        )

    def _can_take_back(self, name: str) -> bool:
        return self._representable(self.vocabulary.code([name]))

    def _representable(self, codes: NDArray[np.int64]) -> bool:
        return self.module.representable(self.module.conditions.ask(codes, np.ones(len(codes))))

    # -- prediction -------------------------------------------------------------------------------------------------

    def _learn_from_query(self, asked: Query) -> dict[str, Any]:
        """Control profiles of the query's contexts, where training had none of them."""
        check_combinations(asked, self.vocabulary, self._representable)
        means = self.module.means
        control = control_profiles(means.control, means.has_control, asked)
        return {} if control is None else {"control": control, "affinity": self.module.affinity(control)}
