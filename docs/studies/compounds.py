"""Compounds or doses that nobody measured: DrugAAE beside the mean effect, ridge, the nearest neighbor and interpolation.

``tggates`` and ``ht115``: held-out compounds; ``tggates-all``: the same, of all doses and times; ``tggates-dose``: the middle dose, from
the doses below and above it; ``tggates-few``: a time at which some compounds are known, from these and from the other times.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from _common import CONTROL, LEVELS, OTHER_CONTROLS, Condition, Measured, Screen, held_out_controls, ht115, parser
from _common import options_of, show, start, table_model, tggates
from numpy.typing import ArrayLike, NDArray
from scipy.spatial.distance import cdist
from sklearn.linear_model import RidgeCV
from sklearn.neighbors import KNeighborsRegressor

from pertura import benchmark
from pertura.data import Split, few_shot_context
from pertura.metrics import register

METRICS = ("pearson_effect", "sign_accuracy", "rank", "relative_error")
FEATURES = "features"
EPOCHS = {
    "tggates": 15,
    "tggates-all": 4,
    "tggates-dose": 15,
    "ht115": 15,
    "tggates-few": 15,
}  # as many steps of four times the profiles
AGREEING = 0.3
FEW = (
    *("TwoWayAdditive", "LowRankCompletion", "MeanEffect", "Linear", "EmpiricalBayes", "PerturbX:train.max_epochs=10"),
    *("SAMSVAE:train.max_epochs=10", "DrugAAE:train.max_epochs=15"),
)


@register("sign_accuracy", best_value=1.0, higher_is_better=True, needs="mean")
def sign_accuracy(
    predicted: ArrayLike, truth: ArrayLike, control: ArrayLike, predicted_control: ArrayLike | None = None
) -> NDArray:
    """Share of genes whose effect has the right sign."""
    own = control if predicted_control is None else predicted_control
    return (np.sign(predicted - own) == np.sign(truth - control)).mean(-1)


@register("relative_error", best_value=0.0, higher_is_better=False, needs="mean")
def relative_error(
    predicted: ArrayLike, truth: ArrayLike, control: ArrayLike, predicted_control: ArrayLike | None = None
) -> NDArray:
    """Squared error of the effect, 1 for no effect."""
    effect, own = truth - control, control if predicted_control is None else predicted_control
    return ((predicted - own - effect) ** 2).sum(-1) / np.maximum((effect**2).sum(-1), 1e-12)


@register("rank", best_value=1.0, higher_is_better=True, needs="table")
def rank(predicted: ArrayLike, truth: ArrayLike, *, others: ArrayLike | None = None) -> NDArray:
    """Share of the other held-out compounds whose measured effect correlates less with the prediction than the compound's own."""
    alike = 1 - np.nan_to_num(cdist(predicted, truth, "correlation"), nan=1.0)
    mine = np.diag(alike)[:, None]
    below = (alike < mine) + 0.5 * (alike == mine)
    np.fill_diagonal(below, 0.0)
    return below.sum(1) / max(len(alike) - 1, 1)


def described(screen: Screen, description: str) -> tuple[benchmark.Dataset, set[str]]:
    """Profiles of the conditions that are asked, with features; and the compounds whose description is complete."""
    from pertura.priors import describe_drugs, drug_table

    used = screen.descriptions[description]
    names = screen.compounds
    if used:
        tables = {n: screen.effects[n] for n in used}
        table, complete = (
            drug_table(names, signatures=tables),
            set(names).intersection(*(t.index for t in tables.values())),
        )
    else:
        table, complete = drug_table(names, text=describe_drugs(names)), set(names)
    adata = screen.adata[~screen.adata.obs["condition"].astype(str).isin(used).to_numpy()].copy()
    adata.uns[FEATURES] = table
    keys = {"setup": {"perturbation_features_key": FEATURES}, **screen.setup}
    data = benchmark.Dataset(adata, f"{screen.name}, by {description}", "perturbation", CONTROL, **keys)
    return data, complete & set(data.labels)


def compound_folds(dataset: benchmark.Dataset, names: set[str], *, n_folds: int, seed: int) -> list[Split]:
    """Folds over compounds; one half of the controls of each batch trains, the other is the reference of the truth."""
    there = held_out_controls(dataset, seed, "batch" if "batch" in dataset.adata.obs else None)
    order = np.random.default_rng(seed).permutation(sorted(names))
    splits = []
    for fold, out in enumerate(np.array_split(order, n_folds)):
        held = np.isin(dataset.labels, out)
        rows = np.flatnonzero(~held & ~there), np.flatnonzero(held | there)
        splits.append(Split(*rows, name=f"repeat={seed}, fold={fold}", kind="unseen_perturbation", seed=seed))
    return splits


