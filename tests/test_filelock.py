"""Locks on files: held by one, asked about by many."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys

import pytest

from xsave.filelock import exclusive, is_locked

HOLD = """
import sys, time
from pathlib import Path
from xsave.filelock import exclusive
with exclusive(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_who_asks_is_not_in_the_way_of_others(tmp_path):
    """Two may ask at the same moment, and nobody holds it."""
    path = tmp_path / "lock"
    path.touch()
    with path.open() as asking:
        fcntl.flock(asking, fcntl.LOCK_SH)
        assert not is_locked(path)
    assert not is_locked(tmp_path / "none")


def test_it_goes_with_its_holder(tmp_path):
    """Held until the process is killed, and then by nobody."""
    path = tmp_path / "lock"
    with subprocess.Popen([sys.executable, "-c", HOLD, path], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"held\n"
        assert is_locked(path)
        process.kill()
    assert not is_locked(path)


def test_one_at_a_time(tmp_path):
    """Nobody else has it within, everybody may behind, also when something went wrong."""
    path = tmp_path / "lock"
    with pytest.raises(ValueError, match="wrong"), exclusive(path):
        other = os.open(path, os.O_RDWR)
        with pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        raise ValueError("wrong")
    fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(other)
