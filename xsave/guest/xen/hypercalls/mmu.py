"""mmu_update, update_va_mapping, mmuext_op: the only ways to change a page table.

Mirrors do_mmu_update and do_mmuext_op of xen/arch/x86/mm.c; no foreign domains.
"""

from __future__ import annotations

import contextlib
import errno
import struct
from collections.abc import Callable, Iterator

import numpy as np

from xsave.frames import PTE_PRESENT
from xsave.guest.xen.context import Vcpu
from xsave.guest.xen.guestmem import GuestFault
from xsave.guest.xen.hypervisor import Hypervisor
from xsave.guest.xen.ldt import is_valid
from xsave.guest.xen.pagetypes import PGT_L4, PGT_WRITABLE
from xsave.guest.xen.progress import ERESTART

_REQUEST, _OP = struct.Struct("<QQ"), struct.Struct("<I4xQQ")
_REQUESTS_AT_ONCE = 128
_DOMID_SELF = 0x7FF0
_UPDATE, _MACHPHYS, _PRESERVE_AD, _NO_TRANSLATE = range(4)
_UVMF_TLB_FLUSH, _UVMF_INVLPG = 1, 2
_UNPIN, _NEW_BASEPTR = 4, 5  # MMUEXT_PIN_L1_TABLE is 0, L4 is 3
# Of this vCPU, of some, of all: the others begin with a flush when they get the CPU.
_FLUSHES, _PAGE_FLUSHES, _OF_SOME = (6, 8, 10), (7, 9, 11), (8, 9)
_FLUSH_CACHE, _SET_LDT, _FLUSH_CACHE_GLOBAL, _NEW_USER_BASEPTR = 12, 13, 18, 15
_CLEAR_PAGE, _COPY_PAGE, _MARK_SUPER, _UNMARK_SUPER = 16, 17, 19, 20
#: A guest without devices may not flush caches; superpages are no business of a guest at all.
_REFUSED = {
    _FLUSH_CACHE: -errno.EACCES, _FLUSH_CACHE_GLOBAL: -errno.EINVAL,
    _MARK_SUPER: -errno.EOPNOTSUPP, _UNMARK_SUPER: -errno.EOPNOTSUPP,
}  # fmt: skip
_MMU_UPDATE_PREEMPTED = 1 << 31
_MAX_COUNT = _MMU_UPDATE_PREEMPTED - 1
_COUNT = struct.Struct("<I")


def mmu_update(
    hv: Hypervisor, vcpu: Vcpu, requests: int, count: int, done_ptr: int, foreign: int, _5: int
) -> int:
    refused = 0 if foreign == _DOMID_SELF else _foreign(hv, foreign)
    return _batch(hv, _one_update, _REQUEST, (requests, count, done_ptr, foreign), refused)


def _batch(
    hv: Hypervisor,
    one: Callable[..., int],
    layout: struct.Struct,
    arguments: tuple[int, int, int, int],
    refused: int,
) -> int:
    """Do requests of this layout until one fails; a wanted vCPU goes on with the rest later, and
    the count of all that were done is kept where the guest will find it. refused: why none may be
    done, or 0."""
    requests, count, done_ptr, foreign = arguments
    tables, before = hv.tables, 0
    dying = tables.progress.dying  # what a request may leave to do: tables.unfinished
    if dying and tables.attempt(hv.preempted, lambda: 0):
        return hv.continue_with(*arguments)
    if count > _MAX_COUNT:
        if not requests and count & 0xFFFFFFFF == _MMU_UPDATE_PREEMPTED:
            return foreign - (foreign >> 63 << 64)  # the result of what only left something to do
        if count & _MMU_UPDATE_PREEMPTED and done_ptr:
            before = _read_count(hv, done_ptr)
        count &= _MAX_COUNT
    if rc := refused:
        count = 0
    done = 0
    try:
        for fields in _requests(hv, requests, layout, count):
            if done and (dying or hv.preempted()):
                rc = -ERESTART
                break
            if rc := one(hv, *fields):
                break
            done += 1
    except GuestFault as fault:
        rc = fault.rc
    if done_ptr:
        with contextlib.suppress(GuestFault):
            hv.write(done_ptr, _COUNT.pack((before + done) & 0xFFFFFFFF))
    if rc == -ERESTART:
        rest = (count - done) | _MMU_UPDATE_PREEMPTED
        return hv.continue_with(requests + layout.size * done, rest, done_ptr, foreign)
    if dying:
        return hv.continue_with(0, _MMU_UPDATE_PREEMPTED, 0, rc)
    return rc


