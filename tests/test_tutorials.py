"""The notebooks as they are committed: run to the end, small, and from nobody's machine in particular."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "tutorials"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def test_there_are_some():
    assert NOTEBOOKS
    listed = (FOLDER.parent / "docs" / "tutorials.md").read_text()
    assert {name for path in NOTEBOOKS if (name := f"tutorials/{path.stem}") not in listed} == set()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook(path: Path):
    text = path.read_text()
    assert len(text) < 1.5e6
    cells = [c for c in json.loads(text)["cells"] if c["cell_type"] == "code"]
    assert [c["execution_count"] for c in cells] == list(range(1, len(cells) + 1)), "run it from top to bottom"
    outputs = [o for c in cells for o in c["outputs"]]
    assert not [o for o in outputs if o["output_type"] == "error" or o.get("name") == "stderr"]
    assert any("image/png" in o.get("data", {}) for o in outputs)
    written = "".join(
        json.dumps({k: v for k, v in o.get("data", {}).items() if k != "image/png"}) + json.dumps(o.get("text", ""))
        for o in outputs
    )
    assert not re.findall(r"(?:/(?:home|root|tmp|Users|usr|opt|work|var)/|[A-Z]:\\\\)[^\"\s]*", written)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_the_code_compiles(path: Path):
    for cell in json.loads(path.read_text())["cells"]:
        if cell["cell_type"] == "code":
            compile("".join(cell["source"]), path.name, "exec")
