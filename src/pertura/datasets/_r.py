"""R files: sparse matrices, data frames and SummarizedExperiments of S4 class as scipy and pandas objects."""

from __future__ import annotations

import lzma
import struct
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
from scipy import sparse

__all__ = ["Experiment", "read_rda", "read_rda_columns", "to_csr", "to_experiment", "to_frame"]


def read_rda(path: Path) -> dict[str, Any]:
    """Objects of an R data file by name; S4 objects as namespaces of their slots."""
    import rdata

    with warnings.catch_warnings():
        # S4 classes have no constructor in rdata; their slots are all that is needed here
        warnings.filterwarnings("ignore", message="Missing constructor for R class", category=UserWarning)
        return {str(name): value for name, value in rdata.read_rda(path).items()}


def _class(obj: Any) -> str:
    return str(np.ravel(getattr(obj, "class", [type(obj).__name__]))[0])


def _names(values: Any) -> np.ndarray | None:
    return None if values is None else np.asarray(values).astype(str).astype(object)


def to_csr(obj: SimpleNamespace) -> tuple[sparse.csr_matrix, np.ndarray | None, np.ndarray | None]:
    """Convert an R ``dgCMatrix`` or ``dgTMatrix`` to CSR, *transposed*.

    Parameters
    ----------
    obj
        Namespace of the slots; features x cells, as R keeps it.

    Returns
    -------
    CSR matrix, cells x features, float32; names of the cells and of the features (``None`` where R has none).

    Raises
    ------
    ValueError
        The object is of another class.
    """
    n_rows, n_columns = (int(size) for size in obj.Dim)
    row_names, column_names = (_names(names) for names in obj.Dimnames)
    values = np.asarray(obj.x, dtype=np.float32)
    kind = _class(obj)
    if kind == "dgCMatrix":  # columns of the transpose's rows: the same arrays, read the other way
        matrix = sparse.csr_matrix((values, obj.i, obj.p), shape=(n_columns, n_rows))
    elif kind == "dgTMatrix":
        matrix = sparse.coo_matrix((values, (obj.j, obj.i)), shape=(n_columns, n_rows)).tocsr()
    else:
        raise ValueError(f"`obj` is of R class {kind!r}; expected 'dgCMatrix' or 'dgTMatrix'.")
    matrix.sort_indices()
    return matrix, column_names, row_names


def to_frame(obj: SimpleNamespace) -> pd.DataFrame:
    """Convert an R ``DataFrame`` (S4Vectors) to pandas; factors and strings become plain strings."""
    columns = {}
    for name, values in obj.listData.items():
        if isinstance(values, np.ma.MaskedArray):
            columns[str(name)] = pd.array(np.asarray(values.filled(0)), dtype="Int64")
            columns[str(name)][np.ma.getmaskarray(values)] = pd.NA
        else:
            array = np.asarray(values)
            columns[str(name)] = array if array.dtype.kind in "biuf" else array.astype(str).astype(object)
    row_names = obj.rownames
    index = None if row_names is None or isinstance(row_names, str) else _names(row_names)
    return pd.DataFrame(columns, index=index)


@dataclass(frozen=True, slots=True)
class Experiment:
    """A SummarizedExperiment or SingleCellExperiment.

    Attributes
    ----------
    assays
        Name to R matrix (features x cells), unconverted.
    obs
        Annotation of the cells.
    var
        Annotation of the features; empty index if the object names them in its assays only.
    """

    assays: dict[str, Any]
    obs: pd.DataFrame
    var: pd.DataFrame


def to_experiment(obj: SimpleNamespace) -> Experiment:
    """Convert an R ``SummarizedExperiment`` or ``SingleCellExperiment``."""
    # a ranged experiment annotates its features in the ranges, a plain one in elementMetadata
    features = obj.rowRanges.elementMetadata if hasattr(obj, "rowRanges") else obj.elementMetadata
    assays = {str(name): assay for name, assay in obj.assays.data.listData.items()}
    return Experiment(assays=assays, obs=to_frame(obj.colData), var=to_frame(features))


# Types of R objects in a serialised file.
_SYMBOL, _PAIRLIST, _CHAR, _REAL, _STRING, _LIST = 1, 2, 9, 14, 16, 19


def read_rda_columns(path: Path) -> pd.DataFrame:
    """Read an ``.rda`` file that holds one data frame of string and double columns.

    ``rdata`` makes several Python objects per string: a table of a million strings takes it half a minute and
    800 MB. This reads the same bytes in about two seconds, and nothing but this layout.

    Parameters
    ----------
    path
        An xz-compressed file in R's XDR serialisation, version 3.

    Returns
    -------
    The data frame, with a default index.

    Raises
    ------
    ValueError
        The file has another layout.

    References
    ----------
    "Serialization Formats" in *R Internals*, section 1.8.
    """
    data = lzma.decompress(path.read_bytes())
    if data[:7] != b"RDX3\nX\n":
        raise ValueError(f"{path} is not an XDR file of R's serialisation version 3.")
    (encoding_length,) = struct.unpack_from(">i", data, 19)
    position = 23 + encoding_length
    position = _expect(data, position, _PAIRLIST)  # the pair list of the saved objects; one is expected
    position = _expect(data, position, _SYMBOL)
    _, position = _characters(data, position, 1)
    position = _expect(data, position, _LIST)
    (n_columns,) = struct.unpack_from(">i", data, position)
    position += 4
    columns: list[np.ndarray] = []
    for _ in range(n_columns):
        column, position = _vector(data, position)
        columns.append(column)
    names = next(value for name, value in _string_attributes(data, position) if name == "names")
    return pd.DataFrame(dict(zip(names, columns, strict=True)))


def _expect(data: bytes, position: int, kind: int) -> int:
    found = data[position + 3]
    if found != kind:
        raise ValueError(f"R object of type {found} at byte {position}; expected type {kind}.")
    return position + 4


def _characters(data: bytes, position: int, number: int) -> tuple[np.ndarray, int]:
    unpack = struct.Struct(">ii").unpack_from
    known: dict[bytes, str] = {}
    values = np.empty(number, dtype=object)
    for i in range(number):
        flags, length = unpack(data, position)
        if flags & 0xFF != _CHAR:
            raise ValueError(f"R object of type {flags & 0xFF} at byte {position}; expected a string.")
        position += 8
        if length >= 0:  # -1 is a missing string
            raw = data[position : position + length]
            values[i] = known.get(raw) or known.setdefault(raw, raw.decode("utf-8"))
            position += length
    return values, position


def _vector(data: bytes, position: int) -> tuple[np.ndarray, int]:
    kind = data[position + 3]
    (length,) = struct.unpack_from(">i", data, position + 4)
    position += 8
    if kind == _STRING:
        return _characters(data, position, length)
    if kind == _REAL:
        end = position + 8 * length
        return np.frombuffer(data[position:end], dtype=">f8").astype(float), end
    raise ValueError(f"R vector of type {kind} at byte {position - 8}; expected strings or doubles.")


def _string_attributes(data: bytes, position: int) -> Iterator[tuple[str, np.ndarray]]:
    """Attributes of the data frame up to the first that is not a vector of strings."""
    while data[position + 3] == _PAIRLIST:
        position = _expect(data, position + 4, _SYMBOL)
        name, position = _characters(data, position, 1)
        if data[position + 3] != _STRING:
            return
        value, position = _vector(data, position)
        yield name[0], value
