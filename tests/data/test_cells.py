"""Reading cells from where they are, and minibatches of them."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData
from scipy import sparse
from scvi import settings
from scvi.data import AnnDataManager
from scvi.data.fields import CategoricalObsField

from pertura.data import KEYS, ContextField, PerturbationDataModule, PerturbationField
from pertura.data._cells import Batch, CellDataset, Expression
from pertura.data._datamodule import PairSampler
from pertura.data._fields import ExpressionField
from pertura.data._pairs import explicit_coupling


@pytest.fixture
def adata():
    rng = np.random.default_rng(0)
    counts = rng.poisson(2.0, size=(12, 5)).astype(np.float32)
    obs = pd.DataFrame(
        {
            "label": ["ctrl", "A", "B"] * 4,
            "type": ["x", "y"] * 6,
            "lane": ["1"] * 6 + ["2"] * 6,
            "size": np.linspace(1, 2, 12),
        },
        index=[f"c{i}" for i in range(12)],
    )
    return AnnData(sparse.csr_matrix(counts), obs=obs, var=pd.DataFrame(index=list("abcde")))


def register(adata, size=None, **options):
    fields = [
        ExpressionField(None, size),
        PerturbationField("label", "ctrl", **options),
        ContextField(KEYS.CONTEXT, "type"),
        CategoricalObsField(KEYS.BATCH, "lane"),
    ]
    manager = AnnDataManager(fields=fields)
    manager.register_fields(adata)
    return manager


# -- expression -----------------------------------------------------------------------------------------------------


@pytest.fixture(params=["array", "csr", "csc", "csr_array", "backed", "backed dense", "dask"])
def stored(request, adata, tmp_path):
    dense = adata.X.toarray()
    forms = {"csr": sparse.csr_matrix, "csc": sparse.csc_matrix, "csr_array": sparse.csr_array, "array": np.asarray}
    if request.param in forms:
        adata.X = forms[request.param](dense)
        return adata, dense
    if request.param == "dask":
        dask = pytest.importorskip("dask.array")
        adata.X = dask.from_array(dense, chunks=(5, 5))
        return adata, dense
    adata.X = dense if request.param.endswith("dense") else sparse.csr_matrix(dense)
    adata.write_h5ad(tmp_path / "x.h5ad")
    return ad.read_h5ad(tmp_path / "x.h5ad", backed="r"), dense


@pytest.mark.parametrize("genes", [list("abcde"), list("edcba"), list("db")])
def test_rows_and_genes_in_the_order_asked(stored, genes):
    adata, dense = stored
    expression = Expression.of(adata, None, genes, "counts")
    rows = np.array([5, 3, 3, 11, 0])
    found = expression.rows(rows)
    assert found.dtype == np.float32 and found.flags["C_CONTIGUOUS"] and found.flags["WRITEABLE"]
    np.testing.assert_array_equal(found, dense[rows][:, ["abcde".index(g) for g in genes]])


def test_missing_and_doubled_genes(adata):
    with pytest.raises(ValueError, match=r"`adata`: 2 of the model's 3 genes are missing \(y, z\)"):
        Expression.of(adata, None, ["a", "y", "z"], "counts")
    adata.var_names = list("aacde")
    with pytest.raises(ValueError, match="1 gene names occur more than once .*'a'"):
        Expression.of(adata, None, ["a"], "counts")


# -- minibatches ----------------------------------------------------------------------------------------------------


def test_tensors_of_cells(stored):
    adata, dense = stored
    dataset = CellDataset(register(adata))
    rows = np.array([7, 1, 4])
    tensors = dataset[Batch(rows, 2)]
    assert tensors.pop("n_pairs") == 2
    assert all(t.dtype == torch.float32 and len(t) == 3 for t in tensors.values())
    np.testing.assert_array_equal(tensors[KEYS.X], dense[rows])
    assert tensors[KEYS.PERTURBATION].tolist() == [[0, 1], [0, 1], [0, 1]]
    assert tensors[KEYS.CONTEXT].flatten().tolist() == [1, 1, 0]
    assert tensors[KEYS.BATCH].flatten().tolist() == [1, 0, 0]
    np.testing.assert_array_equal(tensors[KEYS.LIBRARY].flatten(), dense[rows].sum(1))
    assert (len(dataset), dataset.n_genes) == (12, 5)


def test_library_of_empty_cells_and_of_other_data(adata):
    counts = adata.X.toarray()
    counts[0] = 0
    adata.X = counts
    assert CellDataset(register(adata))[Batch(np.array([0]), 0)][KEYS.LIBRARY].item() == 1
    adata.X = counts * 0.5 - 1
    tensors = CellDataset(register(adata))[Batch(np.arange(12), 0)]
    assert (tensors[KEYS.LIBRARY] == 1).all()
    # also of a minibatch that happens to have no negative values: the kind of the data decides
    adata.X = np.vstack([counts[1:2] * 0 - 1, counts[1:]])
    assert CellDataset(register(adata))[Batch(np.arange(3, 6), 0)][KEYS.LIBRARY].flatten().tolist() == [1, 1, 1]


@pytest.mark.parametrize(("unit", "expected"), [(1.0, 1.0), (1e-4, 1.0), (300.0, 300.0)])
def test_library_from_size_factors(adata, unit, expected):
    """Totals are taken as they are, relative factors in units of the counts that there are."""
    total = np.asarray(adata.X.sum(1)).ravel()
    adata.obs["size"] = total * unit
    tensors = CellDataset(register(adata, size="size"))[Batch(np.arange(12), 0)]
    np.testing.assert_allclose(tensors[KEYS.LIBRARY].flatten(), total * expected, rtol=1e-5)


def test_new_data_keep_the_unit_of_relative_size_factors(adata):
    manager = register(adata, size="size")
    other = adata[:6].copy()
    other.X = other.X * 10
    found, own = (
        CellDataset(m)[Batch(np.arange(6), 0)][KEYS.LIBRARY] for m in (manager.transfer_fields(other), manager)
    )
    assert torch.equal(found, own)


# -- fields ---------------------------------------------------------------------------------------------------------


def test_transfer_keeps_genes_kind_and_vocabulary(adata):
    manager = register(adata)
    other = adata[[1, 2]][:, list("edcba")].copy()
    other.obs["label"] = ["new", "B"]
    other.obs["type"] = ["z", "x"]
    transferred = manager.transfer_fields(other)
    state = transferred.get_state_registry(KEYS.X)
    assert list(state["column_names"]) == list("abcde") and state["data_kind"] == "counts"
    assert other.obsm["_scvi_perturbation"].tolist() == [[-2, 1], [1, 1]]
    assert other.obs["_scvi_context"].tolist() == [2, 0]
    np.testing.assert_array_equal(
        CellDataset(transferred)[Batch(np.array([1, 0]), 0)][KEYS.X], adata.X.toarray()[[2, 1]]
    )
    other.X = other.X * 0.5
    with pytest.raises(ValueError, match="trained on counts, but these values are not"):
        manager.transfer_fields(other)


def test_registered_perturbations_are_shown(adata, capsys):
    adata.obs["dose"] = [0.0, 0.5, 2.0] * 4
    manager = register(adata, dose_key="dose")
    manager.view_registry()
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("ctrl (control)", "0.5"))


# -- loaders --------------------------------------------------------------------------------------------------------


def batches(sampler):
    return list(sampler)


def test_plain_minibatches():
    rows = np.arange(100, 203)
    sampler = PairSampler(rows, None, batch_size=20, shuffle=True, seed=1)
    first, second = batches(sampler), batches(sampler)
    assert len(first) == len(sampler) == 5
    for epoch in (first, second):
        assert sorted(r for b in epoch for r in b.rows) == rows.tolist()
        assert {len(b.rows) for b in epoch} <= {20, 21}
        assert all(b.n_pairs == 0 for b in epoch)
    assert [b.rows.tolist() for b in first] != [b.rows.tolist() for b in second]
    again = PairSampler(rows, None, batch_size=20, shuffle=True, seed=1)
    assert [b.rows.tolist() for b in again] == [b.rows.tolist() for b in first]


def test_without_shuffling_epochs_are_equal():
    is_control = np.arange(40) < 10
    coupling = explicit_coupling(np.arange(40), is_control, np.full(40, "a", object))
    sampler = PairSampler(np.arange(40), coupling, batch_size=10, shuffle=False)
    one, two = ([b.rows.tolist() for b in sampler] for _ in range(2))
    assert one == two


@pytest.mark.parametrize("singletons", [True, False])
def test_pairs_and_singletons(singletons):
    """Every treated cell once, with a control of its stratum; every other cell once, unless it is somebody's partner."""
    rows = np.arange(60)
    is_control, stratum = rows < 25, rows % 2
    stratum[55:] = 2  # treated cells without controls
    coupling = explicit_coupling(rows, is_control, stratum.astype(str).astype(object))
    sampler = PairSampler(rows, coupling, batch_size=16, shuffle=True, singletons=singletons)
    for _ in range(3):
        pre, single, post = [], [], []
        for batch in sampler:
            n = batch.n_pairs
            pre.extend(batch.rows[:n])
            post.extend(batch.rows[len(batch.rows) - n :])
            single.extend(batch.rows[n : len(batch.rows) - n])
        assert sorted(post) == list(range(25, 55))
        assert all(stratum[a] == stratum[b] and is_control[a] for a, b in zip(pre, post, strict=True))
        assert sorted(single) == (sorted(set(rows) - set(pre) - set(post)) if singletons else [])


