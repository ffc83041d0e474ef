"""Models x splits x seeds -> one tidy table of scores."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from anndata import AnnData
from numpy.typing import NDArray
from scvi.utils import track

from pertura.data import Split
from pertura.metrics import Metric

from ._controls import divide_controls
from ._dataset import Dataset, resolve_splits
from ._resources import Resources
from ._results import Results
from ._score import INTERVAL, LIKELIHOOD, TRAIN, Task, ask, benchmark_metric, make_tasks, score, score_ceiling
from ._spec import Factory, ModelSpec, digest, resolve_models

logger = logging.getLogger(__name__)

DEFAULT_METRICS = (
    "pearson_effect_top",
    "r2_top",
    "mse",
    "pearson_effect",
    "interval_coverage",
    "interval_coverage_top",
)
"""What :func:`run` scores by default."""

CEILING = "ceiling"
_RUN = ("dataset", "split", "held_out", "model", "seed")


def run(
    data: AnnData | str | Dataset,
    models: Mapping[str, ModelSpec | type | Factory],
    *,
    splits: str | Split | Sequence[Split] = "unseen_context",
    seeds: int | Sequence[int] = 3,
    metrics: Sequence[str | Metric] = DEFAULT_METRICS,
    baselines: bool = True,
    perturbation_key: str | None = None,
    control: str | None = None,
    context_key: str | None = None,
    dose_key: str | None = None,
    layer: str | None = None,
    top: int = 100,
    level: float = 0.9,
    n_halves: int = 50,
    max_controls: int = 2000,
    max_asked: int | None = None,
    controls: Literal["halves", "shared"] = "halves",
    out: str | Path | None = None,
    on_error: Literal["raise", "skip"] = "raise",
    progress: bool = True,
) -> pd.DataFrame:
    """Train models on what a split leaves, predict what it holds out, and score it.

    A model gets an AnnData with the training rows of the split, less the reference controls, and nothing else. It is then
    asked for every held-out condition, starting from control cells of its context, and the mean of its predictions is compared
    with the mean of the held-out cells. The predicted effect is the mean prediction less the mean of the cells it started from; the
    true effect is against the reference controls, which no model has seen. Counts are scored as log1p of counts per 10,000.

    Parameters
    ----------
    data
        AnnData, the name of a loader in :mod:`pertura.datasets` (or ``"kang"``), or a
        :class:`~pertura.benchmark.Dataset`.
    models
        Name -> :class:`~pertura.benchmark.ModelSpec`, model class, or function ``f(adata, *, setup, seed)`` that
        returns a trained model (an object with ``predict_perturbation`` and, for interval metrics,
        ``get_perturbation_effect``); `setup` holds the arguments of ``setup_anndata``.
    splits
        Name of a question (see :func:`~pertura.benchmark.make_splits`) or splits from :mod:`pertura.data`.
        Validation rows of a split are in no model's training data.
    seeds
        Number of seeds, or the seeds. Models that do not depend on them run once.
    metrics
        Names (see :func:`pertura.metrics.list_metrics`) or metrics. Interval metrics score the `level` interval of
        the effect, with allowance for the standard error of the measured effect; they also take ``"_top"``.
        Metrics of cells get one posterior-predictive draw per control cell.
    baselines
        Add :func:`~pertura.benchmark.baselines`.
    perturbation_key, control, context_key, dose_key, layer
        See :class:`~pertura.benchmark.Dataset`; by default what ``adata.uns["dataset"]`` says.
    top
        Number of genes meant by ``"_top"``.
    level
        Level of intervals.
    n_halves
        Random halvings of the held-out cells and of the reference controls for the rows with model ``"ceiling"``: one half as
        a prediction of the other, extended to the full number of cells for correlations (Spearman-Brown) and squared errors. 0
        leaves them out.
    max_controls
        Start from a random subset of the control cells of a context that has more.
    max_asked
        Ask models for their effects (``get_perturbation_effect``) on so many of these, all perturbations at once, instead of for the
        means of predicted cells, which takes longer. The predicted effect is then that of the model's own table.
    controls
        ``"halves"``: one half of the controls of a context with held-out cells, random by context and batch from the seed of the
        split, trains and is what predictions start from; the other half is the reference. Controls that a split holds out are
        the reference as they are. Contexts with fewer than 20 controls have ``"shared"`` ones: predictions start from the
        reference, and what is predicted from the noise of these cells passes for agreement with the truth.
    out
        CSV file to write after every run; runs that are in it already are not repeated.
    on_error
        ``"skip"``: a model that raises ValueError or RuntimeError is logged and left out of that split (a model
        without perturbation features cannot answer for unseen perturbations).
    progress
        Show a progress bar.

    Returns
    -------
    One row per held-out condition, model, seed and metric: ``dataset, split`` (the question), ``held_out`` (name
    of the split), ``perturbation, dose, context, controls`` (``"halves"`` or ``"shared"``), ``model, seed, metric, value,
    n_cells`` (held-out cells of the condition), ``seconds`` (training and prediction of the run) and ``peak_mb`` (largest resident memory of the
    process during it, in MiB), ``settings`` (fingerprint of how it was made), ``versions`` of the packages.

    Raises
    ------
    ValueError
        If an argument does not fit the data, or `out` holds runs of the same name with other settings.

    See Also
    --------
    summarize : means, intervals and the gap closed.
    """
    dataset = Dataset.of(
        data,
        perturbation_key=perturbation_key,
        control=control,
        context_key=context_key,
        dose_key=dose_key,
        layer=layer,
    )
    chosen_splits = resolve_splits(dataset, splits)
    chosen = resolve_models(models, baselines)
    if CEILING in chosen:
        raise ValueError(f"`models`: the name {CEILING!r} is taken by the technical ceiling; choose another.")
    wanted = [benchmark_metric(m, top) for m in ([metrics] if isinstance(metrics, str | Metric) else metrics)]
    numbers = list(range(seeds)) if isinstance(seeds, int) else [int(s) for s in seeds]
    if not wanted or not numbers:
        raise ValueError("`metrics` and `seeds` must not be empty.")
    if on_error not in ("raise", "skip"):
        raise ValueError(f"`on_error` must be 'raise' or 'skip', got {on_error!r}.")
    results = Results(out)
    protocol = (dataset.keys, top, level, max_controls, n_halves, *([] if max_asked is None else [max_asked]))
    protocol += () if controls == "shared" else (controls,)
    plan: list[tuple[Split, str, int, str]] = []
    for split in chosen_splits:
        held = (
            split.kind,
            split.test.tobytes(),
            split.train.tobytes(),
            *([] if controls == "shared" else [split.seed]),
        )
        for name, model in chosen.items():
            stochastic = not isinstance(model, ModelSpec) or model.stochastic
            mark = digest(model, protocol, held)
            plan += [(split, name, seed, mark) for seed in (numbers if stochastic else numbers[:1])]
        if n_halves:
            plan.append((split, CEILING, numbers[0], digest(protocol, held)))
    names = [m.name for m in wanted]
    plan = [p for p in plan if not results.has(_run(dataset, *p[:3]), settings=p[3], metrics=names)]
    tasks: list[Task] = []
    train = current = None
    options = {"top": top, "level": level, "n_halves": n_halves}
    for split, name, seed, mark in track(plan, description="Benchmark", disable=not progress):
        if split is not current:
            with_reference = any("reference" in m.parameters for m in wanted)
            divided = divide_controls(dataset, split, controls, max_controls=max_controls)
            train = divided.train
            tasks = make_tasks(
                dataset,
                split,
                divided,
                with_reference=with_reference,
                with_train=any(m.name.endswith(TRAIN) for m in wanted),
                max_asked=max_asked,
            )
            current = split
        try:
            with quiet():
                table = _one(chosen.get(name), dataset, train, tasks, wanted, seed, **options)
        except (ValueError, RuntimeError) as error:
            if on_error == "raise":
                raise
            logger.warning("%s was left out of split %r (seed %d): %s", name, split.name, seed, error)
            continue
        results.add(table, _run(dataset, split, name, seed), settings=mark)
    kinds = {s.kind for s in chosen_splits}
    found = results.select(dataset=dataset.name, split=kinds, model=[*chosen, CEILING], metric=names)
    return found.astype({"n_cells": int})


def _run(dataset: Dataset, split: Split, model: str, seed: int) -> dict[str, Any]:
    return dict(zip(_RUN, (dataset.name, split.kind, split.name, model, seed), strict=True))


def _one(
    factory: Factory | None,
    dataset: Dataset,
    train: NDArray[np.intp],
    tasks: Sequence[Task],
    metrics: Sequence[Metric],
    seed: int,
    *,
    top: int,
    level: float,
    n_halves: int,
) -> pd.DataFrame:
    """One model (`None`: the ceiling), split and seed."""
    with Resources() as used:
        if factory is None:
            frames = [score_ceiling(task, metrics, top=top, n_halves=n_halves, seed=seed) for task in tasks]
        else:
            model = factory(dataset.rows(train), setup=dataset.keys, seed=seed)
            asked = {
                "level": level,
                "seed": seed,
                "options": dict(getattr(factory, "predict", {})),
                "intervals": any(m.name.startswith(INTERVAL) for m in metrics),
                "cells": any(m.needs == "cells" and m is not LIKELIHOOD for m in metrics),
                "likelihood": LIKELIHOOD in metrics,
            }
            predictions = [ask(model, task, **asked) for task in tasks]
    if factory is not None:
        frames = [score(p, task, metrics, top=top, level=level) for p, task in zip(predictions, tasks, strict=True)]
    for frame, task in zip(frames, tasks, strict=True):
        key = zip(frame["condition"], frame["context"], strict=True)
        frame["n_cells"] = [task.n_cells[k] for k in key]
        frame["controls"] = frame["context"].map(task.protocol)
        frame["dose"] = task.dose
    table = pd.concat(frames, ignore_index=True).rename(columns={"condition": "perturbation"})
    return table.assign(seconds=round(used.seconds, 3), peak_mb=round(used.peak_mb, 1))


@contextmanager
def quiet() -> Iterator[None]:
    """Without what libraries say about hardware, seeds, each other, and contexts absent from a query."""
    loggers = [logging.getLogger(n) for n in ("lightning.pytorch", "lightning.fabric", "lightning_fabric")]
    before = [log.level for log in loggers]
    with warnings.catch_warnings():
        for message in ("LeafSpec", "Sparse invariant checks", "has fewer than 3 cells"):
            warnings.filterwarnings("ignore", message=f".*{message}.*")
        try:
            for log in loggers:
                log.setLevel(logging.WARNING)
            yield
        finally:
            for log, old in zip(loggers, before, strict=True):
                log.setLevel(old)
