"""The bar of a training, by itself."""

from __future__ import annotations

import copy
import pickle

import pytest

from pertura.train._progress import Progress


def bar():
    """Drawn at every step, on the stream of the test that calls it."""
    made = Progress(True)
    made._every = 0.0
    return made


def test_stages_share_what_is_left_of_a_part(capsys):
    with bar() as progress:
        at = []
        progress.part("finish")
        progress.stage("One", total=4)
        for _ in range(4):
            progress.advance()
            at.append(progress._bar.n)
        progress.stage("Two")
        at.append(progress._bar.n)
        progress.stage("Three", total=2, share=1.0)
        progress.reach(5)  # more than was announced
        at.append(progress._bar.n)
    assert at == pytest.approx([95.625, 96.25, 96.875, 97.5, 97.5, 100.0])


def test_items_pass_unchanged():
    with bar() as progress:
        progress.part("prepare")
        assert list(progress.track(iter("abc"), "Letters", total=3, share=1.0)) == ["a", "b", "c"]
        assert progress._bar.n == pytest.approx(5.0)


def test_nothing_is_left_on_the_screen_after_an_error(capsys):
    with pytest.raises(ValueError, match="no"), bar():
        raise ValueError("no")
    assert capsys.readouterr().out.split("\r")[-2].strip() == ""


def test_messages_have_a_line_of_their_own(capsys):
    with bar() as progress:
        progress.stage("Working")
        with progress.aside():
            print("message")
    lines = capsys.readouterr().out.split("\n")
    assert lines[0].split("\r")[-1] == "message"
    assert "Working" in lines[1]


def test_without_a_bar(capsys):
    with Progress() as progress:
        progress.part("train")
        assert list(progress.track([1, 2], "Numbers")) == [1, 2]
        with progress.aside():
            pass
    assert capsys.readouterr().out == ""


def test_copies_have_no_bar():
    with bar() as progress:
        progress.show_values(lambda: {"loss": 1.0})
        assert copy.deepcopy(progress)._bar is None
        assert pickle.loads(pickle.dumps(progress))._bar is None
        assert progress._bar is not None
