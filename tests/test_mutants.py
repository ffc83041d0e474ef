"""The list of mutants keeps up with the source; `python tests/mutants.py` runs them."""

from __future__ import annotations

import importlib.util
import sys
from collections import Counter
from pathlib import Path

import pytest

path = Path(__file__).parent / "mutants.py"
spec = importlib.util.spec_from_file_location("mutants", path)
mutants = sys.modules["mutants"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(mutants)


def test_every_mutant_applies():
    assert list(mutants.problems()) == []


def test_mutants_are_of_all_parts():
    parts = Counter(m.file.partition("/")[0] for m in mutants.MUTANTS)
    assert len(mutants.MUTANTS) >= 60
    assert all(parts[name] >= 2 for name in ("module", "model", "effects", "train", "metrics", "data", "nn", "pp"))


def test_no_more_than_one_in_twenty_is_argued():
    assert sum(bool(m.survives) for m in mutants.MUTANTS) <= len(mutants.MUTANTS) // 20


def test_a_mutant_of_a_source_that_changed_says_so():
    mutant = mutants.Mutant("gone", "nn/_sem.py", "no such text", "", "nn/test_sem.py")
    assert list(mutants.problems([mutant])) == [
        "mutant gone no longer applies: nn/_sem.py has its text 0 times, not once"
    ]
    mutant = mutants.Mutant("unseen", "nn/_sem.py", "return weight", "return 0", "nn/test_sem.py", "gone or sem")
    assert "mutant unseen: no test is called 'gone'" in list(mutants.problems([mutant]))
    with pytest.raises(ValueError, match="has its text 2 times"):
        mutants.Mutant("twice", "a.py", "x", "y", "").applied("x x")
