"""CPA for users."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import pandas as pd
import torch

from pertura.data._datamodule import PerturbationDataModule
from pertura.effects import ConditionTable
from pertura.module._base import Action
from pertura.module._cpa import CPA as Module
from pertura.train import AdversarialPlan

from .base import PerturbationModel, TrainingOptions, option
from .base._predict import device_of


@dataclass(frozen=True)
class CPAOptions(TrainingOptions):
    """Options of :class:`CPA`, which has their documentation."""

    n_latent: int = option(32, whole=1)
    n_layers: int = option(0, whole=0)
    n_hidden: int = option(128, whole=1)
    discriminator_hidden: Sequence[int] = option((64, 64), widths=True)
    basal_sd: float | None = option(None, above=0)
    likelihood: Literal["nb", "normal"] | None = option(None, one_of=("nb", "normal"))
    link_sharpness: float = option(3.0, above=0)
    heteroscedastic: bool = option(False, flag=True)
    normalize_input: bool = option(True, flag=True)
    adversary_weight: float = option(1.0, least=0)
    gradient_penalty: float = option(1.0, least=0)
    effect_lr_factor: float = option(5.0, above=0)
    lr_discriminator: float = option(3e-3, above=0)
    n_steps: int = option(2000, whole=1)


PAPER = {
    "n_latent": 256,
    "n_layers": 4,
    "n_hidden": 512,
    "discriminator_hidden": (128, 128, 128),
    "basal_sd": 0.01,
    "link_sharpness": 1.0,
    "heteroscedastic": True,
    "adversary_weight": 5.0,
    "gradient_penalty": 3.0,
    "effect_lr_factor": 1.0,
    "lr": 1e-3,
    "lr_discriminator": 3e-4,
    "lr_schedule": "constant",
    "kl_warmup": 0.0,
    "n_steps": 30_000,
}
_MODULE_OPTIONS = (
    "n_latent",
    "n_layers",
    "n_hidden",
    "discriminator_hidden",
    "basal_sd",
    "link_sharpness",
    "heteroscedastic",
    "normalize_input",
    "adversary_weight",
    "effect_lr_factor",
)


class CPA(PerturbationModel):
    r"""Compositional perturbation autoencoder :cite:p:`Lotfollahi2023`.

    A cell is its basal state, plus an embedding of each perturbation times a dose response, plus an embedding of its context.
    An adversary takes what tells perturbation and context out of the basal state. Combinations add up, doses between and beyond
    the registered ones follow the dose response, and a context that was not trained has the mean embedding of the others.

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
    discriminator_hidden
        Widths of the layers of the discriminator of perturbations, and of that of contexts.
    basal_sd
        Standard deviation of the basal state of a cell as the encoder gives it. `None` learns one for each cell and dimension.
        The paper has none: a small value is close to that.
    likelihood
        ``"nb"`` for counts, ``"normal"`` for others; `None` takes what fits the registered layer.
    link_sharpness
        See :class:`pertura.nn.CountLikelihood`.
    heteroscedastic
        Let the variance of a normal likelihood depend on the state.
    normalize_input
        Whether the encoder sees counts per 10,000 rather than raw counts.
    adversary_weight
        Weight of the discriminator's loss beside the mean log likelihood of a gene; 0: no adversary.
    gradient_penalty
        Weight of the squared gradient of the discriminator's loss by the basal state.
    effect_lr_factor
        Learning rate of embeddings and dose responses in units of that of the neural networks.
    lr, lr_discriminator
        Learning rates of everything else and of the discriminator.
    lr_schedule
        Whether `lr` falls to zero along a cosine or stays.
    kl_warmup
        Share of the epochs in which the weight of divergences rises to 1; 0: none.
    n_steps, n_epochs
        Length of training where ``train`` is given no number of epochs: at least so many steps and so many epochs.
    preset
        ``"paper"``: sizes, weights and learning rates of the paper. Options given beside it win.

    Examples
    --------
    >>> pertura.model.CPA.setup_anndata(
    ...     adata,
    ...     perturbation_key="perturbation",
    ...     control="control",
    ...     dose_key="dose",
    ...     context_key="cell_type",
    ...     layer="counts",
    ... )
    >>> model = pertura.model.CPA(adata)
    >>> model.train()
    >>> model.get_perturbation_effect("drug A+drug B")
    """

    _module_cls = Module
    _options_cls = CPAOptions
    _presets: ClassVar[dict[str, dict[str, Any]]] = {"paper": PAPER}
    _training_plan_cls = AdversarialPlan

    def _make_module(self) -> None:
        options, registered = self.options, self.registered
        likelihood, n_perturbations = self._likelihood(options.likelihood), self.vocabulary.n_perturbations
        self.module = Module(
            len(self.gene_names),
            n_perturbations,
            len(registered.contexts),
            len(registered.batches),
            likelihood=likelihood,
            **{name: getattr(options, name) for name in _MODULE_OPTIONS},
        )
        self._model_summary_string = (
            f"{type(self).__name__}: {n_perturbations} perturbations, {len(registered.contexts)} contexts, "
            f"latent {options.n_latent}, {likelihood} likelihood"
        )

    # -- training ---------------------------------------------------------------------------------------------------

    def _initialize(self, data: PerturbationDataModule, table: ConditionTable) -> None:
        if not self.is_trained_:
            self._standardize(data, table)
        trained = np.bincount(table.context, weights=table.n.sum(1), minlength=len(self.contexts)) > 0
        self.module.set_contexts(torch.as_tensor(trained, device=device_of(self.module)))

    def _plan_defaults(self) -> dict[str, Any]:
        options = self.options
        return {
            **super()._plan_defaults(),
            "lr_discriminator": options.lr_discriminator,
            "gradient_penalty": options.gradient_penalty,
        }

    def _default_batch_size(self, n_cells: int) -> int:
        return int(np.clip(n_cells // 20, 128, 512))

    # -- what it learned --------------------------------------------------------------------------------------------

    def get_embedding(self, kind: Literal["perturbation", "context"] = "perturbation") -> pd.DataFrame:
        """Embedding of each perturbation at its highest registered dose, or of each context.

        Parameters
        ----------
        kind
            ``"perturbation"`` or ``"context"``.

        Returns
        -------
        DataFrame, one row per perturbation or context and one column per dimension.
        """
        self._check_if_trained(warn=False, message="The model is not trained. Call `train()` first.")
        if kind not in ("perturbation", "context"):
            raise ValueError(f"`kind` must be 'perturbation' or 'context', got {kind!r}.")
        module = self.module
        if kind == "perturbation":
            return pd.DataFrame(module.embedding_perturbation.detach().cpu().numpy(), index=list(self.vocabulary.names))
        values = module.context_share[:-1] @ module.embedding_context
        return pd.DataFrame(values.detach().cpu().numpy(), index=self.contexts)

    @torch.no_grad()
    def get_dose_response(self, dose: Sequence[float]) -> pd.DataFrame:
        """Share of the embedding of each perturbation that doses bring about, 1 at the highest registered dose.

        Parameters
        ----------
        dose
            Doses in the registered unit, at least 0.

        Returns
        -------
        DataFrame, one row per dose and one column per perturbation.
        """
        self._check_if_trained(warn=False, message="The model is not trained. Call `train()` first.")
        doses = np.asarray(dose, dtype=np.float64)
        if doses.ndim != 1 or not (np.isfinite(doses) & (doses >= 0)).all():
            raise ValueError(f"`dose` must be a sequence of numbers of at least 0, got {dose!r}.")
        relative = doses[:, None] / np.asarray(self.vocabulary.max_dose)
        codes = torch.arange(self.vocabulary.n_perturbations).expand(len(doses), -1)
        action = Action(codes, torch.as_tensor(relative, dtype=torch.float32)).to(device_of(self.module))
        strength = self.module.strength(action).cpu().numpy()
        return pd.DataFrame(strength, index=pd.Index(doses, name="dose"), columns=list(self.vocabulary.names))
