"""DrugAAE for users."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from numpy.typing import NDArray
from scipy import sparse

from pertura.data._datamodule import PerturbationDataModule
from pertura.data._perturbation import Perturbation
from pertura.effects import ConditionTable
from pertura.module._drugaae import DrugAAE as Module
from pertura.train._adversarial import AdversarialPlan

from ._drugaae_effects import blocks_of, choose_vector_share, fit_effects, gene_loadings, order_features, split_columns
from ._drugaae_targets import by_interactions, by_neighbors, by_signature
from .base import PerturbationModel, SetupKey, TrainingOptions, option
from .base._arguments import check_whole, resolve_perturbations
from .base._predict import Settings


@dataclass(frozen=True)
class DrugAAEOptions(TrainingOptions):
    """Options of :class:`DrugAAE`, which has their documentation."""

    n_latent: int = option(24, whole=1)
    n_gene_embedding: int = option(32, whole=1)
    n_effect_components: int = option(200, whole=1)
    encoder_hidden: Sequence[int] = option((128,), widths=True)
    decoder_hidden: Sequence[int] = option((), widths=True)
    discriminator_hidden: Sequence[int] = option((64, 64), widths=True)
    interaction_rank: int = option(4, whole=1)
    likelihood: Literal["nb", "normal"] | None = option(None, one_of=("nb", "normal"))
    link_sharpness: float = option(3.0, above=0)
    residual: bool = option(True, flag=True)
    free_encoder: bool = option(True, flag=True)
    adversary_weight: float = option(5.0, least=0)
    contrast_weight: float = option(0.1, least=0)
    counterfactual_weight: float = option(1.0, least=0)
    modality_dropout: float = option(0.3, least=0, below=0.5)
    dropout_rate: float = option(0.0, least=0, below=1)
    n_steps: int = option(1000, whole=1)


PAPER = {"residual": False, "counterfactual_weight": 0.0}
_MODULE_OPTIONS = (
    "n_gene_embedding",
    "encoder_hidden",
    "decoder_hidden",
    "discriminator_hidden",
    "interaction_rank",
    "link_sharpness",
    "free_encoder",
    "adversary_weight",
    "contrast_weight",
    "counterfactual_weight",
    "modality_dropout",
    "dropout_rate",
)


def check_interactions(adata: AnnData, args: dict[str, Any]) -> None:
    """Raise unless ``varp`` has weights of interactions that are not negative under ``ppi_key``."""
    key = args["ppi_key"]
    if not isinstance(key, str) or key not in adata.varp:
        known = ", ".join(map(repr, adata.varp)) or "none"
        raise ValueError(
            f"`ppi_key`: {key!r} is not a key of `adata.varp` (keys: {known}). "
            "`pertura.priors.ppi_network(adata)` adds one."
        )
    weights = adata.varp[key]
    values = weights.data if sparse.issparse(weights) else np.asarray(weights)
    if not np.isfinite(values).all() or (values < 0).any():
        raise ValueError(f"`ppi_key`: `varp[{key!r}]` must hold weights that are finite and not negative.")


class DrugAAE(PerturbationModel):
    r"""Predict drugs that were never given to these cells, from texts and signatures, and rank their targets :cite:p:`ParkSongJang`.

    An adversarial autoencoder takes the perturbation out of a cell's latent state. Each drug's vector is computed only from
    its description: a text, signatures of differential expression, or both. So a row in the table of descriptions is all that
    a new drug needs. Genes are embedded jointly from expression and protein-protein interactions; encoder, decoder and
    signatures read the embedding. Doses follow a Hill curve whose shape depends on the drug. Combinations add up.

    By default the vectors only explain what an effect in closed form leaves, which the paper does not have. For a trained drug
    it is the measured effect; for another it is what a ridge regression on its description predicts. How far descriptions and
    vectors are believed is decided by training drugs that were left out; where they say nothing, the mean effect remains.

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
        Widths of the hidden layers.
    interaction_rank
        Rank of the interaction of drugs and contexts.
    likelihood
        ``"nb"`` for counts, ``"normal"`` for others; `None` takes what fits the registered layer.
    link_sharpness
        See :class:`pertura.nn.CountLikelihood`.
    residual
        Whether there is an effect in closed form, of which vectors explain the rest. `False`: vectors alone, as in the paper.
    free_encoder
        Whether the encoder's first layer has weights beside those tied to the gene embedding.
    adversary_weight
        Weight of the loss of a basal state from which the discriminator recognizes the perturbation.
    contrast_weight
        Weight of the agreement of a drug's text and signature.
    counterfactual_weight
        Weight of the error of effects that are predicted from control cells in training.
    modality_dropout
        Probability with which the signature, or the text, of a drug that has both is taken away in a step.
    dropout_rate
        Of encoder and discriminator.
    lr, lr_schedule
        Learning rate, and whether it falls to zero along a cosine or stays. The discriminator has its own: see
        :class:`pertura.train.AdversarialPlan`.
    kl_warmup
        Share of the epochs in which the weight of divergences rises to 1; 0: none.
    n_steps, n_epochs
        Length of training where ``train`` is given no number of epochs: at least so many steps and so many epochs.
    preset
        ``"paper"``: no effects in closed form, and no training on predicted effects. Of the paper only the abstract was
        available, which gives no sizes and no schedule: those stay. Options given beside it win.

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
    _options_cls = DrugAAEOptions
    _presets: ClassVar[dict[str, dict[str, Any]]] = {"paper": PAPER}
    _training_plan_cls = AdversarialPlan
    _can_predict_features = True
    _setup_keys = (
        SetupKey(
            "ppi_key",
            "Key of ``varp`` with protein-protein interactions, sparse; see :func:`pertura.priors.ppi_network`.",
            check_interactions,
        ),
    )

    module: Module
    options: DrugAAEOptions

    def _make_module(self) -> None:
        options, vocabulary, n_genes = self.options, self.vocabulary, len(self.gene_names)
        self.description_: dict[str, Any] | None = None  # what of the descriptions left-out drugs support
        text, signatures = split_columns(vocabulary.features, self.gene_names)
        likelihood = self._likelihood(options.likelihood)
        ppi_key = self.registered.argument("ppi_key")
        self.module = Module(
            n_genes,
            vocabulary.n_perturbations,
            len(self.contexts),
            len(self.registered.batches),
            n_text=len(text),
            signatures=list(signatures.values()),
            n_state=options.n_latent,
            n_effect_components=min(n_genes, options.n_effect_components) if options.residual else 0,
            likelihood=likelihood,
            has_ppi=ppi_key is not None,
            **{name: getattr(options, name) for name in _MODULE_OPTIONS},
        )
        # a saved model has its own interactions
        if ppi_key is not None and self.adata is not None and ppi_key in self.adata.varp:
            at = self.adata.var_names.astype(str).get_indexer(self.gene_names)
            self.module.genes.set_network(sparse.csr_matrix(self.adata.varp[ppi_key])[at][:, at])
        if vocabulary.features is not None:
            self.module.features.copy_(torch.as_tensor(vocabulary.feature_matrix(vocabulary.names)))
        self._model_summary_string = (
            f"DrugAAE: {vocabulary.n_perturbations} perturbations, {len(self.contexts)} contexts, {len(text)} text features, "
            f"{len(signatures)} signatures, {'with' if ppi_key else 'without'} protein interactions, {likelihood} likelihood"
        )

    @classmethod
    def _fields(cls, args: dict[str, Any], features: pd.DataFrame | None = None) -> list:
        return super()._fields(args, order_features(features))

    # -- training ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _initialize(self, data: PerturbationDataModule, table: ConditionTable) -> None:
        module = self.module
        if not self.is_trained_:
            self._standardize(data, table)
            loadings = gene_loadings(table, module.genes.loadings.shape[1])
            module.genes.loadings.zero_()
            module.genes.loadings[:, : loadings.shape[1]] = torch.as_tensor(loadings)
        n_cells, codes = table.n.sum(1), table.codes
        present = codes >= 0
        treated = np.bincount(
            codes[present],
            np.broadcast_to(n_cells[:, None], codes.shape)[present],
            minlength=self.vocabulary.n_perturbations,
        )
        share = np.append(treated, n_cells[table.is_control].sum()) / n_cells.sum()
        module.class_share.copy_(torch.as_tensor(share))
        self.description_ = fit_effects(module, table, self.vocabulary.max_dose, first=not self.is_trained_)

    def _complete(self, table: ConditionTable) -> None:
        self.module.vector_share.fill_(choose_vector_share(self))

    def _plan_defaults(self) -> dict[str, Any]:
        return {**super()._plan_defaults(), "weight_decay": 1e-4}

    # -- what is known of drugs and genes ---------------------------------------------------------------------------

    @torch.no_grad()
    def get_drug_embedding(self) -> pd.DataFrame:
        """Vectors v of trained perturbations and of all others that are described.

        Returns
        -------
        DataFrame indexed by perturbation, ``(n_perturbations, n_latent)``; column ``trained`` last.
        """
        self._check_if_trained(warn=False, message="The model is not trained. Call `train()` first.")
        names, features, own = self._described()
        v = self.module.vector(features, own, self.module.genes())
        table = pd.DataFrame(v.cpu().numpy(), index=pd.Index(names, name="perturbation"))
        table.columns = [f"v{i + 1}" for i in range(table.shape[1])]
        trained = self._trained()
        return table.assign(trained=[n in trained for n in names])

    @torch.no_grad()
    def get_gene_embedding(self) -> pd.DataFrame:
        """Embedding E of genes, ``(n_genes, n_gene_embedding)``, indexed by gene."""
        return pd.DataFrame(self.module.genes().cpu().numpy(), index=pd.Index(self.gene_names, name="gene"))

    def get_reliability(self, perturbation: str, *, n_neighbors: int = 3) -> pd.DataFrame:
        """Trained perturbations whose descriptions are nearest to that of a perturbation.

        Parameters
        ----------
        perturbation
            A single perturbation, trained or described.
        n_neighbors
            How many to name.

        Returns
        -------
        DataFrame with ``neighbor`` and ``similarity`` (cosine of the features, each kind scaled as a whole; of the measured
        effects where there are no features), and in ``attrs``: ``reliability``, the highest similarity (at least 0) times the
        share of descriptions that trained perturbations, left out one at a time, supported (1 where effects were measured), and
        ``gain``, by how much descriptions then improved the correlation over the mean effect.

        Raises
        ------
        ValueError
            For a combination, and for a perturbation without description.
        """
        check_whole("n_neighbors", n_neighbors)
        self._check_if_trained(warn=False, message="The model is not trained. Call `train()` first.")
        self._check_representable(perturbation)
        names, unit = self._unit_descriptions()
        if perturbation not in names:
            raise ValueError(f"`perturbation`: {perturbation!r} is not a single perturbation. Ask for its members.")
        at, trained = names.index(perturbation), self._trained()
        similarity = unit @ unit[at]
        others = np.array([i for i, name in enumerate(names) if name in trained and i != at], dtype=np.int64)
        order = others[np.argsort(-similarity[others], kind="stable")][:n_neighbors]
        table = pd.DataFrame({"neighbor": [names[i] for i in order], "similarity": similarity[order]})
        believed = self.description_ or {"share": 0.0, "gain": 0.0}
        top = float(max(similarity[order].max(initial=0.0), 0.0))
        reliability = 1.0 if perturbation in trained else top * believed["share"]
        table.attrs = {"reliability": reliability, "gain": believed["gain"]}
        return table

    def get_drug_target_scores(
        self,
        perturbation: str | list[str] | None = None,
        *,
        method: Literal["network", "signature", "neighbors"] = "network",
        dose: float | None = None,
        damping: float = 0.5,
        n_steps: int = 3,
        known_targets: pd.DataFrame | None = None,
    ) -> pd.DataFrame:
        """Genes ranked as targets of drugs.

        Scores, not probabilities: compare them with how many drugs a gene is a target of, and how many interactions it has.

        Parameters
        ----------
        perturbation
            Names; `None`: all trained ones.
        method
            ``"network"``: predicted absolute effect on a gene and its neighbors in the network of proteins, in units of what all
            drugs do there; ``"signature"``: similarity of the drug's vector to that of a signature in which the gene alone is
            changed; ``"neighbors"``, which needs `known_targets`: how often the gene is a target of other drugs, those with
            similar descriptions counting more (popularity, where descriptions say nothing).
        dose
            In the registered unit.
        damping, n_steps
            Of the walk over the network: chance to go on, and number of steps.
        known_targets
            Targets of some drugs, drugs x genes, 1 or 0 (or `bool`). A drug's own row never enters its score.

        Returns
        -------
        DataFrame, perturbations x genes; the higher, the more likely a target.

        Raises
        ------
        ValueError
            For an unknown method, and where `known_targets` is missing, not needed or has none of the drugs.
        """
        if method not in ("network", "signature", "neighbors"):
            raise ValueError(f"`method` must be 'network', 'signature' or 'neighbors', got {method!r}.")
        if (known_targets is None) == (method == "neighbors"):
            raise ValueError("`known_targets` belongs to `method='neighbors'`, which needs it. Give both or neither.")
        self._check_if_trained(warn=False, message="The model is not trained. Call `train()` first.")
        asked = resolve_perturbations(self, self._discrepancy.trained if perturbation is None else perturbation, dose)
        labels = [p.label for p in asked]
        if method == "network":
            score = by_interactions(self, asked, damping, n_steps)
        elif method == "signature":
            score = by_signature(self, labels)
        else:
            score = by_neighbors(*self._unit_descriptions(), labels, known_targets, self.gene_names)
        return pd.DataFrame(score, index=pd.Index(labels, name="perturbation"), columns=self.gene_names)

    def _trained(self) -> set[str]:
        measured = self.module.closed_form.measured.tolist()
        return {name for name, was in zip(self.vocabulary.names, measured, strict=True) if was}

    def _described(self) -> tuple[list[str], torch.Tensor, torch.Tensor]:
        """Names, features and signatures from the training cells of registered and of described perturbations."""
        module, vocabulary = self.module, self.vocabulary
        names, features = list(vocabulary.names), module.features
        if vocabulary.features is not None:
            names += [str(n) for n in vocabulary.features.index if n not in vocabulary.lookup]
            features = torch.as_tensor(vocabulary.feature_matrix(names)).to(features.device)
        own = features.new_zeros(len(names), module.n_genes)
        own[: vocabulary.n_perturbations] = module.own_signature
        return names, features, own

    def _unit_descriptions(self) -> tuple[list[str], NDArray[np.float64]]:
        """Names, and descriptions of length 1, each kind scaled as a whole; measured effects where there are no features."""
        names, features, own = self._described()
        values = (features if features.shape[1] else own).cpu().numpy().astype(np.float64)
        if features.shape[1]:
            parts = (values[:, block] for block in blocks_of(self.module))
            values = np.concatenate([p / (np.sqrt((p**2).sum(1).mean()) + 1e-12) for p in parts], axis=1)
        return names, values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-12)

    def _provenance(
        self, perturbations: Sequence[Perturbation], ci: float | None, settings: Settings
    ) -> dict[str, Any]:
        """What was asked, with the reliability of each single perturbation (NaN for combinations)."""
        found = super()._provenance(perturbations, ci, settings)
        single = [len(self.vocabulary.parse(p.label)) == 1 for p in perturbations]
        found["reliability"] = [
            self.get_reliability(p.label).attrs["reliability"] if one else float("nan")
            for p, one in zip(perturbations, single, strict=True)
        ]
        return found
