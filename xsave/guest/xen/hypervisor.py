"""The crossings: hypercalls, exceptions and events between one domain and its emulated CPU.

Everything is delivered inside the emulator's hooks: after each hypercall, iret or trap the due
timers are raised and, if the guest has events unmasked, the upcall frame is built on the spot.
`run()` returns when the guest blocks, the time slice ends or `kick()` was called; the domain
process then decides what is next. Mirrors xen/arch/x86/pv/{hypercall,traps,iret}.c.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

from xsave.guest.xen import guestmem
from xsave.guest.xen.context import RFLAGS_IF, RFLAGS_LIVE, Vcpu
from xsave.guest.xen.cpuregs import (
    CR2,
    CS_SEL,
    GS_BASE,
    R8,
    R10,
    R11,
    RAX,
    RBX,
    RCX,
    RDI,
    RDX,
    RIP,
    RSI,
    RSP,
    SS_SEL,
)
from xsave.guest.xen.domain import Domain
from xsave.guest.xen.guestmem import GuestFault
from xsave.guest.xen.pagetable import PGT_L1, PGT_L4
from xsave.guest.xen.privop import emulate_privileged
from xsave.guest.xen.ptwr import emulate_table_write
from xsave.guest.xen.vcpu import CR4_OSXSAVE, FLAT_RING3_CS64, FLAT_RING3_SS64, Cpu

M64 = (1 << 64) - 1
TRAP_INVALID_OP, TRAP_GP_FAULT, TRAP_PAGE_FAULT = 6, 13, 14
_WITH_ERROR_CODE = {8, 10, 11, 12, 13, 14, 17}
_TI_DISABLE_EVENTS = 4
_HYPERVISOR_IRET = 23
_VGCF_IN_SYSCALL = 0x100
_FORCED_EMULATION_CPUID = b"\x0f\x0bxen\x0f\xa2"
VMASST_WRITABLE_PAGETABLES = 1 << 2
_SYSCALL_BYTES = 2
_CLEARED_FLAGS = 0x54100  # AC RF NT TF
_MASKED_ON_FRAME = 0x3200  # IOPL IF

Hypercall = Callable[["Hypervisor", Vcpu, int, int, int, int, int], int]


class Hypervisor:
    """Xen, as one domain meets it. `cpu` exists once the domain is to run."""

    def __init__(self, domain: Domain, table: dict[int, Hypercall]) -> None:
        self.domain = domain
        self.table = table
        self.tables = domain.tables
        self.vcpu = domain.vcpus[0]
        self.kicked = False
        self.nr_crossings = 0
        self.powered = False
        self._parked: dict[int, Any] = {}
        self.cpu: Cpu
        self.q: memoryview

    def power_on(self) -> None:
        """Make the emulated CPU and load vCPU 0 into it."""
        self.cpu = Cpu(self.domain.machine, self.domain.scratch_mfn, self)
        self.q = self.cpu.q
        self.vcpu.load_registers(self.cpu, self.domain.gdt_base(self.vcpu))
        self.powered = True

    def switch_to(self, vcpu: Vcpu) -> None:
        """Let another vCPU have the emulated CPU: all vCPUs take turns on one."""
        if vcpu is self.vcpu:
            return
        self._parked[self.vcpu.id] = self.cpu.park(self._parked.get(self.vcpu.id))
        self.vcpu = vcpu
        if vcpu.fresh:
            vcpu.fresh = False
            vcpu.load_registers(self.cpu, self.domain.gdt_base(vcpu))
        else:
            self.cpu.unpark(self._parked[vcpu.id], vcpu.cr3)

    def read_registers(self) -> None:
        """Copy the live registers of every vCPU that has run into its context."""
        if self.powered:
            for vcpu in self.domain.vcpus:
                if vcpu.online and not vcpu.fresh:
                    self.switch_to(vcpu)
                    vcpu.read_registers(self.cpu)

    def set_result(self, result: int) -> None:
        """Change what the hypercall returns in which vCPU 0 suspended."""
        self.switch_to(self.domain.vcpus[0])
        self.q[RAX] = result

    def kick(self) -> None:
        """Make run() return at the next crossing."""
        self.kicked = True

    def run(self, count: int = 0) -> None:
        """Run the guest until it blocks, shuts down, is kicked, or `count` instructions passed."""
        self.kicked = False
        self._deliver(0)
        if not self.kicked and self.domain.shutdown_reason is None:
            self.cpu.run(count)

    # -- guest memory, as every hypercall sees it ---

    def read(self, address: int, nr: int) -> bytes:
        return guestmem.read(self.tables, self.vcpu.cr3, address, nr)

    def write(self, address: int, data: bytes) -> None:
        guestmem.write(self.tables, self.vcpu.cr3, address, data)

    # -- crossings ---

    def syscall(self) -> None:
        """A `syscall` instruction: a hypercall, or the guest's user space calling its kernel."""
        self.nr_crossings += 1
        self.domain.clock.step()
        q = self.q
        if not self.vcpu.in_kernel:
            self._user_syscall()
        elif q[RAX] & 0xFFFFFFFF == _HYPERVISOR_IRET:
            self._iret()
        else:
            result = self.call(q[RAX], q[RDI], q[RSI], q[RDX], q[R10], q[R8])
            q[RAX] = result & M64
            self._flush()
        self._leave(_SYSCALL_BYTES)

    def call(self, nr: int, *args: int) -> int:
        """Dispatch one hypercall; also used by multicall."""
        handler = self.table.get(nr & 0xFFFFFFFF)
        if handler is None:
            return -38  # ENOSYS
        try:
            return handler(self, self.vcpu, *args)
        except GuestFault as fault:
            return fault.rc

    def _flush(self) -> None:
        if self.tables.stale_tlb:
            self.tables.stale_tlb = False
            self.cpu.load_cr3(self.vcpu.cr3)

    def _leave(self, skip: int) -> None:
        """Before the guest goes on: due timers, then a pending upcall, then whoever waits."""
        domain = self.domain
        now = domain.clock.now()
        for vcpu in domain.vcpus:
            if vcpu.timer_ns is not None and vcpu.timer_ns <= now:
                domain.run_timers(now)
        self._deliver(skip)
        if self.kicked or domain.shutdown_reason is not None or now >= domain.clock.horizon_ns:
            self.cpu.stop()

    def exception(self, vector: int, error_code: int) -> None:
        """A fault or trap in the guest."""
        self.nr_crossings += 1
        self.domain.clock.step()
        if vector == TRAP_PAGE_FAULT:
            self._page_fault(error_code)
        elif vector == TRAP_GP_FAULT and self.vcpu.in_kernel and emulate_privileged(self):
            pass
        else:
            self.bounce_trap(vector, error_code)
        self._flush()
        self._leave(0)

    def invalid_opcode(self) -> bool:
        """#UD: Xen's forced-emulation cpuid, or the guest's own business."""
        self.nr_crossings += 1
        self.domain.clock.step()
        try:
            code = self.read(self.q[RIP], len(_FORCED_EMULATION_CPUID))
        except GuestFault:
            code = b""
        if code == _FORCED_EMULATION_CPUID:
            self.cpuid()
            self.q[RIP] += len(code)
        else:
            self.bounce_trap(TRAP_INVALID_OP, 0)
        self._leave(0)
        return True

    def cpuid(self) -> None:
        q, context = self.q, self.vcpu.context
        a, b, c, d = self.domain.policy.leaf(
            q[RAX] & 0xFFFFFFFF,
            q[RCX] & 0xFFFFFFFF,
            khz=self.domain.clock.khz,
            osxsave=bool(context.ctrlreg[4] & CR4_OSXSAVE),
        )
        q[RAX], q[RBX], q[RCX], q[RDX] = a, b, c, d

    def rdtsc(self) -> int:
        return self.domain.clock.rdtsc()

    def _page_fault(self, error_code: int) -> None:
        vcpu, address = self.vcpu, self.q[CR2]
        write = error_code & 3 == 3 and vcpu.in_kernel
        if write and self._is_table_write(address) and emulate_table_write(self, address):
            return
        vcpu.info.cr2 = address
        vcpu.context.ctrlreg[2] = address
        # The guest kernel runs at CPL 3 and must not see its own faults as a user's.
        self.bounce_trap(TRAP_PAGE_FAULT, error_code & ~4 if vcpu.in_kernel else error_code | 4)

    def _is_table_write(self, address: int) -> bool:
        if not self.domain.vm_assist & VMASST_WRITABLE_PAGETABLES:
            return False
        maddr = self.tables.walk(self.vcpu.cr3 >> 12, address)
        mfn = maddr >> 12
        return (
            maddr >= 0
            and self.tables.owned(mfn)
            and self.tables.count[mfn] > 0
            and PGT_L1 <= self.tables.ptype[mfn] <= PGT_L4
        )

    # -- frames ---

    def bounce_trap(self, vector: int, error_code: int) -> None:
        """Enter the guest's handler of an exception (pv_inject_event)."""
        entry = self.vcpu.traps.get(vector)
        if entry is None:
            self.domain.crash(
                f"exception {vector} (error code {error_code:#x}) at rip {self.q[RIP]:#x}, "
                "and the guest has no handler for it"
            )
            self.cpu.stop()
            return
        address, flags = entry
        code = error_code if vector in _WITH_ERROR_CODE else None
        self._bounce(address, code, mask=bool(flags & _TI_DISABLE_EVENTS), skip=0)

    def _deliver(self, skip: int) -> bool:
        """Enter the event callback if an event is pending and not masked."""
        vcpu = self.vcpu
        info = vcpu.info
        if not info.evtchn_upcall_pending or info.evtchn_upcall_mask:
            return False
        callback = vcpu.context.event_callback_eip
        if not callback:
            return False
        # An event that comes in the very crossing in which the vCPU blocks has woken it.
        vcpu.blocked = False
        self._bounce(callback, None, mask=True, skip=skip)
        return True

    def _bounce(self, handler: int, error_code: int | None, *, mask: bool, skip: int) -> None:
        """create_bounce_frame: push the interrupted state onto the kernel stack and go there.

        `skip` bytes are added to rip by the emulator after the hook: the frame wants the rip
        behind them, the register the handler before them.
        """
        q, vcpu, cpu = self.q, self.vcpu, self.cpu
        rip, rsp, rflags = (q[RIP] + skip) & M64, q[RSP], cpu.rflags
        cs, ss = q[CS_SEL] & 0xFFFF, q[SS_SEL] & 0xFFFF
        old_mask = vcpu.info.evtchn_upcall_mask & 1
        if vcpu.in_kernel:
            sp, cs = rsp, cs & ~3
        else:
            self.toggle(True)
            sp, cs = vcpu.context.kernel_sp, cs | 3
        frame = [q[RCX], q[R11]]
        if error_code is not None:
            frame.append(error_code)
        flags = rflags & ~_MASKED_ON_FRAME | (0 if old_mask else RFLAGS_IF)
        frame += [rip, cs | old_mask << 32, flags, rsp, ss]
        sp = (sp & ~15) - 8 * len(frame)
        try:
            self.write(sp & M64, struct.pack(f"<{len(frame)}Q", *frame))
        except GuestFault:
            self.domain.crash(f"no kernel stack at {sp & M64:#x} for an exception frame")
            cpu.stop()
            return
        q[RSP] = sp & M64
        cpu.rflags = rflags & ~_CLEARED_FLAGS | RFLAGS_IF | 2
        cpu.set_selectors(FLAT_RING3_CS64, FLAT_RING3_SS64)
        q[RIP] = (handler - skip) & M64
        if mask:
            vcpu.info.evtchn_upcall_mask = 1

    def toggle(self, kernel: bool) -> None:
        """toggle_guest_mode: swap the GS base and the page tables."""
        vcpu, q = self.vcpu, self.q
        if vcpu.in_kernel == kernel:
            return
        context = vcpu.context
        if kernel:
            context.gs_base_user, q[GS_BASE] = q[GS_BASE], context.gs_base_kernel
        else:
            context.gs_base_kernel, q[GS_BASE] = q[GS_BASE], context.gs_base_user
        vcpu.in_kernel = kernel
        self.cpu.load_cr3(vcpu.cr3)

    def _user_syscall(self) -> None:
        """A system call of the guest's user space: what the CPU would do, then the callback."""
        q, vcpu = self.q, self.vcpu
        q[RCX] = (q[RIP] + _SYSCALL_BYTES) & M64
        q[R11] = self.cpu.rflags
        mask = bool(vcpu.context.flags & 16)  # VGCF_syscall_disables_events
        self._bounce(vcpu.context.syscall_callback_eip, None, mask=mask, skip=_SYSCALL_BYTES)

    def _iret(self) -> None:
        """HYPERVISOR_iret: the frame the guest's stub left on its stack."""
        q, vcpu, cpu = self.q, self.vcpu, self.cpu
        try:
            rax, r11, rcx, flags, rip, cs, rflags, rsp, ss = struct.unpack(
                "<9Q", self.read(q[RSP], 72)
            )
        except GuestFault:
            self.domain.crash(f"no iret frame at {q[RSP]:#x}")
            cpu.stop()
            return
        if cs & 3 == 3:
            if not vcpu.context.ctrlreg[1]:
                self.domain.crash("iret to user space without a user page table")
                cpu.stop()
                return
            self.toggle(False)
        vcpu.info.evtchn_upcall_mask = 0 if rflags & RFLAGS_IF else 1
        cpu.rflags = rflags & RFLAGS_LIVE | RFLAGS_IF | 2
        cpu.set_selectors(cs & 0xFFFF | 3, ss & 0xFFFF | 3)
        q[RAX], q[RSP] = rax, rsp
        if not flags & _VGCF_IN_SYSCALL:
            q[R11], q[RCX] = r11, rcx
        q[RIP] = (rip - _SYSCALL_BYTES) & M64
