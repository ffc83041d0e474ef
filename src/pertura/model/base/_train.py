"""Training, as in scvi-tools but for what its Pyro path leaves out."""

from __future__ import annotations

import inspect
import warnings
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from anndata import AnnData
from numpy.typing import NDArray
from scvi import settings
from scvi.data import AnnDataManager
from scvi.train import TrainRunner

from pertura.data._constants import UNKNOWN
from pertura.data._datamodule import PerturbationDataModule
from pertura.module._base import PerturbationModule
from pertura.train._plan import PyroPlan

from ._arguments import check_flag, check_whole
from ._calibration import calibrate
from ._engine import seeded
from ._query import QueryMixin

if TYPE_CHECKING:
    from ._base import PerturbationModel

Rows = NDArray[np.int64]


class TrainingMixin(QueryMixin):
    """``train``, and what a model may say about it."""

    module: PerturbationModule
    adata: AnnData | None
    adata_manager: AnnDataManager | None
    calibration_: dict[str, Any] | None
    is_trained_: bool
    _training_plan_cls: ClassVar[type] = PyroPlan

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
            Fractions of the cells. By default all cells train, or 90 % where `early_stopping` or
            ``check_val_every_n_epoch`` needs the rest.
        batch_size
            Cells per minibatch.
        early_stopping
            Stop when the ELBO of validation cells no longer improves; see :class:`scvi.train.Trainer` for its patience.
        lr
            Learning rate; short for ``plan_kwargs={"lr": lr}``.
        seed
            Of the split, the order of cells and the draws; by default ``scvi.settings.seed``, else 0. Parameters are
            initialised when the model is made: set ``scvi.settings.seed`` before that for a run that repeats.
        datasplitter_kwargs
            ``{"external_indexing": [train, validation, test]}`` imposes a split by row numbers.
        plan_kwargs
            Arguments of :class:`~pertura.train.PyroPlan`.
        **trainer_kwargs
            Arguments of :class:`scvi.train.Trainer`, such as ``gradient_clip_val`` or ``early_stopping_patience``.

        Raises
        ------
        ValueError
            For wrong arguments, before anything is trained.
        FloatingPointError
            When the loss is no longer finite.
        """
        if self.adata is None:
            raise ValueError("`adata`: the model was loaded without data. Load it with `adata=` to train it.")
        if max_epochs is not None:
            check_whole("max_epochs", max_epochs)
        if batch_size is not None:
            check_whole("batch_size", batch_size)
        check_flag("early_stopping", early_stopping)
        plan_kwargs = self._plan_arguments(plan_kwargs, lr)
        seed = self._seed(seed)
        validates = early_stopping or trainer_kwargs.get("check_val_every_n_epoch") is not None
        train_idx, val_idx = self._split(train_size, validation_size, validates, seed, datasplitter_kwargs)
        if early_stopping and not len(val_idx):
            raise ValueError("`early_stopping` needs validation cells: set `train_size` below 1.")
        self.adata_manager.validate()
        unknown = (self._actions(self.adata_manager, train_idx)[0] == UNKNOWN).any(1)
        if unknown.any():
            raise ValueError(
                f"`adata`: {int(unknown.sum())} training cells carry perturbations that the model does not know. "
                "Make a new model of these data."
            )
        batch_size = batch_size or self._default_batch_size(len(train_idx))
        data = self._data_module(train_idx, val_idx, batch_size, seed)
        trainer_kwargs = {**self._trainer_defaults(), **trainer_kwargs}
        # a plan that moves its optimisers itself clips gradients itself
        for name in ("gradient_clip_val", "gradient_clip_algorithm"):
            if name in trainer_kwargs and name in inspect.signature(self._training_plan_cls.__init__).parameters:
                plan_kwargs[name] = trainer_kwargs.pop(name)
        # the samplers give each process its share themselves
        trainer_kwargs.setdefault("use_distributed_sampler", False)
        if len(val_idx):
            trainer_kwargs.setdefault("check_val_every_n_epoch", 1)
        if "callbacks" in trainer_kwargs:  # the trainer would append to the caller's own list
            trainer_kwargs["callbacks"] = list(trainer_kwargs["callbacks"])
        if max_epochs is None:
            max_epochs = self._default_max_epochs(len(data.train_dataloader()))
        runner = TrainRunner(
            self,
            training_plan=self._training_plan_cls(self.module, **plan_kwargs),
            data_splitter=data,
            max_epochs=int(max_epochs),
            accelerator=accelerator,
            devices=devices,
            early_stopping=early_stopping,
            **trainer_kwargs,
        )
        with warnings.catch_warnings(), seeded(seed, runner.device):
            # one process on few cores: more loader workers would not help
            warnings.filterwarnings("ignore", message=".*does not have many workers.*")
            warnings.filterwarnings("ignore", message=".*The number of training batches.*")
            self._initialise(data)
            self.module.train()  # after an earlier training or loading it is in evaluation mode, and Lightning leaves it
            runner()
        self._after_training(train_idx)

    def _plan_arguments(self, given: Any, lr: Any) -> dict[str, Any]:
        known = inspect.signature(self._training_plan_cls.__init__).parameters
        if given is not None and not isinstance(given, dict):
            raise ValueError(
                f"`plan_kwargs` must be a dictionary of arguments of {self._training_plan_cls.__name__}, got {given!r}."
            )
        given = dict(given or {})
        if lr is not None:
            given["lr"] = lr
        wrong = sorted(set(given) - set(known))
        if wrong and not any(p.kind is p.VAR_KEYWORD for p in known.values()):
            allowed = ", ".join(n for n in known if n not in ("self", "module"))
            raise ValueError(
                f"`plan_kwargs`: {wrong[0]!r} is not an argument of {self._training_plan_cls.__name__} ({allowed})."
            )
        rate = given.get("lr", 1.0)
        if isinstance(rate, bool) or not isinstance(rate, (int, float, np.number)) or not 0 < rate < np.inf:
            raise ValueError(f"`lr` must be a positive number, got {rate!r}.")
        return {**self._plan_defaults(), **given}

    def _split(
        self,
        train_size: float | None,
        validation_size: float | None,
        validates: bool,
        seed: int,
        datasplitter_kwargs: dict[str, Any] | None,
    ) -> tuple[Rows, Rows]:
        n = self.adata.n_obs
        if datasplitter_kwargs is not None and not isinstance(datasplitter_kwargs, dict):
            raise ValueError(f"`datasplitter_kwargs` must be a dictionary, got {datasplitter_kwargs!r}.")
        own = dict(datasplitter_kwargs or {})
        indexing = own.pop("external_indexing", None)
        if own:
            raise ValueError(f"`datasplitter_kwargs` takes 'external_indexing', got {', '.join(map(repr, own))}.")
        if indexing is not None:
            return _external(indexing, n)
        for name, size in (("train_size", train_size), ("validation_size", validation_size)):
            if size is not None and (isinstance(size, bool) or not isinstance(size, (int, float, np.number))):
                raise ValueError(f"`{name}` must be a fraction of the cells, got {size!r}.")
        if validation_size is not None and not 0 <= validation_size < 1:
            raise ValueError(f"`validation_size` must be at least 0 and below 1, got {validation_size}.")
        if train_size is None:
            train_size = 0.9 if validates else 1.0
            train_size = train_size if validation_size is None else 1.0 - validation_size
        if not 0 < train_size <= 1:
            raise ValueError(f"`train_size` must be above 0 and at most 1, got {train_size}.")
        if validation_size is None:
            validation_size = 1.0 - train_size
        if validation_size > 1 - train_size + 1e-9:
            raise ValueError(
                f"`validation_size` must be at most 1 - train_size = {1 - train_size:g}, got {validation_size}."
            )
        order = np.random.default_rng(seed).permutation(n)
        n_train, n_val = max(1, round(train_size * n)), round(validation_size * n)
        return np.sort(order[:n_train]), np.sort(order[n_train : n_train + n_val])

    # -- what a model may say ---------------------------------------------------------------------------------------

    def _data_module(self, train_idx: Rows, val_idx: Rows, batch_size: int, seed: int) -> PerturbationDataModule:
        """Plain minibatches; models that compare pairs override this."""
        return PerturbationDataModule(self.adata_manager, train_idx, val_idx, batch_size=batch_size, seed=seed)

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

    def _after_training(self: PerturbationModel, train_idx: Rows) -> None:
        """Measure how far effects are from the training data, for honest intervals."""
        self.module.eval()
        self.calibration_ = calibrate(self, train_idx)


def _external(indexing: Any, n: int) -> tuple[Rows, Rows]:
    """Rows of an imposed split."""
    message = (
        "`datasplitter_kwargs['external_indexing']` must be [train, validation, test] with row numbers below "
        f"{n} that do not overlap, and train must not be empty."
    )
    if not isinstance(indexing, (list, tuple)) or not 1 <= len(indexing) <= 3:
        raise ValueError(message)
    parts = [np.zeros(0, np.int64) if part is None else np.asarray(part) for part in indexing]
    if any(part.ndim != 1 or (part.size and not np.issubdtype(part.dtype, np.integer)) for part in parts):
        raise ValueError(message)
    rows = np.concatenate(parts).astype(np.int64)
    if not len(parts[0]) or len(np.unique(rows)) < len(rows) or rows.min() < 0 or rows.max() >= n:
        raise ValueError(message)
    parts = [np.sort(part.astype(np.int64)) for part in parts]
    return parts[0], parts[1] if len(parts) > 1 else rows[:0]
