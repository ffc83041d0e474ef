"""SAMSVAE for users."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from numpy.typing import NDArray
from pyro.infer import Trace_ELBO

from pertura.data._constants import KEYS
from pertura.data._datamodule import PerturbationDataModule
from pertura.module._samsvae import EFFECTS
from pertura.module._samsvae import SAMSVAE as Module

from ._arguments import check_flag, check_number, check_whole
from ._base import PerturbationModel
from ._engine import seeded
from ._observed import ObservedEffectsMixin

_PAPER = {
    "n_latent": 200,
    "n_layers": 1,
    "n_hidden": 400,
    "effect_guide": "correlated",
    "basal_guide": "correlated",
    "mask_prior": 0.01,
    "prior_sd_E": 1.0,
    "link_sharpness": 1.0,
    "normalise_input": False,
    "rotate_shifts": False,
    "shrinkage": False,
    "n_particles": 5,
    "effect_lr_factor": 1.0,
}


class SAMSVAE(ObservedEffectsMixin, PerturbationModel):
    r"""Sparse additive mechanism shift variational autoencoder :cite:p:`Bereket2023`.

    A perturbation shifts the latent basal state of a cell in a few of its dimensions; combinations add up. Its published
    comparators are settings of `effect`: CPA-VAE, SVAE+ and the conditional VAE.

    Parameters
    ----------
    adata
        Set up by :meth:`setup_anndata`; `None` to make a model of a `registry` alone.
    registry
        Registry of a saved model.
    n_latent
        Dimension of the latent state.
    n_layers, n_hidden
        Layers of encoder and decoder, and their width. Without layers (the default) log-expression is linear in the latent
        state; the encoder then has one.
    effect
        ``"sparse"``: the paper's masked shifts; ``"dense"``: shifts without a mask (CPA-VAE); ``"svae+"``: SVAE+;
        ``"conditional"``: the perturbation enters decoder and encoder itself (conditional VAE).
    effect_guide
        ``"mean_field"``, or ``"correlated"``: the posterior of a shift depends on its mask through a network.
    basal_guide
        ``"amortised"``, or ``"correlated"``: the posterior of the basal state knows the shift.
    mask_prior
        Prior probability that a perturbation shifts a dimension.
    prior_sd_E
        Prior sd of shifts; by default learned for each dimension.
    interactions
        Let pairs of perturbations in one cell shift it beyond the sum of their own shifts. By default combinations are sums.
    shrinkage
        After training, give each perturbation its measured effect, shrunk by how noisy it was measured and by what perturbations
        have in common (``model/_shrinkage.py``), for the latent shift's. Combinations are sums of these, and what was measured of
        them beyond the sum, shrunk likewise.
    likelihood
        ``"nb"`` for counts, ``"normal"`` for others; by default what was registered.
    link_sharpness
        See :class:`pertura.nn.CountLikelihood`.
    normalise_input
        Whether the encoder sees counts per 10,000 rather than raw counts.
    rotate_shifts
        Turn the latent space once in training, to where shifts are in few dimensions; without it (the paper) planted masks are not
        found (``docs/trust.md``). Only ``effect="sparse"`` with a mean-field guide and without `interactions` is turned.
    n_particles
        Draws per cell and step of training.
    effect_lr_factor
        Learning rate of shifts and masks in units of that of the networks.
    preset
        ``"paper"``: settings of the paper's combination screen (latent 200, one layer of 400 units, correlated guides,
        :math:`\alpha = 0.01`, five particles, raw counts as input, no rotation, no shrinkage). Arguments given beside it win.

    Notes
    -----
    Where the default is not the paper's (``docs/trust.md``): shrinkage, because the latent shift alone tells less of the effects in
    held-out cells than the mean of the training cells; the rotation, without which planted masks are not found (F1 .52, with it .81,
    at random .35); a linear decoder on normalised counts, on which the rotation changes nothing but the coordinates.

    Examples
    --------
    >>> pertura.model.SAMSVAE.setup_anndata(adata, perturbation_key="perturbation", control="control", layer="counts")
    >>> model = pertura.model.SAMSVAE(adata)
    >>> model.train()
    >>> model.get_perturbation_effect("STAT1")
    """

    _module_cls = Module
    _draws_effects = True
    _paper: ClassVar[dict[str, Any]] = _PAPER

    def __init__(
        self,
        adata: AnnData | None = None,
        registry: dict | None = None,
        *,
        n_latent: int | None = None,
        n_layers: int | None = None,
        n_hidden: int | None = None,
        effect: Literal["sparse", "dense", "svae+", "conditional"] | None = None,
        effect_guide: Literal["mean_field", "correlated"] | None = None,
        basal_guide: Literal["amortised", "correlated"] | None = None,
        mask_prior: float | None = None,
        prior_sd_E: float | None = None,
        interactions: bool | None = None,
        shrinkage: bool | None = None,
        likelihood: Literal["nb", "normal"] | None = None,
        link_sharpness: float | None = None,
        normalise_input: bool | None = None,
        rotate_shifts: bool | None = None,
        n_particles: int | None = None,
        effect_lr_factor: float | None = None,
        preset: Literal["paper"] | None = None,
    ) -> None:
        given = {k: v for k, v in locals().items() if k not in ("self", "adata", "registry", "preset", "__class__")}
        super().__init__(adata, registry)
        self._build(given, preset)
        self.init_params_ = self._get_init_params(locals())

    def _build(self, given: dict[str, Any], preset: str | None) -> None:
        """Check the options given and make the module; options that are `None` are left to preset and defaults."""
        given = {name: value for name, value in given.items() if value is not None}
        if preset not in (None, "paper"):
            raise ValueError(f"`preset` must be 'paper' or None, got {preset!r}.")
        self._check_options(given)
        options = {**(self._paper if preset == "paper" else {}), **given}
        options.setdefault("likelihood", "nb" if self.data_kind == "counts" else "normal")
        if options["likelihood"] == "nb" and self.data_kind != "counts":
            raise ValueError(
                "`likelihood='nb'` needs counts, but the registered layer holds negative or fractional values. "
                "Register the counts (`layer=`), or use 'normal'."
            )
        self.shrinkage, self.n_particles = options.pop("shrinkage", True), options.pop("n_particles", 1)
        vocabulary = self.vocabulary
        features = self._registered_features
        self.module = self._module_cls(
            n_genes=self.summary_stats["n_vars"],
            n_perturbations=vocabulary.n_perturbations,
            n_batch=self.summary_stats["n_batch"],
            n_features=0 if features is None else features.shape[1],
            n_combinations=len(vocabulary.combinations),
            order=vocabulary.order,
            **self._module_options(options),
        )
        if features is not None:
            self.module.features.copy_(torch.as_tensor(vocabulary.feature_matrix(vocabulary.names)))
        for row, members in enumerate(vocabulary.combinations):
            self.module.combinations[row] = torch.as_tensor(vocabulary.code(members, vocabulary.order))
        self._model_summary_string = (
            f"{type(self).__name__}: {vocabulary.n_perturbations} perturbations, latent {self.module.n_latent}, "
            f"{self.module.effect} effects, {options['likelihood']} likelihood"
        )

    @property
    def _registered_features(self) -> pd.DataFrame | None:
        """Features that the effects of perturbations depend on."""
        return self.vocabulary.features

    @property
    def _can_predict_features(self) -> bool:
        return self.module.effect_features is not None

    def _module_options(self, options: dict[str, Any]) -> dict[str, Any]:
        """Arguments of the module; a model that has more of them changes these."""
        return options

    @classmethod
    def _check_options(cls, given: dict[str, Any]) -> None:
        choices = {
            "effect": EFFECTS,
            "effect_guide": ("mean_field", "correlated"),
            "basal_guide": ("amortised", "correlated"),
            "likelihood": ("nb", "normal"),
        }
        for name in choices.keys() & given.keys():
            if given[name] not in choices[name]:
                allowed = ", ".join(map(repr, choices[name]))
                raise ValueError(f"`{name}` must be one of {allowed}, got {given[name]!r}.")
        for name in {"n_latent", "n_hidden", "n_particles"} & given.keys():
            check_whole(name, given[name])
        if "n_layers" in given:
            check_whole("n_layers", given["n_layers"], least=0)
        if "mask_prior" in given:
            check_number("mask_prior", given["mask_prior"], above=0, below=1)
        for name in {"prior_sd_E", "link_sharpness", "effect_lr_factor"} & given.keys():
            check_number(name, given[name], above=0)
        for name in {"interactions", "shrinkage", "normalise_input", "rotate_shifts"} & given.keys():
            check_flag(name, given[name])

    # -- training ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _initialise(self, data: PerturbationDataModule) -> None:
        """Standardisation of the encoder's input, and the decoder's start, from the training cells."""
        module = self.module
        # the shift is trained without what was added after an earlier training
        module.residual.zero_()
        module.residual_sd.zero_()
        module.described.zero_()
        if self.is_trained_:
            return
        module.input_mean.zero_()
        module.input_scale.fill_(1.0)
        total = square = raw = raw_square = 0.0
        for tensors in data.iterate(data.train_idx):
            x = tensors[KEYS.X]
            u = module.normalised(x.to(module.input_mean.device)).cpu().double()
            x = x.double()
            raw, raw_square = raw + x.sum(0), raw_square + (x**2).sum(0)
            total, square = total + u.sum(0), square + (u**2).sum(0)
        n = data.n_train
        mean, variance = total / n, (square / n - (total / n) ** 2).clamp(min=0)
        module.input_mean.copy_(mean)
        # a gene that hardly varies must not enter the encoder blown up
        module.input_scale.copy_(variance.sqrt().clamp(min=0.2 * float(variance.mean().sqrt()) + 1e-6))
        spread = (raw_square / n - (raw / n) ** 2).clamp(min=0).sqrt()
        module.likelihood.initialise((raw / n).float(), spread.float())

    def _plan_defaults(self) -> dict[str, Any]:
        several = self.n_particles > 1
        elbo = Trace_ELBO(num_particles=self.n_particles, vectorize_particles=several, max_plate_nesting=1)
        return {
            "loss_fn": elbo,
            "lr": 3e-3,
            "weight_decay": 1e-6,
            "n_epochs_kl_warmup": 0.2,
            "lr_schedule": "cosine",
        }

    def _trainer_defaults(self) -> dict[str, Any]:
        return {"gradient_clip_val": 100.0}

    def _default_batch_size(self, n_cells: int) -> int:
        return int(np.clip(n_cells // 20, 128, 512))

    def _default_max_epochs(self, n_batches: int) -> int:
        return int(np.clip(round(1500 / n_batches), 10, 400))

    def _after_training(self, train_idx: NDArray[np.int64]) -> None:
        self.module.eval()
        if self.shrinkage:
            self._fit_residuals(self._effect_rows(train_idx))
        super()._after_training(train_idx)

    def _effect_rows(self, train_idx: NDArray[np.int64]) -> NDArray[np.int64]:
        """Training cells in which effects are measured."""
        return train_idx

    # -- what it learned --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def get_marginal_ll(
        self,
        adata: AnnData | None = None,
        *,
        indices: Any = None,
        n_samples: int = 100,
        batch_size: int = 64,
        seed: int | None = None,
    ) -> NDArray[np.float64]:
        """Log likelihood of each cell under its own perturbation, importance-weighted over its basal state (IWELBO).

        Parameters
        ----------
        adata, indices
            Cells; by default the model's own.
        n_samples
            Importance samples per cell; the shifts are drawn once for all cells, and not weighted.
        batch_size
            Cells at a time.
        seed
            Of the draws.

        Returns
        -------
        Nats per cell, in the order of `indices`, ``(n_cells,)``.
        """
        check_whole("n_samples", n_samples)
        check_whole("batch_size", batch_size)
        manager, user = self._query(adata, indices)
        rows = self._rows(user, indices)
        self._check_known(user, manager, rows)
        seed = self._seed(seed)
        globals_ = self._globals(manager, n_samples, seed)
        result = []
        with seeded([seed, 1], self.module.input_mean.device):
            for cells in self._cells(manager, rows, batch_size):
                weight = self.module.log_weight(cells, n_samples, globals_)
                result.append((torch.logsumexp(weight, 0) - np.log(n_samples)).cpu().numpy())
        return np.concatenate(result).astype(np.float64)

    @torch.no_grad()
    def get_shifts(self) -> Any:
        """Posterior of the latent shift of each perturbation.

        Returns
        -------
        DataFrame ``perturbation, dimension, shift`` (mean of E o M), ``proba`` (that the mask is on; 1 without mask).

        Raises
        ------
        ValueError
            For a conditional VAE, which has no shifts.
        """
        if self.module.effect == "conditional":
            raise ValueError("`effect='conditional'` has no latent shifts.")
        with seeded(0, self.module.input_mean.device):
            mean = self.module.draw_globals(200)["table"].mean(0).cpu().numpy()
        n, k = mean.shape
        masked = hasattr(self.module, "mask_logits")
        proba = self.module.mask_logits.sigmoid().cpu().numpy() if masked else np.ones((n, k))
        return pd.DataFrame(
            {
                "perturbation": np.repeat(self.vocabulary.names, k),
                "dimension": np.tile(np.arange(k), n),
                "shift": mean.ravel(),
                "proba": proba.ravel(),
            }
        )
