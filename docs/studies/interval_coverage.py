"""How much of what was measured lies inside the 90 % intervals of effects: every kind of question, every model that answers it.

The sampling error of the measured effect is allowed for. Rows of a task end early where a model cannot answer it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import norman
import numpy as np
import pandas as pd
from _common import CONTROL, options_of, parser, show, start
from sklearn.decomposition import PCA

from pertura import benchmark, datasets
from pertura.data import Split

MODELS = ("SAMSVAE", "CRADLEVAE", "GPOVAE", "CPA", "PertVAE", "DrugAAE", "PerturbX")
BASELINES = ("Linear", "EmpiricalBayes", "Additive")
METRICS = ("interval_coverage", "interval_coverage_top")
DESCRIBED = "descriptions"


@dataclass(frozen=True)
class Question:
    """Data, what is held out of them (a kind of split, or a function), and how many of the splits are run."""

    data: Callable[[], benchmark.Dataset]
    kind: str | Callable[[benchmark.Dataset], list[Split]]
    n_splits: int | None = None
    split: dict[str, Any] | None = None


def screen(seed: int = 0, **settings: Any) -> benchmark.Dataset:
    """Simulated drugs in two cell types, described by three noisy components of their planted effects."""
    adata = datasets.simulate(
        perturbation_type="drug", n_genes=150, n_contexts=2, n_unresponsive_contexts=0, seed=seed, **settings
    )
    effects = datasets.true_effects(adata)
    effects = effects.groupby(level="perturbation").mean()
    components = PCA(3, whiten=True).fit_transform(effects.to_numpy())
    noisy = components + 0.3 * np.random.default_rng(seed).normal(size=components.shape)
    adata.uns[DESCRIBED] = pd.DataFrame(noisy, index=effects.index)
    return benchmark.Dataset(
        adata,
        "simulated",
        "perturbation",
        CONTROL,
        context_key="cell_type",
        dose_key="dose" if "doses" in settings else None,
        layer="counts",
        setup={"perturbation_features_key": DESCRIBED},
    )


QUESTIONS = {
    "cell type (Kang)": Question(lambda: benchmark.Dataset.of("kang"), "unseen_context"),
    "10 cells of it (Kang)": Question(lambda: benchmark.Dataset.of("kang"), "few_shot_context", split={"shots": (10,)}),
    "measured (Papalexi)": Question(
        lambda: benchmark.Dataset.of("papalexi"), "held_out_cells", split={"fraction": 0.5}
    ),
    "pair (Norman)": Question(norman.screen, norman.pairs_split),
    "drug (simulated)": Question(
        lambda: screen(n_perturbations=40, n_drug_classes=10, n_cells_per_condition=75, library_size=5000),
        "unseen_perturbation",
        1,
    ),
    "dose (simulated)": Question(
        lambda: screen(n_perturbations=8, doses=(0.1, 0.5, 1.0, 5.0), n_cells_per_condition=75, library_size=5000),
        "unseen_dose",
        split={"doses": (0.5, 1.0)},
    ),
}


def study(question: str, models: dict[str, Any], *, seeds: int, out: str | None = None) -> pd.DataFrame:
    """Results of one question."""
    asked = QUESTIONS[question]
    dataset = asked.data()
    make = asked.kind if callable(asked.kind) else partial(benchmark.make_splits, kind=asked.kind)
    splits = make(dataset, **(asked.split or {}))[: asked.n_splits]
    table = benchmark.run(
        dataset, models, splits=splits, seeds=seeds, metrics=METRICS, n_halves=0, out=out, on_error="skip"
    )
    return table.assign(question=question)


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Coverage of all genes; of the top 100, models x questions."""
    mean = table.groupby(["model", "question", "metric"], sort=False)["value"].mean().unstack("metric")[list(METRICS)]
    text = mean.map("{:.2f}".format).agg("; ".join, axis=1).unstack("question")
    return text.reindex(columns=[q for q in QUESTIONS if q in text]).fillna("").reset_index()


def main(argv: Sequence[str] | None = None) -> None:
    """Run the study."""
    words = parser(__doc__, seeds=1)
    words.add_argument(
        "--models", nargs="+", metavar="MODEL", help="default: all, and baselines (epochs do not apply to others)"
    )
    words.add_argument("--questions", nargs="+", metavar="TEXT", help="parts of names of questions", default=[""])
    words.add_argument("--epochs", type=int, help="train so many epochs instead of as many as models take by default")
    options = start(words, argv)
    length = "" if options.epochs is None else f":train.max_epochs={options.epochs}"
    models = options_of(options.models or [*BASELINES, *(f"{model}{length}" for model in MODELS)], {})
    chosen = [q for q in QUESTIONS if any(part in q for part in options.questions)]
    tables = []
    for number, question in enumerate(QUESTIONS):
        if question in chosen:
            out = None if options.out is None else options.out.replace(".csv", f"_{number}.csv")
            tables.append(study(question, models, seeds=options.seeds, out=out))
    show(summary(pd.concat(tables)))


if __name__ == "__main__":
    main()
