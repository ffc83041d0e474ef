"""Training cells of files: windows of neighboring rows."""

from __future__ import annotations

import sys

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
import zarr
from anndata import AnnData
from anndata.io import sparse_dataset, write_elem
from scipy import sparse
from scvi import settings
from scvi.data import AnnDataManager

from pertura.data import KEYS, ContextField, PerturbationDataModule, PerturbationField, _cells
from pertura.data._cells import CHUNK, Batch, CellDataset, Expression
from pertura.data._datamodule import PairSampler
from pertura.data._fields import ExpressionField
from pertura.data._pairs import random_coupling, strata

WINDOW, N = 1024, 6000


class File:
    """A matrix that can not be read but by ranges of rows; the first gene is the number of the row."""

    format = "csr"

    def __init__(self, n):
        self.shape = (n, 3)
        self.reads = []

    def __getitem__(self, rows):
        assert isinstance(rows, slice), "single rows were asked for"
        self.reads.append((rows.start, rows.stop))
        row = np.arange(rows.start, rows.stop)
        return sparse.csr_matrix(np.column_stack([row, np.ones(len(row)), np.zeros(len(row))]))


def cells(n, manager=None):
    """A dataset that reads a `File`."""
    dataset = CellDataset(manager or registered(AnnData(np.ones((n, 3), np.float32))))
    dataset.expression = Expression(File(n), None, "counts")
    return dataset


