"""``pertura benchmark``: score models on held-out conditions of a data set, networks on known edges, or training speed."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Sequence

import pandas as pd

from pertura.datasets import DataNotAvailable

from ._dataset import ALIASES, KINDS, Dataset, make_splits
from ._grn import NETWORK_DATA, grn_models, needs_embedding, network_data, run_grn, summarize_grn
from ._phases import run_phases
from ._runner import DEFAULT_METRICS, run
from ._spec import parse_model
from ._speed import run_speed
from ._summary import summarize

_EPILOG = """\
examples:
  pertura benchmark kang --models PertVAE Linear --seeds 3 --out kang.csv --plot kang.png
  pertura benchmark kang --task few_shot_context --shots 5 10 20 --models EmpiricalBayes Linear
  pertura benchmark norman --task unseen_combination --models Additive SAMSVAE
  pertura benchmark my.h5ad --perturbation-key guide --control NT --context-key line --models PertVAE:n_latent=10

A model is a class of pertura.model or pertura.baseline with arguments after a colon: PertVAE:n_latent=10,train.max_epochs=50.

`pertura benchmark grn --help`: networks against known edges; `pertura benchmark speed --help`: training speed.
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pertura benchmark",
        description="Train models on what a split leaves, score what it holds out, beside baselines and the technical ceiling.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "data", help=f"{', '.join(sorted(ALIASES))}, the name of a loader of pertura.datasets, or an .h5ad file"
    )
    parser.add_argument(
        "--task",
        choices=KINDS,
        help="what is held out (default: unseen_context where the data have contexts, else held_out_cells)",
    )
    parser.add_argument(
        "--shots",
        nargs="+",
        type=float,
        metavar="N",
        help="for few_shot_context: numbers of treated cells of the held-out context that train, or shares below 1 of its "
        "perturbations (default: 5 10 20)",
    )
    parser.add_argument("--models", nargs="+", metavar="MODEL", default=["PertVAE"], help="default: PertVAE")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds (default: %(default)s)")
    parser.add_argument(
        "--metrics",
        nargs="+",
        metavar="METRIC",
        default=DEFAULT_METRICS,
        help="names of pertura.metrics.list_metrics() (default: " + " ".join(DEFAULT_METRICS) + ")",
    )
    parser.add_argument(
        "--controls",
        choices=("halves", "shared"),
        default="halves",
        help="whether models start from other control cells than those that the truth is measured against, or from the same "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--split-seed",
        type=int,
        default=0,
        help="seed of the split and of the halves of controls (default: %(default)s)",
    )
    parser.add_argument("--out", metavar="CSV", help="file of results; runs that are in it are not repeated")
    parser.add_argument("--plot", metavar="PNG", help="file of a figure of the summary")
    parser.add_argument("--skip-errors", action="store_true", help="leave out models that cannot answer a split")
    columns = parser.add_argument_group("columns of your data", "data sets of pertura.datasets know theirs")
    columns.add_argument("--perturbation-key", metavar="COLUMN", help="column of obs with the perturbation of a cell")
    columns.add_argument("--control", metavar="LABEL", help="label of control cells in that column")
    columns.add_argument("--context-key", metavar="COLUMN", help="column of obs with the cell type, line or donor")
    columns.add_argument("--contexts", nargs="+", metavar="NAME", help="use the cells of these contexts alone")
    columns.add_argument("--dose-key", metavar="COLUMN", help="column of obs with the dose")
    columns.add_argument("--layer", help="layer with raw counts, or what models shall read (default: X)")
    return parser


def _conditions(options: argparse.Namespace) -> pd.DataFrame:
    """Held-out conditions of a data set."""
    models = dict(parse_model(text) for text in options.models)
    keys = {k: getattr(options, k) for k in ("perturbation_key", "control", "context_key", "dose_key", "layer")}
    dataset = Dataset.of(options.data, **keys)
    if options.contexts is not None:
        dataset = dataset.only(options.contexts)
    several = dataset.context_key is not None and len(set(dataset.contexts)) > 1
    kind = options.task or ("unseen_context" if several else "held_out_cells")
    if options.shots is not None and kind != "few_shot_context":
        raise ValueError(f"`--shots` is of the task few_shot_context, not of {kind}.")
    few = {} if options.shots is None else {"shots": options.shots}
    table = summarize(
        run(
            dataset,
            models,
            splits=make_splits(dataset, kind, seed=options.split_seed, **few),
            controls=options.controls,
            seeds=options.seeds,
            metrics=options.metrics,
            out=options.out,
            on_error="skip" if options.skip_errors else "raise",
        )
    )
    if options.plot:
        _draw(table, options.plot)
    return table


