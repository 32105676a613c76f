"""The domain builder: what a kernel finds at its start of day."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest

from tests.guest.elves import BASE, HEADER, TEXT, make_elf, notes
from tests.guest.pagetable_model import recount
from tests.guest.rig import KERNEL_ELF, MIB, Guest, Machines, build_guest, make_domain
from xsave.errors import HostCannotTake
from xsave.frames import INVALID_M2P_ENTRY, PTE_NX
from xsave.guest.xen import builder, elf
from xsave.guest.xen.pagetypes import PGT_L4, PGT_WRITABLE
from xsave.guest.xen.vcpu import FLAT_RING3_CS64, FLAT_RING3_SS64
from xsave.public import START_INFO_MAGIC, StartInfo

P2M_AT = 0xFFFF_C900_0000_0000
RAMDISK = bytes(range(251)) * 60  # almost four pages


class Built:
    """A domain after its builder, seen through its own page tables."""

    def __init__(self, machine, data, *, nr_pages=4 * MIB, ramdisk=b"", cmdline="", domid=1):
        self.machine = machine
        self.kernel = elf.parse(data, "kernel")
        self.domain = make_domain(machine, domid, max_pages=nr_pages)
        builder.build(self.domain, self.kernel, ramdisk, cmdline)
        self.nr_pages = nr_pages
        self.context = self.domain.vcpus[0].context
        self.l4 = self.context.ctrlreg[3] >> 12
        self.info = StartInfo.from_buffer_copy(self.read(self.context.user_regs.rsi, 1168))
        raw = self.read(self.info.mfn_list, 8 * nr_pages)
        self.p2m = np.frombuffer(raw, np.uint64)

    def walk(self, address, *, write=False):
        return self.domain.tables.walk(self.l4, address, write)

    def read(self, address, nr):
        """Guest memory, page by page through the page tables."""
        out = b""
        while nr:
            chunk = min(4096 - (address & 0xFFF), nr)
            at = self.walk(address)
            assert at >= 0, f"{address:#x} is not mapped"
            out += self.machine.map[at : at + chunk]
            address, nr = address + chunk, nr - chunk
        return out

    def pfn(self, address):
        return int(self.machine.m2p[self.walk(address) >> 12])

    def first_behind(self):
        """The first pfn of what lies behind all that is mapped at the kernel's base."""
        behind = [self.nr_pages]
        if self.kernel.notes.get(elf.NOTE_MOD_START_PFN) and self.info.mod_len:
            behind.append(self.info.mod_start)
        if elf.NOTE_INIT_P2M in self.kernel.notes:
            behind.append(self.info.first_p2m_pfn)
        return min(behind)

    def mapped_pages(self):
        """How many pages are mapped from the kernel's base on without a gap."""
        base = self.kernel.virt_base
        return next(i for i in range(1 << 20) if self.walk(base + (i << 12)) < 0)


KERNELS = {
    "built-in": KERNEL_ELF.read_bytes(),
    "small": make_elf(),
    "across pages": make_elf(
        [(0x1000, TEXT, 5100), (0x1000 + 5100, TEXT * 2, 10300), (0x8010, TEXT[:20], 20)]
    ),
    "with a p2m of its own": make_elf(note_bytes=notes(INIT_P2M=P2M_AT, MOD_START_PFN=1)),
    "in the lower half": make_elf(note_bytes=notes(base=0x10_0000_0000)),
}


@pytest.fixture(scope="module", params=KERNELS)
def built(request):
    """Each kernel, with a ramdisk and a command line, on a machine of its own."""
    machines = Machines()
    yield Built(
        machines.make(16 * MIB), KERNELS[request.param], ramdisk=RAMDISK, cmdline="one two=3"
    )
    machines.close()


