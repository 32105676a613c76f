"""domctl: what is not waited for, a begin or what is asked ahead, is not forgotten either."""

from __future__ import annotations

import socket
from types import SimpleNamespace

import numpy as np
import pytest

from xsave.errors import HostCannotTake
from xsave.frames import TYPE_PIN
from xsave.guest.xen.domctl import Domctl
from xsave.guest.xen.machine import XEN_FRAMES
from xsave.guest.xen.wire import error_message, receive_message, send_message


@pytest.fixture
def ends():
    """A domctl, and the end of its connection where the domain's process would be."""
    ours, theirs = socket.socketpair()
    theirs.settimeout(10)
    machine = SimpleNamespace(allocate=lambda domid, nr, _: np.arange(nr, dtype=np.uint64) + 50)
    with Domctl(machine, 1, "g", ours) as domctl, theirs:
        yield domctl, theirs


def test_begin_does_not_wait(ends):
    """begin() returns although nobody answers; Xen's frames go with it."""
    domctl, theirs = ends
    domctl.begin(nr_vcpus=1, max_pages=256)
    message, _ = receive_message(theirs)
    assert message["op"] == "begin"
    assert message["xen_frames"] == list(range(50, 50 + XEN_FRAMES))


def test_its_answer_is_waited_for(ends):
    """What needs the domain has it: shared_info's frame is that of the answer."""
    domctl, theirs = ends
    domctl.begin(nr_vcpus=1, max_pages=256)
    send_message(theirs, {"shared_info_mfn": 77})
    assert domctl.shared_info_mfn == 77
    assert domctl.shared_info_mfn == 77


def test_its_error_is_raised_by_the_next_request(ends):
    """A begin that failed is raised where something is asked first, and only there."""
    domctl, theirs = ends
    domctl.begin(nr_vcpus=99, max_pages=256)
    send_message(theirs, error_message(HostCannotTake("99 vCPUs")))
    send_message(theirs, {})
    with pytest.raises(HostCannotTake, match="99 vCPUs"):
        domctl.commit()
    domctl.commit()


def test_abandon_asks_for_the_end_all_the_same(ends):
    """Whatever became of begin, a domain that is given up is told to go."""
    domctl, theirs = ends
    domctl.begin(nr_vcpus=99, max_pages=256)
    send_message(theirs, error_message(HostCannotTake("99 vCPUs")))
    send_message(theirs, {})
    theirs.shutdown(socket.SHUT_WR)
    domctl.abandon()
    asked = [receive_message(theirs)[0]["op"] for _ in range(2)]
    assert asked == ["begin", "abandon"]


def test_answers_are_those_of_the_requests_in_their_order(ends):
    """Whoever is waited for first, and though one is never waited for (a Ctrl-C); what happens in
    between is heard by who waits."""
    domctl, theirs = ends
    mfns, heard = np.arange(2, dtype=np.uint64), []
    domctl.ask_unpin(mfns)
    second, third = domctl.ask_unpin(mfns), domctl.ask_vcpus()
    assert [receive_message(theirs)[0]["op"] for _ in range(3)] == ["unpin", "unpin", "getvcpus"]
    send_message(theirs, {})
    send_message(theirs, error_message(HostCannotTake("no pinned table")))
    send_message(theirs, {"ids": []})
    assert third() == []
    with pytest.raises(HostCannotTake, match="no pinned table"):
        second()
    send_message(theirs, {"event": "frozen"})
    send_message(theirs, {"suspended_ns": 5})
    domctl.suspend(heard.append)
    assert (heard, domctl.suspended_ns) == (["frozen"], 5)


def test_page_types_are_those_of_tables_in_use():
    """Levels with the pin bit; a frame that nothing holds as a table is an ordinary page."""
    machine = SimpleNamespace(
        page_type=np.array([0, 1, 2, 4, 1, 3, 5, 7], np.uint8),
        type_count=np.array([0, 1, 2, 3, 0, 0, 1, 1], np.uint32),
        pinned=np.array([0, 0, 1, 1, 0, 1, 0, 1], np.uint8),
    )
    found = Domctl.page_types(SimpleNamespace(machine=machine), np.arange(8, dtype=np.uint64)[::-1])
    assert found.tolist() == [0, 0, 0, 0, 4 | TYPE_PIN, 2 | TYPE_PIN, 1, 0]
