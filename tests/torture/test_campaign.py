"""Many points: the same whatever does them and however often it was interrupted."""

from __future__ import annotations

import dataclasses
import os
import signal
import time
from pathlib import Path

import pytest

from tests.torture.conftest import DIRTY, SETTINGS
from xsave.torture import campaign
from xsave.torture.journal import Journal
from xsave.torture.table import summarise

ARGUMENTS = (
    "torture", "--preempt", "full", "--freezer", "off", "--stop-machine", "on", "--vcpus", 1,
)  # fmt: skip


def children():
    """The processes this one has started and that still are."""
    return Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()


def run(path, jobs, report=lambda done, where: None):
    settings = dataclasses.replace(SETTINGS, jobs=jobs)
    journal = Journal(settings, path)
    try:
        campaign.run([DIRTY], settings, journal, report)
    finally:
        journal.close()
    return summarise([DIRTY], journal), journal.points


def test_the_table_is_the_same(tmp_path, monkeypatch):
    """One process at a stretch, or two that are interrupted and resumed: the same, bit for bit,
    and no process is left."""
    monkeypatch.setattr(campaign, "_POINTS_PER_PART", 1)
    before = children()

    def interrupt(done, _where):
        if done == 3:
            raise KeyboardInterrupt

    whole = run(None, 1)
    path = tmp_path / "journal"
    with pytest.raises(KeyboardInterrupt):
        run(path, 2, interrupt)
    assert children() == before
    assert 3 <= len(Journal(SETTINGS, path).points) <= SETTINGS.max_points
    with path.open("ab") as stream:
        stream.write(b'{"at": "full-off')
    again = run(path, 2)
    assert children() == before
    assert again == whole
    ((cell,), points) = whole
    assert cell["points"] == len(points) == SETTINGS.max_points


def processes_with(word):
    """The pids of the processes with this in their command line."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                if word.encode() in (entry / "cmdline").read_bytes():
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_an_end_is_the_end_of_all(xsave, tmp_path, number, code):
    """Ctrl-C exits with 130; and whatever ends the command, no process of it is left."""
    path = tmp_path / "a-journal-of-its-own"
    process = xsave.start(*ARGUMENTS, "--quick", "--max-points", 500, "--journal", path)
    while not path.exists() or path.read_bytes().count(b"\n") < 2:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == code
    deadline = time.monotonic() + 20
    while processes_with(path.name) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert processes_with(path.name) == []