def test_the_p2m_is_the_guests_frames(built):
    """mfn_list holds every frame of the guest once, m2p is its inverse, and the guest owns no
    other frame but Xen's."""
    machine, p2m = built.machine, built.p2m
    assert np.unique(p2m).size == built.nr_pages
    assert (machine.owner[p2m] == 1).all()
    assert (machine.m2p[p2m] == np.arange(built.nr_pages)).all()
    assert built.domain.nr_pages() == built.nr_pages
    others = np.setdiff1d(np.arange(machine.nr_frames), p2m)
    assert (machine.m2p[others] == INVALID_M2P_ENTRY).all()


def test_memory_is_mapped_linearly(built):
    """Page i of the kernel's area is pfn i, up to at least 512 KiB behind the boot stack and to a
    4 MiB boundary or the end of memory."""
    base, nr = built.kernel.virt_base, built.mapped_pages()
    assert all(built.pfn(base + (i << 12)) == i for i in range(nr))
    assert nr == built.nr_pages or nr % (4 * MIB) == 0
    stack = (built.context.user_regs.rsp - base) >> 12
    assert nr >= min(stack + 128, built.nr_pages)


def test_the_kernel_is_where_it_was_linked(built):
    """Each segment's bytes are at their address, its remaining memory is zero, and so is what
    nothing was put into."""
    for segment in built.kernel.segments:
        raw = built.read(built.kernel.virt_base + segment.paddr, segment.memory_bytes)
        end = segment.offset + segment.file_bytes
        assert raw[: segment.file_bytes] == built.kernel.data[segment.offset : end]
        assert not any(raw[segment.file_bytes :])
    stack_pfn = (built.context.user_regs.rsp - built.kernel.virt_base >> 12) - 1
    assert not built.machine.mem[built.p2m[0]].any()
    assert not built.machine.mem[built.p2m[stack_pfn : built.first_behind()]].any()


