"""Kernels: what is accepted, and that anything else is refused in one way."""

from __future__ import annotations

import struct

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.guest import elves
from tests.guest.elves import BASE, TEXT, make_elf, note, notes, number
from tests.guest.rig import KERNEL_ELF
from xsave.errors import HostCannotTake
from xsave.guest.xen import elf
from xsave.guest.xen.elf import Kernel, parse

SMALL = make_elf()


def refused(data):
    """Parse what must be refused; return the message."""
    with pytest.raises(HostCannotTake) as caught:
        parse(data, "some/kernel")
    message = str(caught.value)
    assert message.startswith("some/kernel: ")
    assert "\n" not in message
    return message


def test_the_built_in_kernel():
    """The shipped kernel is read: its entry lies in its first segment, its end behind all."""
    kernel = parse(KERNEL_ELF.read_bytes(), "kernel")
    assert kernel.virt_base == BASE
    first = kernel.segments[0]
    assert first.paddr <= kernel.entry - BASE < first.paddr + first.memory_bytes
    assert kernel.end == max(s.paddr + s.memory_bytes for s in kernel.segments)


def test_segments_and_notes_of_a_small_kernel():
    """Segments with memory are kept in order, empty ones are not; numeric notes of Xen's are
    numbers, strings are zeros, other owners' are ignored, and the last of a kind wins."""
    more = (
        note(elf.NOTE_XEN_VERSION, b"xen-3.0\0\0\0\0\0")
        + note(elf.NOTE_INIT_P2M, struct.pack("<Q", 5), name=b"GNU's\0")
        + note(elf.NOTE_MOD_START_PFN, struct.pack("<I", 1))
        + number(elf.NOTE_ENTRY, 0x77)
    )
    data = make_elf([(0x3000, b"abc", 10), (0, b"", 0), (0x1000, TEXT, 6000)], notes() + more)
    kernel = parse(data, "small")
    assert [(s.paddr, s.file_bytes, s.memory_bytes) for s in kernel.segments] == [
        (0x3000, 3, 10),
        (0x1000, len(TEXT), 6000),
    ]
    assert data[kernel.segments[0].offset :][:3] == b"abc"
    assert kernel.end == 0x300A
    assert kernel.entry == 0x77
    assert kernel.notes[elf.NOTE_XEN_VERSION] == 0
    assert kernel.notes[elf.NOTE_MOD_START_PFN] == 1
    assert elf.NOTE_INIT_P2M not in kernel.notes


def test_a_kernel_without_a_base_is_linked_where_linux_is():
    """VIRT_BASE has the default of libelf; ENTRY has none."""
    assert parse(make_elf(note_bytes=number(elf.NOTE_ENTRY, 1)), "x").virt_base == BASE
    assert "XEN_ELFNOTE_ENTRY" in refused(make_elf(note_bytes=b""))
    assert "XEN_ELFNOTE_ENTRY" in refused(make_elf(note_bytes=notes().replace(b"Xen", b"Zen")))


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "an ELF file or a bzImage"),
        (b"\x7fELF", "truncated"),
        (SMALL[:4] + b"\x01" + SMALL[5:], "little-endian x86-64"),
        (SMALL[:5] + b"\x02" + SMALL[6:], "little-endian x86-64"),
        (make_elf(machine=3), "little-endian x86-64"),
        (make_elf(phnum=60000), "truncated"),
        (make_elf(phoff=1 << 63), "truncated"),
        (make_elf(phoff=(1 << 64) - 1), "truncated"),
        (SMALL[:-1], "outside the file"),
        (make_elf([(0x1000, TEXT, 100)]), "outside the file"),
        (make_elf([]), "nothing to load"),
        (make_elf([(0x1000, b"", 257 << 20)]), "256 MiB"),
        (make_elf([(1 << 63, b"a", 1)]), "256 MiB"),
        (make_elf([((1 << 64) - 1, b"a", (1 << 64) - 1)]), "256 MiB"),
    ],
)
def test_what_is_wrong_is_named(data, says):
    """Each way of being no kernel has its own words."""
    assert says in refused(data)


def parse_or_refuse(data):
    """The one property of any bytes."""
    try:
        kernel = parse(data, "k")
    except HostCannotTake:
        return
    assert isinstance(kernel, Kernel)
    assert kernel.entry >= 0
    assert 0 < kernel.end <= 256 << 20
    for segment in kernel.segments:
        assert segment.offset + segment.file_bytes <= len(data)
        assert segment.file_bytes <= segment.memory_bytes


@given(st.binary(max_size=300))
@example(b"\x7fELF" + bytes(60))
def test_any_bytes(data):
    """Any bytes are a kernel with what a kernel must have, or HostCannotTake."""
    parse_or_refuse(data)
    parse_or_refuse(b"\x7fELF\x02\x01" + data)


words = st.sampled_from([0, 1, 0xFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF])
damage = st.lists(st.tuples(st.integers(0, len(SMALL) - 1), st.binary(min_size=1, max_size=8)))
headers = elves.HEADER.size + 2 * elves.PROGRAM.size


@given(damage, st.integers(0, len(SMALL)))
def test_a_damaged_kernel(changes, cut):
    """A kernel with bytes overwritten, or cut short, is a kernel or HostCannotTake."""
    data = bytearray(SMALL)
    for at, blob in changes:
        data[at : at + len(blob)] = blob
    parse_or_refuse(bytes(data[: len(SMALL)]))
    parse_or_refuse(bytes(data[:cut]))


@given(st.integers(0, headers // 4 - 1), words, st.integers(0, headers // 4 - 1), words)
def test_extreme_headers(first, one, second, two):
    """Any two words of the headers may be extreme: a kernel or HostCannotTake."""
    data = bytearray(SMALL)
    struct.pack_into("<I", data, 4 * first, one)
    struct.pack_into("<I", data, 4 * second, two)
    parse_or_refuse(bytes(data))


@given(st.binary(max_size=120))
def test_any_notes(blob):
    """Any bytes in a note segment are read without complaint, and the good notes before them
    still count."""
    kernel = parse(make_elf(note_bytes=notes() + blob), "k")
    assert elf.NOTE_ENTRY in kernel.notes
