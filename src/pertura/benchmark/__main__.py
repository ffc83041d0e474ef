"""``python -m pertura.benchmark DATA``: run a benchmark and print its summary."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

import pandas as pd

from pertura.datasets import DataNotAvailable

from ._compounds import run_compounds, summarise_compounds
from ._dataset import ALIASES, KINDS
from ._doses import run_doses
from ._drug_targets import drug_targets
from ._few_cells import FEW_CELLS, FEW_CELLS_METRICS, default_models, run_few_cells, summarise_few_cells
from ._grn import beeline_data, grn_models, run_grn, summarise_grn
from ._grn_model import grn_knockouts, grn_speed, summarise_knockouts
from ._l1000 import run_l1000, summarise_l1000
from ._norman import norman_pairs, norman_singles
from ._planted import run_planted, summarise_planted
from ._runner import DEFAULT_METRICS, run
from ._screens import ht115_screen, tggates_conditions, tggates_screen
from ._spec import parse_model
from ._speed import run_speed
from ._summary import summarise

#: Screen, protocol, epochs, and correlation of replicates above which compounds are also reported by themselves.
_COMPOUNDS = {
    "compounds-tggates": (tggates_screen, run_compounds, 15, None),
    "compounds-tggates-all": (tggates_conditions, run_compounds, 4, None),  # as many steps, of four times the profiles
    "compounds-tggates-dose": (tggates_conditions, run_doses, 15, None),
    "compounds-ht115": (ht115_screen, run_compounds, 15, 0.3),
}
_NETWORKS = {"grn": "go_bp", "grn-biobert": "biobert"}
# results that are tables of their own
_TABLES = {
    "drug-targets": lambda seeds: drug_targets(seeds=seeds),
    "grn-speed": lambda seeds: grn_speed(),
    "grn-planted": lambda seeds: summarise_planted(run_planted(seeds=seeds, train={"max_epochs": 20})),
    "grn-knockouts": lambda seeds: summarise_knockouts(grn_knockouts(seeds=seeds)),
    "norman-pairs": lambda seeds: norman_pairs(seeds=seeds),
    "norman-singles": lambda seeds: norman_singles(seeds=seeds),
    "speed": lambda seeds: run_speed(),
}
_EPILOG = """\
examples:
  python -m pertura.benchmark kang --seeds 3 --models PertVAE --out kang.csv
  python -m pertura.benchmark kang --models PertVAE PertVAE:preset=paper Linear --seeds 1
  python -m pertura.benchmark norman --split unseen_combination --models Additive PertVAE --out norman.csv
  python -m pertura.benchmark papalexi --seeds 3 --cells 10 20 50 all --out papalexi.csv
  python -m pertura.benchmark norman-pairs --seeds 3
  python -m pertura.benchmark speed
  python -m pertura.benchmark l1000 --seeds 3 --out l1000.csv
  python -m pertura.benchmark compounds-tggates --seeds 5 --out tggates.csv
  python -m pertura.benchmark drug-targets --seeds 1
  python -m pertura.benchmark grn --seeds 10 --out grn.csv
  python -m pertura.benchmark grn-speed
  python -m pertura.benchmark grn-knockouts --seeds 3
  python -m pertura.benchmark grn-planted --seeds 3
  python -m pertura.benchmark grn --models correlation "one-hot LR" "embedding cosine" --out grn.csv

