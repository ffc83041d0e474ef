"""Held-out compounds in screens of bulk expression: DrugAAE beside the mean effect, ridge and nearest neighbour."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from numpy.typing import NDArray

from pertura.nn._ridge import correlations

logger = logging.getLogger(__name__)

CONTROL = "control"
_PENALTIES = np.logspace(-2.0, 2.0, 9)
#: Signatures of the same compound, (dose level, hours), that may describe it when High at 24 hours is asked.
DESCRIPTIONS: dict[str, tuple[tuple[str, float], ...] | None] = {
    "text": None,
    "8h High": (("High", 8.0),),
    "8h High + 24h Middle": (("High", 8.0), ("Middle", 24.0)),
}


@dataclass
class Screen:
    """Profiles whose controls are matched, and what describes the compounds.

    Attributes
    ----------
    adata
        Profiles to train on and to predict, ``obs["perturbation"]``.
    effect
        Measured effects, compounds x genes.
    reproducible
        Correlation of a compound's replicates, NaN where it has one.
    signatures
        Effects of the same compounds under other conditions, by name.
    """

    adata: AnnData
    effect: pd.DataFrame
    reproducible: pd.Series
    signatures: dict[str, pd.DataFrame]


def tggates_screen(level: str = "High", time: float = 24.0) -> Screen:
    """Open TG-GATEs hepatocytes at one dose level and time; every compound with the controls of its experiment.

    Profiles are moved by the mean control of their experiment and time, so that controls of all experiments agree.
    """
    from pertura.datasets import tggates_hepatocytes

    adata = tggates_hepatocytes()
    obs, x = adata.obs, np.asarray(adata.X, dtype=np.float64)
    is_control = (obs["perturbation"].astype(str) == CONTROL).to_numpy()
    paired = pd.DataFrame(x - x[adata.obs_names.get_indexer(obs["paired_control_index"])], columns=adata.var_names)
    where = [obs["compound"].astype(str).to_numpy(), obs["dose_level"].astype(str).to_numpy(), obs["time"].to_numpy()]
    effects = paired[~is_control].groupby([w[~is_control] for w in where]).mean()
    conditions = dict.fromkeys(c for d in DESCRIPTIONS.values() if d for c in d)
    signatures = {f"{t:g}h {lv}": effects.xs((lv, t), level=(1, 2)) for lv, t in conditions}

    group = obs.groupby(["exp_id", "time"], observed=True).ngroup().to_numpy()
    base = pd.DataFrame(x[is_control]).groupby(group[is_control]).mean()
    centred = x - base.loc[group].to_numpy() + x[is_control].mean(0)
    use = (obs["time"] == time).to_numpy() & (is_control | (obs["dose_level"] == level).to_numpy())
    asked = AnnData(centred[use].astype(np.float32), obs=obs[use].copy(), var=adata.var.copy())
    treated = use & ~is_control
    label = obs["compound"].astype(str).to_numpy()[treated]
    return Screen(asked, effects.xs((level, time), level=(1, 2)), _replicates(paired[treated], label), signatures)


def ht115_screen(minimum: float = 0.3) -> Screen:
    """L1000 of HT115: effects against the DMSO of the plate; compounds whose replicates correlate by more than `minimum`.

    All compounds train; only those are asked.
    """
    from pertura.datasets import lincs_l1000_ht115

    adata = lincs_l1000_ht115()
    obs, x = adata.obs, np.asarray(adata.X, dtype=np.float64)
    label = obs["perturbation"].astype(str).to_numpy()
    is_control, batch = label == CONTROL, obs["batch"].astype(str).to_numpy()
    base = pd.DataFrame(x[is_control]).groupby(batch[is_control]).mean()
    difference = x - base.loc[batch].to_numpy()
    frame = pd.DataFrame(difference[~is_control], columns=adata.var_names)
    own = label[~is_control]
    asked = AnnData((difference + x[is_control].mean(0)).astype(np.float32), obs=obs.copy(), var=adata.var.copy())
    reproducible = _replicates(frame, own)
    effect = frame.groupby(own).mean()
    return Screen(asked, effect.loc[reproducible.index[reproducible > minimum]], reproducible, {})


def _replicates(profiles: pd.DataFrame, label: NDArray) -> pd.Series:
    """Mean correlation of pairs of profiles of a compound."""
    result = {}
    for name, own in profiles.groupby(label):
        values = np.corrcoef(own.to_numpy())
        result[name] = values[np.triu_indices(len(own), 1)].mean() if len(own) > 1 else np.nan
    return pd.Series(result)


def run_compounds(
    screen: Screen,
    *,
    descriptions: Sequence[str] = tuple(DESCRIPTIONS),
    seeds: int | Sequence[int] = 5,
    n_folds: int = 5,
    model: Mapping[str, Any] | None = None,
    train: Mapping[str, Any] | None = None,
    out: str | Path | None = None,
) -> pd.DataFrame:
    """Predict compounds of which no profile of the asked condition was trained.

    Every number that a method needs is chosen on training compounds: the penalty of ridge by generalised leave-one-out,
    those of DrugAAE as it always does.

    Parameters
    ----------
    screen
        What to predict.
    descriptions
        Names in :data:`DESCRIPTIONS`.
    seeds, n_folds
        Repeats of the assignment to folds.
    model, train
        Arguments of :class:`pertura.model.DrugAAE` and its ``train``; ``model=None`` leaves it out.
    out
        CSV that grows, fold by fold; what is in it is not run again.

    Returns
    -------
    One row per description, seed, compound and method: ``pearson``, ``sign_accuracy``, ``rank`` (share of the other held-out
    compounds of the fold whose measured effect is less like the prediction than the compound's own).
    """
    path = None if out is None else Path(out)
    rows = [] if path is None or not path.exists() else pd.read_csv(path).to_dict("records")
    done = {(r["description"], r["seed"], r["fold"]) for r in rows}
    for description in descriptions:
        table, names = _features(screen, description)
        for seed in range(seeds) if isinstance(seeds, int) else seeds:
            parts = np.array_split(np.random.default_rng(seed).permutation(len(names)), n_folds)
            for fold, part in enumerate(parts):
                if (description, seed, fold) in done:
                    continue
                held_out = [names[i] for i in np.sort(part)]
                predicted = _predict(screen, table, names, held_out, description, seed, model, train)
                measured = screen.effect.loc[held_out].to_numpy()
                keys = {"description": description, "seed": seed, "fold": fold}
                rows += [{**keys, **row} for m, p in predicted.items() for row in _score(m, held_out, p, measured)]
                logger.info("%s, seed %d, fold %d of %d", description, seed, fold + 1, n_folds)
                if path is not None:
                    pd.DataFrame(rows).to_csv(path, index=False)
    return pd.DataFrame(rows)


def summarise_compounds(results: pd.DataFrame) -> pd.DataFrame:
    """Means over compounds, and the 95 % interval over compounds (each one's mean over the seeds)."""
    each = results.groupby(["description", "method", "compound"], sort=False)[
        ["pearson", "sign_accuracy", "rank"]
    ].mean()
    grouped = each.groupby(["description", "method"], sort=False)
    table = grouped.mean()
    table.insert(1, "pearson_ci", 1.96 * grouped["pearson"].sem())
    table["n_compounds"] = grouped.size()
    return table.reset_index()


def _features(screen: Screen, description: str) -> tuple[pd.DataFrame, list[str]]:
    """Table of features of all compounds that train or are asked, and names of those that are asked."""
    from pertura.priors import describe_drugs, drug_table

    if description not in DESCRIPTIONS:
        raise ValueError(f"`descriptions`: {description!r} is none of {', '.join(map(repr, DESCRIPTIONS))}.")
    every = [n for n in screen.adata.obs["perturbation"].astype(str).unique() if n != CONTROL]
    conditions = DESCRIPTIONS[description]
    if conditions is None:
        asked = [n for n in every if n in screen.effect.index]
        return drug_table(every, text=describe_drugs(every)), asked
    tables = {f"{t:g}h {lv}": screen.signatures[f"{t:g}h {lv}"] for lv, t in conditions}
    asked = [n for n in every if n in screen.effect.index and all(n in t.index for t in tables.values())]
    return drug_table(every, signatures=tables), asked


def _predict(
    screen: Screen,
    table: pd.DataFrame,
    names: Sequence[str],
    held_out: Sequence[str],
    description: str,
    seed: int,
    model: Mapping[str, Any] | None,
    train: Mapping[str, Any] | None,
) -> dict[str, NDArray[np.float64]]:
    learned = [n for n in names if n not in set(held_out)]
    x, target = table.loc[learned].to_numpy(float), screen.effect.loc[learned].to_numpy()
    asked = table.loc[list(held_out)].to_numpy(float)
    result = {
        "mean effect": np.repeat(target.mean(0, keepdims=True), len(held_out), axis=0),
        "ridge": _ridge(x, target, asked),
        "nearest neighbour": _neighbour(x, target, asked),
    }
    conditions = DESCRIPTIONS[description]
    if conditions is not None:
        level, time = conditions[-1]
        result[f"copy of {time:g}h {level}"] = screen.signatures[f"{time:g}h {level}"].loc[list(held_out)].to_numpy()
    if model is not None:
        result["DrugAAE"] = _drugaae(screen, table, held_out, seed, model, train or {})
    return result


def _ridge(x: NDArray, target: NDArray, asked: NDArray) -> NDArray[np.float64]:
    """Ridge with the penalty of best leave-one-out correlation."""
    from pertura.nn._ridge import _left_out

    centre, mean = x.mean(0), target.mean(0)
    scale = np.sqrt(((x - centre) ** 2).sum() / len(x)) + 1e-12
    own, new = (x - centre) / scale, (asked - centre) / scale
    kernel = own @ own.T
    best = max(_PENALTIES, key=lambda p: correlations(_left_out(kernel, target, p), target).mean())
    return mean + new @ own.T @ np.linalg.solve(kernel + best * np.eye(len(x)), target - mean)


def _neighbour(x: NDArray, target: NDArray, asked: NDArray) -> NDArray[np.float64]:
    """Effect of the compound with the most similar description; the mean effect where there is no description."""
    norm = np.linalg.norm(x, axis=1), np.linalg.norm(asked, axis=1)
    similarity = asked @ x.T / np.maximum(norm[1][:, None] * norm[0], 1e-12)
    return np.where((norm[1] > 0)[:, None], target[similarity.argmax(1)], target.mean(0))


def _drugaae(
    screen: Screen,
    table: pd.DataFrame,
    held_out: Sequence[str],
    seed: int,
    model: Mapping[str, Any],
    train: Mapping[str, Any],
) -> NDArray[np.float64]:
    from scvi import settings

    from pertura.model import DrugAAE

    adata = screen.adata.copy()
    adata.uns["features"] = table
    label = adata.obs["perturbation"].astype(str)
    trained = np.flatnonzero(~label.isin(list(held_out)).to_numpy())
    settings.seed = seed
    DrugAAE.setup_anndata(
        adata,
        perturbation_key="perturbation",
        control=CONTROL,
        perturbation_features_key="features",
    )
    fitted = DrugAAE(adata, **model)
    options = {"accelerator": "cpu", "enable_progress_bar": False, **train}
    fitted.train(datasplitter_kwargs={"external_indexing": [trained]}, seed=seed, **options)
    rows = np.flatnonzero((label == CONTROL).to_numpy())
    rows = np.random.default_rng(0).permutation(rows)[:100]
    found = fitted.get_perturbation_effect(list(held_out), indices=np.sort(rows), n_samples=2)
    wide = found.pivot_table(index="perturbation", columns="gene", values="lfc_mean", sort=False)
    logger.info("descriptions: %s; network: %.2f", fitted.description_, float(fitted.module.network_share[0]))
    return wide.loc[list(held_out), adata.var_names].to_numpy()


def _score(method: str, names: Sequence[str], predicted: NDArray, measured: NDArray) -> list[dict[str, Any]]:
    r = correlations(predicted, measured)
    centred = [v - v.mean(1, keepdims=True) for v in (predicted, measured)]
    unit = [v / np.maximum(np.linalg.norm(v, axis=1, keepdims=True), 1e-12) for v in centred]
    table = unit[0] @ unit[1].T
    other = ~np.eye(len(names), dtype=bool)
    below = (table < np.diag(table)[:, None]) + 0.5 * (table == np.diag(table)[:, None])
    rank = (below * other).sum(1) / max(len(names) - 1, 1)
    sign = (np.sign(predicted) == np.sign(measured)).mean(1)
    return [
        {"compound": n, "method": method, "pearson": a, "sign_accuracy": b, "rank": c}
        for n, a, b, c in zip(names, r, sign, rank, strict=True)
    ]
