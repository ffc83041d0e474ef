"""The API pages: every public class with every member that a user calls, and no broken reference."""

from __future__ import annotations

import html
import importlib
import importlib.util
import inspect
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from scvi.model.base import BaseModelClass

import pertura

ROOT = Path(__file__).parents[1]
OF_SCVI = {"adata", "history", "is_trained", "load", "save", "to_device", "train", "view_anndata_setup"}


def _classes() -> dict[str, type]:
    """Public classes by the name under which users import them."""
    found = {}
    for namespace in sorted(set(pertura.__all__) - {"__version__"}):
        module = importlib.import_module(f"pertura.{namespace}")
        found |= {f"pertura.{namespace}.{name}": getattr(module, name) for name in module.__all__}
    return {name: value for name, value in found.items() if inspect.isclass(value)}


CLASSES = _classes()
MODELS = {name: cls for name, cls in CLASSES.items() if issubclass(cls, BaseModelClass)}


def _called_by_users(cls: type) -> dict[str, object]:
    """Methods and properties without an underscore, less those that scvi-tools has for itself."""
    members = {name: inspect.getattr_static(cls, name) for name in dir(cls) if not name.startswith("_")}
    owner = {name: next(base.__module__ for base in cls.__mro__ if name in vars(base)) for name in members}
    return {
        name: value
        for name, value in members.items()
        if (owner[name].startswith("pertura.") or (name in OF_SCVI and owner[name].startswith("scvi.")))
        and (isinstance(value, property) or callable(getattr(cls, name)))
    }


@pytest.fixture(scope="module")
def api_pages():
    spec = importlib.util.spec_from_file_location("api_pages", ROOT / "docs" / "extensions" / "api_pages.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def listed(api_pages):
    return api_pages.template_context()["user_members"]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site; any warning, so any broken reference, fails."""
    pytest.importorskip("sphinx_book_theme", reason="the extra `doc` is not installed")
    source, target = tmp_path_factory.mktemp("repository"), tmp_path_factory.mktemp("site")
    unwritten = shutil.ignore_patterns("_build", "generated", "tutorials", "jupyter_execute")
    shutil.copytree(ROOT / "docs", source / "docs", ignore=unwritten)
    for folder in (".github", "tutorials"):
        shutil.copytree(ROOT / folder, source / folder)
    for name in ("CHANGELOG.md", "README.md"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", source / "docs", target]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return target


@pytest.fixture(scope="module")
def inventory(site: Path) -> set[str]:
    """Names that other projects, and search engines, find."""
    from sphinx.util.inventory import InventoryFile

    with (site / "objects.inv").open("rb") as file:
        entries = InventoryFile.load(file, "", lambda base, location: location)
    return {name for kind, named in entries.items() if kind.startswith("py:") for name in named}


def test_models_are_found():
    assert {"pertura.model.PertVAE", "pertura.model.SAMSVAE", "pertura.baseline.MeanEffect"} <= set(MODELS)
    assert {"train", "save", "get_perturbation_effect"} <= set(_called_by_users(pertura.model.PertVAE))


@pytest.mark.parametrize("name", CLASSES)
def test_pages_list_what_users_call(name: str, listed):
    methods, attributes = listed[name]["methods"], listed[name]["attributes"]
    called = _called_by_users(CLASSES[name])
    assert set(called) <= {*methods, *attributes}
    assert {n for n, value in called.items() if isinstance(value, property)} <= set(attributes)
    assert [n for n in called if not inspect.getdoc(getattr(CLASSES[name], n))] == [], "without a docstring"


def test_inherited_members_of_libraries_stay_out(api_pages):
    """A module has the methods of pertura, not the hundred of torch; a model not what scvi-tools has for itself."""
    assert "state_dict" not in api_pages.user_members(pertura.nn.MLP)["methods"]
    assert "add_note" not in api_pages.user_members(pertura.datasets.DataNotAvailable)["methods"]
    assert "register_manager" not in api_pages.user_members(pertura.model.PertVAE)["methods"]


@pytest.mark.slow
def test_inventory_has_what_users_call(inventory: set[str]):
    called = {f"{name}.{member}" for name, cls in CLASSES.items() for member in _called_by_users(cls)}
    assert sorted(called - inventory) == []
    assert "pertura.metrics.METRICS" in inventory
    assert not [name for name in inventory if not name.startswith("pertura.") and name != "pertura"]


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_page_of_a_model(name: str, site: Path):
    page = (site / "api" / "generated" / f"{name}.html").read_text()
    for member in _called_by_users(MODELS[name]):
        assert f'id="{name}.{member}"' in page
    text = html.unescape(re.sub(r"<[^>]+>", "", page))
    assert re.search(r"Return type:\s+DataFrame", text) and re.search(r"Returns:\s+\w", text)
    assert not re.search(r"Return(s| type):\s+:", text)
    assert not re.search(r"Bases: .*(Mixin|\._)", text)
