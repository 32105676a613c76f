"""An emulated CPU that outlives the domains it runs: its translated code is worth more than they.

A restore on machine B makes a new domain in the same frames, with the same code in them. So the
CPU of the first one is kept, put back to where it was after its power on, and its crossings are
led to the hypervisor of the domain it has at the time.
"""

from __future__ import annotations

from typing import Any

from xsave.guest.xen.hypervisor import Hypervisor
from xsave.guest.xen.vcpu import Cpu


class WarmCpu(Cpu):
    """An emulated CPU that is powered on once, and later only put back into that state: a power
    on drops all translated code, and a restored vCPU differs from the first one in registers."""

    _cold: Any = None
    _setting: tuple[object, ...] = ()

    def power_on(self, cr3: int, cr4: int, xcr0: int, fpu: bytes, gdt_base: int) -> None:
        setting = (cr4, xcr0, fpu, gdt_base)
        if self._cold is not None and setting == self._setting:
            self.unpark(self._cold, cr3)
            return
        super().power_on(cr3, cr4, xcr0, fpu, gdt_base)
        self._cold, self._setting = self.park(None), setting


class Crossings:
    """Stands between a CPU that lives on and the hypervisor of the domain it has at the time."""

    hv: Hypervisor

    def syscall(self) -> None:
        self.hv.syscall()

    def sysenter(self) -> None:
        self.hv.sysenter()

    def exception(self, vector: int, error_code: int) -> None:
        self.hv.exception(vector, error_code)

    def software_interrupt(self, vector: int) -> None:
        self.hv.software_interrupt(vector)

    def invalid_opcode(self) -> bool:
        return self.hv.invalid_opcode()

    def cpuid(self) -> None:
        self.hv.cpuid()

    def read(self, address: int, nr: int) -> bytes:
        return self.hv.read(address, nr)

    def rdtsc(self) -> int:
        return self.hv.rdtsc()
