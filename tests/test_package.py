"""The package as a whole: metadata, cheap import, command line."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
import tomllib
from importlib.metadata import entry_points, requires, version
from pathlib import Path

import pytest

import pertura
from pertura import _cli

ROOT = Path(__file__).parents[1]
HEAVY = (
    "torch",
    "scvi",
    "pyro",
    "lightning",
    "scanpy",
    "anndata",
    "mudata",
    "pandas",
    "matplotlib",
    "sklearn",
    "pooch",
)


def _run(code: str) -> str:
    """What `code` prints in a new interpreter."""
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def _optional() -> set[str]:
    """Import names of what the extras for users install."""
    lines = [line for line in requires("pertura") if re.search(r"extra == '(scale|text|tune)'", line.replace('"', "'"))]
    return {re.split(r"[\s<>=!~;\[]", line, maxsplit=1)[0].replace("-", "_") for line in lines}


def test_version_is_the_distribution_s():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert pertura.__version__ == version("pertura") == project["version"]
    assert f"version: {project['version']}\n" in (ROOT / "CITATION.cff").read_text()


def test_import_is_cheap():
    code = (
        "import json, sys, time; start = time.process_time(); import pertura;"
        "took = time.process_time() - start;"
        "print(json.dumps([took, sorted({name.partition('.')[0] for name in sys.modules})]))"
    )
    took, modules = json.loads(_run(code))
    assert "pertura" in modules
    assert not set(HEAVY) & set(modules)
    assert took < 1


@pytest.mark.parametrize("name", sorted(set(pertura.__all__) - {"__version__"}))
def test_submodules(name: str):
    assert name in dir(pertura)
    module = getattr(pertura, name)
    assert module is importlib.import_module(f"pertura.{name}")
    assert module.__doc__
    missing = [entry for entry in getattr(module, "__all__", []) if not hasattr(module, entry)]
    assert not missing


@pytest.mark.parametrize("name", sorted(set(pertura.__all__) - {"__version__"}))
def test_public_names_are_in_the_api_pages(name: str):
    pages = "\n".join(page.read_text() for page in (ROOT / "docs" / "api").glob("*.md"))
    listed = set(re.findall(rf"^(?:   |\.\. py:data:: ){name}\.(\w+)$", pages, re.MULTILINE))
    public = set(getattr(getattr(pertura, name), "__all__", []))
    assert listed == public, "docs/api has one line `   namespace.name` per public name"


def test_no_submodule_needs_an_extra():
    names = sorted(set(pertura.__all__) - {"__version__"})
    assert {"ray", "sentence_transformers"} <= _optional()
    # None in sys.modules makes the import fail, whether or not the package is installed.
    code = (
        f"import importlib, sys\nfor name in {sorted(_optional())!r}: sys.modules[name] = None\n"
        f"for name in {names!r}:\n    module = importlib.import_module('pertura.' + name)\n"
        "    for entry in getattr(module, '__all__', []): getattr(module, entry)\n"
        "print('imported')"
    )
    assert _run(code).strip() == "imported"


def test_public_packages_are_submodules():
    found = {path.parent.name for path in (ROOT / "src" / "pertura").glob("[a-z]*/__init__.py")}
    assert found <= set(pertura.__all__)


def test_typed():
    assert (Path(pertura.__file__).parent / "py.typed").is_file()


def test_command_is_installed():
    (script,) = entry_points(group="console_scripts", name="pertura")
    assert script.load() is _cli.main


def test_cli_version_and_help(capsys: pytest.CaptureFixture[str]):
    for flag, expected in (("--version", f"pertura {pertura.__version__}"), ("--help", "quickstart")):
        with pytest.raises(SystemExit) as stopped:
            _cli.main([flag])
        assert stopped.value.code == 0
        assert expected in capsys.readouterr().out


def test_cli_alone_prints_help(capsys: pytest.CaptureFixture[str]):
    assert _cli.main([]) == 0
    printed = capsys.readouterr().out
    assert all(command in printed for command in _cli._COMMANDS)


@pytest.mark.parametrize("argv", [["unknown"], ["--unknown"]])
def test_cli_refuses(argv: list[str], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stopped:
        _cli.main(argv)
    assert stopped.value.code == 2
    assert "unknown" in capsys.readouterr().err


@pytest.mark.parametrize(("returned", "status"), [(None, 0), (3, 3)])
def test_cli_hands_over_arguments(returned: int | None, status: int, monkeypatch: pytest.MonkeyPatch):
    seen = []

    class Module:
        @staticmethod
        def main(argv: list[str]) -> int | None:
            seen.append(argv)
            return returned

    monkeypatch.setattr(_cli, "import_module", lambda name: seen.append(name) or Module)
    assert _cli.main(["quickstart", "--seed", "1"]) == status
    assert seen == ["pertura._quickstart", ["--seed", "1"]]


@pytest.mark.parametrize("command", sorted(_cli._COMMANDS))
def test_cli_commands_exist(command: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stopped:
        _cli.main([command, "--help"])
    assert stopped.value.code == 0
    assert f"usage: pertura {command}" in capsys.readouterr().out.lower()


def test_python_m_pertura():
    result = subprocess.run([sys.executable, "-m", "pertura", "--version"], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == f"pertura {pertura.__version__}"


@pytest.mark.parametrize("name", ["quickstart", "test"])
def test_readme_has_the_commands_ci_runs(name: str):
    block = re.search(rf"^<!-- ci: {name} -->\n```bash\n(.+)\n```$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert block is not None
    assert "\n" not in block[1]
    assert block[1].startswith("python -m pip install -c constraints.txt ")
