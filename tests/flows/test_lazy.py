"""restore --lazy: the guest runs at once, and finds every page as an eager restore would have it.

The domain's process has a child that stands guard over the process that brings the pages.
"""

from __future__ import annotations

import os
import signal
import threading
import time

import numpy as np
import pytest

from tests.flows.bringing import filler, guard, only_process
from tests.flows.flow import (
    MIB,
    all_free,
    console,
    create,
    destroy,
    nothing_is_left,
    processes,
    restore,
    save,
    state,
    ticks,
    wait_for,
    wait_for_tick,
)
from xsave.errors import ImageError, StorageError, SuspendFailed
from xsave.frames import PageType
from xsave.guest.xen.machine import DOMID_FREE
from xsave.host.host import add_host
from xsave.image.buffers import reader
from xsave.image.libxc import X86PvP2mFrames
from xsave.image.libxc_pv import X86PvVcpuBasic
from xsave.image.stream import PageBatch, StreamDecoder
from xsave.public import VcpuGuestContext

#: What the process that brings the pages has to do takes a moment.
TOUCHED = 48 * MIB


@pytest.fixture
def host(xsave_home):
    """An empty host."""
    return add_host("a", 512 * MIB)


def make_image(host, path, **options):
    """Save a guest whose memory is full of a pattern that it checks all the time."""
    create(host, memory_bytes=64 * MIB, cmdline=f"touch={TOUCHED >> 20}M", **options)
    wait_for_tick(host, after=1)
    save(host, path)
    wait_for(lambda: not processes(host))
    return path


@pytest.fixture
def image(host, tmp_path):
    """The image of such a guest, with one vCPU."""
    return make_image(host, tmp_path / "img")


def stop_filler(host):
    """Stop the process that brings the pages, at the first moment possible; return its pid."""
    pid = filler(host)
    os.kill(pid, signal.SIGSTOP)
    return pid


# ---- all of it comes


def test_the_same_memory(host, image, tmp_path):
    """What was restored lazily and never ran is saved as the same bytes as what was restored at
    once: a save waits until all has come."""
    images = []
    for lazy in (False, True):
        restore(host, image, paused=True, lazy=lazy)
        images.append(tmp_path / f"img{lazy}")
        save(host, images[-1])
        wait_for(lambda: not processes(host))
    assert images[0].read_bytes() == images[1].read_bytes()
    assert images[0].read_bytes() == image.read_bytes()


