"""``python -m pertura quickstart``: hold a cell type out, train, predict it, and say how good that is."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

if TYPE_CHECKING:
    from anndata import AnnData
    from numpy.typing import NDArray

    from pertura.benchmark import Dataset
    from pertura.benchmark._score import Prediction, Task

LEVEL, TOP, N_HALVES, N_BOOT = 0.9, 100, 20, 500
_COLUMNS = {"pearson_effect_top": "r, top {}", "r2_top": "R2, top {}", "mse": "MSE", "gap_closed": "gap closed"}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pertura quickstart",
        description="Leave the treated cells of one cell type out, train PertVAE on the rest, predict them from the "
        "cell type's own control cells, and compare with what was measured.",
    )
    parser.add_argument("--out", default="pertura_quickstart", help="folder of results (default: ./%(default)s)")
    parser.add_argument(
        "--data",
        choices=("kang", "simulated"),
        default=None,
        help="interferon-beta on blood cells (Kang et al. 2018, part of the package) or simulated cells (default: kang; "
        "with --fast: simulated)",
    )
    parser.add_argument("--context", help="cell type to hold out (default: CD14+ Monocytes, or the first)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the model (default: %(default)s)")
    parser.add_argument("--max-epochs", type=int, help="training epochs (default: the model's own)")
    parser.add_argument("--fast", action="store_true", help="few simulated cells and epochs: does it run at all?")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the quickstart.

    Parameters
    ----------
    argv
        Words of the command line after ``quickstart``; default ``sys.argv[1:]``.

    Returns
    -------
    Exit status: 0, or 2 for wrong arguments.
    """
    parser = _parser()
    options = parser.parse_args(argv)
    if options.fast and options.data == "kang":
        parser.error("--fast simulates its cells; leave --data out.")
    from pertura.benchmark._runner import quiet

    started = time.perf_counter()
    out = Path(options.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out: {error}")
    dataset, about = _load(options.data or ("simulated" if options.fast else "kang"), options.fast)
    contexts = sorted(set(dataset.contexts))
    context = options.context or ("CD14+ Monocytes" if "CD14+ Monocytes" in contexts else contexts[0])
    if context not in contexts:
        parser.error(f"--context: there is no {context!r}; choose one of {', '.join(contexts)}.")
    with quiet():
        _run(dataset, about, context, out, options)
    print(f"\nDone in {time.perf_counter() - started:.0f} seconds.")
    return 0


def _load(data: str, fast: bool) -> tuple[Dataset, str]:
    """Cells, and one line that says which."""
    from pertura import datasets
    from pertura.benchmark import Dataset

    if data == "kang":
        return Dataset.of(datasets.kang_2018_mini()), "Kang et al. 2018, blood cells, interferon-beta"
    size: dict[str, Any] = {"n_genes": 60, "n_regulators": 8} if fast else {"n_genes": 500, "n_regulators": 40}
    n_cells = 25 if fast else 150
    adata = datasets.simulate(
        n_cells_per_condition=n_cells,
        n_control_cells=n_cells,
        perturbation_type="drug",
        n_perturbations=1,
        n_contexts=5,
        n_unresponsive_contexts=0,
        n_truth_cells=20,
        **size,
    )
    keys = {"perturbation_key": "perturbation", "control": "control", "context_key": "cell_type", "layer": "counts"}
    return Dataset.of(adata, name="simulated", **keys), "simulated cells, one drug"


def _run(dataset: Dataset, about: str, context: str, out: Path, options: argparse.Namespace) -> None:
    from pertura.benchmark import baselines, make_splits
    from pertura.benchmark._controls import divide_controls
    from pertura.benchmark._score import ask, make_tasks

    (split,) = make_splits(dataset, "unseen_context", contexts=[context])
    divided = divide_controls(dataset, split, max_controls=2000)
    (task,) = make_tasks(dataset, split, divided)
    ((perturbation, _),) = task.conditions
    train = dataset.rows(divided.train)
    print(f"Data      {about}: {dataset.adata.n_obs:,} cells x {dataset.adata.n_vars:,} genes")
    print(
        f"Held out  the {len(split.test)} treated cells of {context}, and {len(divided.reference[context])} of its controls,"
    )
    print(f"          which the measured effect is against; training on the other {train.n_obs:,} cells\n")
    model = _train(train, dataset, options)
    asked = {"level": LEVEL, "seed": options.seed, "options": {}, "intervals": True}
    predictions = {"PertVAE": ask(model, task, cells=True, **asked)}
    for name, spec in baselines().items():
        fitted = spec(dataset.rows(divided.train), setup=dataset.keys, seed=options.seed)
        predictions[name] = ask(fitted, task, cells=False, **asked)
    scores = _scores(predictions, task)
    _print_scores(scores, predictions["PertVAE"], task, context)
    figure = _draw(scores, model, predictions["PertVAE"], task, perturbation, context, out / "quickstart.png")
    scores.to_csv(out / "scores.csv", index=False)
    model.predict_perturbation(perturbation, key_added=perturbation, seed=options.seed)
    train.write_h5ad(out / "predicted.h5ad")
    model.save(out / "model", overwrite=True, save_anndata=False)
    print(f"\nWritten to {out}:")
    print(f"  {figure.name:15} predicted and measured effect, with intervals")
    print(f"  {'predicted.h5ad':15} layers[{perturbation!r}]: every cell as it would look under {perturbation!r}, with")
    print(f"  {'':15} _low and _high; uns['{perturbation}_effect']: for sc.pl.rank_genes_groups")
    print(f"  {'model':15} pertura.model.PertVAE.load({str(out / 'model')!r}, adata=False)")
    print(f"  {'scores.csv':15} the table above")


def _train(train: AnnData, dataset: Dataset, options: argparse.Namespace) -> Any:
    import torch

    from pertura.model import PertVAE

    with torch.random.fork_rng():
        torch.manual_seed(options.seed)
        PertVAE.setup_anndata(train, **dataset.keys)
        model = PertVAE(train)
        model.train(max_epochs=options.max_epochs or (3 if options.fast else None), seed=options.seed)
    return model


# -- scores ---------------------------------------------------------------------------------------------------------


def _scores(predictions: dict[str, Prediction], task: Task) -> pd.DataFrame:
    """Metric, model, mean, low, high; intervals are of a bootstrap over genes, the same genes for all models."""
    from pertura.metrics._ceiling import halves

    label = task.truth.obs["perturbation"].to_numpy(dtype=str)
    is_control = label == task.dataset.control
    treated, controls = task.truth.X[~is_control], task.truth.X[is_control]
    truth, control, start = _mean(treated)[None], _mean(controls)[None], task.start.to_numpy()
    rng = np.random.default_rng(0)
    # predicted and true mean, and the controls of either
    profiles = {name: (p.mean.to_numpy(), truth, control, start) for name, p in predictions.items()}
    one, other = halves(treated, "cells", N_HALVES, rng)
    own, against = halves(controls, "control", N_HALVES, rng)
    profiles["ceiling"] = (one, other, against, own)
    truth, control = truth[0], control[0]
    strongest = np.argsort(-np.abs(truth - control), kind="stable")[:TOP]
    genes = np.arange(len(truth))
    drawn = {
        "pearson_effect_top": _draw_genes(strongest, rng),
        "r2_top": _draw_genes(strongest, rng),
        "mse": _draw_genes(genes, rng),
    }
    rows: list[dict[str, Any]] = []
    for metric, at in drawn.items():
        rows += _with_gaps(
            metric, {name: _boot(metric, *p, at=at, full_size=name == "ceiling") for name, p in profiles.items()}
        )
    return pd.DataFrame(rows)


def _with_gaps(metric: str, values: dict[str, NDArray[np.float64]]) -> list[dict[str, Any]]:
    """Rows of one metric; of its gap closed as well, for the first."""
    from pertura.metrics import gap_closed, get_metric

    rows = [_row(metric, name, v) for name, v in values.items()]
    if metric == "pearson_effect_top":
        base, ceiling = values["MeanEffect"], values["ceiling"]
        described = get_metric(metric)
        rows += [
            _row("gap_closed", name, gap_closed(v, base, ceiling, metric=described))
            for name, v in values.items()
            if name not in ("MeanEffect", "ceiling")
        ]
    return rows


def _row(metric: str, model: str, values: NDArray[np.float64]) -> dict[str, Any]:
    good = values[1:][np.isfinite(values[1:])]
    # Without a gap to close (a ceiling no better than the mean effect) there is no share of it.
    known = np.isfinite(values[0]) and len(good) > N_BOOT / 2
    low, high = np.quantile(good, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]) if known else (np.nan, np.nan)
    return {"metric": metric, "model": model, "mean": values[0], "low": low, "high": high}