A model is a class of pertura.model or pertura.baseline with arguments after a colon:
PertVAE:n_latent=10,train.max_epochs=50. Results in --out are kept: what is in it is not run again.
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pertura.benchmark",
        description="Train models on what a split leaves, score what it holds out, beside baselines and ceiling.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "data",
        help=f"{', '.join(sorted(ALIASES))}, any loader of pertura.datasets, or l1000 (the paper's Table 1), "
        "compounds-tggates, compounds-tggates-all or compounds-ht115 (DrugAAE on compounds that are held out), "
        "compounds-tggates-dose (on a dose that is), drug-targets (those that DrugAAE finds), grn or grn-biobert "
        "(networks of mouse dendritic cells, embeddings from GO or BioBERT), grn-speed (time of an epoch of InfoSEM), "
        "grn-knockouts (knock-outs it predicts from control cells), grn-planted (GPOVAE on simulated networks), "
        "norman-pairs (of genes that were seen alone), norman-singles (genes that were not, embeddings from GO), "
        "speed (training steps of SAMSVAE beside a bare loop)",
    )
    parser.add_argument(
        "--models",
        nargs="+",
        metavar="MODEL",
        help="default: PertVAE; few_cells: SAMSVAE beside a conditional VAE; grn: all",
    )
    parser.add_argument(
        "--split",
        choices=(*KINDS, FEW_CELLS),
        help="question (default: unseen_context; few_cells for papalexi: half of the cells, thinned to --cells of each "
        "perturbation, against the other half)",
    )
    parser.add_argument("--cells", nargs="+", default=["10", "20", "50", "all"], metavar="N", help="of few_cells")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds (default: %(default)s)")
    parser.add_argument("--metrics", nargs="+", metavar="METRIC", help="default: those of the question")
    parser.add_argument("--out", metavar="CSV", help="file of results, continued if it exists")
    parser.add_argument("--plot", metavar="PNG", help="figure of the summary")
    parser.add_argument("--skip-errors", action="store_true", help="leave models out of splits they refuse")
    return parser


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
    parser = _parser()
    options = parser.parse_args(argv)
    split = options.split or (FEW_CELLS if options.data == "papalexi" else "unseen_context")
    if options.plot and (options.data in ("l1000", *_NETWORKS, *_TABLES, *_COMPOUNDS) or split == FEW_CELLS):
        parser.error(f"--plot draws summaries of held-out conditions; {options.data} has none.")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        by_name = options.data in _NETWORKS
        models = (
            {}
            if by_name or options.data in _TABLES
            else dict(parse_model(text) for text in options.models or ["PertVAE"])
        )
        if by_name:
            table = _grn(options.data, options.models, options.seeds, options.out)
        elif options.data in _TABLES:
            table = _TABLES[options.data](options.seeds)
        elif options.data == "l1000":
            table = summarise_l1000(run_l1000(models=models, seeds=options.seeds, out=options.out))
        elif options.data in _COMPOUNDS:
            screen, protocol, epochs, agreeing = _COMPOUNDS[options.data]
            found = protocol(screen(), seeds=options.seeds, model={}, train={"max_epochs": epochs}, out=options.out)
            table = summarise_compounds(found, agreeing=agreeing)
        elif split == FEW_CELLS:
            results = run_few_cells(
                options.data,
                models if options.models else default_models(),
                sizes=[None if text == "all" else _whole(text) for text in options.cells],
                seeds=options.seeds,
                metrics=options.metrics or FEW_CELLS_METRICS,
                out=options.out,
                on_error="skip" if options.skip_errors else "raise",
            )
            table = summarise_few_cells(results)
        else:
            results = run(
                options.data,
                models,
                splits=split,
                seeds=options.seeds,
                metrics=options.metrics or DEFAULT_METRICS,
                out=options.out,
                on_error="skip" if options.skip_errors else "raise",
            )
            table = summarise(results)
    except (ValueError, DataNotAvailable) as error:
        parser.error(str(error))
    with pd.option_context("display.width", 220, "display.max_columns", None, "display.max_rows", None):
        drop = [c for c in ("dataset", "split") if c in table and table[c].nunique() == 1]
        sys.stdout.write(table.drop(columns=drop).to_string(index=False, float_format="%.3f") + "\n")
    if options.plot:
        import matplotlib.pyplot as plt

        from pertura import pl

        names = list(dict.fromkeys(table["metric"]))
        figure, axes = plt.subplots(1, len(names), figsize=(4.2 * len(names), 3.2), squeeze=False, layout="constrained")
        for metric, ax in zip(names, axes[0], strict=True):
            pl.benchmark(table, metric=metric, ax=ax)
        figure.savefig(options.plot, dpi=150)
        plt.close(figure)
    return 0


def _whole(text: str) -> int:
    if not text.isdigit():
        raise ValueError(f"`--cells` takes whole numbers or 'all', got {text!r}.")
    return int(text)


def _grn(data: str, names: Sequence[str] | None, seeds: int, out: str | None) -> pd.DataFrame:
    """Summary of the benchmark of networks."""
    known = grn_models()
    unknown = [n for n in names or () if n not in known]
    if unknown:
        raise ValueError(f"`models`: {unknown} are none of {list(known)}.")
    adata, truths = beeline_data(_NETWORKS[data])
    chosen = {n: known[n] for n in names or known}
    return summarise_grn(run_grn(adata, truths, chosen, seeds=seeds, dataset=data, out=out))


if __name__ == "__main__":
    raise SystemExit(main())