def registered(adata):
    n = adata.n_obs
    # sorted, as files of screens are
    adata.obs = pd.DataFrame(
        {"label": np.repeat(["ctrl", *"ABCDEFG"], -(-n // 8))[:n], "type": np.where(np.arange(n) % 2, "x", "y")},
        index=np.arange(n).astype(str),
    )
    manager = AnnDataManager(
        fields=[ExpressionField(None, None), PerturbationField("label", "ctrl"), ContextField(KEYS.CONTEXT, "type")]
    )
    manager.register_fields(adata)
    return manager


def paired(rows, control):
    stratum = pd.DataFrame({"context": rows % 3})
    return random_coupling(rows, control, strata(stratum, control, ["context"]))


def sampler(rows, coupling=None, *, batch_size=64, **options):
    return PairSampler(
        rows, coupling, batch_size=batch_size, **{"shuffle": True, "window": WINDOW, "seed": 3, **options}
    )


def parts(batch):
    n, m = batch.n_pairs, len(batch.rows)
    return batch.rows[:n], batch.rows[n : m - n], batch.rows[m - n :]


ROWS = np.setdiff1d(np.arange(N), np.arange(7, N, 10))  # validation cells are between


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("n_control", [0, 300, 3000])
@pytest.mark.parametrize("n_workers", [0, 1, 2])
def test_every_cell_once_from_few_reads(shuffle, n_control, n_workers):
    control = np.arange(len(ROWS)) >= len(ROWS) - n_control
    coupling = paired(ROWS, control) if n_control else None
    stream, dataset = sampler(ROWS, coupling, shuffle=shuffle, n_workers=n_workers), cells(N)
    file = dataset.expression.values
    for _ in range(2):
        file.reads.clear()
        pre, single, post, sizes = [], [], [], []
        batches, turns = list(stream), max(1, n_workers)
        for batch in (b for k in range(turns) for b in batches[k::turns]):  # of one worker after the other
            np.testing.assert_array_equal(dataset[batch][KEYS.X][:, 0], batch.rows)
            for found, some in zip((pre, single, post), parts(batch), strict=True):
                found.extend(some)
            assert all(len(rows) <= WINDOW + 64 for rows in batch.held) and len(batch.held) <= 2
            assert len(dataset._held) == len(batch.held)
            sizes.append(len(batch.rows))
        assert sorted(post) == (ROWS[~control].tolist() if n_control else [])
        assert sorted(single) == sorted(set(ROWS) - set(pre) - set(post))
        assert all(a % 3 == b % 3 for a, b in zip(pre, post, strict=True)) and control[np.isin(ROWS, pre)].all()
        assert len(sizes) == len(stream) and max(sizes) - min(sizes) <= 0.1 * max(sizes)
        # a window ends within a chunk
        n_chunks, n_windows = N / CHUNK, len(sizes) * np.mean(sizes) / WINDOW + 2
        assert len(file.reads) <= n_chunks + n_windows + bool(n_control) * (1 + n_control / CHUNK)
        read = np.concatenate([np.arange(*r) for r in file.reads])
        assert len(read) <= 1.05 * N + min(n_control, WINDOW + 2 * CHUNK)


def test_order_depends_on_seed_and_epoch_only():
    def rows(stream):
        return [batch.rows.tolist() for batch in stream]

    stream, again = sampler(ROWS), sampler(ROWS)
    first, second = rows(stream), rows(stream)
    assert first == rows(again) and second == rows(again) and first != second
    assert first == rows(sampler(ROWS, n_workers=1)) and first != rows(sampler(ROWS, seed=4))
    # neighbors in a minibatch come from all over the file, and their order is not the file's
    assert all(len(np.unique(np.array(b) // CHUNK)) >= 7 for b in first)
    assert all((np.diff(b) < 0).mean() > 0.3 and np.ptp(b) > N / 3 for b in first)


def test_cells_that_fit_come_in_the_order_of_memory():
    rows = ROWS[:900]
    coupling = paired(rows, rows < 200)
    one, two = list(sampler(rows, coupling)), list(sampler(rows, coupling, window=None))
    assert [b.rows.tolist() for b in one] == [b.rows.tolist() for b in two]
    dataset = cells(N)
    for batch in one:
        dataset[batch]
    assert len(dataset.expression.values.reads) == 1
    assert not two[0].held


@pytest.mark.skipif(sys.platform != "linux", reason="processes are forked")
def test_processes_read_their_own_rows(fork):
    def target(rank):
        torch.distributed.init_process_group("gloo", rank=rank, world_size=3)
        stream = sampler(ROWS, paired(ROWS, ROWS < 500))
        own = list(stream)
        assert len(own) == len(stream) == round(len(ROWS) / 64) // 3
        return np.concatenate([np.concatenate(parts(b)[1:]) for b in own])

    codes, found = fork(target, n=3)
    assert codes == [0, 0, 0]
    everything = np.concatenate(found)
    assert len(everything) == len(np.unique(everything))
    assert set(ROWS[ROWS >= 500]) <= set(everything)


def test_reservoir_has_controls_of_all_strata_and_all_controls_in_time():
    control = ROWS < 3000
    coupling = paired(ROWS, control)
    rng, seen = np.random.default_rng(0), []
    for _ in range(40):
        some = coupling.reservoir(600, rng)
        held = np.unique(some.partners)
        assert len(held) == 600 and np.bincount(held % 3).tolist() == [200, 200, 200]
        # 600 cells of anywhere would be in all 24 chunks
        assert len(np.unique(held // CHUNK)) <= 7
        drawn = some.draw(rng)
        assert np.isin(drawn, held).all() and (drawn % 3 == some.treated % 3).all()
        seen.append(drawn)
    times = np.bincount(np.concatenate(seen), minlength=N)[ROWS[control]]
    # each chunk is expected in ten of the forty, and all its controls are alike
    assert (times > 0).mean() > 0.99 and times.max() < 4 * times.mean()
    assert coupling.reservoir(int(control.sum()), rng) is coupling


@pytest.fixture(params=["h5ad sparse", "h5ad dense", "zarr sparse", "zarr dense"])
def backed(request, tmp_path):
    rng = np.random.default_rng(0)
    x = rng.poisson(1.0, (2000, 6)).astype(np.float32)
    x[:, 0] = np.arange(2000)
    stored = sparse.csr_matrix(x) if request.param.endswith("sparse") else x
    if request.param.startswith("h5ad"):
        AnnData(stored).write_h5ad(tmp_path / "x.h5ad")
        return ad.read_h5ad(tmp_path / "x.h5ad", backed="r"), x
    group = zarr.open_group(tmp_path / "x.zarr", mode="w")
    write_elem(group, "X", stored)
    return AnnData(sparse_dataset(group["X"]) if request.param.endswith("sparse") else group["X"]), x


@pytest.mark.parametrize("n_workers", [0, 1, 2])
def test_files_by_any_number_of_workers(backed, monkeypatch, n_workers):
    adata, x = backed
    monkeypatch.setattr(_cells, "_WINDOW", 512)
    monkeypatch.setattr(_cells, "_MIN_WINDOW", 512)
    monkeypatch.setattr(settings, "dl_num_workers", n_workers)
    rows = np.arange(0, 1700)
    module = PerturbationDataModule(registered(adata), rows, np.arange(1700, 2000), batch_size=50, seed=0)
    for _ in range(2):
        loaded = torch.cat([t[KEYS.X] for t in module.train_dataloader()]).numpy()
        assert sorted(loaded[:, 0]) == rows.tolist() and (np.diff(loaded[:, 0]) < 0).mean() > 0.3
        np.testing.assert_array_equal(loaded, x[loaded[:, 0].astype(int)])
        validated = torch.cat([t[KEYS.X] for t in module.val_dataloader()]).numpy()
        np.testing.assert_array_equal(validated[np.argsort(validated[:, 0])], x[1700:])


def test_a_window_is_smaller_where_rows_are_large():
    class Dense:
        shape = (10, 30_000)

    assert Expression(Dense(), None, "counts").window == 2**27 // 120_000
    Dense.shape = (10, 100)
    assert Expression(Dense(), None, "counts").window == 8192
    assert Expression(np.ones((10, 100)), None, "counts").window is None


@pytest.mark.parametrize(("stored", "together"), [(None, 128), (1000, 128), (30_000, 300), (10**6, 512)])
def test_rows_that_are_compressed_together_are_read_together(stored, together):
    class Elements:
        shape, chunks = (2_000_000,), None if stored is None else (stored,)

    class Sparse:
        shape, group = (20_000, 2000), {"indices": Elements}

    assert Expression(Sparse(), None, "counts").chunk == together
    assert Expression(np.ones((10, 100)), None, "counts").chunk == CHUNK
    assert len(np.unique(next(iter(sampler(ROWS, chunk=together))).rows // together)) <= WINDOW / together + 1


def test_the_next_window_is_read_meanwhile():
    dataset, batches = cells(N), list(sampler(ROWS))
    file, first = dataset.expression.values, batches[0]
    dataset[first]
    dataset._ahead[1].result()
    n_reads = len(file.reads)
    # nothing is left to read for the first minibatch of the next window
    second = next(b for b in batches if not np.array_equal(b.held[0], first.held[0]))
    dataset[second._replace(ahead=None)]
    np.testing.assert_array_equal(dataset._held[0][0], second.held[0])
    assert len(file.reads) == n_reads and batches[-1].ahead is None


def test_an_error_in_reading_ahead_is_raised():
    dataset, batches = cells(N), list(sampler(ROWS))
    dataset[batches[0]._replace(ahead=None)]
    dataset.expression = Expression(None, None, "counts")  # the file is gone
    dataset[batches[0]]
    with pytest.raises(TypeError):
        for batch in batches:
            dataset[batch]


def test_loss_of_a_file_is_that_of_memory(monkeypatch, tmp_path):
    """A file that is sorted by perturbation, in windows of a quarter of its cells."""
    from pertura import datasets
    from pertura.model import SAMSVAE

    adata = datasets.simulate(
        n_cells_per_condition=120, n_genes=30, n_regulators=8, n_perturbations=8, n_contexts=2, n_truth_cells=20
    )
    adata = adata[np.argsort(adata.obs["perturbation"].astype(str), kind="stable")].copy()
    adata.X = sparse.csr_matrix(adata.layers["counts"])
    del adata.layers["counts"]
    adata.write_h5ad(tmp_path / "x.h5ad")
    for name, value in {"_WINDOW": 512, "_MIN_WINDOW": 512, "CHUNK": 32}.items():
        monkeypatch.setattr(_cells, name, value)
    loss, held = [], []
    read = CellDataset.__getitem__

    def noted(self, batch: Batch):
        held.append(len(batch.held))
        return read(self, batch)

    monkeypatch.setattr(CellDataset, "__getitem__", noted)
    for cells in (adata, ad.read_h5ad(tmp_path / "x.h5ad", backed="r")):
        monkeypatch.setattr(settings, "seed", 0)
        torch.manual_seed(0)
        SAMSVAE.setup_anndata(cells, perturbation_key="perturbation", control="control", context_key="cell_type")
        model = SAMSVAE(cells)
        model.train(max_epochs=6, batch_size=64, seed=0, accelerator="cpu", enable_progress_bar=False)
        loss.append(model.history["elbo_train"].to_numpy(float).ravel())
    assert set(held[: len(held) // 2]) == {0} and 1 in held
    memory, file = loss
    fall = memory[0] - memory[-1]
    assert len(file) == 6 and fall > 4
    # minibatches and draws differ from the first step on; both go down alike
    np.testing.assert_allclose(file, memory, atol=0.1 * fall)
