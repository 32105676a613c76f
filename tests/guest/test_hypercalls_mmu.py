"""mmu_update, update_va_mapping, mmuext_op: the only ways to change a page table."""

from __future__ import annotations

import errno
import struct

import pytest

from tests.guest.rig import FULL, READ_ONLY
from xsave.frames import PTE_PRESENT
from xsave.guest.xen.pagetypes import PGT_L1, PGT_L3, PGT_L4, PGT_SEG_DESC

SELF = 0x7FF0
MMU_UPDATE, UPDATE_VA_MAPPING, MMUEXT_OP = 1, 14, 26
PIN_L1, UNPIN, NEW_BASEPTR, NEW_USER_BASEPTR, CLEAR_PAGE, COPY_PAGE = 0, 4, 5, 15, 16, 17
REFUSED, BUSY = -errno.EINVAL, -errno.EBUSY
ARGS, DONE = 3, 4  # pages of the guest
M2P = 0xFFFF_8000_0000_0000
GATE = 0x0000_8E00_0000_1234


pytestmark = pytest.mark.usefixtures("asking")


def update(guest, *requests, domid=SELF, done=True, count=None):
    """Make an mmu_update; return (result, how many were done)."""
    guest.poke(ARGS, 0, b"".join(struct.pack("<QQ", *request) for request in requests))
    guest.poke(DONE, 0, struct.pack("<I", 99))
    count = len(requests) if count is None else count
    rc = guest.hv.call(MMU_UPDATE, guest.va(ARGS), count, guest.va(DONE) * done, domid, 0)
    return rc, struct.unpack("<I", guest.peek(DONE, 0, 4))[0]


def mmuext(guest, *ops, domid=SELF):
    """Make an mmuext_op of (command, arg1, arg2); return (result, how many were done)."""
    packed = b"".join(struct.pack("<IIQQ", op[0], 0, *op[1:], *[0] * (3 - len(op))) for op in ops)
    guest.poke(ARGS, 0, packed)
    rc = guest.hv.call(MMUEXT_OP, guest.va(ARGS), len(ops), guest.va(DONE), domid, 0)
    return rc, struct.unpack("<I", guest.peek(DONE, 0, 4))[0]


def l1_entry(guest, slot):
    return guest.l1 << 12 | 8 * slot


# -- mmu_update ---


def test_an_update_of_a_table(guest):
    """An entry of a table in use is changed, with its user bit, and is counted."""
    mfn = guest.frames[5]
    assert update(guest, (l1_entry(guest, 50), mfn << 12 | 3)) == (0, 1)
    assert guest.machine.mem[guest.l1, 50] == mfn << 12 | 7
    assert guest.tables.refs[mfn] == guest.tables.count[mfn] == 2


def test_a_foreign_frame_is_refused(guest, foreign):
    """An entry that names another domain's frame or Xen's is -EBUSY, whatever its rights, one that
    names no memory -EPERM; writing into such a frame is -EINVAL, and the requests before it stay
    done."""
    machine = guest.machine
    before = machine.pages[foreign].tobytes(), machine.refs[foreign], machine.type_count[foreign]
    for mfn in (foreign, guest.domain.scratch_mfn, 1, machine.nr_frames, (1 << 40) - 1):
        for flags in (FULL, PTE_PRESENT):
            good = (l1_entry(guest, 60), guest.frames[5] << 12 | FULL)
            bad = (l1_entry(guest, 61), mfn << 12 | flags)
            rc = -errno.EBUSY if mfn < machine.nr_frames else -errno.EPERM
            rc = REFUSED if mfn == (1 << 40) - 1 else rc
            assert update(guest, good, bad, good) == (rc, 1)
            assert guest.machine.mem[guest.l1, 61] == 0
        assert update(guest, (mfn << 12, 0xBAD)) == (REFUSED, 0)
        assert update(guest, (mfn << 12 | 1, 0xBAD)) == (REFUSED, 0)
    after = machine.pages[foreign].tobytes(), machine.refs[foreign], machine.type_count[foreign]
    assert after == before


