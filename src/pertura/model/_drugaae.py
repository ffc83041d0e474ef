"""DrugAAE for users."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from numpy.typing import NDArray
from scipy import sparse

from pertura.baseline._pseudobulk import Pseudobulk, pseudobulk
from pertura.data._datamodule import PerturbationDataModule
from pertura.data._pairs import embed
from pertura.module._drugaae import DrugAAE as Module
from pertura.nn._ridge import correlations
from pertura.train._adversarial import AdversarialPlan

from ._arguments import check_flag, check_number, check_whole, check_widths
from ._base import PerturbationModel
from ._description import DescriptionMixin, fit_effects, order_features, split_columns
from ._engine import Question

_PAPER = {"residual": False, "counterfactual_weight": 0.0}
_SHARES = (0.0, 0.25, 0.5, 1.0)
_MAX_HIDDEN, _MIN_HIDDEN = 40, 5


class DrugAAE(DescriptionMixin, PerturbationModel):
    r"""Drugs that were never put on these cells, from their texts and signatures, and their targets :cite:p:`ParkSongJang`.

    An adversarial autoencoder takes the perturbation out of a cell's latent state; drugs come back as a vector made of what is
    known of them (a text, signatures of differential expression, or both) and of no number of their own, so that a row in the
    table of descriptions is all a new drug needs. Genes are embedded jointly from control expression and a network of
    protein-protein interactions, which encoder, decoder and signatures read. Doses follow a Hill curve whose shape depends on
    the drug, combinations add up.

    By default the network stands on an effect in closed form, which the paper does not have: of a trained drug its measured
    effect, of another what a ridge regression on its description says. How far the descriptions (and the network) are
    believed is decided by training drugs that were left out; where they tell nothing, the mean effect remains.

    Parameters
    ----------
    adata
        Set up by :meth:`setup_anndata`; `None` to make a model of a `registry` alone.
    registry
        Registry of a saved model.
    n_latent
        Dimension of the basal state and of a drug's vector.
    n_gene_embedding
        Width of gene embeddings.
    n_effect_components
        Most components in which effects in closed form are kept.
    encoder_hidden, decoder_hidden, discriminator_hidden
        Widths of the layers.
    interaction_rank
        Rank of the interaction of drugs and contexts.
    likelihood
        ``"nb"`` for counts, ``"normal"`` for others; by default what was registered.
    residual
        Whether the effect in closed form is there. `False`: the network alone, as in the paper.
    adversary_weight, contrast_weight, counterfactual_weight, modality_dropout, dropout_rate, free_encoder, link_sharpness
        See :class:`pertura.module.DrugAAE`.
    preset
        ``"paper"``: no closed form and no training on predicted effects. Arguments given beside it win.
        Where defaults differ: on TG-GATEs, effects of held-out compounds described by two signatures, the default reaches a
        correlation of .70, ridge .60, the paper's setting .42 (with texts .40, .40 and .25; mean effect .40). On simulated
        drugs of known classes the default reaches .82 in 12 epochs, the paper's setting .13, and .74 after 100; .83 without its
        adversary. See ``trust.md``.

    Notes
    -----
    Features of perturbations (``perturbation_features_key``, a table in ``uns``): columns ``"signature:GENE"``, or
    ``"signature:NAME:GENE"`` where there are several signatures, are signatures; all others are text. A row of zeros in either
    part means that it is missing. :func:`pertura.priors.drug_table` makes such tables. Signatures must not come from the cells
    to be predicted: make them from training rows (:func:`pertura.priors.signatures`) or from elsewhere.

    Examples
    --------
    >>> pertura.model.DrugAAE.setup_anndata(
    ...     adata, perturbation_key="drug", control="DMSO", dose_key="dose", perturbation_features_key="drugs"
    ... )
    >>> model = pertura.model.DrugAAE(adata)
    >>> model.train()
    >>> model.get_perturbation_effect("a new drug", dose=1.0)
    """

    _module_cls = Module
    _training_plan_cls = AdversarialPlan
    _can_predict_features = True

    def __init__(
        self,
        adata: AnnData | None = None,
        registry: dict | None = None,
        *,
        n_latent: int = 24,
        n_gene_embedding: int = 32,
        n_effect_components: int = 200,
        encoder_hidden: Sequence[int] = (128,),
        decoder_hidden: Sequence[int] = (),
        discriminator_hidden: Sequence[int] = (64, 64),
        interaction_rank: int = 4,
        likelihood: Literal["nb", "normal"] | None = None,
        link_sharpness: float = 3.0,
        residual: bool | None = None,
        free_encoder: bool = True,
        adversary_weight: float = 5.0,
        contrast_weight: float = 0.1,
        counterfactual_weight: float | None = None,
        modality_dropout: float = 0.3,
        dropout_rate: float = 0.0,
        preset: Literal["paper"] | None = None,
    ) -> None:
        if preset not in (None, "paper"):
            raise ValueError(f"`preset` must be 'paper' or None, got {preset!r}.")
        chosen = {"residual": residual, "counterfactual_weight": counterfactual_weight}
        options: dict[str, Any] = {"residual": True, "counterfactual_weight": 1.0}
        options |= (_PAPER if preset == "paper" else {}) | {k: v for k, v in chosen.items() if v is not None}
        names = (
            "n_gene_embedding",
            "encoder_hidden",
            "decoder_hidden",
            "discriminator_hidden",
            "interaction_rank",
            "link_sharpness",
            "free_encoder",
            "adversary_weight",
            "contrast_weight",
            "modality_dropout",
            "dropout_rate",
        )
        given = locals()
        options |= {name: given[name] for name in names}
        _check_options(options | {"n_latent": n_latent, "n_effect_components": n_effect_components})
        super().__init__(adata, registry)
        self.description_ = None  # what of the descriptions training drugs bore out
        likelihood = ("nb" if self.data_kind == "counts" else "normal") if likelihood is None else likelihood
        if likelihood not in ("nb", "normal"):
            raise ValueError(f"`likelihood` must be 'nb' or 'normal', got {likelihood!r}.")
        if likelihood == "nb" and self.data_kind != "counts":
            raise ValueError(
                "`likelihood='nb'` needs counts, but the registered layer holds negative or fractional values. "
                "Register the counts (`layer=`), or use 'normal'."
            )
        vocabulary, n_genes = self.vocabulary, len(self.gene_names)
        text, signatures = split_columns(vocabulary.features, self.gene_names)
        self.residual = options.pop("residual")
        network = self._network(adata)
        self.module = self._module_cls(
            n_genes=n_genes,
            n_perturbations=vocabulary.n_perturbations,
            n_contexts=len(self.contexts),
            n_batch=self.summary_stats["n_batch"],
            n_text=len(text),
            signatures=[genes for _, genes in signatures.items()],
            n_state=n_latent,
            n_effect_components=min(n_genes, n_effect_components) if self.residual else 0,
            likelihood=likelihood,
            network=self._argument("ppi_key") is not None,
            **options,
        )
        if network is not None:
            self.module.genes.set_network(network)
        if vocabulary.features is not None:
            self.module.features.copy_(torch.as_tensor(vocabulary.feature_matrix(vocabulary.names)))
        self._model_summary_string = (
            f"DrugAAE: {vocabulary.n_perturbations} perturbations, {len(self.contexts)} contexts, {len(text)} text features, "
            f"{len(signatures)} signatures, {'a' if self._argument('ppi_key') else 'no'} network, {likelihood} likelihood"
        )
        self.init_params_ = self._get_init_params(locals())

    @classmethod
    def setup_anndata(
        cls,
        adata: AnnData,
        *,
        perturbation_key: str,
        control: str,
        layer: str | None = None,
        context_key: str | None = None,
        dose_key: str | None = None,
        batch_key: str | None = None,
        size_factor_key: str | None = None,
        ppi_key: str | None = None,
        perturbation_features_key: str | None = None,
        delimiter: str = "+",
        **kwargs: Any,
    ) -> None:
        """Register an AnnData with the model.

        Parameters
        ----------
        adata, perturbation_key, control, layer, context_key, dose_key, batch_key, size_factor_key
            As in :meth:`PerturbationModel.setup_anndata`.
        ppi_key
            Key of ``varp`` with protein-protein interactions, sparse; see :func:`pertura.priors.ppi_network`.
        perturbation_features_key, delimiter, **kwargs
            As in :meth:`PerturbationModel.setup_anndata`; for the names of columns see :class:`DrugAAE`.
        """
        args = cls._get_setup_method_args(**locals())
        # a saved model has its network: data to load it with need none
        if ppi_key is not None and isinstance(adata, AnnData) and "source_registry" not in kwargs:
            check_network(adata, ppi_key)
        cls._setup(adata, args)

    @classmethod
    def _fields(cls, args: dict[str, Any], features: pd.DataFrame | None = None) -> list:
        return super()._fields(args, order_features(features))

    def _network(self, adata: AnnData | None) -> sparse.spmatrix | None:
        key = self._argument("ppi_key")
        if key is None or adata is None or key not in self.adata.varp:
            return None
        at = self.adata.var_names.astype(str).get_indexer(self.gene_names)
        return sparse.csr_matrix(self.adata.varp[key])[at][:, at]

    # -- training ---------------------------------------------------------------------------------------------------

    def _initialise(self, data: PerturbationDataModule) -> None:
        rows = data.train_idx
        max_dose = np.asarray(self.vocabulary.max_dose, dtype=np.float64)
        bulk = pseudobulk(self.adata_manager, rows, max_dose=max_dose, n_contexts=len(self.contexts))
        if not self.is_trained_:
            self._standardise(rows)
        self._share_of_classes(rows)
        self._store_effects(bulk, max_dose)

    @torch.no_grad()
    def _standardise(self, rows: NDArray[np.int64]) -> None:
        """Mean and spread of the training cells, loadings of the controls."""
        module, layer = self.module, self._argument("layer")
        total = square = raw = raw_square = 0.0
        for cells in self._cells(self.adata_manager, rows, 1024):
            x, z = cells.x.cpu().double(), module.normalised(cells.x).cpu().double()
            raw, raw_square = raw + x.sum(0), raw_square + (x**2).sum(0)
            total, square = total + z.sum(0), square + (z**2).sum(0)
        n = len(rows)
        mean, variance = total / n, (square / n - (total / n) ** 2).clamp(min=0)
        module.input_mean.copy_(mean)
        # a gene that hardly varies must not enter blown up
        module.input_scale.copy_(variance.sqrt().clamp(min=0.2 * float(variance.mean().sqrt()) + 1e-6))
        module.effect_sd.copy_(module.input_scale)
        spread = (raw_square / n - (raw / n) ** 2).clamp(min=0).sqrt()
        module.likelihood.initialise((raw / n).float(), spread.float())
        control = rows[self._is_control(self.adata_manager, rows)]
        some = np.sort(np.random.default_rng(0).permutation(control)[:20_000])
        if len(some) < 3:
            return
        at = self.adata.var_names.astype(str).get_indexer(self.gene_names)
        values = (self.adata.X if layer is None else self.adata.layers[layer])[some][:, at]
        _, basis = embed(values, self.data_kind == "counts", module.genes.loadings.shape[1], return_basis=True)
        module.genes.loadings.zero_()
        module.genes.loadings[:, : len(basis)] = torch.as_tensor(basis).T * basis.shape[1] ** 0.5

    def _share_of_classes(self, rows: NDArray[np.int64]) -> None:
        codes, dose = self._actions(self.adata_manager, rows)
        present = (codes >= 0) & (dose > 0)
        n = np.bincount(codes[present], minlength=self.vocabulary.n_perturbations)
        share = np.append(n, (~present.any(1)).sum()) / len(rows)
        self.module.class_share.copy_(torch.as_tensor(share))

    @torch.no_grad()
    def _store_effects(self, bulk: Pseudobulk, max_dose: NDArray[np.float64]) -> None:
        """What training cells say of effects, and descriptions of them."""
        module = self.module
        fitted = fit_effects(
            bulk,
            max_dose,
            len(self.contexts),
            module.features.cpu().numpy(),
            n_text=module.n_text,
            signatures=[g.numpy() for g in module.signature_genes],
            n_components=module.n_effect,
        )
        for name in ("observed", "own_signature", "signature_scale", "basis", "effects", "left_out", "common"):
            getattr(module, name).copy_(torch.as_tensor(fitted[name]))
        module.from_features.copy_(torch.as_tensor(fitted["from_features"]))
        module.from_nothing.copy_(torch.as_tensor(fitted["from_nothing"]))
        if not self.is_trained_:
            module.dose_head.bias.copy_(torch.as_tensor(fitted["dose"]))
        self.description_ = fitted["summary"]
        module.network_share.fill_(1.0)
        module.hidden_from.fill_(False)
        observed = np.flatnonzero(fitted["observed"])
        n_hidden = min(len(observed) // 5, _MAX_HIDDEN)
        if module.n_effect and module.features.shape[1] and n_hidden >= _MIN_HIDDEN:
            hidden = np.random.default_rng(0).permutation(observed)[:n_hidden]
            module.hidden_from[torch.as_tensor(hidden)] = True

    def _plan_defaults(self) -> dict[str, Any]:
        return {
            "lr": 3e-3,
            "weight_decay": 1e-4,
            "n_epochs_kl_warmup": 0.2,
            "lr_schedule": "cosine",
            "gradient_clip_val": 100.0,
        }

    def _default_max_epochs(self, n_batches: int) -> int:
        return int(np.clip(round(1000 / n_batches), 10, 400))

    def _after_training(self, train_idx: NDArray[np.int64]) -> None:
        self.module.eval()
        if self.module.n_effect:
            self.module.network_share[0] = self._network_share(train_idx)
        super()._after_training(train_idx)

    def _network_share(self, rows: NDArray[np.int64]) -> float:
        """How much of the network's vector helps with drugs that it has not seen: those hidden from it decide."""
        module = self.module
        hidden = np.flatnonzero(module.hidden_from.cpu().numpy())
        if not len(hidden):
            return 0.0
        control = rows[self._is_control(self.adata_manager, rows)]
        control = np.sort(np.random.default_rng(0).permutation(control)[:200])
        unit = self.vocabulary.max_dose
        questions = [Question(self.vocabulary.names[i], (float(unit[i]),)) for i in hidden]
        codes = torch.as_tensor(hidden)
        measured = ((module.effects[codes]).mean(1) @ module.basis.mT).cpu().numpy()
        observed, module.honest = module.observed.clone(), True
        try:
            module.observed[codes] = False
            scores = []
            for share in _SHARES:
                module.network_share[0] = share
                predicted = self._mean_effects(control, questions, self._resolve_scale(None), 0)
                scores.append(correlations(predicted, measured))
        finally:
            module.observed.copy_(observed)
            module.honest = False
        gain = np.stack(scores) - scores[0]
        best = int(gain.mean(1).argmax())
        clear = gain[best].mean() > gain[best].std(ddof=1) / np.sqrt(len(hidden))
        return _SHARES[best] if clear else 0.0


