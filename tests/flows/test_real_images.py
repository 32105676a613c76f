"""Guests that a real Xen saved go on here, through the command line as people use it.

What each image holds and how its guest must go on is written beside them (README.md there).
"""

from __future__ import annotations

import shutil
import subprocess

import pytest

from tests.flows.flow import (
    MIB,
    console,
    destroy,
    hashes,
    nothing_is_left,
    save,
    state,
    ticks,
    wait_for_tick,
)
from xsave.host.host import add_host, open_host

HASH = "22cfe28e0c1e9eb2"


@pytest.fixture
def localhost(xsave_home):
    """A small localhost, where the commands look for domains."""
    return add_host("localhost", 256 * MIB, seed=6)


def check_guest(host, name, first, count=3):
    """The guest's ticks go on at `first`, each with the hash of memory a real Xen saved."""
    text = wait_for_tick(host, name, after=first + count - 2)
    assert ticks(text)[:count] == list(range(first, first + count))
    assert hashes(text) == {HASH}
    assert state(host, name) == "running"


def refusal(result):
    """Assert that a command was refused with exit code 4, in one line; return the line."""
    assert result.code == 4, result.err
    assert result.out == b""
    (line,) = result.err.splitlines()
    assert line.startswith("xsave: error: ")
    return line


def test_the_guest_counts_on(xsave, localhost, xen_image, tmp_path):
    """pv-micro-1cpu-qemu64 said TICK 4 when it was saved: here it says 5, 6, 7; saved here and
    restored again, it goes on from there."""
    name = xsave.json("restore", xen_image("pv-micro-1cpu-qemu64.img"))["name"]
    check_guest(localhost, name, 5)
    so_far = ticks(save_and_read(localhost, tmp_path / "img", name))
    xsave.ok("restore", tmp_path / "img", "--name", "again")
    check_guest(localhost, "again", so_far[-1] + 1, 1)
    destroy(localhost, "again")
    nothing_is_left(localhost)


def save_and_read(host, path, name):
    """Save a domain; return all it wrote to its console."""
    save(host, path, name, leave="paused")
    text = console(host, name)
    destroy(host, name)
    return text


def test_from_a_pipe(xsave, localhost, xen_images):
    """`zstd -dc X | xsave restore -`, and `xsave restore X.zst`: the same guest."""
    compressed = xen_images / "pv-micro-1cpu-qemu64.img.zst"
    if not shutil.which("zstd"):
        pytest.skip("zstd(1) is not installed")
    zstd = subprocess.Popen(["zstd", "-dc", compressed], stdout=subprocess.PIPE)
    piped = xsave.json("restore", "-", "--name", "piped", stdin=zstd.stdout)
    zstd.stdout.close()
    assert zstd.wait() == 0
    direct = xsave.json("restore", compressed, "--name", "direct")
    for info in (piped, direct):
        check_guest(localhost, info["name"], 5, 1)


def test_features_this_host_lacks(xsave, localhost, xen_image):
    """pv-micro-1cpu was promised AVX: refused, with the features by name and nothing left;
    allowed, it runs."""
    image = xen_image("pv-micro-1cpu.img")
    line = refusal(xsave("restore", image))
    assert "AVX, " in line
    assert "AVX2" in line
    assert "--cpu-mismatch" in line
    nothing_is_left(localhost)
    name = xsave.json("restore", image, "--cpu-mismatch", "allow")["name"]
    check_guest(localhost, name, 5, 2)


def test_a_paused_guest_of_a_real_xen(xsave, localhost, xen_image):
    """`xl save -p`, restored with -p: silent until it is unpaused, then it counts on."""
    image = xen_image("pv-micro-1cpu-p.img")
    info = xsave.json("restore", image, "-p", "--cpu-mismatch", "allow")
    assert info["state"] == "paused"
    assert console(localhost, info["name"]) == ""
    xsave.ok("unpause", info["name"])
    text = wait_for_tick(localhost, info["name"])
    assert hashes(text) == {HASH}
    assert ticks(text)[0] > 4


def test_a_migration_stream(xsave, localhost, xen_image):
    """What a live `xl migrate` sent, its repeats and its GO message at the end included."""
    image = xen_image("pv-micro-migrate.stdin")
    name = xsave.json("restore", image, "--cpu-mismatch", "allow")["name"]
    text = wait_for_tick(localhost, name, after=1)
    assert hashes(text) == {HASH}
    assert "FAIL" not in text


def test_a_large_linux(xsave, localhost, xen_image):
    """Debian's kernel with forking user space: TICK 5 and on, its file with the same checksum."""
    name = xsave.json("restore", xen_image("pv-debian-1cpu-qemu64.img"))["name"]
    text = wait_for_tick(localhost, name, after=5)
    assert ticks(text)[:2] == [5, 6]
    assert "sha=dfe47f26ca5025ed" in text
    assert "panic" not in text


def test_a_guest_that_cannot_run_here(xsave, localhost, xen_image):
    """No PV guest: exit code 4, one line that says so, nothing left."""
    image = xen_image("pvh-1cpu.img")
    assert "HVM or PVH" in refusal(xsave("restore", image, "--cpu-mismatch", "allow"))
    nothing_is_left(open_host("localhost"))
