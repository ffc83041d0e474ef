"""Which library a cell has: totals that were registered, recovered from X, or of the registered genes."""

from __future__ import annotations

import logging

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
from anndata import AnnData
from scipy import sparse

from pertura import datasets
from pertura.data._cells import Expression
from pertura.data._fields import sources
from pertura.data._library import Library, describe, find_library, stream, unit_of_counts


@pytest.fixture(scope="module")
def kang() -> AnnData:
    """Every fourth cell, all genes; libraries are total counts."""
    adata = datasets.kang_2018_mini()[::4].copy()
    adata.obs["n"] = np.asarray(adata.layers["counts"].sum(1)).ravel()
    return adata


@pytest.fixture
def some(kang):
    """The 60 most variable genes of all cells, with the X of all genes; normalized with a target sum."""

    def genes(target_sum: float | None = 1e4, *, before: bool = True) -> AnnData:
        adata = kang.copy()
        own = adata.var_names[np.argsort(-adata.X.toarray().var(0))[:60]]
        adata = adata if before else adata[:, own].copy()
        adata.X = adata.layers["counts"].copy()
        sc.pp.normalize_total(adata, target_sum=target_sum)
        sc.pp.log1p(adata)
        return adata[:, own].copy()

    return genes


def found(adata, key=None, layer="counts"):
    expression, x = sources(adata, layer, adata.var_names, "counts", key is None)
    return find_library(expression, x, adata.obs, layer, key)


def warned(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


# -- recovered from X -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [sparse.csr_matrix, sparse.csc_matrix, sparse.csr_array, np.asarray, "backed"])
def test_libraries_are_recovered_exactly(some, form, tmp_path, caplog):
    adata = some()
    if form == "backed":
        adata.write_h5ad(tmp_path / "some.h5ad")
        adata = ad.read_h5ad(tmp_path / "some.h5ad", backed="r")
    else:
        adata.X = form(adata.X.toarray())
        adata.layers["counts"] = form(adata.layers["counts"].toarray())
    state, values = found(adata)
    assert (state["source"], state["target_sum"], state["rest"]) == ("X", 1e4, True)
    np.testing.assert_array_equal(values, adata.obs["n"])
    kept = np.asarray(adata.layers["counts"].sum(1)).ravel()
    assert state["share"] == pytest.approx(np.median(kept / adata.obs["n"]))
    assert "recovered from the log-normalized X" in describe(state, 60)
    assert warned(caplog) == []


@pytest.mark.parametrize("target_sum", [None, 1e6, 2000.0, 50_000.0])
def test_other_target_sums_are_found_and_said(some, kang, caplog, target_sum):
    """scanpy's default is the median library."""
    state, values = found(some(target_sum))
    assert state["target_sum"] == (target_sum or kang.obs["n"].median())
    np.testing.assert_array_equal(values, kang.obs["n"])
    assert len(warned(caplog)) == 1 and "X is log1p of counts per" in warned(caplog)[0].replace("`adata.X`", "X")


def test_cells_without_counts_have_the_median_library(some):
    adata = some()
    counts, x = adata.layers["counts"].toarray(), adata.X.toarray()
    counts[3] = x[3] = 0
    adata.layers["counts"], adata.X = counts, x
    state, values = found(adata)
    assert values[3] == pytest.approx(adata.obs["n"].median(), rel=0.02)
    np.testing.assert_array_equal(np.delete(values, 3), np.delete(adata.obs["n"].to_numpy(), 3))
    assert state["source"] == "X"


@pytest.mark.parametrize("what", ["all genes", "normalized after selection", "counts", "none", "scaled"])
def test_otherwise_they_are_totals_of_the_genes(kang, some, caplog, what):
    adata = kang.copy() if what == "all genes" else some(before=what != "normalized after selection")
    if what in ("counts", "none"):
        adata.X = adata.layers["counts"].copy() if what == "counts" else None
    if what == "scaled":
        adata.X = adata.X.toarray() - 0.3
    state, values = found(adata)
    assert (state["source"], state["rest"], values) == ("total", False, None)
    assert describe(state, 60) == "total counts of the 60 registered genes"
    assert warned(caplog) == []


def test_x_of_other_counts_is_said(some, caplog):
    adata = some()
    adata.X = adata.X.sqrt()
    assert found(adata)[0]["source"] == "total"
    (message,) = warned(caplog)
    assert "`layer`" in message and "`size_factor_key`" in message and "'counts'" in message


def test_x_of_other_counts_in_some_cells_is_an_error(some, monkeypatch):
    monkeypatch.setattr("pertura.data._library._SAMPLE", 100)  # the cell is not among them
    adata = some()
    x = adata.X.toarray()
    x[1] *= 0.9
    adata.X = x
    with pytest.raises(ValueError, match="`adata`: .* in 1 of 389 cells"):
        found(adata)


def test_totals_that_are_there_are_said(some, caplog):
    adata = some()
    adata.X = adata.layers["counts"].copy()
    adata.obs["total_counts"] = adata.obs["n"]
    found(adata)
    assert "`size_factor_key`: `adata.obs['total_counts']`" in warned(caplog)[0]
    caplog.clear()
    adata.obs["total_counts"] = np.asarray(adata.X.sum(1)).ravel()
    found(adata)
    assert warned(caplog) == []


def test_unit_of_counts():
    counts = np.array([[1.0, 2, 0, 5], [0, 0, 0, 0], [3, 1, 1, 0], [3, 1, 1, 0]])
    x = np.log1p(counts * np.array([[0.5], [1], [2.0], [2.0]]))
    x[2, 1] *= 1.1
    x[3, 3] = 1.0  # nothing was counted
    for form in (np.asarray, sparse.csr_matrix):
        unit, consistent = unit_of_counts(form(counts), form(x))
        np.testing.assert_allclose(unit, [0.5, np.nan, 2, 2])
        assert consistent.tolist() == [True, False, False, False]


# -- registered -----------------------------------------------------------------------------------------------------


def test_totals_of_whole_cells(some):
    state, values = found(some(), "n")
    assert (state["source"], state["unit"], state["rest"]) == ("size_factor", None, True)
    np.testing.assert_array_equal(values, some().obs["n"])
    assert "obs['n']" in describe(state, 60)


def test_totals_of_the_same_genes_leave_no_rest(kang):
    assert not found(kang, "n")[0]["rest"]


def test_relative_factors_are_in_units_of_the_registered_genes(some):
    adata = some()
    adata.obs["size"] = adata.obs["n"] / adata.obs["n"].mean()
    state, values = found(adata, "size")
    kept = np.asarray(adata.layers["counts"].sum(1)).ravel()
    assert state["unit"] == pytest.approx(np.median(kept / adata.obs["size"])) and not state["rest"]
    np.testing.assert_allclose(values, adata.obs["size"] * state["unit"])
    assert "relative size factors" in describe(state, 60)


def test_totals_below_the_counts_are_refused(some):
    adata = some()
    adata.obs["n"] *= 0.2
    with pytest.raises(ValueError, match=r"`size_factor_key`: `adata.obs\['n'\]` .* is smaller .* in \d+ of 389 cells"):
        found(adata, "n")


def test_data_that_are_not_counts():
    adata = AnnData(np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32))
    expression = Expression.of(adata, None, adata.var_names, "continuous")
    state, values = find_library(expression, None, adata.obs, None, None)
    assert values is None and stream(Library(state), expression, 5).tolist() == [1] * 5


