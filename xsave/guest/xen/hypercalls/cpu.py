"""Traps, descriptors, stacks, callbacks, segment bases: what a vCPU's context is made of."""

from __future__ import annotations

import errno
import struct

from xsave.guest.xen.context import Vcpu
from xsave.guest.xen.cpuregs import FS_BASE, GS_BASE
from xsave.guest.xen.guestmem import is_canonical, is_guest_address
from xsave.guest.xen.hypervisor import Hypervisor
from xsave.guest.xen.pagetable import fix_descriptor
from xsave.guest.xen.pagetypes import PGT_SEG_DESC, PGT_WRITABLE
from xsave.guest.xen.vcpu import FLAT_RING3_CS64
from xsave.public import VGCF_FAILSAFE_DISABLES_EVENTS, VGCF_SYSCALL_DISABLES_EVENTS

_MAX_GDT_ENTRIES = 14 * 512
_CALLBACK_EVENT, _CALLBACK_FAILSAFE, _CALLBACK_SYSCALL = 0, 1, 2
_CALLBACK_NMI, _CALLBACK_SYSENTER, _CALLBACK_SYSCALL32 = 4, 5, 7
_CALLBACKS = (0, 1, 2, 5, 7)
_TRAP_NMI, _TI_DISABLE_EVENTS = 2, 4
# Reserved bits of dr6 and dr7, xen/arch/x86/include/asm/debugreg.h.
_DR6_ZEROS, _DR6_ONES = 0x1000, 0xFFFF0FF0
_DR7_ZEROS, _DR7_ONES = 0xD800, 0x400
_DR7_ACTIVE, _DR7_GENERAL_DETECT, _DR7_IO = 0xFF, 1 << 13, 2
_SEGBASE_FS, _SEGBASE_GS_USER, _SEGBASE_GS_KERNEL, _SEGBASE_GS_USER_SEL = range(4)


def set_trap_table(hv: Hypervisor, vcpu: Vcpu, traps: int, *_: int) -> int:
    if not traps:
        vcpu.clear_traps()
        return 0
    for i in range(256):
        vector, flags, cs, address = struct.unpack("<BBH4xQ", hv.read(traps + 16 * i, 16))
        if not address:
            break
        if not is_canonical(address):
            return -errno.EINVAL
        vcpu.set_trap(vector, flags, cs, address)
    return 0


