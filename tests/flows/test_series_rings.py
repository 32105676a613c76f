"""What a suspended guest leaves alone, and how it meets its far ends again.

Mirrors "xen: make dummy_shared_info non-static" (between pre- and post-suspend the real
shared_info is out of reach), "xen-console: add save/restore" and "xenbus: rebind irq on restore"
(console and xenstore go on by their pages' pfns), for both outcomes of "xen: implement
save/restore": a new domain, and the same one (cancelled, or a checkpoint: `save -c`).
"""

from __future__ import annotations

import struct

import numpy as np
import pytest

from tests.flows.flow import MIB, console, restore, save, ticks, wait_for
from tests.flows.forked import Forks
from tests.flows.inside import SYMBOLS, memory
from tests.flows.series import (
    PAGES,
    boot,
    goes_on,
    pages,
    records,
    save_said,
    set_target,
    suspended,
    ticked,
)
from xsave.frames import PTE_FRAME_MASK, PTE_PRESENT
from xsave.guest.xen.console import Console
from xsave.host.host import add_host
from xsave.image.libxc import X86PvVcpuBasic
from xsave.public import StartInfo, VcpuGuestContext

CONSOLE_INDICES, STORE_RSP, STORE_INDICES = 3072, 1024, 2048
OUTCOMES = pytest.mark.parametrize("outcome", ["new", "cancelled", "checkpoint"])


@pytest.fixture
def forks(xsave_home, monkeypatch):
    """Domain processes that see what the test patched."""
    made = Forks(monkeypatch)
    yield made
    made.kill()


@pytest.fixture
def host(forks):
    return add_host("a", 64 * MIB, seed=9)


def end_suspend(host, path, outcome):
    """Suspend the guest and have it go on in this way; return what it said before, all of it if
    its domain ended."""
    if outcome == "cancelled":
        with suspended(host) as domctl:
            return domctl.console_log().decode()
    said = save_said(host, path, leave="running" if outcome == "checkpoint" else "destroyed")
    if outcome == "new":
        restore(host, path)
    return said


def mappings(domctl, mfn):
    """Return how many present entries of the domain's L1 tables name a frame."""
    machine = domctl.machine
    own = machine.owner == domctl.domid
    tables = machine.mem[np.flatnonzero(own & (machine.page_type == 1) & (machine.type_count > 0))]
    present = tables & np.uint64(PTE_PRESENT) != 0
    return int(np.count_nonzero(present & ((tables & np.uint64(PTE_FRAME_MASK)) >> 12 == mfn)))


def pointer(host, name):
    return int.from_bytes(memory(host, SYMBOLS[name], 8), "little")


# ---- shared_info


@OUTCOMES
def test_a_suspended_guest_cannot_touch_shared_info(host, tmp_path, outcome):
    """Running, it has one mapping of the page; suspended none, and its pointer leads to the
    dummy, whose events are masked: a touch of the real one would be a page fault, and the end of
    the guest. Afterwards it has one again."""
    boot(host)
    with host.find("g") as domctl:
        real = domctl.state().shared_info_mfn
        assert mappings(domctl, real) == 1
    mapped = pointer(host, "HYPERVISOR_shared_info")
    with suspended(host) as domctl:
        assert mappings(domctl, real) == 0
        assert pointer(host, "HYPERVISOR_shared_info") == SYMBOLS["dummy_shared_info"]
        assert memory(host, SYMBOLS["dummy_shared_info"], 2)[1] == 1
    end_suspend(host, tmp_path / "img", outcome)
    ticked(host, 1 if outcome == "new" else 6)
    with host.find("g") as domctl:
        wait_for(lambda: mappings(domctl, domctl.state().shared_info_mfn) == 1)
    assert pointer(host, "HYPERVISOR_shared_info") == mapped != SYMBOLS["dummy_shared_info"]


# ---- console


@OUTCOMES
def test_every_line_comes_once(host, tmp_path, outcome):
    """All that the guest says around its suspend, in order: no byte is lost, none comes twice."""
    boot(host, cmdline="clock=1")
    before = end_suspend(host, tmp_path / "img", outcome)
    text = ticked(host, 3 if outcome == "new" else len(ticks(before)) + 3)
    whole = before + text if outcome == "new" else text
    assert whole.startswith(before)
    lines = whole.split("\n")
    begin = next(i for i, line in enumerate(lines) if line.startswith("TICK 1 "))
    tick = iter(range(1, 1000))
    expected = {"SUSPEND": 1, f"RESUME {'new' if outcome == 'new' else 'cancelled'}": 1}
    found = [line.strip() for line in lines[begin:-1] if not line.startswith("CLOCK")]
    counted = [line for line in found if line.startswith("TICK")]
    assert all(line.startswith(f"TICK {next(tick)} ") for line in counted)
    rest = [line for line in found if line not in counted]
    assert {line: rest.count(line) for line in expected} == expected
    assert len([line for line in lines if line.startswith("CLOCK")]) in (
        len(counted),
        len(counted) - 1,  # the last one is on its way
    )


