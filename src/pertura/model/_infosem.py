"""InfoSEM for users."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from numpy.typing import NDArray
from scvi import settings

from pertura.data._datamodule import PerturbationDataModule
from pertura.data._perturbation import Perturbation
from pertura.effects import ConditionTable, closed_form_networks, combine_networks, explained, stack_networks
from pertura.module._infosem import InfoSEM as Module
from pertura.module._pairs import PairPrior
from pertura.train._alternating import AlternatingPlan
from pertura.train._trainer import TrainRunner

from ._network_priors import embedding_table, gene_descriptions, known_table, label_matrix, regulator_names
from .base import GeneNetwork, GRNModel, Options, option
from .base._arguments import check_whole, resolve_seed
from .base._predict import device_of, seeded

# alpha per gene where none is given: DeepSEM's 100 for the 821 genes of mouse dendritic cells, and what left-out cells prefer
_ALPHA_PER_GENE, _LESS_ALPHA = 100 / 821, 0.01
_MAX_RESIDUAL_CELLS, _MAX_STEPS_AGAIN = 2000, 1080
# the other networks of `combine` take genes^3, and a second fit
_MAX_COMBINED_GENES, _MAX_COMBINED_CELLS, _MIN_COMBINED_CELLS = 3000, 5000, 10
# mean distance of the weights from their start, and largest weight, in units of the start
_LEAST_MOVED, _LEAST_LARGEST = 0.5, 0.1
_LEAST_EXPLAINED = 0.5  # of the variance that correlations explain
_MODULE_OPTIONS = (
    "n_ensemble",
    "posterior",
    "likelihood",
    "hidden",
    "beta",
    "augmentation",
    "sparsity_delay",
    "z_prior",
    "prior_shrinkage",
    "edge_logit_sd",
    "max_radius",
)


@dataclass(frozen=True)
class InfoSEMOptions(Options):
    """Options of :class:`InfoSEM`, which has their documentation."""

    prior: Literal["none", "embedding", "embedding+edges"] = option(
        "none", one_of=("none", "embedding", "embedding+edges")
    )
    embedding_key: str | pd.DataFrame = option("gene_embedding")
    edges_key: str | pd.DataFrame = option("known_edges")
    regulators: str | Sequence[str] | None = option(None)
    n_ensemble: int = option(1, whole=1)
    prior_form: Literal["size", "mean"] = option("size", one_of=("size", "mean"))
    n_components: int = option(64, whole=1)
    posterior: Literal["map", "variational"] = option("map", one_of=("map", "variational"))
    likelihood: Literal["mse", "normal"] = option("mse", one_of=("mse", "normal"))
    hidden: Sequence[int] = option((64, 64), widths=True)
    alpha: float | None = option(None, above=0)
    beta: float = option(1.0, above=0)
    augmentation: float = option(0.1, least=0, below=1)
    sparsity_delay: float = option(0.05, least=0, below=1)
    z_prior: Literal["standard", "learned"] = option("standard", one_of=("standard", "learned"))
    prior_shrinkage: float = option(0.5, least=0)
    edge_logit_sd: float = option(1.0, above=0)
    max_radius: float = option(0.95, least=0)
    combine: bool = option(True, flag=True)
    controls_only: bool = option(False, flag=True)
    lr: float = option(5e-4, above=0)
    grn_lr_factor: float = option(1.0, above=0)
    optimizer: Literal["adam", "rmsprop"] = option("adam", one_of=("adam", "rmsprop"))
    alternate: bool = option(False, flag=True)
    n_steps: int = option(540, whole=1)
    n_epochs: int = option(10, whole=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("embedding_key", "edges_key"):
            if not isinstance(getattr(self, name), (str, pd.DataFrame)):
                raise ValueError(f"`{name}` must be a key or a DataFrame, got {type(getattr(self, name)).__name__}.")


# DeepSEM's schedule, with its alpha of 100 for 821 genes: encoder and decoder at 1e-4; A at 2e-5 for 821 genes, in units of 33 lr / (G - 1)
_DEEPSEM = {
    "prior_form": "mean",
    "n_components": 32,
    "hidden": (128, 128),
    "beta": 1.0,
    "augmentation": 0.0,
    "sparsity_delay": 0.0,
    "z_prior": "learned",
    "prior_shrinkage": 0.0,
    "max_radius": 0.0,
    "combine": False,
    "lr": 1e-4,
    "grn_lr_factor": 5.0,
    "optimizer": "rmsprop",
    "alternate": True,
    "n_steps": 2000,
    "n_epochs": 90,
}


class InfoSEM(GRNModel):
    r"""Gene regulatory networks from expression with informative priors :cite:p:`Cui2025`, and DeepSEM without them.

    A structural-equation model: the state of each gene is a sum of the states of its regulators and of noise of its own, and
    expression a function of the state. :meth:`get_grn` gives the weights, :meth:`evaluate_grn` compares them with known edges.
    ``predict_perturbation("STAT1")`` knocks a gene of the data out: nothing is left of its expression, each cell keeps the noise of its
    other genes, and these follow along the paths from the gene. ``dose=0.3`` knocks it down by 30 %, where no doses were
    registered. The latent state of a cell is that of its genes.

    Parameters
    ----------
    adata
        Set up by :meth:`setup_anndata`; `None` to make a model of a `registry` alone.
    registry
        Registry of a saved model.
    prior
        ``"none"``: weights are a priori 0 (DeepSEM); ``"embedding"``: gene embeddings say which pairs may have large ones
        (InfoSEM-B); ``"embedding+edges"``: and so do known edges, also of other genes (InfoSEM-BC).
    embedding_key
        Gene embeddings: key of ``varm``, or a DataFrame, one row per gene. Genes without one (all 0 or NaN, or no row) are
        taken for average.
    edges_key
        Known edges: key of ``varp`` (``[source, target]``: 1 for known edges, -1 for pairs that are known to be none), or a
        DataFrame ``source, target`` (and ``weight``). Pairs that are not listed are unknown; if none is known to be no edge, those
        of regulators and genes with a known edge teach what no edge looks like. Leave out the edges that you test with.
        Known edges are believed: motifs in promoters (:func:`pertura.datasets.motif_network`), most of which are not bound, are none.
    regulators
        Genes whose rows are learned: boolean column of ``var``, or names. `None`: every gene; ``get_grn(regulators=)`` then keeps
        those of regulators. Their rows alone are much faster where genes are many, and less accurate: shared variation
        (e.g. batch) is then absorbed into these edges.
    n_ensemble
        Models trained side by side; weights are their mean :math:`|A|`, with the sign of their mean.
    prior_form
        ``"size"``: similar genes may have larger weights of either sign, as far as the weights of a first half of the training,
        without prior, say so of other genes; ``"mean"``: the paper's prior mean, linear in the embeddings of regulator and target,
        which can only say who regulates or is regulated much, and its logits of known edges.
    n_components
        Principal components of the embeddings that enter the prior mean, or the classifier of known edges.
    posterior
        ``"map"`` or ``"variational"``: the latter also gives the probability that an edge has the sign it has.
    likelihood
        ``"mse"``: half of each gene's variance is noise while training; ``"normal"``: a variance of the noise that depends on the state, and is
        at most that. Where noise may be all of the variance, the state is soon not used and the weights shrink to 0.
    hidden
        Widths of encoder and decoder, which all genes share.
    alpha
        Weight of mean :math:`|A|`; the prior sd of A is G / (N alpha). `None`: 0.12 for each gene, 0.0012 where networks are
        combined without a prior.
    beta
        Weight of the divergence of z.
    augmentation
        Share of entries that are set to zero in a training step.
    sparsity_delay
        Share of the training before the prior of A counts.
    z_prior
        ``"standard"``, or ``"learned"`` mean and variance of each gene's noise.
    prior_shrinkage
        For a prior mean: weight of its absolute value in units of that of the deviation of A from it.
    edge_logit_sd
        For a prior mean: sd of the prior of the logits of known edges.
    max_radius
        Spectral radius beyond which A is scaled down; 0: no limit.
    combine
        Where no knock-outs tell regulators from targets: order edges by the weights together with two networks in closed form (CLR and
        the inverse square root of the covariance), each as far as it predicts a third of the cells that was left out. That takes a
        second fit, without prior and on the other cells, and is not done for more than 3,000 genes.
        ``model.network_shares_`` says what each counts.
    controls_only
        Train on control cells alone. Otherwise a cell whose gene was knocked out informs all other genes.
    lr
        Learning rate of encoder and decoder.
    grn_lr_factor
        Multiplies the learning rates of A and of its prior.
    optimizer
        ``"adam"`` or ``"rmsprop"``.
    alternate
        Train encoder and decoder for one epoch and A for two, in turn.
    n_steps, n_epochs
        Length of training where ``train`` is given no number of epochs: at least so many steps and so many epochs, twice as many
        with a prior of the size.
    preset
        ``"paper"``: the InfoSEM paper's standard normal z, state-dependent variance and additive prior mean, without shrinkage,
        augmentation or delay, trained with DeepSEM's schedule of 90 epochs, and at least 2,000 steps; ``"deepsem"``: DeepSEM's own setting, which has a learned
        prior of z and the squared error. Options given beside it win.

    Notes
    -----
    Where the default differs from the papers: entries set to zero at random, sparsity after a delay and one optimizer
    (DAZZLE's), encoder and decoder half as wide; the prior is one of the size of a weight, not of its mean.

    Cells without perturbations tell who is connected, and hardly who regulates whom: ``get_grn().attrs["direction"]`` says whether
    knock-outs, or a list of regulators, support the direction of edges.

    No expression is 0, and the smallest value of each gene in the training cells where a layer has negative values or none of 0. A knock-down
    leaves a share of the counts, and of other layers the share of the distance to no expression; the state of the gene, which is what acts
    on other genes, goes the same share of the way. A cell that was knocked out keeps what was measured of the gene where
    the same is asked again.

    Counts are modelled as log1p of counts per 10,000 with normal noise, of which predictions read values below 0 as 0. Replicates
    (:meth:`posterior_predictive_sample`) are on that scale, and :meth:`get_marginal_ll` is the normal density of it: compare it
    with other models of log1p expression, not with models of counts.

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
    _options_cls = InfoSEMOptions
    _presets: ClassVar[dict[str, dict[str, Any]]] = {
        "paper": {**_DEEPSEM, "z_prior": "standard", "likelihood": "normal"},
        "deepsem": _DEEPSEM,
    }
    _training_plan_cls = AlternatingPlan
    _can_predict_features = True
    _only_genes = True
    _draws_effects = True
    _perturbation_optional = True
    module: Module

    def _look_up(self) -> dict[str, Any]:
        options, genes, found = self.options, self.gene_names, {}
        if options.regulators is not None:
            found["regulators"] = regulator_names(self.adata, options.regulators, genes)
        if options.prior != "none":
            found["embedding_key"] = embedding_table(self.adata, options.embedding_key, genes)
        if options.prior == "embedding+edges":
            found["edges_key"] = known_table(self.adata, options.edges_key, genes)
        return found

    def _make_module(self) -> None:
        options, genes = self.options, self.gene_names
        # every gene can be knocked out, and is described by its position, counted from 1
        position = pd.DataFrame({"gene": np.arange(1, len(genes) + 1, dtype=np.float32)}, index=genes)
        vocabulary = replace(self.registered.vocabulary, features=position)
        self.registered = replace(self.registered, vocabulary=vocabulary)
        regulators = list(genes) if options.regulators is None else options.regulators
        rows, informed = genes.get_indexer(regulators), {}
        if options.prior != "none":
            embedding, similarity = gene_descriptions(options.embedding_key, options.n_components)
            known = None
            if options.prior == "embedding+edges":
                known = label_matrix(options.edges_key, regulators, genes)
            if options.prior_form == "size":
                informed = {"pairs": PairPrior(similarity[rows], embedding, rows, known)}
            else:
                informed = {"embedding": embedding, "known": known}
        self.module = Module(
            len(genes),
            len(self.registered.batches),
            regulators=rows,
            knocked_out=genes.get_indexer(list(vocabulary.names)),
            alpha=options.alpha
            or _ALPHA_PER_GENE * len(genes) * (_LESS_ALPHA if self._combines and options.prior == "none" else 1.0),
            combined=self._combines,
            native_scale="log1p" if self.registered.is_counts else "layer",
            **informed,
            **{name: getattr(options, name) for name in _MODULE_OPTIONS},
        )
        self._model_summary_string = (
            f"{type(self).__name__}: {len(regulators)} regulators, {len(genes)} genes, prior {options.prior}, "
            f"{options.n_ensemble} in the ensemble"
        )

    @property
    def _combines(self) -> bool:
        options, n_genes = self.options, len(self.gene_names)
        wanted = options.combine and options.posterior == "map" and not self._perturbed
        wanted = wanted and (options.prior == "none" or options.prior_form == "size")
        return wanted and 2 < n_genes <= _MAX_COMBINED_GENES

    @property
    def _perturbed(self) -> bool:
        """Whether knock-outs tell regulators from targets."""
        return bool(self.gene_names.isin(self.vocabulary.names).any()) and not self.options.controls_only

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
            perturbations are trained on like unperturbed ones.
        control
            Label of unperturbed cells.
        layer, context_key, size_factor_key, delimiter
            As in :meth:`PerturbationModel.setup_anndata`.
        dose_key
            Column of ``obs`` with doses: at the highest one a gene is knocked out, below it loses that share of its expression.
        batch_key
            Column of ``obs`` with the batch, whose mean expression is subtracted.
        perturbation_features_key
            Not used: a perturbation is the knock-out of a gene.
        **kwargs
            As in :meth:`PerturbationModel.setup_anndata`.
        """
        if perturbation_features_key is not None:
            raise ValueError(
                "`perturbation_features_key`: InfoSEM knocks out genes of the data, and needs no descriptions of them. "
                "Leave it out; PertVAE or baseline.Linear predict other perturbations."
            )
        cls._setup(adata, cls._get_setup_method_args(**locals()))

    # -- what can be asked ------------------------------------------------------------------------------------------

    def _check_representable(self, label: str) -> None:
        new = [m for m in self.vocabulary.parse(label) if m not in self.gene_names]
        if new and self._discrepancy.step(Perturbation(label)) != "unseen":
            raise ValueError(
                f"`perturbation`: {', '.join(map(repr, new))} is not a gene of the model, and InfoSEM knocks out genes. "
                "PertVAE or SAMSVAE predict other perturbations."
            )
        super()._check_representable(label)

    def _can_take_back(self, name: str) -> bool:
        return name in self.gene_names

    # -- training ---------------------------------------------------------------------------------------------------

    # a knock-out keeps what the network leaves unexplained of each gene, which is fitted when training ends
    _predicts_in_training = False

    def _data_module(
        self, train_idx: NDArray[np.int64], val_idx: NDArray[np.int64], batch_size: int, seed: int
    ) -> PerturbationDataModule:
        if self.options.controls_only:
            train_idx, val_idx = (rows[self._registered_cells(rows).is_control] for rows in (train_idx, val_idx))
            if not len(train_idx):
                raise ValueError("`controls_only`: there is no control cell among the training cells.")
        return super()._data_module(train_idx, val_idx, batch_size, seed)

    def _initialize(self, data: PerturbationDataModule, table: ConditionTable) -> None:
        """Means of batches and spreads of genes, from the cells that train."""
        if self.is_trained_:
            return
        moments, n, mean = table.normalized, table.batch_n, table.batch_mean.astype(np.float64)
        if self.options.controls_only:
            moments, n = table.control_moments, np.zeros(len(n))
            total = np.zeros(mean.shape)
            np.add.at(n, table.control_batch, table.control_n.sum(1))
            np.add.at(total, table.control_batch, (table.control_n[..., None] * table.control_mean).sum(1))
            mean = np.where(n[:, None] > 0, total / np.maximum(n, 1)[:, None], moments.mean)
        between = (n / n.sum()) @ (mean - moments.mean) ** 2
        sd = np.sqrt(np.maximum(moments.variance - between, 0.0))
        self.module.standardize(torch.as_tensor(mean), torch.as_tensor(sd), self._no_expression(data.train_idx))

    def _no_expression(self, rows: NDArray[np.int64]) -> torch.Tensor | float:
        """Value of each gene that means none: 0, or the smallest of the training cells where there are negative ones."""
        if self.registered.is_counts or self.registered.nonnegative:
            return 0.0
        parts = self._registered_cells(rows).cells(4096, torch.device("cpu"))
        return torch.stack([cells.x.amin(0) for cells in parts]).amin(0)

    def _complete(self, table: ConditionTable) -> None:
        rows = self.train_indices
        if self.options.controls_only:
            rows = rows[self._registered_cells(rows).is_control]
        rows = np.random.default_rng(0).permutation(rows)
        some = np.sort(rows[:_MAX_RESIDUAL_CELLS])
        self.module.fit_residuals(self._registered_cells(some).cells(256, device_of(self.module)))
        self._warn_of_weights(rows)
        started = self.module.pairs is None or bool(self.module.informed)
        if self._combines and started and len(rows) >= _MIN_COMBINED_CELLS:
            self._progress.stage("Comparing networks")
            self._combine(rows)

    def _warn_of_weights(self, rows: NDArray[np.int64]) -> None:
        """Warn where training was too short, or sparsity too dear, for weights that mean something."""
        (moved, largest), problem = self.module.moved(), ""
        if moved < _LEAST_MOVED:
            problem = f"moved by {moved:.0%} of the value they started at. Train longer (`max_epochs`) or faster (`lr`)"
        elif largest < _LEAST_LARGEST:
            problem = f"were all shrunk to nearly 0. Ask for less sparsity (`alpha`, here {self.module.alpha:.3g})"
        elif 2 < len(self.gene_names) <= _MAX_COMBINED_GENES:
            x = self._standardized(rows[:_MAX_RESIDUAL_CELLS])
            correlation = x.T @ x
            np.fill_diagonal(correlation, 0.0)
            own, other = explained(_all_rows(self.module), x), explained(correlation, x)
            if own < _LEAST_EXPLAINED * other:
                advice = "Train longer (`max_epochs`), or with the default settings in place of a preset's"
                if self._combines:
                    advice = "Edges are ordered by other networks too (`network_shares_`); signs and knock-outs are not"
                problem = f"explain {own:.0%} of how genes vary, and plain correlations {other:.0%}. {advice}"
        if problem:
            warnings.warn(
                f"The weights of the network mean little: they {problem}.", stacklevel=settings.warnings_stacklevel + 2
            )

    def _runner(
        self, data: PerturbationDataModule, plan_kwargs: dict[str, Any], max_epochs: int | None, **trainer_kwargs: Any
    ) -> TrainRunner:
        self._asked = {"plan_kwargs": dict(plan_kwargs), "batch_size": data.batch_size, "seed": data.seed}
        self._asked |= {name: trainer_kwargs[name] for name in ("accelerator", "devices")}
        return super()._runner(data, plan_kwargs, max_epochs, **trainer_kwargs)

    def _combine(self, rows: NDArray[np.int64]) -> None:
        """Order edges by the weights and by networks in closed form, as far as each predicts cells that it was not learned from."""
        cut, module = 2 * len(rows) // 3, self.module
        share = np.full(3, 1 / 3)
        train, left_out = (self._standardized(part) for part in (rows[:cut], rows[cut:]))
        if not self.trainer.interrupted:
            share = stack_networks([_all_rows(self._fit_to(rows[:cut])), *closed_form_networks(train)], train, left_out)
        self.network_shares_ = dict(zip(("weights", "clr", "whitening"), share.tolist(), strict=True))
        of_regulators = module.regulators.cpu().numpy()
        # weights that were learned with a prior say what it says
        networks = [(module.mean_network() if module.pairs is None else module.first_size).cpu().numpy()]
        networks += [network[of_regulators] for network in closed_form_networks(np.concatenate([train, left_out]))]
        module.rank_pairs(combine_networks(networks, share, module.no_loops.bool().cpu().numpy()))

    def _standardized(self, rows: NDArray[np.int64]) -> NDArray[np.float64]:
        """Standardized expression of the first of some cells."""
        cells = self._registered_cells(np.sort(rows[:_MAX_COMBINED_CELLS])).cells(256, device_of(self.module))
        return torch.cat([self.module.clipped(part).cpu() for part in cells]).double().numpy()

    def _fit_to(self, rows: NDArray[np.int64]) -> Module:
        """A module that was trained on some of the cells for as many steps, within limits."""
        steps = len(self.history_["elbo_train"]) * -(-len(self.train_indices) // self._asked["batch_size"])
        epochs = max(1, round(min(steps, _MAX_STEPS_AGAIN) / -(-len(rows) // self._asked["batch_size"])))
        other = copy(self)
        other.options = replace(self.options, prior="none", combine=False, alpha=self.module.alpha, n_ensemble=1)
        other.is_trained_, other.history_ = False, None
        other._after_training = lambda *_: None  # it predicts nothing
        with torch.random.fork_rng(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            other._make_module()
            split = {"external_indexing": [np.sort(rows)]}
            other.train(epochs, datasplitter_kwargs=split, enable_progress_bar=False, **self._asked)
        return other.module

    def _plan_defaults(self) -> dict[str, Any]:
        options = self.options
        plan = {"lr": options.lr, "grn_lr_factor": options.grn_lr_factor, "optimizer": options.optimizer}
        return {**plan, "n_epochs_networks": 1, "n_epochs_grn": 2} if options.alternate else plan

    def _default_batch_size(self, n_cells: int) -> int:
        return 64

    def _default_max_epochs(self, n_batches: int) -> int:
        return super()._default_max_epochs(n_batches) * (1 if self.module.pairs is None else 2)

    # -- what it learned --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _gene_network(self) -> GeneNetwork:
        module, options = self.module, self.options
        proba, prior = module.edge_proba(), module.prior_mean()
        ordered = bool(module.informed)
        if ordered or module.pairs is not None:
            proba = module.log_odds.sigmoid()[None]
        elif proba is None and module.network_log_sd is not None:
            proba = torch.special.ndtr(module.network_weight.abs() / module.network_log_sd.exp())
        return GeneNetwork(
            regulators=self.gene_names[module.regulators.cpu().numpy()],
            genes=self.gene_names,
            weight=module.mean_network().cpu().numpy(),
            proba=None if proba is None else (proba.mean(0) * module.no_loops).cpu().numpy(),
            prior_mean=None if not isinstance(prior, torch.Tensor) else prior.mean(0).cpu().numpy(),
            rank_by="proba" if ordered or module.pairs is not None else "weight",
            direction="perturbations" if self._perturbed else "none" if options.regulators is None else "regulators",
        )

    @torch.no_grad()
    def get_prior_summary(self) -> pd.DataFrame:
        """What the embeddings and known edges say of the size of weights.

        Returns
        -------
        One row per feature of a pair of genes: ``coefficient`` of the log of the size of its weight, ``se``, its standard error
        over genes, and ``kept``, the share of it that the prior has: 0 where it is no larger than by chance. The features are the
        ``similarity`` of the embeddings, and what a classifier of ``known_edges`` says of pairs of other genes.

        Raises
        ------
        ValueError
            For a model without a prior of the size.
        """
        self._check_if_trained(warn=False, message="The model is not trained. Call `train()` first.")
        module = self.module
        if module.pairs is None:
            raise ValueError(
                "`prior`, `prior_form`: there is no prior of the size of weights. Make the model with `prior='embedding'`."
            )
        table = pd.DataFrame(module.pair_coefficients.cpu().numpy(), columns=["coefficient", "se", "kept"])
        return table.set_index(pd.Index(module.pairs.features, name="feature"))

    @torch.no_grad()
    def simulate(self, n_cells: int = 1000, *, seed: int | None = None) -> AnnData:
        """Simulate unperturbed cells: noise, the network's states, and expression with its measurement noise.

        Parameters
        ----------
        n_cells
            Number of cells.
        seed
            Seed of the draws; by default ``scvi.settings.seed``, else 0.

        Returns
        -------
        AnnData with expression on the modelled scale: log1p of counts per 10,000 for counts, else that of the layer.
        """
        check_whole("n_cells", n_cells)
        seed = resolve_seed(seed)
        self._check_if_trained(warn=False, message="The model is not trained. Call `train()` first.")
        self.module.eval()
        with seeded(seed, device_of(self.module)):
            x = self.module.generate(n_cells).cpu().numpy()
        return AnnData(X=x, var=pd.DataFrame(index=self.gene_names))


def _all_rows(module: Module) -> NDArray[np.float64]:
    """Weights of all pairs of genes, 0 for those of genes that are no regulators."""
    weight = module.network_weight.new_zeros(module.n_genes, module.n_genes)
    return weight.index_copy(0, module.regulators, module.mean_network()).double().cpu().numpy()
