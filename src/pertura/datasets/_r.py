"""R files: sparse matrices, data frames and SummarizedExperiments of S4 class as scipy and pandas objects."""

from __future__ import annotations

import bz2
import gzip
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

__all__ = ["Experiment", "read_rda", "read_rda_columns", "read_rda_lists", "to_csr", "to_experiment", "to_frame"]


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
_SYMBOL, _PAIRLIST, _CHAR, _REAL, _STRING, _LIST, _END, _REFERENCE = 1, 2, 9, 14, 16, 19, 254, 255
_HAS_ATTRIBUTES = 0x200
_OPENERS = {b"\xfd7zXZ": lzma.decompress, b"BZh": bz2.decompress, b"\x1f\x8b": gzip.decompress}


def read_rda_columns(path: Path) -> pd.DataFrame:
    """Read an R data file that holds one data frame of string and double columns.

    Parameters
    ----------
    path
        See :func:`read_rda_lists`.

    Returns
    -------
    The data frame, with a default index.

    Raises
    ------
    ValueError
        The file has another layout.
    """
    return pd.DataFrame(read_rda_lists(path))


def read_rda_lists(path: Path) -> Any:
    """Read an R data file that holds one object: strings, doubles, or named lists of such objects.

    ``rdata`` makes several Python objects per string: a table of a million strings takes it half a minute and
    800 MB. This reads the same bytes in about two seconds, and nothing but this layout.

    Parameters
    ----------
    path
        A file in R's XDR serialisation, version 3, compressed by xz, bzip2 or gzip.

    Returns
    -------
    Lists (data frames too) as dictionaries, vectors as arrays.

    Raises
    ------
    ValueError
        The file has another layout.

    References
    ----------
    "Serialization Formats" in *R Internals*, section 1.8.
    """
    data = path.read_bytes()
    data = next((opener(data) for magic, opener in _OPENERS.items() if data.startswith(magic)), data)
    if data[:7] != b"RDX3\nX\n":
        raise ValueError(f"{path} is not an XDR file of R's serialisation version 3.")
    (encoding_length,) = struct.unpack_from(">i", data, 19)
    # the pair list of the saved objects; one is expected
    return next(_pairs(data, 23 + encoding_length, []))[1]


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


def _object(data: bytes, position: int, symbols: list[str]) -> tuple[Any, int]:
    """A vector, or a list of objects by name; `symbols` are those that were met."""
    flags, length = struct.unpack_from(">ii", data, position)
    kind, start = flags & 0xFF, position + 8
    if kind == _STRING:
        value, position = _characters(data, start, length)
    elif kind == _REAL:
        position = start + 8 * length
        value = np.frombuffer(data[start:position], dtype=">f8").astype(float)
    elif kind == _LIST:
        value, position = [], start
        for _ in range(length):
            one, position = _object(data, position, symbols)
            value.append(one)
    else:
        raise ValueError(f"R object of type {kind} at byte {position}; expected strings or doubles, or a list of them.")
    attributes = {}
    if flags & _HAS_ATTRIBUTES:
        for name, one, after in _pairs(data, position, symbols):
            attributes[name], position = one, after
        position += 4  # the end of the attributes
    if kind == _LIST and "names" in attributes:
        value = dict(zip(attributes["names"], value, strict=True))
    return value, position


def _pairs(data: bytes, position: int, symbols: list[str]) -> Iterator[tuple[str, Any, int]]:
    """Names, objects and the position after each, of a pair list."""
    while (kind := data[position + 3]) != _END:
        if kind != _PAIRLIST:
            raise ValueError(f"R object of type {kind} at byte {position}; expected type {_PAIRLIST}.")
        (flags,) = struct.unpack_from(">i", data, position + 4)
        position += 8
        if flags & 0xFF == _SYMBOL:
            name, position = _characters(data, position, 1)
            symbols.append(name[0])
        elif flags & 0xFF != _REFERENCE:
            raise ValueError(f"R object of type {flags & 0xFF} at byte {position - 4}; expected a name.")
        if data[position + 3] not in (_STRING, _REAL, _LIST) and len(symbols) > 1:
            return  # of a data frame's attributes the row names, which follow the names of the columns, may be of any type
        value, position = _object(data, position, symbols)
        yield symbols[-1 if flags & 0xFF == _SYMBOL else (flags >> 8) - 1], value, position