def test_start_info(built):
    """rsi points to a start_info that says where everything is."""
    info, domain, base = built.info, built.domain, built.kernel.virt_base
    assert info.magic == START_INFO_MAGIC
    assert info.nr_pages == built.nr_pages
    assert info.shared_info == domain.shared_info_mfn << 12
    assert info.cmd_line == b"one two=3"
    assert info.pt_base == base + (int(built.machine.m2p[built.l4]) << 12)
    for mfn, port, page in (
        (info.store_mfn, info.store_evtchn, domain.store_page),
        (info.console_mfn, info.console_evtchn, domain.console.page),
    ):
        assert domain.owns(mfn)
        assert domain.events.ports[port].kind == "interdomain"
        built.machine.pages[mfn, 4000] = 0x5A
        assert page[4000] == 0x5A
        built.machine.pages[mfn, 4000] = 0
    assert info.nr_p2m_frames == -(-built.nr_pages // 512)
    list_at = base + (info.first_p2m_pfn << 12)
    if elf.NOTE_INIT_P2M in built.kernel.notes:
        assert info.mfn_list == P2M_AT
        assert built.walk(P2M_AT, write=True) >= 0
        assert built.pfn(P2M_AT) == info.first_p2m_pfn
    else:
        assert info.mfn_list == list_at


def test_the_ramdisk(built):
    """The ramdisk is in memory, and start_info says where: by address, or by pfn for a kernel
    that asked for that."""
    info, base = built.info, built.kernel.virt_base
    assert info.mod_len == len(RAMDISK)
    by_pfn = bool(built.kernel.notes.get(elf.NOTE_MOD_START_PFN))
    assert info.flags == (8 if by_pfn else 0)
    first = info.mod_start if by_pfn else (info.mod_start - base) >> 12
    pages = built.machine.pages[built.p2m[first : first + -(-len(RAMDISK) // 4096)]]
    assert pages.tobytes() == RAMDISK.ljust(pages.size, b"\0")
    if not by_pfn:
        assert built.read(info.mod_start, len(RAMDISK)) == RAMDISK


def test_what_is_not_in_the_mapping_lies_behind_it(built):
    """What a kernel takes by pfn, or maps itself, lies behind the kernel's mapping, if memory does
    not end before; the ramdisk and the p2m list overlap nothing."""
    stack = (built.context.user_regs.rsp - built.kernel.virt_base) >> 12
    assert built.first_behind() >= stack
    roomy = built.nr_pages - built.mapped_pages() > 64
    assert built.first_behind() >= built.mapped_pages() or not roomy
    info = built.info
    if elf.NOTE_INIT_P2M in built.kernel.notes:
        assert info.first_p2m_pfn == info.mod_start + -(-len(RAMDISK) // 4096)


def test_page_tables_are_read_only_and_pinned(built):
    """The tables form one block of pages, typed, mapped read-only wherever they are mapped; all
    else is writable; the L4 alone is pinned, and held once more by cr3."""
    machine, info = built.machine, built.info
    first = int(info.pt_base - built.kernel.virt_base) >> 12
    tables = set(range(first, first + info.nr_pt_frames))
    types = machine.page_type[built.p2m]
    assert set(np.flatnonzero((types >= 1) & (types <= PGT_L4)).tolist()) == tables
    for i in range(built.mapped_pages()):
        address = built.kernel.virt_base + (i << 12)
        assert (built.walk(address, write=True) >= 0) == (i not in tables)
    assert np.flatnonzero(machine.pinned).tolist() == [built.l4]
    assert machine.type_count[built.l4] == 2


def test_only_code_is_executable(built):
    """Pages of executable segments are executable, in part or all of one, and nothing else is; a
    kernel without any such segment is executable as a whole."""
    code = {
        pfn
        for segment in built.kernel.segments
        if segment.executable
        for pfn in range(segment.paddr >> 12, segment.paddr + segment.memory_bytes + 4095 >> 12)
    }
    assert code
    for i in range(built.mapped_pages()):
        slot = built.domain.tables.l1_slot(built.l4, built.kernel.virt_base + (i << 12))
        assert (built.domain.tables.q[slot >> 3] & PTE_NX == 0) == (i in code)


def test_a_kernel_without_code_is_all_code(machine):
    """Program headers that call nothing executable are not believed."""
    data = bytearray(make_elf())
    data[HEADER.size + 4] = 6  # p_flags: read and write
    guest = Built(machine, bytes(data))
    slot = guest.domain.tables.l1_slot(guest.l4, guest.kernel.virt_base + 0x1000)
    assert not guest.kernel.segments[0].executable
    assert not guest.domain.tables.q[slot >> 3] & PTE_NX


def test_counts_are_what_the_tables_say(built):
    """Types and references are those of a recount; the rings are held by Xen as well."""
    machine, frames = built.machine, built.p2m.tolist()
    uses, refs = recount(machine, frames)
    held = {built.l4: 2, built.info.store_mfn: 1, built.info.console_mfn: 1}
    for mfn in frames:
        assert machine.type_count[mfn] == uses[mfn] + held.get(mfn, 0)
        assert machine.refs[mfn] == refs[mfn]
        if uses[mfn] and not 1 <= machine.page_type[mfn] <= PGT_L4:
            assert machine.page_type[mfn] == PGT_WRITABLE


def test_the_vcpu_starts_at_the_entry(built):
    """rip is the entry note's, with flat ring-3 selectors and the boot stack, in the kernel."""
    regs = built.context.user_regs
    assert regs.rip == built.kernel.entry
    assert (regs.cs, regs.ss) == (FLAT_RING3_CS64, FLAT_RING3_SS64)
    assert regs.rsp == built.context.kernel_sp
    assert built.walk(regs.rsp - 8, write=True) >= 0
    assert built.domain.vcpus[0].in_kernel


# -- other kernels ---


def test_segments_overlap_pages(machine):
    """Segments may begin and end inside a page, and share one."""
    data = make_elf([(0x1000, TEXT, 5100), (0x1000 + 5100, b"tail", 9000)])
    built = Built(machine, data)
    assert built.read(BASE + 0x1000, 5104) == TEXT + b"tail"
    assert not any(built.read(BASE + 0x1000 + 5104, 8996))


@pytest.mark.parametrize("kernel_pages", [600, 850, 870, 890, 950, 1000, 1010, 1020])
def test_there_is_room_behind_the_stack(machine, kernel_pages):
    """Wherever the kernel ends, 512 KiB behind the boot stack are mapped, and no 4 MiB more."""
    built = Built(machine, make_elf([(0x1000, TEXT, kernel_pages << 12)]), nr_pages=2900)
    stack = (built.context.user_regs.rsp - BASE) >> 12
    assert stack + 128 <= built.mapped_pages() < stack + 128 + 4 * MIB


def test_two_builds_of_a_seed_are_alike(machines):
    """The same kernel on two machines of one seed is the same, byte for byte; on another seed it
    has other frames, and the same pages but for those that hold mfns."""
    one, same, other = (
        Built(machines.make(16 * MIB, seed), KERNELS["built-in"]) for seed in (1, 1, 2)
    )
    assert one.machine.map[:] == same.machine.map[:]
    assert (one.p2m != other.p2m).any()
    kernel_pages = -(-one.kernel.end // 4096)
    ours, theirs = (b.machine.pages[b.p2m[:kernel_pages]] for b in (one, other))
    assert (ours == theirs).all()


def build_refused(machine, data=KERNELS["small"], **more):
    """Build what must be refused; return the message."""
    with pytest.raises(HostCannotTake) as caught:
        Built(machine, data, **more)
    return str(caught.value)


@pytest.mark.parametrize("kernel", ["small", "with a p2m of its own"])
def test_too_little_memory(machine, kernel):
    """A domain too small for its kernel is refused with both sizes; one page more will do."""
    data = KERNELS[kernel]
    message = build_refused(machine, data, nr_pages=9, ramdisk=RAMDISK)
    needed = int(message.split("need ")[1].split()[0]) // 4
    assert "36 KiB" in message
    machine.free_domain(1)
    assert "alone need" in build_refused(machine, data, nr_pages=needed - 1, ramdisk=RAMDISK)
    machine.free_domain(1)
    built = Built(machine, data, nr_pages=needed, ramdisk=RAMDISK)
    first = built.info.mod_start
    first = first if built.info.flags else (first - BASE) >> 12
    pages = machine.pages[built.p2m[first : first + 4]].tobytes()
    assert pages[: len(RAMDISK)] == RAMDISK
    assert built.p2m.size == needed


def test_a_command_line_too_long(machine):
    """1023 bytes of command line fit, 1024 are refused."""
    assert "1023" in build_refused(machine, cmdline="x" * 1024)
    machine.free_domain(1)
    assert Built(machine, KERNELS["small"], cmdline="x" * 1023).info.cmd_line == b"x" * 1023


@pytest.mark.parametrize(
    "base",
    [
        0xFFFF_8000_0000_0000,  # Xen's
        0xFFFF_87FF_FFFF_F000,
        0xFFFF_FFFF_FFFF_F000,  # runs over the end of the address space
        0x7FFF_FFFF_F000,  # runs into the hole
        0x0000_8000_0000_0000,  # in the hole
        BASE + 1,
        (1 << 64) - 1,
    ],
)
def test_a_kernel_that_wants_to_be_elsewhere(machine, base):
    """A kernel linked, or with a p2m, where no guest can be is refused by its address."""
    assert f"{base:#x}" in build_refused(machine, make_elf(note_bytes=notes(base=base)))
    machine.free_domain(1)
    assert f"{base:#x}" in build_refused(machine, make_elf(note_bytes=notes(INIT_P2M=base)))


def test_a_second_guest_beside_the_first(machine):
    """Building another guest touches nothing of the first one's frames."""
    first = Guest(machine, domid=1)
    before = machine.pages[first.frames].tobytes()
    build_guest(machine, 2)
    assert machine.pages[first.frames].tobytes() == before
    assert ctypes.sizeof(StartInfo) == 1168
