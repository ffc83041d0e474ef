"""``pertura datasets list [--files]`` and ``pertura datasets fill SOURCE [CACHE]``."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence

from ._catalog import CATALOG
from ._fetch import cache_dir, fill_cache, registry


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Parameters
    ----------
    arguments
        Words of the command line without the program; default ``sys.argv[1:]``.

    Returns
    -------
    Exit status: 0, or 1 if ``fill`` left a file missing or found one with other bytes.
    """
    parser = argparse.ArgumentParser(prog="pertura datasets", description="Public data sets of pertura.")
    commands = parser.add_subparsers(dest="command", required=True)
    listing = commands.add_parser("list", help="list the data sets: size, what was measured, keys for setup_anndata")
    listing.add_argument(
        "--files", action="store_true", help="list the files: key, bytes, cached or not, path, licence"
    )
    fill = commands.add_parser("fill", help="fill the cache from a folder of these files, verified by SHA256")
    fill.add_argument("source", help="folder that holds the files")
    fill.add_argument("cache", nargs="?", help="folder to fill (default: the cache, PERTURA_DATA_DIR or the system's)")
    options = parser.parse_args(arguments)
    if options.command == "fill":
        return _fill(options.source, options.cache)
    return _list_files() if options.files else _list()


def _list() -> int:
    folder, files = cache_dir(), registry()
    lines = []
    for name, entry in CATALOG.items():
        cached = all((folder / files[key].file).is_file() for key in entry.files)
        where = "in the package" if name == "kang_2018_mini" else "cached" if cached else "downloaded on first use"
        size = f"{entry.rows:,} x {entry.genes:,}"
        lines += [f"{name:21} {size:>14}  {entry.about} [{where}]"]
        if entry.keys:
            lines += [" " * 38 + ", ".join(f"{key}={value!r}" for key, value in entry.keys.items())]
    lines += [
        "",
        "Sizes are cells (or profiles) x genes. Load one with `pertura.datasets.NAME()`; the second line is what",
        "`setup_anndata` takes. `pertura.datasets` also has networks, gene sets, drugs and a simulator.",
        f"Cache: {folder} (`pertura datasets list --files` shows what it holds)",
    ]
    sys.stdout.write("\n".join(lines) + "\n")
    return 0


def _list_files() -> int:
    folder = cache_dir()
    lines = [f"cache: {folder}"]
    for key, entry in registry().items():
        cached = "cached" if (folder / entry.file).is_file() else "-"
        lines.append(f"{key:32} {entry.bytes:>9} {cached:6} {entry.file}  [{entry.licence}]")
    sys.stdout.write("\n".join(lines) + "\n")
    return 0


def _fill(source: str, cache: str | None) -> int:
    try:
        report = fill_cache(source, cache)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    bad = [f"{status}: {registry()[key].file}\n" for key, status in report.items() if status in {"missing", "mismatch"}]
    counts = ", ".join(f"{number} {status}" for status, number in sorted(Counter(report.values()).items()))
    sys.stdout.write(f"{cache or cache_dir()}: {counts}\n")
    sys.stderr.write("".join(bad))
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
