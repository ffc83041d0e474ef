"""Training, as in scvi-tools but for what its Pyro path leaves out."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Sequence
from functools import partial, wraps
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch
from lightning.pytorch.callbacks import ProgressBar
from numpy.typing import NDArray
from scvi import settings
from scvi.dataloaders._data_splitting import validate_data_split
from scvi.model.base import BaseModelClass

from pertura.data._constants import KEYS, UNKNOWN
from pertura.data._datamodule import PerturbationDataModule
from pertura.data._perturbation import Perturbation
from pertura.effects import ConditionTable, calibrate, fit_curvature
from pertura.effects._table import Moments
from pertura.module._base import PerturbationModule
from pertura.train._best import KeepBest
from pertura.train._plan import PyroPlan
from pertura.train._progress import EpochProgress, Progress
from pertura.train._trainer import TrainRunner, quiet

from ._arguments import check_flag, check_number, check_whole, resolve_seed
from ._options import Options, TrainingOptions
from ._predict import Settings, mean_effects, seeded
from ._query import Query
from ._validation import PredictionError, some_controls

Rows = NDArray[np.int64]
_MAX_CONTROLS = 200
# of a default training that lasts for the number of epochs: a million cells take minutes to hours, not days
_MAX_STEPS = 30_000


class TrainableModel(BaseModelClass):
    """A model of scvi-tools with pertura's ``train``, and what a model may say about it.

    While it trains, ``self._progress`` is the bar that the user sees. Methods that read or measure much name what they do there.
    """

    module: PerturbationModule
    options: Options
    calibration_: dict[str, Any] | None
    _training_plan_cls: ClassVar[type] = PyroPlan
    _progress: Progress = Progress()
    # whether predictions can be made before `_complete`
    _predicts_in_training: ClassVar[bool] = True
    # what is measured beside the shared table; see `ConditionTable.measure`
    _table_options: ClassVar[dict[str, Any]] = {}

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

        A bar shows everything from the first read to the last measured effect (``enable_progress_bar=False`` hides it). Ctrl-C, or
        "interrupt" in a notebook, stops after the current step: the model keeps what it has learned, measures its effects and can
        be used. A second one skips the measuring. Training a trained model goes on from its parameters, at the weight of the
        divergences and the temperatures that it had reached, with a new optimizer and learning rate schedule.

        Lightning's messages on devices and loaders are shown where ``scvi.settings.verbosity`` is `logging.DEBUG`.

        Parameters
        ----------
        max_epochs
            Passes over the data. By default as many as give the model's ``n_steps`` steps and ``n_epochs`` epochs, both; for the
            sake of epochs alone no more than 30,000 steps are taken. A step is one of all processes together.
        accelerator, devices
            As in :class:`lightning.pytorch.trainer.trainer.Trainer`.
        train_size, validation_size
            Fractions of the cells. By default all cells train, or 90 % where `early_stopping` or
            ``check_val_every_n_epoch`` needs the rest.
        batch_size
            Cells per minibatch, of each process. With ``devices=2, strategy="ddp_find_unused_parameters_true"`` two processes train on a
            share of the minibatches each, as one would with twice the cells in each.
        early_stopping
            Stop when validation cells are no longer predicted better, and go back to the best epoch. What is monitored is
            ``prediction_validation``: the squared error of predicted effects on the held-out controls of each context
            against the held-out treated cells. Models that predict only when training has ended, and data without treated
            validation cells, have ``elbo_validation`` in its place. ``early_stopping_monitor="elbo_validation"`` chooses it, and
            ``early_stopping_patience`` sets the number of epochs without an improvement; see :class:`scvi.train.Trainer`.
            Both are in ``history``.
        lr
            Learning rate; short for ``plan_kwargs={"lr": lr}``.
        seed
            Seed of the split, the order of cells and the draws; by default ``scvi.settings.seed``, else 0. Parameters are
            initialized when the model is made: set ``scvi.settings.seed`` before that for a run that repeats.
        datasplitter_kwargs
            ``{"external_indexing": [train, validation, test]}`` imposes a split by row numbers.
        plan_kwargs
            Arguments of :class:`~pertura.train.PyroPlan`.
        **trainer_kwargs
            Arguments of :class:`scvi.train.Trainer`, such as ``gradient_clip_val`` or ``early_stopping_patience``. With
            ``simple_progress_bar=False``, or a progress bar among ``callbacks``, that bar replaces pertura's.

        Raises
        ------
        ValueError
            For wrong arguments, before anything is trained.
        FloatingPointError
            When the loss is no longer finite.
        KeyboardInterrupt
            When the user stops it before the first step, or while effects are measured.

        Warns
        -----
        UserWarning
            When the user stops it, with the number of epochs that were trained.
        """
        if self.adata is None:
            raise ValueError("`adata`: the model was loaded without data. Load it with `adata=` to train it.")
        if max_epochs is not None:
            check_whole("max_epochs", max_epochs)
        if batch_size is not None:
            check_whole("batch_size", batch_size)
        check_flag("early_stopping", early_stopping)
        if self.registered.are_effects:  # what is learned from them is in closed form
            self._fit_in_closed_form(train_size, validation_size, seed, datasplitter_kwargs, trainer_kwargs)
            return
        plan_kwargs = self._plan_arguments(plan_kwargs, lr)
        seed = resolve_seed(seed)
        validates = early_stopping or trainer_kwargs.get("check_val_every_n_epoch") is not None
        train_idx, val_idx = self._split(train_size, validation_size, validates, seed, datasplitter_kwargs)
        if early_stopping and not len(val_idx):
            raise ValueError("`early_stopping` needs validation cells: set `train_size` below 1.")
        trainer_kwargs = {**self._trainer_defaults(), **trainer_kwargs}
        # a copy: the trainer would append to the caller's own list
        callbacks = list(trainer_kwargs.pop("callbacks", None) or [])
        wanted = trainer_kwargs.get("enable_progress_bar", True)
        wanted = wanted and trainer_kwargs.get("progress_bar_refresh_rate", 1) != 0
        another = not trainer_kwargs.get("simple_progress_bar", True)
        another = another or any(isinstance(callback, ProgressBar) for callback in callbacks)
        shown = bool(wanted) and not another
        if wanted:  # scvi-tools' own would be a second one
            trainer_kwargs["simple_progress_bar"] = False
        try:
            with Progress(shown) as self._progress:
                if shown:
                    callbacks.append(EpochProgress(self._progress))
                self._progress.part("prepare")
                self._progress.stage("Reading data")
                self._check_trainable(train_idx)
                batch_size = batch_size or self._default_batch_size(len(train_idx))
                data = self._data_module(train_idx, val_idx, batch_size, seed)
                error = self._prediction_error(data)
                if early_stopping:
                    trainer_kwargs.setdefault(
                        "early_stopping_monitor", "elbo_validation" if error is None else "prediction_validation"
                    )
                    callbacks.append(
                        KeepBest(
                            trainer_kwargs["early_stopping_monitor"], trainer_kwargs.get("early_stopping_mode", "min")
                        )
                    )
                runner = self._runner(
                    data,
                    plan_kwargs,
                    max_epochs,
                    accelerator=accelerator,
                    devices=devices,
                    early_stopping=early_stopping,
                    callbacks=callbacks,
                    **trainer_kwargs,
                )
                runner.training_plan.prediction_error = error
                table = self._measure(train_idx, data)
                self._run(runner, data, table, seed)
                self._finish(runner, train_idx, table)
        finally:
            self.__dict__.pop("_progress", None)

    @wraps(BaseModelClass.save)
    def save(self, *args: Any, **kwargs: Any) -> None:
        """Save the model; of several processes, the first one writes, and the others wait for it."""
        together = torch.distributed.is_available() and torch.distributed.is_initialized()
        if not together or torch.distributed.get_rank() == 0:
            super().save(*args, **kwargs)
        if together:
            torch.distributed.barrier()

    def _fit_in_closed_form(
        self,
        train_size: float | None,
        validation_size: float | None,
        seed: int | None,
        datasplitter_kwargs: dict[str, Any] | None,
        trainer_kwargs: dict[str, Any],
    ) -> None:
        """Measure the conditions, and let the module take them over."""
        seed = resolve_seed(seed)
        train_idx, val_idx = self._split(train_size, validation_size, False, seed, datasplitter_kwargs)
        self._check_trainable(train_idx)
        try:
            with Progress(bool(trainer_kwargs.get("enable_progress_bar", True))) as self._progress:
                self._progress.stage("Measuring effects")
                data = PerturbationDataModule(
                    self.adata_manager, train_idx, val_idx, batch_size=settings.batch_size, seed=seed
                )
                table = self._measure(train_idx, data)
                self._initialize(data, table)
                self.module.n_train = len(train_idx)
                self.train_indices, self.validation_indices, self.test_indices = train_idx, val_idx, data.test_idx
                self.history_ = {}
                self.is_trained_ = True
                self._after_training(train_idx, table)
        finally:
            self.__dict__.pop("_progress", None)

    def _check_trainable(self, train_idx: Rows) -> None:
        """Raise unless the model knows what was done to its training cells."""
        self.adata_manager.validate()
        unknown = (self._registered_cells(train_idx).actions[0] == UNKNOWN).any(1)
        if unknown.any():
            raise ValueError(
                f"`adata`: {int(unknown.sum())} training cells carry perturbations that the model does not know. "
                "Make a new model of these data."
            )

    def _runner(
        self,
        data: PerturbationDataModule,
        plan_kwargs: dict[str, Any],
        max_epochs: int | None,
        **trainer_kwargs: Any,
    ) -> TrainRunner:
        """Plan and trainer."""
        # a plan that moves its optimizers itself clips gradients itself
        for name in ("gradient_clip_val", "gradient_clip_algorithm"):
            if name in trainer_kwargs and name in inspect.signature(self._training_plan_cls.__init__).parameters:
                plan_kwargs[name] = trainer_kwargs.pop(name)
        # the samplers give each process its share themselves
        trainer_kwargs.setdefault("use_distributed_sampler", False)
        if data.n_val:
            trainer_kwargs.setdefault("check_val_every_n_epoch", 1)
        if self.is_trained_:
            plan_kwargs.setdefault(
                "min_kl_weight", min(self._reached("kl_weight"), plan_kwargs.get("max_kl_weight", 1.0))
            )
        plan = self._training_plan_cls(self.module, **plan_kwargs)
        if self.is_trained_:
            plan.annealed = self._reached("annealing")
        with quiet():
            runner = TrainRunner(
                self, training_plan=plan, data_splitter=data, max_epochs=int(max_epochs or 1), **trainer_kwargs
            )
        if max_epochs is None:  # processes share the minibatches of an epoch
            n_steps = max(1, len(data.train_dataloader()) // runner.trainer.world_size)
            runner.trainer.fit_loop.max_epochs = self._default_max_epochs(n_steps)
        return runner

    def _reached(self, name: str) -> float:
        """Where earlier training ended: what it logged last, or the end of the schedule where it logged nothing."""
        history = self.history_ if isinstance(self.history_, dict) else {}
        return float(history[name].iloc[-1, 0]) if name in history else 1.0

    def _run(self, runner: TrainRunner, data: PerturbationDataModule, table: ConditionTable, seed: int) -> None:
        """All epochs, or those until the user stops them."""
        before = dict(self.history_) if isinstance(self.history_, dict) else {}  # scvi-tools changes it in place
        with quiet(), seeded(seed, runner.device):
            self._initialize(data, table)
            self.module.train()  # after an earlier training or loading it is in evaluation mode, and Lightning leaves it
            try:
                runner()
            finally:
                own = getattr(runner.trainer.logger, "history", None)
                if isinstance(own, dict) and runner.trainer.is_global_zero:
                    self.history_ = _joined(before, own)

    def _finish(self, runner: TrainRunner, train_idx: Rows, table: ConditionTable) -> None:
        """What follows the last step, after a stop by the user as well."""
        trainer, progress = runner.trainer, self._progress
        epochs = f"{round(trainer.n_epochs, 1):g}"
        progress.ends_with(f"Trained {epochs} epochs")
        if trainer.interrupted:
            left = max(1, round(trainer.max_epochs - trainer.n_epochs))
            progress.ends_with(f"Stopped after {epochs} of {trainer.max_epochs} epochs")
            with progress.aside():
                warnings.warn(
                    f"Training was stopped after {epochs} of {trainer.max_epochs} epochs. The model keeps what it has learned "
                    "and now measures its effects (another Ctrl-C skips that). "
                    f"`train(max_epochs={left})` goes on from here.",
                    stacklevel=settings.warnings_stacklevel + 1,
                )
        progress.part("finish")
        progress.stage("Measuring effects")
        try:
            self._after_training(train_idx, table)
        except KeyboardInterrupt:
            warnings.warn(
                "The effects of the trained model were not measured: its predictions lack what is measured, and their "
                "intervals are too narrow. `train(max_epochs=1)` measures them.",
                stacklevel=settings.warnings_stacklevel + 1,
            )
            raise

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
        if train_size is not None:
            check_number("train_size", train_size, above=0)
        if validation_size is not None:
            check_number("validation_size", validation_size, least=0, below=1)
        share = train_size
        if share is None:
            share = 1.0 - (validation_size if validation_size is not None else 0.1 if validates else 0.0)
            validation_size = None  # the rest
        try:
            n_train, n_val = validate_data_split(n, share, validation_size)
        except ValueError as error:
            raise ValueError(f"`train_size` is {share:g}, `validation_size` {validation_size}: {error}.") from error
        order = np.random.default_rng(seed).permutation(n)
        return np.sort(order[:n_train]), np.sort(order[n_train : n_train + n_val])

    # -- what a model may say ---------------------------------------------------------------------------------------

    def _data_module(self, train_idx: Rows, val_idx: Rows, batch_size: int, seed: int) -> PerturbationDataModule:
        """Plain minibatches; models that compare pairs override this."""
        return PerturbationDataModule(self.adata_manager, train_idx, val_idx, batch_size=batch_size, seed=seed)

    def _measure(self, train_idx: Rows, data: PerturbationDataModule) -> ConditionTable:
        """Means of all training conditions, in one pass over the training cells."""
        return ConditionTable.measure(
            self.adata_manager,
            train_idx,
            max_dose=np.asarray(self.vocabulary.max_dose, dtype=np.float64),
            n_contexts=len(self.contexts),
            dataset=data.dataset,
            **self._table_options,
        )

    def _initialize(self, data: PerturbationDataModule, table: ConditionTable) -> None:
        """Set what the module takes from the data before training."""

    def _standardize(self, data: PerturbationDataModule, table: ConditionTable) -> None:
        """Standardization of an encoder's input, and where the decoder and the dose response start."""
        module, moments = self.module, table.normalized
        if self.registered.is_counts and not module.normalize_input:
            moments = _moments_of_log_counts(data)
        parts = (moments.mean, np.sqrt(moments.variance), table.raw.mean, np.sqrt(table.raw.variance))
        module.standardize(*(torch.as_tensor(part, dtype=torch.float32) for part in parts), library=table.library)
        kappa = fit_curvature(table, np.asarray(self.vocabulary.max_dose, dtype=np.float64))
        for name, parameter in module.named_parameters():
            if kappa is not None and name.endswith("log_kappa"):
                # a curvature moves little in training: it starts where doses were measured to be
                parameter.data[: len(kappa)] = torch.as_tensor(kappa + np.log(-np.expm1(-kappa)))

    def _complete(self, table: ConditionTable) -> None:
        """Set what the module takes from the data once it is trained."""

    def _plan_defaults(self) -> dict[str, Any]:
        options = self.options
        if not isinstance(options, TrainingOptions):
            return {}
        return {
            "lr": options.lr,
            "weight_decay": 1e-6,
            "n_epochs_kl_warmup": options.kl_warmup or None,
            "lr_schedule": options.lr_schedule,
        }

    def _trainer_defaults(self) -> dict[str, Any]:
        return {"gradient_clip_val": 100.0} if isinstance(self.options, TrainingOptions) else {}

    def _default_batch_size(self, n_cells: int) -> int:
        return settings.batch_size

    def _default_max_epochs(self, n_batches: int) -> int:
        return default_epochs(n_batches, self.options.n_steps, self.options.n_epochs)

    def _after_training(self, train_idx: Rows, table: ConditionTable) -> None:
        """Complete the module, and measure how far its effects are from those of the training data."""
        self.module.eval()
        self._complete(table)
        cells, rng = self._registered_cells(train_idx), np.random.default_rng(0)
        n_controls = 1 if self.registered.are_effects else _MAX_CONTROLS  # that of effects is 0

        def predict(context: int, perturbations: Sequence[Perturbation]) -> NDArray[np.float64]:
            rows = some_controls(cells, context, n_controls, rng)
            return self._effects_on(rows, perturbations, n_samples=4)

        # an effect has `n_latent` free coordinates for `n_genes` genes: as projections do, the model took up that share of
        # the noise of the measured effects
        share = 0.0 if self._draws_effects else min(1.0, self.module.n_latent / len(self.gene_names))
        self.calibration_ = calibrate(
            table,
            predict,
            self.registered.vocabulary,
            self.contexts,
            scale=self.registered.default_scale,
            # bulk: replicates are few, and a profile is a mean already
            min_cells=10 if self.registered.is_counts else 1 if self.registered.are_effects else 2,
            noise_share=share,
        )

    def _prediction_error(self, data: PerturbationDataModule) -> PredictionError | None:
        """What measures predictions of validation cells; `None` where there are none."""
        if not data.n_val or not self._predicts_in_training:
            return None
        cells = self._registered_cells(np.sort(np.concatenate([data.train_idx, data.val_idx])))
        cells = cells.at(cells.rows[~(cells.actions[0] == UNKNOWN).any(1)])
        measure = partial(
            ConditionTable.measure, self.adata_manager, dataset=data.dataset, n_contexts=len(self.contexts)
        )
        error = PredictionError(
            cells, np.isin(cells.rows, data.val_idx), self.registered.vocabulary, measure, self._effects_on
        )
        return error if len(error) else None

    def _effects_on(
        self, controls: Query, perturbations: Sequence[Perturbation], n_samples: int
    ) -> NDArray[np.float64]:
        """Mean effects on some control cells, on the default scale, ``(n_perturbations, n_genes)``."""
        settings = Settings(n_samples, self.registered.default_scale, 0)
        return mean_effects(self._predictor(controls, settings), perturbations)

    def _registered_cells(self, rows: Rows) -> Query:
        """Some of the model's own cells."""
        return Query(self.registered, self.adata_manager, self.adata, rows)


def default_epochs(n_batches: int, n_steps: int, n_epochs: int) -> int:
    """Epochs of so many steps, and no fewer than `n_epochs` while these do not take more than 30,000 steps."""
    return max(1, round(max(n_steps, min(n_epochs * n_batches, _MAX_STEPS)) / n_batches))


def _moments_of_log_counts(data: PerturbationDataModule) -> Moments:
    """Mean and variance over training cells of log1p of counts."""
    total = square = 0.0
    for tensors in data.iterate(data.train_idx):
        x = tensors[KEYS.X].double().log1p()
        total, square = total + x.sum(0).numpy(), square + x.square().sum(0).numpy()
    mean = total / data.n_train
    return Moments(mean, np.maximum(square / data.n_train - mean**2, 0.0))


def _joined(before: dict[str, pd.DataFrame], now: dict[str, pd.DataFrame]) -> dict[str, pd.DataFrame]:
    """History of all training, epochs numbered on. scvi-tools drops what only the later training logged."""
    n_before = max((int(values.index.max()) + 1 for values in before.values() if len(values)), default=0)
    later = {name: values.set_axis(values.index + n_before) for name, values in now.items()}
    joined = {
        name: pd.concat([part[name] for part in (before, later) if name in part])
        for name in dict.fromkeys([*before, *later])
    }
    return {name: values.rename_axis(index="epoch") for name, values in joined.items()}


def _external(indexing: Any, n: int) -> tuple[Rows, Rows]:
    """Rows of an imposed split, of which some cells may be no part; scvi-tools' own check refuses that."""
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
