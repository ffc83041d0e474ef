"""PerturbX for users."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from mudata import MuData
from numpy.typing import NDArray

from pertura.data._bags import BagSampler
from pertura.data._constants import KEYS
from pertura.data._datamodule import PerturbationDataModule
from pertura.data._pairs import embed
from pertura.effects import ConditionTable
from pertura.effects._sums import Values, codes_of
from pertura.effects._table import halves
from pertura.module._added_effects import set_buffer, split_controls
from pertura.module._perturbx import N_BAGS, Split
from pertura.module._perturbx import PerturbX as Module

from . import _perturbx_biomarkers as biomarkers
from .base import Options, PerturbationModel, option
from .base._contexts import check_combinations, control_profiles
from .base._query import Query, query

logger = logging.getLogger(__name__)

Rows = NDArray[np.int64]
_MAX_CANDIDATES, _MAX_FOLDS = 512, 5


@dataclass(frozen=True)
class PerturbXOptions(Options):
    """Options of :class:`PerturbX`, which has their documentation."""

    n_selected: int = option(64, whole=1)
    n_latent: int = option(8, whole=1)
    n_hidden: int = option(32, whole=1)
    aggregation: Literal["mean", "attention", "gated"] = option("attention", one_of=("mean", "attention", "gated"))
    n_members: int = option(5, whole=1)
    rank: int | None = option(30, whole=1)
    residual: bool = option(True, flag=True)
    target: Literal["mse", "de"] = option("mse", one_of=("mse", "de"))
    gene_weights: Literal["precision", "dominant", "uniform"] = option(
        "precision", one_of=("precision", "dominant", "uniform")
    )
    bag_size: int = option(32, whole=1)
    beta: float = option(1e-3, least=0)
    duplicate_penalty: float = option(1.0, least=0)
    entropy_penalty: float = option(50.0, least=0)
    dropout_rate: float = option(0.1, least=0, below=1)
    n_components: int = option(30, whole=1)
    lr: float = option(3e-3, above=0)
    lr_schedule: Literal["cosine", "constant"] = option("cosine", one_of=("cosine", "constant"))
    n_steps: int = option(600, whole=1)
    n_epochs: int = option(10, whole=1)


# the paper states neither learning rate nor number of steps: those stay
PAPER = {
    "n_members": 1,
    "rank": None,
    "residual": False,
    "gene_weights": "dominant",
    "beta": 1e-2,
    "duplicate_penalty": 0.0,
    "entropy_penalty": 0.0,
    "dropout_rate": 0.0,
}
_MODULE_OPTIONS = (
    "n_latent",
    "n_hidden",
    "aggregation",
    "n_members",
    "rank",
    "residual",
    "bag_size",
    "beta",
    "duplicate_penalty",
    "entropy_penalty",
    "dropout_rate",
    "n_components",
)


class PerturbX(PerturbationModel):
    r"""Mean effects in contexts that were never treated, from bags of their unperturbed cells :cite:p:`Keinan2023`.

    A concrete selector picks few genes, a small encoder turns each control cell into a few numbers, attention averages
    them over the cells of a context, and a decoder gives the mean effect. The genes, the numbers of a context and the
    weights of the cells can be looked at: :meth:`get_selected_genes`, :meth:`get_context_representation`,
    :meth:`get_gene_importance`, :meth:`get_attention`.

    By default these neural networks predict the deviation from the mean effect over the training contexts, in a basis of
    few components. Several of them, each trained without some of the contexts, stand beside a ridge regression of the
    effects on the control profiles, and a term by which contexts that start apart come together. What each says about the
    contexts that it did not see decides its share (:attr:`shares`): if all are 0, the prediction is the mean effect.

    In a context where a perturbation was measured, its effect is the measured one, drawn towards what is expected without these cells
    as far as they are few (`target`). In a context where at least three other perturbations were measured, these say how effects there
    differ from those elsewhere, by a Gaussian process (:class:`~pertura.effects.Transfer`). That is all that is learned from data
    registered with ``values="effects"``, in closed form: they have no control cells for the neural networks to read. A combination that was not measured has the sum of its members' effects.
    Perturbations that were not seen in training are not predicted.

    Where the share of the neural networks is 0, the selected genes and their importance describe the neural networks, not
    the prediction: ``get_gene_importance(of="prediction")`` describes that.

    A prediction for cells is the cell's own expression plus the effect in its context: there is no distribution of single
    cells, so that ``posterior_predictive_sample`` and ``get_marginal_ll`` are refused.

    Parameters
    ----------
    adata
        Set up by :meth:`setup_anndata`; `None` to make a model of a `registry` alone.
    registry
        Registry of a saved model.
    n_selected
        Number of genes that the selector picks, among the 512 most variable of the control cells; at most all of these.
    n_latent, n_hidden
        Dimension of the representation of a context, and units of the hidden layers.
    aggregation
        How cells are averaged: ``"mean"``, ``"attention"`` or ``"gated"`` attention.
    n_members
        Neural networks in the ensemble.
    rank
        Components of the decoder: principal components of the training cells; `None` for all genes.
    residual
        Whether the neural networks and the regression add to the mean effect. `False`: the neural networks alone, as in
        the paper; the selector then picks among all genes.
    target
        What effects are good for in contexts where they were measured. ``"mse"``: the smallest error; they are drawn towards what is
        expected of them without these cells, the more the fewer cells there are. ``"de"``: as measured, for calling genes.
    gene_weights
        Weights of genes in the loss: ``"precision"`` (inverse squared standard error), ``"dominant"`` (more for genes with
        large effects in training) or ``"uniform"``.
    bag_size
        Cells drawn per bag.
    beta
        Complexity penalty of the representation of a cell.
    duplicate_penalty
        Penalty of rows of the selector that pick the same gene, per minibatch of the default size.
    entropy_penalty
        Penalty, at the end of training, of rows that have not decided for a gene, per minibatch of the default size.
    dropout_rate
        Dropout of the hidden layers.
    n_components
        Principal components of the control profiles in the regression.
    lr, lr_schedule
        Learning rate, and whether it falls to zero along a cosine or stays.
    n_steps, n_epochs
        Length of training where ``train`` is given no number of epochs: at least so many steps and so many epochs.
    preset
        ``"paper"``: one neural network that decodes into all genes, no mean effect, no regression, no penalty but that of
        complexity, no dropout. Options given beside it win.

    Examples
    --------
    >>> pertura.model.PerturbX.setup_anndata(
    ...     adata, perturbation_key="condition", control="ctrl", context_key="cell_type"
    ... )
    >>> model = pertura.model.PerturbX(adata)
    >>> model.train()
    >>> model.get_perturbation_effect("stim", adata=controls_of_a_patient)
    >>> model.get_gene_importance("stim")
    """

    _module_cls = Module
    _options_cls = PerturbXOptions
    _presets: ClassVar[dict[str, dict[str, Any]]] = {"paper": PAPER}
    _draws_effects = True
    _takes_effects = True
    module: Module

    def _make_module(self) -> None:
        options, vocabulary, n_genes = self.options, self.vocabulary, len(self.gene_names)
        n_contexts = len(self.contexts)
        if n_contexts < 2:
            logger.warning(
                "PerturbX predicts how effects differ between contexts, but there is only one: the measured effect is all "
                "that it can predict. Name the column of cell types, lines or patients with `context_key`."
            )
        n_candidates = min(n_genes, _MAX_CANDIDATES) if options.residual else n_genes
        self.module = Module(
            n_genes=n_genes,
            n_contexts=n_contexts,
            max_dose=np.asarray(vocabulary.max_dose, dtype=np.float64),
            native_scale="log1p" if self.registered.is_counts else "layer",
            n_candidates=n_candidates,
            n_selected=min(options.n_selected, n_candidates),
            n_folds=min(n_contexts, _MAX_FOLDS) if n_contexts > 2 and options.residual else 1,
            **{name: getattr(options, name) for name in _MODULE_OPTIONS},
        )
        self._model_summary_string = (
            f"{type(self).__name__}: {vocabulary.n_perturbations} perturbations, {n_contexts} contexts, "
            f"{self.module.selector.logits.shape[1]} selected genes, {options.n_members} members"
        )

    # -- training ---------------------------------------------------------------------------------------------------

    def _data_module(self, train_idx: Rows, val_idx: Rows, batch_size: int, seed: int) -> PerturbationDataModule:
        size = self.module.bag_size
        bags = {"bag_size": size, "bags_per_batch": max(1, batch_size // (3 * size)), "seed": seed}
        train = self._sampler(train_idx, shuffle=True, **bags)
        if not train.n_bags:
            raise ValueError(
                "`adata`: no perturbed training cell has a control of its context to compare with. "
                "Every context needs control cells; check `context_key` and `control`."
            )
        val = self._sampler(val_idx, shuffle=False, **bags) if len(val_idx) else None
        return PerturbationDataModule(
            self.adata_manager, train_idx, val_idx, batch_size=batch_size, seed=seed, samplers=(train, val)
        )

    def _sampler(self, rows: Rows, **options: Any) -> BagSampler:
        cells = self._registered_cells(rows)
        codes, dose = cells.actions
        present = (codes >= 0) & (dose > 0)
        keys = [np.where(present, codes, -1), np.where(present, dose, 0.0), cells.context[:, None]]
        condition = np.unique(np.concatenate(keys, axis=1), axis=0, return_inverse=True)[1].ravel()
        half = self._halves(cells.at(rows[~present.any(1)]))
        return BagSampler(rows, np.where(present.any(1), condition, -1), cells.context, half, **options)

    def _halves(self, controls: Query) -> Rows:
        """Half of each control cell, by context and batch, as in the table of conditions."""
        batch = codes_of(controls.dataset, KEYS.BATCH, controls.rows)
        return halves(self.adata_manager, controls.rows, controls.context, batch)

    def _initialize(self, data: PerturbationDataModule, table: ConditionTable) -> None:
        module = self.module
        module.means.set(table.condition_means())
        for name in ("posterior", "posterior_variance"):
            set_buffer(module, name, getattr(module, name)[:0])
        if self.registered.are_effects:
            module.share.copy_(torch.tensor([0.0, 0.0, 0.0, 1.0]))
            return
        if not self.is_trained_:
            self._standardize(data, table)
        module.effect_sd.copy_(torch.as_tensor(self._effect_sd()))
        treated = np.unique(module.conditions.context)
        module.fold.fill_(-1)
        if module.n_folds > 1 and len(treated) > 2:
            module.fold[treated] = torch.arange(len(treated), device=module.fold.device) % module.n_folds

    @torch.no_grad()
    def _standardize(self, data: PerturbationDataModule, table: ConditionTable) -> None:
        """Mean and spread of control cells, candidates of the selector, and principal components of training cells."""
        module, (mean, variance) = self.module, table.control_moments
        sd = np.sqrt(variance)
        module.input_mean.copy_(torch.as_tensor(mean))
        # a gene that hardly varies must not enter blown up
        module.input_scale.copy_(torch.as_tensor(np.maximum(sd, 0.2 * np.sqrt(variance.mean()) + 1e-6)))
        # spread of genes that vary more than their mean suggests, as for highly variable genes
        score = variance / (mean + 0.1) if self.registered.is_counts else sd
        chosen = np.sort(np.argsort(-score, kind="stable")[: len(module.candidates)])
        module.candidates.copy_(torch.as_tensor(chosen))
        if module.rank is not None:
            set_buffer(module.regression, "basis", self._basis(table.sample.x))

    def _basis(self, x: Values) -> NDArray[np.float32]:
        """Principal axes of cells, ``(n_genes, rank)``; 0 where there are fewer."""
        _, axes = embed(x, False, self.module.rank, return_basis=True)
        basis = np.zeros((self.module.n_genes, self.module.rank), dtype=np.float32)
        basis[:, : len(axes)] = axes.T
        return basis

    def _effect_sd(self) -> NDArray[np.float32]:
        """Residual standard deviations of the effect of a bag: what the loss weighs genes by."""
        means = self.module.means
        n, of_means = len(means.context), means.variance.double().cpu().numpy()
        variance = (of_means[:n] + of_means[n:][means.context.cpu().numpy()]).mean(0)
        if self.options.gene_weights == "uniform":
            return np.full(len(variance), np.sqrt(variance.mean() * 2) + 1e-6, dtype=np.float32)
        sd = np.sqrt(variance + variance.mean() + 1e-12)
        if self.options.gene_weights == "dominant":
            size = means.effect.abs().amax(0).double().cpu().numpy() / sd
            weight = np.minimum(size, np.quantile(size, 0.99) + 1e-12)
            sd = np.sqrt(2 * variance.mean() + 1e-12) / np.sqrt(0.1 + 0.9 * weight / weight.mean().clip(1e-12))
        return sd.astype(np.float32)

    def _plan_defaults(self) -> dict[str, Any]:
        return {"lr": self.options.lr, "weight_decay": 1e-2, "lr_schedule": self.options.lr_schedule}

    def _trainer_defaults(self) -> dict[str, Any]:
        return {"gradient_clip_val": 100.0}

    # contexts are described by bags of cells, and the regression gets its share, when training ends
    _predicts_in_training = False

    def _default_batch_size(self, n_cells: int) -> int:
        return 3 * N_BAGS * self.module.bag_size

    def _complete(self, table: ConditionTable) -> None:
        """Describe the training contexts by bags, and choose the shares of regression and neural networks."""
        module = self.module
        if self.registered.are_effects:
            return
        module.on_step(1.0)
        cells = self._registered_cells(self.train_indices)
        controls = cells.at(cells.rows[cells.is_control])
        module.keep_bags(*self._bags(controls, len(self.contexts), self._halves(controls)))
        if not module.residual:
            return
        parts = module.bag.tensor_split(2, dim=1)
        splits = split_controls(module.means, table)
        bases = []
        if module.rank is not None and module.n_folds > 1:
            sample = table.sample
            fold = module.fold.cpu().numpy()[table.context[sample.condition]]
            bases = [self._basis(sample.x[fold != f]) for f in range(module.n_folds)]
        module.stack([Split(*split, bag) for split, bag in zip(splits, parts, strict=True)], bases)
        if self.options.target == "mse":
            module.fit_posterior(table)

    def _bags(self, controls: Query, n_contexts: int, half: Rows | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Chosen genes of some control cells of each context, drawn with replacement; first those of half 0, then of half 1."""
        module, context = self.module, controls.context
        bag = torch.zeros(n_contexts, module.n_stored, *module.bag.shape[2:])
        has_bag = torch.zeros(n_contexts, dtype=torch.bool)
        rng, device = np.random.default_rng(0), module.input_mean.device
        for code in np.unique(context):
            own = np.flatnonzero(context == code)
            groups = [own] if half is None else [own[half[own] == h] for h in (0, 1)]
            size = module.n_stored // len(groups)
            drawn = [np.resize(rng.permutation(g if len(g) else own), size) for g in groups]
            cells = controls.at(controls.rows[np.concatenate(drawn)]).cells(512, device)
            bag[code], has_bag[code] = torch.cat([module.describe(c) for c in cells]).cpu(), True
        return bag, has_bag

    # -- prediction -------------------------------------------------------------------------------------------------

    def _check_representable(self, label: str) -> None:
        self._check_if_trained(warn=False, message="The model is not trained. Call `train()` before predicting.")
        super()._check_representable(label)
        members = self.vocabulary.parse(label)
        if members and not self.module.representable(self.vocabulary.code(members)):
            raise ValueError(
                f"`perturbation`: the effect of {label!r} was not measured, nor that of each member alone, so that there is "
                "no sum to predict. Train on cells that carry its members alone."
            )

    def _learn_from_query(self, asked: Query) -> dict[str, Any]:
        """Control cells of the query describe contexts that training did not have."""
        module = self.module
        check_combinations(asked, self.vocabulary, module.representable)
        result: dict[str, Any] = {}
        control = control_profiles(module.means.control, module.means.has_control, asked)
        if control is not None:
            result = {"control": control, "affinity": module.affinity(control)}
        if self.registered.are_effects:  # nothing to put into a bag
            return result
        more = max(0, len(asked.contexts) - len(module.has_bag))
        bag = torch.cat([module.bag, module.bag.new_zeros(more, *module.bag.shape[1:])])
        has_bag = torch.cat([module.has_bag, module.has_bag.new_zeros(more)])
        cells = asked.at(np.arange(asked.manager.adata.n_obs))
        cells = cells.at(cells.rows[cells.is_control & ~has_bag.cpu().numpy()[cells.context]])
        if len(cells):
            new, found = self._bags(cells, len(has_bag))
            bag[found], has_bag[found] = new[found].to(bag), True
        return {**result, "bag": bag, "has_bag": has_bag}

    # -- what it learned --------------------------------------------------------------------------------------------

    @property
    def shares(self) -> pd.Series:
        """Shares of what a prediction for a new context adds to the mean effect.

        ``"regression"``, ``"networks"`` (the neural networks) and ``"convergence"``: how much of what the control profile has more
        than those of the training contexts is missing from the effect. They are those that predict left-out training contexts
        best. If all are 0, the prediction is the mean effect.
        """
        self._check_if_trained(warn=False, message="The model is not trained. Call `train()` first.")
        share = self.module.share.tolist() if self.module.residual else (0.0, 1.0, 0.0)
        return pd.Series(share[:3], index=["regression", "networks", "convergence"], name="share")

    def get_selected_genes(self) -> pd.DataFrame:
        """Genes that the selectors of the ensemble picked.

        Returns
        -------
        DataFrame indexed by gene, most stable first: ``stability``, the share of members that picked it, ``n_rows``, how
        many rows of all selectors did, and ``probability``, their mean probability.
        """
        self._check_if_trained(warn=False, message="The model is not trained. Call `train()` first.")
        return biomarkers.selected_genes(self)

    def get_context_representation(
        self, perturbation: str | None = None, *, adata: AnnData | MuData | None = None
    ) -> pd.DataFrame:
        """What the neural networks read from the control cells of each context.

        Parameters
        ----------
        perturbation
            The representation depends on it; `None`: the only one there is.
        adata
            Cells with controls of the contexts; by default the training contexts.

        Returns
        -------
        DataFrame, contexts x ``PC1, PC2, ...``: principal components of the members' representations. Axes are those of the
        training contexts, so that contexts of a query can be placed among them.
        """
        self._check_if_trained(warn=False, message="The model is not trained. Call `train()` first.")
        asked = biomarkers.ask(self, perturbation)
        names, z = biomarkers.representation(self, asked, None if adata is None else query(self, adata, None))
        center, axes = biomarkers.representation_axes(self, asked)
        scores = (z - center) @ axes.T
        return pd.DataFrame(scores, index=names, columns=[f"PC{i + 1}" for i in range(scores.shape[1])])

    def get_gene_importance(
        self,
        perturbation: str | None = None,
        *,
        of: Literal["representation", "prediction"] = "representation",
        component: int = 0,
        n_cells: int = 64,
        n_samples: int = 10,
        seed: int = 0,
    ) -> pd.DataFrame:
        """Shapley values of genes in control cells: which genes predict the response.

        Parameters
        ----------
        perturbation
            Perturbation; `None`: the only one there is.
        of
            ``"representation"``, as in the paper: the function explained is a control cell's coordinate on a component of
            :meth:`get_context_representation`, and the genes are those the selectors picked. ``"prediction"``: it is the
            coordinate of the predicted effect in a new context, in which regression and neural networks have their shares,
            on a component of how the measured effects differ between training contexts; positive is along the mean effect,
            and all genes are explained.
        component
            Component, from 0. The first separates responders from others where there are both.
        n_cells
            Control cells, of all contexts, to explain.
        n_samples
            Permutations of the genes (:class:`captum.attr.ShapleyValueSampling`). The regression is linear, its values are
            exact.
        seed
            Of cells and permutations.

        Returns
        -------
        DataFrame indexed by gene: ``importance``, the mean absolute Shapley value of cells (of contexts for
        ``of="prediction"``), with the mean control cell as background; ``direction``, the correlation of expression with the
        Shapley value: positive where more expression raises the coordinate; ``stability`` of the selection, 0 for genes that
        no member picked.
        """
        return biomarkers.gene_importance(self, perturbation, of, component, n_cells, n_samples, seed)

    def get_attention(self, perturbation: str | None = None, *, adata: AnnData | MuData | None = None) -> pd.Series:
        """Weight of each control cell in the representation of its context, times the number of its control cells.

        Parameters
        ----------
        perturbation
            Perturbation; `None`: the only one there is.
        adata
            Cells; by default the model's own.

        Returns
        -------
        Series by cell, mean over the ensemble, 1 for a cell of average weight and NaN for treated cells: put it into
        ``adata.obs`` to plot it.
        """
        self._check_if_trained(warn=False, message="The model is not trained. Call `train()` first.")
        cells = query(self, adata, None, check_perturbations=False)
        return biomarkers.attention(self, biomarkers.ask(self, perturbation), cells)