def _mean(x: Any) -> NDArray[np.float64]:
    return np.asarray(x.mean(axis=0), dtype=np.float64).ravel()


def _draw_genes(genes: NDArray[np.intp], rng: np.random.Generator) -> NDArray[np.intp]:
    """The genes themselves, then resamples of them."""
    return np.concatenate([genes[None], rng.choice(genes, (N_BOOT, len(genes)))])


def _boot(metric: str, *profiles: NDArray[np.float64], at: Any, full_size: bool = False) -> NDArray[np.float64]:
    """Scores on each set of genes, averaged over the rows of predicted and true means and the controls of truth and prediction.

    `full_size`: rows are of halves of the cells, and values are extended to all of them where there is a rule for that.
    """
    from pertura.metrics import get_metric
    from pertura.metrics._ceiling import full_size as extend

    # The sets are of the top genes already.
    function = get_metric(metric.removesuffix("_top"))
    given = [name for name in ("control", "predicted_control") if name in function.parameters]
    values = []
    for x, y, *controls in zip(*profiles, strict=True):
        options = dict(zip(given, (c[at] for c in controls), strict=False))
        values.append(function(x[at], y[at], **options))
    known = full_size and function.duplicate is not None
    return np.mean(extend(np.stack(values), function) if known else values, axis=0)


