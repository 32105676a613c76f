"""What becomes of a request to suspend that the guest cannot follow."""

from __future__ import annotations

import socket
from types import SimpleNamespace

import pytest

from tests.guest.rig import Machines, make_domain, remove
from xsave.errors import SuspendFailed
from xsave.guest.xen.wire import raise_error, receive_message
from xsave.host import suspension
from xsave.host.excuses import Excuses
from xsave.host.suspension import Suspension

TEXT = "Freezing of tasks failed after 20.001 seconds (1 tasks refusing to freeze): stubborn"
LINUX = (
    "[   17.021345] Freezing user space processes ... \n"
    "[   37.043111] Freezing of tasks failed after 20.003 seconds (1 tasks refusing to freeze):\n"
    "[   37.043200] task:cp              state:D stack:    0 pid:  123\n"
    "[   37.043400] xen:manage: do_suspend: freeze processes failed -16\n"
)


class Request:
    """A guest, and a toolstack that has asked it to suspend."""

    def __init__(self, monkeypatch):
        self._machines = Machines()
        self.domain = make_domain(self._machines.make())
        self.domain.never_run = False
        self.toolstack, sock = socket.socketpair()
        self.toolstack.settimeout(5)
        self.client = SimpleNamespace(sock=sock)
        running = SimpleNamespace(domain=self.domain, holding=lambda: False)
        self.released = 0
        self.suspension = Suspension(running, self._release)
        self.node = f"{self.domain.home}/error/suspend"
        monkeypatch.setattr(suspension, "SUSPEND_TIMEOUT_S", 1000.0)

    def _release(self):
        self.released += 1

    def ask(self):
        assert self.suspension.request(self.client, paused=False, restored=False) is False

    def acknowledge(self):
        self.domain.store.write(f"{self.domain.home}/control/shutdown", "")
        self.suspension.check()
        assert receive_message(self.toolstack)[0] == {"event": "acknowledged"}

    def time_out(self, monkeypatch):
        monkeypatch.setattr(self.suspension, "deadline_s", lambda: 0.0)
        self.suspension.check()

    def error(self):
        with pytest.raises(SuspendFailed) as caught:
            raise_error(receive_message(self.toolstack)[0])
        assert not self.suspension.active
        assert self.suspension.deadline_s() in (None, 0.0)
        assert self.domain.console.listeners == []
        assert self.released == 1
        return caught.value

    def close(self):
        remove(self.domain)
        self._machines.close()
        self.toolstack.close()
        self.client.sock.close()


@pytest.fixture
def request_(monkeypatch):
    made = Request(monkeypatch)
    yield made
    made.close()


def test_a_guest_that_says_why(request_):
    """It wrote error/suspend: the request has failed at once, with that text, exit code 6."""
    request_.ask()
    request_.acknowledge()
    request_.suspension.check()
    request_.domain.store.write(request_.node, TEXT)
    request_.suspension.check()
    error = request_.error()
    assert TEXT in str(error)
    assert (error.exit_code, error.stage) == (6, "suspend")


def test_a_reason_without_an_acknowledgement(request_):
    """The text counts before the request was acknowledged too; it is withdrawn then."""
    request_.ask()
    request_.domain.store.write(request_.node, TEXT)
    request_.suspension.check()
    assert TEXT in str(request_.error())
    assert request_.domain.store.read(f"{request_.domain.home}/control/shutdown") == b""


def test_an_old_reason_does_not_count(request_):
    """What the guest wrote on an earlier request is gone with the next one."""
    request_.domain.store.write(request_.node, TEXT)
    request_.ask()
    assert request_.domain.store.read(request_.node) is None
    request_.suspension.check()
    request_.acknowledge()
    assert request_.suspension.active
    request_.suspension.closed(request_.client)
    assert request_.domain.console.listeners == []


def test_linux_tells_its_console(request_, monkeypatch):
    """Nothing in xenstore: after the time-out the error quotes the console since the request."""
    request_.domain.console.put(b"[    1.0] PM: an old complaint about suspend\n")
    request_.ask()
    request_.acknowledge()
    request_.domain.console.put(LINUX.encode())
    request_.time_out(monkeypatch)
    text = str(request_.error())
    assert "did not suspend in time" in text
    assert "Freezing of tasks failed after 20.003 seconds" in text
    assert "freeze processes failed -16" in text
    assert "old complaint" not in text
    assert "task:cp" not in text


def test_nothing_said(request_, monkeypatch):
    """Without a reason anywhere the error says only that time is over."""
    request_.ask()
    request_.acknowledge()
    request_.domain.console.put(b"TICK 7\n")
    request_.time_out(monkeypatch)
    assert str(request_.error()).endswith("did not suspend in time")


def test_what_a_guest_says_is_one_tame_line(request_):
    """Control characters, bytes that are no text, more lines and megabytes: not in the error."""
    request_.ask()
    request_.domain.store.write(request_.node, b"a\x1b[2J\nb\xff\0 " + b"x" * 3000)
    request_.suspension.check()
    text = str(request_.error())
    assert text.isprintable()
    assert "a [2J b" in text
    assert len(text) < 500


def test_only_the_end_of_a_long_console_is_kept(request_):
    """A guest that prints without end costs bounded memory."""
    excuses = Excuses(request_.domain)
    request_.domain.console.put(b"PM: first\n")
    for _ in range(20):
        request_.domain.console.put(b"." * 4095 + b"\n")
    request_.domain.console.put(b"PM: last\n")
    assert excuses.printed() == "PM: last"
    excuses.close()
