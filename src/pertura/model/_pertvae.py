"""PertVAE for users."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from scvi.data import AnnDataManager

from pertura.data._constants import KEYS
from pertura.data._datamodule import PerturbationDataModule
from pertura.data._pairs import (
    Coupling,
    embed,
    explicit_coupling,
    random_coupling,
    strata,
    transport_coupling,
)
from pertura.data._validation import check_obs_key
from pertura.module._pertvae import PertVAE as Module
from pertura.train._elbo import FreeBitsELBO

from ._arguments import check_flag, check_number, check_whole, check_widths
from ._base import PerturbationModel

logger = logging.getLogger(__name__)

_PAPER = {
    "n_latent": 100,
    "encoder_hidden": (500, 300),
    "decoder_hidden": (200, 300, 500),
    "n_flow_context": 200,
    "n_flow_steps": 2,
    "n_flow_hidden": 300,
    "rank": 100,
    "effect_input": "cell",
    "use_weight_norm": True,
    "free_nats": 2.0,
    "prediction_weight": 0.0,
    "link_sharpness": 1.0,
    "heteroscedastic": True,
    "prior_sd_W": 1.0,
    "effect_lr_factor": 1.0,
}


class PertVAE(PerturbationModel):
    """Perturbation variational autoencoder :cite:p:`Rampasek2019`.

    A perturbation moves the latent state of a cell linearly, :math:`z_2 = z_1 + W z_1 + b`. Pairs of cells before and after
    it teach the effect; singletons, cells without a partner (such as the controls of a cell type that was never treated),
    teach the latent space. One model holds any number of perturbations, their doses and combinations.

    Parameters
    ----------
    adata
        Set up by :meth:`setup_anndata`; `None` to make a model of a `registry` alone.
    registry
        Registry of a saved model.
    n_latent
        Dimension of the latent state.
    encoder_hidden, decoder_hidden
        Widths of the layers. Without decoder layers (the default) log-expression is linear in the latent state, so that an
        effect learned in one context carries over to another.
    n_flow_context, n_flow_steps, n_flow_hidden
        Inverse autoregressive flow of the guide: context units, steps, hidden units of a step.
    rank
        Rank of W per perturbation. By default full for one perturbation and 4 for several.
    effect_input
        ``"context"``: W multiplies the mean basal state of the cell's context, so that noise between cells that are not truly
        paired does not dilute it; ``"cell"``: the cell's own state, as in the paper. By default ``"cell"`` where ``pair_key``
        was registered, else ``"context"``.
    pairing
        Partner of a perturbed cell: ``"pairs"`` (registered ``pair_key``), ``"random"`` control of its context, newly drawn
        each epoch, or ``"ot"``, drawn from an optimal-transport coupling. By default ``"pairs"`` where registered, else
        ``"ot"``.
    likelihood
        ``"nb"`` for counts, ``"normal"`` for others; by default what was registered.
    prior_sd_W, prior_sd_b
        Standard deviations of the normal priors of W and b: the L2 penalty. With several perturbations b is shrunk towards
        what they have in common.
    free_nats
        Divergence per latent variable (z1, z2) and cell that costs nothing.
    link_sharpness, heteroscedastic, use_weight_norm, dropout_rate, input_noise, prediction_weight, effect_lr_factor
        See :class:`pertura.module.PertVAE`.
    singletons
        Whether cells without a partner take part in training.
    preset
        ``"paper"``: the architecture of the paper (encoder 500-300, latent 100, two flow steps of 300 units, mirrored decoder,
        weight norm, W of the cell's own state). Arguments given beside it win.

    Examples
    --------
    >>> pertura.model.PertVAE.setup_anndata(adata, perturbation_key="condition", control="ctrl", layer="counts")
    >>> model = pertura.model.PertVAE(adata)
    >>> model.train()
    >>> model.predict_perturbation("stim", key_added="stim")
    """

    _module_cls = Module
    _can_predict_features = True

    def __init__(
        self,
        adata: AnnData | None = None,
        registry: dict | None = None,
        *,
        n_latent: int | None = None,
        encoder_hidden: Sequence[int] | None = None,
        decoder_hidden: Sequence[int] | None = None,
        n_flow_context: int | None = None,
        n_flow_steps: int | None = None,
        n_flow_hidden: int | None = None,
        rank: int | None = None,
        effect_input: Literal["cell", "context"] | None = None,
        pairing: Literal["pairs", "random", "ot"] | None = None,
        likelihood: Literal["nb", "normal"] | None = None,
        link_sharpness: float | None = None,
        heteroscedastic: bool | None = None,
        prior_sd_W: float | None = None,
        prior_sd_b: float | None = None,
        free_nats: float | None = None,
        use_weight_norm: bool | None = None,
        dropout_rate: float | None = None,
        input_noise: float | None = None,
        prediction_weight: float | None = None,
        effect_lr_factor: float | None = None,
        singletons: bool = True,
        preset: Literal["paper"] | None = None,
    ) -> None:
        given = {
            k: v
            for k, v in locals().items()
            if k not in ("self", "adata", "registry", "preset", "__class__") and v is not None
        }
        super().__init__(adata, registry)
        _check_options(given)
        if preset not in (None, "paper"):
            raise ValueError(f"`preset` must be 'paper' or None, got {preset!r}.")
        options = {**(_PAPER if preset == "paper" else {}), **given}
        paired = self._argument("pair_key") is not None
        self.pairing = options.pop("pairing", "pairs" if paired else ("random" if preset == "paper" else "ot"))
        if self.pairing not in ("pairs", "random", "ot"):
            raise ValueError(f"`pairing` must be 'pairs', 'random' or 'ot', got {self.pairing!r}.")
        if self.pairing == "pairs" and not paired:
            raise ValueError("`pairing='pairs'` needs `pair_key` in `setup_anndata`.")
        self.singletons = options.pop("singletons")
        self.free_nats = options.pop("free_nats", 0.0)
        vocabulary = self.vocabulary
        defaults = {
            "effect_input": "cell" if paired else "context",
            "likelihood": "nb" if self.data_kind == "counts" else "normal",
            "rank": None if vocabulary.n_perturbations == 1 else 4,
            # of several perturbations, each one's own part is small a priori beside what is common or what features explain
            "prior_sd_b": 10.0 if vocabulary.n_perturbations == 1 else 0.3,
            "prior_sd_W": 0.3 if vocabulary.n_perturbations == 1 else 0.1,
        }
        options = {**defaults, **options}
        if options["likelihood"] not in ("nb", "normal"):
            raise ValueError(f"`likelihood` must be 'nb' or 'normal', got {options['likelihood']!r}.")
        if options["effect_input"] not in ("cell", "context"):
            raise ValueError(f"`effect_input` must be 'cell' or 'context', got {options['effect_input']!r}.")
        if options["likelihood"] == "nb" and self.data_kind != "counts":
            raise ValueError(
                "`likelihood='nb'` needs counts, but the registered layer holds negative or fractional values. "
                "Register the counts (`layer=`), or use 'normal'."
            )
        self.module = self._module_cls(
            n_genes=self.summary_stats["n_vars"],
            n_perturbations=vocabulary.n_perturbations,
            n_contexts=len(self.contexts),
            n_batch=self.summary_stats["n_batch"],
            n_features=0 if vocabulary.features is None else vocabulary.features.shape[1],
            **options,
        )
        if vocabulary.features is not None:
            self.module.features.copy_(torch.as_tensor(vocabulary.feature_matrix(vocabulary.names)))
        self._model_summary_string = (
            f"PertVAE: {vocabulary.n_perturbations} perturbations, {len(self.contexts)} contexts, "
            f"latent {self.module.n_latent}, {options['likelihood']} likelihood, pairing {self.pairing}"
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
        pair_key: str | None = None,
        perturbation_features_key: str | None = None,
        delimiter: str = "+",
        **kwargs: Any,
    ) -> None:
        """Register an AnnData with the model.

        Parameters
        ----------
        adata, perturbation_key, control, layer, context_key, dose_key, batch_key, size_factor_key
            As in :meth:`PerturbationModel.setup_anndata`.
        pair_key
            Column of ``obs`` with an identifier that a perturbed cell shares with its control(s).
        perturbation_features_key, delimiter, **kwargs
            As in :meth:`PerturbationModel.setup_anndata`.
        """
        args = cls._get_setup_method_args(**locals())
        if pair_key is not None and isinstance(adata, AnnData):
            _check_pairs(adata, pair_key, perturbation_key, control)
        cls._setup(adata, args)

    # -- training ---------------------------------------------------------------------------------------------------

    def _coupling(self, rows: np.ndarray, seed: int) -> Coupling:
        adata = self.adata
        codes = np.asarray(adata.obsm[f"_scvi_{KEYS.PERTURBATION}"])[rows]
        half = codes.shape[1] // 2
        is_control = ~((codes[:, :half] >= 0) & (codes[:, half:] > 0)).any(1)
        if self.pairing == "pairs":
            return explicit_coupling(rows, is_control, adata.obs[self._argument("pair_key")].to_numpy(object)[rows])
        keys = [f"_scvi_{KEYS.CONTEXT}", f"_scvi_{KEYS.BATCH}"]
        where = strata(adata.obs.iloc[rows], is_control, keys)
        alone = int((~is_control & (where.wanted < 0)).sum())
        if alone:
            logger.warning(
                "%d perturbed cells are in contexts without control cells: they train the latent space, not the effect.",
                alone,
            )
        if self.pairing == "random":
            return random_coupling(rows, is_control, where)
        layer = self._argument("layer")
        values = (adata.X if layer is None else adata.layers[layer])[rows]
        labels = adata.obs[self._argument("perturbation_key")].astype(str).to_numpy(object)[rows]
        rng = np.random.default_rng(seed)
        return transport_coupling(
            rows, is_control, where, labels, embed(values, self.data_kind == "counts", seed=seed), rng
        )

    def _data_module(
        self, train_idx: np.ndarray, val_idx: np.ndarray, batch_size: int, seed: int
    ) -> PerturbationDataModule:
        train = self._coupling(train_idx, seed)
        if not len(train.treated):
            raise ValueError(
                "`adata`: no perturbed training cell has a control to compare with. "
                "Every context (or pair) needs control cells; check `context_key` and `pair_key`."
            )
        return PerturbationDataModule(
            self.adata_manager,
            train_idx,
            val_idx,
            train_coupling=train,
            val_coupling=self._coupling(val_idx, seed) if len(val_idx) else None,
            batch_size=batch_size,
            singletons=self.singletons,
            seed=seed,
        )

    @torch.no_grad()
    def _initialise(self, data: PerturbationDataModule) -> None:
        """Standardisation of the encoder's input, and the decoder's start, from the training cells."""
        if self.is_trained_:
            return
        total = square = raw = raw_square = 0.0
        for tensors in data.iterate(data.train_idx):
            x = tensors[KEYS.X].double()
            raw, raw_square = raw + x.sum(0), raw_square + (x**2).sum(0)
            if self.data_kind == "counts":
                x = torch.log1p(1e4 * x / x.sum(1, keepdim=True).clamp(min=1.0))
            total, square = total + x.sum(0), square + (x**2).sum(0)
        n = data.n_train
        mean, variance = total / n, (square / n - (total / n) ** 2).clamp(min=0)
        self.module.input_mean.copy_(mean)
        # a gene that hardly varies must not enter the encoder blown up
        self.module.input_scale.copy_(variance.sqrt().clamp(min=0.2 * float(variance.mean().sqrt()) + 1e-6))
        spread = (raw_square / n - (raw / n) ** 2).clamp(min=0).sqrt()
        self.module.likelihood.initialise((raw / n).float(), spread.float())
        self._describe_contexts(data)

    def _describe_contexts(self, data: PerturbationDataModule) -> None:
        """Principal components of the training cells, and where the mean control profile of each context lies in them.

        Centred at the average context that has both arms, and in units of the spread of those contexts: the prior of W is then
        in latent units per typical difference between contexts, and b is the effect in the average context.
        """
        module, layer = self.module, self._argument("layer")
        n_components = module.profile_basis.shape[1]
        rows = np.sort(np.random.default_rng(0).permutation(data.train_idx)[:20_000])
        values = (self.adata.X if layer is None else self.adata.layers[layer])[rows]
        _, basis = embed(values, self.data_kind == "counts", n_components, return_basis=True)
        batches = ({k: v for k, v in b.items() if k != "n_pairs"} for b in data.iterate(data.train_idx))
        profiles, number = module.control_profiles(batches, len(self.contexts))
        both = torch.zeros(len(number), dtype=torch.bool)
        treated = data.train_dataloader().sampler.coupling.treated
        both[
            torch.as_tensor(np.unique(np.asarray(self.adata.obs[f"_scvi_{KEYS.CONTEXT}"])[treated]).astype(np.int64))
        ] = True
        both &= number > 0
        centre = profiles[both].mean(0)
        coordinates = (profiles - centre) @ torch.as_tensor(basis).T
        spread = coordinates[both].square().sum(1).mean().sqrt()
        module.profile_mean.copy_(centre)
        module.profile_basis.zero_()
        if spread > 1e-6:
            module.profile_basis[:, : len(basis)] = torch.as_tensor(basis).T / spread
        module.context_profile.copy_(module.project_profiles(profiles, number))

    def _plan_defaults(self) -> dict[str, Any]:
        elbo = FreeBitsELBO({"z1": self.free_nats, "z2": self.free_nats})
        return {
            "loss_fn": elbo,
            "lr": 5e-3,
            "weight_decay": 1e-4,
            "n_epochs_kl_warmup": 0.2,
            "lr_schedule": "cosine",
        }

    def _trainer_defaults(self) -> dict[str, Any]:
        return {"gradient_clip_val": 100.0}

    def _default_max_epochs(self, n_batches: int) -> int:
        return int(np.clip(round(1000 / n_batches), 10, 400))

    # -- prediction -------------------------------------------------------------------------------------------------

    def _globals(self, manager: AnnDataManager, n_samples: int, seed: int) -> dict[str, torch.Tensor]:
        """Control profiles of the query's contexts: those of new contexts come from the query's own control cells."""
        globals_ = super()._globals(manager, n_samples, seed)
        if self.module.effect_input == "cell":
            return globals_
        known = self.module.context_profile
        n_contexts = len(self._context_names(manager))
        if n_contexts > len(known):
            rows = np.flatnonzero(np.asarray(manager.adata.obs[f"_scvi_{KEYS.CONTEXT}"]) >= len(known))
            profiles = self.module.control_profiles(self._tensors(manager, rows, 512), n_contexts)
            new = self.module.project_profiles(*profiles)
            globals_["context_profile"] = torch.cat([known, new[len(known) :]])
        return globals_


def _check_options(given: dict[str, Any]) -> None:
    """Check what has a range; choices between names are checked where they are made."""
    for name in {"n_latent", "n_flow_context", "n_flow_hidden", "rank"} & given.keys():
        check_whole(name, given[name])
    if "n_flow_steps" in given:
        check_whole("n_flow_steps", given["n_flow_steps"], least=0)
    for name in {"encoder_hidden", "decoder_hidden"} & given.keys():
        check_widths(name, given[name])
    for name in {"link_sharpness", "prior_sd_W", "prior_sd_b", "effect_lr_factor"} & given.keys():
        check_number(name, given[name], above=0)
    for name in {"free_nats", "input_noise", "prediction_weight"} & given.keys():
        check_number(name, given[name], least=0)
    if "dropout_rate" in given:
        check_number("dropout_rate", given["dropout_rate"], least=0, below=1)
    for name in {"use_weight_norm", "heteroscedastic", "singletons"} & given.keys():
        check_flag(name, given[name])


def _check_pairs(adata: AnnData, pair_key: str, perturbation_key: str, control: str) -> None:
    if pair_key not in adata.obs:
        check_obs_key(adata, "pair_key", pair_key)
    if perturbation_key not in adata.obs:
        return  # reported by the shared checks
    is_control = (adata.obs[perturbation_key].astype(str) == control).to_numpy()
    pair = adata.obs[pair_key]
    shared = pd.Index(pair[is_control].dropna()).intersection(pd.Index(pair[~is_control].dropna()))
    if is_control.any() and not len(shared):
        raise ValueError(
            f"`pair_key`: no value of `adata.obs[{pair_key!r}]` is shared by a control and a perturbed cell. "
            "Give the members of a pair the same identifier; cells without a partner may have none."
        )