def _print_scores(scores: pd.DataFrame, prediction: Prediction, task: Task, context: str) -> None:
    from pertura.metrics import interval_coverage

    effect, se = (table.to_numpy()[0] for table in task.effects)
    low, high = prediction.low.to_numpy()[0], prediction.high.to_numpy()[0]
    top = np.argsort(-np.abs(effect), kind="stable")[:TOP]
    print(f"\nTreated {context}, predicted from {task.controls.n_obs} of their control cells, against the measured:\n")
    models = list(dict.fromkeys(scores["model"]))
    width = max(map(len, models)) + 2
    print(" " * width + "".join(f"{title.format(len(top)):>24}" for title in _COLUMNS.values()))
    table = scores.set_index(["metric", "model"])
    for model in models:
        rows = [table.loc[(m, model)] if (m, model) in table.index else None for m in _COLUMNS]
        cells = [
            "-" if row is None or np.isnan(row["mean"]) else f"{row['mean']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"
            for row in rows
        ]
        print(f"{model:<{width}}" + "".join(f"{cell:>24}" for cell in cells))
    everywhere, strongest = (
        interval_coverage(low[at], high[at], effect[at], truth_se=se[at], level=LEVEL) for at in (slice(None), top)
    )
    print(
        f"""
r: correlation of predicted and measured effect, each against control cells of its own, on the {len(top)} genes that
change most; R2: of mean expression on them; MSE: over all genes; gap closed (of r): 0 is the mean effect of the
other cell types, 1 the ceiling: one half of the held-out cells as a prediction of the other, r and MSE extended
to all of them. In brackets: {LEVEL:.0%} interval, from a bootstrap over genes.

PertVAE's {LEVEL:.0%} intervals hold the measured effect of {everywhere:.0%} of all genes, and of {strongest:.0%} of
the {len(top)} that change most."""
    )


# -- figure ---------------------------------------------------------------------------------------------------------


def _draw(
    scores: pd.DataFrame, model: Any, prediction: Prediction, task: Task, perturbation: str, context: str, path: Path
) -> Path:
    import anndata as ad
    import matplotlib

    if not matplotlib.is_interactive():
        matplotlib.use("agg")
    import matplotlib.pyplot as plt
    import scanpy as sc

    from pertura import pl
    from pertura.metrics import measured_effect

    effect = model.get_perturbation_effect(perturbation, adata=task.controls.copy(), ci=LEVEL)
    keys = {"perturbation_key": "perturbation", "control": task.dataset.control, "context_key": "context"}
    measured = measured_effect(task.truth, perturbation, **keys)
    figure, axes = plt.subplots(1, 3, figsize=(13, 4.2), layout="constrained", width_ratios=[1.1, 1, 1])
    pl.effect_scatter(effect, measured, title=f"{perturbation} in {context} (not in training)", ax=axes[0])
    gene = str(effect.loc[effect["lfc_mean"].abs().idxmax(), "gene"])
    cells = ad.concat([task.truth, prediction.cells], join="outer", index_unique="-", keys=["truth", "predicted"])
    kind = np.where(cells.obs["perturbation"] == task.dataset.control, "control", "measured").astype(object)
    kind[cells.obs_names.str.endswith("-predicted")] = "predicted"
    cells.obs = cells.obs.astype("category")
    cells.obs["cells"] = pd.Categorical(kind, ["control", "predicted", "measured"])
    sc.pl.violin(
        cells, gene, groupby="cells", ax=axes[1], show=False, stripplot=False, ylabel="log1p counts per 10,000"
    )
    axes[1].set_title(f"{gene}, {context}")
    pl.benchmark(scores, "pearson_effect_top", ax=axes[2])
    axes[2].set_xlabel(f"r of the effect, top {min(TOP, cells.n_vars)} genes")
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path
