"""The life of one hostile guest, beside a victim, watched all the time.

A `World` is a host with a victim on it; `live` lets one guest loose in a domain process of its own
and asks, over its control socket as any command would: does it answer, at once, whatever the
guest does? are its frames' counts right (audit.py)? is it small? At the end: did it die of an
exception of ours? is anything left of it? is the victim, to the last byte, what it was?
"""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

import numpy as np

from tests.flows import flow
from tests.fuzz.guest import audit
from tests.fuzz.guest.kernel import HostileKernel
from tests.fuzz.guest.layout import MEMORY_BYTES
from xsave.errors import ConnectionLost, NotFound, XsaveError
from xsave.guest.xen.machine import DOMID_FREE
from xsave.host import create as host_create
from xsave.host import suspension
from xsave.host.bootconfig import DEFAULT_ACTIONS, PRESERVE
from xsave.host.host import add_host
from xsave.image.buffers import reader
from xsave.image.verify import verify

#: How much of a processor a domain process may use before it answers; how long that may take on
#: a machine that has other things to do.
ANSWER_CPU_S, ANSWER_S = 4.0, 60.0
MAX_PRIVATE_BYTES = 400 << 20
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_SUSPEND_TIMEOUT_S = 0.7


class Finding(AssertionError):
    """The guest did what no guest may."""


