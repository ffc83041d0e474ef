"""Predictions written to a file while they are made, so that neither their number nor an interruption matters."""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import zarr
from anndata import AnnData

from ._predict import Predicted

# Where the parts of a prediction stand in the file.
_PLACES = {"mean": "X", "low": "layers/low", "high": "layers/high", "latent": "obsm/X_latent", "basal": "obsm/X_basal"}
_MARK = "pertura"
_CHUNK_BYTES = 2**22


def check_out(out: str | PathLike[str]) -> Path:
    """The path of a file of predictions.

    Raises
    ------
    ValueError
        If it is not the name of a zarr store or an h5ad file in an existing folder.
    """
    path = Path(out)
    if path.suffix not in (".zarr", ".h5ad"):
        raise ValueError(f"`out` must end in '.zarr' or '.h5ad', got {str(out)!r}.")
    if not path.parent.is_dir():
        raise ValueError(f"`out`: the folder {str(path.parent)!r} does not exist. Make it first.")
    return path


def fingerprint(module: Any, asked: dict[str, Any], adata: AnnData) -> str:
    """What tells one prediction from another: parameters of the model, the question, the cells and their genes."""
    digest = hashlib.sha256(json.dumps(asked, sort_keys=True, default=str).encode())
    for name, value in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    for names in (adata.obs_names, adata.var_names):
        digest.update("\n".join(names.astype(str)).encode())
    return digest.hexdigest()


@contextmanager
def _quiet() -> Iterator[None]:
    """Plans of zarr and anndata for their next versions are no concern of a user who predicts."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


class PredictionFile:
    """A zarr store or h5ad file of predictions, one row per perturbation and cell, filled block by block.

    A file that an interrupted call left behind is continued by the same call.

    Parameters
    ----------
    path
        Of the file.
    frame
        AnnData without expression: ``obs``, ``var`` and ``uns`` of the result, perturbations one after the other.
    n_cells
        Cells per perturbation.
    key
        Of :func:`fingerprint`.
    overwrite
        Whether a file that holds something else may be replaced.

    Raises
    ------
    ValueError
        If the file exists, is not an unfinished prediction of the same kind, and may not be replaced.
    """

    def __init__(self, path: Path, frame: AnnData, n_cells: int, key: str, overwrite: bool) -> None:
        self.path, self.n_cells, self.n_rows = path, n_cells, frame.n_obs
        state = self._state() if path.exists() else {}
        if path.exists() and (state.get("key") != key or state["done"] == n_cells):
            if not overwrite:
                what = "holds these predictions already" if state.get("key") == key else "holds something else"
                raise ValueError(f"`out`: {str(path)!r} exists and {what}. Pass `overwrite=True` to replace it.")
            shutil.rmtree(path) if path.is_dir() else path.unlink()
            state = {}
        self.done = int(state.get("done", 0))
        if not state:
            if path.suffix == ".zarr":
                with anndata.settings.override(zarr_write_format=3), _quiet():
                    frame.write_zarr(path)
            else:
                frame.write_h5ad(path)
            with self._open() as root:
                root.attrs[_MARK] = json.dumps({"key": key, "done": 0})
        self.key = key

    @contextmanager
    def _open(self, mode: str = "r+") -> Iterator[Any]:
        if self.path.suffix == ".zarr":
            yield zarr.open_group(self.path, mode=mode, use_consolidated=False)
        else:
            with h5py.File(self.path, mode) as root:
                yield root

    def _state(self) -> dict[str, Any]:
        try:
            with self._open("r") as root:
                return json.loads(root.attrs[_MARK])
        except (OSError, KeyError, ValueError, zarr.errors.BaseZarrError):
            return {}

    def write(self, blocks: Iterator[Predicted]) -> None:
        """Write blocks of cells, the first of which follows the cells that are done."""
        waiting: list[Predicted] = []
        with self._open() as root:
            for block in blocks:
                waiting.append(block)
                n_waiting = sum(part.n_cells for part in waiting)
                # whole chunks, so that none is compressed again and again
                if n_waiting * 4 * block.mean.shape[-1] >= _CHUNK_BYTES or self.done + n_waiting == self.n_cells:
                    self._put(root, Predicted.concatenate(waiting))
                    waiting = []

    def _put(self, root: Any, part: Predicted) -> None:
        stop = self.done + part.n_cells
        for name, values in part.items():
            target = self._array(root, _PLACES[name], values.shape[-1], part.n_cells)
            for q, start in enumerate(range(0, self.n_rows, self.n_cells)):
                # the basal state is the same under every perturbation
                target[start + self.done : start + stop] = values[q if name != "basal" else 0]
        self.done = stop
        root.attrs[_MARK] = json.dumps({"key": self.key, "done": stop})

    def _array(self, root: Any, name: str, width: int, rows: int) -> Any:
        """The array of a part, made when its shape is known."""
        if name not in root or getattr(root[name], "shape", None) != (self.n_rows, width):
            if name in root:
                del root[name]
            make = root.create_array if isinstance(root, zarr.Group) else root.create_dataset
            fill = {"fill_value" if isinstance(root, zarr.Group) else "fillvalue": np.nan}
            array = make(name, shape=(self.n_rows, width), dtype="float32", chunks=(rows, width), **fill)
            array.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
            if isinstance(root, zarr.Group):  # readers look for arrays in one common list first
                with _quiet():
                    zarr.consolidate_metadata(root.store)
        return root[name]
