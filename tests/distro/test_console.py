"""`xsave console` on a terminal: a shell in the guest, used as a person would."""

from __future__ import annotations

import hashlib
import os
import pty
import re
import select
import subprocess
import sys
import termios
import threading
import time

import pytest

from tests.distro.linux import PATIENCE_S, boot, wait_for_ticks, without_complaint
from tests.flows.flow import console, destroy, nothing_is_left

pytestmark = pytest.mark.slow

PASTE = bytes(range(32, 127)) * 3000  # 285000 bytes, far more than anything on the way holds


class Terminal:
    """A terminal with `xsave console` on it."""

    def __init__(self, host):
        self.master, self.slave = pty.openpty()
        self.before = termios.tcgetattr(self.slave)
        command = [sys.executable, "-m", "xsave", "--host", host.name, "console", "g"]
        self.process = subprocess.Popen(
            command, stdin=self.slave, stdout=self.slave, stderr=subprocess.PIPE
        )
        self.heard = b""

    def type(self, data):
        """In a thread: the terminal takes no more than the guest does."""
        thread = threading.Thread(target=self._write, args=(data,), daemon=True)
        thread.start()
        return thread

    def _write(self, data):
        while data:
            data = data[os.write(self.master, data) :]

    def expect(self, pattern):
        """Wait for this in what was not looked at yet; return the match."""
        deadline = time.monotonic() + PATIENCE_S
        while not (found := re.search(pattern, self.heard, re.DOTALL)):
            assert time.monotonic() < deadline, self.heard[-2000:]
            if select.select([self.master], [], [], 1)[0]:
                self.heard += os.read(self.master, 1 << 16)
        self.heard = self.heard[found.end() :]
        return found


@pytest.fixture
def terminal(host, kernel, ramdisk):
    """A terminal on the console of a guest that ticks, while that still holds."""
    boot(host, kernel, ramdisk)
    wait_for_ticks(host, 1)
    made = Terminal(host)
    yield made
    made.process.kill()
    made.process.wait()
    os.close(made.master)
    os.close(made.slave)


def test_a_shell(host, terminal):
    """It answers; Ctrl-C is the guest's; a large paste arrives whole and in order; Ctrl-] leaves
    the terminal as it was, and the guest where it is."""
    terminal.expect(rb"TICK \d+ ")
    terminal.type(b"do setsid cttyhack sh -i\n")
    terminal.expect(rb"# ")
    terminal.type(b"stty echo; echo $((6 * 7)) is it\r")
    terminal.expect(rb"42 is it\r\n.*# ")
    terminal.type(b"sh -c 'echo as\"\"leep; sleep 100000'\r")
    terminal.expect(rb"asleep\r\n")  # only now a Ctrl-C is one, and no key of the command line's
    terminal.type(b"\x03")
    terminal.expect(rb"\^C\r\n.*# ")
    terminal.type(
        f"stty raw -echo; echo go; head -c {len(PASTE)} | sha256sum; stty sane\r".encode()
    )
    terminal.expect(rb"\ngo\n")
    typing = terminal.type(PASTE)
    digest = hashlib.sha256(PASTE).hexdigest().encode()
    assert terminal.expect(rb"([0-9a-f]{64})  -")[1] == digest
    typing.join(PATIENCE_S)
    terminal.expect(rb"# ")
    terminal.type(b"echo still $((40 + 2))\r")
    terminal.expect(rb"still 42\r\n")
    assert termios.tcgetattr(terminal.slave) != terminal.before
    terminal.type(b"\x1d")
    assert terminal.process.wait(PATIENCE_S) == 0
    assert b"left" in terminal.process.stderr.read()
    assert termios.tcgetattr(terminal.slave) == terminal.before
    without_complaint(console(host).replace("\r\n", "\n"))
    destroy(host)
    nothing_is_left(host)
