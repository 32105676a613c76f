"""The crossings: hypercalls, exceptions and events between one domain and its emulated CPU.

Everything is delivered inside the emulator's hooks: after each hypercall, iret or trap the due
timers are raised and, if the guest has events unmasked, the upcall frame is built on the spot.
`run()` returns when the guest blocks, the time slice ends or `kick()` was called; the domain
process then decides what is next. Mirrors xen/arch/x86/pv/{hypercall,traps,iret}.c.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator

from xsave.frames import PAGE_SIZE
from xsave.guest.xen.context import RFLAGS_IF, RFLAGS_LIVE, Vcpu
from xsave.guest.xen.cpuregs import (
    CR2,
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
)
from xsave.guest.xen.domain import HYPERVISOR_VIRT_START, Domain
from xsave.guest.xen.fastpath import KICKED, NEVER, NR_CROSSINGS, Fastpath, library
from xsave.guest.xen.guestcpu import M64, GuestCpu
from xsave.guest.xen.guestmem import GuestFault
from xsave.guest.xen.pagetypes import PGT_L1
from xsave.guest.xen.privop import emulate_privileged, emulate_rdtsc, fetch
from xsave.guest.xen.ptwr import emulate_table_write
from xsave.guest.xen.vcpu import CR4_OSXSAVE, FLAT_RING3_SS64, Cpu
from xsave.public import VGCF_SYSCALL_DISABLES_EVENTS

TRAP_DEBUG = 1
TRAP_INVALID_OP, TRAP_GP_FAULT, TRAP_PAGE_FAULT = 6, 13, 14
_WITH_ERROR_CODE = {8, 10, 11, 12, 13, 14, 17}
_OPEN_GATES = {3, 4}  # int3 and into: Xen's own gates are open to all
_INT_BYTES = 2
_TI_DISABLE_EVENTS = 4
_HYPERVISOR_IRET = 23
_VGCF_IN_SYSCALL = 0x100
_FORCED_EMULATION_CPUID = b"\x0f\x0bxen\x0f\xa2"
VMASST_WRITABLE_PAGETABLES = 1 << 2
_SYSCALL_BYTES = 2
_TWO_BYTE_OPCODE, _MAX_INSTRUCTION_BYTES = b"\x0f", 15
_FLAT_RING3_CS32, _NULL_RING3 = 0xE023, 3
_RFLAGS_TF = 1 << 8
_DR6_DEFAULT, _DR6_SINGLE_STEP = 0xFFFF0FF0, 1 << 14

#: A guest in virtual time is preempted by what it does, as real time must not matter to it.
_VIRTUAL_PREEMPTION = 4096

Hypercall = Callable[["Hypervisor", Vcpu, int, int, int, int, int], int]
_ARGUMENTS = (RDI, RSI, RDX, R10, R8)


class Hypervisor(GuestCpu):
    """Xen, as one domain meets it. It can run once it is powered on."""

    def __init__(self, domain: Domain, table: dict[int, Hypercall]) -> None:
        super().__init__(domain)
        self.table = table
        tables = domain.tables
        self.fastpath = Fastpath(domain.machine, domain.domid, tables.unflushed_flag, self.leave)
        self._shared = self.fastpath.words
        #: The arguments with which an interrupted hypercall is to be called again.
        self.continuation: tuple[int, ...] | None = None
        self._nr_steps = 0
        #: End a run as soon as it woke another vCPU: who sent an IPI often spins for the answer.
        self.hands_over = False
        #: An iret set TF: the emulator raises #DB for that syscall instruction, too early.
        self._begins_step = False
        self._nr_crossings = 0

    @property
    def kicked(self) -> bool:
        """True if run() is to return at the next crossing."""
        return bool(self._shared[KICKED])

    @kicked.setter
    def kicked(self, wanted: bool) -> None:
        self._shared[KICKED] = wanted

    @property
    def nr_crossings(self) -> int:
        """How often the guest crossed into the hypervisor."""
        return self._nr_crossings + self._shared[NR_CROSSINGS]

    def power_on(self) -> None:
        """Make the emulated CPU, with vCPU 0 on it."""
        self.start_cpu(self.make_cpu())

    def make_cpu(self) -> Cpu:
        """Return an emulated CPU whose crossings come here, with nothing on it yet."""
        domain = self.domain
        virtual = domain.clock.virtual
        fastpath = None if virtual or library() is None else self.fastpath
        return Cpu(domain.machine, domain.scratch_mfn, self, fastpath, fixed_tlb=virtual)

    def kick(self) -> None:
        """Make run() return at the next crossing."""
        self.kicked = True

    def interrupt(self) -> None:
        """Make run() return, from another thread, although the guest does not cross; to be called
        every few milliseconds until it has."""
        if self.powered:
            self.cpu.interrupt(self._code_pages())

    def cut_off(self) -> None:
        """From another thread, for good: no hypercall does anything any more, and the guest stops
        at its next crossing."""
        self.table = {}
        self.kick()

    def _code_pages(self) -> Iterator[int]:
        """Machine addresses of what the guest executes: rip's page and the one behind it."""
        rip = self.cpu.linear_rip
        for address in (rip, rip + PAGE_SIZE):
            page = self.tables.walk(self.vcpu.cr3 >> 12, address & -PAGE_SIZE & M64)
            if page >= 0:
                yield page

    def run(self, count: int = 0) -> None:
        """Run the guest until it blocks, shuts down, is kicked, or `count` instructions passed."""
        self.kicked = False
        self._nr_steps = 0
        self._deliver(0)
        if self.fastpath.active:
            self.fastpath.begin(len(self.domain.vcpus), self.domain.clock)
            self._open_fastpath()
        if not self.kicked and self.domain.shutdown_reason is None:
            self.cpu.run(count)

    def _open_fastpath(self) -> None:
        """Before the guest goes on: let the library know what is to be known."""
        fastpath = self.fastpath
        if self._begins_step or not self.tables.idle:
            fastpath.close()
            return
        deadline = NEVER
        for vcpu in self.domain.vcpus:
            timer_ns = vcpu.timer_ns
            if timer_ns is not None and timer_ns < deadline:
                deadline = timer_ns
        if deadline != NEVER:
            deadline = min(max(deadline - self.domain.clock.offset_ns, 0), NEVER)
        vcpu = self.vcpu
        fastpath.see(
            vcpu.context, vcpu.info, vcpu.timer, in_kernel=vcpu.in_kernel, deadline=deadline
        )

    # -- crossings ---

    def syscall(self) -> None:
        """A `syscall` instruction: a hypercall, or the guest's user space calling its kernel."""
        self._nr_crossings += 1
        self.domain.clock.step()
        q, skip = self.q, _SYSCALL_BYTES
        if not self.vcpu.in_kernel:
            skip = self._instruction_bytes()
            self._user_syscall(skip)
        elif q[RAX] & 0xFFFFFFFF == _HYPERVISOR_IRET:
            self._iret()
        else:
            result = self.call(q[RAX], q[RDI], q[RSI], q[RDX], q[R10], q[R8])
            if self.continuation is None:
                q[RAX] = result & M64
            else:
                self._call_again(self.continuation)
            self._flush()
        self.leave(skip)

    def _instruction_bytes(self) -> int:
        """The length of the syscall or sysenter at rip: user space may put prefixes before it."""
        rip = self.cpu.linear_rip
        for nr in range(_MAX_INSTRUCTION_BYTES - 1):
            if self.read((rip + nr) & M64, 1) == _TWO_BYTE_OPCODE:
                return nr + _SYSCALL_BYTES
        return _SYSCALL_BYTES

    def sysenter(self) -> None:
        """User space, 32-bit, calls its kernel; where it goes on only its kernel knows. The kernel
        itself has no use for the instruction."""
        self._nr_crossings += 1
        self.domain.clock.step()
        vcpu, extended = self.vcpu, self.vcpu.extended
        address, skip = extended.sysenter_callback_eip, self._instruction_bytes()
        if vcpu.in_kernel or not address:
            self.bounce_trap(TRAP_GP_FAULT, 0, skip=skip)
        else:
            self.q[RIP], self.q[RSP] = -skip & M64, 0
            self.cpu.set_selectors(_NULL_RING3, FLAT_RING3_SS64)
            mask = bool(extended.sysenter_disables_events & 1)
            self.bounce(address, None, mask=mask, skip=skip)
        self.leave(skip)

    def call(self, nr: int, *args: int) -> int:
        """Dispatch one hypercall; also used by multicall."""
        handler = self.table.get(nr & 0xFFFFFFFF)
        if handler is None:
            return -38  # ENOSYS
        try:
            return handler(self, self.vcpu, *args)
        except GuestFault as fault:
            return fault.rc

    def preempted(self) -> bool:
        """hypercall_preempt_check(): True if somebody waits for this vCPU to leave a hypercall
        of many steps; to be asked between two of them."""
        self._nr_steps += 1
        if self.domain.clock.virtual and self._nr_steps % _VIRTUAL_PREEMPTION == 0:
            self.kicked = True
        return self.kicked

    def continue_with(self, *arguments: int) -> int:
        """hypercall_create_continuation(): what this hypercall returns when it was preempted.

        The guest will call it again with these arguments as soon as it runs, and see nothing."""
        self.continuation = tuple(argument & M64 for argument in arguments)
        return 0

    def _call_again(self, arguments: tuple[int, ...]) -> None:
        """Leave the guest at its `syscall` instruction."""
        q = self.q
        for index, argument in zip(_ARGUMENTS, arguments, strict=False):
            q[index] = argument
        q[RIP] = (q[RIP] - _SYSCALL_BYTES) & M64
        self.continuation = None

    def _flush(self) -> None:
        """Before the guest goes on: what must be gone from the TLB."""
        tables = self.tables
        if tables.stale_tlb:
            self.cpu.load_cr3(self.vcpu.cr3)
            tables.stale_tlb = tables.unflushed = False
            tables.stale_pages.clear()
        elif tables.stale_pages:
            for address in tables.stale_pages:
                self.cpu.flush_page(address)
            tables.stale_pages.clear()

    def leave(self, skip: int) -> None:
        """Before the guest goes on: due timers, then a pending upcall, then whoever waits."""
        domain = self.domain
        now = domain.clock.now()
        for vcpu in domain.vcpus:
            if vcpu.timer_ns is not None and vcpu.timer_ns <= now:
                domain.run_timers(now)
        if self._deliver(skip):
            self._begins_step = False
        over = self.kicked or domain.shutdown_reason is not None or now >= domain.clock.horizon_ns
        if over or (self.hands_over and self._woke_another()):
            self.cpu.stop()
        if self.fastpath.active:
            self._open_fastpath()

    def _woke_another(self) -> bool:
        domain = self.domain
        return any(vcpu.blocked and vcpu.online and domain.wakes(vcpu) for vcpu in domain.vcpus)

    def exception(self, vector: int, error_code: int) -> None:
        """A fault or trap in the guest."""
        if vector == TRAP_GP_FAULT:
            code = fetch(self)
            if emulate_rdtsc(self, code, self.rdtsc):
                return
        if vector == TRAP_DEBUG and self._begins_step:
            self._begins_step = False
            return
        self._nr_crossings += 1
        self.domain.clock.step()
        if vector == TRAP_PAGE_FAULT:
            self._page_fault(error_code)
        elif vector == TRAP_GP_FAULT and self.vcpu.in_kernel and emulate_privileged(self, code):
            pass
        elif vector == TRAP_DEBUG:
            self.vcpu.context.debugreg[6] = _DR6_DEFAULT | _DR6_SINGLE_STEP
            self.bounce_trap(vector, None)
        else:
            self.bounce_trap(vector, error_code)
        self._flush()
        self.leave(0)

    def software_interrupt(self, vector: int) -> None:
        """An `int` instruction: user space may use the gates its kernel opened to ring 3 only,
        or it could feign any exception (do_general_protection, permit_softint)."""
        self._nr_crossings += 1
        self.domain.clock.step()
        address, flags = self.vcpu.traps.get(vector, (0, 0))
        if vector in _OPEN_GATES or (address and (self.vcpu.in_kernel or flags & 3 == 3)):
            self.bounce_trap(vector, None)
        else:
            self.q[RIP] = (self.q[RIP] - _INT_BYTES) & M64
            self.bounce_trap(TRAP_GP_FAULT, vector << 3 | 2)
        self.leave(0)

    def invalid_opcode(self) -> bool:
        """#UD: Xen's forced-emulation cpuid, or the guest's own business."""
        self._nr_crossings += 1
        self.domain.clock.step()
        try:
            code = self.read(self.q[RIP], len(_FORCED_EMULATION_CPUID))
        except GuestFault:
            code = b""
        if code == _FORCED_EMULATION_CPUID:
            self.cpuid()
            self.q[RIP] += len(code)
        else:
            self.bounce_trap(TRAP_INVALID_OP, None)
        self.leave(0)
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
        if address >= HYPERVISOR_VIRT_START and address >> 47 == 0x1FFFF:
            there = self.domain.ldts.fault(vcpu, address)
            if there == 0:
                return
            address = there or address
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
            and self.tables.ptype[mfn] == PGT_L1  # the other levels only by hypercall
        )

    # -- frames ---

    def bounce_trap(self, vector: int, error_code: int | None, skip: int = 0) -> None:
        """Enter the guest's handler of an exception (pv_inject_event). skip: what the emulator
        adds to rip after the hook; the frame names the instruction all the same."""
        entry = self.vcpu.traps.get(vector)
        if entry is None:
            self.domain.crash(
                f"exception {vector} (error code {error_code or 0:#x}) at rip {self.q[RIP]:#x}, "
                "and the guest has no handler for it"
            )
            self.cpu.stop()
            return
        address, flags = entry
        code = error_code if vector in _WITH_ERROR_CODE else None
        self.q[RIP] = (self.q[RIP] - skip) & M64
        self.bounce(address, code, mask=bool(flags & _TI_DISABLE_EVENTS), skip=skip)

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
        self.bounce(callback, None, mask=True, skip=skip)
        return True

    def _user_syscall(self, skip: int) -> None:
        """A system call of the guest's user space: what the CPU would do, then the callback."""
        q, context, extended = self.q, self.vcpu.context, self.vcpu.extended
        q[RCX] = (q[RIP] + skip) & M64
        q[R11] = self.cpu.rflags
        address = context.syscall_callback_eip
        mask = bool(context.flags & VGCF_SYSCALL_DISABLES_EVENTS)
        if self.cpu.compat and extended.syscall32_callback_eip:
            address = extended.syscall32_callback_eip
            mask = bool(extended.syscall32_disables_events & 1)
            self.cpu.set_selectors(_FLAT_RING3_CS32, FLAT_RING3_SS64)
        self.bounce(address, None, mask=mask, skip=skip)

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
        self._begins_step = bool(rflags & _RFLAGS_TF)
        vcpu.info.evtchn_upcall_mask = 0 if rflags & RFLAGS_IF else 1
        cpu.rflags = rflags & RFLAGS_LIVE | RFLAGS_IF | 2
        compat = cs & 3 == 3 and self.is_compat(cs & 0xFFFF)
        cpu.set_selectors(cs & 0xFFFF | 3, ss & 0xFFFF | 3, compat=compat)
        if compat:
            cpu.set_compat_segments(self.descriptor(cs & 0xFFFF), self.descriptor(ss & 0xFFFF))
        q[RAX], q[RSP] = rax, rsp
        if not flags & _VGCF_IN_SYSCALL:
            q[R11], q[RCX] = r11, rcx
        q[RIP] = (rip - _SYSCALL_BYTES) & M64
