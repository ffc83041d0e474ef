"""PerturbX for users."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from anndata import AnnData
from numpy.typing import NDArray
from scvi.data import AnnDataManager

from pertura.baseline._base import Baseline
from pertura.baseline._linear import Linear
from pertura.baseline._pseudobulk import pseudobulk
from pertura.data._bags import BagSampler
from pertura.data._datamodule import PerturbationDataModule
from pertura.data._pairs import embed
from pertura.module._perturbx import PerturbX as Module

from ._arguments import check_flag, check_number, check_whole
from ._base import PerturbationModel
from ._biomarkers import BiomarkerMixin
from ._training import TrainingMixin

_PAPER = {"residual": False, "rank": None, "n_members": 1, "gene_weights": "dominant", "beta": 1e-2}
_AGGREGATIONS = ("mean", "attention", "gated")
_WEIGHTS = ("precision", "dominant", "uniform")
_MAX_BASIS_CELLS = 20_000


class PerturbX(BiomarkerMixin, Linear):
    r"""Mean effects in contexts that were never treated, from bags of their unperturbed cells :cite:p:`Keinan2023`.

    A concrete selector picks few genes, a small network turns each control cell into a few numbers, attention averages
    them over the cells of a context, and a decoder gives the mean effect. The genes, the numbers of a context and the
    weights of the cells can be looked at: :meth:`get_selected_genes`, :meth:`get_context_representation`,
    :meth:`get_gene_importance`, :meth:`get_attention`.

    By default the networks predict the deviation from the mean effect over the training contexts, in a basis of few
    components; several of them, each without some of the contexts, stand beside a ridge regression on the control
    profiles (:class:`~pertura.baseline.Linear`). What each says about the contexts it did not see decides its share: where
    training contexts tell nothing about one another, the mean effect is what remains. In a context where a perturbation was
    measured, its effect is the measured one.

    Where the networks' share in :attr:`shares` is 0, as on the cell types of Kang et al. 2018, the selected genes and their
    importance describe the networks, not the prediction: ``get_gene_importance(of="prediction")`` describes that.

    A prediction for cells is the cell's own expression plus the effect in its context.

    Parameters
    ----------
    adata
        Set up by :meth:`setup_anndata`; `None` to make a model of a `registry` alone.
    registry
        Registry of a saved model.
    n_selected
        Number of genes that the selector picks, among the 512 most variable of the control cells.
    n_latent, n_hidden
        Dimension of the representation of a context, and units of the hidden layers.
    aggregation
        How cells are averaged: ``"mean"``, ``"attention"`` or ``"gated"`` attention.
    n_members
        Networks in the ensemble.
    rank
        Components of the decoder: principal components of the training cells; `None` for all genes.
    residual
        Whether the networks add to the mean effect. `False`: the network alone, as in the paper.
    gene_weights
        Weights of genes in the loss: ``"precision"`` (inverse squared standard error), ``"dominant"`` (more for genes with
        large effects in training) or ``"uniform"``.
    bag_size
        Cells drawn per bag.
    beta, duplicate_penalty, dropout_rate
        See :class:`pertura.module.PerturbX`.
    n_components, ridge
        Of the regression, see :class:`~pertura.baseline.Linear`.
    preset
        ``"paper"``: one network that decodes into all genes, no mean effect, no regression. Arguments given beside it win.
        With a cell type of Kang et al. 2018 left out it reaches R² .739 and MSE .051 where the default reaches .806 and .042
        (and the mean effect .509 and .092).

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

    def __init__(
        self,
        adata: AnnData | None = None,
        registry: dict | None = None,
        *,
        n_selected: int | None = None,
        n_latent: int = 8,
        n_hidden: int = 32,
        aggregation: Literal["mean", "attention", "gated"] = "attention",
        n_members: int | None = None,
        rank: int | None = None,
        residual: bool | None = None,
        gene_weights: Literal["precision", "dominant", "uniform"] | None = None,
        bag_size: int = 32,
        beta: float | None = None,
        duplicate_penalty: float = 1.0,
        dropout_rate: float = 0.1,
        n_components: int = 30,
        ridge: float = 0.1,
        preset: Literal["paper"] | None = None,
    ) -> None:
        if preset not in (None, "paper"):
            raise ValueError(f"`preset` must be 'paper' or None, got {preset!r}.")
        given = {"n_members": n_members, "rank": rank, "residual": residual, "gene_weights": gene_weights, "beta": beta}
        options = {"n_members": 5, "rank": 30, "residual": True, "gene_weights": "precision", "beta": 1e-3}
        options |= (_PAPER if preset == "paper" else {}) | {k: v for k, v in given.items() if v is not None}
        options |= {"n_latent": n_latent, "n_hidden": n_hidden, "bag_size": bag_size, "aggregation": aggregation}
        options |= {"duplicate_penalty": duplicate_penalty, "dropout_rate": dropout_rate}
        options |= {"n_components": n_components, "ridge": ridge}
        _check_options(options | {"n_selected": 64 if n_selected is None else n_selected})
        self.gene_weights = options.pop("gene_weights")
        PerturbationModel.__init__(self, adata, registry)
        n_contexts, n_genes = len(self.contexts), len(self.gene_names)
        options["n_folds"] = min(n_contexts, 5) if n_contexts > 2 and options["residual"] else 1
        options["n_candidates"] = min(n_genes, 512) if options["residual"] else n_genes
        options["n_selected"] = min(64 if n_selected is None else n_selected, options["n_candidates"])
        Baseline.__init__(self, adata, registry, **options)
        self.init_params_ = self._get_init_params(locals())

    # -- training ---------------------------------------------------------------------------------------------------

    train = TrainingMixin.train

    def _data_module(
        self, train_idx: NDArray[np.int64], val_idx: NDArray[np.int64], batch_size: int, seed: int
    ) -> PerturbationDataModule:
        size = self.module.bag_size
        bags = max(1, batch_size // (2 * size))
        options = {"bag_size": size, "bags_per_batch": bags, "seed": seed}
        train = self._sampler(train_idx, shuffle=True, **options)
        if not train.n_bags:
            raise ValueError(
                "`adata`: no perturbed training cell has a control to compare with. "
                "Every context needs control cells; check `context_key` and `control`."
            )
        val = self._sampler(val_idx, shuffle=False, **options) if len(val_idx) else None
        return PerturbationDataModule(
            self.adata_manager, train_idx, val_idx, batch_size=batch_size, seed=seed, samplers=(train, val)
        )

    def _sampler(self, rows: NDArray[np.int64], **options: Any) -> BagSampler:
        codes, dose = self._actions(self.adata_manager, rows)
        present = (codes >= 0) & (dose > 0)
        context = self._contexts_of(self.adata_manager, rows)
        keys = np.concatenate([np.where(present, codes, -1), np.where(present, dose, 0.0), context[:, None]], axis=1)
        condition = np.unique(keys, axis=0, return_inverse=True)[1].ravel()
        return BagSampler(rows, np.where(present.any(1), condition, -1), context, **options)

    def _initialise(self, data: PerturbationDataModule) -> None:
        module, train_idx = self.module, data.train_idx
        if not self.is_trained_:
            self._standardise(train_idx)
        bulk = pseudobulk(
            self.adata_manager,
            train_idx,
            max_dose=np.asarray(self.vocabulary.max_dose, dtype=np.float64),
            n_contexts=len(self.contexts),
        )
        module.fit(bulk)
        module.effect_sd.copy_(torch.as_tensor(self._effect_sd(bulk)))
        treated = np.unique(bulk.context)
        module.fold.fill_(-1)
        if module.n_folds > 1 and len(treated) > 2:
            module.fold[treated] = torch.arange(len(treated)) % module.n_folds

    @torch.no_grad()
    def _standardise(self, train_idx: NDArray[np.int64]) -> None:
        """Mean and spread of control cells, and principal components of training cells."""
        module, layer = self.module, self._argument("layer")
        control = train_idx[self._is_control(self.adata_manager, train_idx)]
        total = square = 0.0
        for cells in self._cells(self.adata_manager, control, 1024):
            x = module.normalised(cells).cpu().double()
            total, square = total + x.sum(0), square + (x**2).sum(0)
        mean = total / len(control)
        sd = (square / len(control) - mean**2).clamp(min=0).sqrt()
        module.input_mean.copy_(mean)
        # a gene that hardly varies must not enter blown up
        module.input_scale.copy_(sd.clamp(min=0.2 * float(sd.square().mean().sqrt()) + 1e-6))
        # spread of genes that vary more than their mean suggests, as for highly variable genes
        score = sd if self.data_kind != "counts" else sd.square() / (mean + 0.1)
        module.candidates.copy_(score.argsort(descending=True)[: len(module.candidates)].sort().values)
        if module.rank is not None:
            rows = np.sort(np.random.default_rng(0).permutation(train_idx)[:_MAX_BASIS_CELLS])
            values = (self.adata.X if layer is None else self.adata.layers[layer])[rows]
            _, basis = embed(values, self.data_kind == "counts", module.rank, return_basis=True)
            padded = np.zeros((module.rank, basis.shape[1]), dtype=np.float32)
            padded[: len(basis)] = basis
            module._set("basis", padded.T.copy())

    def _effect_sd(self, bulk: Any) -> NDArray[np.float32]:
        """Residual standard deviations of the effect of a bag: what the loss weighs genes by."""
        n = len(bulk.context)
        variance = (bulk.variance[:n] + bulk.variance[n:][bulk.context]).mean(0)
        effect = np.abs(bulk.mean[:n] - bulk.mean[n:][bulk.context]).max(0)
        if self.gene_weights == "uniform":
            return np.full(len(variance), np.sqrt(variance.mean() * 2) + 1e-6, dtype=np.float32)
        sd = np.sqrt(variance + variance.mean() + 1e-12)
        if self.gene_weights == "dominant":
            weight = np.minimum(effect / sd, np.quantile(effect / sd, 0.99) + 1e-12)
            sd = np.sqrt(2 * variance.mean() + 1e-12) / np.sqrt(0.1 + 0.9 * weight / weight.mean().clip(1e-12))
        return sd.astype(np.float32)

    def _plan_defaults(self) -> dict[str, Any]:
        return {"lr": 3e-3, "weight_decay": 1e-2, "lr_schedule": "cosine"}

    def _trainer_defaults(self) -> dict[str, Any]:
        return {"gradient_clip_val": 100.0}

    def _default_batch_size(self, n_cells: int) -> int:
        return 16 * self.module.bag_size

    def _default_max_epochs(self, n_batches: int) -> int:
        return int(np.clip(round(600 / n_batches), 10, 600))

    def _after_training(self, train_idx: NDArray[np.int64]) -> None:
        module = self.module
        module.eval()
        module.on_step(1.0)
        control = train_idx[self._is_control(self.adata_manager, train_idx)]
        bag, has_bag = self._bags(self.adata_manager, control, len(self.contexts))
        module._set("bag", bag)
        module._set("has_bag", has_bag)
        module.stack()
        super()._after_training(train_idx)

    def _bags(
        self, manager: AnnDataManager, rows: NDArray[np.int64], n_contexts: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Chosen genes of some control cells of each context, drawn with replacement."""
        module = self.module
        _, n_members, n_selected = module.bag.shape[1:]
        bag = torch.zeros(n_contexts, module.n_stored, n_members, n_selected)
        has_bag = torch.zeros(n_contexts, dtype=torch.bool)
        rng = np.random.default_rng(0)
        context = self._contexts_of(manager, rows)
        for code in np.unique(context):
            own = rows[context == code]
            drawn = rng.permutation(np.resize(rng.permutation(own), module.n_stored))
            parts = [
                module.describe(module.standardised(module.normalised(c))) for c in self._cells(manager, drawn, 512)
            ]
            bag[code], has_bag[code] = torch.cat(parts).cpu(), True
        return bag, has_bag

    # -- prediction -------------------------------------------------------------------------------------------------

    def _globals(self, manager: AnnDataManager, n_samples: int, seed: int) -> dict[str, torch.Tensor]:
        """Control cells of the query describe contexts that training did not have."""
        globals_ = super()._globals(manager, n_samples, seed)
        module = self.module
        n_contexts, n_known = len(self._context_names(manager)), len(module.has_bag)
        bag, has_bag = module.bag, module.has_bag
        if n_contexts > n_known:
            more = n_contexts - n_known
            bag = torch.cat([bag, bag.new_zeros(more, *bag.shape[1:])])
            has_bag = torch.cat([has_bag, has_bag.new_zeros(more)])
        if manager is not self.adata_manager or not has_bag.all():
            rows = np.arange(manager.adata.n_obs)
            rows = rows[self._is_control(manager, rows)]
            rows = rows[~has_bag.cpu().numpy()[self._contexts_of(manager, rows)]]
            if len(rows):
                new, found = self._bags(manager, rows, n_contexts)
                bag, has_bag = bag.clone(), has_bag.clone()
                bag[found], has_bag[found] = new[found].to(bag), True
        return {**globals_, "bag": bag, "has_bag": has_bag}


def _check_options(options: dict[str, Any]) -> None:
    for name in ("n_selected", "n_latent", "n_hidden", "n_members", "bag_size"):
        check_whole(name, options[name])
    if options["rank"] is not None:
        check_whole("rank", options["rank"])
    for name, allowed in (("aggregation", _AGGREGATIONS), ("gene_weights", _WEIGHTS)):
        if options[name] not in allowed:
            raise ValueError(f"`{name}` must be one of {allowed}, got {options[name]!r}.")
    check_flag("residual", options["residual"])
    for name in ("beta", "duplicate_penalty"):
        check_number(name, options[name], least=0)
    check_number("dropout_rate", options["dropout_rate"], least=0, below=1)
    check_whole("n_components", options["n_components"])
    check_number("ridge", options["ridge"], above=0)
