"""What the flow tests share: save and restore as the commands do them, consoles, and what is left.

A flow test works on hosts of its own (fixture `xsave_home`), through the same functions as the
command line, and ends by asking whether anything stayed behind.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from pathlib import Path

import numpy as np

from tests.conftest import processes_of
from xsave.errors import NotFound, SuspendFailed
from xsave.frames import INVALID_M2P_ENTRY
from xsave.guest.xen.machine import DOMID_FREE
from xsave.host import create as host_create
from xsave.host.channel import open_sink, open_source
from xsave.host.spawn import spawn
from xsave.image.buffers import reader
from xsave.image.stream import StreamDecoder
from xsave.lazy import Lazy
from xsave.restore import restore as restore_flow
from xsave.save import save as save_flow

MIB = 1 << 20
#: The smallest built-in guest that has room for all its threads.
MEMORY = 8 * MIB


def create(host, name="g", **options):
    """Create a built-in guest of 8 MiB, unless told otherwise."""
    return host_create.create(host, name, **{"memory_bytes": MEMORY, **options})


def save(host, path, name="g", **options):
    """Save a domain to a file. If the guest does not suspend, its console tells why."""
    with host.find(name) as domctl, open_sink(str(path)) as sink:
        try:
            return save_flow(domctl, sink.write, commit=sink.commit, **options)
        except SuspendFailed as error:
            error.add_note(domctl.console_log().decode(errors="replace")[-2000:])
            raise


def restore(host, path, *, lazy=False, paused=False, before_unpause=None, **options):
    """Restore a domain from a file; before_unpause(domctl) is called when it is complete."""

    def start(domctl):
        before_unpause(domctl)
        return domctl.info() if paused else domctl.unpause()

    if before_unpause:
        options["start"] = start

    def make(name, nr_pages):
        host.check_room(nr_pages)
        return spawn(host, name, lazy=share.descriptors if share else ())

    with open_source(str(path)) as source, contextlib.ExitStack() as stack:
        share = stack.enter_context(Lazy(source, host.nr_frames)) if lazy else None
        return restore_flow(
            source, make, nr_frames=host.nr_frames, lazy=share, paused=paused, **options
        )


def destroy(host, name="g"):
    """End a domain."""
    with host.find(name) as domctl:
        domctl.destroy()


def state(host, name="g"):
    """Return the state of a domain, None if there is none of that name."""
    return {domain.name: domain.state for domain in host.domains()}.get(name)


def console(host, name="g"):
    """Return what the guest wrote to its console since this domain began; "" without a domain."""
    try:
        with host.find(name) as domctl:
            return domctl.console_log().decode()
    except NotFound:
        return ""


def ticks(text):
    """Return the numbers of the TICK lines."""
    return [int(n) for n in re.findall(r"^TICK (\d+)\b.*[0-9a-f]\r?\n", text, re.MULTILINE)]


def hashes(text):
    """Return the hashes of the TICK lines."""
    return set(re.findall(r"^TICK \d+ .*?([0-9a-f]{16})\r?\n", text, re.MULTILINE))


def wait_for(condition, seconds=30):
    """Poll until the condition gives something true; return that."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)
    return found


def wait_for_tick(host, name="g", after=0):
    """Wait until the guest has ticked past `after`; return its console."""
    return wait_for(
        lambda: (text := console(host, name)) and max(ticks(text), default=0) > after and text
    )


def all_free(host):
    """Return how many frames are free when no domain is there."""
    return host.nr_frames - host.machine.first_frame


def processes(host):
    """Return the pids of the host's domain processes."""
    # processes_of() looks for arguments below a directory: the host's own is one of them.
    mine = os.fsencode(host.directory)
    found = []
    for pid in processes_of(host.directory.parent):
        with contextlib.suppress(OSError):
            if mine in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"):
                found.append(pid)
    return found


def nothing_is_left(host):
    """Assert that the host is as if it had never had a domain: no record of one, every frame
    free, without type, pin, reference or m2p entry, and zero; no domain process."""
    machine = host.machine
    assert host.free_frames == all_free(host)
    assert host.records() == []
    assert list((host.directory / "domains").iterdir()) == []
    frames = slice(machine.first_frame, None)
    assert (machine.owner[frames] == DOMID_FREE).all()
    assert (machine.m2p[frames] == np.uint64(INVALID_M2P_ENTRY)).all()
    for column in (machine.page_type, machine.pinned, machine.type_count, machine.refs):
        assert not column[frames].any()
    assert not machine.resident(np.arange(machine.first_frame, host.nr_frames)).any()
    wait_for(lambda: not processes(host))


def runs_on(host, name="g"):
    """Assert that the guest runs, ticks, and never missed or repeated a tick."""
    wait_for(lambda: state(host, name) == "running")
    text = wait_for_tick(host, name, after=max(ticks(console(host, name)), default=0))
    numbers = ticks(text)
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    assert "CHECK FAILED" not in text
    wait_for(lambda: len(processes(host)) == 1)  # one that was never used goes soon


def is_complete(image):
    """Whether a file is a whole image, to its last byte."""
    decoder = StreamDecoder(reader(image.read_bytes()))
    for _ in decoder:
        pass
    return decoder.tail(1) == b""
