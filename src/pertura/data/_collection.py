"""Sharded zarr collections, written and read by annbatch."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import cache
from os import PathLike, fspath
from pathlib import Path
from threading import Lock
from types import ModuleType
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd
import zarr
from anndata import AnnData
from anndata.experimental import read_elem_lazy
from anndata.io import read_elem, sparse_dataset
from numpy.typing import NDArray
from scipy import sparse

Source = AnnData | str | PathLike[str]
# annbatch's own number of neighboring cells that move together
_BLOCK = 1000
# cells within a gap of so many come from one read: about what annbatch compresses together
_GAP = 64


def _annbatch() -> ModuleType:
    try:
        import annbatch
    except ImportError as error:
        raise ImportError(
            "Collections need annbatch, which has releases for Python 3.12 and later: pip install 'pertura[scale]'. "
            "Files of 3.11 are read without it: `anndata.read_h5ad(path, backed='r')`."
        ) from error
    return annbatch


class Shards:
    """Expression in all shards of a collection, one below the other.

    Parameters
    ----------
    shards
        Sparse or dense matrices in zarr stores, with the same genes.
    """

    format = "shards"

    def __init__(self, shards: Sequence[Any]) -> None:
        self._shards, self._loader, self._lock = list(shards), None, Lock()
        self.shape = (sum(s.shape[0] for s in shards), shards[0].shape[1])
        self.nnz = sum(s.group["indices"].shape[0] if hasattr(s, "group") else s.size for s in shards)
        # neighbors in a collection have nothing in common
        self.chunks = (_BLOCK,)

    def __getstate__(self) -> dict[str, Any]:
        """Another process opens the shards anew."""
        return {**self.__dict__, "_loader": None, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=Lock())

    def __getitem__(self, rows: slice | NDArray[np.int64]) -> Any:
        """Cells, dense or sparse, in the order asked for."""
        rows = np.arange(*rows.indices(self.shape[0])) if isinstance(rows, slice) else np.asarray(rows)
        if not len(rows):
            return sparse.csr_matrix((0, self.shape[1]), dtype=np.float32)
        with self._lock:
            if self._loader is None:
                loader = _annbatch().Loader(batch_sampler=_request_class()(), preload_to_gpu=False)
                self._loader = loader.add_datasets(self._shards)
            self._loader.batch_sampler.rows = rows
            (batch,) = self._loader
        return batch["X"]


@cache
def _request_class() -> type:
    """A sampler of annbatch that asks for one batch."""

    class Request(_annbatch().abc.Sampler):
        rows: NDArray[np.int64]
        batch_size, shuffle = None, False

        def n_batches(self, n_obs: int) -> int:
            return 1

        def validate(self, n_obs: int) -> None:
            pass

        def _sample(self, n_obs: int) -> Iterator[dict[str, Any]]:
            unique = np.unique(self.rows)
            ends = np.flatnonzero(np.diff(unique) > _GAP)
            start, stop = unique[np.append(0, ends + 1)], unique[np.append(ends, -1)] + 1
            # where each range begins in what is read
            offset = np.cumsum(stop - start) - (stop - start)
            at = np.searchsorted(start, self.rows, side="right") - 1
            ranges = [slice(int(a), int(b)) for a, b in zip(start, stop, strict=True)]
            yield {"requests": ranges, "splits": [offset[at] + self.rows - start[at]]}

    return Request


def shards_of(values: Any) -> Any:
    """The shards that a dask array stands for; all other values, slices of it among them, as they are."""
    name, shards = getattr(getattr(values, "dask", None), "pertura_shards", (None, values))
    return shards if name is None or name == values.name else values


def to_collection(
    adatas: Source | Sequence[Source], path: str | PathLike[str], *, shard_size: int = 100_000, seed: int = 0
) -> AnnData:
    """Write cells of one or many files to a sharded zarr collection, in random order, and open it.

    A collection is what :class:`annbatch.Loader` reads fast from disks and object stores: cells that are neighbors in it come from all over
    the files. It is written by :class:`annbatch.DatasetCollection`. ``X``, ``layers``, ``obs`` and ``var`` are kept. The files may have
    their genes in different orders, and must have the same ones.

    Parameters
    ----------
    adatas
        AnnData in memory or backed, or paths of ``.h5ad`` files and zarr stores; one or several. Files are read in parts.
    path
        Of the new collection; ends in ``.zarr``.
    shard_size
        Cells per shard. So many are in memory at once.
    seed
        Of the order.

    Returns
    -------
    What :func:`read_collection` returns. The column ``src_path`` of ``obs`` has the file of each cell, or the number of an AnnData in
    memory.

    Raises
    ------
    ImportError
        Without annbatch (``pip install 'pertura[scale]'``), which needs Python 3.12.
    ValueError
        If the path exists or does not end in ``.zarr``, genes differ, or `shard_size` is no positive number.

    Examples
    --------
    >>> cells = pertura.pp.to_collection(["plate1.h5ad", "plate2.h5ad"], "plates.zarr")
    >>> SAMSVAE.setup_anndata(cells, perturbation_key="perturbation", control="control")
    >>> model = SAMSVAE(cells)
    >>> model.train()
    """
    annbatch = _annbatch()
    if isinstance(shard_size, bool) or not isinstance(shard_size, (int, np.integer)) or shard_size < 1:
        raise ValueError(f"`shard_size` must be a whole number above 0, got {shard_size!r}.")
    if Path(path).suffix != ".zarr" or Path(path).exists():
        what = "exists; remove it or choose another" if Path(path).exists() else "must end in '.zarr'"
        raise ValueError(f"`path`: {fspath(path)!r} {what}.")
    given = [adatas] if isinstance(adatas, (AnnData, str, PathLike)) else list(adatas)
    if not given:
        raise ValueError("`adatas` is empty. Pass at least one AnnData or path.")
    with ExitStack() as files:
        named = {}
        for number, source in enumerate(given):
            named[_name(source, number)] = files.enter_context(_lazy(source))
        if len(named) < len(given):
            raise ValueError("`adatas`: a file was named twice.")
        genes = next(iter(named.values())).var_names
        for name, adata in named.items():
            other = adata.var_names.symmetric_difference(genes)
            if len(other) or adata.n_vars != len(genes):
                raise ValueError(
                    f"`adatas`: the genes of {name!r} are not those of {next(iter(named))!r} ({len(other)} differ"
                    f"{f', such as {other[0]!r}' if len(other) else ''}). Keep the genes that all have."
                )
            if not adata.var_names.equals(genes):
                named[name] = adata[:, genes]
        with _quiet():
            annbatch.DatasetCollection(fspath(path), mode="a").add_adatas(
                list(named),
                load_adata=lambda name: named[name].copy(),
                dataset_size=int(shard_size),
                shuffle_chunk_size=max(1, min(_BLOCK, int(shard_size) // 10)),
                rng=np.random.default_rng(seed),
                merge="same",
            )
    return read_collection(path)


def read_collection(path: str | PathLike[str]) -> AnnData:
    """Open a collection: ``obs`` and ``var`` in memory, ``X`` and ``layers`` on disk.

    Models train on it as on any AnnData. Their minibatches are read by :class:`annbatch.Loader`; all else, slices included, by dask.

    Parameters
    ----------
    path
        What :func:`to_collection` has written, or :class:`annbatch.DatasetCollection`.

    Returns
    -------
    AnnData of all cells.

    Raises
    ------
    ImportError
        Without annbatch (``pip install 'pertura[scale]'``), which needs Python 3.12.
    ValueError
        If there is no collection.
    """
    collection = _annbatch().DatasetCollection
    groups = list(collection(fspath(path), mode="r")) if Path(path).is_dir() else []
    if not groups:
        raise ValueError(f"`path`: {fspath(path)!r} is no collection. `pertura.pp.to_collection` writes one.")
    frames = [read_elem(group["obs"]) for group in groups]
    obs = pd.concat(frames)
    for column in obs:
        if all(isinstance(frame[column].dtype, pd.CategoricalDtype) for frame in frames):
            obs[column] = pd.api.types.union_categoricals([frame[column] for frame in frames])
    layers = {name: _stacked([g["layers"][name] for g in groups]) for name in groups[0].get("layers", ())}
    x = _stacked([g["X"] for g in groups]) if "X" in groups[0] else None
    return AnnData(x, obs=obs, var=read_elem(groups[0]["var"]), layers=layers)


def _stacked(elements: Sequence[Any]) -> Any:
    """Dask array of all shards, which remembers them."""
    import dask.array as da

    shards = Shards([sparse_dataset(e) if isinstance(e, zarr.Group) else e for e in elements])
    array = da.concatenate([read_elem_lazy(e, chunks=(_BLOCK, shards.shape[1])) for e in elements])
    array.dask.pertura_shards = array.name, shards  # copies keep the graph, slices have their own
    return array


def _name(source: Source, number: int) -> str:
    if not isinstance(source, AnnData):
        return fspath(source)
    return str(source.filename if source.isbacked else number)


@contextmanager
def _lazy(source: Source) -> Iterator[AnnData]:
    """What is kept of a file, expression as dask arrays."""
    if isinstance(source, AnnData) and not source.isbacked:
        _check_rows(source, {"X": source.X, **source.layers})
        yield AnnData(source.X, obs=source.obs, var=source.var, layers={k: v for k, v in source.layers.items() if k})
        return
    path = Path(source.filename if isinstance(source, AnnData) else source)
    if not path.exists():
        raise ValueError(f"`adatas`: there is no file {fspath(path)!r}.")
    with h5py.File(path, "r") if path.is_file() else nullcontext(zarr.open_group(path, mode="r")) as group:
        var, stored = read_elem(group["var"]), {None: group["X"]} if "X" in group else {}
        stored |= {name: group["layers"][name] for name in group.get("layers", ())}
        _check_rows(path, stored)
        lazy = {name: read_elem_lazy(element, chunks=(_BLOCK, len(var))) for name, element in stored.items()}
        yield AnnData(lazy.pop(None, None), obs=read_elem(group["obs"]), var=var, layers=lazy)


def _check_rows(source: Any, stored: dict[str | None, Any]) -> None:
    """Raise where single cells can not be read."""
    for name, values in stored.items():
        encoding = values.attrs.get("encoding-type") if hasattr(values, "attrs") else getattr(values, "format", None)
        if encoding in ("csc", "csc_matrix"):
            raise ValueError(
                f"`adatas`: {name or 'X'} of {source if isinstance(source, Path) else 'an AnnData'} is stored by columns. Convert it "
                "with `.tocsr()`."
            )


@contextmanager
def _quiet() -> Iterator[None]:
    """Advice on file formats is no concern of a user who did not choose them."""
    with warnings.catch_warnings(), anndata.settings.override(zarr_write_format=3):
        warnings.simplefilter("ignore", UserWarning)
        yield