def set_gdt(hv: Hypervisor, vcpu: Vcpu, frames: int, entries: int, *_: int) -> int:
    if entries > _MAX_GDT_ENTRIES:
        return -errno.EINVAL
    nr = -(-entries // 512)
    return hv.domain.set_gdt(vcpu, list(struct.unpack(f"<{nr}Q", hv.read(frames, 8 * nr))), entries)


def update_descriptor(hv: Hypervisor, vcpu: Vcpu, maddr: int, descriptor: int, *_: int) -> int:
    """Write one descriptor into a page in use as GDT, or into an ordinary page."""
    mfn, fixed = maddr >> 12, fix_descriptor(descriptor)
    if not hv.tables.owned(mfn) or maddr & 7 or fixed is None:
        return -errno.EINVAL
    in_use = hv.tables.count[mfn] and hv.tables.ptype[mfn] == PGT_SEG_DESC
    rc = hv.tables.get_type(mfn, PGT_SEG_DESC if in_use else PGT_WRITABLE)
    if rc == 0:
        hv.tables.q[maddr >> 3] = fixed
        hv.tables.put_type(mfn)
    return rc


def stack_switch(hv: Hypervisor, vcpu: Vcpu, ss: int, sp: int, *_: int) -> int:
    vcpu.context.kernel_ss, vcpu.context.kernel_sp = ss, sp
    return 0


def set_callbacks(
    hv: Hypervisor, vcpu: Vcpu, event: int, failsafe: int, syscall: int, *_: int
) -> int:
    """As callback_op would, but for its flags; an address that can be none changes nothing."""
    context = vcpu.context
    fields = ("event_callback_eip", "failsafe_callback_eip", "syscall_callback_eip")
    for field, address in zip(fields, (event, failsafe, syscall), strict=True):
        if is_canonical(address):
            setattr(context, field, address)
    return 0


def callback_op(hv: Hypervisor, vcpu: Vcpu, command: int, argument: int, *_: int) -> int:
    if command > 1:
        return -errno.ENOSYS
    if command == 1:
        return _unregister(vcpu, *struct.unpack("<H", hv.read(argument, 2)))
    kind, flags, address = struct.unpack("<HH4xQ", hv.read(argument, 16))
    if not is_canonical(address):
        return -errno.EINVAL
    context, extended = vcpu.context, vcpu.extended
    if kind == _CALLBACK_EVENT:
        context.event_callback_eip = address
    elif kind == _CALLBACK_FAILSAFE:
        context.failsafe_callback_eip = address
        _mask_flag(vcpu, VGCF_FAILSAFE_DISABLES_EVENTS, flags)
    elif kind == _CALLBACK_SYSCALL:
        context.syscall_callback_eip = address
        _mask_flag(vcpu, VGCF_SYSCALL_DISABLES_EVENTS, flags)
    elif kind == _CALLBACK_SYSENTER:
        extended.sysenter_callback_eip, extended.sysenter_disables_events = address, flags & 1
    elif kind == _CALLBACK_SYSCALL32:
        extended.syscall32_callback_eip, extended.syscall32_disables_events = address, flags & 1
    elif kind == _CALLBACK_NMI:
        vcpu.set_trap(_TRAP_NMI, _TI_DISABLE_EVENTS, FLAT_RING3_CS64, address)
    else:
        return -errno.ENOSYS
    return 0


def _unregister(vcpu: Vcpu, kind: int) -> int:
    """Only the NMI's callback can be taken away: it is an entry of the trap table."""
    if kind == _CALLBACK_NMI:
        vcpu.set_trap(_TRAP_NMI, 0, 0, 0)
        return 0
    return -errno.EINVAL if kind in _CALLBACKS else -errno.ENOSYS


def _mask_flag(vcpu: Vcpu, flag: int, flags: int) -> None:
    """CALLBACKF_mask_events is bit 0."""
    vcpu.context.flags = vcpu.context.flags & ~flag | (flag if flags & 1 else 0)


def set_segment_base(hv: Hypervisor, vcpu: Vcpu, which: int, base: int, *_: int) -> int:
    if which != _SEGBASE_GS_USER_SEL and not is_canonical(base):
        return -errno.EINVAL
    if which == _SEGBASE_FS:
        hv.q[FS_BASE] = base
    elif which == _SEGBASE_GS_USER:
        vcpu.context.gs_base_user = base
    elif which == _SEGBASE_GS_KERNEL:
        hv.q[GS_BASE] = base
    elif which == _SEGBASE_GS_USER_SEL:
        hv.load_user_gs(base & 0xFFFF)
    else:
        return -errno.EINVAL
    return 0


def set_debugreg(hv: Hypervisor, vcpu: Vcpu, register: int, value: int, *_: int) -> int:
    """4 and 5 are 6 and 7. Breakpoints are Xen's to refuse, in Xen's part of the address space."""
    context = vcpu.context
    if register < 4:
        if not is_guest_address(value):
            return -errno.EPERM
        context.debugreg[register] = value
        return 0
    if register > 7:
        return -errno.ENODEV
    if value >> 32:
        return -errno.EINVAL
    if register in (4, 6):
        context.debugreg[6] = value & ~_DR6_ZEROS | _DR6_ONES
        return 0
    breaks_on_io = any(value >> shift & 3 == _DR7_IO for shift in range(16, 32, 4))
    if value & _DR7_GENERAL_DETECT or (value & _DR7_ACTIVE and breaks_on_io):
        return -errno.EPERM
    context.debugreg[7] = value & ~_DR7_ZEROS | _DR7_ONES
    return 0


def get_debugreg(hv: Hypervisor, vcpu: Vcpu, register: int, *_: int) -> int:
    if register > 7:
        return -errno.ENODEV
    return vcpu.context.debugreg[register | 2 if register > 3 else register]


def fpu_taskswitch(hv: Hypervisor, vcpu: Vcpu, *_: int) -> int:
    """CR0.TS is never set here: the FPU always belongs to whoever runs."""
    return 0


def vm_assist(hv: Hypervisor, vcpu: Vcpu, command: int, kind: int, *_: int) -> int:
    if kind > 5 or command > 1:
        return -errno.EINVAL
    bit = 1 << kind
    hv.domain.vm_assist = hv.domain.vm_assist & ~bit | (bit if command == 0 else 0)
    return 0


HYPERCALLS = {
    0: set_trap_table,
    2: set_gdt,
    3: stack_switch,
    4: set_callbacks,
    5: fpu_taskswitch,
    8: set_debugreg,
    9: get_debugreg,
    10: update_descriptor,
    21: vm_assist,
    25: set_segment_base,
    30: callback_op,
}
