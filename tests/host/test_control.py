"""The control socket: a connection that becomes a console, and the ticker."""

from __future__ import annotations

import socket
import threading
import time

import pytest

from tests.flows.flow import wait_for
from xsave.guest.xen.wire import receive_message, send_message
from xsave.host.control import Client, Control, Ticker
from xsave.host.operations import Operations


class Running:
    """As much of a running domain as the console request sees."""

    def __init__(self, control):
        self.control = control
        self.built = False
        self.finished = False


@pytest.fixture
def control(tmp_path):
    """A control socket that is served, and its address."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(tmp_path / "ctl"))
    listener.listen()
    control = Control(listener)
    control.start()
    control.address = str(tmp_path / "ctl")
    return control


def test_what_is_typed_at_once_is_console_input(control, monkeypatch):
    """Who hears that the connection is a console now may type before the process has gone on
    by one more instruction."""
    typed = threading.Event()
    control.on_input = lambda data: typed.set() if data == b"ls\n" else None
    operations = Operations(Running(control))
    reply = operations._reply

    def reply_and_wait(client, message, blob=b""):
        reply(client, message, blob)
        assert receive_message(sock) == ({}, b"")
        sock.sendall(b"ls\n")
        assert typed.wait(10), "the connection was dropped"

    monkeypatch.setattr(operations, "_reply", reply_and_wait)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.connect(control.address)
        send_message(sock, {"op": "console"})
        deadline = time.monotonic() + 10
        while not (request := control.next_request()) and time.monotonic() < deadline:
            time.sleep(0.001)
        operations.op_console(request)
        control.console_output(b"# ")
        assert sock.recv(2) == b"# "


def test_output_that_nobody_watches_wakes_nobody(control):
    """The thread is left alone until there is a console, which then hears all."""
    woken = []
    distribute = control._distribute
    control._distribute = lambda: (woken.append(1), distribute())
    control.console_output(b"unheard")
    sock, _client = attach(control)
    assert not woken
    control.console_output(b"heard")
    assert sock.recv(100) == b"heard"
    assert woken


def test_who_types_and_goes_is_heard():
    """Output that nobody takes any more, in the instant in between, is not the end of it."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    control, typed = Control(socket.socket()), []
    control.on_input = lambda data: typed.append(data) or True
    client = Client(ours, console=True, typing=True)
    control._clients.append(client)
    control._watch(client)
    theirs.sendall(b"ls\n")
    theirs.close()
    control.console_output(b"TICK\n")
    control._distribute()
    while not control.has_requests():
        for key, events in control._selector.select(10):
            control._serve_client(key.data, events)
    assert typed == [b"ls\n"]
    assert control.next_request().op == "closed"
    assert control._clients == []


def test_a_paste_of_any_size(control):
    """Who types more than the guest takes waits, and nothing is lost: all of it arrives, in order,
    as the guest makes room; output goes on meanwhile."""
    taken, room = bytearray(), threading.Semaphore(3)

    def take(data):
        taken.extend(data)
        return room.acquire(blocking=False)

    control.on_input = take
    paste = bytes(range(256)) * 8192
    sock, client = attach(control)
    sender = threading.Thread(target=lambda: (sock.sendall(paste), sock.shutdown(socket.SHUT_WR)))
    sender.start()
    wait_for(lambda: client.full)
    assert len(taken) < len(paste)
    control.console_output(b"# ")
    assert sock.recv(2) == b"# "
    while len(taken) < len(paste):
        room.release()
        control.resume_input()
    assert bytes(taken) == paste
    sender.join(10)
    sock.close()


def attach(control):
    """A console connection, and what the control socket knows of it."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.settimeout(10)
    sock.connect(control.address)
    send_message(sock, {"op": "console"})
    request = wait_for(control.next_request)
    Operations(Running(control)).op_console(request)
    assert receive_message(sock) == ({}, b"")
    return sock, request.client


def test_a_ticker_leaves_a_guest_alone_that_rests():
    """Once rest() has returned, nothing of the guest is looked at: its memory may be gone."""
    resting, looked = threading.Event(), threading.Event()
    late = []

    def look():
        if resting.is_set():
            late.append("looked")
        looked.set()
        return True

    ticker = Ticker(
        0.0, crossings=lambda: 0, wanted=look, kick=lambda: None, due=look, stop=lambda: None
    )
    ticker.start()
    for _ in range(30):
        resting.clear()
        looked.clear()
        ticker.running.set()
        assert looked.wait(10)
        ticker.rest()
        resting.set()
        time.sleep(0.004)
    assert late == []