def test_the_very_bytes(host, image):
    """By frames, too: every page with bytes is in its frame as the image has it, but those that
    a restore changes."""
    info = restore(host, image, paused=True, lazy=True)
    wait_for(lambda: guard(host) is None)
    plain, changed = {}, set()
    for item in StreamDecoder(reader(image.read_bytes())):
        if isinstance(item.value, PageBatch):
            batch = item.value
            with_data = zip(batch.pfns[batch.has_data], batch.pages, strict=True)
            plain |= {int(pfn): page.tobytes() for pfn, page in with_data}
            changed |= set(batch.pfns[batch.types != PageType.NOTAB].tolist())
        elif isinstance(item.value, X86PvP2mFrames):
            changed |= set(item.value.pfns.tolist())
        elif isinstance(item.value, X86PvVcpuBasic):
            changed.add(VcpuGuestContext.from_buffer_copy(item.value.context).user_regs.rdx)
    machine = host.machine
    mfns = np.flatnonzero(machine.owner == info.domid)
    mfns = mfns[machine.m2p[mfns] < np.uint64(64 * MIB // 4096)]
    assert mfns.size == 64 * MIB // 4096
    frames = {int(machine.m2p[mfn]): machine.pages[mfn].tobytes() for mfn in mfns.tolist()}
    assert {pfn for pfn, page in frames.items() if page != plain[pfn]} <= changed
    destroy(host)


@pytest.mark.parametrize("vcpus", [1, 3])
def test_the_guest_runs_meanwhile(host, tmp_path, vcpus):
    """It runs on from where it was, checks its memory and finds it right, again and again."""
    path = make_image(host, tmp_path / "img", vcpus=vcpus)
    for _ in range(2):
        restore(host, path, lazy=True)
        before = max(ticks(console(host)), default=0)
        text = wait_for_tick(host, after=before + 2)
        assert "CHECK FAILED" not in text
        save(host, path)
        wait_for(lambda: not processes(host))
    restore(host, path)
    assert "CHECK FAILED" not in wait_for_tick(host)


def test_holes_stay_holes(host, tmp_path):
    """A page that the image has as a hole takes no memory until the guest touches it."""
    create(host, memory_bytes=256 * MIB)
    wait_for_tick(host, after=1)
    save(host, tmp_path / "img")
    info = restore(host, tmp_path / "img", lazy=True, paused=True)
    wait_for(lambda: guard(host) is None)
    machine = host.machine
    mfns = np.flatnonzero(machine.owner == info.domid)
    assert np.count_nonzero(machine.resident(mfns)) < 16 * MIB // 4096


def test_a_migration_waits(host, image):
    """The log of dirty frames, which a migration begins with, is on when all has come."""
    restore(host, image, lazy=True, paused=True)
    with host.find("g") as domctl:
        log = domctl.log_dirty()
        assert guard(host) is None
        log.off()


def test_the_image_may_be_removed(host, image):
    """The domain's process holds it open."""

    def remove(_domctl):
        os.kill(filler(host), signal.SIGSTOP)
        image.unlink()
        os.kill(filler(host), signal.SIGCONT)

    restore(host, image, lazy=True, before_unpause=remove)
    assert "CHECK FAILED" not in wait_for_tick(host)


def test_memory_is_given_back_meanwhile(host, image):
    """A frame that the guest gives back before its page came is not written to afterwards."""
    info = restore(host, image, lazy=True)
    with host.find("g") as domctl:
        domctl.set_target(60 * MIB // 4096)
    wait_for(lambda: guard(host) is None)
    assert "CHECK FAILED" not in wait_for_tick(host)
    wait_for(lambda: np.count_nonzero(host.machine.owner == info.domid) < 61 * MIB // 4096)
    free = np.flatnonzero(host.machine.owner == DOMID_FREE)
    assert not host.machine.resident(free).any()


# ---- what goes wrong


def is_lost(host):
    """Assert that the guest is stopped for good, says why and can be destroyed without a trace."""
    wait_for(lambda: state(host) == "crashed")
    assert "a part of its memory was lost" in console(host)
    wait_for(lambda: len(processes(host)) == 1)  # who brought its pages is gone, or soon
    with host.find("g") as domctl, pytest.raises(StorageError, match="memory was lost"):
        domctl.unpause()
    destroy(host)
    nothing_is_left(host)


@pytest.mark.parametrize("victim", [filler, guard])
def test_the_filler_is_killed(host, image, victim):
    """Before the guest runs: it is lost, and cannot be saved."""
    restore(
        host,
        image,
        lazy=True,
        paused=True,
        before_unpause=lambda _: os.kill(victim(host), signal.SIGKILL),
    )
    wait_for(lambda: state(host) == "crashed")
    with pytest.raises(SuspendFailed, match="crash"):
        save(host, image.with_name("other"))
    is_lost(host)


def test_lost_before_it_is_started(host, image):
    """A restore that hears of it in time fails, says why, and leaves nothing."""

    def lose(_domctl):
        os.kill(filler(host), signal.SIGKILL)
        wait_for(lambda: state(host) == "crashed")

    with pytest.raises(StorageError, match="memory was lost"):
        restore(host, image, lazy=True, before_unpause=lose)
    nothing_is_left(host)


@pytest.mark.parametrize("seconds", [0.02, 0.3])
def test_the_filler_is_killed_while_it_is_waited_for(host, image, seconds):
    """So it is if the guest waits for a page by then, be it in the hypervisor."""
    pids = []
    restore(host, image, lazy=True, before_unpause=lambda _: pids.append(stop_filler(host)))
    time.sleep(seconds)
    os.kill(pids[0], signal.SIGKILL)
    is_lost(host)


@pytest.mark.parametrize("paused", [False, True])
def test_the_image_is_cut_shorter(host, image, paused):
    """So it is if the image turns out to be shorter than it was."""
    pids = []

    def cut(_domctl):
        pids.append(stop_filler(host))
        os.truncate(image, 8 * MIB)

    restore(host, image, lazy=True, paused=paused, before_unpause=cut)
    os.kill(pids[0], signal.SIGCONT)
    wait_for(lambda: state(host) == "crashed")
    assert "the image was cut shorter while it was read" in console(host)
    is_lost(host)


def test_a_save_that_waits_hears_of_it(host, image, tmp_path):
    """A save that waits for the memory hears that it will never come, and writes nothing."""
    pids = []
    restore(
        host, image, lazy=True, paused=True,
        before_unpause=lambda _: pids.append(stop_filler(host)),
    )  # fmt: skip
    killer = threading.Timer(0.5, os.kill, (pids[0], signal.SIGKILL))
    killer.start()
    with pytest.raises(SuspendFailed, match="crash"):
        save(host, tmp_path / "other")
    killer.join()
    assert not (tmp_path / "other").exists()
    is_lost(host)


def test_destroyed_meanwhile(host, image):
    """Nothing is left of a domain that ends while its memory is coming."""
    restore(host, image, lazy=True, paused=True, before_unpause=lambda _: stop_filler(host))
    destroy(host)
    nothing_is_left(host)


def test_its_process_is_killed_meanwhile(host, image):
    """The process that brings the pages dies with the domain's, before the frames are taken."""
    restore(host, image, lazy=True, paused=True, before_unpause=lambda _: stop_filler(host))
    os.kill(only_process(host), signal.SIGKILL)
    wait_for(lambda: host.free_frames == all_free(host))  # its lock goes after its memory
    nothing_is_left(host)


def test_a_table_is_damaged(host, image):
    """A wrong page table is found before the guest starts, and nothing is left."""
    data = bytearray(image.read_bytes())
    for item in StreamDecoder(reader(bytes(data))):
        if isinstance(item.value, PageBatch):
            tables = np.flatnonzero(item.value.types == PageType.L1TAB)
            if tables.size:
                row = int(np.count_nonzero(item.value.has_data[: tables[0]]))
                offset = item.value.pages_offset + 4096 * row
                break
    data[offset : offset + 8] = (0xFFFFF_FFF_067).to_bytes(8, "little")
    image.write_bytes(data)
    with pytest.raises(ImageError, match="names a pfn outside the p2m"):
        restore(host, image, lazy=True)
    nothing_is_left(host)


@pytest.mark.parametrize("keep", [0.02, 0.5, 0.999])
def test_a_truncated_image(host, image, keep):
    """An image that is not whole is refused before anything starts, as ever."""
    os.truncate(image, int(image.stat().st_size * keep))
    with pytest.raises(ImageError, match="cut off"):
        restore(host, image, lazy=True)
    nothing_is_left(host)


def test_on_the_command_line(xsave, host, image):
    """`restore --lazy` answers like any other; a pipe and a compressed image are refused."""
    assert xsave("--host", "a", "restore", "--lazy", str(image)).code == 0
    assert "CHECK FAILED" not in wait_for_tick(host)
    destroy(host)
    nothing_is_left(host)
    compressed = image.with_suffix(".zst")
    xsave("image", "convert", "--compress", str(image), str(compressed))
    for arguments, stdin in (([str(compressed)], None), (["-"], image.read_bytes())):
        result = xsave("--host", "a", "restore", "--lazy", *arguments, stdin=stdin)
        assert result.code == 2
        assert "cannot be restored lazily" in result.err
    nothing_is_left(host)
