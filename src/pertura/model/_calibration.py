"""How far predicted effects are from measured ones, and what that says about effects nobody measured.

The posterior of a model says how well its parameters are known if the model is right. Whether it is right shows where
predictions can be compared with measurements: in training conditions for what was seen, and across contexts and
perturbations, each predicted from the others, for what was not. The discrepancy of gene g is modelled as
:math:`u_g \\sim N(0, a^2 + k^2 m_g^2)` with predicted effect :math:`m_g`; a and k are estimated by moments from squared
differences minus squared standard errors of the measurement.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy.optimize import nnls

if TYPE_CHECKING:
    from ._base import PerturbationModel

logger = logging.getLogger(__name__)

_MAX_CONDITIONS, _MAX_CONTROLS, _MIN_CELLS = 60, 200, 10
# nothing to learn from: one context, no combination, one perturbation. The effect may be absent or twice as large.
_UNINFORMED = (0.05, 1.0)


def fit_discrepancy(difference: np.ndarray, se: np.ndarray, effect: np.ndarray) -> tuple[float, float]:
    """Moment estimates of a and k.

    Parameters
    ----------
    difference
        Predicted minus measured effects, any shape.
    se
        Standard errors of the measured effects, same shape.
    effect
        Predicted effects, same shape.
    """
    excess = (difference**2 - se**2).ravel()
    magnitude = effect.ravel() ** 2
    order = np.argsort(magnitude)
    # bins of equal size: means of squares are stable enough to regress on, and large effects do not drown in the rest
    bins = [b for b in np.array_split(order, min(20, max(1, len(order) // 25))) if len(b)]
    y = np.array([excess[b].mean() for b in bins])
    m = np.array([magnitude[b].mean() for b in bins])
    weight = 1.0 / (np.abs(y) + np.mean(se**2) + 1e-6)
    design = np.stack([np.ones_like(m), m], axis=1)
    a2, k2 = nnls(design * weight[:, None], np.maximum(y, 0.0) * weight)[0]
    return float(np.sqrt(a2)), float(np.sqrt(k2))


def measured_effects(model: PerturbationModel, rows: np.ndarray) -> pd.DataFrame:
    """Cells per (label, dose, context) of the given rows, treated only."""
    adata = model.adata
    obs = pd.DataFrame(
        {
            "label": adata.obs[model._argument("perturbation_key")].astype(str).to_numpy()[rows],
            "context": np.asarray(adata.obs["_scvi_context"])[rows],
            "row": rows,
        }
    )
    dose_key = model._argument("dose_key")
    obs["dose"] = adata.obs[dose_key].astype(str).to_numpy()[rows] if dose_key else ""
    obs["label"] = obs["label"].map({v: model.vocabulary.canonical(v) for v in obs["label"].unique()})
    return obs


def calibrate(model: PerturbationModel, train_idx: np.ndarray, seed: int = 0) -> dict[str, Any]:
    """Discrepancies of a trained model, by novelty, on the default scale.

    Returns
    -------
    ``{"scale": ..., "seen": (a, k), "new context": ..., "new combination": ..., "unseen with features": ...,
    "observed": ["label|context", ...]}``.
    """
    scale = model._resolve_scale(None)
    obs = measured_effects(model, train_idx)
    control = model.vocabulary.control
    rng = np.random.default_rng(seed)
    groups = obs[obs["label"] != control].groupby(["label", "dose", "context"], observed=True)["row"]
    sizes = groups.size()
    # bulk: replicates are few, and a profile is a mean already
    floor = _MIN_CELLS if model.data_kind == "counts" else 2
    keep = sizes[sizes >= floor].index
    result: dict[str, Any] = {
        "scale": scale,
        "observed": sorted({f"{label}|{model.contexts[context]}" for label, _, context in sizes.index}),
        "seen": (0.0, 0.0),
        "new context": _UNINFORMED,
        "new combination": _UNINFORMED,
        "unseen with features": _UNINFORMED,
    }
    controls = {c: g["row"].to_numpy() for c, g in obs[obs["label"] == control].groupby("context")}
    keep = [key for key in keep if len(controls.get(key[2], ())) >= floor]
    if not keep:
        return result
    if len(keep) > _MAX_CONDITIONS:
        keep = [keep[i] for i in rng.choice(len(keep), _MAX_CONDITIONS, replace=False)]
    table = pd.DataFrame(keep, columns=["label", "dose", "context"]).sort_values("context", ignore_index=True)
    measured, predicted, se = [], [], []
    for context, conditions in table.groupby("context"):
        keys = list(conditions.itertuples(index=False, name=None))
        base_mean, base_var = model._moments(_some(controls[context], 2000, rng), scale)
        effects = model._mean_effects(
            _some(controls[context], _MAX_CONTROLS, rng), [(k[0], k[1]) for k in keys], scale, seed
        )
        for key, effect in zip(keys, effects, strict=True):
            mean, variance = model._moments(_some(groups.get_group(key).to_numpy(), 2000, rng), scale)
            measured.append(mean - base_mean)
            se.append(np.sqrt(variance + base_var))
            predicted.append(effect)
    y, m, s = np.stack(measured), np.stack(predicted), np.stack(se)
    result["seen"] = fit_discrepancy(m - y, s, m)
    result["new context"] = _across(table, y, s, ["label", "dose"]) or _UNINFORMED
    result["unseen with features"] = _across(table, y, s, ["context"]) or _UNINFORMED
    combined = table["label"].str.contains(model.vocabulary.delimiter, regex=False).to_numpy()
    result["new combination"] = _additive(table, y, s, combined, model) or result["unseen with features"]
    return result


def _some(rows: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    return rows if len(rows) <= n else np.sort(rng.choice(rows, n, replace=False))


def _across(table: pd.DataFrame, y: np.ndarray, s: np.ndarray, by: list[str]) -> tuple[float, float] | None:
    """Discrepancy of predicting each condition of a group by the others' mean, weighted by similarity."""
    difference, errors, effects = [], [], []
    for _, index in table.groupby(by, observed=True).indices.items():
        if len(index) < 2:
            continue
        total, variance = y[index].sum(0), (s[index] ** 2).sum(0)
        others = (total - y[index]) / (len(index) - 1)
        difference.append(others - y[index])
        errors.append(np.sqrt(s[index] ** 2 + (variance - s[index] ** 2) / (len(index) - 1) ** 2))
        effects.append(others)
    if not difference:
        return None
    return fit_discrepancy(np.concatenate(difference), np.concatenate(errors), np.concatenate(effects))


def _additive(
    table: pd.DataFrame, y: np.ndarray, s: np.ndarray, combined: np.ndarray, model: PerturbationModel
) -> tuple[float, float] | None:
    """Discrepancy of predicting measured combinations by the sum of their members."""
    lookup = {(r.label, r.context): i for i, r in enumerate(table.itertuples())}
    difference, errors, effects = [], [], []
    for i in np.flatnonzero(combined):
        members = [lookup.get((m, table["context"][i])) for m in model.vocabulary.parse(table["label"][i])]
        if any(m is None for m in members):
            continue
        total = y[members].sum(0)
        difference.append(total - y[i])
        errors.append(np.sqrt(s[i] ** 2 + (s[members] ** 2).sum(0)))
        effects.append(total)
    return fit_discrepancy(np.stack(difference), np.stack(errors), np.stack(effects)) if difference else None
