"""What every model shares: registration, validation of queries, training."""

from __future__ import annotations

import logging
import warnings
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from mudata import MuData
from scvi import settings
from scvi.data import AnnDataManager
from scvi.data.fields import BaseAnnDataField, CategoricalObsField, LayerField, NumericalObsField
from scvi.model.base import BaseModelClass
from scvi.train import TrainRunner

from pertura.data import _mudata
from pertura.data._constants import KEYS
from pertura.data._datamodule import PerturbationDataModule
from pertura.data._fields import ContextField, PerturbationField
from pertura.data._validation import (
    check_doses,
    check_expression,
    check_features,
    check_obs_key,
    check_perturbations,
    check_size_factor,
)
from pertura.data._vocabulary import Vocabulary, parse_label
from pertura.module._base import PerturbationModule
from pertura.train._plan import PyroPlan

from ._prediction import PredictionMixin

logger = logging.getLogger(__name__)


class ExpressionField(LayerField):
    """Expression, with the kind of its values (``"counts"`` or ``"continuous"``) in the registry."""

    KIND = "data_kind"

    def __init__(self, layer: str | None) -> None:
        super().__init__(KEYS.X, layer, is_count_data=False, correct_data_format=False)
        self.layer = layer

    def register_field(self, adata: AnnData) -> dict[str, Any]:
        """Register, and look at the values."""
        return {**super().register_field(adata), self.KIND: check_expression(adata, self.layer)}

    def transfer_field(self, state_registry: dict, adata_target: AnnData, **kwargs: Any) -> dict[str, Any]:
        """Register new data; they must be of the kind that the model was trained on."""
        state = super().transfer_field(state_registry, adata_target, **kwargs)
        found, wanted = check_expression(adata_target, self.layer), state_registry[self.KIND]
        if wanted == "counts" and found != "counts":
            raise ValueError(
                "`adata`: the model was trained on counts, but these values are not (negative or fractional). "
                f"Put the counts where they were in training ({'X' if self.layer is None else f'layers[{self.layer!r}]'})."
            )
        return {**state, self.KIND: wanted}


