"""Fixtures of all tests: the cache of public data files."""

from __future__ import annotations

import copy
import multiprocessing
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # as many processes as cores: one thread each
    os.environ.setdefault("OMP_NUM_THREADS", "1")

LOCAL_FILES = Path(__file__).parents[2] / "shared" / "data"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """In parallel, tests that share a trained model run in one process, and those of a file."""
    if not getattr(config.option, "loadgroup", False):  # as xdist sets it in its processes
        return
    for item in items:
        own = item.get_closest_marker("xdist_group")
        if own is not None:
            continue
        params = item.callspec.params if hasattr(item, "callspec") else {}
        specs = [params[name] for name in ("spec", "gradient_spec", "shared_spec") if name in params]
        item.add_marker(pytest.mark.xdist_group(specs[0].name if specs else item.path.stem))


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """In parallel, numba (scanpy's neighbours) gives each process as many threads as there are cores."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        import torch

        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.fixture(autouse=True)
def global_seed() -> Iterator[None]:
    """No function of the package may change the seed that the user set for all of scvi-tools."""
    from scvi import settings

    before = settings.seed
    yield
    after, settings._seed = settings.seed, before
    assert after == before, f"scvi.settings.seed was {before}, and is {after} after the test"


@pytest.fixture(scope="session", autouse=True)
def data_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Let `pertura.datasets` find the files next to the repository, unless `PERTURA_DATA_DIR` is set."""
    if os.environ.get("PERTURA_DATA_DIR") or not LOCAL_FILES.is_dir():
        yield
        return
    from pertura.datasets import fill_cache

    folder = tmp_path_factory.mktemp("pertura_data")
    fill_cache(LOCAL_FILES, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PERTURA_DATA_DIR", str(folder))
        yield


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every connection fail at once."""

    def refuse(*_args: object, **_kwargs: object) -> None:
        raise socket.gaierror("blocked by the test")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture
def offline(no_network: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither data files nor network."""
    monkeypatch.setenv("PERTURA_DATA_DIR", str(tmp_path / "empty"))


@pytest.fixture(scope="session")
def without_data() -> Callable[[object], None]:
    """`without_data(reason)` skips the test, or lets it fail where `PERTURA_REQUIRE_DATA` says that all data must be there."""

    def leave(reason: object) -> None:
        if os.environ.get("PERTURA_REQUIRE_DATA", "0") not in ("", "0"):
            pytest.fail(f"PERTURA_REQUIRE_DATA is set, but data are missing: {reason}", pytrace=False)
        pytest.skip(str(reason))

    return leave


@pytest.fixture(scope="session")
def load_dataset(data_cache: None, without_data: Callable[[object], None]) -> Callable[..., Any]:
    """`load_dataset("papalexi_2021", **arguments)` gives a fresh copy; `without_data` what is in neither package, cache nor network."""
    from pertura import datasets

    loaded: dict[str, Any] = {}

    def load(name: str, **arguments: Any) -> Any:
        key = f"{name}({sorted(arguments.items())})"
        if key not in loaded:
            try:
                loaded[key] = getattr(datasets, name)(**arguments)
            except datasets.DataNotAvailable as error:
                loaded[key] = error
        value = loaded[key]
        if isinstance(value, datasets.DataNotAvailable):
            without_data(value)
        return value.copy() if hasattr(value, "obs") else copy.deepcopy(value)

    return load


@pytest.fixture
def fork(tmp_path: Path) -> Callable[..., tuple[list[int], list[Any]]]:
    """Run ``target(rank)`` in processes that can talk: how they ended, and what those that did well returned.

    They are forked, so that they need not import anything anew.
    """
    import torch

    def start(target: Callable[[int], Any], n: int = 2, timeout: float = 100) -> tuple[list[int], list[Any]]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])

        def run(rank: int) -> None:
            # as launchers of clusters do: Lightning then starts no processes of its own
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, LOCAL_RANK=str(rank), NODE_RANK="0")
            torch.set_num_threads(1)
            torch.save(target(rank), tmp_path / f"{rank}.pt")

        processes = [multiprocessing.get_context("fork").Process(target=run, args=(rank,)) for rank in range(n)]
        for process in processes:
            process.start()
        end = time.monotonic() + timeout
        for process in processes:
            process.join(max(0.0, end - time.monotonic()))
        codes = [process.exitcode for process in processes]
        for process in processes:
            process.kill()
        assert None not in codes, "a process hangs"
        found = [torch.load(tmp_path / f"{r}.pt", weights_only=False) for r in range(n) if codes[r] == 0]
        return codes, found

    return start