def test_no_table_is_mapped_writable(guest):
    """A writable entry for any page table, or for a page of descriptors, is -EBUSY; a read-only
    one is right."""
    (gdt,) = guest.unmap(5)
    assert guest.tables.get_type(gdt, PGT_SEG_DESC) == 0
    for mfn in (guest.l1, guest.l2, guest.l3, guest.l4, gdt):
        assert update(guest, (l1_entry(guest, 70), mfn << 12 | FULL)) == (BUSY, 0)
        assert update(guest, (l1_entry(guest, 70), mfn << 12 | READ_ONLY)) == (0, 1)
        assert guest.hv.call(UPDATE_VA_MAPPING, guest.va(70), mfn << 12 | FULL, 0, 0, 0) == BUSY


def test_an_update_of_an_ordinary_page(guest):
    """Eight bytes of a page that is no table are written as they are; the lowest three bits of an
    address are the command, of which there are four."""
    assert update(guest, (guest.frames[5] << 12 | 24, 0x1234567)) == (0, 1)
    assert guest.peek(5, 24, 8) == struct.pack("<Q", 0x1234567)
    for command in range(4, 8):
        assert update(guest, (guest.frames[5] << 12 | 24 | command, 1)) == (-errno.ENOSYS, 0)


def test_a_descriptor_page_is_not_written_by_mmu_update(guest):
    """A GDT page is no ordinary page: only update_descriptor writes there."""
    (gdt,) = guest.unmap(5)
    assert guest.tables.get_type(gdt, PGT_SEG_DESC) == 0
    assert update(guest, (gdt << 12, GATE)) == (REFUSED, 0)
    assert not guest.machine.mem[gdt].any()


def test_the_m2p_is_updated_for_own_frames(guest):
    """MMU_MACHPHYS_UPDATE sets the pfn of a frame, and the guest reads it in the m2p."""
    mfn = guest.frames[5]
    assert update(guest, (mfn << 12 | 1, 0xFACE)) == (0, 1)
    assert guest.machine.m2p[mfn] == 0xFACE
    assert guest.hv.read(M2P + 8 * mfn, 8) == struct.pack("<Q", 0xFACE)


def test_accessed_and_dirty_bits_are_preserved(guest):
    """MMU_PT_UPDATE_PRESERVE_AD keeps what the CPU set meanwhile; the plain command does not."""
    page = guest.frames[5] << 12
    for command, kept in ((2, 0x60), (0, 0), (3, 0)):
        guest.machine.mem[guest.l1, 5] = page | FULL
        assert update(guest, (l1_entry(guest, 5) | command, page | 5)) == (0, 1)
        assert guest.machine.mem[guest.l1, 5] == page | 5 | kept
        assert update(guest, (l1_entry(guest, 5), page | FULL)) == (0, 1)


def test_other_domains_tables_are_out_of_reach(guest, foreign):
    """Naming another domain as the owner is -ESRCH, and so is naming itself by its own number."""
    for domid in (0, 1, 2, 0x7FF2, SELF | 3 << 16):
        request = (l1_entry(guest, 50), guest.frames[5] << 12 | FULL)
        assert update(guest, request, domid=domid) == (-errno.ESRCH, 0)
        rc = 0 if domid & 0xFFFF == SELF else -errno.ESRCH  # here the upper half means nothing
        assert mmuext(guest, (CLEAR_PAGE, guest.frames[5]), domid=domid)[0] == rc
    assert update(guest, (l1_entry(guest, 50), 0), domid=SELF | 2 << 16) == (0, 1)
    assert guest.machine.mem[guest.l1, 50] == 0


def test_batches(guest):
    """An empty batch is fine, requests that are not there are -EFAULT once it is their turn; the
    count of those done need not be asked for, nor have a place."""
    assert update(guest) == (0, 0)
    assert update(guest, count=1 << 31)[0] == 0  # MMU_UPDATE_PREEMPTED, of none
    assert guest.hv.call(MMU_UPDATE, 0x1000, 1, 0, SELF, 0) == -errno.EFAULT
    assert guest.hv.call(MMU_UPDATE, guest.va(ARGS), 0, 0x1000, SELF, 0) == 0
    request = struct.pack("<QQ", l1_entry(guest, 50), guest.frames[5] << 12 | FULL)
    guest.poke(guest.nr - 1, 4096 - 32, 2 * request)
    last = guest.va(guest.nr - 1, 4096 - 32)  # behind it are the tables
    for count in (300, 1 << 30):
        assert guest.hv.call(MMU_UPDATE, last, count, guest.va(DONE), SELF, 0) < 0
        assert guest.peek(DONE, 0, 4) == struct.pack("<I", 2)
    assert update(guest, (l1_entry(guest, 50), 0), done=False) == (0, 99)


