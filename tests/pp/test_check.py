"""One table of what to know before training."""

import logging

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from pertura import baseline, datasets, pp
from pertura.data import _diagnostics
from pertura.pp._check import main

KANG = {"perturbation_key": "condition", "control": "ctrl", "context_key": "cell_type"}


@pytest.fixture(scope="module")
def _kang():
    return datasets.kang_2018_mini()


@pytest.fixture
def kang(_kang, monkeypatch):
    monkeypatch.setattr(_diagnostics, "_said", set())
    adata = _kang.copy()
    adata.obs = adata.obs.astype(dict.fromkeys(adata.obs, str))
    return adata


def found(adata, check, **arguments):
    """Row of a check: status, what was found, what to do."""
    table = pp.check(adata, **{**KANG, **arguments}).set_index("check")
    return table.loc[check, ["status", "found", "what to do"]].tolist()


def warned(adata, caplog, **arguments):
    """What setup logs."""
    caplog.clear()
    with caplog.at_level(logging.WARNING, "pertura"):
        baseline.NoChange.setup_anndata(adata, **{**KANG, **arguments})
    return caplog.text


def scaled(adata, rows, share):
    """Counts of some cells thinned, in the layer."""
    counts = adata.layers["counts"].toarray().astype(int)
    counts[rows] = np.random.default_rng(0).binomial(counts[rows], share)
    adata.layers["counts"] = sparse.csr_matrix(counts.astype(np.float32))
    return adata


def test_no_false_alarms(kang, caplog):
    table = pp.check(kang, layer="counts", **KANG)
    assert list(table) == ["check", "status", "where", "found", "what to do"]
    assert (table["status"] == "ok").all(), table
    assert warned(kang, caplog, layer="counts") == ""
    # log-normalized values are told from counts, and counts found
    status, text, do = found(kang, "scale")
    assert status == "warning" and "log1p of normalized counts" in text and "layer='counts'" in do
    text = warned(kang, caplog)
    assert "Gaussian" in text and "layer='counts'" in text
    assert warned(kang, caplog) == ""  # said once


@pytest.mark.parametrize(
    ("change", "status", "text"),
    [
        (lambda x: x - x.mean(), "problem", "negative"),
        (lambda x: x / 3, "warning", "not the log1p"),
        (lambda x: np.where(x > 5, np.nan, x), "problem", "not finite"),
    ],
)
def test_scale(kang, caplog, change, status, text):
    kang.X = change(kang.X.toarray())
    kang.raw = datasets.kang_2018_mini()
    kang.raw._X = kang.layers.pop("counts")
    assert found(kang, "scale")[0] == status and text in found(kang, "scale")[1]
    assert "adata.raw.to_adata()" in found(kang, "scale")[2]
    assert found(kang, "likelihood")[0] == "warning" and "Gaussian" in found(kang, "likelihood")[1]
    if text != "not finite":
        assert text in warned(kang, caplog) and "adata.raw.to_adata()" in caplog.text
        assert found(kang, "depth")[0] == "warning" and "not known" in found(kang, "depth")[1]


def test_a_part_of_the_genes(kang, caplog):
    """The normalized values tell the library, and with it the depth, which is that of all genes."""
    few = kang[:, :200]
    assert few.is_view
    status, text, _ = found(few, "library", layer="counts")
    assert status == "ok" and "recovered from the log-normalized X" in text and "200 registered genes" in text
    bare = few.copy()
    bare.X = bare.layers.pop("counts")
    bare.raw = datasets.kang_2018_mini()
    bare.raw._X = kang.layers["counts"]
    status, text, do = found(bare, "library")
    assert status == "warning" and "10% of the whole library" in text and "size_factor_key" in do
    assert found(few, "depth", layer="counts")[0] == "ok"
    few = few.copy()
    few.obs["total"] = np.asarray(kang.layers["counts"].sum(1)).ravel()
    status, text, _ = found(few, "library", layer="counts", size_factor_key="total")
    assert status == "ok" and "total counts of whole cells, obs['total']" in text
    few.obs["small"] = 20.0
    status, text, _ = found(few, "library", layer="counts", size_factor_key="small")
    assert status == "problem" and "smaller than the counts" in text
    assert warned(few, caplog, layer="counts") == ""


