"""What models with a latent for technical artifacts share: quality labels, and predictions without the artifact."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any, ClassVar, Literal

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from mudata import MuData
from numpy.typing import NDArray
from pyro.infer import Trace_ELBO
from scvi.data.fields import BaseAnnDataField, NumericalObsField

from pertura.data._cells import CellDataset
from pertura.data._constants import KEYS
from pertura.data._datamodule import PerturbationDataModule
from pertura.data._validation import check_obs_key
from pertura.effects import ConditionTable
from pertura.module._base import Cells

from ._arguments import check_key
from ._model import PerturbationModel, Scale, SetupKey
from ._options import TrainingOptions, option
from ._predict import device_of
from ._query import query
from ._write import provenance, reserve

logger = logging.getLogger(__name__)

Rows = NDArray[np.int64]
_ARTEFACT = """
artefact
    ``"own"``: each cell keeps the technical quality that it has; ``"removed"``: as if it had passed quality control.
"""


@dataclass(frozen=True)
class ArtifactOptions(TrainingOptions):
    """Options that all models with a latent for artifacts have; the models have their documentation."""

    n_latent: int = option(30, whole=1)
    n_layers: int = option(0, whole=0)
    n_encoder_layers: int = option(1, whole=1)
    n_hidden: int = option(128, whole=1)
    effect_guide: Literal["mean_field", "correlated"] = option("mean_field", one_of=("mean_field", "correlated"))
    mask_prior: float = option(0.1, above=0, below=1)
    prior_sd_E: float | None = option(None, above=0)
    counterfactual_weight: float = option(10.0, least=0)
    class_balance: bool = option(False, flag=True)
    match_quality: bool = option(True, flag=True)
    likelihood: Literal["nb", "normal"] | None = option(None, one_of=("nb", "normal"))
    link_sharpness: float = option(3.0, above=0)
    normalize_input: bool = option(True, flag=True)
    n_particles: int = option(1, whole=1)
    effect_lr_factor: float = option(5.0, above=0)
    artifact_lr_factor: float = option(5.0, above=0)
    batch_size: int | None = option(None, whole=1)


# of the two papers, but for the number of latent dimensions, the prior of the mask, and what the counterfactual loss is; its weight
# is 0.1, summed over minibatches of 512 cells beside a mean over cells
PAPER: dict[str, Any] = {
    "n_layers": 2,
    "n_encoder_layers": 1,
    "n_hidden": 400,
    "effects": "latent",
    "effect_guide": "correlated",
    "prior_sd_E": 1.0,
    "counterfactual_weight": 51.2,
    "class_balance": True,
    "match_quality": False,
    "link_sharpness": 1.0,
    "normalize_input": False,
    "n_particles": 5,
    "effect_lr_factor": 1.0,
    "artifact_lr_factor": 1.0,
    "lr": 3e-4,
    "lr_schedule": "constant",
    "kl_warmup": 0.0,
    "n_steps": 100_000,
    "batch_size": 512,
}
# what modules take as it is
MODULE_OPTIONS = (
    "n_latent",
    "n_layers",
    "n_encoder_layers",
    "n_hidden",
    "counterfactual_weight",
    "class_balance",
    "match_quality",
    "link_sharpness",
    "normalize_input",
    "effect_lr_factor",
    "artifact_lr_factor",
)


def check_qc(adata: AnnData, args: dict[str, Any]) -> None:
    """Raise unless a column of ``obs`` says which cells failed."""
    key = args["qc_key"]
    check_obs_key(adata, "qc_key", key)
    values = pd.unique(adata.obs[key])
    if not set(values) <= {0, 1}:
        raise ValueError(
            f"`qc_key`: `adata.obs[{key!r}]` must be true for cells that failed quality control and false for others, "
            f"found {list(values)[:3]}."
        )


QC_KEY = SetupKey(
    "qc_key",
    "Column of ``obs``, true for cells that **failed** quality control (see :func:`pertura.pp.qc_flags`).",
    check_qc,
)


def _with_artefact(shared: Callable[..., Any]) -> Callable[..., Any]:
    """A prediction method with `artefact` in signature and documentation; :meth:`ArtifactModel._changes` reads it."""

    @wraps(shared)
    def method(self: ArtifactModel, *args: Any, **kwargs: Any) -> Any:
        return shared(self, *args, **kwargs)

    signature = inspect.signature(shared)
    others = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    own = inspect.Parameter(
        "artefact", inspect.Parameter.KEYWORD_ONLY, default="own", annotation="Literal['own', 'removed']"
    )
    method.__signature__ = signature.replace(parameters=[*others, own])
    doc = inspect.getdoc(shared)
    if doc is not None:  # python -OO
        doc = doc.replace(", **changes", "")
        at = next((doc.index(mark) for mark in ("\n\nReturns\n", "\n\nYields\n") if mark in doc), len(doc))
        method.__doc__ = doc[:at] + _ARTEFACT.rstrip("\n") + doc[at:]
    return method


class ArtifactModel(PerturbationModel):
    """Base of models with a latent for technical artifacts, which cells that failed quality control have in common.

    Effects are measured between cells that passed.
    """

    _setup_keys = (QC_KEY,)
    _query_columns = (*PerturbationModel._query_columns, "qc_key")
    _draws_effects: ClassVar[bool] = True
    options: ArtifactOptions

    predict_perturbation = _with_artefact(PerturbationModel.predict_perturbation)
    iter_predictions = _with_artefact(PerturbationModel.iter_predictions)
    get_perturbation_effect = _with_artefact(PerturbationModel.get_perturbation_effect)
    get_latent_representation = _with_artefact(PerturbationModel.get_latent_representation)

    @classmethod
    def _fields(cls, args: dict[str, Any], features: pd.DataFrame | None = None) -> list[BaseAnnDataField]:
        fields = super()._fields(args, features)
        if args.get("qc_key") is not None:
            fields.append(NumericalObsField(KEYS.QC, args["qc_key"]))
        return fields

    def _changes(self, given: dict[str, Any]) -> dict[str, float]:
        given = dict(given)
        artefact = given.pop("artefact", "own")
        if artefact not in ("own", "removed"):
            raise ValueError(f"`artefact` must be 'own' or 'removed', got {artefact!r}.")
        return {**super()._changes(given), **({"qc": 0.0} if artefact == "removed" else {})}

    def _module_options(self) -> dict[str, Any]:
        """Arguments of modules that follow from options and data."""
        options, vocabulary = self.options, self.vocabulary
        return {
            **{name: getattr(options, name) for name in MODULE_OPTIONS},
            "likelihood": self._likelihood(options.likelihood),
            "combinations": [vocabulary.code(members).tolist() for members in vocabulary.combinations],
            "guide": options.effect_guide,
            "mask_prior": options.mask_prior,
            "prior_sd": options.prior_sd_E,
        }

    # -- training ---------------------------------------------------------------------------------------------------

    def _measure(self, train_idx: Rows, data: PerturbationDataModule) -> ConditionTable:
        return super()._measure(passed_rows(data.dataset, train_idx), data)

    def _after_training(self, train_idx: Rows, table: ConditionTable) -> None:
        super()._after_training(passed_rows(CellDataset(self.adata_manager), train_idx), table)

    def _initialize(self, data: PerturbationDataModule, table: ConditionTable) -> None:
        if not self.is_trained_:
            self._standardize(data, table)
        if self.registered.argument("qc_key") is not None:
            describe_quality(self.module, data)

    def _plan_defaults(self) -> dict[str, Any]:
        n = self.options.n_particles
        loss = Trace_ELBO(num_particles=n, vectorize_particles=n > 1, max_plate_nesting=1)
        return {**super()._plan_defaults(), "loss_fn": loss}

    def _default_batch_size(self, n_cells: int) -> int:
        return self.options.batch_size or int(np.clip(n_cells // 20, 128, 512))

    # -- prediction -------------------------------------------------------------------------------------------------

    def denoise(
        self,
        adata: AnnData | MuData | None = None,
        *,
        key_added: str = "denoised",
        n_samples: int = 25,
        scale: Scale | None = None,
        overwrite: bool = False,
        batch_size: int | None = None,
        seed: int | None = None,
    ) -> None:
        """Expression of each cell under its own perturbation, as if it had passed quality control.

        Parameters
        ----------
        adata
            Cells; by default the model's own.
        key_added
            Layer that is written.
        n_samples, scale, overwrite, batch_size, seed
            As in :meth:`predict_perturbation`.

        Returns
        -------
        `None`: ``layers[key_added]`` (NaN for genes that the model does not have) and what was asked, in
        ``uns[key_added]``, are set.
        """
        check_key(key_added)
        settings = self._settings(
            n_samples, None, scale, seed, batch_size, changes=self._changes({"artefact": "removed"})
        )
        cells = query(self, adata)
        reserve(cells.user, {"layers": [key_added], "uns": [key_added]}, overwrite)
        blocks = self._predictor(cells, settings).blocks()
        means = np.concatenate([block.mean(block.under(None)).mean(0).cpu().numpy() for block in blocks])
        order = self.gene_names.get_indexer(cells.user.var_names.astype(str))
        values = np.full(cells.user.shape, np.nan, dtype=np.float32)
        values[:, order >= 0] = means[:, order[order >= 0]]
        cells.user.layers[key_added] = values
        wrote = [f"layers/{key_added}", f"uns/{key_added}"]
        asked = {"n_samples": settings.n_samples, "scale": settings.scale, "seed": settings.seed, **settings.changes}
        cells.user.uns[key_added] = provenance(self, wrote=wrote, **asked)


def passed_rows(dataset: CellDataset, rows: Rows) -> Rows:
    """Cells in which effects are measured: those that passed, and all cells of conditions in which none did."""
    if KEYS.QC not in dataset.fields:
        return rows
    passed = dataset.fields[KEYS.QC][rows, 0] == 0
    parts = [dataset.fields[key][rows] for key in (KEYS.PERTURBATION, KEYS.CONTEXT) if key in dataset.fields]
    _, condition = np.unique(np.concatenate(parts, axis=1), axis=0, return_inverse=True)
    any_passed = np.bincount(condition.ravel(), passed) > 0
    return rows[passed | ~any_passed[condition.ravel()]]


@torch.no_grad()
def describe_quality(module: Any, data: PerturbationDataModule) -> None:
    """Tell ``module.artifact`` what passed and failed training cells of each perturbation look like to the encoder."""
    artifact, device = module.artifact, device_of(module)
    number = torch.zeros(artifact.n_groups, 2, dtype=torch.float64)
    total = torch.zeros(artifact.n_groups, 2, len(module.input_mean), dtype=torch.float64)
    square = torch.zeros_like(total)
    for tensors in data.iterate(data.train_idx):
        tensors.pop("n_pairs")
        cells = Cells.from_tensors({k: v.to(device) for k, v in tensors.items()})
        group = artifact.group(cells.action)
        at = torch.where(group >= 0)[0]
        where = (group[at], cells.qc[at, 0].long())
        x, own = module.normalized(cells.x[at], cells.library[at]).cpu().double(), tuple(w.cpu() for w in where)
        total.index_put_(own, x, accumulate=True)
        square.index_put_(own, x**2, accumulate=True)
        number.index_put_(own, torch.ones(len(at), dtype=torch.float64), accumulate=True)
    if not number[:, 1].any() or not number[:, 0].any():
        logger.warning("All training cells have the same quality label: there is no artifact to learn.")
    parts = (number, total, square, module.input_mean.cpu(), module.input_scale.cpu())
    artifact.describe(*parts)