# -- update_va_mapping ---


def test_mapping_by_address(guest):
    """The L1 entry behind an address is set, whether anything was there or not; where there is no
    L1, and in Xen's part, it is -EINVAL."""
    mfn = guest.frames[5]
    for flags in range(4):
        assert guest.hv.call(UPDATE_VA_MAPPING, guest.va(99), mfn << 12 | 1, flags, 0, 0) == 0
        assert guest.machine.mem[guest.l1, 99] == mfn << 12 | 5
    for address in (0, guest.va(0) + (1 << 21), M2P, 0xFFFF_8080_0000_0000, 1 << 47, (1 << 64) - 1):
        before = guest.machine.mem[:, :].sum()
        assert guest.hv.call(UPDATE_VA_MAPPING, address, mfn << 12 | 7, 0, 0, 0) == REFUSED
        assert guest.machine.mem[:, :].sum() == before


def test_a_flush_is_asked_for_when_it_matters(guest):
    """Taking a mapping away by its address makes that page stale, and so does asking for it to be
    flushed; asking for all is all."""
    tables, page = guest.tables, guest.va(98)
    assert guest.hv.call(UPDATE_VA_MAPPING, page, guest.frames[5] << 12 | 1, 0, 0, 0) == 0
    assert not tables.stale_tlb
    assert tables.stale_pages == []
    assert guest.hv.call(UPDATE_VA_MAPPING, page, 0, 0, 0, 0) == 0
    assert tables.stale_pages == [page]
    tables.stale_pages.clear()
    guest.hv.call(UPDATE_VA_MAPPING, page, 0, 2, 0, 0)
    assert tables.stale_pages == [page]
    assert not tables.stale_tlb
    guest.hv.call(UPDATE_VA_MAPPING, page, 0, 1, 0, 0)
    assert tables.stale_tlb


# -- mmuext_op ---


@pytest.mark.parametrize("level", range(4))
def test_pin_and_unpin(guest, level):
    """PIN_Ln pins a table of level n once, UNPIN undoes it once; the count of operations done
    tells where a batch stopped."""
    (table,) = guest.unmap(5)
    assert mmuext(guest, (PIN_L1 + level, table), (PIN_L1 + level, table)) == (REFUSED, 1)
    assert guest.tables.ptype[table] == PGT_L1 + level
    assert guest.machine.pinned[table] == 1
    assert mmuext(guest, (UNPIN, table), (UNPIN, table)) == (REFUSED, 1)
    assert guest.tables.count[table] == 0


def test_pins_of_what_is_not_ones_own(guest, foreign):
    """A foreign frame is neither pinned nor unpinned, cleared or copied from."""
    before = guest.machine.pages[foreign].tobytes()
    for command in (PIN_L1, 1, 2, 3, UNPIN, NEW_BASEPTR, NEW_USER_BASEPTR, CLEAR_PAGE, COPY_PAGE):
        assert mmuext(guest, (command, foreign, guest.frames[5])) == (REFUSED, 0)
    assert mmuext(guest, (COPY_PAGE, guest.frames[5], foreign)) == (REFUSED, 0)
    assert mmuext(guest, (COPY_PAGE, guest.frames[5], 1)) == (REFUSED, 0)
    assert guest.machine.pages[foreign].tobytes() == before
    assert not any(guest.peek(5, 0, 4096))


def second_l4(guest):
    """Another L4 that maps what the first one maps."""
    (table,) = guest.unmap(5)
    guest.machine.mem[table, 0] = guest.l3 << 12 | FULL
    assert mmuext(guest, (3, table)) == (0, 1)
    return table


