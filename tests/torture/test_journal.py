"""A journal takes a run up where it was, and no other run."""

from __future__ import annotations

import dataclasses

import pytest

from tests.torture.conftest import DIRTY, SETTINGS
from xsave.errors import StorageError, UsageError
from xsave.torture.campaign import jobs_of
from xsave.torture.journal import Journal
from xsave.torture.table import summarise

SWEEP = {"sweep": "full-off-on-1/v0", "window": 9, "instructions": 5, "planned": 2, "traced": 9}


def point(index, fate="fine", kinds=()):
    return {
        "at": f"full-off-on-1/v0/{index}", "instruction": "f+0x1", "fate": fate,
        "failed": fate == "foreign", "kinds": list(kinds), "dead": 0, "places": [],
        "image": "", "detail": "",
    }  # fmt: skip


def filled(path):
    journal = Journal(SETTINGS, path)
    for record in (SWEEP, point(3), point(7, "foreign", ["stack"])):
        journal.add(record)
    journal.close()
    return journal


def test_what_was_found_is_found_again(tmp_path):
    """The same sweeps, points and table come out of the file."""
    path = tmp_path / "journal"
    first = filled(path)
    second = Journal(SETTINGS, path)
    second.close()
    assert (second.sweeps, second.points) == (first.sweeps, first.points)
    assert second.done(SWEEP["sweep"]) == {3, 7}
    assert summarise([DIRTY], second) == summarise([DIRTY], first)
    assert jobs_of([DIRTY], SETTINGS, second) == []


def test_the_table_counts(tmp_path):
    """Points, stale ones and lost guests of a cell, and that it is as claimed."""
    (cell,) = summarise([DIRTY], filled(tmp_path / "journal"))
    keys = ["preempt", "freezer", "stop_machine", "vcpus", "points", "stale", "guest_failed"]
    assert list(cell)[:7] == keys
    assert [cell[key] for key in keys] == ["full", "off", "on", 1, 2, 1, 1]
    assert cell["fates"] == {"fine": 1, "foreign": 1}
    assert cell["as_claimed"] is True


@pytest.mark.parametrize("cut", [1, 20, 60])
def test_half_a_line_is_dropped(tmp_path, cut):
    """A kill in the middle of a line costs that line only, and the file is whole again."""
    path = tmp_path / "journal"
    filled(path)
    path.write_bytes(path.read_bytes()[:-cut])
    journal = Journal(SETTINGS, path)
    assert journal.done(SWEEP["sweep"]) == {3}
    (job,) = jobs_of([DIRTY], SETTINGS, journal)
    assert job.done == {3}
    journal.add(point(7, "foreign", ["stack"]))
    journal.close()
    assert Journal(SETTINGS, path).done(SWEEP["sweep"]) == {3, 7}


@pytest.mark.parametrize("change", [{"seed": 9}, {"max_points": 9}, {"every": 9}, {"threads": 1}])
def test_another_run(tmp_path, change):
    """The journal of a run with other settings is refused; the number of jobs does not matter."""
    path = tmp_path / "journal"
    filled(path)
    with pytest.raises(UsageError, match="another run"):
        Journal(dataclasses.replace(SETTINGS, **change), path)
    Journal(dataclasses.replace(SETTINGS, jobs=7), path).close()


def test_no_journal(tmp_path):
    """A file of something else is refused and stays as it is; a directory cannot be written."""
    path = tmp_path / "letter"
    path.write_text("Dear all,\n")
    with pytest.raises(UsageError, match="no journal"):
        Journal(SETTINGS, path)
    assert path.read_text() == "Dear all,\n"
    with pytest.raises(StorageError):
        Journal(SETTINGS, tmp_path / "nowhere" / "journal")
