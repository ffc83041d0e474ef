"""The ``pertura`` command.

A thin layer: each subcommand hands its arguments to the ``main(argv)`` of the module that does the work. That
module is imported only then, so that ``pertura --help`` answers at once.
"""

from __future__ import annotations

import argparse
import logging
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

_COMMANDS = {
    "quickstart": (
        "pertura._quickstart",
        "train a model on a small data set and show what it predicts (minutes, CPU)",
    ),
    "benchmark": ("pertura.benchmark.__main__", "score models on held-out conditions of a data set, or of your own"),
    "check": ("pertura.pp._check", "tell what to know of an .h5ad file before training"),
    "datasets": ("pertura.datasets.__main__", "list the public data sets, or fill the cache from a folder"),
}


def _parser() -> argparse.ArgumentParser:
    from pertura import __version__

    parser = argparse.ArgumentParser(
        prog="pertura",
        description="Generative models of how cells respond to perturbations.",
        epilog="`pertura COMMAND --help` says what a command takes.",
    )
    parser.add_argument("--version", action="version", version=f"pertura {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, (_, summary) in _COMMANDS.items():
        # The module's own parser answers `--help`.
        commands.add_parser(name, help=summary, add_help=False)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the ``pertura`` command.

    Parameters
    ----------
    argv
        The command line without the program's name; ``None`` reads :data:`sys.argv`.

    Returns
    -------
    The exit status: 0 if it worked.
    """
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    if args.command is None:
        if rest:
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        parser.print_help()
        return 0
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    module, _ = _COMMANDS[args.command]
    return int(import_module(module).main(rest) or 0)
