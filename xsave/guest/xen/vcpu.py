"""The CPU that guests run on: Unicorn at CPL 3 over machine memory. The only importer of unicorn.

The emulator's physical memory is the machine's memory, so cr3 and page-table entries hold real
mfns and the emulator's own MMU walks them, sets A/D bits and faults. The guest kernel runs at
CPL 3 as under Xen; `syscall` is the door to the hypercalls, every other crossing is an exception.
This module knows instructions and registers, not hypercalls: it calls the methods of the `handler`
it is given (syscall, sysenter, exception, software_interrupt, invalid_opcode, cpuid, read).

Facts that cost hours, and where they show here:
* cs/ss/cpl are set once by a sysretq at CPL 0 (`_enter_cpl3`); later selector writes change the
  visible selector only. That code is 64-bit is one flag (`compat`): all else of compatibility mode,
  flat segments and their 32 bits, is there in 64-bit mode already;
* a syscall or sysenter hook returns to rip + 2, an exception hook to the rip it left (`resume_at`);
* of the instruction hooks only the first one, syscall, is called for sure: the emulator leaves the
  list as soon as a stop is wanted, also by another thread. A lost rdtsc hook would show the guest
  the host's TSC now and then: cr4.TSD makes the instruction fault instead, as Xen can do too;
* port I/O never faults, whatever the privileges: reads are answered, all ones as no device does,
  but for the timer chip's counter 2, which stands still at 0: Linux calibrates its clock by that,
  and waits for all ones to change with 50,000 reads of the TSC;
* `emu_start(until)` with an unmapped address leaves a hidden fault behind: 0 is used;
* what is translated for counted runs is another code than for free ones: a change drops all of it;
* stores by the host into code are not noticed: `forget_code` (ctl_remove_cache takes virtual
  addresses of the moment, so it cannot be used for a frame).
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from unicorn import (
    UC_ARCH_X86,
    UC_HOOK_CODE,
    UC_HOOK_EDGE_GENERATED,
    UC_HOOK_INSN,
    UC_HOOK_INSN_INVALID,
    UC_HOOK_INTR,
    UC_MODE_64,
    UC_PROT_ALL,
    Uc,
    UcError,
)
from unicorn import x86_const as x86
from unicorn.unicorn_const import UC_CTL_IO_WRITE, UC_CTL_TLB_FLUSH
from unicorn.unicorn_py3.unicorn import uclib

from xsave.guest.xen import cpuregs
from xsave.guest.xen.cpufeatures import CpuFeatures
from xsave.guest.xen.cpuid import CpuPolicy
from xsave.guest.xen.fastpath import ExceptionHook, Fastpath, SyscallHook
from xsave.guest.xen.guestmem import GuestFault
from xsave.guest.xen.machine import Machine
from xsave.guest.xen.stops import Stops
from xsave.guest.xen.tlb import Tlb
from xsave.guest.xen.vextrap import USER_END, VexTrap

FLAT_RING3_CS64 = 0xE033
FLAT_RING3_SS64 = 0xE02B

_MSR_EFER, _MSR_STAR = 0xC0000080, 0xC0000081
_CR0 = 0x80050033  # PG AM WP NE ET MP PE
_CR4_ALWAYS = 0x4 | 0x20 | 0x80 | 0x200 | 0x400  # TSD PAE PGE OSFXSR OSXMMEXCPT
CR4_FSGSBASE = 1 << 16
CR4_OSXSAVE = 1 << 18
_SIGNATURE = [0xA5C3_0000_1111_0000 + i * 0x01010101 for i in range(8)]
_GPR8 = (
    x86.UC_X86_REG_RAX, x86.UC_X86_REG_RCX, x86.UC_X86_REG_RDX, x86.UC_X86_REG_RBX,
    x86.UC_X86_REG_RSP, x86.UC_X86_REG_RBP, x86.UC_X86_REG_RSI, x86.UC_X86_REG_RDI,
)  # fmt: skip


DESCRIPTOR_32_BITS = 1 << 54
_LONG_MODE = cpuregs.HFLAG_CODE64 | cpuregs.HFLAG_CODE32 | cpuregs.HFLAG_STACK32
#: The timer chip's counter 2.
_TIMER_2 = 0x42


def _direct_calls() -> ctypes.PyDLL:
    """Calls too short to be worth giving the GIL away for, and some that no API leads to."""
    library = ctypes.PyDLL(uclib._name)
    try:
        for name, *arguments in (
            ("tlb_flush_x86_64", ctypes.c_void_p),
            ("tlb_flush_page_x86_64", ctypes.c_void_p, ctypes.c_uint64),
            ("uc_reg_read", ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p),
            ("uc_reg_write", ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p),
        ):
            function = getattr(library, name)
            function.argtypes, function.restype = arguments, None
    except AttributeError as e:
        raise cpuregs.UnsupportedEmulator(f"this unicorn has no {e} (2.1.4 is known)") from e
    return library


_direct = _direct_calls()


def segment_base(descriptor: int) -> int:
    """Return where the segment of a descriptor of 8 bytes begins."""
    return descriptor >> 16 & 0xFFFFFF | descriptor >> 32 & 0xFF000000


class Handler(Protocol):
    """What the hypervisor does at each crossing. Registers are in `cpu.q`."""

    def syscall(self) -> None: ...
    def sysenter(self) -> None: ...
    def exception(self, vector: int, error_code: int) -> None: ...
    def software_interrupt(self, vector: int) -> None: ...
    def invalid_opcode(self) -> bool: ...
    def cpuid(self) -> None: ...
    def read(self, address: int, nr: int) -> bytes: ...


class EmulatorFault(Exception):
    """The emulator itself stopped (an access outside machine memory, a triple fault)."""


class Cpu:
    """One emulated processor. `q` is a live view of its registers (indices in cpuregs)."""

    def __init__(
        self,
        machine: Machine,
        scratch_mfn: int,
        handler: Handler,
        fastpath: Fastpath | None = None,
        *,
        fixed_tlb: bool = False,
    ) -> None:
        """fastpath: it answers some crossings before the handler. fixed_tlb: the host's clock has
        no part in the size of the TLB (see tlb.py)."""
        self.machine = machine
        self._scratch = scratch_mfn << 12
        self._uc = Uc(UC_ARCH_X86, UC_MODE_64)
        address = ctypes.addressof(ctypes.c_char.from_buffer(machine.map))
        self._uc.mem_map_ptr(0, len(machine.map), UC_PROT_ALL, address)
        self._handle = self._uc._uch
        self._cpu, state = self._locate()
        self.state = cpuregs.CpuState(state)
        self.q = self.state.q
        self._features = CpuFeatures(self.q)
        self._tlb = Tlb(state, fixed=fixed_tlb)
        self._word = ctypes.c_uint64(0)
        self._word_ref = ctypes.byref(self._word)
        context_bytes = uclib.uc_context_size(self._handle)
        run = Uc.emu_start.__code__
        self._stops = Stops(_direct, self._handle.value or 0, self._cpu, context_bytes, run)
        self._counted = False
        self._watches = 0
        self._reset = self._uc.context_save()  # CPL 0, paging off: where every vCPU starts
        self._bringing_up = True
        self.handler = handler
        self._stopping = False
        self._trouble: BaseException | None = None
        self._hook(handler, fastpath)
        self._vex = VexTrap(handler.read, GuestFault, lambda: self.compat, self._stops.stop_before)
        self._policy: CpuPolicy | None = None

    def promise(self, policy: CpuPolicy) -> None:
        """Be the CPU of a guest with this policy from the next power_on() on: with no instructions
        but those. Of one CPU all guests have the same policy."""
        if self._policy is None:
            # Where nobody was promised AVX only programs are looked at.
            first, last = (1, 0) if policy.promises_avx() else (0, USER_END)
            uclib.uc_hook_add(
                self._handle, ctypes.byref(ctypes.c_size_t()), UC_HOOK_EDGE_GENERATED,
                self._vex.look, None, ctypes.c_uint64(first), ctypes.c_uint64(last),
            )  # fmt: skip
        self._policy = policy

    def _locate(self) -> tuple[int, int]:
        saved = [self._uc.reg_read(r) for r in _GPR8]
        for register, value in zip(_GPR8, _SIGNATURE, strict=True):
            self._uc.reg_write(register, value)
        try:
            return cpuregs.locate(self._handle.value, struct.pack("<8Q", *_SIGNATURE))
        finally:
            for register, value in zip(_GPR8, saved, strict=True):
                self._uc.reg_write(register, value)

    def _hook(self, handler: Handler, fastpath: Fastpath | None) -> None:
        uc, state = self._uc, self.state

        def on_syscall(_engine: int, _data: int) -> None:
            try:
                handler.syscall()
            except BaseException as e:  # noqa: BLE001 - run() raises it
                self._fail(e)

        def on_exception(_engine: int, vector: int, _data: int) -> None:
            error_code, software = state.take_exception()
            try:
                if self._bringing_up:  # CPL 0 and no paging yet: nothing of the guest's may run
                    raise EmulatorFault(f"exception {vector} while the vCPU's state was loaded")
                if software:
                    handler.software_interrupt(vector)
                else:
                    handler.exception(vector, error_code)
            except BaseException as e:  # noqa: BLE001 - run() raises it
                self._fail(e)

        def on_invalid(_uc: Uc, _data: object) -> bool:
            state.take_exception()
            if self._bringing_up:
                raise EmulatorFault("invalid opcode while the vCPU's state was loaded")
            return handler.invalid_opcode()

        def on_cpuid(_uc: Uc, _data: object) -> int:
            handler.cpuid()
            return 1

        def on_in(_uc: Uc, port: int, size: int, _data: object) -> int:
            return 0 if port == _TIMER_2 else (1 << 8 * size) - 1

        slow = SyscallHook(on_syscall), ExceptionHook(on_exception)
        hooks: tuple[Any, Any, int] = *slow, 0
        if fastpath is not None:
            functions = _direct.tlb_flush_x86_64, _direct.uc_reg_read, _direct.uc_reg_write
            hooks = fastpath.connect(
                state.address, *state.exception_addresses(), self._cpu, self._tlb.address,
                self._stops.block_cache, functions, slow, self._fail,
            )  # fmt: skip
        self._hooks = slow  # they must live as long as the engine
        self._add_hook(UC_HOOK_INSN, hooks[0], hooks[2], x86.UC_X86_INS_SYSCALL)
        self._add_hook(UC_HOOK_INTR, hooks[1], hooks[2])
        uc.hook_add(UC_HOOK_INSN_INVALID, on_invalid)
        uc.hook_add(
            UC_HOOK_INSN, lambda _uc, _d: handler.sysenter(), None, 1, 0, x86.UC_X86_INS_SYSENTER
        )
        uc.hook_add(UC_HOOK_INSN, on_cpuid, None, 1, 0, x86.UC_X86_INS_CPUID)
        uc.hook_add(UC_HOOK_INSN, on_in, None, 1, 0, x86.UC_X86_INS_IN)

    def _add_hook(self, kind: int, function: Any, data: int, *which: int) -> None:
        """Have a function called without the binding between: it costs as much as a handler."""
        uclib.uc_hook_add(
            self._handle, ctypes.byref(ctypes.c_size_t()), kind,
            ctypes.cast(function, ctypes.c_void_p), ctypes.c_void_p(data),
            ctypes.c_uint64(1), ctypes.c_uint64(0), *map(ctypes.c_int, which),
        )  # fmt: skip

    def _fail(self, trouble: BaseException) -> None:
        """In a hook: end the run, and have it raise this."""
        self._trouble = self._trouble or trouble
        self._stops.stop()

    # -- bring-up ---

    def power_on(self, cr3: int, cr4: int, xcr0: int, fpu: bytes, gdt_base: int) -> None:
        """Load the FPU image at CPL 0, drop to CPL 3 and turn paging on.

        fpu: a 512-byte FXSAVE area when xcr0 is 0, else an uncompressed XSAVE area. Raises
        EmulatorFault if the CPU refuses it.
        """
        uc = self._uc
        self._bringing_up = True
        self._features.have_all()
        self._vex.watching = False
        self._keep_tlb_size()
        uc.context_restore(self._reset)
        uc.ctl(UC_CTL_TLB_FLUSH, UC_CTL_IO_WRITE)  # a cr3 write flushes with paging on only
        uc.reg_write(x86.UC_X86_REG_CR4, uc.reg_read(x86.UC_X86_REG_CR4) | _CR4_ALWAYS | cr4)
        if xcr0:
            self._run_stub(b"\x0f\x01\xd1", rax=xcr0)  # xsetbv
        self._load_fpu(fpu, xcr0)
        self._enter_cpl3()
        uc.reg_write(x86.UC_X86_REG_CR3, cr3)
        uc.reg_write(x86.UC_X86_REG_CR0, _CR0)
        uc.reg_write(x86.UC_X86_REG_GDTR, (0, gdt_base, 0xFFFF, 0))
        assert self._policy is not None
        self._features.have_promised(self._policy, xsave=bool(xcr0))
        self._bringing_up, self._vex.watching = False, True

    def park(self, state: Any) -> Any:
        """Return the whole CPU state; `state` is an older one to reuse, or None. Only good in
        this process: what goes into an image are the registers by name."""
        if state is None:
            return self._uc.context_save()
        self._uc.context_update(state)
        return state

    def unpark(self, state: Any, cr3: int) -> None:
        """Load a parked CPU state; the cr3 write is the TLB flush that must come with it."""
        self._uc.context_restore(state)
        self.load_cr3(cr3)

    def _run_stub(self, code: bytes, **registers: int) -> None:
        base = self._scratch
        self.machine.map[base : base + len(code)] = code
        for register in ("rax", "rcx", "rdx", "rdi"):
            value = registers.get(register, 0)
            self._uc.reg_write(getattr(x86, "UC_X86_REG_" + register.upper()), value)
        self._forget_code(counted=False)
        self._emulate(base, base + len(code))

    def _load_fpu(self, area: bytes, xcr0: int) -> None:
        base = self._scratch + 0x400
        area = area[:0x800]
        self.machine.map[base : base + len(area)] = area
        # xrstor64 [rdi] or fxrstor64 [rdi]
        self._run_stub(b"\x48\x0f\xae\x2f" if xcr0 else b"\x48\x0f\xae\x0f", rdi=base, rax=xcr0)

    def _enter_cpl3(self) -> None:
        uc, base = self._uc, self._scratch
        uc.msr_write(_MSR_EFER, uc.msr_read(_MSR_EFER) | 1 | 1 << 11 | 1 << 8)  # SCE NXE LME
        uc.msr_write(_MSR_STAR, (0xE023 << 48) | (0xE008 << 32))
        self.machine.map[base : base + 4] = b"\x48\x0f\x07\x90"  # sysretq; nop
        uc.reg_write(x86.UC_X86_REG_RCX, base + 3)
        uc.reg_write(x86.UC_X86_REG_R11, 0x202)
        uc.ctl_flush_tb()
        self._emulate(base, base + 3)
        if uc.reg_read(x86.UC_X86_REG_CS) != FLAT_RING3_CS64 or self.compat:
            raise EmulatorFault("the emulator did not reach CPL 3")

    # -- running ---

    def run(self, count: int = 0) -> None:
        """Run from the current rip until stop(); count > 0: exactly that many instructions, fewer
        only if one of them is VEX-coded."""
        self._stopping = False
        while True:
            self._start(count)
            if self._vex.found is None:
                return
            self._trap_vex()
            if count or self._stopping:
                return

    def _start(self, count: int) -> None:
        if bool(count) != self._counted:
            self._forget_code(counted=bool(count))
        self._stops.begin(looking=self._counted or bool(self._watches))
        self._emulate(self.q[cpuregs.RIP], 0, count)

    def _emulate(self, begin: int, until: int, count: int = 0) -> None:
        """Raises EmulatorFault, and what a hook raised."""
        try:
            self._uc.emu_start(begin, until, 0, count)
        except UcError as e:
            raise EmulatorFault(str(e)) from e
        finally:
            trouble, self._trouble = self._trouble, None
        if trouble is not None:
            raise trouble

    def _trap_vex(self) -> None:
        """Before a block with a VEX-coded instruction: come to that, and raise #UD there, unless
        what comes before it has led elsewhere."""
        vex = self._vex
        found, vex.found = vex.found, None
        if found is None:
            return
        block, nr_before, address = found
        if nr_before and self.linear_rip == block:
            self._forget_code(counted=True)  # the block is barred
            vex.watching = False
            self._start(nr_before)
            vex.watching = True
        self._forget_code(counted=self._counted)  # of which the block was a part each time
        if self.linear_rip == address:
            self.handler.invalid_opcode()

    def _forget_code(self, *, counted: bool) -> None:
        """Drop all translations, and translate for counted runs, or for free ones, from now on.

        A free run may be stopped between two blocks only (see stops.py); a count, and a hook on
        single instructions, end a run in the middle of a block, where it must then be looked."""
        self._counted = counted
        self._uc.ctl_flush_tb()

    def stop(self) -> None:
        """End run() at this crossing, from a hook."""
        self._stopping = True
        self._stops.stop()

    def interrupt(self, pages: Iterable[int]) -> None:
        """End run() from another thread, before the next instruction of some block or other; to be
        called every few milliseconds until it has ended. pages: machine addresses of the page that
        rip is in and of the one behind it."""
        self._stopping = True
        self._stops.interrupt(pages)

    def watch(self, first: int, last: int, see: Callable[[int], None]) -> Callable[[], None]:
        """Have `see` called with rip before each instruction in [first, last]; stop() in it ends
        the run before that instruction. Returns what ends the watch."""
        handle = self._uc.hook_add(
            UC_HOOK_CODE, lambda _uc, rip, _size, _data: see(rip), None, first, last
        )
        self._watches += 1
        self._forget_code(counted=self._counted)

        def end() -> None:
            self._uc.hook_del(handle)
            self._watches -= 1
            self._forget_code(counted=self._counted)

        return end

    # -- what has no place in the direct view ---

    @property
    def rflags(self) -> int:
        _direct.uc_reg_read(self._handle, x86.UC_X86_REG_RFLAGS, self._word_ref)
        return self._word.value

    @rflags.setter
    def rflags(self, value: int) -> None:
        self._word.value = value
        _direct.uc_reg_write(self._handle, x86.UC_X86_REG_RFLAGS, self._word_ref)

    def _keep_tlb_size(self) -> None:
        """Before every flush."""
        if self._tlb.fixed:
            self._tlb.hold()

    def load_cr3(self, value: int) -> None:
        """Switch address space and forget all translations. Paging must be on."""
        self.q[cpuregs.CR3] = value
        self._keep_tlb_size()
        _direct.tlb_flush_x86_64(self._cpu)

    def flush_page(self, address: int) -> None:
        """Forget the translations of one page: invlpg. (All of them, if there is a large one.)"""
        self._keep_tlb_size()
        _direct.tlb_flush_page_x86_64(self._cpu, address)

    @property
    def compat(self) -> bool:
        """True in compatibility mode: 32-bit code of user space."""
        return not self.state.d[cpuregs.HFLAGS] & cpuregs.HFLAG_CODE64

    def set_selectors(self, cs: int, ss: int, *, compat: bool = False) -> None:
        """Set what cs and ss read as, and which code runs from here on (seen at the next block)."""
        q, d = self.q, self.state.d
        if compat:
            d[cpuregs.HFLAGS] &= ~cpuregs.HFLAG_CODE64
        else:
            d[cpuregs.HFLAGS] |= _LONG_MODE
            q[cpuregs.CS_BASE] = 0
        q[cpuregs.CS_SEL] = (q[cpuregs.CS_SEL] & ~0xFFFF) | cs
        q[cpuregs.SS_SEL] = (q[cpuregs.SS_SEL] & ~0xFFFF) | ss

    def set_compat_segments(self, cs: int, ss: int) -> None:
        """Go on in these descriptors' segments (set_selectors has said by which selectors): the
        emulator has looked at neither, nor at where its data segments begin."""
        q = self.q
        q[cpuregs.CS_BASE], q[cpuregs.SS_BASE] = segment_base(cs), segment_base(ss)
        flags = self.state.d[cpuregs.HFLAGS] & ~(_LONG_MODE | cpuregs.HFLAG_ADD_BASES)
        if cs & DESCRIPTOR_32_BITS:
            flags |= cpuregs.HFLAG_CODE32
        if ss & DESCRIPTOR_32_BITS:
            flags |= cpuregs.HFLAG_STACK32
        if q[cpuregs.DS_BASE] | q[cpuregs.ES_BASE] | q[cpuregs.SS_BASE]:
            flags |= cpuregs.HFLAG_ADD_BASES
        self.state.d[cpuregs.HFLAGS] = flags

    @property
    def linear_rip(self) -> int:
        """The address of the next instruction, wherever its segment begins."""
        q = self.q
        return q[cpuregs.RIP] + q[cpuregs.CS_BASE] & 0xFFFFFFFF if self.compat else q[cpuregs.RIP]

    def selector(self, index: int) -> int:
        return self.q[index] & 0xFFFF

    def load_gdt(self, base: int) -> None:
        self._uc.reg_write(x86.UC_X86_REG_GDTR, (0, base, 0xFFFF, 0))

    def load_ldt(self, base: int, entries: int) -> None:
        self._uc.reg_write(x86.UC_X86_REG_LDTR, (0, base, max(8 * entries - 1, 0), 0))

    def load_segment(self, name: str, selector: int) -> None:
        """Set a data segment's visible selector, as loaded from a descriptor that any code may use
        (its base is never used in 64-bit mode)."""
        index = {"es": cpuregs.ES_SEL, "ds": cpuregs.DS_SEL, "fs": cpuregs.FS_SEL,
                 "gs": cpuregs.GS_SEL}[name]  # fmt: skip
        self.q[index] = (self.q[index] & ~0xFFFF) | selector
        self.q[index + cpuregs.LIMIT_AND_FLAGS] = cpuregs.FLAT_RING3_DATA

    def fxsave(self) -> bytes:
        """Return the FPU and SSE state as a 512-byte FXSAVE area."""
        uc = self._uc
        area = bytearray(512)
        tag = uc.reg_read(x86.UC_X86_REG_FPTAG)
        abridged = sum(1 << i for i in range(8) if (tag >> (2 * i)) & 3 != 3)
        struct.pack_into(
            "<HHB", area, 0,
            uc.reg_read(x86.UC_X86_REG_FPCW), uc.reg_read(x86.UC_X86_REG_FPSW), abridged,
        )  # fmt: skip
        struct.pack_into("<II", area, 24, uc.reg_read(x86.UC_X86_REG_MXCSR), 0xFFFF)
        top = uc.reg_read(x86.UC_X86_REG_FPSW) >> 11 & 7
        for i in range(8):  # the area holds ST(i), the emulator names the physical registers
            mantissa, exponent = uc.reg_read(x86.UC_X86_REG_FP0 + (top + i & 7))
            struct.pack_into("<QH", area, 32 + 16 * i, mantissa, exponent)
        for i in range(16):
            xmm = uc.reg_read(x86.UC_X86_REG_XMM0 + i)
            area[160 + 16 * i : 176 + 16 * i] = xmm.to_bytes(16, "little")
        return bytes(area)

    def forget_code(self) -> None:
        """Drop all translations: the hypervisor wrote to guest memory that may hold code."""
        self._uc.ctl_flush_tb()