def _draw(table: pd.DataFrame, path: str) -> None:
    import matplotlib.pyplot as plt

    from pertura import pl

    names = list(dict.fromkeys(table["metric"]))
    figure, axes = plt.subplots(1, len(names), figsize=(4.2 * len(names), 3.2), squeeze=False, layout="constrained")
    for metric, ax in zip(names, axes[0], strict=True):
        pl.benchmark(table, metric=metric, ax=ax)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _grn_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pertura benchmark grn",
        description="Score networks against known ones, on edges of seen genes and of genes that were held out.",
    )
    parser.add_argument("data", nargs="?", choices=NETWORK_DATA, default="beeline_mdc", help="default: %(default)s")
    parser.add_argument("--embedding", choices=("go_bp", "biobert"), default="go_bp", help="default: %(default)s")
    parser.add_argument("--models", nargs="+", metavar="MODEL", help=f"default: all of {', '.join(grn_models())}")
    parser.add_argument("--seeds", type=int, default=3, help="number of splits of each kind (default: %(default)s)")
    parser.add_argument(
        "--model-seeds", type=int, default=1, help="fits of each model, whose scores are averaged (default: 1)"
    )
    parser.add_argument("--out", metavar="CSV", help="file of results; runs that are in it are not repeated")
    return parser


def _grn(options: argparse.Namespace) -> pd.DataFrame:
    known = grn_models()
    unknown = [n for n in options.models or () if n not in known]
    if unknown:
        raise ValueError(f"`--models`: {unknown} are none of {list(known)}.")
    adata, truths = network_data(options.data, options.embedding)
    described = "gene_embedding" in adata.varm
    chosen = {n: known[n] for n in options.models or known if described or not needs_embedding(known[n])}
    dataset = f"{options.data}, {options.embedding}" if described else options.data
    how = {"seeds": options.seeds, "model_seeds": options.model_seeds, "dataset": dataset, "out": options.out}
    return summarize_grn(run_grn(adata, truths, chosen, **how))


def _speed_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pertura benchmark speed",
        description="Time what a user waits for (before the first step, after the last one, predictions) on a simulated "
        "screen, or training steps beside a bare PyTorch loop of the same networks.",
    )
    parser.add_argument(
        "data",
        nargs="?",
        help="data set, .h5ad file or 'simulated': steps beside a bare loop; without it the phases are timed",
    )
    parser.add_argument("--models", nargs="+", default=["SAMSVAE"], help="models (default: SAMSVAE)")
    parser.add_argument(
        "--cells", type=int, default=20_000, help="cells of the simulated screen (default: %(default)s)"
    )
    parser.add_argument("--genes", type=int, default=2000, help="its genes (default: %(default)s)")
    parser.add_argument("--perturbations", type=int, default=200, help="its perturbations (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=None, help="training steps that are timed (default: 40, or 200)")
    return parser


def _speed(options: argparse.Namespace) -> pd.DataFrame:
    sizes = {"n_cells": options.cells, "n_genes": options.genes, "n_perturbations": options.perturbations}
    if options.data is not None:
        data = None if options.data == "simulated" else options.data
        return run_speed(data, options.models, n_steps=options.steps or 200, **sizes)
    return run_phases(options.models, n_steps=options.steps or 40, **sizes)


_Command = Callable[[argparse.Namespace], pd.DataFrame]
# words that are no data set
_WORDS: dict[str, tuple[Callable[[], argparse.ArgumentParser], _Command]] = {
    "grn": (_grn_parser, _grn),
    "speed": (_speed_parser, _speed),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Parameters
    ----------
    argv
        Words of the command line without the program; default ``sys.argv[1:]``.

    Returns
    -------
    Exit status: 0, or 2 for wrong arguments.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    make, command = _WORDS[words.pop(0)] if words and words[0] in _WORDS else (_parser, _conditions)
    parser = make()
    options = parser.parse_args(words)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        table = command(options)
    except (ValueError, DataNotAvailable) as error:
        parser.error(str(error))
    with pd.option_context("display.width", 220, "display.max_columns", None, "display.max_rows", None):
        drop = [c for c in ("dataset", "split") if c in table and table[c].nunique() == 1]
        sys.stdout.write(table.drop(columns=drop).to_string(index=False, float_format="%.3f") + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
