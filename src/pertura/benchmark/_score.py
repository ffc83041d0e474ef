"""From a trained model and a split to scores of the held-out conditions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData, concat
from numpy.typing import NDArray

from pertura.data import Split
from pertura.metrics import METRICS, Metric, evaluate, get_metric, perturbed_mean, split_half_ceiling
from pertura.metrics._arrays import top_weights
from pertura.metrics._pseudobulk import at_equal_depth, moments

from ._controls import Controls
from ._dataset import Dataset
from ._spec import Predictor

INTERVAL = ("interval_coverage", "interval_width", "interval_score")
LIKELIHOOD = Metric(
    "log_likelihood",
    None,
    True,
    "cells",
    lambda: None,
    "Importance-weighted log likelihood per held-out cell (IWELBO).",
)
# cells of a condition, and draws for each, that the likelihood is averaged over
_LIKELIHOOD_CELLS, _LIKELIHOOD_DRAWS = 50, 50
# genes with the largest effects in the training contexts, as a user would have to choose them
TRAIN = "_top_train"
_LABEL, _CONTEXT = "perturbation", "context"


def benchmark_metric(name: str | Metric, top: int) -> Metric:
    """Metric by name.

    The interval metrics take the suffix ``"_top"`` as well, those of means ``"_top_train"``: the genes with the largest effects in
    the training contexts instead of the held-out one.
    """
    if name == LIKELIHOOD.name:
        return LIKELIHOOD
    base = name.removesuffix(TRAIN) if isinstance(name, str) else ""
    if base != name and base in METRICS and METRICS[base].needs == "mean":
        return replace(METRICS[base], name=name)
    if isinstance(name, str) and name not in METRICS and name.rpartition("_top")[0] in INTERVAL:
        return replace(METRICS[name.rpartition("_top")[0]], name=name)
    metric = get_metric(name, top=top)
    if metric.needs not in ("mean", "cells") and metric.name not in INTERVAL and "predicted" not in metric.parameters:
        raise ValueError(f"`metrics`: {metric.name!r} (needs {metric.needs}) does not score held-out conditions.")
    return metric


@dataclass(frozen=True, eq=False)
class Task:
    """Held-out conditions of one split and one dose.

    Attributes
    ----------
    truth
        Held-out perturbed cells and the reference controls, on the scale of the evaluation; ``obs``: ``perturbation``,
        ``context``.
    controls
        The controls that predictions start from, as models see them.
    context
        Context of each of these.
    start
        Mean of these by context, contexts x genes, on the scale of the evaluation: what predicted effects are against.
    protocol
        By context: ``"halves"`` or ``"shared"``; see :func:`~pertura.benchmark._controls.divide_controls`.
    dose
        As text; empty without doses.
    reference
        Training cells on the scale of the evaluation, for metrics that compare with the mean perturbed profile.
    train_effect
        Mean absolute effect over the training contexts, perturbation x genes; for metrics on the genes that respond there.
    rows
        Positions of the cells of `truth` in the data set.
    asked
        Ask for effects on these of `controls`; `None`: for the means of predictions from all of them.
    """

    dataset: Dataset
    truth: AnnData
    controls: AnnData
    context: NDArray[np.str_]
    start: pd.DataFrame
    protocol: dict[str, str]
    dose: str
    reference: pd.DataFrame | None
    train_effect: pd.DataFrame | None = None
    rows: NDArray[np.intp] | None = None
    asked: NDArray[np.bool_] | None = None

    def top_in_training(self, perturbation: str, top: int) -> NDArray[np.bool_] | None:
        """Genes with the largest effects in the training contexts; `None` where it was not measured in any."""
        if self.train_effect is None or perturbation not in self.train_effect.index:
            return None
        return top_weights(self.train_effect.loc[perturbation].to_numpy(), top) > 0

    @cached_property
    def conditions(self) -> list[tuple[str, str]]:
        """Held-out (perturbation, context)."""
        held = self.truth.obs[self.truth.obs[_LABEL] != self.dataset.control]
        return sorted(set(zip(held[_LABEL], held[_CONTEXT], strict=True)))

    @cached_property
    def effects(self) -> tuple[pd.DataFrame, pd.DataFrame]:
        """Effects against the reference controls and their standard errors, (perturbation, context) x genes."""
        codes, groups = pd.MultiIndex.from_frame(self.truth.obs[[_LABEL, _CONTEXT]]).factorize()
        m = at_equal_depth(moments(self.truth.X, codes, groups), self.truth.X, codes, self.dataset.control)
        keys = pd.MultiIndex.from_tuples(self.conditions, names=[_LABEL, _CONTEXT])
        base = pd.MultiIndex.from_tuples([(self.dataset.control, c) for _, c in self.conditions])
        treated, control = m.take(keys), m.take(base)
        se = np.sqrt(treated.var / treated.n[:, None] + control.var / control.n[:, None])
        genes = self.truth.var_names
        return pd.DataFrame(treated.mean - control.mean, keys, genes), pd.DataFrame(se, keys, genes)

    @cached_property
    def n_cells(self) -> dict[tuple[str, str], int]:
        """Number of held-out cells of each condition."""
        return self.truth.obs.groupby([_LABEL, _CONTEXT], observed=True).size().to_dict()


def make_tasks(
    dataset: Dataset,
    split: Split,
    divided: Controls,
    *,
    with_reference: bool = False,
    with_train: bool = False,
    max_asked: int | None = None,
) -> list[Task]:
    """Tasks of a split, one per dose.

    Parameters
    ----------
    dataset, split
        Cells, and those that are held out.
    divided
        Controls to start from, and those to compare with.
    with_reference, with_train
        Whether to measure the mean perturbed profile and the effects in training.
    max_asked
        See :func:`~pertura.benchmark.run`.
    """
    label, context, dose = dataset.labels, dataset.contexts, dataset.doses
    held = np.zeros(len(label), dtype=bool)
    held[split.test] = True
    held &= (label != dataset.control) & np.isin(context, list(divided.asked))
    rng = np.random.default_rng(0)
    train = _labelled(dataset, divided.train) if with_reference or with_train else None
    keys = {"perturbation_key": _LABEL, "context_key": _CONTEXT, "control": dataset.control}
    about = {
        "reference": perturbed_mean(train, **keys) if with_reference else None,
        "train_effect": _train_effect(train, dataset.control) if with_train else None,
        "protocol": {name: divided.protocol(name) for name in divided.asked},
    }
    tasks = []
    for value in np.unique(dose[held]):
        own = held & (dose == value)
        there = np.unique(context[own])
        start, reference = (
            np.sort(np.concatenate([part[c] for c in there])) for part in (divided.asked, divided.reference)
        )
        rows = np.concatenate([np.flatnonzero(own), reference])
        codes, names = pd.factorize(context[start])
        tasks.append(
            Task(
                dataset=dataset,
                truth=_labelled(dataset, rows),
                controls=dataset.rows(start),
                context=context[start],
                start=pd.DataFrame(
                    moments(dataset.expression(start), codes, names).mean, names, dataset.adata.var_names
                ),
                dose=str(value),
                rows=rows,
                asked=None if max_asked is None else _some_of_each(context[start], max_asked, rng),
                **about,
            )
        )
    return tasks


def _some_of_each(groups: NDArray[np.str_], n: int, rng: np.random.Generator) -> NDArray[np.bool_]:
    order = rng.permutation(len(groups))
    rank = np.empty(len(groups), dtype=np.intp)
    rank[order] = pd.Series(groups[order]).groupby(groups[order]).cumcount().to_numpy()
    return rank < n


def _train_effect(train: AnnData, control: str) -> pd.DataFrame:
    codes, groups = pd.MultiIndex.from_frame(train.obs[[_LABEL, _CONTEXT]]).factorize()
    found = at_equal_depth(moments(train.X, codes, groups), train.X, codes, control)
    mean = pd.DataFrame(found.mean, groups, train.var_names)
    treated = mean[mean.index.get_level_values(0) != control]
    base = mean.xs(control, level=0).reindex(treated.index.get_level_values(1))
    return (treated - base.to_numpy()).abs().dropna().groupby(level=0).mean()


def _labelled(dataset: Dataset, rows: NDArray[np.intp]) -> AnnData:
    obs = pd.DataFrame({_LABEL: dataset.labels[rows], _CONTEXT: dataset.contexts[rows]})
    obs.index = dataset.adata.obs_names[rows]
    return AnnData(X=dataset.expression(rows), obs=obs, var=pd.DataFrame(index=dataset.adata.var_names))


@dataclass(frozen=True, eq=False)
class Prediction:
    """What a model said about the conditions of a task; tables (perturbation, context) x genes."""

    mean: pd.DataFrame
    low: pd.DataFrame | None
    high: pd.DataFrame | None
    cells: AnnData | None
    log_likelihood: pd.Series | None = None


def ask(
    model: Predictor,
    task: Task,
    *,
    level: float,
    seed: int,
    options: dict[str, Any],
    intervals: bool,
    cells: bool,
    likelihood: bool = False,
) -> Prediction:
    """Predict each condition from the control cells of its context."""
    dose = _one_dose(task.dose)
    asked = {"seed": seed, **options} | ({} if dose is None else {"dose": dose})
    known = _log_likelihood(model, task, seed) if likelihood and hasattr(model, "get_marginal_ll") else None
    if task.asked is not None:
        return replace(_ask_effects(model, task, level, asked, cells), log_likelihood=known)
    intervals = intervals and hasattr(model, "get_perturbation_effect")
    genes = task.truth.var_names
    mean, low, high, drawn = {}, {}, {}, []
    for perturbation, name in task.conditions:
        key = (perturbation, name)
        query = task.controls[task.context == name].copy()
        predicted = model.predict_perturbation(perturbation, adata=query, return_anndata=True, ci=None, **asked)
        mean[key] = np.asarray(predicted.to_df()[genes].mean(axis=0), dtype=np.float64)
        if intervals:
            table = model.get_perturbation_effect(perturbation, adata=query, ci=level, **asked)
            table = table.set_index("gene").loc[genes]
            low[key], high[key] = table["ci_low"].to_numpy(), table["ci_high"].to_numpy()
        if cells:
            # One draw per cell: means over draws vary less than cells do.
            draw = model.predict_perturbation(
                perturbation, adata=query, return_anndata=True, ci=None, **{**asked, "n_samples": 1}
            )
            obs = pd.DataFrame({_LABEL: perturbation, _CONTEXT: name}, index=draw.obs_names + f"-{perturbation}")
            drawn.append(AnnData(X=draw[:, genes].X.copy(), obs=obs, var=pd.DataFrame(index=genes)))
    frame = [
        pd.DataFrame(list(t.values()), pd.MultiIndex.from_tuples(t, names=[_LABEL, _CONTEXT]), genes) if t else None
        for t in (mean, low, high)
    ]
    return Prediction(*frame, concat(drawn) if drawn else None, known)


def _ask_effects(model: Any, task: Task, level: float, asked: dict[str, Any], cells: bool) -> Prediction:
    """Effects of all perturbations at once, from some control cells of each context."""
    genes = task.truth.var_names
    frames, drawn = {"lfc_mean": [], "ci_low": [], "ci_high": []}, []
    for name in dict.fromkeys(c for _, c in task.conditions):
        query = task.controls[(task.context == name) & task.asked].copy()
        names = [p for p, c in task.conditions if c == name]
        table = model.get_perturbation_effect(names, adata=query, ci=level, **asked)
        keys = pd.MultiIndex.from_product([names, [name]], names=[_LABEL, _CONTEXT])
        for column, found in frames.items():
            wide = table.pivot(index=_LABEL, columns="gene", values=column).loc[names, genes]
            found.append(pd.DataFrame(wide.to_numpy(), keys, genes))
        frames["lfc_mean"][-1] += task.start.loc[name]
        if cells:
            draw = model.predict_perturbation(
                names, adata=query, return_anndata=True, ci=None, **{**asked, "n_samples": 1}
            )
            obs = pd.DataFrame({_LABEL: draw.obs[_LABEL].astype(str).to_numpy(), _CONTEXT: name}, draw.obs_names)
            drawn.append(AnnData(draw[:, genes].X.copy(), obs, pd.DataFrame(index=genes)))
    return Prediction(*(pd.concat(f) for f in frames.values()), concat(drawn, index_unique="-") if cells else None)


def _log_likelihood(model: Any, task: Task, seed: int) -> pd.Series:
    """Mean over some held-out cells of each condition."""
    rng = np.random.default_rng(seed)
    label, context = (task.truth.obs[k].to_numpy(dtype=str) for k in (_LABEL, _CONTEXT))
    chosen = [np.flatnonzero((label == p) & (context == c)) for p, c in task.conditions]
    chosen = [rng.choice(r, min(len(r), _LIKELIHOOD_CELLS), replace=False) for r in chosen]
    cells = task.dataset.rows(task.rows[np.concatenate(chosen)])
    value = model.get_marginal_ll(cells, n_samples=_LIKELIHOOD_DRAWS, seed=seed)
    which = pd.MultiIndex.from_tuples(task.conditions).repeat([len(r) for r in chosen])
    return pd.Series(value, which).groupby(level=[0, 1]).mean()


def _one_dose(text: str) -> float | None:
    values = {float(part) for part in text.split("+")} if text else set()
    if len(values) > 1:
        raise ValueError(f"`dose_key`: members of a combination with different doses ({text}) cannot be asked yet.")
    return next(iter(values), None)


def score(prediction: Prediction, task: Task, metrics: Sequence[Metric], *, top: int, level: float) -> pd.DataFrame:
    """Scores as ``condition, context, metric, value``; NaN where the model gives no interval."""
    keys = {"perturbation_key": _LABEL, "control": task.dataset.control, "context_key": _CONTEXT}
    frames = []
    for needs_cells in (False, True):
        own = [m for m in metrics if not _is_special(m) and (m.needs == "cells") == needs_cells]
        if own:
            predicted = prediction.cells if needs_cells else _with_start(prediction.mean, task)
            frames.append(evaluate(predicted, task.truth, **keys, metrics=own, top=top, reference=task.reference))
    frames += _score_train(prediction, task, [m for m in metrics if m.name.endswith(TRAIN)], top, keys)
    own = [m for m in metrics if _is_interval(m)]
    if own:
        frames.append(_score_intervals(prediction, task, own, top, level))
    if LIKELIHOOD in metrics:
        keys = pd.MultiIndex.from_tuples(task.conditions)
        known = prediction.log_likelihood
        value = np.full(len(keys), np.nan) if known is None else known.reindex(keys).to_numpy()
        lines = {"condition": keys.get_level_values(0), "context": keys.get_level_values(1)}
        frames.append(pd.DataFrame({**lines, "metric": LIKELIHOOD.name, "value": value}))
    return pd.concat(frames, ignore_index=True)


def _with_start(predicted: pd.DataFrame, task: Task) -> pd.DataFrame:
    """Predicted means and, as those of controls, the means of the cells that they started from."""
    keys = pd.MultiIndex.from_product([[task.dataset.control], task.start.index], names=predicted.index.names)
    return pd.concat([predicted, task.start.set_axis(keys)])


def _is_interval(metric: Metric) -> bool:
    return metric.name in INTERVAL or metric.name.rpartition("_top")[0] in INTERVAL


def _is_special(metric: Metric) -> bool:
    return _is_interval(metric) or metric.name.endswith(TRAIN) or metric is LIKELIHOOD


def _score_train(
    prediction: Prediction, task: Task, metrics: Sequence[Metric], top: int, keys: dict[str, str]
) -> list[pd.DataFrame]:
    """Scores on the genes that respond in the training contexts."""
    frames = []
    for perturbation, context in task.conditions if metrics else []:
        genes = task.top_in_training(perturbation, top)
        if genes is None:
            frames.append(
                pd.DataFrame(
                    {
                        "condition": perturbation,
                        "context": context,
                        "metric": [m.name for m in metrics],
                        "value": np.nan,
                    }
                )
            )
            continue
        obs = task.truth.obs
        rows = (obs[_CONTEXT] == context) & obs[_LABEL].isin([perturbation, task.dataset.control])
        truth = task.truth[rows.to_numpy(), genes].copy()
        predicted = _with_start(prediction.mean.loc[[(perturbation, context)]], task)[truth.var_names]
        frames.append(evaluate(predicted, truth, **keys, metrics=metrics, top=top, reference=None))
    return frames


def _score_intervals(
    prediction: Prediction, task: Task, metrics: Sequence[Metric], top: int, level: float
) -> pd.DataFrame:
    """Intervals of effects against measured effects, allowing for the standard error of these."""
    effect, se = task.effects
    rows = []
    for key in task.conditions:
        truth, error = effect.loc[key].to_numpy(), se.loc[key].to_numpy()
        for metric in metrics:
            value = np.nan
            if prediction.low is not None and np.isfinite(error).all():
                suffix = metric.name.rpartition("_top")[2] if "_top" in metric.name else None
                genes = np.ones(len(truth), dtype=bool)
                if suffix is not None:
                    genes = top_weights(np.abs(truth), int(suffix) if suffix else top) > 0
                given = {"truth": truth[genes], "truth_se": error[genes], "level": level}
                low, high = (
                    prediction.low.loc[key].to_numpy()[genes],
                    prediction.high.loc[key].to_numpy()[genes],
                )
                value = metric(low, high, **{k: v for k, v in given.items() if k in metric.parameters})
            rows.append({"condition": key[0], "context": key[1], "metric": metric.name, "value": value})
    return pd.DataFrame(rows)


def score_ceiling(task: Task, metrics: Sequence[Metric], *, top: int, n_halves: int, seed: int) -> pd.DataFrame:
    """Split-half scores of the held-out cells; NaN for metrics and conditions that have none.

    The held-out cells and their reference controls are halved, and correlations and squared errors are extended to the full
    number of cells (Spearman-Brown). Where controls are shared, both halves are compared with all of them, and nothing is
    extended.
    """
    own = [m for m in metrics if m.needs == "mean" and "reference" not in m.required]
    label, context = (task.truth.obs[k].to_numpy(dtype=str) for k in (_LABEL, _CONTEXT))
    rows = []
    for perturbation, name in task.conditions:
        treated = task.truth.X[np.flatnonzero((label == perturbation) & (context == name))]
        control = task.truth.X[np.flatnonzero((label == task.dataset.control) & (context == name))]
        shared = task.protocol[name] == "shared"
        values: dict[str, float] = {}
        genes = task.top_in_training(perturbation, top)
        for special in (False, True):
            chosen = [m for m in own if m.name.endswith(TRAIN) == special]
            if not chosen or treated.shape[0] < 4 or (special and genes is None):
                continue
            at = np.flatnonzero(genes if special else np.ones(treated.shape[1], dtype=bool))
            base = np.asarray(control.mean(axis=0)).ravel()[at] if shared else control[:, at]
            given = {"n_splits": n_halves, "seed": seed}
            for full in (False, True):
                extended = [m for m in chosen if (m.duplicate is not None and not shared) == full]
                if extended:
                    halves = split_half_ceiling(treated[:, at], base, extended, spearman_brown=full, **given)
                    values |= halves.mean().to_dict()
        rows += [
            {
                "condition": perturbation,
                "context": name,
                "metric": m.name,
                "value": values.get(m.name, np.nan),
            }
            for m in metrics
        ]
    return pd.DataFrame(rows)
