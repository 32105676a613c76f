"""Traps, descriptors, stacks, callbacks, segment bases: what a vCPU's context is made of."""

from __future__ import annotations

import errno
import struct

from xsave.guest.xen.context import Vcpu
from xsave.guest.xen.cpuregs import FS_BASE, GS_BASE
from xsave.guest.xen.hypervisor import Hypervisor
from xsave.guest.xen.pagetable import PGT_SEG_DESC, PGT_WRITABLE, fix_descriptor
from xsave.public import VGCF_FAILSAFE_DISABLES_EVENTS, VGCF_SYSCALL_DISABLES_EVENTS

_MAX_GDT_ENTRIES = 14 * 512
_CALLBACK_EVENT, _CALLBACK_FAILSAFE, _CALLBACK_SYSCALL = 0, 1, 2
_CALLBACK_SYSENTER, _CALLBACK_SYSCALL32 = 5, 7
_SEGBASE_FS, _SEGBASE_GS_USER, _SEGBASE_GS_KERNEL, _SEGBASE_GS_USER_SEL = range(4)


def set_trap_table(hv: Hypervisor, vcpu: Vcpu, traps: int, *_: int) -> int:
    if not traps:
        vcpu.clear_traps()
        return 0
    for i in range(256):
        vector, flags, cs, address = struct.unpack("<BBH4xQ", hv.read(traps + 16 * i, 16))
        if not address:
            break
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
    context = vcpu.context
    context.event_callback_eip, context.failsafe_callback_eip = event, failsafe
    context.syscall_callback_eip = syscall
    return 0


def callback_op(hv: Hypervisor, vcpu: Vcpu, command: int, argument: int, *_: int) -> int:
    if command > 1:
        return -errno.ENOSYS
    if command == 1:  # unregister
        return 0
    kind, flags, address = struct.unpack("<HH4xQ", hv.read(argument, 16))
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
    else:
        return -errno.ENOSYS
    return 0


def _mask_flag(vcpu: Vcpu, flag: int, flags: int) -> None:
    """CALLBACKF_mask_events is bit 0."""
    vcpu.context.flags = vcpu.context.flags & ~flag | (flag if flags & 1 else 0)


def set_segment_base(hv: Hypervisor, vcpu: Vcpu, which: int, base: int, *_: int) -> int:
    if which == _SEGBASE_FS:
        hv.q[FS_BASE] = base
    elif which == _SEGBASE_GS_USER:
        vcpu.context.gs_base_user = base
    elif which == _SEGBASE_GS_KERNEL:
        hv.q[GS_BASE] = base
    elif which == _SEGBASE_GS_USER_SEL:
        vcpu.context.gs_base_user = 0
    else:
        return -errno.EINVAL
    return 0


def set_debugreg(hv: Hypervisor, vcpu: Vcpu, register: int, value: int, *_: int) -> int:
    if register >= 8 or register in (4, 5):
        return -errno.EINVAL
    vcpu.context.debugreg[register] = value
    return 0


def get_debugreg(hv: Hypervisor, vcpu: Vcpu, register: int, *_: int) -> int:
    return vcpu.context.debugreg[register] if register < 8 else -errno.EINVAL


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
