"""save is atomic: whatever fails, the guest runs on and an older image stands."""

from __future__ import annotations

import json
import os
import resource
import stat
import subprocess

import pytest

from tests.flows.flow import (
    MIB,
    console,
    is_complete,
    nothing_is_left,
    runs_on,
    save,
    state,
)
from xsave.errors import StorageError
from xsave.host.channel import open_sink
from xsave.save import save as save_flow

# ---- files


def test_the_file_is_private_and_replaces_an_older_one_last(guest, tmp_path):
    """Mode 0600 whatever the umask, and no name while it is written; the image that stood there
    before is whole until the new one is on disk, and gone then."""
    image = tmp_path / "img"
    image.write_bytes(b"the older image")
    image.chmod(0o644)
    before = os.umask(0)
    seen = []

    def commit():
        seen.append((list(tmp_path.iterdir()), image.read_bytes()))
        sink.commit()

    try:
        with guest.find("g") as domctl, open_sink(str(image)) as sink:
            save_flow(domctl, sink.write, commit=commit)
    finally:
        os.umask(before)
    assert seen == [([image], b"the older image")]
    assert stat.S_IMODE(image.stat().st_mode) == 0o600
    assert [path.name for path in tmp_path.iterdir()] == ["img"]
    assert is_complete(image)


def test_the_source_ends_only_after_the_commit(guest, tmp_path):
    """While the image is put on disk the domain is there, suspended; if that fails, it runs on,
    and the older image stands."""
    image = tmp_path / "img"
    image.write_bytes(b"the older image")
    seen = []

    def commit():
        seen.append(state(guest))
        raise StorageError("the disk is on fire")

    with (
        pytest.raises(StorageError, match="fire"),
        guest.find("g") as domctl,
        open_sink(str(image)) as sink,
    ):
        save_flow(domctl, sink.write, commit=commit)
    assert seen == ["suspended"]
    assert image.read_bytes() == b"the older image"
    assert list(tmp_path.iterdir()) == [image]
    runs_on(guest)


def test_no_more_room(xsave, guest, tmp_path):
    """A file may not grow beyond 1 MiB: 7, one line that says how much, no file, and the guest
    runs on."""
    limit = MIB, MIB
    process = xsave.start(
        "save", "g", tmp_path / "img",
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit),
    )  # fmt: skip
    _, err = process.communicate(timeout=60)
    assert process.returncode == 7
    (line,) = err.decode().splitlines()
    assert str(tmp_path / "img") in line
    assert "free" in line
    assert list(tmp_path.iterdir()) == []
    runs_on(guest)


def test_a_full_file_system(guest, tmp_path):
    """The same on a tmpfs that is too small for the guest."""
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", small], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("mounting a tmpfs needs root")
    try:
        with pytest.raises(StorageError, match=r"No space left.*bytes are free"):
            save(guest, small / "img")
        assert list(small.iterdir()) == []
    finally:
        subprocess.run(["umount", small], check=True)
    runs_on(guest)


def test_a_directory_that_is_not_there(xsave, guest, tmp_path):
    """The guest is not even asked."""
    result = xsave("save", "g", tmp_path / "nowhere" / "img")
    assert result.code == 7
    assert "SUSPEND" not in console(guest)


# ---- pipes


def test_a_reader_that_leaves(xsave, guest):
    """`xsave save g - | head -c 1000`: one line, no traceback, and the guest runs on."""
    process = xsave.start("save", "g", "-")
    assert len(process.stdout.read(1000)) == 1000
    process.stdout.close()
    err = process.stderr.read().decode()
    process.stderr.close()
    assert process.wait(60) == 7
    (line,) = err.splitlines()
    assert line.startswith("xsave: error: cannot write standard output")
    runs_on(guest)


def test_a_pipe_that_ends_early(xsave, localhost, builtin_image):
    """Half an image from a pipe: 3, and nothing is left of the domain that was begun."""
    half = builtin_image.read_bytes()[: 5 * MIB]
    result = xsave("restore", "-", stdin=half)
    assert result.code == 3
    assert "cut off" in result.err
    nothing_is_left(localhost)


def test_json_says_it_too(xsave, guest, tmp_path):
    """With --json the failure is an object on stdout with its exit code."""
    result = xsave("save", "g", tmp_path / "nowhere" / "img", "--json")
    assert result.code == json.loads(result.out)["exit_code"] == 7
