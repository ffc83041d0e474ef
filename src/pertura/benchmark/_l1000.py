"""First table of the PertVAE paper on public L1000 profiles: does a prediction beat the unchanged profile."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from numpy.typing import NDArray
from scipy.stats import mannwhitneyu, rankdata
from scvi.utils import track

from pertura.metrics import bootstrap_interval

from ._resources import Resources
from ._runner import quiet
from ._spec import ModelSpec, digest

logger = logging.getLogger(__name__)

PAIR = "pair"
_KEYS = {"perturbation_key": "perturbation", "control": "control", "dose_key": "dose"}
_DRAWS = 25
_BASELINES = "baselines"  # they have no run of their own
_TEXT = dict.fromkeys(("dataset", "split", "held_out", "profile", "perturbation", "model", "metric", "settings"), str)


def run_l1000(
    adata: AnnData | None = None,
    *,
    models: Mapping[str, ModelSpec] | None = None,
    n_folds: int = 5,
    seeds: int | Sequence[int] = 3,
    out: str | Path | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """Predict held-out treated profiles from their own paired control profile.

    The profiles of a compound with two or more (replicates, doses) go to different folds, so that the compound
    of a held-out profile is always in training; compounds with one profile are always in training. Control
    profiles are known throughout, as the pre-treatment profile is in the paper. PertVAE registers the pair (a
    treated profile and its control share an identifier) and the dose.

    Parameters
    ----------
    adata
        Profiles with ``perturbation, dose, paired_control_index`` in ``obs``; default
        :func:`~pertura.datasets.lincs_l1000_ht115`.
    models
        Name -> :class:`~pertura.benchmark.ModelSpec`; default PertVAE. They are set up with ``pair_key`` if their
        ``setup_anndata`` takes one.
    n_folds
        Number of folds.
    seeds
        Number of seeds, or the seeds.
    out
        CSV file to write after every run; runs that are in it already are not repeated.
    progress
        Show a progress bar.

    Returns
    -------
    pandas.DataFrame
        One row per held-out profile, model, seed and metric: ``dataset``, ``split``, ``held_out`` (fold), ``profile``,
        ``perturbation``, ``dose``, ``model``, ``seed``, ``metric``, ``value``, ``seconds``, ``settings``. Metrics:
        ``"spearman"`` of the profile with the true one over genes (the paper's), and ``"pearson_effect"`` of the effects
        against the paired control. Models: ``"<model>"`` is what ``predict_perturbation`` gives, which keeps the control profile's own measurement
        noise; ``"<model> mean"`` is the decoded mean without it, the paper's prediction, and ``"<model>
        reconstruction"`` that of the control profile, the paper's identity baseline. Beside them ``"identity"`` (the
        control profile), ``"mean_effect"`` (plus the mean training effect of all compounds) and
        ``"compound_mean_effect"`` (plus that of the compound's own training profiles).

    See Also
    --------
    summarise_l1000 : averages and one-sided Mann-Whitney tests.
    """
    if adata is None:
        from pertura import datasets

        adata = datasets.lincs_l1000_ht115()
    if models is None:
        from pertura.model import PertVAE

        models = {"PertVAE": ModelSpec(PertVAE)}
    numbers = list(range(seeds)) if isinstance(seeds, int) else [int(s) for s in seeds]
    data = _Profiles.of(adata)
    folds = compound_folds(data.perturbation, n_folds)
    path = None if out is None else Path(out)
    table = pd.read_csv(path, dtype=_TEXT) if path is not None and path.exists() else pd.DataFrame()
    plan = [(fold, None, _BASELINES, -1) for fold in range(n_folds)]
    plan += [(fold, spec, name, seed) for fold in range(n_folds) for name, spec in models.items() for seed in numbers]
    for fold, spec, name, seed in track(plan, description="L1000", disable=not progress):
        mark = digest(spec if spec is not None else "baselines", n_folds, adata.shape)
        label = f"fold={fold}"
        if len(table):
            own = table[(table["held_out"] == label) & (table["run"] == name) & (table["seed"] == seed)]
            if len(own):
                if (own["settings"] != mark).any():
                    raise ValueError(f"`out`: {str(path)!r} has {name!r} made with other settings.")
                continue
        test = np.flatnonzero(folds == fold)
        with Resources() as used, quiet():
            predictions = data.baselines(test) if spec is None else data.fit(spec, name, test, seed)
        new = data.score(predictions, test).assign(
            dataset=str(adata.uns.get("dataset", {}).get("name", "adata")),
            split="held_out_profiles",
            held_out=label,
            run=name,
            seed=seed,
            seconds=round(used.seconds, 3),
            settings=mark,
        )
        table = pd.concat([table, new], ignore_index=True) if len(table) else new
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            new.to_csv(path, mode="a", header=not path.exists(), index=False)
    return table[table["run"].isin({_BASELINES, *models})].reset_index(drop=True)


def compound_folds(perturbation: NDArray[np.str_], n_folds: int, *, control: str = "control", seed: int = 0) -> Any:
    """Fold of each profile; -1 for controls and for compounds with a single profile.

    Profiles of a compound are dealt out in turn from a random fold on, so that none has all of them.
    """
    if n_folds < 2:
        raise ValueError(f"`n_folds` must be at least 2, got {n_folds}.")
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(perturbation))
    code, names = pd.factorize(np.asarray(perturbation)[order])
    size = np.bincount(code)
    start = rng.integers(n_folds, size=len(names))
    fold = (start[code] + pd.Series(code).groupby(code).cumcount().to_numpy()) % n_folds
    fold[(size[code] < 2) | (names[code] == control)] = -1
    result = np.empty_like(fold)
    result[order] = fold
    return result


class _Profiles:
    """Treated profiles and their controls as arrays."""

    def __init__(self, adata: AnnData) -> None:
        obs = adata.obs
        self.adata = adata
        self.x = np.asarray(adata.X, dtype=np.float64)
        self.perturbation = obs["perturbation"].astype(str).to_numpy(dtype=str)
        self.dose = obs["dose"].to_numpy(dtype=np.float64)
        self.control = adata.obs_names.get_indexer(obs["paired_control_index"].astype(str))
        self.is_control = self.perturbation == _KEYS["control"]

    @classmethod
    def of(cls, adata: AnnData) -> _Profiles:
        """Checked profiles."""
        for key in ("perturbation", "dose", "paired_control_index"):
            if key not in adata.obs:
                raise ValueError(f"`adata`: obs has no column {key!r}; pass e.g. datasets.lincs_l1000_ht115().")
        data = cls(adata)
        if (data.control < 0).any() or not data.is_control[data.control].all():
            raise ValueError("`adata`: some `paired_control_index` names no control profile of the data.")
        return data

    def training(self, test: NDArray[np.intp]) -> AnnData:
        """Profiles without the held-out ones; a treated profile carries the identifier of its control."""
        keep = np.setdiff1d(np.arange(len(self.x)), test)
        train = AnnData(X=self.adata.X[keep].copy(), obs=self.adata.obs.iloc[keep].copy(), var=self.adata.var.copy())
        train.obs[PAIR] = train.obs["paired_control_index"].astype(str)
        return train

    def baselines(self, test: NDArray[np.intp]) -> dict[str, NDArray[np.float64]]:
        """Predicted profiles of the held-out rows."""
        base = self.x[self.control[test]]
        train = np.setdiff1d(np.flatnonzero(~self.is_control), test)
        effect = self.x[train] - self.x[self.control[train]]
        own = pd.DataFrame(effect).groupby(self.perturbation[train]).mean()
        return {
            "identity": base,
            "mean_effect": base + effect.mean(axis=0),
            "compound_mean_effect": base + own.loc[self.perturbation[test]].to_numpy(),
        }

    def fit(self, spec: ModelSpec, name: str, test: NDArray[np.intp], seed: int) -> dict[str, NDArray[np.float64]]:
        """Train without the held-out rows, then predict them from their controls."""
        import inspect

        setup: dict[str, Any] = dict(_KEYS)
        if "pair_key" in inspect.signature(spec.cls.setup_anndata).parameters:
            setup["pair_key"] = PAIR
        model: Any = spec(self.training(test), setup=setup, seed=seed)
        names = self.adata.obs_names
        controls = np.unique(self.control[test])
        query = AnnData(
            X=self.adata.X[controls].copy(),
            obs=self.adata.obs.iloc[controls].copy(),
            var=self.adata.var.copy(),
        )
        query.obs[PAIR] = query.obs_names.astype(str)
        predicted = np.empty((len(test), self.x.shape[1]))
        for dose in np.unique(self.dose[test]):
            at = np.flatnonzero(self.dose[test] == dose)
            for perturbation in np.unique(self.perturbation[test][at]):
                own = at[self.perturbation[test][at] == perturbation]
                rows = query.obs_names.get_indexer(names[self.control[test[own]]])
                asked, inverse = np.unique(rows, return_inverse=True)
                answer = model.predict_perturbation(
                    str(perturbation),
                    adata=query,
                    indices=asked,
                    dose=float(dose),
                    ci=None,
                    return_anndata=True,
                    **{"seed": seed, **spec.predict},
                )
                predicted[own] = answer.to_df()[list(self.adata.var_names)].to_numpy()[inverse]
        result = {name: predicted}
        if hasattr(model, "_engine") and spec.stochastic:
            result |= self._decoded(model, name, query, test, seed)
        return result

    def _decoded(self, model: Any, name: str, query: AnnData, test: NDArray[np.intp], seed: int) -> dict[str, Any]:
        """Decoded means of the state after and before, without the control's own measurement noise: as in the paper."""
        manager, _ = model._query(query, None)
        engine = model._engine(manager, n_samples=_DRAWS, scale="layer", seed=seed, batch_size=None)
        own = query.obs_names.get_indexer(self.adata.obs_names[self.control[test]])
        after, before = (np.empty((len(test), self.x.shape[1])) for _ in range(2))
        for block in engine.blocks(np.arange(query.n_obs)):
            block.basal.noise = torch.zeros_like(block.basal.noise)
            here = np.flatnonzero(np.isin(own, block.positions))
            at = own[here] - block.positions[0]
            before[here] = block.ask(None)[0].mean(0).cpu().numpy()[at]
            kinds = pd.MultiIndex.from_arrays([self.perturbation[test[here]], self.dose[test[here]]])
            for (perturbation, dose), rows in kinds.to_frame().groupby(level=[0, 1]).indices.items():
                (question,) = model._questions(perturbation, float(dose))
                after[here[rows]] = block.ask(question)[0].mean(0).cpu().numpy()[at[rows]]
        genes = pd.Index(model.gene_names).get_indexer(self.adata.var_names)
        return {f"{name} mean": after[:, genes], f"{name} reconstruction": before[:, genes]}

    def score(self, predictions: Mapping[str, NDArray[np.float64]], test: NDArray[np.intp]) -> pd.DataFrame:
        """Score each held-out profile."""
        truth, base = self.x[test], self.x[self.control[test]]
        frames = []
        for model, predicted in predictions.items():
            scores = {
                "spearman": rowwise_correlation(rankdata(predicted, axis=1), rankdata(truth, axis=1)),
                "pearson_effect": rowwise_correlation(predicted - base, truth - base),
            }
            frames += [
                pd.DataFrame(
                    {
                        "profile": self.adata.obs_names[test],
                        "perturbation": self.perturbation[test],
                        "dose": self.dose[test],
                        "model": model,
                        "metric": metric,
                        "value": values,
                    }
                )
                for metric, values in scores.items()
            ]
        return pd.concat(frames, ignore_index=True)


def rowwise_correlation(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """Pearson correlation of matching rows; 0 where the first does not vary."""
    a = a - a.mean(axis=1, keepdims=True)
    b = b - b.mean(axis=1, keepdims=True)
    size = np.sqrt((a * a).sum(1) * (b * b).sum(1))
    return np.where(size > 1e-9, (a * b).sum(1) / np.maximum(size, 1e-12), 0.0)


def summarise_l1000(results: pd.DataFrame, *, level: float = 0.9, seed: int = 0) -> pd.DataFrame:
    """Averages over held-out profiles, and whether a method beats the unchanged profile.

    Parameters
    ----------
    results
        What :func:`run_l1000` returns. Values are averaged over seeds first.
    level
        Level of the bootstrap intervals over compounds.
    seed
        Of the bootstrap.

    Returns
    -------
    One row per metric and model: ``n_profiles, mean, low, high``; ``gain, gain_low, gain_high``: paired difference
    to ``"identity"``; ``p_identity`` and ``p_reconstruction``: one-sided Mann-Whitney tests that values are larger
    than those of ``"identity"`` and of the model's own reconstruction (the paper's test, which ignores
    that profiles are paired).
    """
    rows = []
    for metric, frame in results.groupby("metric", sort=False):
        values = frame.groupby(["model", "profile"], sort=False)["value"].mean().unstack("profile")
        compound = frame.drop_duplicates("profile").set_index("profile")["perturbation"].reindex(values.columns)
        identity = values.loc["identity"]
        for model, own in values.iterrows():
            # Replicates of a compound are not independent: compounds are resampled, not profiles.
            per_compound = [t.groupby(compound).mean().to_numpy() for t in (own, own - identity)]
            mean, gain = (bootstrap_interval(v, level=level, seed=seed) for v in per_compound)
            rebuilt = f"{model.removesuffix(' mean')} reconstruction"
            tests = {
                "p_identity": identity if model != "identity" else None,
                "p_reconstruction": values.loc[rebuilt] if rebuilt in values.index else None,
            }
            p = {
                k: np.nan if other is None else mannwhitneyu(own, other, alternative="greater").pvalue
                for k, other in tests.items()
            }
            rows.append(
                {
                    "metric": metric,
                    "model": model,
                    "n_profiles": int(own.notna().sum()),
                    "mean": float(own.mean()),
                    "low": mean.low,
                    "high": mean.high,
                    "gain": float((own - identity).mean()),
                    "gain_low": gain.low,
                    "gain_high": gain.high,
                    **p,
                }
            )
    return pd.DataFrame(rows)
