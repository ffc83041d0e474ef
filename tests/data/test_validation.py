"""Kinds of values, and MuData annotations, in closed form; wrong arguments are tried in tests/model."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from mudata import MuData
from scipy import sparse

from pertura.data import _mudata
from pertura.data import _validation as validation


def matrix(values):
    return AnnData(np.asarray(values, dtype=np.float32))


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([[0, 1], [2, 300]], "counts"),
        ([[0, 1], [2, 0.5]], "continuous"),
        ([[0, 1], [2, -1]], "continuous"),
    ],
)
@pytest.mark.parametrize("form", [np.asarray, sparse.csr_matrix, sparse.csc_matrix])
def test_kind_of_values(values, kind, form):
    adata = matrix(values)
    adata.X = form(adata.X)
    assert validation.check_expression(adata, None) == kind


def test_every_chunk_is_looked_at(monkeypatch, tmp_path):
    monkeypatch.setattr(validation, "_CHECK_ROWS", 2)
    adata = matrix([[1], [1], [1], [1], [0.5]])
    assert validation.check_expression(adata, None) == "continuous"
    assert validation.check_expression(adata, None, np.arange(4)) == "counts"
    assert validation.check_expression(adata, None, np.array([0, 3])) == "counts"
    assert validation.check_expression(adata, None, np.array([0, 1, 4])) == "continuous"
    adata.X = sparse.csr_matrix(adata.X)
    adata.write_h5ad(tmp_path / "x.h5ad")
    backed = ad.read_h5ad(tmp_path / "x.h5ad", backed="r")
    assert validation.check_expression(backed, None) == "continuous"
    assert validation.check_expression(backed, None, np.array([0, 2, 3])) == "counts"


def test_integers_and_words():
    adata = AnnData(np.array([[1, 2]]))
    assert validation.check_expression(adata, None) == "counts"
    adata = matrix([[1, 2]])
    adata.layers["words"] = np.array([["a", "b"]])
    with pytest.raises(ValueError, match="`layer`: .* values, not numbers"):
        validation.check_expression(adata, "words")
    with pytest.raises(ValueError, match="`adata.X` is empty"):
        validation.check_expression(AnnData(obs=pd.DataFrame(index=["a"]), var=pd.DataFrame(index=["b"])), None)


def test_close_names_are_suggested():
    adata = matrix([[1, 2]])
    adata.obs["condition"] = "a"
    with pytest.raises(ValueError, match="Did you mean 'condition'"):
        validation.check_obs_key(adata, "perturbation_key", "Condition")
    adata = matrix([[1, 2], [2, 1]])
    adata.obs["condition"] = ["control", "stim"]
    with pytest.raises(ValueError, match="Did you mean 'control'"):
        validation.check_perturbations(adata, "condition", "Control", "+")


def test_features_from_genes():
    """Embeddings of genes describe their perturbation, whatever their storage."""
    adata = matrix([[1, 2, 3]])
    adata.var_names = ["A", "B", "C"]
    adata.varm["dense"] = np.arange(6.0).reshape(3, 2)
    adata.varm["sparse"] = sparse.csr_matrix(adata.varm["dense"])
    adata.varm["frame"] = pd.DataFrame(adata.varm["dense"], index=adata.var_names, columns=["u", "v"])
    for key in ("dense", "sparse", "frame"):
        table = validation.check_features(adata, key, ["B", "elsewhere"])
        assert table.loc["B"].tolist() == [2.0, 3.0]
        assert table.index.tolist() == ["A", "B", "C"] and table.dtypes.unique() == [np.float32]


# -- MuData ---------------------------------------------------------------------------------------------------------


SETTINGS = {
    "rna_mod": "rna",
    "perturbation_mod": "drug",
    "perturbation_layer": None,
    "target_key": None,
    "values": "dose",
    "threshold": 0.0,
    "control": "DMSO",
    "delimiter": "+",
    "obs_keys": ["plate", "type"],
}


@pytest.fixture
def mdata():
    cells = list("abcd")
    rna = AnnData(np.ones((4, 2), np.float32), obs=pd.DataFrame({"type": list("xxyy")}, index=cells))
    doses = np.array([[0, 0, 1], [0.1, 0, 0], [2, 1e-7, 0], [0, 0, 0]], np.float32)
    drug = AnnData(sparse.csr_matrix(doses[::-1]), obs=pd.DataFrame(index=cells[::-1]))
    drug.var_names = ["Z", "A", "DMSO"]
    mdata = MuData({"rna": rna, "drug": drug})
    mdata.obs["plate"] = ["p", "q", "p", "q"]
    return mdata


def test_labels_and_doses_of_a_matrix(mdata):
    table = _mudata.perturbations_of_matrix(mdata, SETTINGS)
    assert table.index.tolist() == list("abcd")
    assert table["label"].tolist() == ["DMSO", "Z", "A+Z", "DMSO"]
    assert table["dose"].tolist() == ["0", "0.1", "1e-07+2", "0"]


def test_thresholds_and_targets(mdata):
    mdata["drug"].var["class"] = ["k", "k", "DMSO"]
    found = _mudata.perturbations_of_matrix(mdata, {**SETTINGS, "values": "presence", "threshold": 0.5})
    assert found["label"].tolist() == ["DMSO", "DMSO", "Z", "DMSO"] and list(found) == ["label"]
    found = _mudata.perturbations_of_matrix(mdata, {**SETTINGS, "target_key": "class"})
    assert found["label"].tolist() == ["DMSO", "k", "k", "DMSO"]
    assert found["dose"].tolist() == ["0", "0.1", "2", "0"], "the highest dose of a target counts"


def test_annotations_are_what_is_missing(mdata):
    before = list(mdata["rna"].obs)
    found = _mudata.annotations(mdata, SETTINGS)
    assert set(found) == {_mudata.LABEL, _mudata.DOSE, "plate"}
    assert found["plate"].tolist() == ["p", "q", "p", "q"]
    assert list(mdata["rna"].obs) == before


def test_values_that_are_not_finite(mdata):
    mdata["drug"].X = mdata["drug"].X.toarray()
    mdata["drug"].X[0, 0] = np.nan
    with pytest.raises(ValueError, match="`perturbation_mod`: .* NaN"):
        _mudata.annotations(mdata, SETTINGS)


def test_descriptions_that_say_nothing(caplog):
    adata = AnnData(np.ones((2, 2)))
    adata.uns["some"] = pd.DataFrame({"a": [1.0, 0.0], "b": [0.0, 0.0]}, index=["B", "C"])
    validation.check_features(adata, "some", ["B"])
    assert "all features of C are 0 in 'some'" in caplog.text
    adata.uns["none"] = adata.uns["some"] * 0
    with pytest.raises(ValueError, match="`perturbation_features_key`: every value of 'none' is 0"):
        validation.check_features(adata, "none", ["B"])
