"""The console's two-way stream: keys to the guest, output to us, the terminal put back."""

from __future__ import annotations

import os
import pty
import socket
import termios
import threading

import pytest

from xsave.errors import StorageError
from xsave.host.terminal import DOMAIN_ENDED, ESCAPE, LEFT, STDIN_CLOSED, relay


class Scene:
    """A guest's end of the console, and pipes for stdin and stdout."""

    def __init__(self):
        self.ours, self.guest = socket.socketpair()
        self.stdin, self.keys = os.pipe()
        self.screen, self.stdout = os.pipe()
        self.guest.settimeout(10)

    def close(self):
        for end in (self.ours, self.guest):
            end.close()
        for fd in (self.stdin, self.keys, self.screen, self.stdout):
            if fd is not None:
                os.close(fd)


@pytest.fixture
def scene():
    made = Scene()
    yield made
    made.close()


def test_output_until_the_domain_ends(scene):
    """Everything the guest printed is there, then the relay ends."""
    scene.guest.sendall(b"TICK 1\r\n")
    scene.guest.shutdown(socket.SHUT_WR)
    assert relay(scene.ours, scene.stdin, scene.stdout) == DOMAIN_ENDED
    assert os.read(scene.screen, 100) == b"TICK 1\r\n"


def test_input_until_stdin_closes(scene):
    """A pipe's content reaches the guest, Ctrl-] in it too; its answer is still shown."""
    os.write(scene.keys, b"ls\n" + ESCAPE)
    os.close(scene.keys)
    scene.keys = None
    scene.guest.sendall(b"answer")
    assert relay(scene.ours, scene.stdin, scene.stdout) == STDIN_CLOSED
    assert scene.guest.recv(100) == b"ls\n" + ESCAPE
    assert os.read(scene.screen, 100) == b"answer"


def test_a_guest_that_prints_for_ever_does_not_hold_us(scene):
    """After stdin has closed, output is shown for a moment, not until it stops."""
    os.close(scene.keys)
    scene.keys = None
    stop = threading.Event()

    def chatter():
        while not stop.is_set():
            scene.guest.send(b".")
            stop.wait(0.01)

    thread = threading.Thread(target=chatter)
    thread.start()
    try:
        assert relay(scene.ours, scene.stdin, scene.stdout) == STDIN_CLOSED
    finally:
        stop.set()
        thread.join()


def test_stdout_that_cannot_be_written(scene):
    """A full disk is a StorageError."""
    scene.guest.sendall(b"x")
    with open("/dev/full", "wb") as full, pytest.raises(StorageError, match="space"):  # noqa: PTH123
        relay(scene.ours, scene.stdin, full.fileno())


def test_a_reader_that_left(scene):
    scene.guest.sendall(b"x")
    os.close(scene.screen)
    scene.screen = os.dup(scene.stdin)
    with pytest.raises(BrokenPipeError):
        relay(scene.ours, scene.stdin, scene.stdout)


@pytest.fixture
def terminal():
    master, slave = pty.openpty()
    yield master, slave
    os.close(master)
    os.close(slave)


def test_a_terminal_is_raw_and_put_back(scene, terminal):
    """Ctrl-C goes to the guest as a byte; Ctrl-] leaves, and what was typed before it arrives."""
    master, slave = terminal
    before = termios.tcgetattr(slave)
    ended = []
    thread = threading.Thread(target=lambda: ended.append(relay(scene.ours, slave, scene.stdout)))
    thread.start()
    scene.guest.sendall(b"login: ")
    assert os.read(scene.screen, 100) == b"login: "  # the relay runs: the terminal is raw
    assert not termios.tcgetattr(slave)[3] & (termios.ICANON | termios.ISIG | termios.ECHO)
    os.write(master, b"\x03bye" + ESCAPE)
    thread.join(10)
    assert ended == [LEFT]
    assert scene.guest.recv(100) == b"\x03bye"
    assert termios.tcgetattr(slave) == before


def test_a_terminal_is_put_back_after_an_error(scene, terminal):
    _, slave = terminal
    before = termios.tcgetattr(slave)
    scene.guest.sendall(b"x")
    with open("/dev/full", "wb") as full, pytest.raises(StorageError):  # noqa: PTH123
        relay(scene.ours, slave, full.fileno())
    assert termios.tcgetattr(slave) == before
