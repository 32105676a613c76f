"""The journal of one side: what stands in it is whole at any moment, and only the table's steps are
taken."""

from __future__ import annotations

import errno
import os
import subprocess
import sys

import pytest

from xsave.errors import GuestStateError, NameTaken, NotFound, StorageError, UsageError
from xsave.host.handover import journal as module
from xsave.host.handover.journal import Journal, Journals
from xsave.host.handover.table import SOURCE, STEPS, TARGET, State, Step


@pytest.fixture
def journals(tmp_path):
    """Those of a host with none."""
    return Journals(tmp_path)


def begin(journals, role=SOURCE, transaction="0123abcd", name="g"):
    return journals.begin(role, transaction, name, "b")


def test_what_is_written_stands(journals):
    """Steps and notes are read again, by whoever opens the file."""
    with begin(journals) as journal:
        journal.note(domid=7)
        journal.take(Step.HOLD)
        (other,) = journals.all()
        entry = other.read()
        assert (entry.state, entry.domid, entry.name, entry.peer) == (State.HELD, 7, "g", "b")
        assert entry.changed >= entry.began
    assert journals.get(SOURCE, "0123abcd").read() == entry
    assert journals.get(TARGET, "0123abcd") is None


@pytest.mark.parametrize("step", Step)
@pytest.mark.parametrize("state", State)
def test_only_the_tables_steps_are_taken(journals, state, step):
    """From any state: a step the table has, one that is done already (nothing), or an error and
    nothing."""
    with begin(journals) as journal:
        journal.note(state=state)
        allowed, after = STEPS[step]
        if state in allowed or state == after:
            assert journal.take(step).state == journal.read().state == after
        else:
            with pytest.raises(GuestStateError, match=state):
                journal.take(step)
            assert journal.read().state == state


def test_what_cannot_be_written_is_not_unknown(journals, monkeypatch):
    """A file that is there and cannot be changed (a disk that is read-only by now) is no missing
    journal: whoever goes on without one does not go on then."""
    with begin(journals) as journal:
        path, real = str(journal.path), os.open

        def read_only(name, flags, *mode, **how):
            if str(name) == path and flags & os.O_ACCMODE != os.O_RDONLY:
                raise OSError(errno.EROFS, os.strerror(errno.EROFS))
            return real(name, flags, *mode, **how)

        with monkeypatch.context() as patched:
            patched.setattr(module.os, "open", read_only)
            for change in (lambda: journal.take(Step.HOLD), lambda: journal.note(domid=7)):
                with pytest.raises(StorageError, match="Read-only"):
                    change()
        assert journal.read().state == State.PREPARED
        journal.path.unlink()
        for change in (journal.read, lambda: journal.take(Step.HOLD)):
            with pytest.raises(NotFound):
                change()


def test_a_step_from_one_state_only(journals):
    """The one that was seen, though the table allows another as well."""
    with begin(journals) as journal:
        journal.take(Step.HOLD)
        with pytest.raises(GuestStateError):
            journal.take(Step.TAKE_BACK, only_in=State.PREPARED)
        assert journal.take(Step.TAKE_BACK, only_in=State.HELD).state == State.TAKEN_BACK


@pytest.mark.parametrize("kept", [0, 1, 9, 60, 500, 4095])
def test_a_change_that_was_cut_off(journals, kept):
    """Of the slot that was being written only a part came: the state before it stands."""
    with begin(journals) as journal:
        journal.take(Step.HOLD)
        before = journal.path.read_bytes()
        journal.take(Step.GIVE_UP)
        after = journal.path.read_bytes()
        (at,) = [at for at in (0, 4096) if before[at : at + 4096] != after[at : at + 4096]]
        torn = after[: at + kept].ljust(at + 4096, b"\0") + after[at + 4096 :]
        journal.path.write_bytes(torn)
        assert journal.read().state == State.HELD
        assert journal.take(Step.GIVE_UP).state == State.GIVEN_UP


def test_no_room_is_needed_later(journals):
    """A file is as large at its end as at its beginning."""
    with begin(journals) as journal:
        size = journal.path.stat()
        for step in (Step.HOLD, Step.TAKE_BACK):
            journal.take(step)
            assert journal.path.stat().st_size == size.st_size == 8192
            assert journal.path.stat().st_blocks == size.st_blocks >= 16


def test_no_room_at_the_beginning(journals, monkeypatch):
    """Then there is no journal, and nothing else is left."""

    def full(fd, number, entry):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(module, "_write_slot", full)
    with pytest.raises(StorageError, match="No space left"):
        begin(journals)
    monkeypatch.undo()
    assert journals.all() == []
    with begin(journals) as journal:
        assert [p.name for p in journal.path.parent.iterdir() if p.name != ".lock"] == [
            "0123abcd.source"
        ]


def test_an_id_is_used_once(journals):
    """By each role; the one that is there is not touched."""
    with begin(journals) as journal:
        journal.take(Step.HOLD)
        with pytest.raises(NameTaken):
            begin(journals)
        assert journal.read().state == State.HELD
        with begin(journals, TARGET):
            assert len(journals.all()) == 2


@pytest.mark.parametrize("bad", ["", "abc", "../../x", "a/bcd", ".abcd", "x" * 65, "abcd.source"])
def test_ids_that_are_none(journals, bad):
    """An id becomes part of a file's name."""
    with pytest.raises(UsageError):
        begin(journals, transaction=bad)


def test_at_work(journals):
    """Until it is closed, or its process is killed."""
    with begin(journals) as journal:
        assert journal.at_work()
        assert Journal(journal.path).at_work()
    assert not journal.at_work()
    held = (
        "import sys, pathlib; from xsave.host.handover.journal import Journals\n"
        "j = Journals(pathlib.Path(sys.argv[1])).begin('target', 'feedbeef', 'g')\n"
        "print('begun', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", held, str(journal.path.parent.parent)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout.readline() == b"begun\n"
        other = journals.get(TARGET, "feedbeef")
        assert other.at_work()
        process.kill()
        process.wait()
        assert not other.at_work()


def test_old_ones_are_forgotten(journals, monkeypatch):
    """Those that are decided; never one that is not, or is at work."""
    monkeypatch.setattr(module, "NR_KEPT", 3)
    with begin(journals, transaction="undecided") as journal:
        journal.take(Step.HOLD)
    working = begin(journals, transaction="working")
    working.take(Step.TAKE_BACK)
    for number in range(6):
        with begin(journals, transaction=f"done-{number}") as journal:
            journal.take(Step.TAKE_BACK)
    with begin(journals, transaction="newest"):
        kept = {journal.path.stem for journal in journals.all()}
    assert kept == {"undecided", "working", "done-3", "done-4", "done-5", "newest"}
    working.close()


def test_what_is_no_journal(journals):
    """Other files are passed over."""
    with begin(journals) as journal:
        (journal.path.parent / "empty.source").touch()
        (journal.path.parent / "noise.target").write_bytes(b"\xff" * 8192)
        assert [found.path for found in journals.all()] == [journal.path]
        with pytest.raises(NotFound):
            Journal(journal.path.parent / "noise.target").read()
