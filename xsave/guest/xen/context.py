"""The hypervisor's record of one vCPU: Xen's own vcpu_guest_context, kept as such.

Everything a save must carry is in `context`, `extended`, `xsave` and `msrs`, in the layout of
the records, from the moment the guest sets it: the registers alone live in the emulator while
the vCPU runs and are copied back by `read_registers`. cr3, cr1 and gdt_frames hold real mfns.
"""

from __future__ import annotations

import ctypes
import struct

from xsave.guest.xen import cpuregs
from xsave.guest.xen.vcpu import CR4_FSGSBASE, CR4_OSXSAVE, FLAT_RING3_CS64, FLAT_RING3_SS64, Cpu
from xsave.public import (
    VGCF_I387_VALID,
    VGCF_IN_KERNEL,
    VGCF_ONLINE,
    VcpuExtended,
    VcpuGuestContext,
    VcpuInfo,
)

_GPRS = (
    ("rax", cpuregs.RAX), ("rcx", cpuregs.RCX), ("rdx", cpuregs.RDX), ("rbx", cpuregs.RBX),
    ("rsp", cpuregs.RSP), ("rbp", cpuregs.RBP), ("rsi", cpuregs.RSI), ("rdi", cpuregs.RDI),
    ("r8", cpuregs.R8), ("r9", cpuregs.R9), ("r10", cpuregs.R10), ("r11", cpuregs.R11),
    ("r12", cpuregs.R12), ("r13", cpuregs.R13), ("r14", cpuregs.R14), ("r15", cpuregs.R15),
    ("rip", cpuregs.RIP),
)  # fmt: skip
_SEGMENTS = ("es", "ds", "fs", "gs")

RFLAGS_IF = 1 << 9
RFLAGS_IOPL = 3 << 12
#: What the live register may hold of the guest's flags: everything but IOPL, NT, VM, ...
RFLAGS_LIVE = 0x240DD5

_FXSAVE_DEFAULT = struct.pack("<HHB19xII", 0x37F, 0, 0, 0x1F80, 0xFFFF) + bytes(480)


#: In 584 years.
_NO_TIMER = (1 << 64) - 1

_XSAVE_PREFIX, _XSAVE_AREA_MIN = struct.Struct("<QQ"), 512 + 64
#: x87, SSE, AVX: what an XCR0 of the emulated CPU can hold.
XCR0_POSSIBLE = 7


def xsave_fault(content: bytes) -> str:
    """Say why this CPU would refuse an X86_PV_VCPU_XSAVE body; "" if it takes it.

    Mirrors validate_xstate of xen/arch/x86/xstate.c; an empty body and Xen's own 16 bytes of
    zeros mean "no state".
    """
    if not any(content) and len(content) in (0, _XSAVE_PREFIX.size):
        return ""
    if len(content) < _XSAVE_PREFIX.size + _XSAVE_AREA_MIN:
        return f"{len(content)} bytes are no XSAVE area"
    xcr0, accum = _XSAVE_PREFIX.unpack_from(content)
    if not xcr0 & 1 or xcr0 & ~accum or xcr0 & 6 == 4:
        return f"xcr0 {xcr0:#x} (accumulated {accum:#x}) is impossible"
    if xcr0 & ~XCR0_POSSIBLE:
        return f"xcr0 {xcr0:#x} has state components this CPU lacks"
    present, compacted, *reserved = struct.unpack_from("<8Q", content, _XSAVE_PREFIX.size + 512)
    if present & ~xcr0 or compacted or any(reserved):
        return f"its header is impossible (xstate_bv {present:#x}, xcomp_bv {compacted:#x})"
    return ""