@pytest.mark.parametrize("layer", ["counts", None])
def test_depth(kang, caplog, layer):
    rows = ((kang.obs["condition"] == "ctrl") & (kang.obs["cell_type"] == "B cells")).to_numpy()
    scaled(kang, rows, 0.25)
    if layer is None:
        kang.X = kang.layers["counts"].multiply(1e4 / kang.layers["counts"].sum(1)).tocsr()
        np.log1p(kang.X.data, out=kang.X.data)
        del kang.layers["counts"]
    status, text, _ = found(kang, "depth", layer=layer)
    ratio = float(text.split(" has ")[1].split()[0])
    assert status == "warning" and "'stim' in 'B cells'" in text and 4 < ratio < 5
    assert "CD8" not in text  # 1.2-fold there
    assert "'stim' in 'B cells' has" in warned(kang, caplog, layer=layer)


def test_labels(kang, caplog):
    labels = kang.obs["condition"].astype(object)
    labels.iloc[:40] = "non-targeting_1"
    labels.iloc[40:80] = "NTC-2"
    labels.iloc[80:120] = "NT5E"
    labels.iloc[120:123] = "IFNB1"
    kang.obs["condition"] = labels
    status, text, do = found(kang, "non-targeting", layer="counts")
    assert status == "warning" and "NTC-2, non-targeting_1" in text and "NT5E" not in text and "'ctrl'" in do
    assert "non-targeting_1" in warned(kang, caplog, layer="counts")
    few = found(kang, "cells", layer="counts")
    assert few[0] == "warning" and "fewer than 10: " in few[1] and "IFNB1" in few[1]
    labels.iloc[:3] = np.nan
    kang.obs["condition"] = labels
    status, text, do = found(kang, "labels", layer="counts")
    assert status == "problem" and text.startswith("3 of ") and "call_guides" in do
    assert found(kang, "perturbations", layer="counts", control="untreated")[0] == "problem"


def test_contexts_and_batches(kang, caplog):
    bare = ((kang.obs["condition"] == "ctrl") & (kang.obs["cell_type"] == "B cells")).to_numpy()
    kang = kang[~bare].copy()
    status, text, _ = found(kang, "controls", layer="counts")
    assert status == "warning" and text == "no controls in B cells"
    assert "no controls in B cells" in warned(kang, caplog, layer="counts")
    assert "1 pairs" not in found(kang, "models", layer="counts")[1]
    kang.obs["batch"] = kang.obs["condition"]
    status, text, _ = found(kang, "batches", layer="counts", batch_key="batch")
    assert status == "warning" and "100%" in text
    kang.obs["batch"] = np.arange(kang.n_obs) % 2
    assert found(kang, "batches", layer="counts", batch_key="batch", context_key=None)[0] == "ok"


def test_doses(kang):
    treated = kang.obs["condition"] == "stim"
    kang.obs["dose"] = np.where(treated, 1.0, 0.0)
    assert found(kang, "doses", dose_key="dose")[0] == "ok"
    kang.obs["dose"] = np.where(treated & (np.arange(kang.n_obs) % 3 == 0), 0.0, 5.0)
    status, text, do = found(kang, "doses", dose_key="dose")
    assert status == "warning" and "perturbed cells have dose 0" in text and "controls have a dose" in text and do
    kang.obs["dose"] = np.where(treated, np.arange(kang.n_obs) + 1.0, 0.0)
    assert found(kang, "doses", dose_key="dose")[0] == "warning"
    kang.obs["dose"] = np.where(treated, np.nan, 0.0)
    assert found(kang, "doses", dose_key="dose")[0] == "problem"


def test_backed_and_command_line(kang, tmp_path, capsys, monkeypatch):
    path = tmp_path / "cells.h5ad"
    kang.write_h5ad(path)
    pd.testing.assert_frame_equal(
        pp.check(anndata.read_h5ad(path, backed="r"), layer="counts", **KANG), pp.check(kang, layer="counts", **KANG)
    )
    arguments = [str(path), "--perturbation-key", "condition", "--control", "ctrl", "--layer", "counts"]
    assert main(arguments) == 0 and "ok       scale" in capsys.readouterr().out
    assert main([*arguments[:4], "nobody"]) == 1 and "problem" in capsys.readouterr().out
    assert main(["nowhere.h5ad", *arguments[1:]]) == 1
    with pytest.raises(ValueError, match="`dose_key`: 'dosis' is not a column"):
        pp.check(kang, dose_key="dosis", **KANG)
    with pytest.raises(ValueError, match="`layer`: 'count' is not in"):
        pp.check(kang, layer="count", **KANG)
