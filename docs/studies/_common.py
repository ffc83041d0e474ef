"""What the studies share: their command line, estimates that are tables of effects, and screens of bulk expression."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import scanpy as sc
from anndata import AnnData
from numpy.typing import NDArray
from scipy.stats import norm

from pertura import benchmark
from pertura.metrics import pearson_effect

CONTROL = "control"
Condition = tuple[str, str]
"""Context (``"all"`` without contexts) and dose (empty without doses)."""


def parser(description: str | None, *, seeds: int) -> argparse.ArgumentParser:
    """Command line of a study, with ``--seeds`` and ``--out``."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--seeds", type=int, default=seeds, help="number of seeds (default: %(default)s)")
    made.add_argument("--out", metavar="CSV", help="file of results; runs that are in it are not repeated")
    return made


def start(made: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Options of the command line; what a study does is logged."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    return made.parse_args(argv)


def show(table: pd.DataFrame) -> None:
    """Print a table in full."""
    table = table.drop(columns=[c for c in ("dataset", "split") if c in table and table[c].nunique() == 1])
    with pd.option_context("display.width", 220, "display.max_columns", None, "display.max_rows", None):
        print(table.dropna(axis=1, how="all").to_string(index=False, float_format="%.3f"))


def options_of(text: Sequence[str] | None, default: Mapping[str, Any]) -> dict[str, Any]:
    """Models of ``--models``, or those of the study."""
    return dict(default) if text is None else dict(benchmark.parse_model(t) for t in text)


def held_out_controls(dataset: benchmark.Dataset, seed: int, by: str | None = None) -> NDArray[np.bool_]:
    """A random half of the controls of each context, and of each value of a column of ``obs``."""
    rows = np.random.default_rng(seed).permutation(np.flatnonzero(dataset.labels == dataset.control))
    strata = [dataset.contexts[rows]] + ([] if by is None else [dataset.adata.obs[by].astype(str).to_numpy()[rows]])
    there = np.zeros(dataset.adata.n_obs, dtype=bool)
    there[rows[pd.Series(rows).groupby(strata).cumcount().to_numpy() % 2 == 1]] = True
    return there


def dense(dataset: benchmark.Dataset, rows: NDArray[np.int64]) -> NDArray[np.float64]:
    """Expression of some cells."""
    x = dataset.expression(rows)
    return x.toarray() if hasattr(x, "toarray") else np.asarray(x)


def from_target(base: NDArray[np.float64], at: int) -> dict[str, NDArray[np.float64]]:
    """Knock-out of one gene as control cells have it: regression on its expression, and correlation with it."""
    gene = base[:, at] - base[:, at].mean()
    slope = gene @ (base - base.mean(0)) / max(gene @ gene, 1e-12)
    correlation = -slope * base[:, at].std() / np.maximum(base.std(0), 1e-12)
    return {"regression": -base[:, at].mean() * slope, "correlation": correlation}


def ceiling(treated: NDArray[np.float64], base: NDArray[np.float64], genes: NDArray[np.bool_]) -> float:
    """What the correlation with the measured effect can be, from two halves of the cells."""
    parts = np.array_split(np.random.default_rng(0).permutation(len(treated)), 2)
    halves = [treated[part].mean(0) - base[i::2].mean(0) for i, part in enumerate(parts)]
    r = pearson_effect(*halves, np.zeros(len(genes)), genes=genes)
    return 2 * r / (1 + r)


# -- estimates without a model -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EffectTable:
    """Predict by adding an effect to control cells.

    Parameters
    ----------
    dataset
        Says how cells are read.
    mean, sd
        Effects on the scale of the evaluation and their standard deviations: by condition, perturbations x genes.
    """

    dataset: benchmark.Dataset
    mean: Mapping[Condition, pd.DataFrame]
    sd: Mapping[Condition, pd.DataFrame] | None = None

    def _key(self, adata: AnnData, dose: float | None) -> Condition:
        about = self.dataset
        context = "all" if about.context_key is None else str(adata.obs[about.context_key].iloc[0])
        return context, "" if dose is None else str(dose)

    def predict_perturbation(
        self, perturbation: str | Sequence[str], *, adata: AnnData, dose: float | None = None, **asked: Any
    ) -> AnnData:
        """Control cells with the effects added, perturbation after perturbation."""
        names = [perturbation] if isinstance(perturbation, str) else list(perturbation)
        about = self.dataset
        x = benchmark.Dataset(adata, "", about.perturbation_key, about.control, layer=about.layer).expression(
            np.arange(adata.n_obs)
        )
        x = x.toarray() if hasattr(x, "toarray") else np.asarray(x)
        effect = self.mean[self._key(adata, dose)].loc[names, adata.var_names].to_numpy()
        index = [f"{cell}-{name}" for name in names for cell in adata.obs_names]
        obs = pd.DataFrame({"perturbation": np.repeat(names, len(x))}, index=index)
        return AnnData((effect[:, None] + x).reshape(-1, x.shape[1]), obs=obs, var=adata.var.copy())

    def get_perturbation_effect(
        self,
        perturbation: str | Sequence[str],
        *,
        adata: AnnData,
        ci: float = 0.9,
        dose: float | None = None,
        **asked: Any,
    ) -> pd.DataFrame:
        """Effects with normal intervals; NaN without standard deviations."""
        names = [perturbation] if isinstance(perturbation, str) else list(perturbation)
        key = self._key(adata, dose)
        mean = self.mean[key].loc[names].rename_axis(index="perturbation", columns="gene")
        table = mean.stack().rename("lfc_mean").reset_index()
        sd = np.nan if self.sd is None else self.sd[key].loc[names, mean.columns].to_numpy().ravel()
        half = norm.ppf((1 + ci) / 2) * sd
        return table.assign(ci_low=table["lfc_mean"] - half, ci_high=table["lfc_mean"] + half)


@dataclass(frozen=True)
class Measured:
    """Effects in training cells: by condition, perturbations x genes, with squared standard errors and cell numbers."""

    dataset: benchmark.Dataset
    effect: dict[Condition, pd.DataFrame]
    variance: dict[Condition, pd.DataFrame]
    n: dict[Condition, pd.Series]
    n_control: dict[str, int]


def measure(adata: AnnData, setup: Mapping[str, Any]) -> Measured:
    """Means of perturbed cells minus means of the controls of their context, for a factory of the benchmark."""
    keys = {k: setup.get(k) for k in ("context_key", "dose_key", "layer")}
    data = benchmark.Dataset(adata, "", setup["perturbation_key"], setup["control"], **keys)
    by = ["perturbation", "context", "dose"]
    obs = pd.DataFrame(dict(zip(by, (data.labels, data.contexts, data.doses), strict=True)), dtype="category")
    obs.index = adata.obs_names
    cells = AnnData(data.expression(np.arange(adata.n_obs)), obs=obs, var=pd.DataFrame(index=adata.var_names))
    with np.errstate(invalid="ignore", divide="ignore"):  # one profile has no variance
        found = sc.get.aggregate(cells, by, ["mean", "var"])
    keys = pd.MultiIndex.from_frame(found.obs[by].astype(str))
    n = obs.astype(str).value_counts(by).reindex(keys)
    mean = found.to_df("mean").set_axis(keys)
    error = found.to_df("var").set_axis(keys).div(n, axis=0)
    result = Measured(data, {}, {}, {}, {})
    treated = keys.get_level_values(0) != data.control
    for key in dict.fromkeys(k[1:] for k in keys[treated]):
        own = treated & (keys.droplevel(0) == key)
        base = (data.control, key[0], "")
        result.effect[key] = (mean[own] - mean.loc[base]).droplevel(by[1:])
        result.variance[key] = (error[own] + error.loc[base]).droplevel(by[1:])
        result.n[key], result.n_control[key[0]] = n[own].droplevel(by[1:]), int(n.loc[base])
    return result


def table_model(estimate: Callable[[Measured], Any]) -> Callable[..., EffectTable]:
    """Factory for :func:`pertura.benchmark.run` from a function of what was measured: effects, or effects and deviations."""

    def factory(adata: AnnData, *, setup: Mapping[str, Any], seed: int) -> EffectTable:
        found = measure(adata, setup)
        answer = estimate(found)
        return EffectTable(found.dataset, *(answer if isinstance(answer, tuple) else (answer,)))

    factory.__module__, factory.__qualname__ = (
        estimate.__module__,
        estimate.__qualname__,
    )  # what results are marked with
    return factory


# -- screens of bulk expression ----------------------------------------------------------------------------------------

#: layer with profiles as in ``X``, but against other controls; what both say of a compound shares no noise
OTHER_CONTROLS = "other controls"
LEVELS = {"Low": 0.04, "Middle": 0.2, "High": 1.0}
"""Nominal doses of TG-GATEs, in units of a compound's highest."""


@dataclass
class Screen:
    """Profiles whose controls agree, and what describes the compounds.

    Attributes
    ----------
    adata
        Profiles with ``obs["perturbation"]`` and ``obs["condition"]`` (empty in controls).
        ``layers[OTHER_CONTROLS]`` has treated profiles against other controls, where there are some.
    name
        Name of the data set.
    effects
        Measured effects by condition, compounds x genes, against other controls than the profiles; all conditions, asked or not.
    descriptions
        Conditions whose effects describe compounds, by name of the description; none: texts.
    reproducible
        Correlation of a compound's replicates, NaN where it has one.
    setup
        Columns of dose and context.
    """

    adata: AnnData
    name: str
    effects: dict[str, pd.DataFrame]
    descriptions: dict[str, tuple[str, ...]]
    reproducible: pd.Series
    setup: dict[str, str] = field(default_factory=dict)

    @property
    def compounds(self) -> list[str]:
        """Names of all compounds."""
        return [n for n in self.adata.obs["perturbation"].astype(str).unique() if n != CONTROL]


def tggates(*, every: bool = False) -> Screen:
    """Open TG-GATEs hepatocytes: the high dose after 24 hours, or every dose and time.

    Treated profiles are moved by the second control of their experiment and time, so that the controls of all experiments agree.
    Effects that describe a compound, and doses that foretell another one, are against the first.
    """
    from pertura.datasets import tggates_hepatocytes

    adata = tggates_hepatocytes()
    obs, x = adata.obs.copy(), np.asarray(adata.X, dtype=np.float64)
    is_control = (obs["perturbation"].astype(str) == CONTROL).to_numpy()
    group = obs.groupby(["exp_id", "time"], observed=True).ngroup().to_numpy()
    order = np.lexsort((obs["replicate"].to_numpy(), group))
    order = order[is_control[order]]
    # experiments have two controls at a time: of both, of the first and of the second
    rank = pd.Series(order).groupby(group[order]).cumcount().to_numpy()
    parts = (order, order[rank == 0], order[rank == 1])
    both, first, second = (x - pd.DataFrame(x[own]).groupby(group[own]).mean().loc[group].to_numpy() for own in parts)
    level, compound = obs["dose_level"].astype(str), obs["compound"].astype(str).to_numpy()
    names = [f"{t:g}h {lv}" for lv, t in zip(level, obs["time"], strict=True)]
    condition = np.where(is_control, "", names)
    obs["condition"], obs["level"] = condition, level.map(LEVELS).fillna(0.0).to_numpy(float)
    obs["hours"] = pd.Categorical([f"{t:g}h" for t in obs["time"]])
    described = pd.DataFrame(first, columns=adata.var_names)
    effects = {n: described[condition == n].groupby(compound[condition == n]).mean() for n in np.unique(condition) if n}
    high = condition == "24h High"
    replicates = _replicates(pd.DataFrame(both[high]), compound[high])
    by_time = pd.DataFrame(x[is_control]).groupby(obs["time"].to_numpy()[is_control]).mean().loc[obs["time"]].to_numpy()
    values, other = ((np.where(is_control[:, None], both, v) + by_time).astype(np.float32) for v in (second, first))
    centered = AnnData(values, obs=obs, var=adata.var.copy(), layers={OTHER_CONTROLS: other})
    if every:
        setup = {"dose_key": "level", "context_key": "hours"}
        descriptions = {"text": (), "8h High": ("8h High",)}
        return Screen(centered, "tggates, all conditions", effects, descriptions, replicates, setup)
    use = (obs["time"] == 24.0).to_numpy() & np.isin(condition, ["", "24h High"])
    descriptions = {"text": (), "8h High": ("8h High",), "8h High + 24h Middle": ("8h High", "24h Middle")}
    return Screen(centered[use].copy(), "tggates, 24h High", effects, descriptions, replicates)


def ht115() -> Screen:
    """L1000 of HT115, each profile moved by the DMSO of its plate; most replicates do not agree.

    Where half of the controls of each plate are held out, what they were moved by cancels.
    """
    from pertura.datasets import lincs_l1000_ht115

    adata = lincs_l1000_ht115()
    obs, x = adata.obs.copy(), np.asarray(adata.X, dtype=np.float64)
    label = obs["perturbation"].astype(str).to_numpy()
    is_control, batch = label == CONTROL, obs["batch"].astype(str).to_numpy()
    base = pd.DataFrame(x[is_control]).groupby(batch[is_control]).mean()
    difference = x - base.loc[batch].to_numpy()
    frame, own = pd.DataFrame(difference[~is_control], columns=adata.var_names), label[~is_control]
    obs["condition"] = np.where(is_control, "", "6h")
    asked = AnnData((difference + x[is_control].mean(0)).astype(np.float32), obs=obs, var=adata.var.copy())
    return Screen(asked, "lincs_l1000_ht115", {"6h": frame.groupby(own).mean()}, {"text": ()}, _replicates(frame, own))


def _replicates(profiles: pd.DataFrame, label: NDArray) -> pd.Series:
    """Mean correlation of pairs of profiles of a compound."""
    result = {}
    for name, own in profiles.groupby(label):
        values = np.corrcoef(own.to_numpy())
        result[name] = values[np.triu_indices(len(own), 1)].mean() if len(own) > 1 else np.nan
    return pd.Series(result)