# -- cells that a model is asked about ------------------------------------------------------------------------------


def of_query(state, adata, genes, rows):
    expression, x = sources(adata, "counts", genes, "counts", True)
    library = Library.of_query(state, expression, x, adata.obs, rows)
    return library.of(rows, expression.stored(rows))


@pytest.mark.parametrize("target_sum", [1e4, None])
@pytest.mark.parametrize("all_genes", [False, True])
def test_queries_by_the_same_rule(some, kang, target_sum, all_genes):
    own = some()
    state, _ = found(own)
    asked = kang.copy() if all_genes else some(target_sum)
    rows = np.arange(0, 200)
    np.testing.assert_array_equal(of_query(state, asked, own.var_names[::-1], rows), asked.obs["n"].iloc[rows])


def test_a_query_of_one_cell(some):
    state, _ = found(some())
    assert of_query(state, some(), some().var_names, np.array([7])) == [some().obs["n"].iloc[7]]


@pytest.mark.parametrize("what", ["counts", "scaled", "none", "normalized after"])
def test_queries_without_libraries_are_refused(some, what):
    state, _ = found(some())
    asked = some(before=what != "normalized after")
    changed = {"counts": asked.layers["counts"].copy(), "none": None, "scaled": asked.X.toarray() - 1}
    asked.X = changed.get(what, asked.X)
    with pytest.raises(ValueError, match="`adata`: the model reads the libraries .*normalize_total"):
        of_query(state, asked, asked.var_names, np.arange(100))


def test_totals_of_a_query_must_fit(some):
    adata = some()
    state, _ = found(adata, "n")
    adata.obs["n"] = pd.Series(1.0, adata.obs_names)
    with pytest.raises(ValueError, match="`size_factor_key`: the totals in .* in 100 of 100 cells"):
        of_query(state, adata, adata.var_names, np.arange(100))