def test_another_base_pointer(guest):
    """NEW_BASEPTR takes the new L4 and gives the old one back; the same one again is no change;
    what is no L4 is refused and the old one stays."""
    new, count = second_l4(guest), guest.tables.count
    assert mmuext(guest, (NEW_BASEPTR, new), (NEW_BASEPTR, new)) == (0, 2)
    assert guest.vcpu.cr3 == new << 12
    assert (count[new], count[guest.l4]) == (2, 1)
    for bad in (guest.l3, guest.frames[6], 0):
        assert mmuext(guest, (NEW_BASEPTR, bad)) == (REFUSED, 0)
        assert guest.vcpu.cr3 == new << 12


def test_another_user_base_pointer(guest):
    """NEW_USER_BASEPTR likewise; frame 0 means none."""
    new, count = second_l4(guest), guest.tables.count
    assert mmuext(guest, (NEW_USER_BASEPTR, new), (NEW_USER_BASEPTR, new)) == (0, 2)
    assert guest.vcpu.context.ctrlreg[1] == new << 12
    assert count[new] == 2
    assert mmuext(guest, (NEW_USER_BASEPTR, guest.frames[6])) == (REFUSED, 0)
    assert mmuext(guest, (NEW_USER_BASEPTR, 0)) == (0, 1)
    assert count[new] == 1
    assert guest.vcpu.context.ctrlreg[1] == 0


def test_the_table_in_use_cannot_be_taken_apart(guest):
    """Unpinning the L4 in cr3 leaves it in use: it is still a table, still not writable."""
    assert mmuext(guest, (UNPIN, guest.l4)) == (0, 1)
    assert guest.tables.ptype[guest.l4] == PGT_L4
    assert guest.tables.ptype[guest.l3] == PGT_L3
    assert update(guest, (l1_entry(guest, 70), guest.l4 << 12 | FULL)) == (BUSY, 0)


def test_clear_and_copy(guest):
    """CLEAR_PAGE and COPY_PAGE write ordinary pages, and only those."""
    guest.poke(5, 0, b"from")
    five, six = guest.frames[5:7]
    assert mmuext(guest, (COPY_PAGE, six, five)) == (0, 1)
    assert guest.peek(6, 0, 4) == b"from"
    assert mmuext(guest, (CLEAR_PAGE, six)) == (0, 1)
    assert not any(guest.peek(6, 0, 4096))
    before = guest.machine.pages[guest.l1].tobytes()
    assert mmuext(guest, (COPY_PAGE, guest.l1, five)) == (REFUSED, 0)
    assert mmuext(guest, (CLEAR_PAGE, guest.l1)) == (REFUSED, 0)
    assert guest.machine.pages[guest.l1].tobytes() == before


def test_flushes_and_the_rest(guest):
    """Every flush makes the TLB stale, or a page of it, of some vCPUs only with their mask; an
    empty LDT is fine, another is not, and where none can be it is -EINVAL; caches are not a
    guest's to flush; what does not exist is -ENOSYS."""
    for command in (6, 8, 10):
        guest.tables.stale_tlb = False
        assert mmuext(guest, (command, 0, guest.va(DONE))) == (0, 1)
        assert guest.tables.stale_tlb
    guest.tables.stale_tlb = False
    for command in (7, 9, 11):
        assert mmuext(guest, (command, guest.va(command), guest.va(DONE))) == (0, 1)
    assert not guest.tables.stale_tlb
    assert guest.tables.stale_pages == [guest.va(command) for command in (7, 9, 11)]
    for command in (8, 9):
        assert mmuext(guest, (command, 0, 0x1000)) == (REFUSED, 0)
    assert mmuext(guest, (13, 0, 0)) == (0, 1)
    for address, nr in ((8, 5), (0, 8193), (0xFFFF_8000_0000_0000, 5), (1 << 47, 5)):
        assert mmuext(guest, (13, address, nr)) == (REFUSED, 0)
    refused = {12: errno.EACCES, 18: errno.EINVAL, 19: errno.EOPNOTSUPP, 20: errno.EOPNOTSUPP}
    for command, error in refused.items():
        assert mmuext(guest, (command, 0)) == (-error, 0)
    for op in ((14, 0), (21, 0), (1 << 31, 0)):
        assert mmuext(guest, op) == (-errno.ENOSYS, 0)
