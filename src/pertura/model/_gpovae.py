"""GPOVAE for users."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from numpy.typing import NDArray
from scipy import sparse
from scvi import settings

from pertura.data._datamodule import PerturbationDataModule
from pertura.data._vocabulary import Vocabulary
from pertura.effects import (
    ConditionTable,
    NetworkPosterior,
    feature_blocks,
    fit_rows,
    fit_shifts,
    fit_unseen,
    matched_differences,
    measure_covariation,
    own_shifts,
)
from pertura.module._gpovae import GPOVAE as Module
from pertura.module._gpovae import N_QUANTILES, HopsGPOVAE

from .base._artifact import PAPER, QC_KEY, ArtifactModel, ArtifactOptions, passed_rows
from .base._gene_effects import dose_response, fit_gene_effects, refine_gene_effects
from .base._grn import GeneNetwork, GRNModel
from .base._model import SetupKey
from .base._options import option
from .base._predict import device_of, seeded

_FOLDS = 5  # of the measured perturbations, to learn what is known of others


@dataclass(frozen=True)
class GPOVAEOptions(ArtifactOptions):
    """Options of :class:`GPOVAE`, which has their documentation."""

    link_sharpness: float = option(1.0, above=0)
    effect_lr_factor: float = option(0.3, above=0)
    objective: Literal["resolvent", "hops"] = option("resolvent", one_of=("resolvent", "hops"))
    effects: Literal["measured", "latent"] | None = option(None, one_of=("measured", "latent"))
    regulators: Sequence[str] | None = option(None)
    alignment_weight: float = option(1.0, least=0)
    covariation_weight: float = option(50.0, least=0)
    shift_floor: float = option(0.05, above=0)
    n_hops: int = option(5, whole=0)
    shift_criterion: float = option(0.5, least=0)
    sparsity_weight: float = option(5.0, least=0)


def _check_network(adata: AnnData, args: dict[str, Any]) -> None:
    """Raise unless ``varp`` has a network."""
    key = args["network_key"]
    if not isinstance(key, str) or key not in adata.varp:
        known = ", ".join(map(repr, adata.varp)) or "none"
        raise ValueError(f"`network_key`: {key!r} is not a key of `adata.varp` (keys: {known}).")
    network = adata.varp[key]
    values = network.data if sparse.issparse(network) else np.asarray(network)
    if not np.isfinite(values).all():
        raise ValueError(f"`network_key`: `varp[{key!r}]` must hold finite weights.")


NETWORK_KEY = SetupKey(
    "network_key",
    """Key of ``varp`` with a prior network, ``[source, target]``, sparse: how much is known for each edge, in units of
            the largest absolute weight; signs are not used. Its sources become regulators. How much it is worth shows in
            the data: where listed pairs are edges no more often than others, it has no say.""",
    _check_network,
)


class GPOVAE(ArtifactModel, GRNModel):
    r"""CRADLE-VAE whose effects are aligned with a gene regulatory network that it learns :cite:p:`Baek2025`.

    Perturbations must be named after their target genes. What is done to a gene spreads through the network: the shift of all
    genes is :math:`s_r e_r (I - A)^{-1}`, with weights A of edges that each are there or not. The network starts as the
    sparse Bayesian regression of measured shifts on measured shifts, in which edges are told from paths, and is then trained
    with the rest. Measured perturbations have their measured effects, as in :class:`SAMSVAE`.

    Genes that were never perturbed are knocked out in silico: `regulators` of the network, and with ``perturbation_features_key``
    whatever the features describe, whether it is a measured gene or not. Their effect is the sum of shares of the mean effect, of
    what the network says and of what features say (:func:`pertura.effects.fit_kernels`). Measured perturbations, left out by
    turns, decide on the shares and on how wide intervals are: features or a network that predict none of them have no share.
    Edges of regulators that nobody perturbed start from what features say, too. With fewer than five measured perturbations
    the effect is the network's.

    Parameters
    ----------
    adata
        Set up by :meth:`setup_anndata`; `None` to make a model of a `registry` alone. A prior network is registered with
        ``network_key``, cells that failed quality control with ``qc_key``.
    registry
        Registry of a saved model.
    n_latent
        Dimension of the basal state and of the artifact.
    n_layers, n_encoder_layers, n_hidden
        Layers of decoder and encoder, and their width. Without layers of the decoder log-expression is linear in the
        latent state.
    effect_guide
        ``"mean_field"``, or ``"correlated"``: the posterior of weights depends on the mask through a neural network.
    mask_prior
        Prior probability of an edge; ``"resolvent"`` starts from it and learns it.
    prior_sd_E
        Prior sd of weights; `None` learns one for each target.
    counterfactual_weight, class_balance, match_quality
        Of the artifact; as in :class:`CRADLEVAE`.
    likelihood
        ``"nb"`` for counts, ``"normal"`` for others; `None` takes what fits the registered layer.
    link_sharpness
        See :class:`pertura.nn.CountLikelihood`; with 1 shifts are of log-rates.
    normalize_input
        Whether the encoder sees counts per 10,000 rather than raw counts.
    n_particles
        Draws per cell and step of training.
    effect_lr_factor, artifact_lr_factor
        Learning rate of the network, and of the artifact, in units of that of the neural networks.
    lr, lr_schedule
        Learning rate, and whether it falls to zero along a cosine or stays.
    kl_warmup
        Share of the epochs in which the weight of divergences rises to 1; 0: none.
    n_steps, n_epochs
        Length of training where ``train`` is given no number of epochs: at least so many steps and so many epochs.
    batch_size
        Cells per minibatch where ``train`` is given none; `None`: a twentieth of the cells, between 128 and 512.
    objective
        ``"resolvent"``: signed shifts of all genes, weighted by their precision, through paths of any length. ``"hops"``:
        the paper's, logits of edges among the genes that perturbations are of (and `regulators`), fitted to absolute
        differences from matched controls over paths of up to `n_hops` further steps. Its network has probabilities and no
        signs.
    effects
        What measured perturbations do to expression: ``"measured"``, their measured effect, or ``"latent"``, what the
        network says; this holds for all perturbations then, and features are not used. `None`: ``"measured"``, for
        ``"hops"`` ``"latent"``, which is all it has.
    regulators
        Genes that may regulate others though no perturbation is of them, to knock them out in silico; `None`: the sources
        of the prior network. In ``"hops"`` the paper takes the gene that responds most to each perturbation.
    alignment_weight
        Weight of the table of shifts, 1 for its log density; in ``"hops"`` that of the loss per cell.
    covariation_weight
        As how many cells the covariation of genes within conditions counts. It is what expression tells about genes that
        were never perturbed.
    shift_floor
        How far measured shifts are from the network's beyond their standard errors (sd, log scale).
    n_hops, shift_criterion, sparsity_weight
        Of ``"hops"``: further steps of paths, the difference above which a shift is an edge, and the weight of the mean
        probability of edges.
    preset
        ``"paper"``: ``objective="hops"`` with settings and training schedule of the paper, which also stops early:
        ``train(early_stopping=True, early_stopping_monitor="elbo_validation", early_stopping_patience=30)``.
        Options given beside it win.

    Examples
    --------
    >>> pertura.model.GPOVAE.setup_anndata(adata, perturbation_key="perturbation", control="control", layer="counts")
    >>> model = pertura.model.GPOVAE(adata, regulators=["IRF7"])
    >>> model.train()
    >>> model.get_grn(top_k=100)
    >>> model.get_perturbation_effect("IRF7", indices=np.flatnonzero(adata.obs["perturbation"] == "control"))
    """

    _module_cls = Module
    _options_cls = GPOVAEOptions
    _presets: ClassVar[dict[str, dict[str, Any]]] = {
        "paper": {
            **PAPER,
            "n_latent": 100,
            "mask_prior": 0.3,
            "objective": "hops",
            "alignment_weight": 100.0,
            "n_hops": 5,
            "sparsity_weight": 5.0,
        }
    }
    _setup_keys = (QC_KEY, NETWORK_KEY)
    _table_options: ClassVar[dict[str, Any]] = {"linear": True}
    _known: Vocabulary | None = None

    def _make_module(self) -> None:
        options, names = self.options, self.registered.vocabulary.names
        extra = self._extra_regulators()
        # a model that is loaded without data finds the names here
        self._found_options = {"regulators": extra}
        self._rows = pd.Index([*names, *extra])
        genes = self.gene_names.get_indexer(self._rows)
        sizes = (len(self.gene_names), len(names), len(self.registered.batches))
        shared = {**self._module_options(), "row_genes": genes.tolist(), "alignment_weight": options.alignment_weight}
        if options.objective == "hops":
            if options.effects == "measured":
                raise ValueError("`effects='measured'` is not possible with `objective='hops'`: use 'latent'.")
            own = {name: getattr(options, name) for name in ("n_hops", "shift_criterion", "sparsity_weight")}
            self.module = HopsGPOVAE(*sizes, **shared, **own)
        else:
            features = None if options.effects == "latent" else self.registered.vocabulary.features
            self.module = Module(
                *sizes,
                effects=options.effects or "measured",
                shift_floor=options.shift_floor,
                **shared,
            )
            # genes of the network are described by their row of it, and others by their features alone
            described = pd.DataFrame({"": np.flatnonzero(genes >= 0) + 1.0}, index=self._rows[genes >= 0])
            if features is not None:
                described = described.join(features, how="outer").fillna(0.0)
            self._known = replace(self.registered.vocabulary, features=described)
        self._model_summary_string = (
            f"GPOVAE: {len(names)} perturbations, network of {len(genes)} regulators, latent {options.n_latent}, "
            f"objective {options.objective}, {self._likelihood(options.likelihood)} likelihood"
        )

    def _extra_regulators(self) -> list[str]:
        """Genes that are rows of the network though no perturbation is of them."""
        asked = self._sources() if self.options.regulators is None else self.options.regulators
        if isinstance(asked, str) or not all(isinstance(name, str) for name in asked):
            raise ValueError(f"`regulators` must be a list of names of genes, got {asked!r}.")
        missing = [name for name in asked if name not in self.gene_names]
        if missing:
            raise ValueError(
                f"`regulators`: {len(missing)} of {len(asked)} names are no genes of `adata`, e.g. {missing[:5]}."
            )
        return sorted(set(asked) - set(self.registered.vocabulary.names))

    def _prior_network(self) -> sparse.csr_matrix | None:
        """How much is known for each edge, between 0 and 1, ``(n_genes, n_genes)``."""
        key = self.registered.argument("network_key")
        if key is None or self.adata is None or key not in self.adata.varp:
            return None
        at = self.adata.var_names.astype(str).get_indexer(self.gene_names)
        network = abs(sparse.csr_matrix(self.adata.varp[key], dtype=np.float32)[at][:, at])
        network.setdiag(0.0)
        network.eliminate_zeros()
        return network / max(network.max(), 1e-12)

    def _sources(self) -> list[str]:
        network = self._prior_network()
        return [] if network is None else self.gene_names[np.diff(network.indptr) > 0].tolist()

    @property
    def vocabulary(self) -> Vocabulary:
        """The perturbations that the model knows."""
        return self.registered.vocabulary if self._known is None else self._known

    @property
    def _can_predict_features(self) -> bool:
        return self._known is not None

    def _check_representable(self, label: str) -> None:
        for name in self.vocabulary.parse(label):
            if self._known is not None and name in self.gene_names and name not in self._known.features.index:
                raise ValueError(
                    f"`perturbation`: {name!r} was not seen in training and is no regulator of the network. Name it in "
                    "`regulators` when you make the model, or describe it with `perturbation_features_key`, to knock it out in "
                    "silico."
                )
        super()._check_representable(label)

    # -- training ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _initialize(self, data: PerturbationDataModule, table: ConditionTable) -> None:
        super()._initialize(data, table)
        module, rows = self.module, passed_rows(data.dataset, data.train_idx)
        listed, genes, n = self._listed(), module.row_genes.cpu().numpy(), self.vocabulary.n_perturbations
        if isinstance(module, HopsGPOVAE):
            self._progress.stage("Matching cells to controls")
            difference, share = matched_differences(data.dataset, rows, genes, n, N_QUANTILES)
            module.difference.copy_(torch.as_tensor(difference))
            module.share.copy_(torch.as_tensor(share))
            if not self.is_trained_ and listed is not None:
                module.shifts.mask_logits.add_(2.0 * listed)
            return
        if (table.n[table.treated].sum(1) < 2).mean() > 0.5:
            warnings.warn(
                "Most perturbations were measured in a single cell or profile: how exact their shifts are is not known, and "
                "probabilities of edges are too close to 0 and 1. Register replicates, or raise `shift_floor`.",
                stacklevel=settings.warnings_stacklevel + 1,
            )
        shift, variance = fit_shifts(table, n, dose_response(self))
        module.shift_table.zero_()[:n] = torch.as_tensor(shift)
        precision = np.isfinite(variance) / (variance + self.options.shift_floor**2)
        module.shift_precision.zero_()[:n] = torch.as_tensor(precision)
        if self.options.covariation_weight:
            cross, own = measure_covariation(data.dataset, rows, genes)
            module.covariation.copy_(torch.as_tensor(cross))
            weight = self.options.covariation_weight / np.maximum(own, 1e-3)
            module.covariation_precision.copy_(torch.as_tensor(weight))
        self._progress.stage("Fitting the network")
        strength = torch.as_tensor(own_shifts(shift, variance, genes)).to(module.effect_strength)
        posterior = self._fit_network(listed, strength)
        if module.gene_effects is not None:
            fit_gene_effects(self, table)
            if self._fit_unseen(table, posterior, strength, listed):
                posterior = self._fit_network(listed, strength)
        if not self.is_trained_:
            module.effect_strength.copy_(strength)
            self._start_network(posterior)

    def _fit_network(
        self, listed: torch.Tensor | None, strength: torch.Tensor, left_out: NDArray | None = None
    ) -> NetworkPosterior:
        """Posterior given the shifts, all or without those of some perturbations."""
        module, precision = self.module, self.module.shift_precision
        if left_out is not None:
            precision = precision.clone()
            precision[left_out] = 0.0
        return fit_rows(
            module.shift_table,
            precision,
            module.row_genes,
            strength,
            covariation=module.covariation,
            covariation_precision=module.covariation_precision,
            listed=listed,
            rate=self.options.mask_prior,
        )

    def _start_network(self, found: NetworkPosterior) -> None:
        """Set q(M) and q(E)."""
        shifts = self.module.shifts
        shifts.mask_logits.copy_(found.logits)
        shifts.prior_logits.copy_(found.prior_logits)
        if not shifts.correlated:
            shifts.loc.copy_(found.mean)
            shifts.log_sd.copy_(found.sd.clamp(min=1e-3).log())
        shifts.log_prior_sd.fill_(float(np.log(found.slab)))

    def _fit_unseen(
        self, table: ConditionTable, posterior: NetworkPosterior, strength: torch.Tensor, listed: torch.Tensor | None
    ) -> bool:
        """Effects of what was not measured: how is learned from what was, left out of the network by turns.

        Returns
        -------
        Whether features say something of the rows of the network, which is then in the table of shifts.
        """
        module, vocabulary = self.module, self.registered.vocabulary
        site, n, genes = module.gene_effects, vocabulary.n_perturbations, module.row_genes.cpu().numpy()
        effects = site.measured
        new = np.flatnonzero(~effects.measured[: len(genes)].cpu().numpy())
        if not len(new) and vocabulary.features is None:
            return False  # nothing else can be asked
        usual = torch.where(module.row_genes >= 0, strength[module.row_genes >= 0].median(), strength)
        spread, own = torch.zeros_like(module.shift_table), np.setdiff1d(np.flatnonzero(genes >= 0), new)
        for fold in range(min(len(own), _FOLDS)):
            out, as_usual = own[fold::_FOLDS], strength.clone()
            as_usual[out] = usual[out]
            found = self._fit_network(listed, as_usual, out)
            spread[out] = module.total(found.logits.sigmoid() * found.mean, as_usual)[out]
        spread[new] = module.total(posterior.logits.sigmoid() * posterior.mean, strength)[new]
        spread = site.from_activation(spread).cpu().numpy()
        features, described, blocks = vocabulary.features, np.zeros((len(genes), 0)), None
        if features is not None:
            described, blocks = vocabulary.feature_matrix(self._rows), feature_blocks(list(features.columns))
        found = fit_unseen(
            table, genes[:n], spread[:n], features=described[:n], feature_blocks=blocks, strength=dose_response(self)
        )
        if found is None:  # too few to learn from: what the network says, with the sd of perturbations at large
            effects.mean[new] = torch.as_tensor(spread[new]).to(effects.mean)
            return False
        mean, sd = found.predict(described, spread)
        own = np.flatnonzero(genes >= 0)
        mean[own, genes[own]] = spread[own, genes[own]]  # what is done to the gene itself
        mean, sd = (torch.as_tensor(value).to(effects.mean) for value in (mean, sd))
        effects.mean[new], effects.sd[new] = mean[new], sd[new]
        for name, value in found.of_features.items():
            setattr(effects, name, torch.as_tensor(value).to(getattr(effects, name)))
        informed = new[described[new].any(1) & found.features_say_something]
        if len(informed):
            said, sd = found.predict(described[informed], 0.0 * spread[informed])
            said, sd = (torch.as_tensor(value).to(effects.mean) for value in (said, sd))
            shift = site.to_activation(said)
            error = site.to_activation(said + sd) - shift
            module.shift_table[informed] = shift
            precision = 1.0 / (error.square() + self.options.shift_floor**2)
            module.shift_precision[informed] = precision * module.possible[informed]
        return len(informed) > 0

    def _listed(self) -> torch.Tensor | None:
        """Prior network between rows and targets."""
        network = self._prior_network()
        if network is None:
            return None
        rows = self.module.row_genes.cpu().numpy()
        columns = rows if isinstance(self.module, HopsGPOVAE) else np.arange(len(self.gene_names))
        listed = network[np.maximum(rows, 0)][:, np.maximum(columns, 0)].toarray()
        listed *= (rows >= 0)[:, None] & (columns >= 0)
        return torch.as_tensor(listed).to(self.module.shifts.mask_logits)

    def _complete(self, table: ConditionTable) -> None:
        if isinstance(self.module, Module) and self.module.gene_effects is not None:
            refine_gene_effects(self, table)

    # -- what it learned --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _gene_network(self) -> GeneNetwork:
        """Weights of all rows; of the paper's objective, probabilities in place of weights."""
        module = self.module
        proba = (module.shifts.proba() * module.possible).cpu().numpy()
        if isinstance(module, HopsGPOVAE):
            gene = (module.row_genes >= 0).cpu().numpy()
            proba = proba[:, gene]
            return GeneNetwork(self._rows, self._rows[gene], proba, proba, direction="perturbations")
        with seeded(0, device_of(module)):  # a correlated posterior is averaged over draws
            weight = module.mean_network().cpu().numpy()
        return GeneNetwork(self._rows, self.gene_names, weight, proba, direction="perturbations")