def _requests(
    hv: Hypervisor, address: int, layout: struct.Struct, count: int
) -> Iterator[tuple[int, ...]]:
    """The requests one after the other; some at once where they can be read so."""
    while count:
        nr = min(count, _REQUESTS_AT_ONCE)
        try:
            piece = hv.read(address, layout.size * nr)
        except GuestFault:
            nr, piece = 1, hv.read(address, layout.size)
        yield from layout.iter_unpack(piece)
        address, count = address + layout.size * nr, count - nr


def _read_count(hv: Hypervisor, address: int) -> int:
    try:
        return int.from_bytes(hv.read(address, 4), "little")
    except GuestFault:
        return 0


def _foreign(hv: Hypervisor, foreign: int) -> int:
    """get_pg_owner: a domain names itself by DOMID_SELF, and has no right to any other. In bits
    16 to 31 there may be, plus 1, the domain whose tables are meant."""
    of_tables = foreign >> 16 & 0xFFFF
    own = foreign & 0xFFFF == _DOMID_SELF and of_tables in (0, hv.domain.domid + 1)
    return 0 if own else -errno.ESRCH


def _one_update(hv: Hypervisor, address: int, value: int) -> int:
    command, tables = address & 7, hv.tables
    if command == _UPDATE and not tables.is_upper(address >> 12):  # nearly always
        return tables.mmu_update(address, value)
    address &= ~7
    if command > _NO_TRANSLATE:
        return -errno.ENOSYS
    if command == _MACHPHYS:
        mfn = address >> 12
        if not tables.owned(mfn):
            return -errno.EINVAL
        hv.domain.machine.m2p[mfn] = value
        tables.mark(mfn)
        return 0
    preserve_ad = command == _PRESERVE_AD
    if not tables.is_upper(address >> 12):
        return tables.mmu_update(address, value, preserve_ad)
    return tables.attempt(hv.preempted, lambda: tables.mmu_update(address, value, preserve_ad))


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
    refused = 0 if foreign == _DOMID_SELF else _foreign(hv, foreign & 0xFFFF)
    return _batch(hv, _one_op, _OP, (ops, count, done_ptr, foreign), refused)


def _one_op(hv: Hypervisor, command: int, arg1: int, arg2: int) -> int:
    if preemptible := _PREEMPTIBLE.get(command):
        return hv.tables.attempt(hv.preempted, lambda: preemptible(hv, command, arg1))
    if command in _FLUSHES or command in _PAGE_FLUSHES:
        return _flush(hv, command, arg1, arg2)
    if command == _SET_LDT:
        return _set_ldt(hv, arg1, arg2 & 0xFFFFFFFF)
    if command in _REFUSED:
        return _REFUSED[command]
    if command in (_CLEAR_PAGE, _COPY_PAGE):
        return _fill_page(hv, arg1, arg2 if command == _COPY_PAGE else None)
    return -errno.ENOSYS


def _flush(hv: Hypervisor, command: int, address: int, mask: int) -> int:
    """All vCPUs share one TLB. The mask of those that are meant must be there all the same."""
    if command in _OF_SOME:
        try:
            hv.read(mask, -(-len(hv.domain.vcpus) // 8))
        except GuestFault:
            return -errno.EINVAL
    if command in _FLUSHES:
        hv.tables.stale_tlb = True
    else:
        hv.tables.flush_page(address)
    return 0


def _set_ldt(hv: Hypervisor, address: int, entries: int) -> int:
    if not is_valid(address, entries):
        return -errno.EINVAL
    hv.set_ldt(address, entries)
    return 0


def _pin(hv: Hypervisor, command: int, mfn: int) -> int:
    return hv.tables.pin(mfn, command + 1)


def _unpin(hv: Hypervisor, _command: int, mfn: int) -> int:
    return hv.tables.unpin(mfn)


def _new_baseptr(hv: Hypervisor, _command: int, mfn: int) -> int:
    tables, control = hv.tables, hv.vcpu.context.ctrlreg
    old = control[3] >> 12
    if mfn != old:
        rc = tables.get_type(mfn, PGT_L4)
        if rc:
            return rc
        control[3] = mfn << 12
        if old:
            tables.put_type(old)
    hv.cpu.load_cr3(mfn << 12)
    return 0


def _new_user_baseptr(hv: Hypervisor, _command: int, mfn: int) -> int:
    tables, control = hv.tables, hv.vcpu.context.ctrlreg
    old = control[1] >> 12
    if mfn:
        rc = tables.get_type(mfn, PGT_L4)
        if rc:
            return rc
    # Bit 0 says "valid" in the image, so that pfn 0 can be told from none; live it is not set.
    control[1] = mfn << 12
    if old:
        tables.put_type(old)
    return 0


_PREEMPTIBLE: dict[int, Callable[[Hypervisor, int, int], int]] = {
    **dict.fromkeys(range(_UNPIN), _pin),
    _UNPIN: _unpin,
    _NEW_BASEPTR: _new_baseptr,
    _NEW_USER_BASEPTR: _new_user_baseptr,
}


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
