"""Small machines and guests for the tests of the hypervisor.

`Guest` is a domain with page tables made by hand: page i of its memory is mapped at VA + 4096 i,
writable unless it is one of the tables. It runs a few bytes of machine code up to `stop`.
"""

from __future__ import annotations

import itertools
import os
import shutil
import struct
import tempfile
from pathlib import Path

import numpy as np

from xsave.frames import (
    PAGE_SHIFT,
    PAGE_SIZE,
    PTE_ACCESSED,
    PTE_DIRTY,
    PTE_PRESENT,
    PTE_RW,
    PTE_USER,
)
from xsave.guest.xen import builder, cpuregs, elf
from xsave.guest.xen import machine as xen_machine
from xsave.guest.xen.cpuregs import RIP, RSP
from xsave.guest.xen.domain import Domain
from xsave.guest.xen.hypercalls import table
from xsave.guest.xen.hypervisor import Hypervisor
from xsave.guest.xen.machine import Machine
from xsave.guest.xen.pagetypes import PGT_L4
from xsave.guest.xen.time import VirtualClock
from xsave.guest.xen.vcpu import FLAT_RING3_CS64

MIB = 256  # frames
FULL = PTE_PRESENT | PTE_RW | PTE_USER | PTE_ACCESSED | PTE_DIRTY
READ_ONLY = FULL & ~PTE_RW
VA = 0x40_0000
HANDLERS = 2  # the page of a Guest's trap handlers
#: iret_to_self(): push ss; push rsp, as it was; pushfq; push cs; push the address behind; iretq.
RETURN_TO_SELF = (
    b"\x8c\xd0\x50\x54\x48\x83\x04\x24\x08\x9c\x8c\xc8\x50\x48\x8d\x05\x03\x00\x00\x00\x50\x48\xcf"
)
KERNEL_ELF = Path(__file__).parents[2] / "xsave" / "guest" / "kernel" / "xsave-guest.elf"
SHARED_MEMORY = Path("/dev/shm")


class Machines:
    """Makes small machines in shared memory; `close` removes them."""

    def __init__(self) -> None:
        base = SHARED_MEMORY if os.access(SHARED_MEMORY, os.W_OK) else None
        self.directory = Path(tempfile.mkdtemp(prefix="xsave-machine-", dir=base))
        self._names = map(str, itertools.count())
        self._made: list[Machine] = []

    def make(self, nr_frames: int = 16 * MIB, seed: int = 1) -> Machine:
        directory = self.directory / next(self._names)
        directory.mkdir()
        xen_machine.create_files(directory, nr_frames, seed)
        self._made.append(Machine(directory, "small"))
        return self._made[-1]

    def close(self) -> None:
        for machine in self._made:
            for domain in domains_of(machine).copy():
                remove(domain)
        shutil.rmtree(self.directory, ignore_errors=True)


def make_domain(
    machine: Machine,
    domid: int = 1,
    *,
    max_pages: int = 1024,
    nr_vcpus: int = 1,
    frame_order: int | None = None,
) -> Domain:
    """An empty domain in virtual time."""
    log = machine.directory / f"console-{domid}.log"
    domain = Domain(
        machine,
        domid,
        nr_vcpus=nr_vcpus,
        max_pages=max_pages,
        clock=VirtualClock(),
        log_path=log,
        frame_order=frame_order,
    )
    domains_of(machine).append(domain)
    return domain


def domains_of(machine: Machine) -> list[Domain]:
    """The domains the tests made on a machine and did not remove yet."""
    return machine.__dict__.setdefault("tests_domains", [])


def remove(domain: Domain) -> None:
    """Free a domain's frames and close its log, as the end of its process would."""
    domains_of(domain.machine).remove(domain)
    domain.console.close()
    domain.machine.free_domain(domain.domid)


def build_guest(
    machine: Machine, domid: int = 1, *, max_pages: int = 1024, nr_vcpus: int = 1
) -> Hypervisor:
    """The built-in kernel at its start of day; its CPU is not powered on."""
    domain = make_domain(machine, domid, max_pages=max_pages, nr_vcpus=nr_vcpus)
    builder.build(domain, elf.parse(KERNEL_ELF.read_bytes(), "kernel"), b"", "")
    return Hypervisor(domain, table())


class Stopping(Hypervisor):
    """A hypervisor that ends the run at the `syscall` instructions at `stops`."""

    stops: frozenset[int] = frozenset()
    stopped_at = -1

    def syscall(self) -> None:
        if self.q[RIP] in self.stops:
            self.stopped_at = self.q[RIP]
            self.cpu.stop()
        else:
            super().syscall()


