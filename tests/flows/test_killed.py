"""save and restore interrupted or killed, at whatever moment, and domains that die.

After each such end: the guest lives (in a domain that runs, or in a complete image), no frame is
lost, nothing half done stands under the image's name. XSAVE_TEST_KILLS says how many kills the
slow tests try (50).
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.flows.flow import (
    MEMORY,
    MIB,
    all_free,
    console,
    create,
    destroy,
    is_complete,
    nothing_is_left,
    processes,
    restore,
    runs_on,
    state,
    ticks,
    wait_for,
    wait_for_tick,
)
from xsave.errors import MigrationCancelled
from xsave.guest.xen.machine import XEN_FRAMES
from xsave.host.host import add_host

KILLS = int(os.environ.get("XSAVE_TEST_KILLS") or 50)


# ---- interrupted and killed


def start_with_progress(xsave, *arguments):
    """Start a command; give the process and a function that waits for its nth progress event."""
    process = xsave.start("--progress", "json", *arguments, stdout=subprocess.DEVNULL)

    def wait_for_event(number):
        lines = []
        while len(lines) < number and (line := process.stderr.readline()):
            lines.append(line)
        return lines

    return process, wait_for_event


def stop_somewhere(xsave, rng, which, *arguments):
    """Start a command and send it a signal at a random moment: anywhere in its start, or behind a
    random event of its progress. Return its exit code and what it said."""
    process, wait_for_event = start_with_progress(xsave, *arguments)
    with process:
        if rng.random() < 0.3:
            time.sleep(rng.random() * 0.6)
            lines = []
        else:
            lines = wait_for_event(rng.randrange(1, 9))
            time.sleep(rng.random() * rng.choice([0, 0.003, 0.03]))
        process.send_signal(which)
        lines += process.stderr.readlines()
        code = process.wait(60)
    return code, b"".join(lines).decode()


def kill_saves(xsave, host, tmp_path, count):
    """Kill a save `count` times. The guest is in its domain, running, or in a whole image."""
    rng = random.Random(count)
    image = tmp_path / "img"
    saved = killed = 0
    for _ in range(count):
        code, _ = stop_somewhere(xsave, rng, signal.SIGKILL, "save", "g", image)
        killed += code == -signal.SIGKILL
        # What it asked for last may still be done: a guest seen suspended is resumed, or destroyed.
        wait_for(lambda: state(host) in ("running", None))
        if state(host) is None:
            saved += 1
            assert is_complete(image)
            nothing_is_left(host)
            restore(host, image)
        wait_for(lambda: state(host) == "running")
        assert len(processes(host)) == 1
        assert all_free(host) - host.free_frames - (MEMORY >> 12) <= XEN_FRAMES
        if image.exists():
            assert is_complete(image)
            image.unlink()
        assert list(tmp_path.iterdir()) == []
    assert killed > 0
    runs_on(host)
    destroy(host)
    nothing_is_left(host)


def test_saves_are_killed(xsave, guest, tmp_path):
    """kill -9 of a save, eight times, at moments from its first import to after its end."""
    kill_saves(xsave, guest, tmp_path, 8)


@pytest.mark.slow
def test_many_saves_are_killed(xsave, guest, tmp_path):
    """The same, at fifty moments."""
    kill_saves(xsave, guest, tmp_path, KILLS)


def kill_restores(xsave, host, image, count):
    """Kill a restore `count` times: there is a whole domain, or nothing at all."""
    rng = random.Random(count)
    made = killed = 0
    for _ in range(count):
        code, _ = stop_somewhere(xsave, rng, signal.SIGKILL, "restore", image)
        killed += code == -signal.SIGKILL
        wait_for(lambda: len(processes(host)) == len(host.domains()))
        if state(host):
            made += 1
            assert state(host) in ("running", "paused")
            assert all_free(host) - host.free_frames >= MEMORY >> 12
            destroy(host)
        nothing_is_left(host)
    assert killed > 0
    restore(host, image)
    wait_for_tick(host)
    destroy(host)
    nothing_is_left(host)


def test_restores_are_killed(xsave, localhost, builtin_image):
    """kill -9 of a restore, eight times: no frame, no process, no half domain."""
    kill_restores(xsave, localhost, builtin_image, 8)


@pytest.mark.slow
def test_many_restores_are_killed(xsave, localhost, builtin_image):
    """The same, at fifty moments."""
    kill_restores(xsave, localhost, builtin_image, KILLS)


@pytest.mark.parametrize("event", [1, 3, 5])
def test_ctrl_c_of_a_save(xsave, guest, tmp_path, event):
    """SIGINT behind one of its events: 130, `interrupted`, no file, and the guest runs on; or it
    came too late and all of it is done."""
    process, wait_for_event = start_with_progress(xsave, "save", "g", tmp_path / "img")
    with process:
        wait_for_event(event)
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read().decode()
        code = process.wait(60)
    if code == 0:
        assert is_complete(tmp_path / "img")
        nothing_is_left(guest)
    else:
        assert code == 130
        assert rest.splitlines()[-1] == "xsave: error: interrupted"
        assert list(tmp_path.iterdir()) == []
        runs_on(guest)


def test_ctrl_c_of_a_save_that_waits(xsave, guest, tmp_path):
    """The reader of the pipe stands still: an interrupted save gives the guest back at once."""
    os.mkfifo(tmp_path / "pipe")
    process = xsave.start("save", "g", tmp_path / "pipe")
    with process, Path(tmp_path / "pipe").open("rb", buffering=0) as pipe:
        assert pipe.read(100)
        assert state(guest) == "suspended"
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
    runs_on(guest)


@pytest.mark.parametrize("event", [1, 3])
def test_ctrl_c_of_a_restore(xsave, localhost, builtin_image, event):
    """SIGINT behind one of its events: 130 and nothing is left; or it came too late."""
    process, wait_for_event = start_with_progress(xsave, "restore", builtin_image)
    with process:
        wait_for_event(event)
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read().decode()
        code = process.wait(60)
    assert code in (0, 130)
    if code == 0:
        assert state(localhost) == "running"
        destroy(localhost)
    else:
        assert rest.splitlines()[-1] == "xsave: error: interrupted"
    nothing_is_left(localhost)


def test_the_saver_stops_for_ever(xsave, guest, tmp_path):
    """A save that is stopped, then killed: the guest waits for it, suspended, and wakes when it
    is dead, though nobody asked."""
    os.mkfifo(tmp_path / "pipe")
    process = xsave.start("save", "g", tmp_path / "pipe")
    with process, Path(tmp_path / "pipe").open("rb", buffering=0) as pipe:
        assert pipe.read(100)
        process.send_signal(signal.SIGSTOP)
        time.sleep(0.2)
        assert state(guest) == "suspended"
        process.kill()
    runs_on(guest)


def test_two_saves_at_a_time(xsave, guest, tmp_path):
    """The second fails at once with 6 and writes nothing; the first is not disturbed: its image
    is whole and its guest, restored, has missed no tick."""
    os.mkfifo(tmp_path / "pipe")
    first = xsave.start("save", "g", tmp_path / "pipe")
    with first, Path(tmp_path / "pipe").open("rb", buffering=0) as pipe:
        image = pipe.read(100)
        second = xsave("save", "g", tmp_path / "second")
        assert second.code == 6
        assert "at work" in second.err
        assert not (tmp_path / "second").exists()
        assert state(guest) == "suspended"
        last = max(ticks(console(guest)))
        while piece := pipe.read(1 << 20):
            image += piece
        assert first.wait(60) == 0
    nothing_is_left(guest)
    (tmp_path / "img").write_bytes(image)
    restore(guest, tmp_path / "img")
    assert ticks(wait_for_tick(guest))[0] == last + 1
    runs_on(guest)


# ---- the domain's own process


@pytest.mark.parametrize("moment", ["running", "suspended"])
def test_the_domain_process_dies(xsave, guest, tmp_path, moment):
    """kill -9 of the domain itself: it is gone, as a machine that lost its power; the next
    command takes its frames back. A save that was reading it fails, without an image."""
    (pid,) = processes(guest)
    if moment == "running":
        os.kill(pid, signal.SIGKILL)
    else:
        os.mkfifo(tmp_path / "pipe")
        process = xsave.start("save", "g", tmp_path / "pipe")
        with process, Path(tmp_path / "pipe").open("rb", buffering=0) as pipe:
            assert pipe.read(100)
            os.kill(pid, signal.SIGKILL)
            while pipe.read(1 << 20):
                continue
            err = process.stderr.read().decode()
            assert process.wait(60) == 7
        (line,) = err.splitlines()
        assert "process" in line
    assert xsave.json("list") == []
    info = xsave.json("info")
    assert info["free_frames"] == all_free(guest)
    nothing_is_left(guest)
    create(guest)
    runs_on(guest)


def test_a_restored_domain_dies_before_it_is_whole(xsave, localhost, builtin_image, tmp_path):
    """Its process is killed while the image is still being read: the restore fails with one
    line, and nothing is left."""
    os.mkfifo(tmp_path / "pipe")
    process = xsave.start("restore", tmp_path / "pipe")
    with process, Path(tmp_path / "pipe").open("wb", buffering=0) as pipe:
        image = builtin_image.read_bytes()
        pipe.write(image[: 4 * MIB])
        (pid,) = wait_for(lambda: processes(localhost))
        os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(BrokenPipeError):
            pipe.write(image[4 * MIB :])
        pipe.close()
        err = process.stderr.read().decode()
        assert process.wait(60) == 7
    (line,) = err.splitlines()
    assert line.startswith("xsave: error: ")
    nothing_is_left(localhost)


# ---- who listens leaves


@pytest.mark.parametrize("options", [[], ["--postcopy", "--yes"]], ids=["live", "postcopy"])
def test_the_reader_of_a_migration_leaves(xsave, guest, options):
    """`migrate --json | head -1`: the guest moves all the same, and is not lost on its way."""
    target = add_host("b", 64 * MIB, seed=4)
    process = xsave.start("migrate", "g", "--to", "b", "--json", *options, stdout=subprocess.PIPE)
    with process:
        assert process.stdout.readline()
        process.stdout.close()
        process.stderr.read()
        assert process.wait(60) == 0
    nothing_is_left(guest)
    runs_on(target)


def test_the_reader_of_a_failing_migration_leaves(xsave, guest):
    """The exit status is still that of what went wrong."""
    add_host("b", 64 * MIB, seed=4)
    process = xsave.start(
        "migrate", "g", "--to", "b", "--json", "--downtime", "1", "--timeout", "0.1",
        "--on-timeout", "cancel", "--bandwidth", "1M", stdout=subprocess.PIPE,
    )  # fmt: skip
    with process:
        assert process.stdout.readline()
        process.stdout.close()
        process.stderr.read()
        assert process.wait(60) == MigrationCancelled.exit_code
    runs_on(guest)


def test_the_reader_of_a_save_leaves(xsave, guest, tmp_path):
    """Whoever watches its progress: the image is written, and whole."""
    process, wait_for_event = start_with_progress(xsave, "save", "g", tmp_path / "img")
    with process:
        wait_for_event(1)
        process.stderr.close()
        assert process.wait(60) == 0
    nothing_is_left(guest)
    xsave.ok("image", "verify", tmp_path / "img")


def test_nobody_hears_what_postcopy_risks(xsave, guest):
    """`migrate --postcopy 2>&1 | head -0`: what is only said beside it does not end it."""
    target = add_host("b", 64 * MIB, seed=4)
    process = xsave.start("migrate", "g", "--to", "b", "--postcopy", stdout=subprocess.DEVNULL)
    with process:
        process.stderr.close()
        assert process.wait(60) == 0
    nothing_is_left(guest)
    runs_on(target)
