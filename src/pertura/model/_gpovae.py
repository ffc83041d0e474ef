"""GPOVAE for users."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from scipy import sparse

from pertura.data._datamodule import PerturbationDataModule
from pertura.data._vocabulary import Vocabulary
from pertura.module._gpovae import GPOVAE as Module
from pertura.module._gpovae import OBJECTIVES

from ._arguments import check_number, check_whole
from ._cradlevae import CRADLEVAE, check_qc
from ._network import Network, NetworkMixin
from ._samsvae import SAMSVAE
from ._shifts import covariation, matched_differences, own_shifts, shift_table, start_network

# arguments of the module, and whether each may be 0
_NUMBERS = {
    "alignment_weight": True,
    "covariation_weight": True,
    "shift_floor": False,
    "shift_criterion": True,
    "sparsity_weight": True,
}
_OWN = ("objective", "n_hops", *_NUMBERS)


class GPOVAE(NetworkMixin, CRADLEVAE):
    r"""CRADLE-VAE whose effects are aligned with a gene regulatory network, which it gives back :cite:p:`Baek2025`.

    A perturbation is that of the gene whose name it bears. What is done to that gene spreads through the network: the shift of
    all genes is :math:`s_r e_r (I - A)^{-1}`, with weights A of edges that each are there or not. The network starts as the sparse
    Bayesian regression of measured shifts on measured shifts, in which edges are told from paths, and is then trained with the
    rest. Effects of measured perturbations are shrunk towards the measured ones as in :class:`SAMSVAE`; genes of the network that
    were never perturbed are knocked out in silico.

    Parameters
    ----------
    adata, registry
        As in :class:`CRADLEVAE`. A prior network is registered with ``network_key``.
    objective
        ``"resolvent"``: signed shifts of all genes, weighted by their precision, through paths of any length; ``"hops"``: the
        paper's, logits of edges among the genes that perturbations are of (and `regulators`), fitted to absolute differences from
        matched controls over paths of up to `n_hops` further steps. Its network has probabilities and no signs.
    regulators
        Genes that may regulate others though no perturbation is of them, to knock them out in silico; by default the sources of
        the prior network. In ``"hops"`` the paper takes the gene that responds most to each perturbation.
    alignment_weight
        Weight of the table of shifts, 1 for its log density; in ``"hops"`` that of the loss per cell.
    covariation_weight
        As how many cells the covariation of genes within conditions counts. It is what is known about genes that were never
        perturbed.
    shift_floor
        How far measured shifts are from the network's beyond their standard errors (sd, log scale).
    n_hops, shift_criterion, sparsity_weight
        Of ``"hops"``: additional steps of paths, the difference above which a shift is an edge, and the weight of the mean
        probability of edges.
    preset
        ``"paper"``: ``objective="hops"``, that of :class:`CRADLEVAE`, latent 100, :math:`\alpha = 0.3`.
    **options
        Arguments of :class:`CRADLEVAE` and :class:`SAMSVAE`; by default `link_sharpness` is 1, so that shifts are of
        log-rates, and `effect_lr_factor` 0.3.

    Examples
    --------
    >>> pertura.model.GPOVAE.setup_anndata(adata, perturbation_key="perturbation", control="control", layer="counts")
    >>> model = pertura.model.GPOVAE(adata, regulators=["IRF7"])
    >>> model.train()
    >>> model.get_grn(top_k=100)
    >>> model.get_perturbation_effect("IRF7", indices=np.flatnonzero(adata.obs["perturbation"] == "control"))
    """

    _describes_unseen = False  # the network does
    _module_cls = Module
    _paper: ClassVar[dict[str, Any]] = {
        **CRADLEVAE._paper,
        "n_latent": 100,
        "mask_prior": 0.3,
        "objective": "hops",
        "alignment_weight": 100.0,
        "sparsity_weight": 5.0,
    }

    def __init__(
        self,
        adata: AnnData | None = None,
        registry: dict | None = None,
        *,
        objective: Literal["resolvent", "hops"] | None = None,
        regulators: Sequence[str] | None = None,
        alignment_weight: float | None = None,
        covariation_weight: float | None = None,
        shift_floor: float | None = None,
        n_hops: int | None = None,
        shift_criterion: float | None = None,
        sparsity_weight: float | None = None,
        preset: Literal["paper"] | None = None,
        **options: Any,
    ) -> None:
        super(SAMSVAE, self).__init__(adata, registry)
        given = {name: value for name, value in locals().items() if name in _OWN}
        # a model that is loaded without data finds the names here
        regulators = self._extra_regulators(regulators)
        self._extra = tuple(regulators)
        self._build({**given, **options}, preset)
        self._artefact_removed = False
        self.init_params_ = self._get_init_params(locals())

    @classmethod
    def _check_options(cls, given: dict[str, Any]) -> None:
        super()._check_options(given)
        if given.get("objective", "hops") not in OBJECTIVES:
            raise ValueError(f"`objective` must be 'resolvent' or 'hops', got {given['objective']!r}.")
        if given.get("effect", "sparse") != "sparse":
            raise ValueError(f"`effect` of {cls.__name__} must be 'sparse', got {given['effect']!r}.")
        for name in _NUMBERS.keys() & given.keys():
            check_number(name, given[name], **{"least" if _NUMBERS[name] else "above": 0})
        if "n_hops" in given:
            check_whole("n_hops", given["n_hops"], least=0)

    def _extra_regulators(self, regulators: Any) -> list[str]:
        """Genes that are rows of the network though no perturbation is of them."""
        if regulators is None:
            regulators = self._sources()
        if isinstance(regulators, str) or not all(isinstance(name, str) for name in regulators):
            raise ValueError(f"`regulators` must be a list of names of genes, got {regulators!r}.")
        missing = [name for name in regulators if name not in self.gene_names]
        if missing:
            raise ValueError(
                f"`regulators`: {len(missing)} of {len(regulators)} names are no genes of `adata`, e.g. {missing[:5]}."
            )
        return sorted(set(regulators) - set(self.vocabulary.names))

    def _module_options(self, options: dict[str, Any]) -> dict[str, Any]:
        genes = self.gene_names.get_indexer([*self.vocabulary.names, *self._extra])
        options = {"objective": "resolvent", **options}
        self.covariation_weight = options.pop("covariation_weight", 50.0)
        if options["objective"] == "resolvent":
            # shifts are of log-rates; the network starts near where it ends
            options = {"link_sharpness": 1.0, "effect_lr_factor": 0.3, **options}
        return {**options, "row_genes": genes.tolist()}

    # -- registration -----------------------------------------------------------------------------------------------

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
        qc_key: str | None = None,
        network_key: str | None = None,
        perturbation_features_key: str | None = None,
        delimiter: str = "+",
        **kwargs: Any,
    ) -> None:
        """Register an AnnData with the model.

        Parameters
        ----------
        adata, perturbation_key, control, layer, context_key, dose_key, batch_key, size_factor_key, qc_key
            As in :meth:`CRADLEVAE.setup_anndata`.
        network_key
            Key of ``varp`` with a prior network, ``[source, target]``, sparse: how much is known for each edge, in units of
            the largest absolute weight (signs play no part). Its sources become regulators. How much it is worth shows in
            the data: where listed pairs are edges no more often than others, it has no say.
        perturbation_features_key, delimiter, **kwargs
            As in :meth:`PerturbationModel.setup_anndata`. Features of perturbations are not used: unseen perturbations are
            those of genes in the network.
        """
        args = cls._get_setup_method_args(**locals())
        # a saved model has its network: data to load it with need none
        if network_key is not None and isinstance(adata, AnnData) and "source_registry" not in kwargs:
            _check_network(adata, network_key)
        if qc_key is not None and isinstance(adata, AnnData):
            check_qc(adata, qc_key)
        cls._setup(adata, args)

    def _prior_network(self) -> sparse.csr_matrix | None:
        """How much is known for each edge, between 0 and 1, ``(n_genes, n_genes)``."""
        key = self._argument("network_key")
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
        """The perturbations that the model knows; genes of the network are described by their row of it."""
        vocabulary = super().vocabulary
        module = self.__dict__.get("module")
        if module is None or not self.is_trained_ or not self._knows_genes(vocabulary):
            return vocabulary
        names = np.array([*vocabulary.names, *self._extra], dtype=object)
        rows = np.flatnonzero(module.row_genes.cpu().numpy() >= 0)
        return replace(vocabulary, features=pd.DataFrame({"row": rows + 1.0}, index=names[rows]))

    def _knows_genes(self, vocabulary: Vocabulary) -> bool:
        return self.module.objective == "resolvent" and vocabulary.features is None

    @property
    def _registered_features(self) -> None:
        return None

    @property
    def _can_predict_features(self) -> bool:
        return self._knows_genes(super().vocabulary)

    # -- training ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _initialise(self, data: PerturbationDataModule) -> None:
        """As of CRADLEVAE, and the table of measured shifts; a new model starts from the network that it gives."""
        super()._initialise(data)
        module, rows = self.module, self._effect_rows(data.train_idx)
        listed = self._listed()
        if module.objective == "hops":
            difference, share = matched_differences(self, rows)
            module.difference.copy_(torch.as_tensor(difference))
            module.share.copy_(torch.as_tensor(share))
            if not self.is_trained_ and listed is not None:
                module.mask_logits.add_(2.0 * listed)
            return
        table, variance = shift_table(self, rows)
        measured = np.isfinite(variance)
        module.shift_table.copy_(torch.as_tensor(table))
        module.shift_precision.copy_(torch.as_tensor(measured / (variance + module.shift_floor**2)))
        if self.covariation_weight:
            cross, own = covariation(self, rows)
            module.covariation.copy_(torch.as_tensor(cross))
            module.covariation_precision.copy_(torch.as_tensor(self.covariation_weight / np.maximum(own, 1e-3)))
        if not self.is_trained_:
            genes = module.row_genes.cpu().numpy()
            module.effect_strength.copy_(torch.as_tensor(own_shifts(table, variance, genes)))
            start_network(module, listed, rate=module.mask_prior)

    def _listed(self) -> torch.Tensor | None:
        """Prior network between rows and latent coordinates."""
        network = self._prior_network()
        if network is None:
            return None
        module = self.module
        rows, columns = module.row_genes.cpu().numpy(), module.column_genes.cpu().numpy()
        listed = network[np.maximum(rows, 0)][:, np.maximum(columns, 0)].toarray()
        listed *= (rows >= 0)[:, None] & (columns >= 0)
        return torch.as_tensor(listed).to(module.mask_logits)

    # -- what it learned --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _network(self) -> Network:
        """Weights of all rows; of the paper's objective, probabilities in place of weights."""
        module = self.module
        names = pd.Index([*self.vocabulary.names, *self._extra])
        proba = (module.mask_logits.sigmoid() * module.possible).cpu().numpy()
        if module.objective == "hops":
            gene = (module.column_genes >= 0).cpu().numpy()
            return Network(names, names[gene], proba[:, gene], proba[:, gene])
        return Network(names, self.gene_names, module.mean_network().cpu().numpy(), proba)


def _check_network(adata: AnnData, key: Any) -> None:
    """Raise unless ``varp`` has a network under a key."""
    if not isinstance(key, str) or key not in adata.varp:
        known = ", ".join(map(repr, adata.varp)) or "none"
        raise ValueError(f"`network_key`: {key!r} is not a key of `adata.varp` (keys: {known}).")
    network = adata.varp[key]
    values = network.data if sparse.issparse(network) else np.asarray(network)
    if not np.isfinite(values).all():
        raise ValueError(f"`network_key`: `varp[{key!r}]` must hold finite weights.")
