"""Calling gRNAs, against planted ones."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from mudata import MuData
from scipy import sparse

from pertura.pp import call_guides

# mudata 0.3 announces what 0.4 does
pytestmark = pytest.mark.filterwarnings("ignore:From 0.4 .update:FutureWarning")

GUIDES = ["Ag1", "Ag2", "Bg1", "NTg1"]
TARGETS = {"Ag1": "A", "Ag2": "A", "Bg1": "B", "NTg1": "non-targeting"}
#                 Ag1 Ag2 Bg1 NTg1
CASES = np.array(
    [
        [9, 0, 1, 0],  # 0: 90 % Ag1
        [0, 0, 2, 8],  # 1: exactly 80 % NTg1: not more than the threshold
        [0, 0, 19, 81],  # 2: 81 % NTg1
        [5, 0, 5, 0],  # 3: a tie, the first gRNA is called
        [0, 0, 0, 0],  # 4: no counts
        [0, 0, 1, 0],  # 5: one count
        [3, 3, 0, 0],  # 6: two gRNAs of one target
    ]
)


def _adata(counts: np.ndarray = CASES, *, as_sparse: bool = True) -> AnnData:
    counts = np.asarray(counts, dtype=np.float32)
    return AnnData(
        X=sparse.csr_matrix(counts) if as_sparse else counts,
        obs=pd.DataFrame(index=[f"c{i}" for i in range(len(counts))]),
        var=pd.DataFrame({"target": list(TARGETS.values())}, index=GUIDES),
    )


@pytest.mark.parametrize("as_sparse", [True, False])
def test_cases(as_sparse: bool) -> None:
    adata = _adata(as_sparse=as_sparse)
    call_guides(adata)
    obs = adata.obs
    assert obs["gRNA"].astype(object).where(obs["gRNA"].notna(), None).tolist() == [
        "Ag1", "NTg1", "NTg1", "Ag1", None, "Bg1", "Ag1",
    ]  # fmt: skip
    assert obs["perturbation"].astype(object).where(obs["perturbation"].notna(), None).tolist() == [
        "A", "control", "control", "A", None, "B", "A",
    ]  # fmt: skip
    assert obs["confident"].dtype == bool
    assert obs["confident"].tolist() == [True, False, True, False, False, True, False]
    assert obs["gRNA_counts"].tolist() == [10, 10, 100, 10, 0, 1, 6]
    np.testing.assert_allclose(obs["gRNA_fraction"], [0.9, 0.8, 0.81, 0.5, 0, 1, 0.5])


def test_planted_gRNAs_are_found() -> None:
    rng = np.random.default_rng(0)
    n_cells, n_guides = 2000, 30
    planted = rng.integers(n_guides, size=n_cells)
    second = (planted + 1 + rng.integers(n_guides - 1, size=n_cells)) % n_guides
    doublet = rng.random(n_cells) < 0.3
    counts = rng.poisson(0.05, size=(n_cells, n_guides)).astype(float)  # ambient
    rows = np.arange(n_cells)
    counts[rows, planted] += 100
    counts[rows[doublet], second[doublet]] += 60
    adata = AnnData(
        X=sparse.csr_matrix(counts),
        var=pd.DataFrame(
            {"target": [f"gene{g // 3}" for g in range(n_guides)]}, index=[f"g{g}" for g in range(n_guides)]
        ),
    )
    call_guides(adata)
    assert adata.obs["gRNA"].tolist() == [f"g{g}" for g in planted]
    assert adata.obs["perturbation"].tolist() == [f"gene{g // 3}" for g in planted]
    np.testing.assert_array_equal(adata.obs["confident"], ~doublet)


@pytest.mark.parametrize("min_counts", [1, 2, 7, 11])
def test_min_counts(min_counts: int) -> None:
    adata = _adata()
    call_guides(adata, min_counts=min_counts)
    enough = CASES.sum(axis=1) >= min_counts
    np.testing.assert_array_equal(adata.obs["gRNA"].notna(), enough)
    np.testing.assert_array_equal(adata.obs["perturbation"].notna(), enough)
    assert not adata.obs["confident"][~enough].any()
    np.testing.assert_array_equal(adata.obs["gRNA_counts"], CASES.sum(axis=1))


def test_threshold_is_exclusive() -> None:
    adata = _adata()
    call_guides(adata, threshold=0.79)
    assert adata.obs["confident"].tolist() == [True, True, True, False, False, True, False]
    call_guides(adata, threshold=0.95, overwrite=True)
    assert adata.obs["confident"].tolist() == [False, False, False, False, False, True, False]


def test_layer_and_control_label() -> None:
    adata = _adata(np.zeros_like(CASES))
    adata.layers["counts"] = sparse.csr_matrix(CASES)
    adata.var["gene"] = ["A", "A", "B", "safe"]
    call_guides(adata, layer="counts", target_key="gene", control="NT", non_targeting=["safe"])
    assert adata.obs["perturbation"].tolist()[:3] == ["A", "NT", "NT"]


def test_obsm() -> None:
    adata = AnnData(X=np.ones((len(CASES), 2)), obs=pd.DataFrame(index=[f"c{i}" for i in range(len(CASES))]))
    adata.obsm["guides"] = pd.DataFrame(CASES, columns=GUIDES, index=adata.obs_names)
    call_guides(adata, obsm_key="guides", targets=TARGETS)
    expected = _adata()
    call_guides(expected)
    pd.testing.assert_frame_equal(adata.obs, expected.obs)


def test_mudata_with_cells_that_have_no_gRNA_counts() -> None:
    grna = _adata()
    names = ["c2", "c0", "extra", "c4"]
    rna = AnnData(X=np.ones((4, 3)), obs=pd.DataFrame(index=names))
    mdata = MuData({"rna": rna, "grna": grna})
    call_guides(mdata)
    obs = mdata.obs
    assert obs.loc["c0", "gRNA"] == "Ag1" and obs.loc["c2", "perturbation"] == "control"
    assert pd.isna(obs.loc["extra", "gRNA"]) and obs.loc["extra", "gRNA_counts"] == 0
    assert obs["confident"].dtype == bool
    assert obs.loc[["c0", "c2", "c4", "extra"], "confident"].tolist() == [True, True, False, False]
    assert "gRNA" not in mdata["rna"].obs and "gRNA" not in mdata["grna"].obs


def test_nothing_is_overwritten_unasked() -> None:
    adata = _adata()
    adata.obs["perturbation"] = "mine"
    with pytest.raises(ValueError, match="`data.obs` has perturbation already"):
        call_guides(adata)
    assert list(adata.obs) == ["perturbation"]
    assert (adata.obs["perturbation"] == "mine").all()
    x = adata.X.copy()
    call_guides(adata, overwrite=True)
    assert adata.obs["perturbation"].tolist()[0] == "A"
    assert (adata.X != x).nnz == 0


def test_called_again_it_gives_the_same() -> None:
    adata = _adata()
    call_guides(adata)
    first = adata.obs.copy()
    call_guides(adata, overwrite=True)
    pd.testing.assert_frame_equal(adata.obs, first)


def test_a_view_is_not_written_through() -> None:
    parent = _adata()
    part = parent[[0, 3]]
    with pytest.warns(Warning, match="view"):
        call_guides(part)
    assert part.obs["gRNA"].tolist() == ["Ag1", "Ag1"]
    assert list(parent.obs) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"threshold": 0.4}, "`threshold` is 0.4; give a fraction from 0.5 to below 1"),
        ({"threshold": 1}, "`threshold` is 1"),
        ({"min_counts": 0}, "`min_counts` is 0; give 1 or more"),
        ({"layer": "raw"}, r"`layer` 'raw' is not one of \[\]"),
        ({"target_key": "gene"}, r"`target_key` 'gene' is not one of the gRNAs' columns \['target'\]"),
        ({"targets": {"Ag1": "A"}}, "`targets` has no target for 3 gRNAs, such as 'Ag2'"),
        ({"obsm_key": "guides"}, "`obsm_key` 'guides' is not in `data.obsm`"),
        ({"obsm_key": "array"}, "is a ndarray; make it a DataFrame"),
        ({"obsm_key": "table"}, "`targets` is needed with `obsm_key`"),
    ],
)
def test_wrong_arguments(arguments: dict, message: str) -> None:
    adata = _adata()
    adata.obsm["array"] = CASES
    adata.obsm["table"] = pd.DataFrame(CASES, columns=GUIDES, index=adata.obs_names)
    with pytest.raises(ValueError, match=message):
        call_guides(adata, **arguments)
    assert list(adata.obs) == []


def test_negative_counts_and_unknown_modality() -> None:
    with pytest.raises(ValueError, match="negative or missing"):
        call_guides(_adata(CASES - 1.0))
    nan = CASES.astype(float)
    nan[0, 0] = np.nan
    with pytest.raises(ValueError, match="negative or missing"):
        call_guides(_adata(nan))
    mdata = MuData({"rna": _adata()})
    with pytest.raises(ValueError, match=r"`modality` 'grna' is not one of \['rna'\]"):
        call_guides(mdata)
