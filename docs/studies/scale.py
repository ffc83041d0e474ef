"""Time and memory of SAMSVAE against cells, genes and perturbations, from a file that stays on disk.

Each size is a process of its own. Expression is random, 10 % of it not zero. Seconds are those of the processor, on one thread, so that
other jobs on the machine matter little; memory is the largest that the process had, of which imports are about 0.6 GiB.

``--cold 200000`` trains on so many cells in memory, from a backed file and from a collection in turn, each time after the system forgot
the files (Linux only), in seconds of the clock and of the processor. ``--peak 200000 1000000`` trains an epoch, measures effects, saves and predicts, for each number of cells.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import islice, product
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import pyro
from anndata import AnnData, read_h5ad
from h5py._hl.filters import guess_chunk
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
        # as anndata's `write_h5ad` would, compressed
        chunks = guess_chunk((int(n_cells * n_genes * 0.1),), None, 4)
        stored = {"maxshape": (None,), "chunks": chunks, "compression": "lzf"}
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


def measure(path: str | Path, batch_size: int = 256, n_steps: int | None = 30) -> dict[str, float]:
    """Register, train some steps, or an epoch, and measure effects; save and predict. From a backed file or a collection."""
    import pertura
    from pertura.model import SAMSVAE

    clock = _Clock()
    adata = pertura.pp.read_collection(path) if str(path).endswith(".zarr") else read_h5ad(path, backed="r")
    SAMSVAE.setup_anndata(adata, perturbation_key="perturbation", control="control")
    clock.note("register_s")
    options = {"batch_size": batch_size, "accelerator": "cpu", "enable_progress_bar": False}
    options |= {"max_epochs": 1} if n_steps is None else {"max_epochs": n_steps, "max_steps": n_steps}
    model = SAMSVAE(adata)
    model.train(seed=0, callbacks=[clock], **options)
    clock.note("after_last_step_s")
    with tempfile.TemporaryDirectory() as folder:
        model.save(Path(folder) / "model")
        model.predict_perturbation(["P1"], adata=adata[:2000], out=Path(folder) / "predicted.zarr")
    clock.note("predict_s")
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {**clock.seconds, "n_steps": clock.n_steps, "memory_gib": memory}


def _state() -> tuple[int, float, float]:
    """Bytes that came from the disk, seconds of the processor and of the clock."""
    n_bytes = int(Path("/proc/self/io").read_text().split("\nread_bytes: ")[1].split()[0])
    return n_bytes, time.process_time(), time.perf_counter()


def _forget(path: Path) -> None:
    """Let the system forget all files under a path."""
    for file in [path, *path.rglob("*")]:
        if file.is_file():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
                os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def throughput(file: Path, rounds: int = 5, batch_size: int = 512, n_steps: int = 16) -> pd.DataFrame:
    """Cells per second of steps of one model by source, in turn; each time the system has forgotten the files.

    What is read ahead at the end of a turn is waited for. Arbitrary rows have a few steps each time.
    """
    import torch

    import pertura
    from pertura.data import PerturbationDataModule
    from pertura.model import SAMSVAE

    torch.set_num_threads(1)
    setup: dict[str, Any] = {"perturbation_key": "perturbation", "control": "control"}
    with tempfile.TemporaryDirectory() as folder:
        memory, backed, collection = read_h5ad(file), read_h5ad(file, backed="r"), Path(folder) / "screen.zarr"
        sources = {"memory": (memory, Path(os.devnull)), "blocks": (backed, file)}
        if sys.version_info >= (3, 12):
            sources["collection"] = pertura.pp.to_collection(file, collection), collection
        sources["arbitrary rows"] = backed, file
        some = memory[:20_000].copy()
        SAMSVAE.setup_anndata(some, **setup)
        model = SAMSVAE(some)
        model.train(max_epochs=1, max_steps=1, accelerator="cpu", enable_progress_bar=False)
        module, elbo = model.module.train(), pyro.infer.TraceMeanField_ELBO()
        optimizer = torch.optim.Adam(module.parameters(), 1e-4)
        data, batches = {}, {}
        for name, (adata, _) in sources.items():
            SAMSVAE.setup_anndata(adata, **setup)
            rows, manager = np.arange(adata.n_obs), SAMSVAE(adata).adata_manager
            data[name] = PerturbationDataModule(manager, rows, rows[:0], batch_size=batch_size)
            if name == "arbitrary rows":
                data[name]._train.window = None
            batches[name] = iter(data[name].train_dataloader())
        result = []
        for turn, (name, (_, path)) in product(range(rounds), sources.items()):
            n = 2 if name == "arbitrary rows" else n_steps
            _forget(path)
            before = _state()
            for batch in islice(batches[name], n):
                args, kwargs = module._get_fn_args_from_batch(batch)
                optimizer.zero_grad()
                (elbo.differentiable_loss(module.model, module.guide, *args, **kwargs) / batch_size).backward()
                optimizer.step()
            if data[name].dataset._ahead is not None:
                data[name].dataset._ahead[1].result()
            disk, processor, clock = (b - a for a, b in zip(before, _state(), strict=True))
            row = {"round": turn, "source": name, "step_ms": 1e3 * clock / n, "processor_ms": 1e3 * processor / n}
            result.append({**row, "cells_per_s": batch_size * n / clock, "from_disk_kb_per_step": disk / n / 1e3})
            print(result[-1], flush=True)
    table = pd.DataFrame(result)
    for what, cost in (("of_memory", "step_ms"), ("of_memory_processor", "processor_ms")):
        base = table[table["source"] == "memory"].set_index("round")[cost]
        table[what] = base.loc[table["round"]].to_numpy() / table[cost].to_numpy()
    return table.groupby("source", sort=False).median().drop(columns="round").reset_index()


def measured(row: dict[str, int], *words: str) -> dict[str, float]:
    """What a process of its own measures of a new file of some size."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "screen.h5ad"
        write_screen(path, **row)
        command = [sys.executable, __file__, "--file", str(path), *words]
        printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = dict(line.split("=") for line in printed.split() if "=" in line)
    result = {**row, **{name: float(value) for name, value in found.items()}}
    print(result, flush=True)
    return result


def study(sizes: dict[str, Sequence[int]]) -> pd.DataFrame:
    """One row per size; one number is changed at a time."""
    return pd.DataFrame([measured({**BASE, name: size}) for name, values in sizes.items() for size in values])


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
    words.add_argument("--file", help="measure this file or collection alone")
    words.add_argument("--epoch", action="store_true", help="with --file: train an epoch in steps of 512 cells")
    words.add_argument("--cold", type=int, metavar="CELLS", help="training from the disk beside training from memory")
    words.add_argument("--peak", type=int, nargs="+", metavar="CELLS", help="an epoch of 1,000 perturbations")
    options = start(words, argv)
    if options.file:
        asked = {"batch_size": 512, "n_steps": None} if options.epoch else {}
        print(*(f"{name}={value:.4g}" for name, value in measure(options.file, **asked).items()))
    elif options.cold:
        with tempfile.TemporaryDirectory() as folder:
            write_screen(Path(folder) / "screen.h5ad", options.cold, 2000, 1000)
            show(throughput(Path(folder) / "screen.h5ad"))
    elif options.peak:
        show(pd.DataFrame([measured({**BASE, "n_cells": n, "n_perturbations": 1000}, "--epoch") for n in options.peak]))
    else:
        table = study({"n_cells": [BASE["n_cells"]], **SIZES})
        show(table)
        show(slopes(table))


if __name__ == "__main__":
    main()
