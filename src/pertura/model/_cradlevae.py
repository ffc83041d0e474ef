"""CRADLEVAE for users."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import pandas as pd
import torch

from pertura.data._datamodule import PerturbationDataModule
from pertura.effects import ConditionTable
from pertura.module._cradlevae import CRADLEVAE as Module

from .base._artifact import PAPER, ArtifactModel, ArtifactOptions
from .base._gene_effects import fit_gene_departures, fit_gene_effects, refine_gene_effects
from .base._options import option
from .base._predict import device_of, seeded


@dataclass(frozen=True)
class CRADLEVAEOptions(ArtifactOptions):
    """Options of :class:`CRADLEVAE`, which has their documentation."""

    effect: Literal["sparse", "dense"] = option("sparse", one_of=("sparse", "dense"))
    effects: Literal["measured", "latent"] = option("measured", one_of=("measured", "latent"))
    interactions: bool = option(False, flag=True)
    rotate_shifts: bool = option(True, flag=True)


class CRADLEVAE(ArtifactModel):
    r"""SAMS-VAE with a latent for technical artifacts and counterfactual reasoning :cite:p:`Baek2024`.

    Cells that failed quality control stay in the training data: what they have in common goes into an artifact embedding.
    Effects are those between cells that passed.

    Parameters
    ----------
    adata
        Set up by :meth:`setup_anndata`; `None` to make a model of a `registry` alone. Which cells failed is registered
        with ``qc_key``; without it all cells passed.
    registry
        Registry of a saved model.
    n_latent
        Dimension of the basal state, of the shifts and of the artifact.
    n_layers, n_encoder_layers, n_hidden
        Layers of decoder and encoder, and their width. Without layers of the decoder log-expression is linear in the
        latent state.
    effect_guide
        ``"mean_field"``, or ``"correlated"``: the posterior of a shift depends on its mask through a neural network.
    mask_prior
        Prior probability that a perturbation shifts a dimension.
    prior_sd_E
        Prior sd of shifts; `None` learns one for each dimension.
    counterfactual_weight
        Weight per failed cell of the counterfactual loss: the energy distance of the basal states of failed cells from those of
        passed cells of the same perturbation.
    class_balance
        Weigh the expression of cells that passed by the share of failed ones in the minibatch, and vice versa.
    match_quality
        Give the encoder failed cells with each gene's mean and spread brought to those of passed training cells. Without
        (the paper) basal states tell failed from passed cells.
    likelihood
        ``"nb"`` for counts, ``"normal"`` for others; `None` takes what fits the registered layer.
    link_sharpness
        See :class:`pertura.nn.CountLikelihood`.
    normalize_input
        Whether the encoder sees counts per 10,000 rather than raw counts.
    n_particles
        Draws per cell and step of training.
    effect_lr_factor, artifact_lr_factor
        Learning rate of shifts and masks, and of the artifact, in units of that of the neural networks.
    lr, lr_schedule
        Learning rate, and whether it falls to zero along a cosine or stays.
    kl_warmup
        Share of the epochs in which the weight of divergences rises to 1; 0: none.
    n_steps, n_epochs
        Length of training where ``train`` is given no number of epochs: at least so many steps and so many epochs.
    batch_size
        Cells per minibatch where ``train`` is given none; `None`: a twentieth of the cells, between 128 and 512.
    effect
        ``"sparse"``: masked shifts; ``"dense"``: shifts without a mask.
    effects
        What a perturbation does to expression: ``"measured"``, its measured effect, which the shift then explains, or
        ``"latent"``, its shift, as in the paper; see :class:`SAMSVAE`. Effects are measured between cells that passed.
    interactions
        Let pairs of perturbations in one cell shift it beyond the sum of their own shifts.
    rotate_shifts
        Turn the coordinates of the shifts once in training, to where shifts are in few dimensions. Only
        ``effect="sparse"`` with a mean-field guide and without `interactions` is turned.
    preset
        ``"paper"``: settings and training schedule of the paper's combination screens. Its weight of the counterfactual
        loss, 0.1, counts the 512 cells of a minibatch, because the loss is their sum. The paper also stops early:
        ``train(early_stopping=True, early_stopping_monitor="elbo_validation", early_stopping_patience=50)``. Where its code
        is not well defined (whose cells are counterfactual, a term that is not a valid divergence), distributions are compared
        as in the default. Options given beside the preset win.

    Examples
    --------
    >>> adata.obs["failed"] = pertura.pp.qc_flags(adata, layer="counts")["failed"]
    >>> pertura.model.CRADLEVAE.setup_anndata(
    ...     adata, perturbation_key="perturbation", control="control", layer="counts", qc_key="failed"
    ... )
    >>> model = pertura.model.CRADLEVAE(adata)
    >>> model.train()
    >>> model.denoise()
    """

    _module_cls = Module
    _options_cls = CRADLEVAEOptions
    _presets: ClassVar[dict[str, dict[str, Any]]] = {
        "paper": {**PAPER, "n_latent": 200, "mask_prior": 0.01, "rotate_shifts": False}
    }

    def _make_module(self) -> None:
        options, vocabulary = self.options, self.vocabulary
        features = vocabulary.features
        self.module = Module(
            len(self.gene_names),
            vocabulary.n_perturbations,
            len(self.registered.batches),
            effects=options.effects,
            masked=options.effect == "sparse",
            interactions=options.interactions,
            rotate_shifts=options.rotate_shifts,
            n_features=0 if features is None else features.shape[1],
            **self._module_options(),
        )
        if features is not None:
            self.module.shifts.features.copy_(torch.as_tensor(vocabulary.feature_matrix(vocabulary.names)))
        self._model_summary_string = (
            f"CRADLEVAE: {vocabulary.n_perturbations} perturbations, latent {options.n_latent}, "
            f"{options.effect} effects, {self._likelihood(options.likelihood)} likelihood"
        )

    @property
    def _can_predict_features(self) -> bool:
        return self.vocabulary.features is not None

    def _initialize(self, data: PerturbationDataModule, table: ConditionTable) -> None:
        super()._initialize(data, table)
        if self.module.gene_effects is not None:
            fit_gene_effects(self, table)

    def _complete(self, table: ConditionTable) -> None:
        if self.module.gene_effects is not None:
            refine_gene_effects(self, table)
            fit_gene_departures(self, table)

    @torch.no_grad()
    def get_shifts(self) -> pd.DataFrame:
        """Posterior of the latent shift of each perturbation.

        Returns
        -------
        DataFrame ``perturbation, dimension, shift`` (mean of E o M), ``proba`` (that the mask is on; 1 without mask).
        """
        self._check_if_trained(warn=False, message="The model is not trained. Call `train()` first.")
        shifts = self.module.shifts
        with seeded(0, device_of(self.module)):  # a correlated posterior is averaged over draws
            mean = shifts.mean().cpu().numpy()
        n, k = mean.shape
        return pd.DataFrame(
            {
                "perturbation": np.repeat(self.vocabulary.names, k),
                "dimension": np.tile(np.arange(k), n),
                "shift": mean.ravel(),
                "proba": shifts.proba().cpu().numpy().ravel(),
            }
        )