class World:
    """A host of 48 MiB with a paused victim of 4 MiB on it, made the same every time."""

    def __init__(self, forks, directory, suspend_timeout_s=_SUSPEND_TIMEOUT_S):
        self.forks = forks
        self.directory = Path(directory)
        audit.install()
        suspension.SUSPEND_TIMEOUT_S = suspend_timeout_s
        self.host = add_host("arena", 48 << 20, seed=4)
        host_create.create(self.host, "victim", memory_bytes=4 << 20, paused=True)
        machine = self.host.machine
        self.victim = np.flatnonzero(machine.owner != DOMID_FREE)
        self.victim = self.victim[self.victim >= machine.first_frame]
        self._first_free = machine.first_frame
        self.before = self._seen()
        self.strangers = self._strangers()

    def _strangers(self):
        """Frames no guest that comes later may name."""
        machine, victim = self.host.machine, self.victim.tolist()
        tables = np.flatnonzero(machine.page_type[self.victim]).tolist()
        return [
            *(victim[i] for i in (0, 1, 100, 500, len(victim) - 1)),
            *(victim[i] for i in tables[:: max(len(tables) // 8, 1)]),
            0, 1, 2, 512, machine.first_frame - 1, machine.nr_frames - 1, machine.nr_frames,
            1 << 32, (1 << 40) - 1, (1 << 52) - 1,
        ]  # fmt: skip

    def _seen(self):
        """All that is the victim's or Xen's, but the m2p's words for other frames."""
        machine = self.host.machine
        frames = np.concatenate((np.arange(512), self.victim))
        columns = (machine.owner, machine.page_type, machine.type_count, machine.refs)
        columns += (machine.pinned, machine.m2p)
        return [machine.pages[frames].tobytes()] + [column[frames].tobytes() for column in columns]

    def check(self):
        """The victim is as it was, and nothing is left but the victim."""
        if self._seen() != self.before:
            raise Finding("the victim or Xen's own frames have changed")
        machine = self.host.machine
        rest = np.ones(machine.nr_frames, bool)
        rest[: self._first_free] = False
        rest[self.victim] = False
        columns = (machine.page_type, machine.pinned, machine.type_count, machine.refs)
        if (machine.owner[rest] != DOMID_FREE).any() or any(c[rest].any() for c in columns):
            raise Finding("frames of the guest are left")
        if len(list((self.host.directory / "domains").iterdir())) != 1:
            raise Finding("a record of the guest is left")
        if machine.resident(np.flatnonzero(rest)).any():
            raise Finding("a free frame was written to")


class Life:
    """One guest, from a seed."""

    def __init__(self, world, seed, *, only=None):
        self.world = world
        self.rng = random.Random(f"life {seed}")
        self.saves = (only is None and self.rng.random() < 0.3) or bool(only and "suspend" in only)
        self.kernel = HostileKernel(seed, world.strangers, suspends=self.saves, only=only)
        self.name = "hostile"
        self.seen = []
        self.longest = 0.0
        self.states = set()
        self.crash, self.crossings = "", 0
        self.saved = None

    def live(self, seconds):
        """Run the guest for so long at most. Raises Finding."""
        path = self.world.directory / "hostile.elf"
        path.write_bytes(self.kernel.elf())
        host_create.create(
            self.world.host, self.name, kernel=str(path), memory_bytes=MEMORY_BYTES,
            vcpus=self.rng.choice((1, 1, 2)), actions=dict.fromkeys(DEFAULT_ACTIONS, PRESERVE),
            max_memory_bytes=MEMORY_BYTES + self.rng.choice((0, 0, 1 << 20)),
        )  # fmt: skip
        pid = self.world.forks.newest
        try:
            self._watch(pid, seconds)
            if self.saves:
                self._save()
        finally:
            self._end(pid)
        if self.saved is not None:
            self._restore()

    # -- while it lives ---

    def _watch(self, pid, seconds):
        deadline = time.monotonic() + seconds
        while True:
            time.sleep(self.rng.choice((0.01, 0.03, 0.1)))
            answer = self._ask(pid, "info")
            self.states.add(answer["state"])
            over = time.monotonic() >= deadline or answer["state"] in ("crashed", "shutdown")
            if over or self.rng.random() < 0.2:
                self._audit(pid)
            if over:
                return
            if self.rng.random() < 0.1:
                op = self.rng.choice(("pause", "unpause", "shutdown", "target"))
                self._ask(pid, op, reason="suspend", nr_pages=900)
                self._ask(pid, "unpause")

    def _ask(self, pid, op, **arguments):
        """One request on a connection of its own; refusals are answers too."""
        start, used = time.monotonic(), cpu_seconds(pid)
        try:
            with self.world.host.find(self.name) as domctl:
                domctl._sock.settimeout(ANSWER_S)
                try:
                    answer, _ = domctl._call(op, **arguments)
                except ConnectionLost as error:
                    raise Finding(f"no answer to {op} within {ANSWER_S:g} s: {error}") from error
                except XsaveError:
                    answer = {}
        except NotFound as error:
            raise Finding(f"the domain is gone at {op}") from error
        used = cpu_seconds(pid) - used
        self.longest = max(self.longest, used)
        if used > ANSWER_CPU_S:
            waited = time.monotonic() - start
            raise Finding(f"{op} took {used:.1f} s of processor time, {waited:.1f} s in all")
        return answer

    def _audit(self, pid):
        answer = self._ask(pid, "audit")
        self.crash, self.crossings = answer.get("crash", ""), answer.get("crossings", 0)
        if answer.get("problems"):
            raise Finding("; ".join(answer["problems"]))
        if "hypervisor:" in answer.get("crash", ""):
            raise Finding(f"crashed: {answer['crash']}\n{self._log('console.log')}")
        private = private_bytes(pid)
        if private > MAX_PRIVATE_BYTES:
            raise Finding(f"the domain process has {private >> 20} MiB of its own")

    def _log(self, name):
        texts = [
            path.read_text(errors="replace")[-3000:]
            for path in (self.world.host.directory / "domains").glob(f"*/{name}")
        ]
        return "\n".join(texts)

    # -- save and restore ---

    def _save(self):
        path = self.world.directory / "hostile.img"
        path.unlink(missing_ok=True)
        try:
            flow.save(self.world.host, path, self.name)
        except XsaveError as refusal:
            self.seen.append(f"save: {type(refusal).__name__}: {refusal}")
            return
        self.saved = path
        self.seen.append("saved")
        errors = [f for f in verify(reader(path.read_bytes())) if f.severity == "error"]
        self.seen += [f"verify: {error.message}" for error in errors]
        if any(error.rule in ("damaged", "order") for error in errors):
            raise Finding(f"it was saved to an image that is none: {errors}")

    def _restore(self):
        self.name = "hostile2"
        try:
            flow.restore(self.world.host, self.saved, name=self.name)
        except XsaveError as refusal:
            self.seen.append(f"restore: {type(refusal).__name__}: {refusal}")
            self.world.forks.newest_ends()
            self.world.check()
            return
        self.seen.append("restored")
        pid = self.world.forks.newest
        try:
            self._watch(pid, 0.3)
        finally:
            self._end(pid)

    # -- its end ---

    def _end(self, pid):
        """Destroy it, if it is not gone by a save: its process ends by itself, without a word."""
        complaint = self._log("process.log")
        try:
            with self.world.host.find(self.name) as domctl:
                domctl._sock.settimeout(ANSWER_S)
                domctl.destroy()
        except (NotFound, ConnectionLost) as error:
            if self.saved is None:  # a save that has just succeeded is its end, too
                status = self.world.forks.newest_ends()
                raise Finding(f"{error}, with status {status:#x}: {complaint}") from error
        status = self.world.forks.newest_ends()
        if status:
            raise Finding(f"its process ended with status {status:#x}: {complaint}")
        if "Traceback" in complaint:
            raise Finding(complaint)
        self.world.check()


def cpu_seconds(pid):
    """Processor time a process has used; 0 if it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / _TICKS_PER_S


def private_bytes(pid):
    """Memory of its own that a process has in use; 0 if it is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return int(status.split("RssAnon:")[1].split()[0]) << 10
