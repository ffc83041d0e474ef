"""InfoSEM for users."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from numpy.typing import NDArray

from pertura.data._constants import KEYS
from pertura.data._datamodule import PerturbationDataModule
from pertura.data._vocabulary import Vocabulary
from pertura.module._infosem import InfoSEM as Module
from pertura.train._alternating import AlternatingPlan

from ._arguments import check_flag, check_number, check_whole, check_widths
from ._base import PerturbationModel
from ._engine import Question, seeded
from ._network import Network, NetworkMixin
from ._network_priors import described_genes, embedding_table, known_table, label_matrix, regulator_names

_DEFAULT: dict[str, Any] = {
    "prior_mean": "pairwise",
    "posterior": "map",
    "likelihood": "mse",
    "hidden": (64, 64),
    "beta": 1.0,
    "augmentation": 0.1,
    "sparsity_delay": 0.05,
    "z_prior": "standard",
    "prior_shrinkage": 0.5,
    "edge_logit_sd": 1.0,
    "max_radius": 0.95,
}
_PAPER = {
    "prior_mean": "additive",
    "hidden": (128, 128),
    "alpha": 100.0,
    "augmentation": 0.0,
    "sparsity_delay": 0.0,
    "z_prior": "learned",
    "prior_shrinkage": 0.0,
    "max_radius": 0.0,
}
_CHOICES = {
    "prior": ("none", "embedding", "embedding+edges"),
    "prior_mean": ("pairwise", "additive"),
    "posterior": ("map", "variational"),
    "likelihood": ("mse", "normal"),
    "z_prior": ("standard", "learned"),
    "preset": (None, "paper"),
}
# of alpha without one of the user's own, per gene: DeepSEM's 100 for the 821 genes of mDC
_SPARSITY = 100 / 821


class InfoSEM(NetworkMixin, PerturbationModel):
    r"""Gene regulatory networks from expression with informative priors :cite:p:`Cui2025`, and DeepSEM without them.

    A structural-equation model: the state of each gene is a sum of the states of its regulators and of noise of its own, and
    expression a function of the state. :meth:`get_grn` gives the weights, :meth:`evaluate_grn` compares them with known edges.
    ``predict_perturbation("STAT1")`` knocks a gene of the data out: each cell keeps the noise of its other genes.

    Parameters
    ----------
    adata
        Set up by :meth:`setup_anndata`; `None` to make a model of a `registry` alone.
    registry
        Registry of a saved model.
    prior
        ``"none"``: weights are a priori 0 (DeepSEM); ``"embedding"``: their prior mean depends on gene embeddings (InfoSEM-B);
        ``"embedding+edges"``: and known edges say which are likely (InfoSEM-BC).
    embedding_key
        Gene embeddings: key of ``varm``, or a DataFrame, one row per gene. Genes without one (all 0 or NaN, or no row) are
        taken for average.
    edges_key
        Known edges: key of ``varp`` (``[source, target]``: 1 for known edges, -1 for pairs that are known to be none), or a
        DataFrame ``source, target`` (and ``weight``). Pairs that are not listed are unknown. Keep edges out that you test with.
    regulators
        Genes whose rows are learned: boolean column of ``var``, or names. `None`: every gene; ``get_grn(regulators=)`` then keeps
        those of regulators. Their rows alone are much faster where genes are many, and less accurate: what genes share by other
        causes has then no other place to go.
    n_ensemble
        Models trained side by side; weights are their mean :math:`|A|`, with the sign of their mean.
    prior_mean
        ``"pairwise"``: an additive term of regulator and target, and a multiple of the similarity of their embeddings, both
        shrunk; ``"additive"``: the paper's linear term, which can only say who regulates or is regulated much.
    n_components
        Principal components of the embeddings that enter the additive term.
    posterior
        ``"map"`` or ``"variational"``: the latter also gives the probability that an edge has the sign it has.
    likelihood
        ``"mse"``, or ``"normal"`` with a variance that depends on the state.
    hidden
        Widths of the two networks, which all genes share.
    alpha
        Weight of mean :math:`|A|`; the prior sd of A is G / (N alpha). By default 0.12 for each gene.
    beta
        Weight of the divergence of z.
    augmentation, sparsity_delay, z_prior, prior_shrinkage, edge_logit_sd, max_radius
        See :class:`pertura.module.InfoSEM`; a `max_radius` of 0 is no limit.
    controls_only
        Train on control cells alone. Otherwise a cell whose gene was knocked out teaches all other genes.
    preset
        ``"paper"``: DeepSEM's setting and its schedule, one epoch of networks and two of A in turn with RMSprop, learned prior of
        z, no augmentation, no delay; with embeddings the additive prior mean without shrinkage. Arguments given beside it win.

    Notes
    -----
    Where the default differs from the papers: a standard normal z, entries set to zero at random, sparsity after a delay and one optimiser
    (DAZZLE's), networks half as wide; the prior mean has a pairwise term and is shrunk. On BEELINE's dendritic cells, among genes without
    known edges, AUPRC without prior is 1.69, 1.13 and 1.76 times chance (STRING, ChIP-seq of the cell type, of any; DeepSEM's setting: 1.59,
    1.16, 1.88); with Gene Ontology 3.07, 1.22 and 2.65, with the additive prior mean 1.71, 1.12 and 1.76. The embeddings alone, without a cell,
    do better where the known edges are themselves text-mined: see "Should I trust this?" in the documentation.

    Examples
    --------
    >>> adata = pertura.datasets.beeline_mdc()
    >>> pertura.model.InfoSEM.setup_anndata(adata)
    >>> model = pertura.model.InfoSEM(adata, n_ensemble=10)
    >>> model.train()
    >>> edges = model.get_grn(regulators=adata.var_names[adata.var["is_regulator"]], top_k=1000)
    >>> model.evaluate_grn(adata.uns["ground_truth"])
    """

    _module_cls = Module
    _training_plan_cls = AlternatingPlan
    _can_predict_features = True
    _only_genes = True
    _draws_effects = True
    _perturbation_optional = True
    module: Module

    def __init__(
        self,
        adata: AnnData | None = None,
        registry: dict | None = None,
        *,
        prior: Literal["none", "embedding", "embedding+edges"] = "none",
        embedding_key: str | pd.DataFrame = "gene_embedding",
        edges_key: str | pd.DataFrame = "known_edges",
        regulators: str | Sequence[str] | None = None,
        n_ensemble: int = 1,
        prior_mean: Literal["pairwise", "additive"] | None = None,
        n_components: int = 32,
        posterior: Literal["map", "variational"] | None = None,
        likelihood: Literal["mse", "normal"] | None = None,
        hidden: Sequence[int] | None = None,
        alpha: float | None = None,
        beta: float | None = None,
        augmentation: float | None = None,
        sparsity_delay: float | None = None,
        z_prior: Literal["standard", "learned"] | None = None,
        prior_shrinkage: float | None = None,
        edge_logit_sd: float | None = None,
        max_radius: float | None = None,
        controls_only: bool = False,
        preset: Literal["paper"] | None = None,
    ) -> None:
        given = {name: value for name, value in locals().items() if name in _DEFAULT and value is not None}
        given |= {} if alpha is None else {"alpha": alpha}
        _check_options(
            {**given, "prior": prior, "preset": preset, "n_ensemble": n_ensemble, "n_components": n_components}
        )
        check_flag("controls_only", controls_only)
        for name, value in (("embedding_key", embedding_key), ("edges_key", edges_key)):
            if not isinstance(value, (str, pd.DataFrame)):
                raise ValueError(f"`{name}` must be a key or a DataFrame, got {type(value).__name__}.")
        super().__init__(adata, registry)
        genes = self.gene_names
        # names and tables are saved with the model, which can then be loaded with data that lack them
        regulators = regulator_names(self.adata, regulators, genes)
        embedding_key = embedding_table(self.adata, embedding_key, genes) if prior != "none" else "gene_embedding"
        edges_key = known_table(self.adata, edges_key, genes) if prior == "embedding+edges" else "known_edges"
        options = {**_DEFAULT, "alpha": _SPARSITY * len(genes), **(_PAPER if preset == "paper" else {}), **given}
        pairwise = options.pop("prior_mean") == "pairwise"
        rows = genes.get_indexer(regulators)
        if prior != "none":
            embedding, similarity = described_genes(embedding_key, genes, n_components)
            options |= {"embedding": embedding, "similarity": similarity[rows] if pairwise else None}
        if prior == "embedding+edges":
            options["known"] = label_matrix(edges_key, regulators, genes)
        options["max_radius"] = options["max_radius"] or None
        self.preset, self.controls_only = preset, controls_only
        self.module = self._module_cls(
            n_genes=len(genes),
            n_batch=self.summary_stats["n_batch"],
            regulators=rows,
            knocked_out=genes.get_indexer(list(self.vocabulary.names)),
            n_ensemble=n_ensemble,
            native_scale="log1p" if self.data_kind == "counts" else "layer",
            **options,
        )
        self._model_summary_string = (
            f"InfoSEM: {len(regulators)} regulators, {len(genes)} genes, prior {prior}, {n_ensemble} in the ensemble"
        )
        self.init_params_ = self._get_init_params(locals())

    @classmethod
    def setup_anndata(
        cls,
        adata: AnnData,
        *,
        perturbation_key: str | None = None,
        control: str = "control",
        layer: str | None = None,
        context_key: str | None = None,
        dose_key: str | None = None,
        batch_key: str | None = None,
        size_factor_key: str | None = None,
        perturbation_features_key: str | None = None,
        delimiter: str = "+",
        **kwargs: Any,
    ) -> None:
        """Register an AnnData with the model.

        Parameters
        ----------
        adata
            Cells x genes. Counts are modelled as log1p of counts per 10,000, other values as they are.
        perturbation_key
            Column of ``obs`` that names the genes that were knocked out, if any were; `None`: none was. Cells with other
            perturbations train the network like unperturbed ones.
        control
            Label of unperturbed cells.
        layer, context_key, dose_key, size_factor_key, delimiter
            As in :meth:`PerturbationModel.setup_anndata`. A dose is the share of its expression that a gene loses.
        batch_key
            Column of ``obs`` with the batch, whose mean expression is taken away.
        perturbation_features_key
            Not used: a perturbation is the knock-out of a gene.
        **kwargs
            As in :meth:`PerturbationModel.setup_anndata`.
        """
        args = cls._get_setup_method_args(**locals())
        if perturbation_features_key is not None:
            raise ValueError(
                "`perturbation_features_key`: InfoSEM knocks out genes of the data, and needs no descriptions of them. "
                "Leave it out; PertVAE or baseline.Linear predict other perturbations."
            )
        cls._setup(adata, args)

    # -- what can be asked ------------------------------------------------------------------------------------------

    @property
    def vocabulary(self) -> Vocabulary:
        """The perturbations that the model knows; every gene can be knocked out, described by its position from 1."""
        position = np.arange(1, len(self.gene_names) + 1, dtype=np.float32)
        return replace(super().vocabulary, features=pd.DataFrame({"gene": position}, index=self.gene_names))

    def _check_representable(self, label: str) -> None:
        new = [m for m in self.vocabulary.parse(label) if m not in self.gene_names]
        if new and self._discrepancy.step(Question(label)) not in ("unseen", "unseen with features"):
            raise ValueError(
                f"`perturbation`: {', '.join(map(repr, new))} is not a gene of the model, and InfoSEM knocks out genes. "
                "PertVAE or SAMSVAE predict other perturbations."
            )
        super()._check_representable(label)

    def _is_known(self, name: str) -> bool:
        return name in self.gene_names

    # -- training ---------------------------------------------------------------------------------------------------

    def _data_module(
        self, train_idx: NDArray[np.int64], val_idx: NDArray[np.int64], batch_size: int, seed: int
    ) -> PerturbationDataModule:
        if self.controls_only:
            train_idx, val_idx = (rows[self._is_control(self.adata_manager, rows)] for rows in (train_idx, val_idx))
            if not len(train_idx):
                raise ValueError("`controls_only`: there is no control cell among the training cells.")
        return super()._data_module(train_idx, val_idx, batch_size, seed)

    @torch.no_grad()
    def _initialise(self, data: PerturbationDataModule) -> None:
        """Means of batches and spreads of genes, from the training cells."""
        if self.is_trained_:
            return
        module = self.module
        n_batch, n_genes = module.input_mean.shape
        total, square = torch.zeros(n_batch, n_genes).double(), torch.zeros(n_batch, n_genes).double()
        number = torch.zeros(n_batch).double()
        for tensors in data.iterate(data.train_idx):
            x = module.normalised(tensors[KEYS.X]).double()
            batch = tensors[KEYS.BATCH].long().flatten()
            total.index_add_(0, batch, x)
            square.index_add_(0, batch, x**2)
            number.index_add_(0, batch, torch.ones(len(x)).double())
        overall = total.sum(0) / number.sum()
        mean = torch.where(number[:, None] > 0, total / number.clamp(min=1)[:, None], overall)
        variance = (square.sum(0) - (number[:, None] * mean**2).sum(0)) / number.sum()
        sd = variance.clamp(min=0).sqrt()
        module.input_mean.copy_(mean)
        # a gene that does not vary must not enter blown up
        module.input_scale.copy_(sd.clamp(min=1e-3 * float(sd.max()) + 1e-6))

    def _plan_defaults(self) -> dict[str, Any]:
        if self.preset == "paper":
            # networks at 1e-4; A, whose rates are in units of 5e-4, at DeepSEM's 2e-5 for 821 genes
            schedule = {"n_epochs_networks": 1, "n_epochs_grn": 2}
            return {"optimizer": "rmsprop", "lr": 1e-4, "grn_lr_factor": 5.0, **schedule}
        return {"lr": 5e-4}

    def _default_batch_size(self, n_cells: int) -> int:
        return 64

    def _default_max_epochs(self, n_batches: int) -> int:
        return int(np.clip(round(540 / n_batches), 10, 400))

    def _after_training(self, train_idx: NDArray[np.int64]) -> None:
        self.module.eval()
        own = train_idx[self._is_control(self.adata_manager, train_idx)] if self.controls_only else train_idx
        own = np.sort(np.random.default_rng(0).permutation(own)[:2000])
        total = sum(self.module.squared_residuals(cells) for cells in self._cells(self.adata_manager, own, 256))
        self.module.residual_sd.copy_((total / len(own)).sqrt().clamp(min=0.01))
        super()._after_training(train_idx)

    # -- what it learned --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _network(self) -> Network:
        module = self.module
        weight = module.network()
        proba = module.edge_proba()
        if proba is None and module.network_log_sd is not None:
            ratio = module.network_weight.abs() / module.network_log_sd.exp()
            proba = 0.5 * (1 + torch.erf(ratio / 2**0.5))
        prior = module.prior_mean()
        return Network(
            regulators=self.gene_names[module.regulators.cpu().numpy()],
            genes=self.gene_names,
            weight=(weight.abs().mean(0) * weight.mean(0).sign()).cpu().numpy(),
            proba=None if proba is None else (proba.mean(0) * module.no_loops).cpu().numpy(),
            prior_mean=None if not isinstance(prior, torch.Tensor) else prior.mean(0).cpu().numpy(),
        )

    @torch.no_grad()
    def get_prior_summary(self) -> pd.DataFrame:
        """How much of the network is what the embeddings say.

        Returns
        -------
        One row per member of the ensemble: ``explained``, the share of the variance of A that the prior mean explains (below 0
        where it is off); ``sd_A``, ``sd_additive`` and, for a pairwise prior, ``similarity``, the coefficient of the similarity of
        the embeddings; all but the first in units of 1 / (G - 1), at which weights start.

        Raises
        ------
        ValueError
            For a model without embeddings.
        """
        self._check_if_trained(warn=False, message="The model is not trained. Call `train()` first.")
        module = self.module
        if not module.additive:
            raise ValueError("`prior='none'`: there is no prior mean. Make the model with `prior='embedding'`.")
        keep = module.no_loops.bool()
        weight = (module.network_weight / module.unit)[:, keep]
        mean = (module.prior_mean() / module.unit)[:, keep]
        table = {
            "explained": 1 - (weight - mean).var(1) / weight.var(1),
            "sd_A": weight.std(1),
            "sd_additive": (mean - self._pairwise()[:, keep]).std(1),
        }
        if hasattr(module, "prior_kernel"):
            table["similarity"] = module.prior_kernel
        return pd.DataFrame({k: v.cpu().numpy() for k, v in table.items()}).rename_axis("member")

    def _pairwise(self) -> torch.Tensor:
        module = self.module
        if not hasattr(module, "prior_kernel"):
            return torch.zeros(module.n_ensemble, *module.no_loops.shape, device=module.no_loops.device)
        return module.prior_kernel[:, None, None] * module.similarity

    @torch.no_grad()
    def simulate(self, n_cells: int = 1000, *, seed: int | None = None) -> AnnData:
        """Cells that the model makes up, from noise through the network to expression.

        Parameters
        ----------
        n_cells
            Number of cells.
        seed
            Of the draws; by default ``scvi.settings.seed``, else 0.

        Returns
        -------
        AnnData with expression on the modelled scale: log1p of counts per 10,000 for counts, else that of the layer.
        """
        check_whole("n_cells", n_cells)
        seed = self._seed(seed)
        self._check_if_trained(warn=False, message="The model is not trained. Call `train()` first.")
        self.module.eval()
        with seeded(seed, self.module.input_mean.device):
            x = self.module.generate(n_cells).cpu().numpy()
        return AnnData(X=x, var=pd.DataFrame(index=self.gene_names))


def _check_options(options: dict[str, Any]) -> None:
    for name, allowed in _CHOICES.items():
        if name in options and options[name] not in allowed:
            raise ValueError(f"`{name}` must be one of {', '.join(map(repr, allowed))}, got {options[name]!r}.")
    for name in ("n_ensemble", "n_components"):
        check_whole(name, options[name])
    if "hidden" in options:
        check_widths("hidden", options["hidden"])
    for name in {"alpha", "beta", "prior_shrinkage", "max_radius"} & options.keys():
        check_number(name, options[name], least=0)
    for name in {"alpha", "edge_logit_sd"} & options.keys():
        check_number(name, options[name], above=0)
    for name in {"augmentation", "sparsity_delay"} & options.keys():
        check_number(name, options[name], least=0, below=1)