def check_network(adata: AnnData, key: Any) -> None:
    """Raise unless ``varp`` has a network of non-negative weights under a key."""
    if not isinstance(key, str) or key not in adata.varp:
        known = ", ".join(map(repr, adata.varp)) or "none"
        raise ValueError(
            f"`ppi_key`: {key!r} is not a key of `adata.varp` (keys: {known}). "
            "`pertura.priors.ppi_network(adata)` adds one."
        )
    network = adata.varp[key]
    values = network.data if sparse.issparse(network) else np.asarray(network)
    if not np.isfinite(values).all() or (values < 0).any():
        raise ValueError(f"`ppi_key`: `varp[{key!r}]` must hold weights that are finite and not negative.")


def _check_options(options: dict[str, Any]) -> None:
    for name in ("n_latent", "n_gene_embedding", "n_effect_components", "interaction_rank"):
        check_whole(name, options[name])
    for name in ("encoder_hidden", "decoder_hidden", "discriminator_hidden"):
        check_widths(name, options[name])
    for name in ("residual", "free_encoder"):
        check_flag(name, options[name])
    check_number("link_sharpness", options["link_sharpness"], above=0)
    for name in ("adversary_weight", "contrast_weight", "counterfactual_weight"):
        check_number(name, options[name], least=0)
    check_number("modality_dropout", options["modality_dropout"], least=0, below=0.5)
    check_number("dropout_rate", options["dropout_rate"], least=0, below=1)
