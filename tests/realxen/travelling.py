"""A guest on its way: from xsave to a real Xen and back, counting all the time.

A guest prints `TICK n hash` each second. What is checked of it is one line: the numbers go on
one by one, whoever runs it, and the hash of its memory stays the same.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import shlex
import subprocess
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.realxen.machine import PORT, Silent
from xsave.host.create import BUILTIN_KERNEL
from xsave.host.handshake import GO

WAIT_S = 90
TICKS = 3
_LOG = "--- its log"
#: For dom0: what it writes to the port before is lost.
_CONNECTED = "until [ -e /host/connected ]; do sleep 0.1; done; sleep 1\n"
_TICK = re.compile(r"^TICK (\d+)\b(?:.*?([0-9a-f]{16}))? *\n", re.MULTILINE)


@dataclass(frozen=True)
class Kind:
    """A kernel to travel with: what xsave and xl are told to boot it."""

    name: str
    kernel: Path
    ramdisk: Path | None
    cmdline: str
    memory_mib: int = 32

    def config(self, domain, share, vcpus):
        """Return an xl configuration; the files are below the share."""
        lines = [
            f'name="{domain}"', 'type="pv"', f"memory={self.memory_mib}", f"vcpus={vcpus}",
            f'kernel="/host/{self.kernel.name}"', f'extra="{self.cmdline}"',
        ]  # fmt: skip
        (share / self.kernel.name).write_bytes(self.kernel.read_bytes())
        if self.ramdisk:
            (share / self.ramdisk.name).write_bytes(self.ramdisk.read_bytes())
            lines.append(f'ramdisk="/host/{self.ramdisk.name}"')
        return "\n".join(lines) + "\n"

    def options(self, vcpus):
        """Return the options of `xsave create`."""
        found = ["--memory", f"{self.memory_mib}M", "--vcpus", vcpus, "--cmdline", self.cmdline]
        if self.kernel != BUILTIN_KERNEL:
            found += ["--kernel", self.kernel, "--ramdisk", self.ramdisk]
        return found


def builtin():
    return Kind("builtin", BUILTIN_KERNEL, None, "seed=5 touch=2M")


def linux(micro_linux):
    kernel, ramdisk = micro_linux
    return Kind("linux", kernel, ramdisk, "console=hvc0 rdinit=/init quiet seed=9 pages=64")


def debian(kernel, ramdisk):
    return Kind("debian", kernel, ramdisk, "console=hvc0 quiet", 192)


def tick_lines(text):
    """Return (number, hash or "") of each complete TICK line."""
    return [(int(n), digest or "") for n, digest in _TICK.findall(text.replace("\r", ""))]


def once_more(test):
    """Try a test (or what makes a fixture) again, once, on another machine, if its machine falls
    silent: QEMU's emulation of Xen may stand still, with all that is in it, which says nothing of
    images."""

    @functools.wraps(test)
    def tried(**arguments):
        try:
            return test(**arguments)
        except Silent as why:
            warnings.warn(f"once more on another machine: {why}", stacklevel=1)
            if journey := arguments.get("journey"):
                journey.begin_again()
            return test(**arguments)

    return tried


class Journey:
    """One guest's. `ticks` is all it printed so far, in whatever place."""

    def __init__(self, xsave, real_xens, tmp_path, name):
        self._xsave, self._xens, self._directory = xsave, real_xens, tmp_path
        self.name = name
        self.begin()

    def begin(self):
        """Nothing was printed yet, and there is a real Xen."""
        self._xen = self._xens.running()
        self.ticks = []
        self._begun = ""
        self._legs = 0

    def begin_again(self):
        """The machine with the real Xen has stopped, and the guest in it; forget it here, too."""
        if any(domain["name"] == self.name for domain in self._xsave.json("list")):
            self._xsave.ok("destroy", self.name)
        self.begin()

    def check(self):
        """Assert that nobody noticed anything."""
        numbers = [n for n, _ in self.ticks]
        assert numbers == list(range(1, len(numbers) + 1)), numbers
        assert len({digest for _, digest in self.ticks if digest}) <= 1, self.ticks

    def _went_on(self, text):
        """Note what it printed at a place, from its start there to its end, and that it did go on.
        A Linux may be suspended within a line: the rest of it comes at the next place."""
        text = self._goes_on(text)
        self._begun = text[text.rfind("\n") + 1 :]

    def _goes_on(self, text):
        """Note what it printed so far at a place, and that it does go on; return it with the start
        of its first line."""
        text = self._begun + text
        assert "CHECK FAILED" not in text and "PANIC" not in text, text[-2000:]
        assert len(tick_lines(text)) >= TICKS, text[-2000:]
        self._note(text)
        return text

    def _note(self, text):
        new = tick_lines(text)
        self.ticks += [tick for tick in new if not self.ticks or tick[0] > self.ticks[-1][0]]
        self.check()

    def _image(self):
        self._legs += 1
        return self._directory / f"{self.name}-{self._legs}.img"

    # -- in xsave ---

    def create_here(self, kind, vcpus):
        self._xsave.ok("create", self.name, *kind.options(vcpus))

    def restore_here(self, image):
        self._xsave.ok("restore", image)

    def ticked_here(self):
        """Let it tick."""
        deadline = time.monotonic() + WAIT_S
        while len(tick_lines(self._console())) < TICKS:
            assert time.monotonic() < deadline, self._console()[-2000:]
            time.sleep(0.2)

    def save_here(self):
        """Let it tick, save it, check the image; return its path."""
        image = self._image()
        self.ticked_here()
        self._xsave.ok("save", "-p", self.name, image)
        self._went_on(self._console())
        self._xsave.ok("destroy", self.name)
        self._xsave.ok("image", "verify", image)
        return image

    def _console(self):
        return self._xsave.ok("console", self.name, "--log").out.decode(errors="replace")

    # -- under the real Xen ---

    def create_there(self, kind, vcpus):
        share = self._xen.share
        (share / "guest.cfg").write_text(kind.config(self.name, share, vcpus))
        self._run("xl create /host/guest.cfg")

    def restore_there(self, image):
        """Restore with the real xl; if it refuses, say what it said, and what we say."""
        (self._xen.share / "in.img").write_bytes(image.read_bytes())
        status, said = self._xen.run(
            f"rm -f /run/console/guest-{self.name}.log; xl restore /host/in.img"
        )
        if status:
            ours = self._xsave("image", "verify", image)
            raise AssertionError(
                f"xl restore of Xen {self._xen.version}: {status}\n{said}\n"
                f"xsave image verify: {ours.code}\n{ours.out.decode()}{ours.err}"
            )

    def save_there(self):
        """Let it tick, save it with the real xl; return the image's path here."""
        # Not straight to the share: its pages are mapped from elsewhere, which 9p cannot send.
        said = self._run(
            f"wait_ticks {self.name} {TICKS} && xl save {self.name} /tmp/out.img && "
            "cp /tmp/out.img /host/out.img && rm /tmp/out.img && "
            f"echo {_LOG} && cat $(log {self.name})"
        )
        self._went_on(said.partition(f"{_LOG}\n")[2])
        image = self._image()
        (self._xen.share / "out.img").rename(image)
        return image

    def receive_there(self, image):
        """Give an image and the go-ahead to `xl migrate-receive`; return what it answers."""
        (self._xen.share / "in.img").write_bytes(image.read_bytes() + GO)
        self._run(
            f"rm -f /run/console/guest-{self.name}*.log\n"
            "xl migrate-receive < /host/in.img > /host/said || { cat /host/said; exit 1; }\n"
            # Its console's log has the name it had while it was coming.
            f"cd /run/console && mv guest-{self.name}--incoming.log guest-{self.name}.log || true"
        )
        return (self._xen.share / "said").read_bytes()

    def migrate_to_there(self):
        """Migrate it live from xsave to the real `xl migrate-receive`, which is at the other end of
        a two-way port; return the answer of `xsave migrate`."""
        console = self._xsave.start("console", self.name, stdin=subprocess.PIPE)
        console.stdout.readline()  # attached: from here on it misses nothing
        self._goes_on(self._console())
        bridge = shlex.join(self._bridge())
        options = ("--downtime", 1000, "--timeout", 60, "--json")
        migration = self._xsave.start("migrate", self.name, "--to", f"xl:{bridge}", *options)
        status, there = self._xen.run(
            f"rm -f /run/console/guest-{self.name}*.log\n"
            f"{_CONNECTED}"
            f"xl migrate-receive <>{PORT} >&0 2>/host/said\n"
            "status=$?; cat /host/said; cd /run/console\n"
            f"mv guest-{self.name}--incoming.log guest-{self.name}.log; exit $status"
        )
        out, err = migration.communicate(timeout=WAIT_S)
        assert (migration.returncode, status) == (0, 0), err.decode() + there
        rest = console.communicate(timeout=WAIT_S)[0].decode(errors="replace")
        self._note(rest)
        self._begun = rest[rest.rfind("\n") + 1 :]
        return [json.loads(line) for line in out.splitlines()]

    def _bridge(self):
        """Return the command whose stdin and stdout are dom0's port; it has a mark of its own."""
        mark = self._xen.share / "connected"
        mark.unlink(missing_ok=True)
        program = Path(__file__).with_name("bridge.py")
        return [sys.executable, str(program), str(self._xen.socket), str(mark)]

    def migrate_from_there(self):
        """Have the real, live `xl migrate` send it to `xsave migrate-receive`, which is at the
        other end of a two-way port. Skips as migrate_there()."""
        to_bridge, from_receiver = os.pipe()
        to_receiver, from_bridge = os.pipe()
        receiver = self._xsave.start("migrate-receive", stdin=to_receiver, stdout=from_receiver)
        bridge = subprocess.Popen(self._bridge(), stdin=to_bridge, stdout=from_bridge)
        for fd in (to_bridge, from_receiver, to_receiver, from_bridge):
            os.close(fd)
        try:
            self._send_there(f"{_CONNECTED}exec 3<>{PORT}\ncat <&3 &\ncat >&3\nkill $!")
            assert receiver.wait(WAIT_S) == 0, receiver.stderr.read().decode()
        finally:
            for process in (receiver, bridge):
                process.kill()
                process.wait()

    def migrate_there(self):
        """Migrate it live from the real Xen to itself; return what was sent. Skips where the
        hypervisor was built without the log of dirty pages of PV guests."""
        self._send_there("tee /tmp/sent | xl migrate-receive", f"xl destroy {self.name}")
        self._run("cp /tmp/sent /host/out.img; rm /tmp/sent")
        image = self._image()
        (self._xen.share / "out.img").rename(image)
        return image

    def _send_there(self, receiver, afterwards="true"):
        """Have it tick, and `xl migrate` send it to the shell script `receiver`."""
        (self._xen.share / "receiver").write_text(f"#!/bin/sh\n{receiver}\n")
        (self._xen.share / "receiver").chmod(0o755)
        status, said = self._xen.run(
            f"wait_ticks {self.name} {TICKS} || exit 1\n"
            f"xl migrate -s '' {self.name} /host/receiver\n"
            f"status=$?; {afterwards} >/dev/null 2>&1; echo {_LOG}; cat $(log {self.name})\n"
            "exit $status"
        )
        if status and "Failed to enable logdirty" in said:
            pytest.skip(f"Xen {self._xen.version} cannot migrate PV guests live")
        assert status == 0, said[-3000:]
        self._went_on(said.partition(f"{_LOG}\n")[2])

    def _run(self, script):
        status, said = self._xen.run(script)
        assert status == 0, said[-3000:]
        return said

    def clean_up(self):
        with contextlib.suppress(Silent):
            self._xen.run(f"xl destroy {self.name}; rm -f /tmp/*.img /run/console/*")
