"""SAMSVAE for users."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import pandas as pd
import torch
from pyro.infer import Trace_ELBO

from pertura.data._datamodule import PerturbationDataModule
from pertura.effects import ConditionTable
from pertura.module._comparators import ConditionalVAE, SVAEPlus
from pertura.module._samsvae import SAMSVAE as Module

from .base import PerturbationModel, TrainingOptions, option
from .base._gene_effects import fit_gene_departures, fit_gene_effects, refine_gene_effects
from .base._predict import seeded


@dataclass(frozen=True)
class SAMSVAEOptions(TrainingOptions):
    """Options of :class:`SAMSVAE`, which has their documentation."""

    n_latent: int = option(30, whole=1)
    n_layers: int = option(0, whole=0)
    n_hidden: int = option(128, whole=1)
    effect: Literal["sparse", "dense", "svae+", "conditional"] = option(
        "sparse", one_of=("sparse", "dense", "svae+", "conditional")
    )
    effects: Literal["measured", "latent"] | None = option(None, one_of=("measured", "latent"))
    effect_guide: Literal["mean_field", "correlated"] = option("mean_field", one_of=("mean_field", "correlated"))
    basal_guide: Literal["amortized", "correlated"] = option("correlated", one_of=("amortized", "correlated"))
    mask_prior: float = option(0.1, above=0, below=1)
    prior_sd_E: float | None = option(None, above=0)
    interactions: bool = option(False, flag=True)
    likelihood: Literal["nb", "normal"] | None = option(None, one_of=("nb", "normal"))
    link_sharpness: float = option(3.0, above=0)
    normalize_input: bool = option(True, flag=True)
    rotate_shifts: bool = option(True, flag=True)
    n_particles: int = option(1, whole=1)
    effect_lr_factor: float = option(5.0, above=0)


PAPER = {
    "n_latent": 200,
    "n_layers": 1,
    "n_hidden": 400,
    "effects": "latent",
    "effect_guide": "correlated",
    "basal_guide": "correlated",
    "mask_prior": 0.01,
    "prior_sd_E": 1.0,
    "link_sharpness": 1.0,
    "normalize_input": False,
    "rotate_shifts": False,
    "n_particles": 5,
    "effect_lr_factor": 1.0,
    "lr": 3e-4,
    "lr_schedule": "constant",
    "kl_warmup": 0.0,
    "n_steps": 30_000,
}
_MODULE_OPTIONS = (
    "n_latent",
    "n_layers",
    "n_hidden",
    "link_sharpness",
    "normalize_input",
    "effect_lr_factor",
)
_SHIFT_OPTIONS = ("effect_guide", "basal_guide", "mask_prior", "prior_sd_E", "interactions", "rotate_shifts")


class SAMSVAE(PerturbationModel):
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
        Layers of encoder and decoder, and their width. Without layers log-expression is linear in the latent state; the
        encoder then has one.
    effect
        ``"sparse"``: the paper's masked shifts; ``"dense"``: shifts without a mask (CPA-VAE); ``"svae+"``: SVAE+;
        ``"conditional"``: the perturbation enters decoder and encoder itself (conditional VAE).
    effects
        What a perturbation does to expression. ``"measured"``: its measured effect, shrunk by how noisy it was measured and
        by what perturbations have in common; the sparse latent shift then explains that effect. Combinations are sums of
        these effects, and what was measured of them beyond the sum. ``"latent"``: its latent shift, as in the paper. By
        default ``"measured"``, for SVAE+ and the conditional VAE ``"latent"``.
    effect_guide
        ``"mean_field"``, or ``"correlated"``: the posterior of a shift depends on its mask through a neural network.
    basal_guide
        ``"amortized"``, or ``"correlated"``: the posterior of the basal state knows the latent shift.
    mask_prior
        Prior probability that a perturbation shifts a dimension.
    prior_sd_E
        Prior sd of shifts; `None` learns one for each dimension.
    interactions
        Let pairs of perturbations in one cell shift it beyond the sum of their own shifts.
    likelihood
        ``"nb"`` for counts, ``"normal"`` for others; `None` takes what fits the registered layer.
    link_sharpness
        See :class:`pertura.nn.CountLikelihood`.
    normalize_input
        Whether the encoder sees counts per 10,000 rather than raw counts.
    rotate_shifts
        Turn the latent space once in training, to where shifts are in few dimensions. Only ``effect="sparse"`` with a
        mean-field guide and without `interactions` is turned.
    n_particles
        Draws per cell and step of training.
    effect_lr_factor
        Learning rate of shifts and masks in units of that of the neural networks.
    lr, lr_schedule
        Learning rate, and whether it falls to zero along a cosine or stays.
    kl_warmup
        Share of the epochs in which the weight of divergences rises to 1; 0: none.
    n_steps, n_epochs
        Length of training where ``train`` is given no number of epochs: at least so many steps and so many epochs.
    preset
        ``"paper"``: settings and training schedule of the paper's combination screen. Options given beside it win.

    Examples
    --------
    >>> pertura.model.SAMSVAE.setup_anndata(adata, perturbation_key="perturbation", control="control", layer="counts")
    >>> model = pertura.model.SAMSVAE(adata)
    >>> model.train()
    >>> model.get_perturbation_effect("STAT1")
    """

    _module_cls = Module
    _options_cls = SAMSVAEOptions
    _presets: ClassVar[dict[str, dict[str, Any]]] = {"paper": PAPER}
    _draws_effects = True

    def _make_module(self) -> None:
        options, vocabulary = self.options, self.vocabulary
        shared = {name: getattr(options, name) for name in _MODULE_OPTIONS}
        sizes = (len(self.gene_names), vocabulary.n_perturbations, len(self.registered.batches))
        likelihood, features = self._likelihood(options.likelihood), vocabulary.features
        comparator = {"conditional": ConditionalVAE, "svae+": SVAEPlus}.get(options.effect)
        if comparator is not None:
            if options.effects == "measured":
                raise ValueError(
                    f"`effects='measured'` is not possible with `effect={options.effect!r}`: use 'latent'."
                )
            own = {"mask_prior": options.mask_prior} if comparator is SVAEPlus else {}
            self.module = comparator(*sizes, likelihood=likelihood, **shared, **own)
        else:
            self.module = Module(
                *sizes,
                masked=options.effect == "sparse",
                effects=options.effects or "measured",
                likelihood=likelihood,
                n_features=0 if features is None else features.shape[1],
                combinations=[vocabulary.code(members).tolist() for members in vocabulary.combinations],
                **shared,
                **{name: getattr(options, name) for name in _SHIFT_OPTIONS},
            )
            if features is not None:
                self.module.shifts.features.copy_(torch.as_tensor(vocabulary.feature_matrix(vocabulary.names)))
        self._model_summary_string = (
            f"{type(self).__name__}: {vocabulary.n_perturbations} perturbations, latent {options.n_latent}, "
            f"{options.effect} effects, {likelihood} likelihood"
        )

    @property
    def _can_predict_features(self) -> bool:
        return isinstance(self.module, Module) and self.vocabulary.features is not None

    # -- training ---------------------------------------------------------------------------------------------------

    def _initialize(self, data: PerturbationDataModule, table: ConditionTable) -> None:
        if not self.is_trained_:
            self._standardize(data, table)
        if getattr(self.module, "gene_effects", None) is not None:
            fit_gene_effects(self, table)

    def _complete(self, table: ConditionTable) -> None:
        if getattr(self.module, "gene_effects", None) is not None:
            refine_gene_effects(self, table)
            fit_gene_departures(self, table)

    def _plan_defaults(self) -> dict[str, Any]:
        n = self.options.n_particles
        loss = Trace_ELBO(num_particles=n, vectorize_particles=n > 1, max_plate_nesting=1)
        return {**super()._plan_defaults(), "loss_fn": loss}

    def _default_batch_size(self, n_cells: int) -> int:
        return int(np.clip(n_cells // 20, 128, 512))

    # -- what it learned --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def get_shifts(self) -> pd.DataFrame:
        """Posterior of the latent shift of each perturbation.

        Returns
        -------
        DataFrame ``perturbation, dimension, shift`` (mean of E o M), ``proba`` (that the mask is on; 1 without mask).

        Raises
        ------
        ValueError
            For a conditional VAE, which has no shifts.
        """
        self._check_if_trained(warn=False, message="The model is not trained. Call `train()` first.")
        if isinstance(self.module, ConditionalVAE):
            raise ValueError("`effect='conditional'` has no latent shifts.")
        with seeded(0, self.module.input_mean.device):
            plus = isinstance(self.module, SVAEPlus)
            proba = (self.module if plus else self.module.shifts).proba().cpu().numpy()
            mean = (self.module.proba() * self.module.effect_loc if plus else self.module.shifts.mean()).cpu().numpy()
        n, k = mean.shape
        return pd.DataFrame(
            {
                "perturbation": np.repeat(self.vocabulary.names, k),
                "dimension": np.tile(np.arange(k), n),
                "shift": mean.ravel(),
                "proba": proba.ravel(),
            }
        )
