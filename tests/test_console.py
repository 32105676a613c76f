"""What is drawn and written: tables, JSON, progress on a terminal and off it."""

from __future__ import annotations

import io
import json
import sys
from dataclasses import replace

import numpy as np
import pytest

from xsave import console
from xsave.errors import StorageError
from xsave.progress import Finished, Pages, Round, Stage, undisturbed

EVENTS = [
    Stage("save", "freeze", "asking"),
    Stage("save", "pages"),
    Pages("save", 1024, 2048, 4 << 20, 7),
    Pages("save", 2048, 2048, 8 << 20, 7),
    Finished("save", 0.5, 2048, 8 << 20),
]


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self):
        return True


def test_a_plain_table_is_aligned_columns(capsys):
    """Off a terminal: one header line, no title, no trailing blanks, no escapes."""
    console.table("Title", ["Name", "ID"], [["a", "1"], ["longer", "22"]])
    assert capsys.readouterr().out == "Name    ID\na       1\nlonger  22\n"


def test_a_terminal_gets_the_same_cells(monkeypatch):
    """On a terminal: drawn by rich, and markup in a cell is text."""
    out = Terminal()
    monkeypatch.setattr(sys, "stdout", out)
    console.table("Title", ["Name"], [["[red]x[/red]"]])
    assert "Title" in out.getvalue()
    assert "[red]x[/red]" in out.getvalue()


def test_json_takes_numpy_and_bytes(capsys):
    """Numbers of numpy are numbers, bytes are hex."""
    console.emit_json({"n": np.uint64(1 << 63), "b": b"\x01\xff"})
    assert json.loads(capsys.readouterr().out) == {"n": 1 << 63, "b": "01ff"}


def test_everything_can_go_to_stderr(capsys):
    console.emit_json([], stderr=True)
    console.table("", ["A"], [["b"]], stderr=True)
    console.text("t", stderr=True)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "[]\nA\nb\nt\n"


def test_progress_as_json_lines(capsys):
    """Each event is one line with its class in lower case and its fields."""
    with console.progress("json") as report:
        for event in EVENTS:
            report(event)
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [line["event"] for line in lines] == ["stage", "stage", "pages", "pages", "finished"]
    assert lines[2] == {
        "event": "pages",
        "operation": "save",
        "done_pages": 1024,
        "total_pages": 2048,
        "done_bytes": 4 << 20,
        "zero_pages": 7,
    }


@pytest.mark.parametrize(
    ("mode", "options"), [("auto", {}), ("none", {}), ("auto", {"quiet": True})]
)
def test_no_progress_off_a_terminal(mode, options, capsys):
    """Logs are not filled with bars; json alone is always written."""
    with console.progress(mode, **options) as report:
        for event in EVENTS:
            report(event)
    assert capsys.readouterr() == ("", "")


def test_verbose_progress_off_a_terminal(capsys):
    """Stages and the end as lines, pages not."""
    with console.progress("auto", verbose=True) as report:
        for event in EVENTS:
            report(event)
    assert capsys.readouterr().err.splitlines() == [
        "save: freeze (asking)",
        "save: pages",
        "save: 2048 pages, 8.0 MiB in 0.50 s",
    ]


def test_progress_on_a_terminal(monkeypatch):
    """Each stage stands there by its name when it is over, with its duration."""
    out = Terminal()
    monkeypatch.setattr(sys, "stderr", out)
    with console.progress("auto") as report:
        for event in EVENTS:
            report(event)
    drawn = out.getvalue()
    assert "save: freeze (asking)" in drawn
    assert "save: 2048 pages, 8.0 MiB in 0.50 s" in drawn
    assert " ms" in drawn


def test_progress_on_a_terminal_is_taken_down_after_an_error(monkeypatch):
    """The error goes through, and the terminal's cursor is shown again."""
    out = Terminal()
    monkeypatch.setattr(sys, "stderr", out)
    monkeypatch.setenv("TERM", "xterm")
    with pytest.raises(StorageError), console.progress("auto") as report:
        report(EVENTS[0])
        raise StorageError("x")
    assert out.getvalue().rindex("\x1b[?25h") > out.getvalue().rindex("\x1b[?25l")


class Broken(io.StringIO):
    """A stream whose writes fail."""

    def __init__(self, problem):
        super().__init__()
        self.problem = problem

    def write(self, _text):
        raise self.problem


def test_a_write_that_fails_is_a_storage_error(monkeypatch):
    monkeypatch.setattr(sys, "stdout", Broken(OSError(28, "No space left on device")))
    with pytest.raises(StorageError, match="ENOSPC"):
        console.text("x")


def test_a_reader_that_left_is_not(monkeypatch):
    """The command line treats it as a clean stop."""
    monkeypatch.setattr(sys, "stdout", Broken(BrokenPipeError()))
    with pytest.raises(BrokenPipeError):
        console.text("x")


def test_talk_that_nobody_hears_stops_nothing(monkeypatch):
    """What is said beside the work is no reason to end before it; a full disk is one."""
    monkeypatch.setattr(sys, "stderr", Broken(BrokenPipeError()))
    console.say("x")
    with console.progress(verbose=True) as report:
        report(EVENTS[0])
    monkeypatch.setattr(sys, "stderr", Broken(OSError(28, "No space left on device")))
    with pytest.raises(StorageError, match="ENOSPC"):
        console.say("x")


def test_what_is_reported_goes_on_without_a_reader():
    """Nothing is told to one who left; whatever else goes wrong with a report is an error."""
    told = []

    def report(event):
        told.append(event)
        if event == 2:
            raise BrokenPipeError
        if event == 0:
            raise StorageError("no room")

    tell = undisturbed(report)
    with pytest.raises(StorageError):
        tell(0)
    for event in (1, 2, 3):
        tell(event)
    assert told == [0, 1, 2]


def test_reporting_an_error_never_fails(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Broken(OSError(5, "Input/output error")))
    console.error("x")


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (64 << 20, "64.0 MiB"),
        (3 << 29, "1.5 GiB"),
        (5 << 50, "5120.0 TiB"),
    ],
)
def test_human_bytes(count, text):
    assert console.human_bytes(count) == text


def test_a_round_says_what_of_it_was_special():
    usual = Round("migrate", 1, 9, 4, 0, 20000, 0.5, 3, 1e6, 2e6, 0.03)
    assert "9 pages (4 empty)," in console.round_line(usual)
    special = replace(usual, deferred_pages=2, skipped_pages=7)
    assert "9 pages (4 empty, 2 deferred, 7 more skipped)," in console.round_line(special)
