"""Time and memory of SAMSVAE against cells, genes and perturbations, from a file that stays on disk.

Each size is a process of its own. Expression is random, 10 % of it not zero. Seconds are those of the processor, on one thread, so that
other jobs on the machine matter little; memory is the largest that the process had, of which imports are about 0.6 GiB.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
from anndata import AnnData, read_h5ad
from lightning.pytorch.callbacks import Callback

BASE = {"n_cells": 10_000, "n_genes": 2000, "n_perturbations": 100}
SIZES = {"n_cells": (1000, 100_000), "n_genes": (200, 20_000), "n_perturbations": (10, 1000)}
_BLOCK = 4000


def write_screen(path: str | Path, n_cells: int, n_genes: int, n_perturbations: int) -> None:
    """An h5ad file of a random screen, block by block; each perturbation triples or reduces 30 genes."""
    rng = np.random.default_rng(0)
    rate = rng.beta(0.6, 5.4, n_genes).astype(np.float32)
    effect = np.ones((n_perturbations + 1, n_genes), np.float32)
    for row in effect[1:]:
        row[rng.choice(n_genes, 30, replace=False)] = rng.choice([0.3, 3.0], 30)
    label = np.where(rng.random(n_cells) < 0.1, 0, rng.integers(1, n_perturbations + 1, n_cells))
    names = np.array(["control", *(f"P{k}" for k in range(n_perturbations))])
    obs = pd.DataFrame({"perturbation": pd.Categorical.from_codes(label, names)}, index=np.arange(n_cells).astype(str))
    AnnData(obs=obs, var=pd.DataFrame(index=[f"g{g}" for g in range(n_genes)])).write_h5ad(path)
    with h5py.File(path, "r+") as file:
        file.pop("X", None)
        x = file.create_group("X")
        x.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": [n_cells, n_genes]})
        stored = {"maxshape": (None,), "chunks": (2**18,), "compression": "lzf"}
        data, indices = (x.create_dataset(n, (0,), dtype=t, **stored) for n, t in (("data", "f4"), ("indices", "i4")))
        ends = [np.zeros(1, np.int64)]
        for start in range(0, n_cells, _BLOCK):
            own = label[start : start + _BLOCK]
            there = rng.random((len(own), n_genes), dtype=np.float32) < np.minimum(rate * effect[own], 0.9)
            columns = np.nonzero(there)[1]
            ends.append(ends[-1][-1] + np.cumsum(there.sum(1)))
            for target, values in ((data, rng.geometric(0.6, len(columns))), (indices, columns)):
                target.resize((int(ends[-1][-1]),))
                target[-len(columns) :] = values
        x.create_dataset("indptr", data=np.concatenate(ends))


class _Clock(Callback):
    """Seconds of the processor since the last call, by what was done."""

    def __init__(self) -> None:
        self.seconds, self._last, self.n_steps = {}, time.process_time(), 0

    def note(self, what: str) -> None:
        now = time.process_time()
        self.seconds[what], self._last = now - self._last, now

    def on_train_start(self, *_: Any) -> None:
        self.note("before_first_step_s")

    def on_train_batch_end(self, *_: Any) -> None:
        self.n_steps += 1

    def on_train_end(self, *_: Any) -> None:
        self.note("step_ms")
        self.seconds["step_ms"] *= 1e3 / self.n_steps


def measure(path: str | Path, batch_size: int = 256, n_steps: int = 30) -> dict[str, float]:
    """Register, train some steps and measure effects, from a backed file or a collection."""
    import pertura
    from pertura.model import SAMSVAE

    clock = _Clock()
    adata = pertura.pp.read_collection(path) if str(path).endswith(".zarr") else read_h5ad(path, backed="r")
    SAMSVAE.setup_anndata(adata, perturbation_key="perturbation", control="control")
    clock.note("register_s")
    options = {"batch_size": batch_size, "accelerator": "cpu", "enable_progress_bar": False, "max_steps": n_steps}
    SAMSVAE(adata).train(max_epochs=n_steps, seed=0, callbacks=[clock], **options)
    clock.note("after_last_step_s")
    return {**clock.seconds, "memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}


def study(sizes: dict[str, Sequence[int]]) -> pd.DataFrame:
    """One row per size; one number is changed at a time."""
    rows = [{**BASE, name: size} for name, values in sizes.items() for size in values]
    result = []
    for row in [BASE, *rows]:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "screen.h5ad"
            write_screen(path, **row)
            words = [sys.executable, __file__, "--file", str(path)]
            printed = subprocess.run(words, check=True, capture_output=True, text=True).stdout
        found = dict(line.split("=") for line in printed.split() if "=" in line)
        result.append({**row, **{name: float(value) for name, value in found.items()}})
        print(result[-1], flush=True)
    return pd.DataFrame(result)


def slopes(table: pd.DataFrame) -> pd.DataFrame:
    """Of the logarithm of each cost by that of each size: 0 does not grow, 1 grows in proportion."""
    rows = []
    for name in BASE:
        others = [n for n in BASE if n != name]
        part = table[(table[others] == pd.Series(BASE)[others]).all(axis=1)].sort_values(name)
        costs = part.drop(columns=list(BASE)).clip(lower=1e-3)
        rows.append({"by": name, **(np.log(costs).diff().div(np.log(part[name]).diff(), axis=0).iloc[1:].mean())})
    return pd.DataFrame(rows)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the study, or one size of it."""
    from _common import parser, show, start

    words = parser(__doc__, seeds=1)
    words.add_argument("--file", help="measure this file alone")
    options = start(words, argv)
    if options.file:
        print(*(f"{name}={value:.4g}" for name, value in measure(options.file).items()))
        return
    table = study(SIZES)
    show(table)
    show(slopes(table))


if __name__ == "__main__":
    main()
