"""CRADLEVAE for users."""

from __future__ import annotations

import logging
from typing import Any, ClassVar, Literal

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from numpy.typing import NDArray
from scvi.data.fields import BaseAnnDataField, NumericalObsField

from pertura.data._constants import KEYS
from pertura.data._datamodule import PerturbationDataModule
from pertura.data._validation import check_obs_key
from pertura.module._base import Cells
from pertura.module._cradlevae import CRADLEVAE as Module

from ._arguments import check_flag, check_key, check_number, check_whole
from ._query import QueryMixin
from ._samsvae import _PAPER, SAMSVAE
from ._writeback import reserve

logger = logging.getLogger(__name__)


class CRADLEVAE(SAMSVAE):
    """SAMS-VAE with a latent for technical artefacts and counterfactual reasoning :cite:p:`Baek2024`.

    Cells that failed quality control stay in the training data: what they have in common goes into an artefact embedding, and
    effects are those between cells that passed.

    Parameters
    ----------
    adata, registry
        As in :class:`SAMSVAE`. Which cells failed is registered with ``qc_key``; without it all cells passed.
    counterfactual_weight
        Weight per cell of the counterfactual loss: the basal state of a cell, had its label been the other, is that of the mean
        profile of training cells of the same perturbation with the other label.
    class_balance
        Weigh the expression of cells that passed by the fraction of failed ones in the minibatch, and vice versa.
    match_quality
        Give the encoder failed cells with each gene's mean and spread brought to those of passed training cells. Without (the paper)
        the basal states of simulated failed and passed cells are easily told apart, with it hardly (``docs/trust.md``).
    preset
        ``"paper"``: that of :class:`SAMSVAE` with `class_balance`. Where the published code is not well defined (whose cells are
        counterfactual, a divergence that is none, a loss that grows with the minibatch), the intended definitions are used.
    **options
        Arguments of :class:`SAMSVAE`; `effect` is ``"sparse"`` or ``"dense"``.

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
    _paper: ClassVar[dict[str, Any]] = {
        **_PAPER,
        "n_layers": 2,
        "class_balance": True,
        "counterfactual_weight": 0.1,
        "match_quality": False,
    }
    _query_columns = (*QueryMixin._query_columns, "qc_key")

    def __init__(
        self,
        adata: AnnData | None = None,
        registry: dict | None = None,
        *,
        counterfactual_weight: float | None = None,
        class_balance: bool | None = None,
        match_quality: bool | None = None,
        preset: Literal["paper"] | None = None,
        **options: Any,
    ) -> None:
        super(SAMSVAE, self).__init__(adata, registry)
        own: dict[str, Any] = {
            "counterfactual_weight": counterfactual_weight,
            "class_balance": class_balance,
            "match_quality": match_quality,
        }
        self._build({**own, **options}, preset)
        self._artefact_removed = False
        self.init_params_ = self._get_init_params(locals())

    @classmethod
    def _check_options(cls, given: dict[str, Any]) -> None:
        super()._check_options(given)
        if "counterfactual_weight" in given:
            check_number("counterfactual_weight", given["counterfactual_weight"], least=0)
        for name in {"class_balance", "match_quality"} & given.keys():
            check_flag(name, given[name])
        if given.get("effect", "sparse") not in ("sparse", "dense"):
            raise ValueError(f"`effect` of {cls.__name__} must be 'sparse' or 'dense', got {given['effect']!r}.")

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
        perturbation_features_key: str | None = None,
        delimiter: str = "+",
        **kwargs: Any,
    ) -> None:
        """Register an AnnData with the model.

        Parameters
        ----------
        adata, perturbation_key, control, layer, context_key, dose_key, batch_key, size_factor_key
            As in :meth:`PerturbationModel.setup_anndata`.
        qc_key
            Column of ``obs``, true for cells that **failed** quality control (see :func:`pertura.pp.qc_flags`).
        perturbation_features_key, delimiter, **kwargs
            As in :meth:`PerturbationModel.setup_anndata`.
        """
        args = cls._get_setup_method_args(**locals())
        if qc_key is not None and isinstance(adata, AnnData):
            check_qc(adata, qc_key)
        cls._setup(adata, args)

    @classmethod
    def _fields(cls, args: dict[str, Any], features: pd.DataFrame | None = None) -> list[BaseAnnDataField]:
        fields = super()._fields(args, features)
        if args.get("qc_key") is not None:
            fields.append(NumericalObsField(KEYS.QC, args["qc_key"]))
        return fields

    # -- training ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _initialise(self, data: PerturbationDataModule) -> None:
        """As of SAMSVAE, and what passed and failed training cells of each perturbation look like."""
        super()._initialise(data)
        module = self.module
        if self._argument("qc_key") is None:
            return
        number, total = torch.zeros_like(module.profile_cells), torch.zeros_like(module.profile, dtype=torch.float64)
        square = torch.zeros_like(total)
        for tensors in data.iterate(data.train_idx):
            tensors.pop("n_pairs")
            cells = Cells.from_tensors({k: v.to(number.device) for k, v in tensors.items()})
            group, failed = module.group(cells.action), cells.qc[:, 0].long()
            at = torch.where(group >= 0)[0]
            where = (group[at], failed[at])
            u = (module.normalised(cells.x[at]) * module.input_scale + module.input_mean).double()
            total.index_put_(where, u, accumulate=True)
            square.index_put_(where, u**2, accumulate=True)
            number.index_put_(where, torch.ones(len(at), device=number.device), accumulate=True)
        module.profile.copy_(total / number.clamp(min=1.0)[..., None])
        module.profile_cells.copy_(number)
        if not number[:, 1].any() or not number[:, 0].any():
            logger.warning("All training cells have the same quality label: there is no artefact to learn.")
        self._initialise_quality(square - total**2 / number.clamp(min=1.0)[..., None])

    def _initialise_quality(self, within: torch.Tensor) -> None:
        """Mean and spread of passed and failed cells within perturbations; `within`: sums of squares about the means."""
        module, number = self.module, self.module.profile_cells
        weight = number.prod(1) / number.sum(1).clamp(min=1.0)
        if not weight.any():
            return
        centre = torch.einsum("g,gqi->qi", weight / weight.sum(), module.profile)
        module.quality_centre.copy_((centre - module.input_mean) / module.input_scale)
        freedom = (number - 1.0).clamp(min=0.0).sum(0)
        if freedom.min() < 10:
            return
        # a gene that hardly varies in failed cells must not be blown up
        sd = (within.sum(0) / freedom[:, None]).clamp(min=0.0).sqrt() + 0.05 * module.input_scale
        module.quality_ratio.copy_((sd[0] / sd[1]).clamp(max=1.0))

    def _effect_rows(self, train_idx: NDArray[np.int64]) -> NDArray[np.int64]:
        """Effects are measured between cells that passed, where there are any of a perturbation and of controls."""
        key = self._argument("qc_key")
        if key is None:
            return train_idx
        passed = train_idx[~self.adata.obs[key].to_numpy(bool)[train_idx]]
        return passed if self._is_control(self.adata_manager, passed).any() else train_idx

    # -- prediction -------------------------------------------------------------------------------------------------

    def _globals(self, manager: Any, n_samples: int, seed: int) -> dict[str, torch.Tensor]:
        globals_ = super()._globals(manager, n_samples, seed)
        if getattr(self, "_artefact_removed", False):
            globals_["artefact_removed"] = torch.ones(())
        return globals_

    def predict_perturbation(
        self, perturbation: Any = None, *, artefact: Literal["own", "removed"] = "own", **kwargs: Any
    ) -> AnnData | None:
        """As :meth:`PerturbationModel.predict_perturbation`.

        Parameters
        ----------
        perturbation, **kwargs
            As there.
        artefact
            ``"own"``: each cell keeps its own technical quality; ``"removed"``: as had it passed.
        """
        if artefact not in ("own", "removed"):
            raise ValueError(f"`artefact` must be 'own' or 'removed', got {artefact!r}.")
        self._artefact_removed = artefact == "removed"
        try:
            return super().predict_perturbation(perturbation, **kwargs)
        finally:
            self._artefact_removed = False

    def denoise(
        self,
        adata: AnnData | None = None,
        *,
        key_added: str = "denoised",
        n_samples: int = 25,
        scale: Literal["log1p", "counts", "layer"] | None = None,
        overwrite: bool = False,
        seed: int | None = None,
    ) -> None:
        """Expression of each cell under its own perturbation, had it passed quality control, into ``layers[key_added]``.

        Parameters
        ----------
        adata
            Cells; by default the model's own.
        key_added
            Layer to write.
        n_samples, scale, overwrite, seed
            As in :meth:`predict_perturbation`.
        """
        check_key(key_added)
        check_whole("n_samples", n_samples)
        manager, user = self._query(adata)
        rows = np.arange(user.n_obs)
        self._check_known(user, manager, rows)
        reserve(user, {"layers": [key_added]}, overwrite)
        self._artefact_removed = True
        try:
            engine = self._engine(manager, n_samples=n_samples, scale=self._resolve_scale(scale), seed=self._seed(seed))
            means = [block.ask(None)[0].mean(0).cpu().numpy() for block in engine.blocks(rows)]
        finally:
            self._artefact_removed = False
        order = self.gene_names.get_indexer(user.var_names.astype(str))
        values = np.full(user.shape, np.nan, dtype=np.float32)
        values[:, order >= 0] = np.concatenate(means)[:, order[order >= 0]]
        user.layers[key_added] = values


def check_qc(adata: AnnData, qc_key: str) -> None:
    if qc_key not in adata.obs:
        check_obs_key(adata, "qc_key", qc_key)
    values = pd.unique(adata.obs[qc_key])
    if not set(values) <= {0, 1}:
        raise ValueError(
            f"`qc_key`: `adata.obs[{qc_key!r}]` must be true for cells that failed quality control and false for others, "
            f"found {list(values)[:3]}."
        )
