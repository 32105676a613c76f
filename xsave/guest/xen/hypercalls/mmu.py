"""mmu_update, update_va_mapping, mmuext_op: the only ways to change a page table.

Mirrors do_mmu_update and do_mmuext_op of xen/arch/x86/mm.c; no foreign domains.
"""

from __future__ import annotations

import errno
import struct

import numpy as np

from xsave.frames import PTE_PRESENT
from xsave.guest.xen.context import Vcpu
from xsave.guest.xen.hypervisor import Hypervisor
from xsave.guest.xen.pagetable import PGT_L4, PGT_WRITABLE

_MAX_BATCH = 1 << 14
_DOMID_SELF = 0x7FF0
_UPDATE, _MACHPHYS, _PRESERVE_AD, _NO_TRANSLATE = range(4)
_UVMF_TLB_FLUSH, _UVMF_INVLPG = 1, 2
_PIN_LAST, _UNPIN, _NEW_BASEPTR = 3, 4, 5
# Of this vCPU, of some, of all: the others begin with a flush when they get the CPU.
_FLUSHES, _PAGE_FLUSHES = (6, 8, 10), (7, 9, 11)
_FLUSH_CACHE, _SET_LDT, _FLUSH_CACHE_GLOBAL, _NEW_USER_BASEPTR = 12, 13, 18, 15
_CLEAR_PAGE, _COPY_PAGE, _MARK_SUPER, _UNMARK_SUPER = 16, 17, 19, 20
_MMU_UPDATE_PREEMPTED = 1 << 31


def mmu_update(
    hv: Hypervisor, vcpu: Vcpu, requests: int, count: int, done_ptr: int, foreign: int, _5: int
) -> int:
    count &= 0xFFFFFFFF & ~_MMU_UPDATE_PREEMPTED
    if count > _MAX_BATCH:
        return -errno.EINVAL
    rc, done = 0, 0
    raw = hv.read(requests, 16 * count)
    if foreign & 0xFFFF not in (_DOMID_SELF, hv.domain.domid):
        rc, raw = -errno.ESRCH, b""
    for address, value in struct.iter_unpack("<QQ", raw):
        rc = _one_update(hv, address, value)
        if rc:
            break
        done += 1
    if done_ptr:
        hv.write(done_ptr, struct.pack("<I", done))
    return rc


def _one_update(hv: Hypervisor, address: int, value: int) -> int:
    command = address & 3
    address &= ~3
    if command == _MACHPHYS:
        mfn = address >> 12
        if not hv.tables.owned(mfn):
            return -errno.EINVAL
        hv.domain.machine.m2p[mfn] = value
        return 0
    if command == _NO_TRANSLATE:
        command = _UPDATE
    return hv.tables.mmu_update(address, value, preserve_ad=command == _PRESERVE_AD)


def update_va_mapping(
    hv: Hypervisor, vcpu: Vcpu, address: int, value: int, flags: int, _4: int, _5: int
) -> int:
    tables = hv.tables
    slot = tables.l1_slot(vcpu.cr3 >> 12, address)
    if slot < 0:
        return -errno.EINVAL
    was_present = tables.q[slot >> 3] & PTE_PRESENT
    rc = tables.mmu_update(slot, value)
    if flags & _UVMF_TLB_FLUSH:
        tables.stale_tlb = True
    elif was_present or flags & _UVMF_INVLPG:
        tables.flush_page(address)
    return rc


def mmuext_op(
    hv: Hypervisor, vcpu: Vcpu, ops: int, count: int, done_ptr: int, foreign: int, _5: int
) -> int:
    count &= 0xFFFFFFFF & ~_MMU_UPDATE_PREEMPTED
    if count > _MAX_BATCH:
        return -errno.EINVAL
    rc, done = 0, 0
    for command, _pad, arg1, arg2 in struct.iter_unpack("<IIQQ", hv.read(ops, 24 * count)):
        rc = _one_op(hv, vcpu, command, arg1, arg2)
        if rc:
            break
        done += 1
    if done_ptr:
        hv.write(done_ptr, struct.pack("<I", done))
    return rc


def _one_op(hv: Hypervisor, vcpu: Vcpu, command: int, arg1: int, arg2: int) -> int:
    tables = hv.tables
    if command <= _PIN_LAST:
        return tables.pin(arg1, command + 1)
    if command == _UNPIN:
        return tables.unpin(arg1)
    if command == _NEW_BASEPTR:
        return _new_baseptr(hv, vcpu, arg1)
    if command == _NEW_USER_BASEPTR:
        return _new_user_baseptr(hv, vcpu, arg1)
    if command in _FLUSHES:
        tables.stale_tlb = True
        return 0
    if command in _PAGE_FLUSHES:
        tables.flush_page(arg1)
        return 0
    if command == _SET_LDT:
        return 0 if not arg2 else -errno.ENOSYS
    if command in (_FLUSH_CACHE, _FLUSH_CACHE_GLOBAL, _MARK_SUPER, _UNMARK_SUPER):
        return 0
    if command in (_CLEAR_PAGE, _COPY_PAGE):
        return _fill_page(hv, arg1, arg2 if command == _COPY_PAGE else None)
    return -errno.ENOSYS


def _new_baseptr(hv: Hypervisor, vcpu: Vcpu, mfn: int) -> int:
    tables, context = hv.tables, vcpu.context
    old = context.ctrlreg[3] >> 12
    if mfn != old:
        rc = tables.get_type(mfn, PGT_L4)
        if rc:
            return rc
        context.ctrlreg[3] = mfn << 12
        if old:
            tables.put_type(old)
    hv.cpu.load_cr3(vcpu.cr3)
    return 0


def _new_user_baseptr(hv: Hypervisor, vcpu: Vcpu, mfn: int) -> int:
    tables, context = hv.tables, vcpu.context
    old = context.ctrlreg[1] >> 12
    if mfn:
        rc = tables.get_type(mfn, PGT_L4)
        if rc:
            return rc
    # Bit 0 says "valid" in the image, so that pfn 0 can be told from none; live it is not set.
    context.ctrlreg[1] = mfn << 12
    if old:
        tables.put_type(old)
    return 0


def _fill_page(hv: Hypervisor, mfn: int, source: int | None) -> int:
    tables, machine = hv.tables, hv.domain.machine
    if source is not None and not tables.owned(source):
        return -errno.EINVAL
    rc = tables.get_type(mfn, PGT_WRITABLE)
    if rc:
        return rc
    machine.mem[mfn] = np.uint64(0) if source is None else machine.mem[source]
    tables.put_type(mfn)
    hv.cpu.forget_code()
    return 0


HYPERCALLS = {1: mmu_update, 14: update_va_mapping, 26: mmuext_op}