@OUTCOMES
def test_what_nobody_read_is_not_lost(host, tmp_path, monkeypatch, outcome):
    """The host stops reading the console before the suspend: what stands in the ring then is in
    the image, or stays in the ring, and comes when somebody reads again; each line once."""
    deaf = tmp_path / "deaf"
    drain = Console.drain
    monkeypatch.setattr(Console, "drain", lambda self: not deaf.exists() and drain(self))
    boot(host)
    ticked(host, 5)
    deaf.touch()
    if outcome == "new":
        before = save_said(host, tmp_path / "img")
        restore(host, tmp_path / "img", paused=True)
        with host.find("g") as domctl:
            *_, ring = rings(host, domctl)
            domctl.unpause()
        wait_for(lambda: b"RESUME new" in host.machine.pages[ring].tobytes())
    else:
        before = end_suspend(host, tmp_path / "img", outcome)
    assert "SUSPEND" not in before
    deaf.unlink()
    with host.find("g") as domctl:
        domctl.unpause()
    text = goes_on(host, before, nr_ticks=3) if outcome == "new" else ticked(host, 8)
    whole = before + text if outcome == "new" else text
    assert [whole.count(line) for line in ("SUSPEND\n", "RESUME ")] == [1, 1]
    assert ticks(whole) == list(range(1, ticks(whole)[-1] + 1))
    assert whole.index("SUSPEND\n") < whole.index("RESUME ")


# ---- xenstore


def ring_of(path, field):
    """Return a ring's page in an image, as bytes, by start_info's pfn of it."""
    blob = next(v for v in records(path) if isinstance(v, X86PvVcpuBasic)).context
    pfn = VcpuGuestContext.from_buffer_copy(bytes(blob)).user_regs.rdx
    info = StartInfo.from_buffer_copy(pages(path, [pfn]).tobytes())
    assert getattr(info, field) < PAGES
    return pages(path, [getattr(info, field)]).tobytes()


def test_the_rings_are_quiet_in_the_image(host, tmp_path):
    """start_info names both rings by pfn; no request is under way, no answer half read, and the
    console is read to its end."""
    boot(host)
    save(host, tmp_path / "img")
    req_cons, req_prod, rsp_cons, rsp_prod = struct.unpack_from(
        "<4I", ring_of(tmp_path / "img", "store_mfn"), STORE_INDICES
    )
    assert req_cons == req_prod != 0
    assert rsp_cons == rsp_prod != 0
    ring = ring_of(tmp_path / "img", "console_mfn")
    _, _, out_cons, out_prod = struct.unpack_from("<4I", ring, CONSOLE_INDICES)
    assert out_cons == out_prod != 0


@OUTCOMES
def test_watches_are_there_afterwards(host, tmp_path, outcome):
    """The memory target, a watch, is followed after each way to go on, and so is the request to
    suspend, another one; several times."""
    boot(host, max_memory_bytes=16 * MIB)
    for nr_pages in (2100, 2000):
        end_suspend(host, tmp_path / "img", outcome)
        set_target(host, nr_pages)
    assert "CHECK FAILED" not in console(host)


def test_a_change_while_suspended_is_noticed(host):
    """The target changes while the guest stands still and its suspend is cancelled: the event
    waits in the ring."""
    boot(host, max_memory_bytes=16 * MIB)
    with suspended(host), host.find("g") as domctl:
        domctl.set_target(2222)
    wait_for(lambda: "balloon: 2222 pages" in console(host))


def test_a_change_before_the_first_run_is_noticed(host, tmp_path):
    """The target changes while the restored guest is still paused: its watches fire when they are
    registered again, whatever was missed."""
    boot(host, max_memory_bytes=16 * MIB)
    save(host, tmp_path / "img")
    restore(host, tmp_path / "img", paused=True)
    with host.find("g") as domctl:
        domctl.set_target(2345)
        domctl.unpause()
    wait_for(lambda: "balloon: 2345 pages" in console(host))


def test_half_an_answer_of_the_old_host_is_dropped(host, tmp_path):
    """What the old xenstored had sent and the guest not read means nothing to the new one: a
    restored guest begins with an empty ring."""
    boot(host)
    before = save_said(host, tmp_path / "img")
    restore(host, tmp_path / "img", paused=True)
    with host.find("g") as domctl:
        _, store, _, _ = rings(host, domctl)
        page = host.machine.pages[store]
        cons, prod = page[STORE_INDICES + 8 :][:8].view("<u4")
        assert cons == prod
        for i in range(37):
            page[STORE_RSP + (prod + i) % 1024] = 0xEE
        page[STORE_INDICES + 12 :][:4].view("<u4")[0] = prod + 37
        domctl.unpause()
    goes_on(host, before, nr_ticks=2)
    save(host, tmp_path / "img")


def rings(host, domctl):
    """Return (pfn, mfn) of the xenstore ring and of the console of a domain that has not run."""
    (vcpu,) = domctl.vcpus()
    mfn = VcpuGuestContext.from_buffer_copy(vcpu.context).user_regs.rdx
    info = StartInfo.from_buffer_copy(host.machine.pages[mfn].tobytes())
    found = []
    for ring in (info.store_mfn, info.console_mfn):
        found += [int(host.machine.m2p[ring]), int(ring)]
    return found
