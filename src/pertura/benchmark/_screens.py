"""Screens of bulk expression for held-out compounds: effects against matched controls, and what describes compounds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from numpy.typing import NDArray

CONTROL = "control"
#: Nominal doses of TG-GATEs, in units of a compound's highest.
LEVELS = {"Low": 0.04, "Middle": 0.2, "High": 1.0}


@dataclass
class Screen:
    """Profiles whose controls are matched, and what describes the compounds.

    Attributes
    ----------
    adata
        Profiles to train on and to predict, ``obs["perturbation"]`` and ``obs["condition"]`` (empty in controls).
    effects
        Measured effects by condition, compounds x genes.
    asked
        Dose and context of each condition (`None`: there is one).
    signatures
        Effects of the same compounds, by name; where the name is that of a condition, profiles of that condition are neither
        trained nor asked when it describes.
    descriptions
        Signatures that describe compounds, by name of the description; none: texts.
    reproducible
        Correlation of a compound's replicates, NaN where it has one.
    setup
        Arguments of ``setup_anndata`` beside perturbation, control and features.
    """

    adata: AnnData
    effects: dict[str, pd.DataFrame]
    asked: dict[str, tuple[float | None, Any]]
    signatures: dict[str, pd.DataFrame]
    descriptions: dict[str, tuple[str, ...]]
    reproducible: pd.Series
    setup: dict[str, Any] = field(default_factory=dict)

    @property
    def effect(self) -> pd.DataFrame:
        """Effects under the first condition."""
        return next(iter(self.effects.values()))


def tggates_screen(level: str = "High", time: float = 24.0) -> Screen:
    """Open TG-GATEs hepatocytes at one dose level and time; every compound with the controls of its experiment.

    Profiles are moved by the mean control of their experiment and time, so that controls of all experiments agree.
    Descriptions are texts, the same dose level at the time before, and that with the dose level below at the same time.
    """
    centred, paired, effects = _tggates()
    name = _name(level, time)
    levels, times = list(LEVELS), sorted({float(n.split("h ")[0]) for n in effects})
    before = _name(level, times[times.index(time) - 1]) if time != times[0] else None
    below = _name(levels[levels.index(level) - 1], time) if level != levels[0] else None
    descriptions: dict[str, tuple[str, ...]] = {"text": ()}
    described = tuple(n for n in (before, below) if n is not None)
    descriptions |= {" + ".join(described[: i + 1]): described[: i + 1] for i in range(len(described))}
    obs = centred.obs
    use = (obs["time"] == time).to_numpy() & obs["condition"].isin(["", name]).to_numpy()
    treated = (obs["condition"] == name).to_numpy()
    replicates = _replicates(paired[treated], obs["compound"].astype(str).to_numpy()[treated])
    signatures = {n: effects[n] for n in described}
    return Screen(
        centred[use].copy(), {name: effects[name]}, {name: (None, None)}, signatures, descriptions, replicates
    )


def tggates_conditions(descriptions: Sequence[str] = ("8h High",)) -> Screen:
    """Open TG-GATEs hepatocytes at all dose levels and times: one model of nine conditions, times are contexts.

    Parameters
    ----------
    descriptions
        Conditions that may describe a compound when the others are asked, beside texts.
    """
    centred, paired, effects = _tggates()
    obs = centred.obs
    high = (obs["condition"] == _name("High", 24.0)).to_numpy()
    replicates = _replicates(paired[high], obs["compound"].astype(str).to_numpy()[high])
    asked = {name: (LEVELS[name.split("h ")[1]], name.split("h ")[0] + "h") for name in effects}
    return Screen(
        centred,
        effects,
        asked,
        {n: effects[n] for n in descriptions},
        {"text": (), **{n: (n,) for n in descriptions}},
        replicates,
        {"dose_key": "level", "context_key": "hours"},
    )


def _name(level: str, time: float) -> str:
    return f"{time:g}h {level}"


def _tggates() -> tuple[AnnData, pd.DataFrame, dict[str, pd.DataFrame]]:
    """Profiles, their differences from the paired control, and effects of compounds by condition."""
    from pertura.datasets import tggates_hepatocytes

    adata = tggates_hepatocytes()
    obs, x = adata.obs.copy(), np.asarray(adata.X, dtype=np.float64)
    is_control = (obs["perturbation"].astype(str) == CONTROL).to_numpy()
    paired = pd.DataFrame(x - x[adata.obs_names.get_indexer(obs["paired_control_index"])], columns=adata.var_names)
    level = obs["dose_level"].astype(str)
    condition = np.where(is_control, "", [_name(lv, t) for lv, t in zip(level, obs["time"], strict=True)])
    obs["condition"] = condition
    obs["level"] = level.map(LEVELS).fillna(0.0).to_numpy(float)
    obs["hours"] = pd.Categorical([f"{t:g}h" for t in obs["time"]])
    compound = obs["compound"].astype(str).to_numpy()
    order = [_name(lv, t) for t in sorted(obs["time"].unique(), reverse=True) for lv in reversed(LEVELS)]
    effects = {n: paired[condition == n].groupby(compound[condition == n]).mean() for n in order}

    group = obs.groupby(["exp_id", "time"], observed=True).ngroup().to_numpy()
    base = pd.DataFrame(x[is_control]).groupby(group[is_control]).mean()
    # of controls of the same time: with one time, the mean of its controls
    by_time = pd.DataFrame(x[is_control]).groupby(obs["time"].to_numpy()[is_control]).mean().loc[obs["time"]]
    centred = x - base.loc[group].to_numpy() + by_time.to_numpy()
    return AnnData(centred.astype(np.float32), obs=obs, var=adata.var.copy()), paired, effects


def ht115_screen() -> Screen:
    """L1000 of HT115: effects against the DMSO of the plate; most replicates do not agree (`Screen.reproducible`)."""
    from pertura.datasets import lincs_l1000_ht115

    adata = lincs_l1000_ht115()
    obs, x = adata.obs.copy(), np.asarray(adata.X, dtype=np.float64)
    label = obs["perturbation"].astype(str).to_numpy()
    is_control, batch = label == CONTROL, obs["batch"].astype(str).to_numpy()
    base = pd.DataFrame(x[is_control]).groupby(batch[is_control]).mean()
    difference = x - base.loc[batch].to_numpy()
    frame = pd.DataFrame(difference[~is_control], columns=adata.var_names)
    own = label[~is_control]
    obs["condition"] = np.where(is_control, "", "6h")
    asked = AnnData((difference + x[is_control].mean(0)).astype(np.float32), obs=obs, var=adata.var.copy())
    effect = frame.groupby(own).mean()
    return Screen(asked, {"6h": effect}, {"6h": (None, None)}, {}, {"text": ()}, _replicates(frame, own))


def _replicates(profiles: pd.DataFrame, label: NDArray) -> pd.Series:
    """Mean correlation of pairs of profiles of a compound."""
    result = {}
    for name, own in profiles.groupby(label):
        values = np.corrcoef(own.to_numpy())
        result[name] = values[np.triu_indices(len(own), 1)].mean() if len(own) > 1 else np.nan
    return pd.Series(result)