class Vcpu:
    """One vCPU of a domain. `in_kernel` says whether cr3 or cr1 is loaded."""

    def __init__(self, vcpu_id: int, info: VcpuInfo) -> None:
        self.id = vcpu_id
        self.info = info
        self.info_mfn: int | None = None  # the guest's frame, once it moved its vcpu_info
        self.context = VcpuGuestContext()
        self.context.flags = VGCF_I387_VALID | VGCF_IN_KERNEL | VGCF_ONLINE
        ctypes.memmove(self.context.fpu_ctxt, _FXSAVE_DEFAULT, 512)
        regs = self.context.user_regs
        regs.cs, regs.ss, regs.rflags = FLAT_RING3_CS64, FLAT_RING3_SS64, RFLAGS_IF | 2
        self.context.ctrlreg[0] = 0x80050033
        self.context.ctrlreg[4] = 0x660
        self.context.debugreg[6], self.context.debugreg[7] = 0xFFFF0FF0, 0x400
        self.extended = VcpuExtended(vcpu=vcpu_id, size=ctypes.sizeof(VcpuExtended))
        self.xsave = b""
        self.msrs = b""
        self.in_kernel = True
        self.initialised = self.online = vcpu_id == 0
        self.fresh = vcpu_id != 0  # the context is newer than any state of the emulated CPU
        self.blocked = False
        self.polling: tuple[int, ...] = ()
        self.poll_deadline_ns: int | None = None
        self.timer = (ctypes.c_uint64 * 1)(_NO_TIMER)  # fastpath.py shares it
        self.traps: dict[int, tuple[int, int]] = {}

    # -- what the guest has set, in the words of its user ---

    @property
    def cr3(self) -> int:
        """Machine address of the page tables in use."""
        c = self.context.ctrlreg
        return c[3] & ~0xFFF if self.in_kernel else c[1] & ~0xFFF

    @property
    def timer_ns(self) -> int | None:
        """When the one-shot timer is due, by the domain's clock; None: it is not set."""
        timeout = self.timer[0]
        return None if timeout == _NO_TIMER else timeout

    @timer_ns.setter
    def timer_ns(self, timeout: int | None) -> None:
        self.timer[0] = _NO_TIMER if timeout is None else timeout

    @property
    def iopl(self) -> int:
        return self.context.user_regs.rflags & RFLAGS_IOPL

    @iopl.setter
    def iopl(self, level: int) -> None:
        regs = self.context.user_regs
        regs.rflags = (regs.rflags & ~RFLAGS_IOPL) | (level & 3) << 12

    def set_trap(self, vector: int, flags: int, cs: int, address: int) -> None:
        entry = self.context.trap_ctxt[vector]
        entry.vector, entry.flags, entry.cs, entry.address = vector, flags, cs, address
        if address:
            self.traps[vector] = (address, flags)
        else:
            self.traps.pop(vector, None)

    def clear_traps(self) -> None:
        ctypes.memset(self.context.trap_ctxt, 0, ctypes.sizeof(self.context.trap_ctxt))
        self.traps.clear()

    def load_context(self, blob: bytes) -> None:
        """Take a whole vcpu_guest_context, as XEN_DOMCTL_setvcpucontext does."""
        self.context = VcpuGuestContext.from_buffer_copy(blob)
        self.traps = {
            i: (t.address, t.flags) for i, t in enumerate(self.context.trap_ctxt) if t.address
        }
        self.in_kernel = bool(self.context.flags & VGCF_IN_KERNEL)
        self.fresh = self.id != 0

    # -- to and from the emulator ---

    def load_registers(self, cpu: Cpu, gdt_base: int) -> None:
        """Power the emulated CPU on in this vCPU's state."""
        c = self.context
        xcr0, area = self._fpu_image()
        cpu.power_on(self.cr3, c.ctrlreg[4] & (CR4_FSGSBASE | CR4_OSXSAVE), xcr0, area, gdt_base)
        for name, index in _GPRS:
            cpu.q[index] = getattr(c.user_regs, name)
        cpu.rflags = (c.user_regs.rflags & RFLAGS_LIVE) | RFLAGS_IF | 2
        cpu.set_selectors(c.user_regs.cs | 3, c.user_regs.ss | 3)
        for name in _SEGMENTS:
            cpu.load_segment(name, getattr(c.user_regs, name))
        cpu.q[cpuregs.FS_BASE] = c.fs_base
        cpu.q[cpuregs.GS_BASE] = c.gs_base_kernel if self.in_kernel else c.gs_base_user

    def _fpu_image(self) -> tuple[int, bytes]:
        if len(self.xsave) > 16:
            return struct.unpack_from("<Q", self.xsave)[0], self.xsave[16:]
        return 0, bytes(self.context.fpu_ctxt)

    def read_registers(self, cpu: Cpu) -> None:
        """Copy the live registers back into the context."""
        c = self.context
        regs = c.user_regs
        for name, index in _GPRS:
            setattr(regs, name, cpu.q[index])
        regs.rflags = (cpu.rflags & ~RFLAGS_IOPL) | (regs.rflags & RFLAGS_IOPL) | RFLAGS_IF | 2
        regs.cs, regs.ss = cpu.selector(cpuregs.CS_SEL), cpu.selector(cpuregs.SS_SEL)
        for name, index in zip(
            _SEGMENTS,
            (cpuregs.ES_SEL, cpuregs.DS_SEL, cpuregs.FS_SEL, cpuregs.GS_SEL),
            strict=True,
        ):
            setattr(regs, name, cpu.selector(index))
        c.fs_base = cpu.q[cpuregs.FS_BASE]
        if self.in_kernel:
            c.gs_base_kernel = cpu.q[cpuregs.GS_BASE]
            c.flags |= VGCF_IN_KERNEL
        else:
            c.gs_base_user = cpu.q[cpuregs.GS_BASE]
            c.flags &= ~VGCF_IN_KERNEL
        self._read_fpu(cpu)

    def _read_fpu(self, cpu: Cpu) -> None:
        """x87 and SSE; an XSAVE record keeps its xcr0, its upper halves are not emulated."""
        area = cpu.fxsave()
        ctypes.memmove(self.context.fpu_ctxt, area, 512)
        if len(self.xsave) > 16:
            xcr0, accum = struct.unpack_from("<QQ", self.xsave)
            tail = bytearray(self.xsave[16 + 512 :])
            struct.pack_into("<Q", tail, 0, xcr0 & 3)
            self.xsave = struct.pack("<QQ", xcr0, accum) + area + bytes(tail)