class Guest:
    """A domain with nr plain pages and, behind them, its L1, L2, L3 and L4 page tables."""

    def __init__(
        self, machine: Machine, nr: int = 16, *, domid: int = 1, frames: np.ndarray | None = None
    ) -> None:
        self.machine = machine
        self.domain = make_domain(machine, domid)
        self.tables = self.domain.tables
        self.nr = nr
        if frames is None:
            frames = machine.allocate(domid, nr + 4)
        self.frames = [int(mfn) for mfn in frames]
        machine.m2p[frames] = np.arange(nr + 4, dtype=np.uint64)
        self.l1, self.l2, self.l3, self.l4 = self.frames[nr:]
        self._map()
        self.stops: set[int] = set()
        self.hv = Stopping(self.domain, table())
        self.vcpu = self.hv.vcpu

    def _map(self) -> None:
        mem = self.machine.mem
        for i, mfn in enumerate(self.frames):
            mem[self.l1, i] = mfn << PAGE_SHIFT | (FULL if i < self.nr else READ_ONLY)
        mem[self.l2, VA >> 21 & 511] = self.l1 << PAGE_SHIFT | FULL
        mem[self.l3, VA >> 30 & 511] = self.l2 << PAGE_SHIFT | FULL
        mem[self.l4, VA >> 39 & 511] = self.l3 << PAGE_SHIFT | FULL
        assert self.tables.pin(self.l4, PGT_L4) == 0
        assert self.tables.get_type(self.l4, PGT_L4) == 0
        self.domain.vcpus[0].context.ctrlreg[3] = self.l4 << PAGE_SHIFT

    def va(self, page: int, offset: int = 0) -> int:
        return VA + (page << PAGE_SHIFT) + offset

    def poke(self, page: int, offset: int, data: bytes) -> None:
        """Write plain pages behind the guest's back."""
        room = PAGE_SIZE - offset
        here = np.frombuffer(data[:room], np.uint8)
        self.machine.pages[self.frames[page], offset : offset + here.size] = here
        if data[room:]:
            self.poke(page + 1, 0, data[room:])

    def peek(self, page: int, offset: int, nr: int) -> bytes:
        return self.machine.pages[self.frames[page], offset : offset + nr].tobytes()

    def unmap(self, *pages: int) -> list[int]:
        """Take the mapping of plain pages away, so that they may become tables; their frames."""
        for page in pages:
            assert self.tables.update_entry(self.l1, page, 0) == 0
        return [self.frames[page] for page in pages]

    def power_on(self) -> None:
        """Stack at the end of page 1, code in page 0."""
        self.vcpu.context.kernel_sp = self.va(2)
        self.vcpu.context.user_regs.rsp = self.va(2)
        self.hv.power_on()

    def set_handler(self, vector: int, flags: int = 0) -> int:
        """Give the guest a trap handler that ends the run; return its address."""
        address = self.va(HANDLERS, 16 * vector)
        self.poke(HANDLERS, 16 * vector, b"\x0f\x05")
        self.vcpu.set_trap(vector, flags, FLAT_RING3_CS64, address)
        self.stops.add(address)
        return address

    def run(self, code: bytes, *, offset: int = 0, page: int = 0, **registers: int) -> int:
        """Run code from page 0 until it reaches its end or a handler; return where it stopped,
        -1 if it stopped elsewhere. Registers by the names of cpuregs."""
        self.start(code, offset=offset, page=page, **registers)
        self.hv.run()
        return self.hv.stopped_at

    def start(self, code: bytes, *, offset: int = 0, page: int = 0, **registers: int) -> None:
        """Put code in its place and go there, without running it."""
        if not self.hv.powered:
            self.power_on()
        end = self.va(page, offset + len(code))
        self.poke(page, offset, code)
        self.machine.pages[self.frame_at(end), end & 0xFFF : (end & 0xFFF) + 2] = (0x0F, 0x05)
        self.hv.cpu.forget_code()
        q = self.hv.q
        for name, value in registers.items():
            q[getattr(cpuregs, name.upper())] = value
        q[RIP] = self.va(page, offset)
        self.hv.stops = self.stops | {end}
        self.hv.stopped_at = -1
        self.domain.clock.extend()

    def frame_at(self, address: int) -> int:
        return self.frames[(address - VA) >> PAGE_SHIFT]

    def stacked(self, nr: int) -> tuple[int, ...]:
        """The top of the stack, as so many quadwords."""
        at = self.hv.q[RSP] - VA
        return struct.unpack(f"<{nr}Q", self.peek(at >> PAGE_SHIFT, at & 0xFFF, 8 * nr))
