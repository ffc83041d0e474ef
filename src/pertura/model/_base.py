"""What every model shares: registration, and how it fits into scvi-tools."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import numpy as np
import pandas as pd
from anndata import AnnData
from mudata import MuData
from scvi.data import AnnDataManager
from scvi.data.fields import BaseAnnDataField, CategoricalObsField
from scvi.model.base import BaseModelClass

from pertura.data import _mudata
from pertura.data._cells import Expression
from pertura.data._constants import KEYS
from pertura.data._fields import ContextField, ExpressionField, PerturbationField, SizeFactorField
from pertura.data._validation import (
    check_doses,
    check_expression,
    check_features,
    check_names,
    check_obs_key,
    check_perturbations,
    check_size_factor,
)
from pertura.data._vocabulary import Vocabulary, parse_label
from pertura.module._base import PerturbationModule

from ._prediction import PredictionMixin
from ._training import TrainingMixin

_OURS = ("_scvi", "_pertura")


class PerturbationModel(PredictionMixin, TrainingMixin, BaseModelClass):
    """Base of all models and baselines.

    A subclass sets ``_module_cls``, builds ``self.module`` in ``__init__`` and, where it needs more than the shared
    arguments, overrides :meth:`setup_anndata` and calls :meth:`_setup`.

    Parameters
    ----------
    adata
        Set up by :meth:`setup_anndata` or :meth:`setup_mudata`; `None` to make a model of a `registry` alone.
    registry
        Registry of a saved model.
    """

    _counts_only: ClassVar[bool] = False
    # whether draws of a prediction hold the uncertainty of effects that comes from the noise of the training cells
    _draws_effects: ClassVar[bool] = False
    # whether it can be trained on cells of which nothing says that they were perturbed
    _perturbation_optional: ClassVar[bool] = False
    module: PerturbationModule

    def __init__(self, adata: AnnData | MuData | None = None, registry: dict | None = None) -> None:
        if isinstance(adata, MuData):
            adata = _registered_modality(adata)
        elif adata is not None and not isinstance(adata, AnnData):
            raise ValueError(f"`adata` must be an AnnData or MuData, got {type(adata).__name__}.")
        if adata is None and (not isinstance(registry, dict) or "field_registries" not in registry):
            raise ValueError(
                "`adata` or `registry` must be given: data that were set up with `setup_anndata`, or the registry of a "
                f"saved model, got {type(registry).__name__} as `registry`."
            )
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
            Column of ``obs`` with positive size factors, of which only the ratios matter; by default total counts over
            the genes of `adata`.
        perturbation_features_key
            Descriptions of perturbations, with which new ones can be predicted: key of a DataFrame in ``uns`` (one row
            per perturbation) or of gene embeddings in ``varm``.
        delimiter
            Joins the members of a combination.
        **kwargs
            ``source_registry``, which :meth:`load` passes.

        Raises
        ------
        ValueError
            Where an argument does not fit the data; it says which, what was found and what to do. `adata` is then
            unchanged.
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

        The model is then one of the expression modality, in which results are written: ``mdata[rna_mod]``.

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
            As in :meth:`setup_anndata`; further arguments of the model's own are columns of the same ``obs``.
        """
        keys = {"context_key": context_key, "batch_key": batch_key, "size_factor_key": size_factor_key}
        others = {name: key for name, key in kwargs.items() if name.endswith("_key")}
        source = {
            "rna_mod": rna_mod,
            "perturbation_mod": perturbation_mod,
            "perturbation_layer": perturbation_layer,
            "target_key": target_key,
            "values": values,
            "threshold": threshold,
            "control": control,
            "delimiter": delimiter,
            "obs_keys": [key for key in (*keys.values(), *others.values()) if isinstance(key, str)],
        }
        _mudata.check_settings(source)
        annotations = _mudata.annotations(mdata, source)
        if (annotations[_mudata.LABEL] == control).all():
            raise ValueError(
                f"`threshold`: no value of {perturbation_mod!r} is above {threshold:g}, so that no cell is perturbed. "
                "Lower it, or name the layer with the calls (`perturbation_layer`)."
            )
        rna = mdata.mod[rna_mod]
        with _restored_on_error(rna):
            rna.obs[list(annotations)] = annotations
            cls.setup_anndata(
                rna,
                perturbation_key=_mudata.LABEL,
                control=control,
                layer=layer,
                dose_key=_mudata.DOSE if values == "dose" else None,
                perturbation_features_key=perturbation_features_key,
                delimiter=delimiter,
                mudata=source,
                **keys,
                **kwargs,
            )

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
            SizeFactorField(args["size_factor_key"], args["layer"]),
        ]

    @staticmethod
    def _get_setup_method_args(**setup_locals: Any) -> dict[str, Any]:
        """Arguments of ``setup_anndata`` as scvi-tools stores them, and beside them those that are not stored."""
        result = BaseModelClass._get_setup_method_args(**setup_locals)
        return {**result, "kwargs": dict(setup_locals.get("kwargs", {}))}

    @classmethod
    def _setup(cls, adata: AnnData, setup_args: dict[str, Any]) -> None:
        """Check all arguments, then register: after an error `adata` is as it was."""
        kwargs = setup_args.pop("kwargs")
        source, mudata = kwargs.pop("source_registry", None), kwargs.pop("mudata", None)
        if kwargs:
            raise TypeError(f"{cls.__name__}.setup_anndata() got unexpected arguments: {', '.join(kwargs)}.")
        if not isinstance(adata, AnnData):
            hint = " Use `setup_mudata`." if isinstance(adata, MuData) else ""
            raise ValueError(f"`adata` must be an AnnData, got {type(adata).__name__}.{hint}")
        if adata.is_view:
            raise ValueError("`adata` is a view of another AnnData. Call `adata = adata.copy()` first.")
        args = setup_args["setup_args"]
        features = cls._check_new(adata, args) if source is None else cls._check_known_setup(adata, args, source)
        fields = cls._fields(args, features)
        for field in fields:
            if isinstance(field, PerturbationField) and mudata is not None:
                field.mudata = mudata
        manager = AnnDataManager(fields=fields, setup_method_args=setup_args)
        with _restored_on_error(adata):
            manager.register_fields(adata, source)
        cls.register_manager(manager)

    @classmethod
    def _check_new(cls, adata: AnnData, args: dict[str, Any]) -> pd.DataFrame | None:
        """Check data that a new model is to be made of; gives the features of perturbations."""
        check_names(adata)
        kind = check_expression(adata, args["layer"])
        if cls._counts_only and kind != "counts":
            raise ValueError(
                f"`layer`: {cls.__name__} needs raw counts, but `{args['layer'] or 'X'}` holds negative or fractional "
                "values. Name the layer with the counts."
            )
        key, control, delimiter = args["perturbation_key"], args["control"], args["delimiter"]
        if key is None and cls._perturbation_optional:
            if args["dose_key"] is not None:
                raise ValueError("`dose_key` needs `perturbation_key`: name the column that says what was dosed.")
        else:
            check_perturbations(adata, key, control, delimiter)
        check_doses(adata, args["dose_key"], key, control, delimiter)
        for name in ("context_key", "batch_key"):
            check_obs_key(adata, name, args[name])
            if args[name] is not None and args[name] == key:
                raise ValueError(f"`{name}` and `perturbation_key` are both {key!r}. Name two different columns.")
        check_size_factor(adata, args["size_factor_key"], kind)
        labels = () if key is None else adata.obs[key].astype(str).unique()
        names = sorted({m for label in labels for m in parse_label(label, control, delimiter)})
        return check_features(adata, args["perturbation_features_key"], names)

    @classmethod
    def _check_known_setup(cls, adata: AnnData, args: dict[str, Any], source: dict[str, Any]) -> pd.DataFrame | None:
        """Check data that a saved model is loaded with: the model's names, codes and features stay."""
        states = {key: entry["state_registry"] for key, entry in source["field_registries"].items()}
        kind = check_expression(adata, args["layer"])
        Expression.of(adata, args["layer"], states[KEYS.X]["column_names"], kind)
        for name in ("perturbation_key", "dose_key", "context_key", "batch_key"):
            check_obs_key(adata, name, args[name])
        check_doses(adata, args["dose_key"], args["perturbation_key"], args["control"], args["delimiter"])
        check_size_factor(adata, args["size_factor_key"], states[KEYS.X]["data_kind"])
        for name, key in (("context_key", KEYS.CONTEXT), ("batch_key", KEYS.BATCH)):
            if args[name] is None:
                continue
            known = list(states[key]["categorical_mapping"])
            new = [v for v in adata.obs[args[name]].unique() if v not in known]
            if new:
                raise ValueError(
                    f"`adata`: {new[0]!r} in `obs[{args[name]!r}]` was not in training. Load the model with "
                    "`adata=False`, and pass these cells to `predict_perturbation(adata=...)`."
                )
        return states[KEYS.PERTURBATION]["features"]

    # -- what was registered ----------------------------------------------------------------------------------------

    def _state(self, key: str) -> dict[str, Any]:
        return self.registry["field_registries"][key]["state_registry"]

    @property
    def vocabulary(self) -> Vocabulary:
        """The perturbations that the model knows."""
        return Vocabulary.from_registry(self._state(KEYS.PERTURBATION))

    @property
    def contexts(self) -> list[str]:
        """Registered contexts, in the order of their codes."""
        if self._argument("context_key") is None:
            return ["all"]
        return [str(c) for c in self._state(KEYS.CONTEXT)["categorical_mapping"]]

    @property
    def data_kind(self) -> str:
        """``"counts"`` or ``"continuous"``."""
        return self._state(KEYS.X)[ExpressionField.KIND]

    @property
    def gene_names(self) -> pd.Index:
        """Genes of the model, in its order."""
        return pd.Index(np.asarray(self._state(KEYS.X)["column_names"]).astype(str))

    def get_var_names(self, legacy_mudata_format: bool = False) -> np.ndarray:
        """Genes of the model, whatever the order of those in the data it holds."""
        return np.asarray(self._state(KEYS.X)["column_names"])

    def _argument(self, name: str) -> Any:
        return self.registry["setup_args"].get(name)

    # -- loading ----------------------------------------------------------------------------------------------------

    @classmethod
    def load(
        cls, dir_path: str, adata: AnnData | MuData | bool | None = None, *args: Any, **kwargs: Any
    ) -> PerturbationModel:
        """Load a saved model, with or without data (``adata=False``).

        A saved model is a pickle: load only files that you trust. A loaded model predicts what the saved one did, and
        trains on. See :meth:`scvi.model.base.BaseModelClass.load` for the arguments.
        """
        if not isinstance(adata, MuData):
            return super().load(dir_path, adata, *args, **kwargs)
        registry = cls.load_registry(dir_path, kwargs.get("prefix"))
        source = registry["field_registries"][KEYS.PERTURBATION]["state_registry"].get("mudata")
        if source is None:
            raise ValueError(
                "`adata` is a MuData, but the model was set up with an AnnData. Pass the expression modality."
            )
        annotations = _mudata.annotations(adata, source)
        rna = adata.mod[source["rna_mod"]]
        with _restored_on_error(rna):
            rna.obs[list(annotations)] = annotations
            return super().load(dir_path, rna, *args, **kwargs)


@contextmanager
def _restored_on_error(adata: AnnData) -> Iterator[None]:
    """Put back what registration adds to an AnnData, should it fail."""
    slots = {name: getattr(adata, name) for name in ("obs", "obsm", "uns")}
    before = {name: {k: slot[k] for k in list(slot.keys()) if str(k).startswith(_OURS)} for name, slot in slots.items()}
    try:
        yield
    except BaseException:
        for name, kept in before.items():
            slot = getattr(adata, name)
            for key in [k for k in slot.keys() if str(k).startswith(_OURS) and k not in kept]:
                del slot[key]
            for key, value in kept.items():
                slot[key] = value
        raise


def _registered_modality(mdata: MuData) -> AnnData:
    """The modality that ``setup_mudata`` registered."""
    for modality in mdata.mod.values():
        if "_scvi_manager_uuid" in modality.uns and _mudata.LABEL in modality.obs:
            return modality
    raise ValueError("`adata`: this MuData was not set up. Call `setup_mudata` first.")