def test_processes_share_an_epoch(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 3)
    parts = []
    for rank in range(3):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda r=rank: r)
        sampler = PairSampler(np.arange(100), None, batch_size=10, shuffle=True, seed=4)
        own = batches(sampler)
        assert len(own) == len(sampler) == 3
        parts.append({int(r) for b in own for r in b.rows})
    assert not parts[0] & parts[1] and not parts[0] & parts[2] and not parts[1] & parts[2]


def test_data_module(adata, monkeypatch):
    manager = register(adata)
    module = PerturbationDataModule(manager, np.arange(6), np.arange(6, 9), batch_size=4, seed=0)
    assert module.test_idx.tolist() == [9, 10, 11]
    assert (module.n_train, module.n_val) == (6, 3)
    loaded = list(module.train_dataloader())
    assert sum(len(t[KEYS.X]) for t in loaded) == 6 and isinstance(loaded[0]["n_pairs"], int)
    assert sum(len(t[KEYS.X]) for t in module.val_dataloader()) == 3
    assert PerturbationDataModule(manager, np.arange(12), np.arange(0)).val_dataloader() == []
    rows = np.array([3, 1, 2])
    in_order = torch.cat([t[KEYS.X] for t in module.iterate(rows, batch_size=2)])
    np.testing.assert_array_equal(in_order, adata.X.toarray()[rows])
    monkeypatch.setattr(settings, "dl_num_workers", 1)
    worked = list(PerturbationDataModule(manager, np.arange(6), np.arange(0), batch_size=4, seed=0).train_dataloader())
    for a, b in zip(loaded, worked, strict=True):
        assert all(torch.equal(a[k], b[k]) for k in a if k != "n_pairs")


def test_numbers_of_columns_are_converted_once_and_not_for_each_minibatch():
    adata = AnnData(sparse.random(50, 6, 0.5, "csr", np.float32, random_state=0))
    adata.X.indptr = adata.X.indptr.astype(np.int64)  # as some files have it
    found = Expression.of(adata, None, adata.var_names, "counts")
    assert found.values.indices.dtype == found.values.indptr.dtype == np.int32
    assert np.shares_memory(found.values.data, adata.X.data)
    np.testing.assert_array_equal(found.rows(np.array([7, 3])), adata.X.toarray()[[7, 3]])
