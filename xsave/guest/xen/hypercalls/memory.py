"""memory_op: the size of the domain, its memory map, and frames given back or asked for.

Every answer is independent of the host it is given on: what a guest caches at boot must still
be true after a restore elsewhere (a machphys_mapping with this machine's size killed guests on
real Xen hosts).
"""

from __future__ import annotations

import errno
import struct

import numpy as np

from xsave.errors import OutOfFrames
from xsave.guest.xen.context import Vcpu
from xsave.guest.xen.domain import HYPERVISOR_VIRT_START
from xsave.guest.xen.hypervisor import Hypervisor

(
    _INCREASE, _DECREASE, _MAXIMUM_RAM_PAGE, _CURRENT, _MAXIMUM_RESERVATION, _MACHPHYS_MFN_LIST,
    _POPULATE_PHYSMAP,
) = range(7)  # fmt: skip
_MEMORY_MAP, _MACHPHYS_MAPPING = 9, 12
_COMMAND_MASK = (1 << 6) - 1
_E820_RAM = 1
_E820_ENTRY = struct.Struct("<QQI")
_MACH2PHYS_VIRT_END = 0xFFFF_8040_0000_0000
_MAX_MFN = 0x7_FFFF_FFFF
_MAX_EXTENTS = 1 << 16


def memory_op(hv: Hypervisor, vcpu: Vcpu, command: int, argument: int, *_: int) -> int:
    start = command >> 6
    command &= _COMMAND_MASK
    domain = hv.domain
    if command in (_CURRENT, _MAXIMUM_RESERVATION):
        return domain.max_pages if command == _MAXIMUM_RESERVATION else domain.nr_pages()
    if command == _MAXIMUM_RAM_PAGE:
        return _MAX_MFN
    if command == _MACHPHYS_MAPPING:
        mapping = struct.pack("<QQQ", HYPERVISOR_VIRT_START, _MACH2PHYS_VIRT_END, _MAX_MFN)
        hv.write(argument, mapping)
        return 0
    if command == _MEMORY_MAP:
        return _memory_map(hv, argument)
    if command in (_INCREASE, _DECREASE, _POPULATE_PHYSMAP):
        return _reservation(hv, command, argument, start)
    return -errno.ENOSYS


def _memory_map(hv: Hypervisor, argument: int) -> int:
    """One RAM range from 0 to the domain's size."""
    room, buffer = struct.unpack("<IxxxxQ", hv.read(argument, 16))
    if not room:
        return -errno.ENOBUFS
    hv.write(buffer, _E820_ENTRY.pack(0, hv.domain.max_pages << 12, _E820_RAM))
    hv.write(argument, struct.pack("<I", 1))
    return 0


def _reservation(hv: Hypervisor, command: int, argument: int, start: int) -> int:
    """Return the number of extents done (single pages only), as Xen does."""
    extents, nr, order, _flags, _domid = struct.unpack("<QQIIH", hv.read(argument, 26))
    if order or nr > _MAX_EXTENTS or start > nr:
        return start
    if command == _INCREASE:
        return start + _increase(hv, nr - start, extents and extents + 8 * start)
    frames = list(struct.unpack(f"<{nr}Q", hv.read(extents, 8 * nr)))
    if command == _DECREASE:
        return start + _decrease(hv, frames[start:])
    done = _populate(hv, frames[start:], extents + 8 * start)
    return start + done


def _decrease(hv: Hypervisor, mfns: list[int]) -> int:
    """Give frames back; stops at one that is not the domain's or still in use."""
    tables = hv.tables
    given: dict[int, None] = {}
    for mfn in mfns:
        if mfn in given or not tables.owned(mfn) or tables.refs[mfn] or tables.count[mfn]:
            break
        given[mfn] = None
    tables.stale_tlb = tables.stale_tlb or tables.unflushed  # they may become another domain's
    frames = np.array(list(given), np.uint64)
    hv.domain.before_free(frames)
    hv.domain.machine.free(frames)
    return len(given)


def _populate(hv: Hypervisor, pfns: list[int], extents: int) -> int:
    """Put fresh frames behind the pfns, as many as there are."""
    mfns = _take(hv, len(pfns))
    hv.domain.machine.m2p[mfns] = np.array(pfns[: len(mfns)], np.uint64)
    hv.write(extents, mfns.tobytes())
    return len(mfns)


def _increase(hv: Hypervisor, nr: int, extents: int) -> int:
    """Give fresh frames that are nobody's pfn yet, as many as there are; extents may be NULL."""
    mfns = _take(hv, nr)
    if extents:
        hv.write(extents, mfns.tobytes())
    return len(mfns)


def _take(hv: Hypervisor, nr: int) -> np.ndarray:
    """Take up to nr frames: what the domain's maximum and the host have room for."""
    domain = hv.domain
    room = min(domain.max_pages - domain.nr_pages(), domain.machine.free_frames())
    try:
        return domain.allocate(max(min(nr, room), 0))
    except OutOfFrames:  # another domain was faster
        return np.empty(0, np.uint64)


HYPERCALLS = {12: memory_op}
