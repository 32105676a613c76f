"""A new file has no name until it is complete, wherever Linux can do that."""

from __future__ import annotations

import errno
import gc
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from xsave.host.newfile import NewFile

#: Kills itself before the nth call of commit() that shows in the directory.
KILLED = """
import os, pathlib, signal, sys
from xsave.host.newfile import NewFile

def deadly(real):
    def call(*arguments, **options):
        if which == real.__name__ and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = real(*arguments, **options)
        if which == real.__name__:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    return call

path, which, when = sys.argv[1:]
file = NewFile(path)
os.write(file.fd, b"new")
os.fsync, os.link = deadly(os.fsync), deadly(os.link)
file.commit()
"""


@pytest.fixture(params=["unnamed", "named"])
def kind(request, monkeypatch):
    """A file system with files without a name, and one that has none."""
    if request.param == "named":
        real = os.open

        def refuse(path, flags, *rest, **options):
            if flags & os.O_TMPFILE == os.O_TMPFILE:
                raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
            return real(path, flags, *rest, **options)

        monkeypatch.setattr(os, "open", refuse)
    return request.param


@pytest.mark.parametrize("old", [None, b"old"])
def test_it_appears_whole(tmp_path, kind, old):
    """Before commit there is what there was, and a hidden file at most; then the new one alone,
    mode 0600 whatever the umask."""
    path = tmp_path / "file"
    if old:
        path.write_bytes(old)
    before = os.umask(0)
    try:
        file = NewFile(str(path))
    finally:
        os.umask(before)
    os.write(file.fd, b"new")
    others = [p.name for p in tmp_path.iterdir() if p != path]
    assert len(others) == (kind == "named")
    assert all(name.startswith(".file.") for name in others)
    assert not path.exists() if old is None else path.read_bytes() == old
    file.commit()
    file.close()
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_given_up(tmp_path, kind):
    """close() without commit leaves what there was; twice is no harm."""
    path = tmp_path / "file"
    path.write_bytes(b"old")
    for _ in range(2):
        file = NewFile(str(path))
        os.write(file.fd, b"new")
        file.close()
        file.close()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_no_descriptor_stays(tmp_path, kind):
    """Committed, given up or refused: nothing stays open."""
    path = tmp_path / "file"
    gc.collect()  # what other tests left for the collector is not closed in between
    before = len(list(Path("/proc/self/fd").iterdir()))
    for ending in (NewFile.commit, NewFile.close):
        ending(NewFile(str(path)))
    with pytest.raises(OSError):
        NewFile(str(tmp_path))
    with pytest.raises(OSError):
        NewFile(str(tmp_path / "none" / "file"))
    assert len(list(Path("/proc/self/fd").iterdir())) == before


@pytest.mark.parametrize("when", ["before", "behind"])
@pytest.mark.parametrize("which", ["fsync", "link"])
def test_killed(tmp_path, which, when):
    """kill -9 at any step of commit: the new file whole under its name, or nothing at all."""
    path = tmp_path / "file"
    done = subprocess.run([sys.executable, "-c", KILLED, str(path), which, when], check=False)
    assert done.returncode == -signal.SIGKILL
    if (which, when) == ("link", "behind"):
        assert path.read_bytes() == b"new"
    else:
        assert list(tmp_path.iterdir()) == []
