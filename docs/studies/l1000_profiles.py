"""First table of the PertVAE paper on public L1000 profiles: does a prediction beat the unchanged profile.

Held-out treated profiles are predicted from a control profile of their plate. True effects are against the mean of the other
half of the plate's controls, which neither train nor predict. The profiles of a compound with two or more go to
different folds, so that the compound of a held-out profile is always in training; compounds with one profile always train.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from _common import CONTROL, held_out_controls, options_of, parser, show, start
from anndata import AnnData
from numpy.typing import NDArray
from scipy.stats import mannwhitneyu

from pertura import benchmark
from pertura.metrics import bootstrap_interval, pearson_effect, spearman_effect

PAIR = "pair"
KEYS = {"perturbation_key": "perturbation", "control": CONTROL, "dose_key": "dose"}


def compound_folds(perturbation: NDArray[np.str_], n_folds: int, *, seed: int = 0) -> NDArray[np.intp]:
    """Fold of each profile; -1 for controls and for compounds with a single profile.

    Profiles of a compound are dealt out in turn from a random fold on, so that none has all of them.
    """
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(perturbation))
    code, names = pd.factorize(np.asarray(perturbation)[order])
    start_at = rng.integers(n_folds, size=len(names))
    fold = (start_at[code] + pd.Series(code).groupby(code).cumcount().to_numpy()) % n_folds
    fold[(np.bincount(code)[code] < 2) | (names[code] == CONTROL)] = -1
    result = np.empty_like(fold)
    result[order] = fold
    return result


class Profiles:
    """Treated profiles and their controls as arrays.

    Half of the controls of each plate are the reference of true effects. A profile that was paired with one of them gets
    another control of its plate.
    """

    def __init__(self, adata: AnnData) -> None:
        self.adata, self.x = adata, np.asarray(adata.X, dtype=np.float64)
        self.perturbation = adata.obs["perturbation"].astype(str).to_numpy(dtype=str)
        self.dose = adata.obs["dose"].to_numpy(dtype=np.float64)
        paired = adata.obs_names.get_indexer(adata.obs["paired_control_index"].astype(str))
        plate = adata.obs["batch"].astype(str).to_numpy() if "batch" in adata.obs else np.zeros(adata.n_obs)
        dataset = benchmark.Dataset(adata, "", "perturbation", CONTROL)
        self.is_reference = held_out_controls(dataset, 0, "batch" if "batch" in adata.obs else None)
        self.control, self.reference = paired.copy(), np.empty_like(self.x)
        for name in np.unique(plate[paired]):  # over the plates of controls
            own, is_own = plate[paired] == name, (self.perturbation == CONTROL) & (plate == name)
            self.reference[own] = self.x[is_own & self.is_reference].mean(axis=0)
            lost = np.flatnonzero(own & self.is_reference[paired] & ~self.is_reference)
            self.control[lost] = np.resize(np.flatnonzero(is_own & ~self.is_reference), len(lost))

    def _part(self, rows: NDArray[np.intp]) -> AnnData:
        """Some profiles; a treated profile carries the identifier of its control, as a control does."""
        own = self.adata[rows]
        part = AnnData(own.X.copy(), obs=own.obs.copy(), var=own.var.copy())
        part.obs[PAIR] = self.adata.obs_names.to_numpy()[self.control[rows]]
        return part

    def baselines(self, test: NDArray[np.intp]) -> dict[str, NDArray[np.float64]]:
        """Predicted profiles of the held-out rows."""
        base = self.x[self.control[test]]
        train = np.setdiff1d(np.flatnonzero(self.perturbation != CONTROL), test)
        effect = self.x[train] - self.x[self.control[train]]
        own = pd.DataFrame(effect).groupby(self.perturbation[train]).mean()
        compound = own.loc[self.perturbation[test]].to_numpy()
        return {"identity": base, "mean_effect": base + effect.mean(axis=0), "compound_mean_effect": base + compound}

    def fit(self, spec: benchmark.ModelSpec, name: str, test: NDArray[np.intp], seed: int) -> dict[str, NDArray]:
        """Train without the held-out rows, then predict them from their controls.

        ``"<name>"`` keeps the control profile's own measurement noise; ``"<name> mean"`` is the paper's prediction, without it, and
        ``"<name> reconstruction"`` that of the control profile, the paper's identity baseline.
        """
        setup: dict[str, Any] = dict(KEYS)
        takes = inspect.signature(spec.cls.setup_anndata).parameters
        if "pair_key" in takes:
            setup["pair_key"] = PAIR
        model: Any = spec(self._part(np.setdiff1d(np.flatnonzero(~self.is_reference), test)), setup=setup, seed=seed)
        query = self._part(np.unique(self.control[test]))
        has_noise = "noise" in inspect.signature(model.predict_perturbation).parameters
        answers = {name: {"noise": "own"} if has_noise else {}}
        if has_noise:
            answers[f"{name} mean"] = {"noise": "none"}
        found = {key: np.empty((len(test), self.x.shape[1])) for key in answers}
        for (dose, label), at in (
            pd.DataFrame({"dose": self.dose[test], "label": self.perturbation[test]})
            .groupby(["dose", "label"])
            .indices.items()
        ):
            rows = query.obs_names.get_indexer(self.adata.obs_names[self.control[test[at]]])
            asked, inverse = np.unique(rows, return_inverse=True)
            for key, options in answers.items():
                given = {"indices": asked, "dose": float(dose), "seed": seed, **options, **spec.predict}
                found[key][at] = self._predict(model, str(label), query, **given)[inverse]
        if has_noise:
            rows = query.obs_names.get_indexer(self.adata.obs_names[self.control[test]])
            found[f"{name} reconstruction"] = self._predict(model, CONTROL, query, seed=seed, noise="none")[rows]
        return found

    def _predict(self, model: Any, label: str, query: AnnData, **given: Any) -> NDArray[np.float64]:
        answer = model.predict_perturbation(label, adata=query, ci=None, return_anndata=True, **given)
        return answer.to_df()[list(self.adata.var_names)].to_numpy()

    def score(self, predictions: Mapping[str, NDArray], test: NDArray[np.intp]) -> pd.DataFrame:
        """Spearman with the true profile (the paper's score) and Pearson of the effect, profile by profile."""
        truth, base = self.x[test], self.x[self.control[test]]
        frames = []
        for model, predicted in predictions.items():
            scores = {
                "spearman": spearman_effect(predicted, truth, np.zeros_like(truth)),
                "pearson_effect": pearson_effect(predicted, truth, self.reference[test], base),
            }
            about = {"context": self.adata.obs_names[test], "perturbation": self.perturbation[test], "model": model}
            about["dose"] = self.dose[test].astype(str)
            frames += [pd.DataFrame({**about, "metric": metric, "value": v}) for metric, v in scores.items()]
        return pd.concat(frames, ignore_index=True)


def study(
    adata: AnnData,
    models: Mapping[str, benchmark.ModelSpec],
    *,
    seeds: int,
    results: benchmark.Results,
    n_folds: int = 5,
) -> pd.DataFrame:
    """One row per held-out profile (``context``), model, seed and metric."""
    data = Profiles(adata)
    folds = compound_folds(data.perturbation, n_folds)
    runs = [("baselines", None, 0), *((name, spec, seed) for name, spec in models.items() for seed in range(seeds))]
    for fold in range(n_folds):
        test = np.flatnonzero(folds == fold)
        for name, spec, seed in runs:
            run = {"dataset": "lincs_l1000_ht115", "split": name, "held_out": f"fold {fold} of {n_folds}", "seed": seed}
            settings = repr(spec)
            if not results.has(run, settings=settings):
                found = data.baselines(test) if spec is None else data.fit(spec, name, test, seed)
                results.add(data.score(found, test), run, settings=settings)
    return results.select(split=["baselines", *models])


def summary(found: pd.DataFrame) -> pd.DataFrame:
    """Means over profiles; intervals over compounds, whose replicates are not independent; the paper's one-sided tests.

    ``p_identity`` and ``p_reconstruction``: Mann-Whitney, which ignores that profiles are paired, against the unchanged profile and the
    model's own reconstruction.
    """
    rows = []
    for metric, frame in found.groupby("metric", sort=False):
        values = frame.groupby(["model", "context"], sort=False)["value"].mean().unstack("context")
        compound = frame.drop_duplicates("context").set_index("context")["perturbation"].reindex(values.columns)
        identity = values.loc["identity"]
        for model, own in values.iterrows():
            mean, gain = (bootstrap_interval(v.groupby(compound).mean()) for v in (own, own - identity))
            row = {"metric": metric, "model": model, "n_profiles": int(own.notna().sum()), "mean": own.mean()}
            row |= {"low": mean.low, "high": mean.high, "gain": (own - identity).mean()}
            row |= {"gain_low": gain.low, "gain_high": gain.high}
            rebuilt = f"{model.removesuffix(' mean')} reconstruction"
            for title, other in (("p_identity", "identity"), ("p_reconstruction", rebuilt)):
                if other in values.index and other != model:
                    row[title] = mannwhitneyu(own, values.loc[other], alternative="greater").pvalue
            rows.append(row)
    return pd.DataFrame(rows)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the study."""
    from pertura.datasets import lincs_l1000_ht115

    words = parser(__doc__, seeds=3)
    words.add_argument("--models", nargs="+", metavar="MODEL", help="default: PertVAE")
    options = start(words, argv)
    models = options_of(options.models, dict([benchmark.parse_model("PertVAE")]))
    show(summary(study(lincs_l1000_ht115(), models, seeds=options.seeds, results=benchmark.Results(options.out))))


if __name__ == "__main__":
    main()
