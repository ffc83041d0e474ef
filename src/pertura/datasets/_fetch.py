"""Registry, cache and download of the data files.

Every file is pinned by SHA256. A file that is already in the cache is never downloaded, and one whose bytes
are not the pinned ones is never read.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from types import MappingProxyType
from typing import Literal

__all__ = [
    "DataFile",
    "DataHashMismatch",
    "DataNotAvailable",
    "cache_dir",
    "fetch",
    "fill_cache",
    "registry",
]

CACHE_VARIABLE = "PERTURA_DATA_DIR"
CONNECT_TIMEOUT = 5.0
"""Seconds to wait for the server to accept a connection."""
READ_TIMEOUT = 20.0
"""Seconds to wait for the next bytes of a download."""
RETRIES = 1

FillStatus = Literal["copied", "present", "missing", "mismatch"]


class DataNotAvailable(OSError):
    """A data file is neither in the cache nor can it be downloaded."""


class DataHashMismatch(ValueError):
    """The bytes of a data file are not those of the registry."""


@dataclass(frozen=True, slots=True)
class DataFile:
    """One file of the registry.

    Attributes
    ----------
    key
        Name of the file in the registry.
    file
        Path relative to the cache folder, with ``/``.
    bytes
        Size in bytes.
    sha256
        Hexadecimal SHA256 of the file.
    url
        Public address, pinned to a commit.
    licence
        Licence of the repository, and of the data where it is known.
    origin
        Study or project that produced the data.
    content
        What is in the file.
    """

    key: str
    file: str
    bytes: int
    sha256: str
    url: str
    licence: str
    origin: str
    content: str


@cache
def registry() -> Mapping[str, DataFile]:
    """All known data files.

    Returns
    -------
    Read-only mapping from key to :class:`DataFile`.
    """
    text = resources.files(__package__).joinpath("_registry.json").read_text(encoding="utf-8")
    return MappingProxyType({entry["key"]: DataFile(**entry) for entry in json.loads(text)})


def cache_dir() -> Path:
    """Folder of the data files.

    Returns
    -------
    The folder named by the environment variable ``PERTURA_DATA_DIR``, else ``pooch.os_cache("pertura")``. It
    need not exist.
    """
    named = os.environ.get(CACHE_VARIABLE, "").strip()
    if named:
        return Path(named).expanduser()
    import pooch

    return Path(pooch.os_cache("pertura"))


def _sha256(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _entry(key: str) -> DataFile:
    try:
        return registry()[key]
    except KeyError:
        raise ValueError(f"`key` {key!r} is not a data file; choose one of {sorted(registry())}.") from None


def fetch(key: str) -> Path:
    """Path of a data file, downloaded on first use.

    Parameters
    ----------
    key
        A key of :func:`registry`.

    Returns
    -------
    Path of the verified file in :func:`cache_dir`.

    Raises
    ------
    DataNotAvailable
        The file is not in the cache and cannot be downloaded (no network, folder not writable).
    DataHashMismatch
        The file in the cache, or the one just downloaded, is not the one of the registry.
    ValueError
        ``key`` is unknown.
    """
    entry = _entry(key)
    folder = cache_dir()
    path = folder / entry.file
    if path.is_file():
        found = _sha256(path)
        if found != entry.sha256:
            raise DataHashMismatch(
                f"{path} has SHA256 {found}, but {key!r} must have {entry.sha256}; delete the file to "
                "download it again."
            )
        return path
    return _download(entry, folder)


def _download(entry: DataFile, folder: Path) -> Path:
    import pooch

    puller = pooch.create(
        path=folder,
        base_url="",
        registry={entry.file: f"sha256:{entry.sha256}"},
        urls={entry.file: entry.url},
        retry_if_failed=RETRIES,
    )
    downloader = pooch.HTTPDownloader(timeout=(CONNECT_TIMEOUT, READ_TIMEOUT))
    try:
        return Path(puller.fetch(entry.file, downloader=downloader))
    except OSError as error:  # requests' errors are OSErrors; so is a folder that cannot be written
        raise DataNotAvailable(
            f"Data file {entry.file!r} is not in the cache folder {folder} and could not be downloaded from "
            f"{entry.url} ({type(error).__name__}): connect to the network, or set {CACHE_VARIABLE} to a "
            "folder that holds it (`python -m pertura.datasets fill SOURCE CACHE` makes one)."
        ) from error
    except ValueError as error:  # pooch: the SHA256 of what came is another one
        raise DataHashMismatch(
            f"The file at {entry.url} is not the one {entry.key!r} was registered with (SHA256 "
            f"{entry.sha256}); nothing was kept."
        ) from error


def fill_cache(source: str | os.PathLike[str], cache: str | os.PathLike[str] | None = None) -> dict[str, FillStatus]:
    """Copy data files from a folder into the cache, each verified by SHA256.

    A file is looked for under its registered relative path first, then anywhere below ``source`` by size and
    SHA256.

    Parameters
    ----------
    source
        Folder with some or all of the files.
    cache
        Folder to fill; default :func:`cache_dir`.

    Returns
    -------
    Per key: ``"copied"``, ``"present"`` (was there already), ``"missing"`` (not in ``source``) or
    ``"mismatch"`` (a file of that path is in ``source``, with other bytes).

    Raises
    ------
    ValueError
        ``source`` is not a folder.
    """
    origin = Path(source)
    if not origin.is_dir():
        raise ValueError(f"`source` must be an existing folder, got {str(origin)!r}.")
    target = cache_dir() if cache is None else Path(cache)
    by_size: dict[int, list[Path]] = {}
    for path in _files(origin):
        by_size.setdefault(path.stat().st_size, []).append(path)
    return {key: _fill_one(entry, origin, target, by_size) for key, entry in registry().items()}


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


def _fill_one(entry: DataFile, origin: Path, target: Path, by_size: dict[int, list[Path]]) -> FillStatus:
    destination = target / entry.file
    if destination.is_file() and _sha256(destination) == entry.sha256:
        return "present"
    named = origin / entry.file
    candidates = [named] if named.is_file() else []
    candidates += by_size.get(entry.bytes, [])
    for path in candidates:
        if path.stat().st_size == entry.bytes and _sha256(path) == entry.sha256:
            _copy(path, destination)
            return "copied"
    return "mismatch" if named.is_file() else "missing"


def _copy(path: Path, destination: Path) -> None:
    """Copy through a temporary file, so that an interrupted copy leaves nothing behind."""
    destination.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=destination.parent)
    os.close(handle)
    try:
        shutil.copyfile(path, temporary)
        Path(temporary).replace(destination)
    finally:
        Path(temporary).unlink(missing_ok=True)
