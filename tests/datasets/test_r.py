"""R objects as scipy and pandas objects."""

from __future__ import annotations

import lzma
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import rdata

from pertura.datasets import fetch
from pertura.datasets._r import read_rda, read_rda_columns, read_rda_lists, to_csr, to_frame

# features x cells, as R keeps it:  [[1, 0, 0], [0, 0, 2]]
_DIMNAMES = [np.array(["f1", "f2"]), np.array(["c1", "c2", "c3"])]


def _r_object(kind: str, **slots: object) -> SimpleNamespace:
    obj = SimpleNamespace(Dim=np.array([2, 3]), Dimnames=_DIMNAMES, **slots)
    setattr(obj, "class", np.array([kind]))
    return obj


@pytest.mark.parametrize(
    "obj",
    [
        _r_object("dgCMatrix", i=np.array([0, 1]), p=np.array([0, 1, 1, 2]), x=np.array([1.0, 2.0])),
        _r_object("dgTMatrix", i=np.array([1, 0]), j=np.array([2, 0]), x=np.array([2.0, 1.0])),
    ],
    ids=["dgCMatrix", "dgTMatrix"],
)
def test_sparse_matrix_is_transposed(obj: SimpleNamespace) -> None:
    matrix, cells, features = to_csr(obj)
    assert matrix.format == "csr"
    assert matrix.dtype == np.float32
    np.testing.assert_array_equal(matrix.toarray(), [[1, 0], [0, 0], [0, 2]])
    assert list(cells) == ["c1", "c2", "c3"]
    assert list(features) == ["f1", "f2"]


def test_triplets_of_one_entry_add_up() -> None:
    obj = _r_object("dgTMatrix", i=np.array([1, 1]), j=np.array([2, 2]), x=np.array([2.0, 3.0]))
    assert to_csr(obj)[0][2, 1] == 5


def test_other_matrix_classes_are_refused() -> None:
    with pytest.raises(ValueError, match="'dgRMatrix'; expected 'dgCMatrix' or 'dgTMatrix'"):
        to_csr(_r_object("dgRMatrix", i=np.array([0]), x=np.array([1.0])))


def test_frame_of_factors_strings_and_missing_integers() -> None:
    obj = SimpleNamespace(
        listData={
            np.str_("factor"): pd.Categorical(["b", "a"]),
            np.str_("string"): np.array(["x", "y"]),
            np.str_("integer"): np.ma.MaskedArray(np.array([7, 0]), mask=[False, True]),
            np.str_("number"): np.array([0.5, 1.5]),
        },
        rownames=np.array(["r1", "r2"]),
    )
    frame = to_frame(obj)
    assert list(frame.index) == ["r1", "r2"]
    assert frame["factor"].tolist() == ["b", "a"]
    assert frame["string"].tolist() == ["x", "y"]
    assert frame["integer"].isna().tolist() == [False, True]
    assert frame["integer"].iloc[0] == 7
    assert frame["number"].tolist() == [0.5, 1.5]


def _write(path: Path, frame: pd.DataFrame) -> Path:
    rdata.write_rda(path, {"table": frame}, compression="xz", file_format="xdr")
    return path


def test_columns_are_read_as_rdata_reads_them(tmp_path: Path) -> None:
    frame = pd.DataFrame({"tf": ["A", "", "Ä"], "target": ["x", "x", "y"], "mor": [1.0, -1.0, 0.25]})
    path = _write(tmp_path / "table.rda", frame)
    pd.testing.assert_frame_equal(read_rda_columns(path), frame, check_dtype=False)
    expected = rdata.read_rda(path)["table"]
    pd.testing.assert_frame_equal(
        read_rda_columns(path), pd.DataFrame(expected).reset_index(drop=True), check_dtype=False
    )


def test_lists_of_lists_of_strings(tmp_path: Path) -> None:
    made = {"A": {"up": np.array(["g1", "g2"]), "all": np.array(["g1", "Ä"])}, "B": {"up": np.array(["g3"])}}
    for compression in ("bzip2", "gzip", "xz"):
        rdata.write_rda(tmp_path / "list.rda", {"table": made}, compression=compression, file_format="xdr")
        found = read_rda_lists(tmp_path / "list.rda")
        assert {k: list(v) for k, v in found.items()} == {"A": ["up", "all"], "B": ["up"]}
        assert found["A"]["all"].tolist() == ["g1", "Ä"]
        assert found["B"]["up"].tolist() == ["g3"]


def test_columns_of_other_types_are_refused(tmp_path: Path) -> None:
    path = _write(tmp_path / "table.rda", pd.DataFrame({"n": np.array([1, 2], dtype=np.int32)}))
    with pytest.raises(ValueError, match="expected strings or doubles"):
        read_rda_columns(path)
    (tmp_path / "other.rda").write_bytes(lzma.compress(b"RDA3\nA\nnot XDR"))
    with pytest.raises(ValueError, match="not an XDR file"):
        read_rda_columns(tmp_path / "other.rda")


def test_only_the_warnings_on_classes_are_silenced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(_path: Path) -> dict[str, int]:
        warnings.warn('Missing constructor for R class "dgCMatrix". ...', UserWarning, stacklevel=1)
        warnings.warn("something else", UserWarning, stacklevel=1)
        return {np.str_("a"): 1}

    monkeypatch.setattr(rdata, "read_rda", read)
    with pytest.warns(UserWarning) as caught:
        assert read_rda(tmp_path) == {"a": 1}
    assert [str(warning.message) for warning in caught] == ["something else"]


@pytest.mark.slow
def test_dorothea_is_read_as_rdata_reads_it(load_dataset) -> None:
    load_dataset("dorothea")  # skips without the file
    path = fetch("dorothea_human")
    expected = read_rda(path)["dorothea_hs"].reset_index(drop=True)
    pd.testing.assert_frame_equal(read_rda_columns(path), expected, check_dtype=False)
