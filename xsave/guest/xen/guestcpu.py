"""A domain on its emulated CPU: which vCPU has it, and the guest's memory as that vCPU sees it.

All vCPUs take turns on one CPU (locked instructions are not atomic between two emulators). Here
are the moves between a vCPU's states: parked and loaded, user and kernel mode, and the frame that
takes it into a handler of its kernel. What to do at a crossing is hypervisor.py's business.
"""

from __future__ import annotations

import struct
from typing import Any

from xsave.guest.xen import guestmem
from xsave.guest.xen.context import RFLAGS_IF, Vcpu
from xsave.guest.xen.cpuregs import (
    CR3,
    CS_SEL,
    FLAT_RING3_DATA,
    GS_BASE,
    GS_SEL,
    LIMIT_AND_FLAGS,
    R11,
    RAX,
    RCX,
    RIP,
    RSP,
    SS_SEL,
)
from xsave.guest.xen.domain import RESERVED_DESCRIPTORS, RESERVED_GDT_PAGE, Domain
from xsave.guest.xen.guestmem import GuestFault
from xsave.guest.xen.vcpu import FLAT_RING3_CS64, FLAT_RING3_SS64, Cpu, segment_base

M64 = (1 << 64) - 1
DESCRIPTOR_PRESENT = 1 << 47
_TABLE_INDICATOR = 4
_DESCRIPTOR_LONG = 1 << 53
_USUAL_CS64 = {FLAT_RING3_CS64 & ~3, 0x30}  # Xen's, and __USER_CS of Linux: every system call's
_CLEARED_FLAGS = 0x54100  # AC RF NT TF
_MASKED_ON_FRAME = 0x3200  # IOPL IF


class GuestCpu:
    """`vcpu` is the one that has the CPU; `cpu` and its registers `q` exist when powered."""

    def __init__(self, domain: Domain) -> None:
        self.domain = domain
        self.tables = domain.tables
        self.vcpu = domain.vcpus[0]
        self.powered = False
        self._parked: dict[int, Any] = {}
        self.cpu: Cpu
        self.q: memoryview

    def start_cpu(self, cpu: Cpu) -> None:
        """Take a fresh emulated CPU and load vCPU 0 into it."""
        self.cpu, self.q = cpu, cpu.q
        cpu.promise(self.domain.policy)
        self.vcpu.load_registers(self.cpu, self.domain.gdt_base(self.vcpu))
        self._load_ldt()
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
            self._load_ldt()
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

    # -- guest memory, as every hypercall sees it ---

    def read(self, address: int, nr: int) -> bytes:
        return guestmem.read(self.tables, self.q[CR3], address, nr)

    def write(self, address: int, data: bytes) -> None:
        guestmem.write(self.tables, self.q[CR3], address, data)

    # -- segments ---

    def set_ldt(self, address: int, entries: int) -> None:
        """load_LDT: have the vCPU that runs use another LDT, for which ldt.is_valid."""
        self.domain.ldts.set(self.vcpu, address, entries)
        self._load_ldt()

    def _load_ldt(self) -> None:
        vcpu = self.vcpu
        self.cpu.load_ldt(self.domain.ldts.base(vcpu), vcpu.context.ldt_ents)

    def descriptor(self, selector: int) -> int:
        """Return the descriptor a selector names, 0 if it names none that is present."""
        index = selector >> 3
        if selector & _TABLE_INDICATOR:
            descriptor = self.domain.ldts.descriptor(self.vcpu, index)
            return descriptor if descriptor & DESCRIPTOR_PRESENT else 0
        if index >= RESERVED_GDT_PAGE * 512:
            return RESERVED_DESCRIPTORS.get(index, 0)
        context = self.vcpu.context
        if index >= context.gdt_ents:
            return 0
        descriptor = self.tables.q[(context.gdt_frames[index >> 9] << 9) + (index & 511)]
        return descriptor if descriptor & DESCRIPTOR_PRESENT else 0

    def is_compat(self, cs: int) -> bool:
        """True if this is a code segment of 32 bits."""
        if cs & ~3 in _USUAL_CS64:
            return False
        return not self.descriptor(cs) & _DESCRIPTOR_LONG

    def load_user_gs(self, selector: int) -> None:
        """SEGBASE_GS_USER_SEL: the selector shows at once, its base is there in user mode."""
        descriptor = self.descriptor(selector)
        if not descriptor:
            selector = 0
        self.q[GS_SEL] = self.q[GS_SEL] & ~0xFFFF | selector
        self.q[GS_SEL + LIMIT_AND_FLAGS] = FLAT_RING3_DATA
        self.vcpu.context.gs_base_user = segment_base(descriptor)

    # -- into the kernel ---

    def bounce(self, handler: int, error_code: int | None, *, mask: bool, skip: int) -> None:
        """create_bounce_frame: push the interrupted state onto the kernel stack and go there.

        `skip` bytes are added to rip by the emulator after the hook: the frame wants the rip
        behind them, the register the handler before them.
        """
        q, vcpu, cpu = self.q, self.vcpu, self.cpu
        if not handler:
            self.domain.crash(f"no callback for what happened at rip {q[RIP]:#x}")
            cpu.stop()
            return
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
