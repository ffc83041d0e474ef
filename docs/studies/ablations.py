"""What each part of a model adds, alone: the model with it and without, on data where it should matter.

Short trainings: the difference counts, not the level. Errors are those of effects on all genes, input and truth have different controls.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import pandas as pd
from _common import CONTROL, parser, show, start
from anndata import AnnData

from pertura import benchmark
from pertura.data import Split

N_GENES = 60
LINES = ("A172", "T98G", "U87MG")
SIMULATED = ("responders", "converging", "alike")
Task = tuple[benchmark.Dataset, list[Split]]


# -- data --------------------------------------------------------------------------------------------------------------


def simulated(kind: str, n_contexts: int = 12, seed: int = 0) -> benchmark.Dataset:
    """Contexts under one drug; ``"responders"``, half of which respond; ``"converging"``, alike under the drug; or ``"alike"``."""
    rng = np.random.default_rng(seed)
    base = rng.normal(2.0, 0.5, size=(n_contexts, N_GENES))
    effect = np.tile(np.where(np.arange(N_GENES) % 3 == 0, rng.normal(size=N_GENES), 0.0), (n_contexts, 1))
    if kind == "responders":
        base[:, :3] = np.where(np.arange(n_contexts)[:, None] % 2, 3.0, 1.0)
        effect *= np.where(np.arange(n_contexts) % 2, 1.0, 0.2)[:, None]
    elif kind == "converging":
        effect -= 0.6 * (base - base.mean(0))
    parts = [base[c] + arm * effect[c] + rng.normal(0, 0.5, (60, N_GENES)) for c in range(n_contexts) for arm in (0, 1)]
    rows = [(arm, f"c{c:02d}") for c in range(n_contexts) for arm in (CONTROL, "drug") for _ in range(60)]
    obs = pd.DataFrame(rows, columns=["perturbation", "context"], index=[f"cell{i}" for i in range(len(rows))])
    adata = AnnData(
        np.concatenate(parts).astype(np.float32), obs, pd.DataFrame(index=[f"g{j}" for j in range(N_GENES)])
    )
    return benchmark.Dataset(adata, kind, "perturbation", CONTROL, context_key="context")


def screen(missing: bool) -> Task:
    """The screen with planted kernels: perturbations that a context lacks, or all."""
    from screen_kernels import simulate

    found = simulate(80, 4, N_GENES)
    row, column = found.adata.obs["row"].to_numpy(), found.adata.obs["column"].to_numpy()
    out = found.missing & ~found.unseen[:, None] if missing else np.repeat(found.unseen[:, None], 4, axis=1)
    held, unused = (part[row, column] & (row >= 0) for part in (out, found.missing & ~out))
    setup = {"perturbation_features_key": "features"}
    data = benchmark.Dataset(
        found.adata, "planted kernels", "perturbation", CONTROL, context_key="context", setup=setup
    )
    return data, [Split(np.flatnonzero(~held & ~unused), np.flatnonzero(held), name="planted", kind="planted")]


def task(name: str, folds: int | None = None) -> Task:
    """Data and splits by name; `folds`: at most so many splits."""
    if name.startswith("planted"):
        return screen("missing" in name)
    if name == "compounds":
        from _common import tggates
        from compounds import compound_folds, described

        data, complete = described(tggates(every=True), "8h High")
        return data, compound_folds(data, complete, n_folds=5, seed=0)[:1]
    source, _, shots = name.partition(", ")
    kind = "few_shot_context" if shots else "unseen_context"
    options: dict[str, Any] = {"shots": [float(shots.split()[0])]} if shots else {}
    if source == "glioblastoma":
        data = benchmark.Dataset.of("norman").only(LINES)
    else:
        data = simulated(source) if source in SIMULATED else benchmark.Dataset.of(source)
    return data, benchmark.make_splits(data, kind, **options)[:folds]


# -- parts -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """Part of a model.

    Parameters
    ----------
    name, model, data
        The model as for :func:`pertura.benchmark.parse_model`, and names of data for :func:`task`.
    off
        Takes the part out of a trained model.
    patched
        Dotted name of what is something else in training without the part, and what it then is.
    without
        The model without the part, where that is an option.
    """

    name: str
    model: str
    data: tuple[str, ...]
    off: Callable[[Any], object] = lambda model: None
    patched: tuple[str, Any] | None = None
    without: str | None = None


def share(at: int, value: float = 0.0) -> Callable[[Any], object]:
    """Without one of the shares of a module."""

    def off(model: Any) -> None:
        model.module.share[at] = value

    return off


def no_transfer(model: Any) -> None:
    """Known effects of a context say nothing of its others."""
    model.module._transfer._fits = dict.fromkeys(range(model.module.n_contexts))


def no_posterior(model: Any) -> None:
    """Measured effects as they are."""
    for name in ("posterior", "posterior_variance"):
        setattr(model.module, name, getattr(model.module, name)[:0])


def no_departures(model: Any) -> None:
    """Effects in single contexts are as the others say."""
    site = model.module if hasattr(model.module, "departures") else model.module.gene_effects
    site.departures.clear()


def no_features(model: Any) -> None:
    """Unseen perturbations have the mean effect."""
    measured = model.module.gene_effects.measured
    features = measured.feature_center @ measured.feature_weight
    measured.intercept += features
    measured.feature_weight.zero_()


def equal_amplitudes(model: Any) -> None:
    """Predicted effects of unseen drugs hold everywhere as they are."""
    amplitude = model.module.closed_form.amplitude
    amplitude[:, 0], amplitude[:, 1] = 1.0, 0.0


def no_vectors(model: Any) -> None:
    """Drugs that were not measured have no latent vectors."""
    model.module.vector_share.zero_()


PERTURBX, SHORT = "PerturbX:train.max_epochs=10", "train.max_epochs=15"
DRUGAAE = "DrugAAE:train.max_epochs=4,predict.n_samples=2"
PERTVAE, SAMSVAE, CRADLEVAE = (f"{name}:{SHORT}" for name in ("PertVAE", "SAMSVAE", "CRADLEVAE"))
UNSEEN, FEW = ("kang", "responders", "converging", "alike"), ("kang, 5 cells", "glioblastoma, 5 cells")
SOME = ("glioblastoma, 0.2 of perturbations", "planted, missing")
SHARE_OF_W = "pertura.model._pertvae.share_of_differences"
PARTS = (
    Part("regression on control profiles", PERTURBX, UNSEEN, share(0)),
    Part("neural networks on bags", PERTURBX, UNSEEN, share(1)),
    Part("convergence", PERTURBX, UNSEEN, share(2)),
    Part("share of what the basis does not span", PERTURBX, UNSEEN, share(3, 1.0)),
    Part("transfer from known perturbations", PERTURBX, SOME, no_transfer),
    Part("posterior of few cells", PERTURBX, FEW, no_posterior),
    Part("convergence", "MeanEffect:converge=True", UNSEEN, without="MeanEffect"),
    Part("convergence", "EmpiricalBayes", UNSEEN, share(0)),
    Part("other perturbations of the context", "EmpiricalBayes", (*SOME, *FEW), share(1)),
    Part("W", PERTVAE, UNSEEN, patched=(SHARE_OF_W, lambda *_: 0.0)),
    Part("share of W", PERTVAE, UNSEEN, patched=(SHARE_OF_W, lambda *_: 1.0)),
    Part("pairs by optimal transport", PERTVAE, UNSEEN, without=f"{PERTVAE},pairing=random"),
    Part("departures", PERTVAE, FEW, no_departures),
    Part("departures", SAMSVAE, FEW, no_departures),
    Part("departures", CRADLEVAE, FEW, no_departures),
    Part("kernels of features", SAMSVAE, ("planted, unseen",), no_features),
    *(
        Part(name, DRUGAAE, ("compounds",), without=f"{DRUGAAE},{option}")
        for name, option in {
            "effect in closed form": "residual=False",
            "adversary": "adversary_weight=0.0",
            "agreement of text and signature": "contrast_weight=0.0",
            "error of predicted effects": "counterfactual_weight=0.0",
            "a modality taken away in training": "modality_dropout=0.0",
            "first layer of its own": "free_encoder=False",
        }.items()
    ),
    Part("amplitude by context and dose", DRUGAAE, ("compounds",), equal_amplitudes),
    Part("latent vectors of unseen drugs", DRUGAAE, ("compounds",), no_vectors),
)


class Fits:
    """Trained models: one training for all parts that are taken out afterwards."""

    def __init__(self) -> None:
        self.kept: dict[Any, tuple[tuple[str, ...], Any, Any]] = {}

    def factory(self, part: Part | None, text: str) -> benchmark.Factory:
        """Model without a part, for :func:`pertura.benchmark.run`; `None`: with all."""
        spec, patched = benchmark.parse_model(text)[1], None if part is None else part.patched
        off = Part.off if part is None else part.off

        def make(adata: AnnData, *, setup: Mapping[str, Any], seed: int) -> Any:
            key, rows = (text, seed, part if patched else None), tuple(adata.obs_names)
            if key not in self.kept or self.kept[key][0] != rows:
                with mock.patch(*patched) if patched else nullcontext():
                    model = spec(adata, setup=setup, seed=seed)
                self.kept[key] = rows, model, model.module
            _, model, module = self.kept[key]
            model.module = copy.deepcopy(module)
            off(model)
            return model

        return make


def study(
    parts: Sequence[Part], *, seeds: int, folds: int | None = None, data_names: Sequence[str] | None = None
) -> pd.DataFrame:
    """One row for each part and data set; `data_names`: only on these."""
    tables = []
    for name in dict.fromkeys(d for p in parts for d in p.data if data_names is None or d in data_names):
        own, fits, (data, splits) = [p for p in parts if name in p.data], Fits(), task(name, folds)
        models = {p.model: fits.factory(None, p.model) for p in own}
        models |= {f"{p.name}|{p.model}": fits.factory(p, p.without or p.model) for p in own}
        given = {
            "metrics": ["mse", "pearson_effect"],
            "baselines": False,
            "n_halves": 0,
            "progress": False,
            "max_asked": 100,
        }
        found = benchmark.run(data, models, splits=splits, seeds=seeds, **given)
        by = ["held_out", "perturbation", "dose", "context", "seed"]
        wide = found.pivot_table(index=by, columns=["metric", "model"], values="value")
        for part in own:
            (mse, mse_off), (r, r_off) = (
                (wide[metric, part.model], wide[metric, f"{part.name}|{part.model}"])
                for metric in ("mse", "pearson_effect")
            )
            tables.append(
                {
                    "part": part.name,
                    "model": part.model.partition(":")[0],
                    "data": name,
                    "n": len(wide),
                    "mse with": mse.mean(),
                    "mse without": mse_off.mean(),
                    "less error, %": 100 * (1 - mse.mean() / mse_off.mean()),
                    "in % of conditions": 100 * (mse < mse_off * (1 - 1e-6)).mean(),
                    "r with": r.mean(),
                    "r without": r_off.mean(),
                }
            )
        print(name, flush=True)
    return pd.DataFrame(tables)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the study."""
    words = parser(__doc__, seeds=1)
    words.add_argument("--models", nargs="+", help="only parts of these")
    words.add_argument("--data", nargs="+", help="only on these")
    words.add_argument("--folds", type=int, help="at most so many splits of a data set")
    options = start(words, argv)
    parts = [p for p in PARTS if not options.models or p.model.partition(":")[0] in options.models]
    table = study(parts, seeds=options.seeds, folds=options.folds, data_names=options.data)
    if options.out:
        table.to_csv(options.out, index=False)
    show(table)


if __name__ == "__main__":
    main()
