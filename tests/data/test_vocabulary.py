"""Names, combinations, doses and codes of perturbations."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from pertura.data import Vocabulary, build_vocabulary
from pertura.data._vocabulary import encode_cells, member_doses, parse_label


@pytest.mark.parametrize(
    ("label", "members"),
    [
        ("ctrl", ()),
        ("A", ("A",)),
        ("B+A", ("A", "B")),
        (" B + A ", ("A", "B")),
        ("A+ctrl", ("A",)),
        ("ctrl+A", ("A",)),
        ("A+A", ("A",)),
        ("ctrl+ctrl", ()),
        ("", ()),
        ("A+", ("A",)),
    ],
)
def test_members(label, members):
    assert parse_label(label, "ctrl") == members


def test_other_delimiters():
    assert parse_label("B|A", "ctrl", "|") == ("A", "B")
    assert parse_label("B+A", "ctrl", "|") == ("B+A",)
    # a delimiter is no regular expression, and may be part of the control's name
    assert parse_label("no+thing", "no+thing", "+") == ()


@pytest.fixture
def vocabulary():
    labels = pd.Series(["ctrl", "B", "C+A", "B", "A+C", "B+ctrl"])
    doses = pd.Series(["0", "2", "1+0.5", "4", "3+3", "2"])
    return build_vocabulary(labels, "ctrl", doses=doses)


def test_what_is_known(vocabulary):
    assert vocabulary.names == ("A", "B", "C")
    assert vocabulary.combinations == (("A", "C"),)
    assert vocabulary.labels == ["A", "B", "C", "A+C"]
    assert vocabulary.order == 2
    # C+A carries 1 and 0.5: C at 1, A at 0.5; A+C carries 3 and 3
    assert vocabulary.doses == ((0.5, 3.0), (2.0, 4.0), (1.0, 3.0))
    assert vocabulary.max_dose == (3.0, 4.0, 3.0)
    assert vocabulary.reference_dose[1] == 2.0


def test_most_frequent_dose_and_the_higher_of_two():
    labels, doses = pd.Series(["A"] * 5 + ["ctrl"]), pd.Series([1.0, 1.0, 9.0, 9.0, 4.0, 0.0])
    assert build_vocabulary(labels, "ctrl", doses=doses).reference_dose == (9.0,)


def test_codes(vocabulary):
    assert vocabulary.code(("A", "C")).tolist() == [0, 2]
    assert vocabulary.code(("C",), 3).tolist() == [2, -1, -1]
    assert vocabulary.code((), 2).tolist() == [-1, -1]
    assert vocabulary.code(("A", "new")).tolist() == [0, -2]


def test_registry_round_trip(vocabulary):
    assert Vocabulary.from_registry(vocabulary.to_registry()) == vocabulary


@pytest.mark.parametrize(
    ("label", "dose", "expected"),
    [
        ("ctrl", (), "control"),
        ("A", (), "seen"),
        ("A", (0.5,), "seen"),
        ("A", (0.6,), "new dose"),
        ("A", (0.0,), "control"),
        ("C+A", (0.5, 1.0), "seen"),
        ("A+C", (0.5, 2.0), "new dose"),
        ("A+B", (0.5, 2.0), "new combination"),
        ("A+B+C", (), "new combination"),
        ("D", (), "unseen"),
        ("A+D", (), "unseen"),
    ],
)
def test_novelty(vocabulary, label, dose, expected):
    assert vocabulary.novelty(label, dose) == expected


def test_novelty_with_features():
    table = pd.DataFrame({"x": [1.0, 2.0]}, index=["A", "D"])
    vocabulary = build_vocabulary(pd.Series(["ctrl", "A", "B"]), "ctrl", features=table)
    assert vocabulary.novelty("D") == "unseen with features"
    assert vocabulary.novelty("B+D") == "unseen with features"
    assert vocabulary.novelty("D+E") == "unseen"
    matrix = vocabulary.feature_matrix(["D", "B", ""])
    assert matrix.dtype == np.float32 and matrix.tolist() == [[2.0], [0.0], [0.0]]
    matrix[0] = 5.0  # not a view of the table, which pandas 3 would not let one write to
    assert vocabulary.feature_matrix(["D"]).tolist() == [[2.0]]
    # a table that describes no perturbation of the data
    assert build_vocabulary(pd.Series(["A"]), "ctrl", features=table[:0]).feature_matrix(["A"]).tolist() == [[0.0]]
    with pytest.raises(ValueError, match="no perturbation features"):
        build_vocabulary(pd.Series(["A"]), "ctrl").feature_matrix(["A"])


def test_doses_of_members():
    labels = pd.Series(["ctrl", "B", "C+A", "A+ctrl", "A+B"])
    numbers = member_doses(labels, pd.Series([0.0, 2.0, 3.0, 4.0, 5.0]), "ctrl", "+")
    assert numbers.tolist() == [[0, 0], [2, 0], [3, 3], [4, 0], [5, 5]]
    texts = member_doses(labels, pd.Series(["0", "2", "1+0.5", "4+0", "7"]), "ctrl", "+")
    assert texts.tolist() == [[0, 0], [2, 0], [0.5, 1], [4, 0], [7, 7]]
    categories = pd.Series(["0", "2", "1+0.5", "4+0", "7"], dtype="category")
    assert member_doses(labels, categories, "ctrl", "+").tolist() == texts.tolist()


def test_cells(vocabulary):
    labels = pd.Series(["ctrl", "C+A", "B", "new", "B"])
    encoded = encode_cells(vocabulary, labels, pd.Series(["0", "3+1.5", "4", "2", "1"]))
    assert encoded.dtype == np.float32
    assert encoded[:, :2].tolist() == [[-1, -1], [0, 2], [1, -1], [-2, -1], [1, -1]]
    # in units of the highest registered dose; of an unknown perturbation in their median
    expected = [[0, 0], [0.5, 1], [1, 0], [2 / 3, 0], [0.25, 0]]
    np.testing.assert_allclose(encoded[:, 2:], expected, rtol=1e-6)
    wide = encode_cells(vocabulary, labels, None, order=3)
    assert wide.shape == (5, 6)
    assert wide[:, 3:].tolist() == [[0, 0, 0], [1, 1, 0], [1, 0, 0], [1, 0, 0], [1, 0, 0]]


def test_many_cells_are_encoded_quickly():
    """By distinct labels, not by cells."""
    import time

    rng = np.random.default_rng(0)
    names = np.array(["ctrl", *(f"P{i}" for i in range(20))])
    labels = pd.Series(names[rng.integers(len(names), size=200_000)])
    doses = pd.Series(np.where(labels == "ctrl", 0.0, rng.integers(1, 4, size=len(labels))))
    start = time.process_time()
    encode_cells(build_vocabulary(labels, "ctrl", doses=doses), labels, doses)
    assert time.process_time() - start < 3
