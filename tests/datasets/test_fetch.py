"""Registry, cache, download and the command line."""

from __future__ import annotations

import hashlib
import json
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pooch
import pytest

from pertura import datasets
from pertura.datasets import DataFile, DataHashMismatch, DataNotAvailable, __main__, _fetch

MANIFEST = Path(__file__).parents[3] / "shared" / "data" / "manifest.json"
CONTENT = {"one": b"first file\n", "two": b"second file\n"}


def _entry(key: str, url: str = "https://example.invalid/x") -> DataFile:
    content = CONTENT[key]
    return DataFile(
        key=key,
        file=f"folder/{key}.txt",
        bytes=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
        url=url,
        licence="none",
        origin="test",
        content="test",
    )


@pytest.fixture
def files(monkeypatch: pytest.MonkeyPatch) -> dict[str, DataFile]:
    """Replace the registry with two small files; the returned dictionary may be changed."""
    entries = {key: _entry(key) for key in CONTENT}
    monkeypatch.setattr(_fetch, "registry", lambda: entries)
    monkeypatch.setattr(__main__, "registry", lambda: entries)
    return entries


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Use an empty cache folder that does not exist yet."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("PERTURA_DATA_DIR", str(folder))
    return folder


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Serve tmp_path/served over HTTP on this machine."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    folder = tmp_path / "served"
    folder.mkdir()
    handler = partial(SimpleHTTPRequestHandler, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as http:
        thread = threading.Thread(target=http.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()
        thread.join()


def _tree(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


# Registry


def test_registry_is_the_manifest() -> None:
    if not MANIFEST.is_file():
        pytest.skip(f"{MANIFEST} is not there")
    manifest = {entry["key"]: entry for entry in json.loads(MANIFEST.read_text())}
    # the manifest may list files that have no loader yet; what is registered is registered as it says
    assert set(datasets.registry()) <= set(manifest)
    for key, found in datasets.registry().items():
        assert {name: getattr(found, name) for name in manifest[key]} == manifest[key]


def test_registry_entries_are_complete_and_pinned() -> None:
    entries = list(datasets.registry().values())
    assert len(entries) == 61
    for entry in entries:
        assert re.fullmatch(r"[0-9a-f]{64}", entry.sha256)
        assert re.match(r"https://raw\.githubusercontent\.com/[^/]+/[^/]+/[0-9a-f]{40}/", entry.url)
        assert entry.licence and entry.origin and entry.content and entry.bytes > 0
    assert len({entry.file for entry in entries}) == len(entries)


def test_registry_is_read_only() -> None:
    with pytest.raises(TypeError):
        datasets.registry()["papalexi_2021"] = None  # type: ignore[index]


# Cache folder


def test_cache_dir(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PERTURA_DATA_DIR", str(tmp_path))
    assert datasets.cache_dir() == tmp_path
    monkeypatch.setenv("PERTURA_DATA_DIR", "")
    assert datasets.cache_dir() == Path(pooch.os_cache("pertura"))
    monkeypatch.delenv("PERTURA_DATA_DIR")
    assert datasets.cache_dir() == Path(pooch.os_cache("pertura"))


# Fetch


def test_fetch_reads_the_cache_without_network(files: dict[str, DataFile], cache: Path, no_network: None) -> None:
    path = cache / files["one"].file
    path.parent.mkdir(parents=True)
    path.write_bytes(CONTENT["one"])
    assert datasets.fetch("one") == path


def test_fetch_downloads_once(files: dict[str, DataFile], cache: Path, server: str, tmp_path: Path) -> None:
    served = tmp_path / "served" / "one.txt"
    served.write_bytes(CONTENT["one"])
    files["one"] = _entry("one", f"{server}/one.txt")
    path = datasets.fetch("one")
    assert path == cache / "folder" / "one.txt"
    assert path.read_bytes() == CONTENT["one"]
    served.unlink()
    assert datasets.fetch("one") == path


def test_downloaded_file_with_other_bytes_is_refused(
    files: dict[str, DataFile], cache: Path, server: str, tmp_path: Path
) -> None:
    (tmp_path / "served" / "one.txt").write_bytes(b"tampered")
    files["one"] = _entry("one", f"{server}/one.txt")
    with pytest.raises(DataHashMismatch, match=f"{server}/one.txt is not the one 'one' was registered with"):
        datasets.fetch("one")
    assert _tree(cache) == []


def test_cached_file_with_other_bytes_is_refused(files: dict[str, DataFile], cache: Path, no_network: None) -> None:
    path = cache / files["one"].file
    path.parent.mkdir(parents=True)
    path.write_bytes(b"tampered")
    with pytest.raises(DataHashMismatch, match="delete the file") as caught:
        datasets.fetch("one")
    for part in (str(path), files["one"].sha256, hashlib.sha256(b"tampered").hexdigest()):
        assert part in str(caught.value)
    assert path.read_bytes() == b"tampered"
    # a corrupt cache must fail tests that need the data, not skip them
    assert not isinstance(caught.value, DataNotAvailable)


def test_offline_error_is_one_clear_sentence(cache: Path, no_network: None) -> None:
    start = time.monotonic()
    with pytest.raises(DataNotAvailable) as caught:
        datasets.kang_2018_wide()
    assert time.monotonic() - start < 15  # one retry, a second apart
    message = str(caught.value)
    for part in ("'kang_2018_wide.RData'", str(cache), "https://", "PERTURA_DATA_DIR", "network"):
        assert part in message
    assert "\n" not in message
    assert message.endswith(".")
    assert isinstance(caught.value, OSError)


def test_dead_server_does_not_hang(files: dict[str, DataFile], cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(_fetch, "READ_TIMEOUT", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts connections, never answers
        files["one"] = _entry("one", f"http://127.0.0.1:{silent.getsockname()[1]}/one.txt")
        start = time.monotonic()
        with pytest.raises(DataNotAvailable, match="ReadTimeout"):
            datasets.fetch("one")
        assert time.monotonic() - start < 15


def test_missing_address_is_reported(files: dict[str, DataFile], cache: Path, server: str) -> None:
    files["one"] = _entry("one", f"{server}/nothing.txt")
    with pytest.raises(DataNotAvailable, match="HTTPError"):
        datasets.fetch("one")


def test_fetch_unknown_key(files: dict[str, DataFile]) -> None:
    with pytest.raises(ValueError, match=r"`key` 'three' is not a data file; choose one of \['one', 'two'\]"):
        datasets.fetch("three")


# Filling


def test_fill_by_path_and_by_content(files: dict[str, DataFile], tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    (source / "folder").mkdir(parents=True)
    (source / "folder" / "one.txt").write_bytes(CONTENT["one"])
    (source / "renamed").write_bytes(CONTENT["two"])
    assert datasets.fill_cache(source, target) == {"one": "copied", "two": "copied"}
    assert _tree(target) == [str(Path("folder/one.txt")), str(Path("folder/two.txt"))]
    assert (target / "folder/two.txt").read_bytes() == CONTENT["two"]
    assert datasets.fill_cache(source, target) == {"one": "present", "two": "present"}


def test_fill_reports_and_repairs(files: dict[str, DataFile], tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    (source / "folder").mkdir(parents=True)
    (source / "folder" / "one.txt").write_bytes(b"x" * files["one"].bytes)  # right size, other bytes
    assert datasets.fill_cache(source, target) == {"one": "mismatch", "two": "missing"}
    assert not target.exists()
    (source / "folder" / "one.txt").write_bytes(CONTENT["one"])
    (target / "folder").mkdir(parents=True)
    (target / "folder" / "one.txt").write_bytes(b"broken")
    assert datasets.fill_cache(source, target)["one"] == "copied"
    assert (target / "folder" / "one.txt").read_bytes() == CONTENT["one"]


def test_fill_needs_a_folder(files: dict[str, DataFile], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`source` must be an existing folder"):
        datasets.fill_cache(tmp_path / "nothing")


def test_command_line_fill(
    files: dict[str, DataFile], cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "a").write_bytes(CONTENT["one"])
    assert __main__.main(["fill", str(source)]) == 1
    printed = capsys.readouterr()
    assert printed.out == f"{cache}: 1 copied, 1 missing\n"
    assert printed.err == "missing: folder/two.txt\n"
    (source / "b").write_bytes(CONTENT["two"])
    other = tmp_path / "other"
    assert __main__.main(["fill", str(source), str(other)]) == 0
    assert capsys.readouterr().out == f"{other}: 2 copied\n"
    assert __main__.main(["fill", str(tmp_path / "nothing")]) == 1
    assert "`source` must be an existing folder" in capsys.readouterr().err


def test_command_line_list(files: dict[str, DataFile], cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (cache / "folder").mkdir(parents=True)
    (cache / "folder" / "one.txt").write_bytes(CONTENT["one"])
    assert __main__.main(["list", "--files"]) == 0
    first, one, two = capsys.readouterr().out.splitlines()
    assert first == f"cache: {cache}"
    assert one.split() == ["one", str(len(CONTENT["one"])), "cached", "folder/one.txt", "[none]"]
    assert two.split() == ["two", str(len(CONTENT["two"])), "-", "folder/two.txt", "[none]"]


def test_command_line_lists_data_sets(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert __main__.main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("norman_mcfaline_mini"))
    assert "5,961 x 500" in lines[at] and "downloaded on first use" in lines[at]
    assert lines[at + 1].strip() == "perturbation_key='perturbation', control='control', context_key='cell_type'"
    assert str(cache) in lines[-1]


# Import


def test_import_is_cheap() -> None:
    code = (
        "import sys, pertura.datasets as d\n"
        "d.registry()\n"
        "heavy = {'scanpy', 'rdata', 'pooch', 'anndata', 'mudata', 'torch'} & set(sys.modules)\n"
        "print(sorted(heavy))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "[]\n", "")


def test_every_exported_name_exists() -> None:
    for name in datasets.__all__:
        assert getattr(datasets, name) is not None