class PerturbationModel(PredictionMixin, BaseModelClass):
    """Base of all models and baselines.

    A subclass sets ``_module_cls``, builds ``self.module`` in ``__init__`` and, where it needs more than the shared arguments,
    overrides :meth:`setup_anndata` and calls :meth:`_setup`.
    """

    _training_plan_cls: ClassVar[type] = PyroPlan
    _counts_only: ClassVar[bool] = False
    module: PerturbationModule

    def __init__(self, adata: AnnData | MuData | None = None, registry: dict | None = None) -> None:
        if isinstance(adata, MuData):
            adata = _registered_modality(adata)
        super().__init__(adata, registry)
        self.calibration_: dict[str, Any] | None = None

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
        perturbation_features_key: str | None = None,
        delimiter: str = "+",
        **kwargs: Any,
    ) -> None:
        """Register an AnnData with the model.

        Parameters
        ----------
        adata
            Cells x genes.
        perturbation_key
            Column of ``obs`` that says what was done to each cell: a name, a combination ``"A+B"``, or `control`.
        control
            Label of unperturbed cells.
        layer
            Layer with the expression; `None` for ``X``.
        context_key
            Column of ``obs`` with cell type, cell line or patient.
        dose_key
            Column of ``obs`` with doses: numbers, or text such as ``"1+0.5"`` for the members of a combination.
        batch_key
            Column of ``obs`` with the batch.
        size_factor_key
            Column of ``obs`` with positive size factors; by default total counts over the genes of `adata`.
        perturbation_features_key
            Descriptions of perturbations, with which new ones can be predicted: key of a DataFrame in ``uns`` (one row per
            perturbation) or of gene embeddings in ``varm``.
        delimiter
            Joins the members of a combination.
        **kwargs
            Keyword arguments of :meth:`scvi.data.AnnDataManager.register_fields`.

        Raises
        ------
        ValueError
            Where an argument does not fit the data; it says which, what was found and what to do. `adata` is then unchanged.
        """
        cls._setup(adata, cls._get_setup_method_args(**locals()))

    @classmethod
    def setup_mudata(
        cls,
        mdata: MuData,
        *,
        rna_mod: str = "rna",
        perturbation_mod: str,
        control: str,
        layer: str | None = None,
        perturbation_layer: str | None = None,
        target_key: str | None = None,
        values: str = "presence",
        threshold: float = 0.0,
        context_key: str | None = None,
        batch_key: str | None = None,
        size_factor_key: str | None = None,
        perturbation_features_key: str | None = None,
        delimiter: str = "+",
        **kwargs: Any,
    ) -> None:
        """Register a MuData whose second modality (cells x perturbations) says what was done to each cell.

        Parameters
        ----------
        mdata
            Modalities of the same cells.
        rna_mod, perturbation_mod
            Names of the modalities with expression and with perturbations (called gRNAs, drugs).
        control
            Label of cells without any perturbation, and of non-targeting gRNAs in ``var[target_key]``.
        layer, perturbation_layer
            Layers of the two modalities; `None` for ``X``.
        target_key
            Column of the perturbations' ``var`` with the target (gRNA to gene); `None` uses their names.
        values
            ``"presence"``: a value above `threshold` says that a perturbation was applied; ``"dose"``: it is the dose.
        threshold
            See `values`.
        context_key, batch_key, size_factor_key
            Columns of the expression modality's ``obs``, or of the MuData's.
        perturbation_features_key, delimiter, **kwargs
            As in :meth:`setup_anndata`.
        """
        if values not in ("presence", "dose"):
            raise ValueError(f"`values` must be 'presence' or 'dose', got {values!r}.")
        source = {
            "rna_mod": rna_mod,
            "perturbation_mod": perturbation_mod,
            "perturbation_layer": perturbation_layer,
            "target_key": target_key,
            "values": values,
            "threshold": threshold,
            "control": control,
            "delimiter": delimiter,
            "obs_keys": [key for key in (context_key, batch_key, size_factor_key) if key is not None],
        }
        rna = _mudata.annotate(mdata, source)
        cls.setup_anndata(
            rna,
            perturbation_key=_mudata.LABEL,
            control=control,
            layer=layer,
            context_key=context_key,
            dose_key=_mudata.DOSE if values == "dose" else None,
            batch_key=batch_key,
            size_factor_key=size_factor_key,
            perturbation_features_key=perturbation_features_key,
            delimiter=delimiter,
            **kwargs,
        )
        manager = cls._get_most_recent_anndata_manager(rna)
        manager.registry["field_registries"][KEYS.PERTURBATION]["state_registry"]["mudata"] = source

    @classmethod
    def _fields(cls, args: dict[str, Any], features: pd.DataFrame | None = None) -> list[BaseAnnDataField]:
        """What is registered; a model that needs more than this appends to it."""
        return [
            ExpressionField(args["layer"]),
            PerturbationField(
                args["perturbation_key"],
                args["control"],
                dose_key=args["dose_key"],
                delimiter=args["delimiter"],
                features=features,
            ),
            ContextField(KEYS.CONTEXT, args["context_key"]),
            CategoricalObsField(KEYS.BATCH, args["batch_key"]),
            NumericalObsField(KEYS.SIZE_FACTOR, args["size_factor_key"], required=False),
        ]

    @classmethod
    def _setup(cls, adata: AnnData, setup_args: dict[str, Any]) -> None:
        """Check all arguments, then register: after an error `adata` is as it was."""
        args = dict(setup_args["setup_args"])
        if not isinstance(adata, AnnData):
            hint = " Use `setup_mudata`." if isinstance(adata, MuData) else ""
            raise ValueError(f"`adata` must be an AnnData, got {type(adata).__name__}.{hint}")
        if adata.is_view:
            raise ValueError("`adata` is a view of another AnnData. Call `adata = adata.copy()` first.")
        kind = check_expression(adata, args["layer"])
        if cls._counts_only and kind != "counts":
            raise ValueError(
                f"`layer`: {cls.__name__} needs raw counts, but `{args['layer'] or 'X'}` holds negative or fractional values. "
                "Name the layer with the counts."
            )
        check_perturbations(adata, args["perturbation_key"], args["control"], args["delimiter"])
        check_doses(adata, args["dose_key"], args["perturbation_key"], args["control"], args["delimiter"])
        for name in ("context_key", "batch_key"):
            check_obs_key(adata, name, args[name])
        check_size_factor(adata, args["size_factor_key"])
        labels = adata.obs[args["perturbation_key"]].astype(str).unique()
        names = sorted(
            {m for label in labels for m in parse_label(label, args["control"], args["delimiter"])}
        )
        features = check_features(adata, args["perturbation_features_key"], names)
        manager = AnnDataManager(fields=cls._fields(args, features), setup_method_args=setup_args)
        manager.register_fields(adata, **args.get("kwargs", {}))
        cls.register_manager(manager)

    def _state(self, key: str) -> dict[str, Any]:
        return self.registry["field_registries"][key]["state_registry"]

    @property
    def vocabulary(self) -> Vocabulary:
        """The perturbations that the model knows."""
        return Vocabulary.from_registry(self._state(KEYS.PERTURBATION))

    @property
    def contexts(self) -> list[str]:
        """Registered contexts, in the order of their codes."""
        return [str(c) for c in self._state(KEYS.CONTEXT)["categorical_mapping"]]

    @property
    def data_kind(self) -> str:
        """``"counts"`` or ``"continuous"``."""
        return self._state(KEYS.X)[ExpressionField.KIND]

    @property
    def gene_names(self) -> pd.Index:
        """Genes of the model, in its order."""
        return pd.Index(np.asarray(self._state(KEYS.X)["column_names"]).astype(str))

    def _argument(self, name: str) -> Any:
        return self.registry["setup_args"].get(name)

    # -- training ---------------------------------------------------------------------------------------------------

    def train(
        self,
        max_epochs: int | None = None,
        *,
        accelerator: str = "auto",
        devices: int | list[int] | str = "auto",
        train_size: float | None = None,
        validation_size: float | None = None,
        batch_size: int | None = None,
        early_stopping: bool = False,
        lr: float | None = None,
        seed: int | None = None,
        datasplitter_kwargs: dict[str, Any] | None = None,
        plan_kwargs: dict[str, Any] | None = None,
        **trainer_kwargs: Any,
    ) -> None:
        """Train the model.

        Parameters
        ----------
        max_epochs
            Passes over the data; by default enough for a fixed number of steps.
        accelerator, devices
            As in :class:`lightning.pytorch.trainer.trainer.Trainer`.
        train_size, validation_size
            Fractions of the cells. By default all cells train, or 90 % where `early_stopping` needs the rest.
        batch_size
            Cells per minibatch.
        early_stopping
            Stop when the ELBO of validation cells no longer improves; see :class:`scvi.train.Trainer` for its patience.
        lr
            Learning rate; short for ``plan_kwargs={"lr": lr}``.
        seed
            Of the split and the order of cells; by default ``scvi.settings.seed``, else 0. Parameters are initialised when
            the model is made: set ``scvi.settings.seed`` before that for a run that repeats.
        datasplitter_kwargs
            ``{"external_indexing": [train, validation, test]}`` imposes a split by row numbers.
        plan_kwargs
            Arguments of :class:`~pertura.train.PyroPlan`.
        **trainer_kwargs
            Arguments of :class:`scvi.train.Trainer`, such as ``gradient_clip_val`` or ``early_stopping_patience``.
        """
        if self.adata is None:
            raise ValueError("The model was loaded without data. Load it with `adata=` to train it.")
        seed = seed if seed is not None else (settings.seed if settings.seed is not None else 0)
        train_idx, val_idx = self._split(
            train_size, validation_size, early_stopping, seed, datasplitter_kwargs
        )
        batch_size = batch_size or self._default_batch_size(len(train_idx))
        data = self._data_module(train_idx, val_idx, batch_size, seed)
        self._initialise(data)
        plan_kwargs = {**self._plan_defaults(), **(plan_kwargs or {})}
        if lr is not None:
            plan_kwargs["lr"] = lr
        trainer_kwargs = {**self._trainer_defaults(), **trainer_kwargs}
        if max_epochs is None:
            max_epochs = self._default_max_epochs(len(data.train_dataloader()))
        plan = self._training_plan_cls(self.module, **plan_kwargs)
        runner = TrainRunner(
            self,
            training_plan=plan,
            data_splitter=data,
            max_epochs=max_epochs,
            accelerator=accelerator,
            devices=devices,
            early_stopping=early_stopping,
            **trainer_kwargs,
        )
        with warnings.catch_warnings():
            # one process on few cores: more loader workers would not help
            warnings.filterwarnings("ignore", message=".*does not have many workers.*")
            warnings.filterwarnings("ignore", message=".*The number of training batches.*")
            torch.manual_seed(seed)
            runner()
        self._after_training(train_idx)

    def _split(
        self,
        train_size: float | None,
        validation_size: float | None,
        early_stopping: bool,
        seed: int,
        datasplitter_kwargs: dict[str, Any] | None,
    ) -> tuple[np.ndarray, np.ndarray]:
        n = self.adata.n_obs
        own = dict(datasplitter_kwargs or {})
        indexing = own.pop("external_indexing", None)
        if own:
            raise ValueError(
                f"`datasplitter_kwargs` takes 'external_indexing', got {', '.join(map(repr, own))}."
            )
        if indexing is not None:
            parts = [np.asarray(part, dtype=np.int64) for part in indexing if part is not None]
            rows = np.concatenate(parts) if parts else np.zeros(0, np.int64)
            if (
                not len(parts)
                or not len(parts[0])
                or len(np.unique(rows)) < len(rows)
                or rows.min() < 0
                or rows.max() >= n
            ):
                raise ValueError(
                    "`datasplitter_kwargs['external_indexing']` must be [train, validation, test] with row numbers below "
                    f"{n} that do not overlap, and train must not be empty."
                )
            return np.sort(parts[0]), np.sort(parts[1]) if len(parts) > 1 else rows[:0]
        if train_size is None:
            train_size = (
                1.0 - validation_size if validation_size is not None else (0.9 if early_stopping else 1.0)
            )
        if not 0 < train_size <= 1:
            raise ValueError(f"`train_size` must be above 0 and at most 1, got {train_size}.")
        if validation_size is None:
            validation_size = 1.0 - train_size
        if not 0 <= validation_size <= 1 - train_size + 1e-9:
            raise ValueError(
                f"`validation_size` must be between 0 and 1 - train_size = {1 - train_size:g}, got {validation_size}."
            )
        order = np.random.default_rng(seed).permutation(n)
        n_train, n_val = max(1, round(train_size * n)), round(validation_size * n)
        if early_stopping and n_val == 0:
            raise ValueError("`early_stopping` needs validation cells: set `train_size` below 1.")
        return np.sort(order[:n_train]), np.sort(order[n_train : n_train + n_val])

    def _data_module(
        self, train_idx: np.ndarray, val_idx: np.ndarray, batch_size: int, seed: int
    ) -> PerturbationDataModule:
        """Plain minibatches; models that compare pairs override this."""
        return PerturbationDataModule(
            self.adata_manager, train_idx, val_idx, batch_size=batch_size, seed=seed
        )

    def _initialise(self, data: PerturbationDataModule) -> None:
        """Set what the module takes from the data before the first training."""

    def _plan_defaults(self) -> dict[str, Any]:
        return {}

    def _trainer_defaults(self) -> dict[str, Any]:
        return {}

    def _default_batch_size(self, n_cells: int) -> int:
        return settings.batch_size

    def _default_max_epochs(self, n_batches: int) -> int:
        return int(np.clip(round(10_000 / n_batches), 10, 400))

    def _after_training(self, train_idx: np.ndarray) -> None:
        """Measure how far effects are from the training data, for honest intervals."""
        from ._calibration import calibrate

        self.calibration_ = calibrate(self, train_idx)

    # -- loading ----------------------------------------------------------------------------------------------------

    @classmethod
    def load(cls, dir_path: str, adata: AnnData | MuData | bool | None = None, *args: Any, **kwargs: Any):
        """Load a saved model, with or without data (``adata=False``).

        A saved model is a pickle: load only files that you trust. A loaded model predicts what the saved one did, and trains
        on. See :meth:`scvi.model.base.BaseModelClass.load` for the arguments.
        """
        if isinstance(adata, MuData):
            source = cls.load_registry(dir_path, kwargs.get("prefix"))
            adata = _mudata.annotate(
                adata, source["field_registries"][KEYS.PERTURBATION]["state_registry"]["mudata"]
            )
        return super().load(dir_path, adata, *args, **kwargs)


def _registered_modality(mdata: MuData) -> AnnData:
    """The modality that ``setup_mudata`` registered."""
    for modality in mdata.mod.values():
        if "_scvi_manager_uuid" in modality.uns and _mudata.LABEL in modality.obs:
            return modality
    raise ValueError("`adata`: this MuData was not set up. Call `setup_mudata` first.")
