"""Sharded zarr collections, written and read by annbatch."""

from __future__ import annotations

import pickle
import sys

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData
from scipy import sparse
from scvi import settings

import pertura
from pertura.data import _cells
from pertura.data._cells import Expression
from pertura.data._collection import Shards


def test_without_annbatch_the_error_names_the_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "annbatch", None)
    for call in (pertura.pp.to_collection, pertura.pp.read_collection):
        arguments = (AnnData(np.ones((2, 2))), tmp_path / "x.zarr")[call is pertura.pp.read_collection :]
        with pytest.raises(ImportError, match=r"pertura\[scale\]"):
            call(*arguments)


@pytest.fixture
def annbatch():
    return pytest.importorskip("annbatch", reason="annbatch has no release for Python 3.11")


def cells(n, first, labels, rng):
    """The first gene is the number of the cell."""
    x = rng.poisson(0.5, (n, 6)).astype(np.float32)
    x[:, 0] = np.arange(first, first + n)
    obs = pd.DataFrame({"label": pd.Categorical(rng.choice(labels, n))}, index=np.arange(first, first + n).astype(str))
    var = pd.DataFrame(index=[f"g{j}" for j in range(6)])
    return AnnData(sparse.csr_matrix(x), obs=obs, var=var, layers={"dense": 2 * x})


@pytest.mark.usefixtures("annbatch")
def test_cells_of_many_files_with_what_was_done_to_them(tmp_path):
    rng = np.random.default_rng(0)
    parts = [cells(300, 0, ["ctrl", "A"], rng), cells(200, 300, ["B"], rng), cells(100, 500, ["ctrl", "C"], rng)]
    parts[1][:, ::-1].copy().write_h5ad(tmp_path / "one.h5ad")
    parts[2].write_zarr(tmp_path / "two.zarr")
    given = [parts[0], tmp_path / "one.h5ad", tmp_path / "two.zarr"]
    before = parts[0].copy()
    found = pertura.pp.to_collection(given, tmp_path / "all.zarr", shard_size=250, seed=1)
    assert parts[0].obs.equals(before.obs), "what was given stays as it is"
    whole = ad.concat(parts)
    at = whole.obs_names.get_indexer(found.obs_names)
    assert sorted(at) == list(range(600)) and (np.diff(at) < 0).mean() > 0.3
    assert found.obs["label"].astype(str).tolist() == whole.obs["label"].astype(str).iloc[at].tolist()
    assert set(found.obs["label"].cat.categories) == {"ctrl", "A", "B", "C"}
    assert found.obs["src_path"].astype(str).str.contains("one.h5ad").sum() == 200
    assert len(list((tmp_path / "all.zarr").glob("dataset_*"))) == 3

    rows = np.array([599, 3, 3, 250, 0, 251, 17])
    for layer in (None, "dense"):
        read = Expression.of(found, layer, whole.var_names[[2, 0]], "counts")
        expected = (whole.X.toarray() if layer is None else whole.layers[layer])[at[rows]][:, [2, 0]]
        assert isinstance(read.values, Shards) and not read.in_memory
        assert isinstance(Expression.of(found.copy(), layer, whole.var_names, "counts").values, Shards)
        np.testing.assert_array_equal(read.rows(rows), expected)
        np.testing.assert_array_equal(pickle.loads(pickle.dumps(read)).rows(rows), expected)
    # some of the cells are no longer the collection
    some = Expression.of(found[at < 300], None, whole.var_names, "counts")
    assert not isinstance(some.values, Shards)
    np.testing.assert_array_equal(some.rows(np.arange(300))[:, 0], at[at < 300])

    again = pertura.pp.to_collection(given, tmp_path / "again.zarr", shard_size=250, seed=1)
    other = pertura.pp.to_collection(given, tmp_path / "other.zarr", shard_size=250, seed=2)
    assert again.obs_names.equals(found.obs_names) and not other.obs_names.equals(found.obs_names)


@pytest.mark.usefixtures("annbatch")
def test_what_is_no_collection_is_refused(tmp_path):
    rng = np.random.default_rng(0)
    one = cells(20, 0, ["ctrl"], rng)
    other = one[:, :5].copy()
    path = tmp_path / "x.zarr"
    with pytest.raises(ValueError, match="genes of '1' are not those of '0' .*g5"):
        pertura.pp.to_collection([one, other], path)
    with pytest.raises(ValueError, match="must end in '.zarr'"):
        pertura.pp.to_collection(one, tmp_path / "x")
    with pytest.raises(ValueError, match="is empty"):
        pertura.pp.to_collection([], path)
    with pytest.raises(ValueError, match="no file"):
        pertura.pp.to_collection(tmp_path / "nothing.h5ad", path)
    with pytest.raises(ValueError, match="`shard_size`"):
        pertura.pp.to_collection(one, path, shard_size=0)
    columns = AnnData(sparse.csc_matrix(one.X))
    columns.write_h5ad(tmp_path / "columns.h5ad")
    for source in (columns, tmp_path / "columns.h5ad"):
        with pytest.raises(ValueError, match="stored by columns"):
            pertura.pp.to_collection(source, path)
    with pytest.raises(ValueError, match="no collection"):
        pertura.pp.read_collection(path)
    one.write_zarr(path)
    with pytest.raises(ValueError, match="exists"):
        pertura.pp.to_collection(one, path)
    with pytest.raises(ValueError, match="no collection"):
        pertura.pp.read_collection(path)


@pytest.mark.usefixtures("annbatch")
def test_losses_are_those_of_a_backed_file_in_the_same_order(monkeypatch, tmp_path):
    """Windows of a quarter of the cells; the same three lines whatever holds them."""
    from pertura.model import SAMSVAE

    adata = pertura.datasets.simulate(
        n_cells_per_condition=60, n_genes=30, n_regulators=8, n_perturbations=8, n_contexts=2, n_truth_cells=20
    )
    adata.X = sparse.csr_matrix(adata.layers["counts"])
    del adata.layers["counts"]
    collection = pertura.pp.to_collection(adata, tmp_path / "x.zarr", shard_size=400)
    adata[collection.obs_names].write_h5ad(tmp_path / "x.h5ad")
    for name, value in {"_WINDOW": 256, "_MIN_WINDOW": 256}.items():
        monkeypatch.setattr(_cells, name, value)
    loss = []
    for data in (collection, ad.read_h5ad(tmp_path / "x.h5ad", backed="r")):
        monkeypatch.setattr(settings, "seed", 0)
        torch.manual_seed(0)
        SAMSVAE.setup_anndata(data, perturbation_key="perturbation", control="control", context_key="cell_type")
        model = SAMSVAE(data)
        model.train(max_epochs=3, batch_size=64, seed=0, accelerator="cpu", enable_progress_bar=False)
        loss.append(model.history["elbo_train"].to_numpy(float).ravel())
    assert loss[0][0] > loss[0][-1]
    np.testing.assert_allclose(*loss, rtol=1e-5)
