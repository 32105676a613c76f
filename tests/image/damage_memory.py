"""Damaged images: pfns, p2m pages, page tables."""

from __future__ import annotations

import numpy as np

from tests.image import synthetic as s
from tests.image import synthetic_kinds as kinds
from tests.image.damage import added, entry, pv, sample
from tests.image.pieces import index, without
from xsave.image import libxc


@sample("coverage")
def lost_batch():
    def edit(pieces):
        at = index(pieces, "PAGE_DATA")
        return pieces[: at + 1] + pieces[at + 2 :]

    return pv(edit)


@sample("coverage")
def lost_last_batch():
    """Only ballooned pfns are lost: a p2m that ends too late for what came."""

    def edit(pieces):
        image = s.PvImage()
        image.batch = 16
        kept = image.batches()[:-1]
        others = without(pieces, "PAGE_DATA")
        at = index(others, "X86_TSC_INFO")
        return others[:at] + kept + others[at:]

    return pv(edit)


@sample("pfn-range")
def pfn_behind_the_p2m():
    image = s.PvImage()
    batch = image.page_batch(np.array([s.DATA]))
    batch.pfns[0] = 300
    return image.encode(edit=added(batch, before="X86_TSC_INFO"))


@sample("page-type")
def l4_table_in_32_bit_guest():
    image = kinds.Pv32Image()
    image.types[s.DATA] = 4
    image.pages[s.DATA] = 0
    return _read_only(image, s.DATA)


@sample("page-type")
def table_in_hvm_guest():
    image = kinds.HvmImage()
    image.types[s.DATA] = 1
    return image.encode()


def _read_only(image, pfn):
    """Return the image with the direct mapping of a page made read-only."""
    image.table(s.L1)[pfn] &= ~np.uint64(s.RW)
    return image.encode()


@sample("p2m-frames")
def p2m_page_ballooned_out():
    return pv(p2m_frames=np.array([250], np.uint64))


@sample("p2m-frames")
def p2m_page_is_a_table():
    return pv(p2m_frames=np.array([s.L1], np.uint64))


@sample("p2m-frames")
def p2m_page_out_of_range():
    return pv(p2m_frames=np.array([1 << 40], np.uint64))


@sample("p2m-frames")
def too_few_p2m_frames():
    return pv(p2m_frames=np.array([], np.uint64))


@sample("p2m-frames")
def p2m_frames_with_a_gap():
    """A second list far behind the first."""
    record = libxc.X86PvP2mFrames(1 << 30, 1 << 30, np.array([s.P2M], np.uint64))
    return pv(added(record, before="PAGE_DATA"))


@sample("p2m-frames")
def one_p2m_page_for_two():
    """All 1024 pfns of the two p2m pages are there, and both share one page."""
    image = s.PvImage()
    image.end_pfn, image.p2m_frames = 1023, np.array([s.P2M, s.P2M], np.uint64)
    image.shared_info.arch.max_pfn = 1024
    rest = np.arange(s.NR_PFNS, 1024, dtype=np.uint64)
    types = np.full(len(rest), 0xF, np.uint8)
    types[-1] = 0xE
    batch = libxc.PageBatch(rest, types, np.zeros((0, 4096), np.uint8))
    return image.encode(edit=added(batch, before="X86_TSC_INFO"))


@sample("pte-range")
def entry_to_nowhere():
    return entry(s.L1, 5, 0x9999 << 12 | s.FLAGS)


@sample("pte-range")
def upper_entry_to_nowhere():
    return entry(s.L2, 1, 0x9999 << 12 | s.FLAGS)


@sample("pte-range")
def entry_to_nowhere_in_a_version_that_was_replaced():
    """libxc localises every version of a table that comes, so the first one is fatal too."""
    image = s.PvImage()
    good = image.batches([s.L1])[0]
    image.table(s.L1)[5] = 0x9999 << 12 | s.FLAGS
    pieces = image.pieces()
    at = index(pieces, "X86_TSC_INFO")
    return b"".join(piece.data for piece in [*pieces[:at], good, *pieces[at:]])


@sample("pte-level")
def l2_entry_names_data():
    return entry(s.L2, 1, s.DATA << 12 | s.FLAGS)


@sample("pte-level")
def l3_entry_names_l1_table():
    return entry(s.L3, 1, s.L1 << 12 | s.FLAGS)


@sample("pte-level")
def l4_entry_names_a_hole():
    return entry(s.L4, 300, 250 << 12 | s.FLAGS)


@sample("pte-level")
def l1_table_typed_as_data():
    """Its pages stay mapped writable by nobody, but the L2 entry has lost its table."""
    image = s.PvImage()
    image.types[s.L1_USER] = 0
    return image.encode()


@sample("pte-flags")
def uncached_mapping():
    return entry(s.L1, s.DATA, s.DATA << 12 | s.FLAGS | s.RW | 0x10)


@sample("pte-flags")
def superpage():
    return entry(s.L2, 0, s.L1 << 12 | s.FLAGS | s.RW | 0x80)


@sample("pte-flags")
def global_bit_above_l1():
    return entry(s.L2, 0, s.L1 << 12 | s.FLAGS | s.RW | 0x100)


@sample("pte-writable")
def table_mapped_writable():
    return entry(s.L1, s.L2, s.L2 << 12 | s.FLAGS | s.RW)


@sample("pte-writable")
def gdt_mapped_writable():
    return entry(s.L1, s.GDT, s.GDT << 12 | s.FLAGS | s.RW)


@sample("pte-hole")
def ballooned_page_mapped():
    return entry(s.L1, 250, 250 << 12 | s.FLAGS)


@sample("pte-linear")
def table_maps_itself():
    return entry(s.L4, 300, s.L4 << 12 | 1)


@sample("l4-xen-slots")
def entry_in_a_slot_of_xen():
    return entry(s.L4, 256, s.DATA << 12 | 1)


@sample("table-unused")
def table_that_nobody_reaches():
    image = s.PvImage()
    image.types[s.DATA] = 1
    image.pages[s.DATA] = 0
    image.table(s.DATA)[0] = s.L4 << 12 | s.FLAGS | s.RW
    return image.encode()


@sample("repeated")
def pages_sent_twice():
    return pv(resent=[s.DATA, s.DATA + 1])


@sample("batch")
def pfn_twice_in_a_batch():
    image = s.PvImage()
    batch = image.page_batch(np.array([s.DATA, s.DATA]))
    return image.encode(edit=added(batch, before="X86_TSC_INFO"))


@sample("batch")
def batch_too_long():
    pfns, types = np.arange(2048, dtype=np.uint64), np.full(2048, 0xF, np.uint8)
    batch = libxc.PageBatch(pfns, types, np.zeros((0, 4096), np.uint8))
    return kinds.HvmImage().encode(edit=added(batch, before="PAGE_DATA"))


@sample("host-frames")
def mfn_in_p2m_page():
    image = s.PvImage()
    image.pages[s.P2M].view("<u8")[7] = 0x13579
    return image.encode()
