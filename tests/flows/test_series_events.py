"""Event channels over a suspend: an irq keeps its number and gets another port.

Mirrors "xen: add rebind_evtchn_irq", "xen: fix unbind_from_irq()", "xen: make sure retriggered
events are set pending", and for the two rings "xen-console: add save/restore" and "xenbus: rebind
irq on restore". With `evtchn=1` the guest has a driver that checks all of it from inside
(evtest.c): it would say CHECK FAILED.
"""

from __future__ import annotations

import re

import pytest

from tests.flows.flow import MIB, console, restore, save, wait_for
from tests.flows.forked import Forks
from tests.flows.series import boot, goes_on, save_said, set_target, shared_info, suspended
from xsave.guest.xen import events
from xsave.host.host import add_host

ALL_MASKED = [(1 << 64) - 1] * 64
#: Where the ports of the other host begin: in another word of the bitmaps.
FIRST_PORT = 200


@pytest.fixture
def forks(xsave_home, monkeypatch):
    """Domain processes that see what the test patched."""
    made = Forks(monkeypatch)
    yield made
    made.kill()


@pytest.fixture
def host(forks):
    return add_host("a", 64 * MIB, seed=9)


@pytest.fixture
def other_ports(monkeypatch):
    """From its call on, domains get ports from FIRST_PORT on, the highest first."""

    def bind(self, port):
        number = next(n for n in range(FIRST_PORT + 40, FIRST_PORT, -1) if n not in self.ports)
        self.ports[number] = port
        self._clear(number)
        return number

    return lambda: monkeypatch.setattr(events.EventChannels, "bind", bind)


def unmasked(shared):
    """Return the ports that are not masked."""
    bits = [(word, bit) for word in range(64) for bit in range(64)]
    return [64 * word + bit for word, bit in bits if not shared.evtchn_mask[word] >> bit & 1]


def irqs(text):
    """Return [(what happened, irq, port), ...] of the EVTCHN lines."""
    found = re.findall(r"^EVTCHN (?:(\w+): )?irq (\d+) port (\d+)\r?\n", text, re.M)
    return [(what, int(irq), int(port)) for what, irq, port in found]


@pytest.mark.parametrize("vcpus", [1, 2])
def test_all_ports_are_others_after_a_restore(host, tmp_path, other_ports, vcpus):
    """On the new host no port has the number it had. Timer, console, xenstore and IPIs go on: the
    guest ticks, speaks, hears of its memory target and can be saved again."""
    boot(host, vcpus=vcpus, max_memory_bytes=16 * MIB)
    before = save_said(host, tmp_path / "img")
    other_ports()
    restore(host, tmp_path / "img")
    goes_on(host, before, nr_ticks=3)
    set_target(host, 2500)
    with suspended(host) as domctl:
        ports = unmasked(shared_info(domctl))
        assert len(ports) == 2 + 3 * vcpus  # rings; a timer and two IPIs per vCPU
        assert min(ports) > FIRST_PORT
    save(host, tmp_path / "img")


def test_a_restored_domain_starts_all_masked(host, tmp_path):
    """Before the guest ran: every port masked, none pending. Afterwards: its own unmasked, and
    they are as many as before."""
    boot(host)
    with suspended(host) as domctl:
        mine = unmasked(shared_info(domctl))
    before = save_said(host, tmp_path / "img")
    restore(host, tmp_path / "img", paused=True)
    with host.find("g") as domctl:
        shared = shared_info(domctl)
        assert list(shared.evtchn_mask) == ALL_MASKED
        assert not any(shared.evtchn_pending)
        domctl.unpause()
    goes_on(host, before)
    with suspended(host) as domctl:
        assert len(unmasked(shared_info(domctl))) == len(mine)


def test_an_irq_keeps_its_number(host, tmp_path, other_ports):
    """A driver's irq over checkpoint, restore, and both again: the same irq for ever, the same
    port in the same domain, another one in each new domain. It is masked until bound, on vCPU 0;
    one event for each one raised; what was pending under the mask comes when unmasked; the irq
    of a dead port is given up without harm to who has that port's number now."""
    boot(host, cmdline="evtchn=1")
    wait_for(lambda: irqs(console(host)))
    text = save_said(host, tmp_path / "img", leave="running")
    wait_for(lambda: len(irqs(console(host))) == 2)
    (_, irq, port), second = irqs(console(host))
    assert second == ("cancelled", irq, port)
    text = save_said(host, tmp_path / "img")
    restore(host, tmp_path / "img")
    after = goes_on(host, text, nr_ticks=2)
    assert [found[:2] for found in irqs(after)] == [("new", irq)]
    text += save_said(host, tmp_path / "img")
    other_ports()
    restore(host, tmp_path / "img")
    after = goes_on(host, text, nr_ticks=2)
    ((what, same_irq, other_port),) = irqs(after)
    assert (what, same_irq) == ("new", irq)
    assert other_port > FIRST_PORT
    save(host, tmp_path / "img", leave="running")
    wait_for(lambda: irqs(console(host))[1:] == [("cancelled", irq, other_port)])
    assert "CHECK FAILED" not in console(host)


def test_with_two_vcpus(host, tmp_path, other_ports):
    """The driver's checks hold where its threads run on another vCPU than its events."""
    boot(host, cmdline="evtchn=1", vcpus=2)
    wait_for(lambda: irqs(console(host)))
    text = save_said(host, tmp_path / "img")
    other_ports()
    restore(host, tmp_path / "img")
    assert [what for what, *_ in irqs(goes_on(host, text, nr_ticks=2))] == ["new"]
