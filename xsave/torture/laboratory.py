"""The laboratory: a guest on machine A, and machine B that takes it where no old frame is its own.

    A   frames A_FIRST .. , shuffled: the guest's
    B   the same frames belong to another domain, each with a pattern in it and an m2p entry that
        is never the guest's pfn; the guest gets B_FIRST .. , shuffled

So a frame number of A that survives a restore names, on B, a frame of somebody else: what the
guest does with it is refused or leads it to a wrong page, and never works by luck. The ranges are
far above any pfn and any count, and no canonical page-table entry is a number in them either
(as such a number it would have a frame's low bits where an entry has its flags): a word that
looks like one of them is one.

Everything is in this process, in private memory: a `fork` is a snapshot. Before anything is
tried, the guest is suspended once, saved, resumed, and restored on B: its code is then translated
on both machines, and every later restore puts it into the same frames.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import numpy as np

from xsave.errors import GuestStateError, XsaveError
from xsave.frames import PAGE_SHIFT, PAGE_SIZE
from xsave.guest.xen import cpuregs
from xsave.guest.xen.cpuid import XEN_VERSION, CpuPolicy
from xsave.guest.xen.cpuregs import RSP
from xsave.guest.xen.domctl import DomainState
from xsave.guest.xen.machine import XEN_FRAMES
from xsave.guest.xen.time import DEFAULT_TSC_KHZ
from xsave.image.buffers import Buffer
from xsave.public import SHUTDOWN_SUSPEND
from xsave.restore import restore
from xsave.save import save
from xsave.torture import forks
from xsave.torture.clockwork import Clockwork
from xsave.torture.door import Door
from xsave.torture.inmemory import Source, as_bytes
from xsave.torture.machine import PrivateMachine
from xsave.torture.refusals import Refusals
from xsave.torture.settings import Cell, Settings, Sweep, claimed_clean
from xsave.torture.stale import Detector, Stale, mfns_in
from xsave.torture.symbols import Symbols, read_symbols
from xsave.torture.tasks import Tasks
from xsave.torture.warmcpu import Crossings, WarmCpu
from xsave.torture.window import LIFE_BEGINS, Gate, Window

MEMORY_PAGES = 1024
NR_FRAMES = 0x1C8000
A_FIRST, B_FIRST = 0x1A5400, 0x1C6400
#: Frames a domain may come to use: its memory and Xen's own.
RANGE = MEMORY_PAGES + XEN_FRAMES
GUEST_DOMID, OTHER_DOMID = 1, 77
NS_PER_MS = 1_000_000
REGISTERS = (
    "RAX", "RBX", "RCX", "RDX", "RSI", "RDI", "RBP", "RSP", "R8", "R9", "R10", "R11", "R12",
    "R13", "R14", "R15",
)  # fmt: skip
#: Twice the time the guest's freezer gives its threads.
_SUSPEND_TIMEOUT_NS = 4_000 * NS_PER_MS
_BOOT_NS = 300 * NS_PER_MS
_WARM_A_NS, _WARM_B_NS = 100 * NS_PER_MS, 300 * NS_PER_MS
_LONGEST_LIFE_NS = 10_000 * NS_PER_MS


class Laboratory:
    """Both machines, with the guest of one cell on A: booted, and B ready for it."""

    def __init__(self, cell: Cell, settings: Settings, directory: Path) -> None:
        self.cell = cell
        self.settings = settings
        elf = Path(settings.kernel).read_bytes()
        self.symbols: Symbols = read_symbols(elf, settings.kernel)
        rng = np.random.default_rng(settings.seed)
        order_a, order_b = rng.permutation(RANGE), rng.permutation(RANGE)
        self.a = PrivateMachine("a", NR_FRAMES, directory, A_FIRST + order_a)
        self.b = PrivateMachine("b", NR_FRAMES, directory, B_FIRST + order_b)
        self._occupy_b()
        self.door = Door(self.a, GUEST_DOMID, "torture")
        self._crossings = Crossings()
        self._cpu_b: WarmCpu | None = None
        self._new_lives: set[int] = set()
        self._boot()
        self._warm_up()

    # -- machine A ---

    def _boot(self) -> None:
        cell, settings, door = self.cell, self.settings, self.door
        cmdline = cell.command_line(settings)
        door.begin(nr_vcpus=cell.vcpus, max_pages=MEMORY_PAGES, builtin=True)
        door.build(settings.kernel, None, cmdline)
        door.ask_set_state(self._state())()
        door.commit()
        domain = door.xen.domain
        domain.start()
        door.xen.power_on()
        self.gate = Gate(door.xen.cpu, self.symbols)
        self.clockwork = Clockwork(door.xen)
        self.clockwork.run_for(_BOOT_NS)
        self._alive("boot")

    def _state(self) -> DomainState:
        policy = CpuPolicy.default()
        vcpus, kib = self.cell.vcpus, MEMORY_PAGES * PAGE_SIZE >> 10
        config = {
            "c_info": {"type": "pv", "name": self.door.name},
            "b_info": {"max_vcpus": vcpus, "max_memkb": kib, "target_memkb": kib, "type.pv": {}},
            "xsave": {"guest": "builtin", "deterministic": self.settings.seed},
        }
        return DomainState(
            never_run=True,
            nr_vcpus=vcpus,
            max_pages=MEMORY_PAGES,
            shared_info_mfn=0,
            tsc=(0, DEFAULT_TSC_KHZ, 0, 0),
            config=json.dumps(config).encode(),
            cpuid_policy=policy.cpuid,
            msr_policy=policy.msrs,
            p2m_frames=None,
            p2m_size=MEMORY_PAGES,
            xen_version=XEN_VERSION,
        )

    def _alive(self, what: str) -> None:
        domain = self.door.xen.domain
        if domain.shutdown_reason is not None:
            tail = " | ".join(self.door.ear.text.strip().splitlines()[-3:])
            raise GuestStateError(f"the guest did not survive its {what}: {tail}")

    def request_suspend(self) -> None:
        """Write the request into the guest's xenstore, as a toolstack does."""
        domain = self.door.xen.domain
        self.clockwork.held.clear()  # it may run again, but vCPU 0 goes first
        domain.store.write(f"{domain.home}/control/shutdown", "suspend")
        domain.serve_store()

    def run_to_suspend(self, until_ns: int = _SUSPEND_TIMEOUT_NS) -> bool:
        """Let the guest act on the request; True if it called the hypervisor to suspend it."""
        domain = self.door.xen.domain
        self.clockwork.run(lambda: False, domain.clock.now() + until_ns)
        return domain.shutdown_reason is not None

    def image(self) -> bytes:
        """Save the suspended guest as `xsave save` does. Raises what that raises."""
        pieces: list[bytes] = []

        def write(buffers: Iterable[Buffer]) -> None:
            pieces.extend(map(as_bytes, buffers))

        save(self.door, write, commit=lambda: None, leave="destroyed")
        return b"".join(pieces)

    def prepare(self, sweep: Sweep) -> None:
        """Bring the vCPUs to where a sweep wants them."""
        self.clockwork.first = 0
        if sweep.held_in:
            self.window(1).lead_into(self.symbols.address[sweep.held_in])
            self.clockwork.held.add(1)

    def registers(self) -> dict[str, int]:
        """The general registers as they are."""
        q = self.door.xen.q
        return {name.lower(): q[getattr(cpuregs, name)] for name in REGISTERS}

    def held(self) -> dict[str, int]:
        """The general registers that hold a frame number at this moment."""
        registers = self.registers()
        values = np.array(list(registers.values()), np.uint64)
        hits = mfns_in(values, A_FIRST, RANGE).tolist()
        return {n: v for (n, v), hit in zip(registers.items(), hits, strict=True) if hit}

    def window(self, vcpu: int = 0) -> Window:
        """The window that begins with the next address space made on a vCPU."""
        return Window(self.clockwork, self.symbols, self.gate, vcpu)

    def stale(self, image: bytes) -> list[Stale]:
        """Return what an image of the guest, still as it was suspended, holds of A's frames."""
        hv = self.door.xen
        return Detector(A_FIRST, RANGE, lambda: Tasks(hv, self.symbols)).find(image)

    # -- machine B ---

    def _occupy_b(self) -> None:
        """Give A's frames to another domain."""
        b, mfns = self.b, np.arange(A_FIRST, A_FIRST + RANGE)
        b.owner[mfns] = OTHER_DOMID
        self.pattern = np.random.default_rng(self.settings.seed + 1).integers(
            1 << 63, size=(RANGE, 8), dtype=np.uint64
        )
        b.mem[mfns, :8] = self.pattern
        wrong = self.a.frames[np.roll(np.arange(RANGE), RANGE // 2)].astype(np.intp)
        b.m2p[wrong] = np.arange(RANGE) % MEMORY_PAGES

    def other_domain_is_unharmed(self) -> bool:
        """True if the other domain's frames on B are as they were."""
        mfns = np.arange(A_FIRST, A_FIRST + RANGE)
        rest = self.b.mem[A_FIRST : A_FIRST + RANGE, 8:]
        return (
            bool((self.b.mem[mfns, :8] == self.pattern).all())
            and not rest.any()
            and not self.b.type_count[mfns].any()
        )

    def restore(self, image: bytes) -> tuple[Door, Clockwork, Refusals]:
        """Restore an image on B as `xsave restore` does, ready to run. Raises what that raises."""
        door = Door(self.b, GUEST_DOMID, "torture")
        restore(Source(image), lambda _name, _nr: door, paused=True, nr_frames=NR_FRAMES)
        hv = door.xen
        domain = hv.domain
        domain.start()
        self._crossings.hv = hv
        if self._cpu_b is None:
            self._cpu_b = WarmCpu(self.b, domain.scratch_mfn, self._crossings)
            begins = self.symbols.address[LIFE_BEGINS]
            self._cpu_b.watch(begins, begins, self._life_begins)
        self._new_lives.clear()
        hv.start_cpu(self._cpu_b)
        refusals = Refusals(hv, A_FIRST, RANGE)
        return door, Clockwork(hv), refusals

    def _life_begins(self, _rip: int) -> None:
        """A thread on B makes a new address space: all it did with the old one was right."""
        self._new_lives.add(self._crossings.hv.q[RSP] >> PAGE_SHIFT)

    def run_on(self, clockwork: Clockwork) -> bool:
        """Let the guest on B run until every thread has ended the life it was in; False if it
        does not come to that."""
        enough = self.cell.threads(self.settings)
        until = clockwork.domain.clock.now() + _LONGEST_LIFE_NS
        clockwork.run(lambda: len(self._new_lives) >= enough, until)
        return len(self._new_lives) >= enough

    # -- before anything is tried ---

    def _warm_up(self) -> None:
        """One suspend with nothing in its way, and a restore on B that is forgotten again.

        The guest on A goes on as after a cancelled suspend, so that what it does to suspend is
        translated; but where even this suspend is not safe for it, that happens in a child.
        """
        if claimed_clean(self.cell):
            image = self._first_image()
            self.door.resume()
            self.clockwork.run_for(_WARM_A_NS)
            self._alive("first suspend")
        else:
            image = forks.in_child(self._first_image)
        with suppress(XsaveError):  # the points will tell
            _, clockwork, _ = self.restore(image)
            clockwork.run_for(_WARM_B_NS)
        self.b.free_domain(GUEST_DOMID)
        self.b.rewind()

    def _first_image(self) -> bytes:
        self.request_suspend()
        if not self.run_to_suspend():
            raise GuestStateError("the guest does not even suspend undisturbed")
        if self.door.xen.domain.shutdown_reason != SHUTDOWN_SUSPEND:
            self._alive("first suspend")
        return self.image()
