"""A domain's grant table: which of its frames its backend may use, as version 1 entries say.

    struct grant_entry_v1 { u16 flags; u16 domid; u32 frame; }     512 of them to a grant frame

Grant frames are Xen's: the guest gets them with setup_table, may map them writable and never give
them back. It writes the entries; Xen (here: the host's backend, domain 0) marks in them what is
in use, and the guest must not end a grant that is. A frame that is mapped writable is of type
writable meanwhile, one that is mapped read-only has a reference: it can become no page table and
not be given back while the backend has it. Mirrors xen/common/grant_table.c.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from xsave.errors import OutOfFrames
from xsave.frames import PAGE_SHIFT
from xsave.guest.xen.machine import Machine
from xsave.guest.xen.pagetable import PageTables
from xsave.guest.xen.pagetypes import PGT_WRITABLE

#: GNTST_*: the status codes of xen/include/public/grant_table.h.
OKAY, GENERAL_ERROR, BAD_DOMAIN, BAD_GNTREF = 0, -1, -2, -3
BAD_VIRT_ADDR, PERMISSION_DENIED, BAD_PAGE = -5, -8, -9
#: libxl's max_grant_frames of a domain.
MAX_GRANT_FRAMES = 64
VERSION = 1
ENTRIES_PER_FRAME = 512
_ENTRY = struct.Struct("<HHI")
_PERMIT_ACCESS, _TYPE_MASK = 1, 3
_READONLY, _READING, _WRITING, _SUB_PAGE = 4, 8, 16, 0x100
_BACKEND_DOMID = 0


@dataclass(slots=True)
class Grant:
    """A mapped grant: its frame, and by how many users."""

    ref: int
    mfn: int
    readonly: bool


class GrantTable:
    """One domain's; all of it is version 1."""

    def __init__(
        self, machine: Machine, tables: PageTables, allocate: Callable[[int], np.ndarray]
    ) -> None:
        """allocate: Domain.allocate. The guest learns the numbers of these frames as well."""
        self._machine = machine
        self._tables = tables
        self._allocate = allocate
        self.frames: list[int] = []
        self._pins: dict[int, list[int]] = {}  # ref -> [readers, writers]

    def setup(self, nr_frames: int) -> int:
        """GNTTABOP_setup_table: have so many frames at least. A GNTST_*."""
        if nr_frames > MAX_GRANT_FRAMES:
            return GENERAL_ERROR
        missing = nr_frames - len(self.frames)
        if missing <= 0:
            return OKAY
        try:
            mfns = self._allocate(missing).tolist()
        except OutOfFrames:
            return GENERAL_ERROR
        for mfn in mfns:
            self._tables.get_type(mfn, PGT_WRITABLE)  # for ever; a fresh frame has no type
        self.frames += mfns
        return OKAY

    # -- the backend's side ---

    def map(self, ref: int, *, readonly: bool) -> Grant | int:
        """Map a frame the guest grants to domain 0 (GNTTABOP_map_grant_ref). A GNTST_* if not."""
        address = self._address(ref)
        if address is None:
            return BAD_GNTREF
        flags, domid, mfn = _ENTRY.unpack_from(self._machine.map, address)
        if flags & (_TYPE_MASK | _SUB_PAGE) != _PERMIT_ACCESS or domid != _BACKEND_DOMID:
            return GENERAL_ERROR
        if flags & _READONLY and not readonly:
            return GENERAL_ERROR
        if not self._tables.owned(mfn):
            return BAD_PAGE
        if not readonly and self._tables.get_type(mfn, PGT_WRITABLE):
            return GENERAL_ERROR
        self._tables.refs[mfn] += 1
        pins = self._pins.setdefault(ref, [0, 0])
        pins[not readonly] += 1
        self._mark(address, flags, pins)
        return Grant(ref, mfn, readonly)

    def unmap(self, grant: Grant) -> None:
        """Undo one map(). The frame is the mapped one, whatever the entry says by now."""
        self._tables.refs[grant.mfn] -= 1
        if not grant.readonly:
            self._tables.put_type(grant.mfn)
        pins = self._pins[grant.ref]
        pins[not grant.readonly] -= 1
        if not any(pins):
            del self._pins[grant.ref]
        address = self._address(grant.ref)
        assert address is not None  # the table never shrinks
        self._mark(address, _ENTRY.unpack_from(self._machine.map, address)[0], pins)

    def page(self, grant: Grant) -> memoryview:
        """The mapped frame's bytes; no good after unmap()."""
        start = grant.mfn << PAGE_SHIFT
        return memoryview(self._machine.map)[start : start + (1 << PAGE_SHIFT)]

    def _address(self, ref: int) -> int | None:
        """The machine address of an entry, None if there is none."""
        frame, index = divmod(ref, ENTRIES_PER_FRAME)
        if not 0 <= frame < len(self.frames):
            return None
        return (self.frames[frame] << PAGE_SHIFT) + index * _ENTRY.size

    def _mark(self, address: int, flags: int, pins: list[int]) -> None:
        """Tell the guest what is in use: reading while anybody has it, writing while a writer."""
        flags &= ~(_READING | _WRITING)
        flags |= (_READING if any(pins) else 0) | (_WRITING if pins[1] else 0)
        struct.pack_into("<H", self._machine.map, address, flags)
