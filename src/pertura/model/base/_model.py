"""What every model shares: registration, training, prediction, and how it fits into scvi-tools."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from mudata import MuData
from numpy.typing import NDArray
from scvi.data import AnnDataManager
from scvi.data.fields import BaseAnnDataField, CategoricalObsField
from scvi.model.base import BaseModelClass
from scvi.utils import track

from pertura.data import _mudata
from pertura.data._constants import KEYS
from pertura.data._fields import ContextField, ExpressionField, PerturbationField
from pertura.data._library import describe
from pertura.data._perturbation import Perturbation, tells_doses
from pertura.data._vocabulary import Vocabulary
from pertura.effects._discrepancy import Discrepancy
from pertura.module._base import PerturbationModule

from ._arguments import (
    check_draws,
    check_flag,
    check_key,
    check_number,
    check_representable,
    check_whole,
    resolve_perturbations,
    resolve_scale,
    resolve_seed,
)
from ._effects import EffectSums, effect_table
from ._options import Options, resolve, signature_with
from ._out import PredictionFile, check_out, fingerprint
from ._predict import Predicted, Predictor, Settings, device_of, predict_blocks, predict_cells, seeded, sum_effects
from ._query import Query, query
from ._registered import Registered
from ._setup import check_known, check_new, check_values, registered_modality, restored_on_error
from ._train import TrainableModel
from ._write import contexts_as_anndata, fill, frame, reserve, targets, write

if TYPE_CHECKING:
    from sparse import GCXS

Scale = Literal["log1p", "counts", "layer"]
Noise = Literal["own", "none"]
DEFAULT_SAMPLES, FEW_SAMPLES = 25, 2
_DELTA = 0.1
_MAX_BYTES = 16 * 2**30


@dataclass(frozen=True)
class SetupKey:
    """An argument of ``setup_anndata`` that only some models have.

    Attributes
    ----------
    name
        Name of the argument.
    doc
        What it is, one line or more.
    check
        Called with the AnnData and the arguments, raises where the value does not fit.
    """

    name: str
    doc: str
    check: Callable[[AnnData, dict[str, Any]], None] | None = None


class PerturbationModel(TrainableModel):
    """Base of all models and baselines.

    A model sets ``_module_cls`` and ``_options_cls``, and makes its module in :meth:`_make_module`. What else it may
    declare is listed below this docstring, with what it is for.

    Parameters
    ----------
    adata
        Set up by :meth:`setup_anndata` or :meth:`setup_mudata`; `None` to make a model of a `registry` alone.
    registry
        Registry of a saved model.
    **options
        Options of the model, and ``preset`` where it has presets.
    """

    # options with their defaults, and changes to them by name of a preset
    _options_cls: ClassVar[type[Options]] = Options
    _presets: ClassVar[dict[str, dict[str, Any]]] = {}
    # arguments of `setup_anndata` beside the shared ones
    _setup_keys: ClassVar[tuple[SetupKey, ...]] = ()
    # arguments of `setup_anndata` that name columns which cells must have to be predicted for
    _query_columns: ClassVar[tuple[str, ...]] = (
        "perturbation_key",
        "dose_key",
        "context_key",
        "batch_key",
        "size_factor_key",
    )
    # whether draws of a prediction hold the uncertainty of effects that comes from the noise of the training cells
    _draws_effects: ClassVar[bool] = False
    # whether it can be trained on cells of which nothing says that they were perturbed
    _perturbation_optional: ClassVar[bool] = False
    # options that were found in the data, with which the model is made again when it is loaded without them
    _found_options: dict[str, Any] = {}
    # whether features of a perturbation that was not seen are enough to predict it
    _can_predict_features: bool = False
    # whether it can be trained on effects of conditions, without cells
    _takes_effects: ClassVar[bool] = False
    # whether a perturbation is an intervention on the gene whose name it bears, and nothing else
    _only_genes: bool = False

    module: PerturbationModule
    options: Options

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "_options_cls" in cls.__dict__ and "__init__" not in cls.__dict__:

            def __init__(self: PerturbationModel, adata: Any = None, registry: Any = None, **options: Any) -> None:
                PerturbationModel.__init__(self, adata, registry, **options)

            __init__.__signature__ = signature_with(cls._options_cls, cls._presets)
            cls.__init__ = __init__
        if cls.__dict__.get("_setup_keys") and "setup_anndata" not in cls.__dict__:
            cls.setup_anndata = classmethod(_setup_with(cls._setup_keys))

    def __init__(self, adata: AnnData | MuData | None = None, registry: dict | None = None, **options: Any) -> None:
        if isinstance(adata, MuData):
            adata = registered_modality(adata)
        elif adata is not None and not isinstance(adata, AnnData):
            raise ValueError(f"`adata` must be an AnnData or MuData, got {type(adata).__name__}.")
        if adata is None and (not isinstance(registry, dict) or "field_registries" not in registry):
            raise ValueError(
                "`adata` or `registry` must be given: data that were set up with `setup_anndata`, or the registry of a "
                f"saved model, got {type(registry).__name__} as `registry`."
            )
        super().__init__(adata, registry)
        self.registered = Registered.of(self.registry)
        self.calibration_: dict[str, Any] | None = None
        self._fitted_discrepancy: tuple[Any, Discrepancy] | None = None
        preset = options.pop("preset", None)
        self.options = resolve(self._options_cls, self._presets, preset, options, type(self).__name__)
        # a model that is loaded without its data needs what keys of them stood for
        found = self._look_up()
        self.options, options = replace(self.options, **found), {**options, **found}
        self._make_module()
        self.module.nonnegative = self.registered.nonnegative
        if self.registered.is_counts:
            self._model_summary_string += f"\nLibrary: {describe(self.registered.library, len(self.gene_names))}"
        if self.registered.library["rest"]:
            self.module.add_rest()
        given = {**({"preset": preset} if preset else {}), **options, **self._found_options}
        self.init_params_ = {"non_kwargs": given, "kwargs": {}}

    def _look_up(self) -> dict[str, Any]:
        """Options that name a key of the data, with the values found there, which are saved with the model."""
        return {}

    def _make_module(self) -> None:
        """Set ``module`` from ``self.options`` and ``self.registered``, and ``_model_summary_string``."""
        raise NotImplementedError

    def _likelihood(self, asked: str | None) -> str:
        """``"nb"`` or ``"normal"``: as asked, by default what fits the registered layer."""
        if asked is None:
            return "nb" if self.registered.is_counts else "normal"
        if asked == "nb" and not self.registered.is_counts:
            raise ValueError(
                "`likelihood='nb'` needs counts, but the registered layer holds negative or fractional values. "
                "Register the counts (`layer=`), or use 'normal'."
            )
        return asked

    # -- registration -----------------------------------------------------------------------------------------------

    @classmethod
    def setup_anndata(
        cls,
        adata: AnnData,
        *,
        perturbation_key: str,
        control: str | None = None,
        layer: str | None = None,
        context_key: str | None = None,
        dose_key: str | None = None,
        batch_key: str | None = None,
        size_factor_key: str | None = None,
        values: Literal["expression", "effects"] = "expression",
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
            Label of unperturbed cells. Effects have none; the name is then what predictions of no effect are called
            (``"control"``).
        layer
            Layer with the expression; `None` for ``X``.
        context_key
            Column of ``obs`` with cell type, cell line or patient.
        dose_key
            Column of ``obs`` with doses: numbers in any unit, or text such as ``"1+0.5"`` for the members of a
            combination. Results do not depend on the unit.
        batch_key
            Column of ``obs`` with the batch.
        size_factor_key
            Column of ``obs`` with the total counts of whole cells, taken before genes were selected. Predictions are per 10,000
            of them. Values that are at least the counts of the registered genes are taken for such totals. Values near 1
            (median below 10, or below a tenth of these counts) are relative factors, of which only the ratios matter:
            on average the registered genes are then the whole library, and expected counts add up to it. Others are
            refused. By default, totals are recovered from ``X`` where it is log-normalized and `layer` holds its
            counts, else they are those of the genes of `adata`. The printed model says which.
        values
            What rows are. ``"expression"``: of cells, or of bulk samples, some of which are controls. ``"effects"``: of conditions,
            one row (or replicate) for each perturbation in each context: log fold changes, z scores, or rankings as normal
            scores. There are no controls then: the control is 0, and predictions for a row are effects of perturbations in the
            row's context, whatever its own. `PerturbX` and the baselines take effects.
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
        with restored_on_error(rna):
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
            ExpressionField(args["layer"], args["size_factor_key"], args.get("values", "expression")),
            PerturbationField(
                args["perturbation_key"],
                args["control"],
                dose_key=args["dose_key"],
                delimiter=args["delimiter"],
                features=features,
            ),
            ContextField(KEYS.CONTEXT, args["context_key"]),
            CategoricalObsField(KEYS.BATCH, args["batch_key"]),
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
        args = setup_args["setup_args"]
        for key in cls._setup_keys:
            args.setdefault(key.name, kwargs.pop(key.name, None))
        if kwargs:
            raise TypeError(f"{cls.__name__}.setup_anndata() got unexpected arguments: {', '.join(kwargs)}.")
        if not isinstance(adata, AnnData):
            hint = " Use `setup_mudata`." if isinstance(adata, MuData) else ""
            raise ValueError(f"`adata` must be an AnnData, got {type(adata).__name__}.{hint}")
        if adata.is_view:
            raise ValueError("`adata` is a view of another AnnData. Call `adata = adata.copy()` first.")
        check_values(cls.__name__, args, cls._takes_effects)
        if source is None:
            features = check_new(adata, args, cls._perturbation_optional)
            for key in cls._setup_keys:
                if key.check is not None and args[key.name] is not None:
                    key.check(adata, args)
        else:
            features = check_known(adata, args, source)
        fields = cls._fields(args, features)
        for field in fields:
            if isinstance(field, PerturbationField) and mudata is not None:
                field.mudata = mudata
        manager = AnnDataManager(fields=fields, setup_method_args=setup_args)
        with restored_on_error(adata):
            manager.register_fields(adata, source)
        cls.register_manager(manager)

    # -- what was registered ----------------------------------------------------------------------------------------

    @property
    def vocabulary(self) -> Vocabulary:
        """The perturbations that the model knows."""
        return self.registered.vocabulary

    @property
    def contexts(self) -> list[str]:
        """Registered contexts, in the order of their codes."""
        return list(self.registered.contexts)

    @property
    def data_kind(self) -> str:
        """``"counts"``, ``"continuous"`` or ``"effects"``."""
        return self.registered.data_kind

    @property
    def gene_names(self) -> pd.Index:
        """Genes of the model, in its order."""
        return self.registered.gene_names

    def get_var_names(self, legacy_mudata_format: bool = False) -> np.ndarray:
        """Genes of the model, whatever the order of those in the data it holds."""
        return self.registered.gene_names.to_numpy()

    @property
    def _discrepancy(self) -> Discrepancy:
        """How far effects are from the truth, and questions from the data; made once per training."""
        key = (self.calibration_, self.vocabulary)
        if self._fitted_discrepancy is None or any(
            a is not b for a, b in zip(self._fitted_discrepancy[0], key, strict=True)
        ):
            self._fitted_discrepancy = (key, self._make_discrepancy())
        return self._fitted_discrepancy[1]

    def _make_discrepancy(self) -> Discrepancy:
        return Discrepancy(self.calibration_, self.vocabulary, self.registered.contexts)

    def _check_representable(self, label: str) -> None:
        """Raise where the model has no way to represent a perturbation."""
        check_representable(self, label)

    def _can_take_back(self, name: str) -> bool:
        """Whether the effect of a registered perturbation is known; a split may have left it out of training."""
        step = self._discrepancy.step(Perturbation(name))
        return step != "unseen" and (step != "unseen with features" or self._can_predict_features)

    # -- prediction -------------------------------------------------------------------------------------------------

    def _learn_from_query(self, asked: Query) -> dict[str, Any]:
        """What the module is to know about the cells asked beside their own expression, such as profiles of new contexts."""
        return {}

    def _predictor(self, asked: Query, settings: Settings) -> Predictor:
        return Predictor(self.module, asked, self.vocabulary, settings, self._learn_from_query(asked))

    def _settings(
        self,
        n_samples: int | None,
        ci: float | None,
        scale: str | None,
        seed: int | None,
        batch_size: int | None,
        noise: str = "own",
        changes: dict[str, float] | None = None,
    ) -> Settings:
        """Checked settings of a prediction."""
        check_draws(n_samples, ci, batch_size)
        if noise not in ("own", "none"):
            raise ValueError(f"`noise` must be 'own' or 'none', got {noise!r}.")
        if n_samples is None:
            n_samples = FEW_SAMPLES if ci is None else DEFAULT_SAMPLES
        return Settings(
            n_samples, resolve_scale(self.registered, scale), resolve_seed(seed), batch_size, noise, changes or {}
        )

    def predict_perturbation(
        self,
        perturbation: str | Sequence[str] | None = None,
        *,
        adata: AnnData | MuData | None = None,
        indices: Sequence[int] | None = None,
        dose: float | Sequence[float] | None = None,
        n_samples: int | None = None,
        ci: float | None = 0.9,
        noise: Noise = "own",
        scale: Scale | None = None,
        by: Literal["cell", "context"] = "cell",
        key_added: str | None = None,
        return_anndata: bool = False,
        out: str | PathLike[str] | None = None,
        overwrite: bool = False,
        batch_size: int | None = None,
        seed: int | None = None,
        **changes: Any,
    ) -> AnnData | None:
        """Predict what each cell would look like under a perturbation.

        The basal state of a cell is inferred from its own expression and its own perturbation, the perturbation is
        exchanged, and the result decoded with the cell's own measurement noise. Pass control cells to compare with measured
        perturbed cells.

        Parameters
        ----------
        perturbation
            A name, a combination ``"A+B"``, or a list of them. `None`: the only one there is, or with ``by="context"`` all
            that were trained.
        adata
            Cells to predict for; by default the model's own. Genes are matched by name.
        indices
            Rows of `adata`; by default all.
        dose
            In the registered unit. A number holds for every member of a combination; several numbers are several
            predictions. Doses that differ by less than 0.01 % are one. By default the dose at which most cells were
            treated with the perturbation, the highest of equally frequent ones; of a perturbation that was not registered, the
            median of these doses. Without a registered dose only models that knock out genes take one: 1 is a complete knock-out,
            0.3 a knock-down by 30 %.
        n_samples
            Posterior draws per cell; by default 25 where an interval is asked, else an antithetic pair.
        ci
            Level of the interval in ``layers[key + "_low"]`` and ``["_high"]``; `None` leaves it out. The interval is
            of a cell's own expression, measurement noise included, and wider the further the question is from the data.
        noise
            ``"own"``: each cell keeps the noise of its own measurement, so that its own perturbation gives its own
            expression back; ``"none"``: expected expression given the latent state.
        scale
            ``"log1p"`` (default for counts): counts per 10,000, log1p, averaged over the posterior after the transform.
            ``"counts"``: counts at the cell's own depth. ``"layer"``: as registered (default for other data).
        by
            ``"cell"``: a prediction for each cell. ``"context"``: means of contexts, as :meth:`get_perturbation_effect` has
            them (from the control cells among the cells asked); always a new AnnData.
        key_added
            Where results go; by default ``"predicted_" + name``.
        return_anndata
            Return a new AnnData also for one name.
        out
            Path of a zarr store (``.zarr``) or ``.h5ad`` file to write to, instead of memory: the AnnData that a list would
            return, written block by block, so that memory does not grow with the number of cells. The same call continues a
            file that was interrupted. Read parts of it with :func:`anndata.experimental.read_lazy`, or all of it with
            :func:`anndata.io.read_zarr`.
        overwrite
            Whether keys that are not pertura's, or a file `out` that holds something else, may be overwritten.
        batch_size
            Cells read at a time. Does not affect results, and has little effect on memory: draws are made in blocks of 32
            MiB.
        seed
            Of the draws; by default ``scvi.settings.seed``, else 0.

        Returns
        -------
        `None` for one name: ``layers[key]`` (with ``_low`` and ``_high``), ``obsm["X_" + key]``, ``obsm["X_basal"]``,
        ``uns[key + "_effect"]`` and ``uns[key]`` of `adata` are set; rows outside `indices` are NaN. For a list, or
        with `return_anndata`, a new AnnData with one row per cell and perturbation, the prediction in ``X``. Where the
        smallest registered value is 0, no prediction is below it: those of a Gaussian model are cut off, effects are not. With
        ``by="context"`` one row per context and perturbation: mean expression under it in ``X``, its interval in
        ``layers["low"]`` and ``["high"]``, ``layers["control"]`` and ``layers["effect"]`` beside it. With `out`, `None`.

        Raises
        ------
        ValueError
            For a perturbation that the model has no way to represent, and for wrong arguments.
        """
        check_flag("return_anndata", return_anndata)
        check_flag("overwrite", overwrite)
        if by not in ("cell", "context"):
            raise ValueError(f"`by` must be 'cell' or 'context', got {by!r}.")
        if by == "context" and key_added is not None:
            raise ValueError(
                f"`key_added`: rows of contexts have no place in `adata`, so nothing is written to {key_added!r}. "
                "Leave it out: a new AnnData is returned."
            )
        if out is not None and (by == "context" or key_added is not None or return_anndata):
            raise ValueError(
                "`out`: cells are written to the file alone. Leave out `by`, `key_added` and `return_anndata`."
            )
        path = None if out is None else check_out(out)
        single = (isinstance(perturbation, str) or perturbation is None) and np.ndim(dose) == 0
        perturbations = resolve_perturbations(self, perturbation, dose, every=by == "context")
        key = key_added if key_added is not None else f"predicted_{perturbations[0].label}".replace("/", "_")
        check_key(key)
        settings = self._settings(n_samples, ci, scale, seed, batch_size, noise, self._changes(changes))
        cells = query(self, adata, indices)
        asked = self._provenance(perturbations, ci, settings)
        if by == "context":
            cells = cells.controls_or_all()
            table = self._effects_of(cells, perturbations, settings, ci or 0.9, _DELTA)
            names = np.asarray(cells.contexts, dtype=object)[cells.context]
            return contexts_as_anndata(self, cells.user, table, pd.Series(names).value_counts(), asked)
        if path is not None:
            self._to_file(path, cells, perturbations, settings, ci, asked, overwrite)
            return None
        if not single or return_anndata:
            n_bytes = len(cells) * len(perturbations) * len(self.gene_names) * 4 * (1 if ci is None else 3)
            if n_bytes > _MAX_BYTES:
                raise ValueError(
                    f"`perturbation`: {len(perturbations)} perturbations of {len(cells)} cells would fill "
                    f"{n_bytes / 2**30:.0f} GiB. Write them to a file with `out`, ask in parts with `iter_predictions`, or "
                    "for `get_perturbation_effect`."
                )
            predicted = predict_cells(self._predictor(cells, settings), perturbations, self._discrepancy, ci=ci)
            return self._as_anndata(cells, perturbations, predicted, asked)
        reserve(cells.user, targets(key, ci), overwrite)
        sums = EffectSums(1, settings.n_samples, len(self.gene_names), np.unique(cells.context))
        predictor = self._predictor(cells, settings)
        predicted = predict_cells(predictor, perturbations, self._discrepancy, ci=ci, effects=sums)
        has_dose = tells_doses(self.vocabulary, perturbations)
        table = self._effect_table(cells, sums, perturbations, ci or 0.9, _DELTA, settings.scale, has_dose)
        write(self, cells.user, cells.rows, key, predicted, table, asked)
        return None

    def iter_predictions(
        self,
        perturbation: str | Sequence[str] | None = None,
        *,
        adata: AnnData | MuData | None = None,
        indices: Sequence[int] | None = None,
        dose: float | Sequence[float] | None = None,
        n_samples: int | None = None,
        ci: float | None = 0.9,
        noise: Noise = "own",
        scale: Scale | None = None,
        batch_size: int | None = None,
        seed: int | None = None,
        chunk_size: int = 1024,
        **changes: Any,
    ) -> Iterator[AnnData]:
        """Predictions as in :meth:`predict_perturbation`, some cells at a time: memory does not grow with their number.

        Parameters
        ----------
        perturbation, adata, indices, dose, n_samples, ci, noise, scale, batch_size, seed, **changes
            As in :meth:`predict_perturbation`.
        chunk_size
            Cells per AnnData.

        Yields
        ------
        AnnData with one row per cell of the chunk and perturbation, the same numbers as all at once.
        """
        check_whole("chunk_size", chunk_size)
        perturbations = resolve_perturbations(self, perturbation, dose)
        settings = self._settings(n_samples, ci, scale, seed, batch_size, noise, self._changes(changes))
        cells = query(self, adata, indices)
        # arguments are checked when this is called, not when the first chunk is asked
        return self._chunks(cells, perturbations, settings, ci, chunk_size)

    def get_perturbation_effect(
        self,
        perturbation: str | Sequence[str] | None = None,
        *,
        adata: AnnData | MuData | None = None,
        indices: Sequence[int] | None = None,
        dose: float | Sequence[float] | None = None,
        n_samples: int | None = None,
        ci: float = 0.9,
        delta: float = _DELTA,
        noise: Noise = "own",
        scale: Scale | None = None,
        batch_size: int | None = None,
        seed: int | None = None,
        **changes: Any,
    ) -> pd.DataFrame:
        """Effect of a perturbation on the mean expression of each gene in each context.

        Parameters
        ----------
        perturbation
            A name, a combination ``"A+B"``, or a list of them. `None`: all that the model was trained on.
        adata, indices, dose, n_samples, noise, scale, batch_size, seed, **changes
            As in :meth:`predict_perturbation`. Effects start from the control cells among the cells passed, in contexts
            that have none from all of them.
        ci
            Level of the interval.
        delta
            Size from which an effect counts: ``proba_de`` is the probability that the effect has the more likely sign and
            is larger than this. It is at most 0.5 for a gene about which nothing is known.

        Returns
        -------
        One row per perturbation, context and gene: ``perturbation, context, gene, lfc_mean, lfc_sd, ci_low, ci_high,
        gene_sd, response_sd, proba_de, log2fc, mean_control, mean_perturbed, novelty`` (and ``dose``). ``lfc_*`` and ``ci_*`` are mean
        differences on `scale` (for ``"log1p"`` natural-log units, as ``X`` after :func:`scanpy.pp.log1p`). The sd holds
        the posterior of the model and how far its effects were from measured ones; it is wider for contexts, doses,
        combinations and perturbations that were not seen. Intervals reach as far as the errors of conditions that were
        left out did. ``response_sd`` says how sure the amplitude is that all genes share, in units of the effect: at 0.5, the
        whole response may be 50 % weaker or stronger. ``gene_sd`` is the error of the gene alone, ``lfc_sd`` and the interval
        hold both.

        See Also
        --------
        pertura.metrics.effects_to_anndata : The table as an AnnData, for scanpy's plots.
        """
        perturbations = resolve_perturbations(self, perturbation, dose, every=True)
        if ci is None:
            raise ValueError("`ci` must be between 0 and 1, got None.")
        settings = self._settings(n_samples, ci, scale, seed, batch_size, noise, self._changes(changes))
        check_number("delta", delta, least=0)
        cells = query(self, adata, indices).controls_or_all()
        return self._effects_of(cells, perturbations, settings, ci, delta)

    def get_latent_representation(
        self,
        adata: AnnData | MuData | None = None,
        *,
        indices: Sequence[int] | None = None,
        kind: Literal["basal", "perturbed"] = "basal",
        n_samples: int | None = None,
        batch_size: int | None = None,
        seed: int | None = None,
        **changes: Any,
    ) -> NDArray[np.float32]:
        """Latent state of each cell, posterior mean, shape ``(n_cells, n_latent)``.

        Parameters
        ----------
        adata, indices, n_samples, batch_size, seed, **changes
            As in :meth:`predict_perturbation`.
        kind
            ``"basal"``: the state before the cell's own perturbation; ``"perturbed"``: after it.
        """
        if kind not in ("basal", "perturbed"):
            raise ValueError(f"`kind` must be 'basal' or 'perturbed', got {kind!r}.")
        settings = self._settings(n_samples, None, None, seed, batch_size, changes=self._changes(changes))
        predictor = self._predictor(query(self, adata, indices), settings)
        states = (block.basal_state() if kind == "basal" else block.under(None).state for block in predictor.blocks())
        return np.concatenate([state.mean(0).cpu().numpy() for state in states])

    def posterior_predictive_sample(
        self,
        adata: AnnData | MuData | None = None,
        n_samples: int = 1,
        batch_size: int | None = None,
        indices: Sequence[int] | None = None,
        seed: int | None = None,
    ) -> GCXS:
        """Replicates of the measured cells under their own perturbation, measurement noise drawn anew.

        Parameters
        ----------
        adata, n_samples, batch_size, indices, seed
            As in :meth:`predict_perturbation`.

        Returns
        -------
        Sparse array ``(n_cells, n_genes, n_samples)`` on the model's native scale, as
        :class:`scvi.criticism.PosteriorPredictiveCheck` reads it.
        """
        from sparse import GCXS, concatenate

        check_whole("n_samples", n_samples)
        settings = self._settings(n_samples, None, None, seed, batch_size)
        predictor = self._predictor(query(self, adata, indices), settings)
        parts = [
            GCXS.from_numpy(block.replicate().permute(1, 2, 0).cpu().numpy(), compressed_axes=(0,))
            for block in predictor.blocks()
        ]
        return concatenate(parts, axis=0)

    def get_marginal_ll(
        self,
        adata: AnnData | MuData | None = None,
        *,
        indices: Sequence[int] | None = None,
        n_samples: int = 100,
        batch_size: int = 64,
        seed: int | None = None,
    ) -> NDArray[np.float64]:
        """Log likelihood of each cell under its own perturbation, importance-weighted over its latent state.

        It is the likelihood of the distribution that predicts; where the library has counts of other genes than the registered
        ones, their number is part of it. Global parameters are drawn once for all cells and not
        weighted (IWELBO of Bereket and Karaletsos).

        Parameters
        ----------
        adata, indices
            Cells; by default the model's own.
        n_samples
            Importance samples per cell.
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
        settings = self._settings(n_samples, None, None, seed, batch_size)
        cells = query(self, adata, indices)
        predictor, device, result = self._predictor(cells, settings), device_of(self.module), []
        with torch.no_grad(), seeded([settings.seed, 1], device):
            for part in cells.cells(batch_size, device):
                weights = self.module.log_weights(part, n_samples, predictor.globals)
                result.append((torch.logsumexp(weights, 0) - np.log(n_samples)).cpu().numpy())
        return np.concatenate(result).astype(np.float64)

    # -- shapes of results ------------------------------------------------------------------------------------------

    def _changes(self, given: dict[str, Any]) -> dict[str, float]:
        """What else is exchanged in a counterfactual; models that offer such arguments override this."""
        if given:
            raise TypeError(f"{type(self).__name__}: unexpected argument {next(iter(given))!r}.")
        return {}

    def _provenance(
        self, perturbations: Sequence[Perturbation], ci: float | None, settings: Settings
    ) -> dict[str, Any]:
        """What was asked, for ``uns``."""
        return {
            "perturbation": [p.label for p in perturbations],
            "dose": [p.dose_text for p in perturbations] if tells_doses(self.vocabulary, perturbations) else None,
            "novelty": [self._discrepancy.step(p) for p in perturbations],
            "ci": ci,
            "n_samples": settings.n_samples,
            "scale": settings.scale,
            "seed": settings.seed,
            "noise": settings.noise,
            **settings.changes,
        }

    def _frame(self, cells: Query, perturbations: Sequence[Perturbation], asked: dict[str, Any]) -> AnnData:
        discrepancy = self._discrepancy
        table = np.array([[discrepancy.novelty(p, c) for c in cells.contexts] for p in perturbations], dtype=object)
        return frame(self, cells.user, cells.rows, perturbations, table[:, cells.context], asked)

    def _as_anndata(
        self, cells: Query, perturbations: Sequence[Perturbation], predicted: Predicted, asked: dict[str, Any]
    ) -> AnnData:
        return fill(self._frame(cells, perturbations, asked), predicted)

    def _to_file(
        self,
        path: Path,
        cells: Query,
        perturbations: Sequence[Perturbation],
        settings: Settings,
        ci: float | None,
        asked: dict[str, Any],
        overwrite: bool,
    ) -> None:
        """Write the predictions of some cells to a file, with a progress bar."""
        made = self._frame(cells, perturbations, asked)
        file = PredictionFile(path, made, len(cells), fingerprint(self.module, asked, made), overwrite)
        predictor = self._predictor(cells, settings)
        blocks = predict_blocks(predictor, perturbations, self._discrepancy, ci=ci, first_cell=file.done)
        n_blocks = -(-(len(cells) - file.done) // predictor.block_size)
        file.write(track(blocks, total=n_blocks, description="Predicting", style="tqdm"))

    def _chunks(
        self, cells: Query, perturbations: Sequence[Perturbation], settings: Settings, ci: float | None, chunk_size: int
    ) -> Iterator[AnnData]:
        asked = self._provenance(perturbations, ci, settings)
        waiting: list[Predicted] = []
        n_waiting = start = 0
        for part in predict_blocks(self._predictor(cells, settings), perturbations, self._discrepancy, ci=ci):
            waiting.append(part)
            n_waiting += part.n_cells
            is_last = start + n_waiting == len(cells)
            while n_waiting >= chunk_size or (is_last and n_waiting):
                joined = Predicted.concatenate(waiting)
                n = min(chunk_size, n_waiting)
                here = cells.at(cells.rows[start : start + n])
                yield self._as_anndata(here, perturbations, joined.take(slice(0, n)), asked)
                waiting, n_waiting, start = [joined.take(slice(n, None))], n_waiting - n, start + n

    def _effect_table(
        self,
        cells: Query,
        sums: EffectSums,
        perturbations: Sequence[Perturbation],
        ci: float,
        delta: float,
        scale: str,
        has_dose: bool,
    ) -> pd.DataFrame:
        return effect_table(
            sums,
            perturbations,
            contexts=cells.contexts,
            genes=self.gene_names,
            discrepancy=self._discrepancy,
            has_dose=has_dose,
            ci=ci,
            delta=delta,
            scale=scale,
        )

    def _effects_of(
        self, cells: Query, perturbations: Sequence[Perturbation], settings: Settings, ci: float, delta: float
    ) -> pd.DataFrame:
        """Effect table of some cells, in as many passes as memory asks for."""
        step = EffectSums.per_pass(settings.n_samples, len(self.gene_names), len(np.unique(cells.context)))
        tables = []
        has_dose = tells_doses(self.vocabulary, perturbations)
        for first in range(0, len(perturbations), step):
            part = perturbations[first : first + step]
            sums = sum_effects(self._predictor(cells, settings), part)
            tables.append(self._effect_table(cells, sums, part, ci, delta, settings.scale, has_dose))
        return pd.concat(tables, ignore_index=True)

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
        with restored_on_error(rna):
            rna.obs[list(annotations)] = annotations
            return super().load(dir_path, rna, *args, **kwargs)


def _setup_with(keys: tuple[SetupKey, ...]) -> Callable[..., None]:
    """``setup_anndata`` of a model that has arguments of its own, with signature and documentation."""
    shared = PerturbationModel.setup_anndata.__func__

    def setup_anndata(cls: type[PerturbationModel], adata: AnnData, **kwargs: Any) -> None:
        shared(cls, adata, **kwargs)

    signature = inspect.signature(shared)
    parameters = list(signature.parameters.values())
    own = [
        inspect.Parameter(k.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation="str | None") for k in keys
    ]
    at = next(i for i, p in enumerate(parameters) if p.name == "perturbation_features_key")
    setup_anndata.__signature__ = signature.replace(parameters=[*parameters[:at], *own, *parameters[at:]])
    lines = "".join(f"        {k.name}\n            {k.doc}\n" for k in keys)
    mark = "        perturbation_features_key\n"
    setup_anndata.__doc__ = inspect.getdoc(shared) and shared.__doc__.replace(mark, lines + mark)
    setup_anndata.__qualname__ = "PerturbationModel.setup_anndata"
    return setup_anndata