class FromDescriptions:
    """Estimates, condition by condition, for all compounds: from the effects of those that trained and are described."""

    def __init__(self, complete: set[str]) -> None:
        self.complete = complete

    def _each(self, found: Measured, predict: Any) -> dict[Condition, pd.DataFrame]:
        table = found.dataset.adata.uns[FEATURES].astype(float)
        answer = {}
        for key, effect in found.effect.items():
            learned = effect.index[effect.index.isin(self.complete)]
            values = predict(table.loc[learned].to_numpy(), effect.loc[learned].to_numpy(), table.to_numpy())
            answer[key] = pd.DataFrame(values, table.index, effect.columns)
        return answer

    def mean(self, found: Measured) -> dict[Condition, pd.DataFrame]:
        """The mean effect of all compounds."""
        return self._each(found, lambda x, y, new: np.repeat(y.mean(0, keepdims=True), len(new), axis=0))

    def ridge(self, found: Measured) -> dict[Condition, pd.DataFrame]:
        """Ridge with the penalty of smallest leave-one-out error."""

        def predict(x: NDArray, y: NDArray, new: NDArray) -> NDArray:
            scale = np.sqrt(((x - x.mean(0)) ** 2).sum() / len(x)) + 1e-12
            return RidgeCV(np.logspace(-2, 2, 9)).fit(x / scale, y).predict(new / scale)

        return self._each(found, predict)

    def neighbor(self, found: Measured) -> dict[Condition, pd.DataFrame]:
        """Effect of the compound with the most similar description; the mean effect where there is none."""

        def predict(x: NDArray, y: NDArray, new: NDArray) -> NDArray:
            nearest = KNeighborsRegressor(1, metric="cosine").fit(x, y).predict(new)
            return np.where(new.any(axis=1, keepdims=True), nearest, y.mean(0))

        return self._each(found, predict)


def copy_of(effect: pd.DataFrame) -> Any:
    """The compound's own effect under another condition."""
    return table_model(lambda found: dict.fromkeys(found.effect, effect))


def drugaae(epochs: int, **init: Any) -> benchmark.ModelSpec:
    """The model, with effects from two posterior draws."""
    from pertura.model import DrugAAE

    train = {"max_epochs": epochs, "accelerator": "cpu"}
    return benchmark.ModelSpec(DrugAAE, init=init, train=train, predict={"n_samples": 2})


def study(
    screen: Screen, models: dict[str, Any], *, seeds: int, n_folds: int = 5, descriptions: Any = None, **options: Any
) -> pd.DataFrame:
    """Compounds of which no profile of the asked conditions was trained, by each description."""
    tables = []
    for description in descriptions or screen.descriptions:
        data, complete = described(screen, description)
        simple = FromDescriptions(complete)
        chosen = {"mean effect": table_model(simple.mean), "ridge": table_model(simple.ridge)}
        chosen["nearest neighbor"] = table_model(simple.neighbor)
        chosen |= {f"copy of {n}": copy_of(screen.effects[n]) for n in screen.descriptions[description][-1:]}
        for seed in range(seeds):
            splits = compound_folds(data, complete, n_folds=n_folds, seed=seed)
            tables.append(_run(data, {**chosen, **models}, splits, seed, options))
    return pd.concat(tables, ignore_index=True).drop_duplicates(ignore_index=True)


def study_dose(screen: Screen, models: dict[str, Any], *, seeds: int, **options: Any) -> pd.DataFrame:
    """The middle dose held out of all compounds and contexts; asked are compounds that have all three."""
    adata = screen.adata.copy()
    data = benchmark.Dataset(adata, f"{screen.name}, other doses", "perturbation", CONTROL, **screen.setup)
    low, dose, high = (str(v) for v in LEVELS.values())
    held = data.doses == dose
    if OTHER_CONTROLS in adata.layers:  # doses of a compound have the same controls
        adata.X = np.where(held[:, None], adata.X, adata.layers[OTHER_CONTROLS])
    frame = pd.DataFrame({"name": data.labels, "context": data.contexts, "dose": data.doses})
    complete = frame[frame["dose"] != ""].groupby(["name", "context"])["dose"].transform("nunique")
    test = held & (complete.reindex(frame.index, fill_value=0) == len(LEVELS)).to_numpy()
    split = Split(np.flatnonzero(~held), np.flatnonzero(test), name=f"dose={dose}", kind="unseen_dose")

    def between(share: float) -> Any:
        def estimate(found: Measured) -> dict[Condition, pd.DataFrame]:
            contexts = {c for c, _ in found.effect if {(c, low), (c, high)} <= set(found.effect)}
            pairs = {c: (found.effect[c, low], found.effect[c, high]) for c in contexts}
            return {(c, dose): (1 - share) * a + share * b.reindex(a.index) for c, (a, b) in pairs.items()}

        return table_model(estimate)

    middle = np.log(float(dose) / float(low)) / np.log(float(high) / float(low))
    simple = {"copy of Low": between(0.0), "copy of High": between(1.0), "interpolation in log dose": between(middle)}
    tables = [_run(data, {**simple, **models}, [split], seed, options) for seed in range(seeds)]
    return pd.concat(tables, ignore_index=True).drop_duplicates(ignore_index=True)


