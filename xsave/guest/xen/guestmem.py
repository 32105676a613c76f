"""copy_from_guest and copy_to_guest: the guest's memory through its own page tables.

The walk asks for user-accessible (and for writes, writable) mappings, so a guest cannot make
the hypervisor read or write what it could not reach itself.
"""

from __future__ import annotations

import errno

from xsave.guest.xen.pagetable import PageTables

#: More than any hypercall argument; a longer copy is a hostile length.
MAX_COPY_BYTES = 1 << 20


_XEN_START, _XEN_END = 0xFFFF_8000_0000_0000, 0xFFFF_8800_0000_0000


def is_canonical(address: int) -> bool:
    """True if a CPU would not fault on the address before it even looks for a page."""
    return address >> 47 in (0, 0x1FFFF)


def is_guest_address(address: int) -> bool:
    """__addr_ok: canonical, and outside Xen's part of the address space."""
    return is_canonical(address) and not _XEN_START <= address < _XEN_END


class GuestFault(Exception):
    """A guest pointer led nowhere; the hypercall returns -EFAULT."""

    rc = -errno.EFAULT


def read(tables: PageTables, cr3: int, address: int, nr: int) -> bytes:
    """Return nr bytes at a guest virtual address. Raises GuestFault."""
    if not 0 <= nr <= MAX_COPY_BYTES:
        raise GuestFault
    memory, l4 = tables.machine.map, cr3 >> 12
    if 0 < nr <= 4096 - (address & 0xFFF):  # nearly always
        maddr = tables.walk(l4, address)
        if maddr < 0 or (maddr >> 12) >= tables.nr_frames:
            raise GuestFault
        return memory[maddr : maddr + nr]
    out = b""
    while nr:
        address &= 0xFFFF_FFFF_FFFF_FFFF
        maddr = tables.walk(l4, address)
        if maddr < 0 or (maddr >> 12) >= tables.nr_frames:
            raise GuestFault
        chunk = min(4096 - (address & 0xFFF), nr)
        out += memory[maddr : maddr + chunk]
        address += chunk
        nr -= chunk
    return out


def write(tables: PageTables, cr3: int, address: int, data: bytes) -> None:
    """Write bytes at a guest virtual address. Raises GuestFault; may have written a part."""
    memory, l4 = tables.machine.map, cr3 >> 12
    done = 0
    while done < len(data):
        address &= 0xFFFF_FFFF_FFFF_FFFF
        maddr = tables.walk(l4, address, write=True)
        if maddr < 0 or (maddr >> 12) >= tables.nr_frames:
            raise GuestFault
        chunk = min(4096 - (address & 0xFFF), len(data) - done)
        memory[maddr : maddr + chunk] = data[done : done + chunk]
        address += chunk
        done += chunk