def study_few(screen: Screen, models: dict[str, Any], *, seeds: int, time: str = "24h", **options: Any) -> pd.DataFrame:
    """A time at which 10, 20 or 50 % of the compounds are known; of the others all doses are asked."""
    obs = screen.adata.obs  # of compounds that other times have, too
    adata = screen.adata[
        (obs.groupby("perturbation", observed=True)["hours"].transform("nunique") > 1).to_numpy()
    ].copy()
    data = benchmark.Dataset(adata, f"{screen.name}, few", "perturbation", CONTROL, **screen.setup)
    keys = {"perturbation_key": "perturbation", "context_key": "hours", "control": CONTROL}
    splits = few_shot_context(adata, **keys, shots=(0.1, 0.2, 0.5), contexts=[time], n_splits=seeds)
    tables = [_run(data, models, [split], split.seed, options) for split in splits]
    return pd.concat(tables, ignore_index=True).drop_duplicates(ignore_index=True)


def _run(data: benchmark.Dataset, models: dict[str, Any], splits: list[Split], seed: int, options: Any) -> pd.DataFrame:
    given = {"metrics": METRICS, "baselines": False, "n_halves": 0, "max_asked": 100, **options}
    return benchmark.run(data, models, splits=splits, seeds=[seed], **given)


def summary(
    found: pd.DataFrame, against: Sequence[str], reproducible: pd.Series, agreeing: float | None
) -> pd.DataFrame:
    """Means over compounds with 95 % intervals by condition, and the mean of a compound's conditions; paired gains."""
    found = found.assign(condition=(found["context"] + " " + found["dose"]).str.removeprefix("all").str.strip())
    groups = dict(iter(found.groupby("condition")))
    if len(groups) > 1:
        by = ["dataset", "split", "held_out", "perturbation", "model", "seed", "metric"]
        mean = found.groupby(by, sort=False, as_index=False)["value"].mean().assign(dose="", context="mean")
        groups["mean"] = mean
    sets = {"all": set(found["perturbation"])}
    if agreeing is not None:
        sets[f"replicates > {agreeing:g}"] = set(reproducible.index[reproducible > agreeing])
    tables = []
    for condition, own in groups.items():
        for name, compounds in sets.items():
            part = own[own["perturbation"].isin(compounds)]
            table = benchmark.summarize(part, baseline=against[0], level=0.95)
            other = benchmark.summarize(part, baseline=against[-1], level=0.95)
            gains = {f"over {against[0]}": table, f"over {against[-1]}": other}
            for title, source in gains.items():
                table = table.assign(**{f"{title}{end}": source[f"gain{end}"] for end in ("", "_low", "_high")})
            table.insert(2, "condition", condition)
            tables.append(table.assign(compounds=name))
    table = pd.concat(tables, ignore_index=True)
    first = ["dataset", "compounds", "condition", "metric", "model", "n_conditions", "mean", "low", "high"]
    return table[[*first, *[c for c in table if c.startswith("over ")]]]


def main(argv: Sequence[str] | None = None) -> None:
    """Run the study."""
    words = parser(__doc__, seeds=5)
    words.add_argument("screen", choices=tuple(EPOCHS))
    words.add_argument("--models", nargs="+", help=f"for tggates-few (default: {' '.join(FEW)})")
    options = start(words, argv)
    screen = ht115() if options.screen == "ht115" else tggates(every=options.screen != "tggates")
    models = {"DrugAAE": drugaae(EPOCHS[options.screen])}
    if options.screen == "tggates-few":
        models = options_of(options.models or FEW, {})
        found = study_few(screen, models, seeds=options.seeds, out=options.out)
        for kind, part in found.groupby("split", sort=False):
            print(kind)
            show(summary(part, [next(iter(models))], screen.reproducible, None))
        return
    if options.screen == "tggates-dose":
        found, against = study_dose(screen, models, seeds=options.seeds, out=options.out), ["interpolation in log dose"]
    else:
        found, against = study(screen, models, seeds=options.seeds, out=options.out), ["mean effect", "ridge"]
    show(summary(found, against, screen.reproducible, AGREEING if options.screen == "ht115" else None))


if __name__ == "__main__":
    main()
