"""Images whose records are sound one by one and say what cannot be.

The invariant is in ruined.py.
"""

from __future__ import annotations

import struct

import pytest

from tests.flows.flow import MIB
from tests.flows.ruined import PIECES, SOUND, damaged, error_of, one_vcpu, refused
from tests.image import damage_host, damage_memory, damage_stream, damage_vcpu
from tests.image.damage import SAMPLES
from tests.image.pieces import index, replaced
from tests.image.synthetic import (
    DATA,
    GDT,
    L1,
    L1_USER,
    L2,
    L3,
    L4,
    L4_USER,
    NR_PFNS,
    NR_POPULATED,
)
from xsave.errors import HostCannotTake, ImageError, OutOfFrames, UsageError, XsaveError
from xsave.host.host import add_host

#: The modules that register samples of damage when they are imported.
DAMAGE = (damage_host, damage_memory, damage_stream, damage_vcpu)
FLAGS = 0x67


def entry(pfn, slot, value):
    """An image with one page-table entry replaced."""
    image = one_vcpu()
    image.table(pfn)[slot] = value
    return image


def typed(pfn, page_type):
    """An image with the type of one page replaced."""
    image = one_vcpu()
    image.types[pfn] = page_type
    return image


def vcpu(**fields):
    """An image with fields of vCPU 0's context replaced."""
    image = one_vcpu()
    for name, value in fields.items():
        setattr(image.vcpus[0], name, value)
    return image


def control(register, value):
    """An image with a control register of vCPU 0 replaced."""
    image = one_vcpu()
    image.vcpus[0].ctrlreg[register] = value
    return image


def rings(**fields):
    """An image with fields of start_info replaced."""
    image = one_vcpu()
    for name, value in fields.items():
        setattr(image.start_info, name, value)
    return image


def registers(**fields):
    """An image with registers of vCPU 0 replaced."""
    image = one_vcpu()
    for name, value in fields.items():
        setattr(image.vcpus[0].user_regs, name, value)
    return image


def gdt(pfn):
    """An image whose GDT is in another page."""
    image = one_vcpu()
    image.vcpus[0].gdt_frames[0] = pfn
    return image


def p2m(*pfns):
    """An image with other p2m pages."""
    image = one_vcpu()
    image.p2m_frames[:] = pfns
    return image


OUTSIDE = NR_PFNS + 5
BAD_GUESTS = {
    "an entry to nowhere": lambda: entry(L1, 3, OUTSIDE << 12 | FLAGS),
    "an entry far away": lambda: entry(L1, 3, 0xFFFFF_FFFFF << 12 | FLAGS),
    "an upper entry to nowhere": lambda: entry(L4, 273, OUTSIDE << 12 | FLAGS),
    "an upper entry to a plain page": lambda: entry(L2, 0, DATA << 12 | FLAGS),
    "an entry two levels down": lambda: entry(L3, 0, L1 << 12 | FLAGS),
    "a table that names itself": lambda: entry(L3, 0, L3 << 12 | FLAGS),
    "a superpage": lambda: entry(L2, 0, DATA << 12 | FLAGS | 0x80),
    "a writable table": lambda: entry(L1, L1, L1 << 12 | FLAGS),
    "a writable GDT": lambda: entry(L1, GDT, GDT << 12 | FLAGS),
    "a table that is called a page": lambda: typed(L2, 0),
    "a page that is called a table": lambda: typed(DATA, 9),
    "a table of another level": lambda: typed(L2, 3),
    "a pin of another level": lambda: typed(L4, 0xB),
    "a table that is not there": lambda: typed(L3, 0xF),
    "cr3 to nowhere": lambda: control(3, OUTSIDE << 12),
    "cr3 far away": lambda: control(3, 0xFFFFFFFFFFFFF000),
    "cr3 of a page": lambda: control(3, DATA << 12),
    "cr3 of a lower table": lambda: control(3, L3 << 12),
    "cr1 to nowhere": lambda: control(1, OUTSIDE << 12 | 1),
    "cr1 of a page": lambda: control(1, DATA << 12 | 1),
    "start_info to nowhere": lambda: registers(rdx=OUTSIDE),
    "start_info far away": lambda: registers(rdx=1 << 63),
    "start_info in a table": lambda: registers(rdx=L1_USER),
    "start_info not there": lambda: registers(rdx=NR_POPULATED + 1),
    "the store ring to nowhere": lambda: rings(store_mfn=OUTSIDE),
    "the console ring far away": lambda: rings(console_mfn=(1 << 64) - 1),
    "the store ring in a table": lambda: rings(store_mfn=L4_USER),
    "the console ring not there": lambda: rings(console_mfn=NR_POPULATED),
    "a GDT to nowhere": lambda: gdt(OUTSIDE),
    "a GDT in a table": lambda: gdt(L2),
    "a GDT not there": lambda: gdt(NR_POPULATED),
    "a GDT too large": lambda: vcpu(gdt_ents=14 * 512 + 1),
    "a GDT absurdly large": lambda: vcpu(gdt_ents=1 << 60),
    "user mode": lambda: vcpu(flags=0x39),
    "a p2m page to nowhere": lambda: p2m(OUTSIDE),
    "a p2m page that is a table": lambda: p2m(L1),
    "a p2m page not there": lambda: p2m(NR_POPULATED),
}


@pytest.mark.parametrize("name", BAD_GUESTS)
def test_a_guest_that_cannot_be(world, name):
    """Page tables, types, registers and frames that contradict each other: refused, at the offset
    of the page or record that holds the wrong value."""
    image = BAD_GUESTS[name]()
    error = refused(world, image.encode())
    start = sum(len(piece.data) for piece in PIECES[: index(PIECES, "X86_PV_P2M_FRAMES")])
    assert start <= error.offset < len(SOUND)


@pytest.mark.parametrize(("pfn", "slot"), [(L1, 3), (L4, 273), (L3, 0)])
def test_the_offset_is_that_of_the_entry(world, pfn, slot):
    """An entry to nowhere: the error's offset is where in the image its eight bytes are."""
    value = OUTSIDE << 12 | FLAGS
    data = entry(pfn, slot, value).encode()
    error = refused(world, data)
    assert data[error.offset : error.offset + 8] == struct.pack("<Q", value)


@pytest.mark.parametrize("page_type", range(5, 9))
def test_a_type_that_is_none(world, page_type):
    """Types 5 to 8 mean nothing, and the error says so."""
    assert "type" in str(refused(world, typed(DATA, page_type).encode())).split(":")[0]


def configured(config):
    """An image with this configuration."""
    data = config if isinstance(config, bytes) else str(config).encode()
    head = PIECES[0].data[:48]
    fixed = head[:44] + struct.pack("<I", len(data) + 5) + struct.pack("<I", len(data) + 1)
    return damaged(lambda pieces: replaced(pieces, "xl header", fixed + data + b"\0"))


@pytest.mark.parametrize(
    "config",
    [
        b"", b"{", b"[" * 100000, b"\xff\xfe", b"[]", b"3", b'"x"', b"null", b'{"c_info": 3}',
        b'{"c_info": {"name": 5}}', b'{"c_info": {"name": ""}}', b'{"c_info": {"name": "a/b"}}',
        b'{"c_info": {"name": "\\ud800"}}', b'{"c_info": {"name": "' + b"x" * 5000 + b'"}}',
    ],
)  # fmt: skip
def test_a_configuration_without_a_name(world, config):
    """No JSON, other JSON, no name or none that can be one: an error, whatever its kind."""
    assert isinstance(error_of(world, configured(config)), XsaveError)


@pytest.mark.parametrize(
    "b_info",
    [
        b'{"max_memkb": -1}', b'{"max_memkb": "x"}', b'{"max_memkb": 1e300}',
        b'{"max_memkb": 1099511627775}', b'{"max_vcpus": true}', b'{"max_vcpus": {}}', b"[]", b"7",
        b'{"target_memkb": 99999999999}', b'{"max_memkb": 4}',
    ],
)  # fmt: skip
def test_an_odd_configuration(world, b_info):
    """What the configuration says of memory and vCPUs is a hint: it harms nothing."""
    error_of(world, configured(b'{"c_info": {"name": "odd"}, "b_info": ' + b_info + b"}"))


def test_more_memory_than_the_host_has(world, builtin_image):
    """An image of 8 MiB for a host with less: out of frames, known or found on the way; a p2m
    beyond all reason: this host cannot take it."""
    host, forks = world
    small = add_host("small", 8 * MIB, seed=2), forks
    data = builtin_image.read_bytes()
    error = error_of(small, data)
    assert isinstance(error, OutOfFrames)
    assert f"{host.name}" in str(error)
    image = one_vcpu(end_pfn=(1 << 24) - 1)
    image.p2m_frames = image.p2m_frames.repeat(1 << 15)
    assert isinstance(error_of(world, image.encode()), HostCannotTake)


def test_every_sample_of_damage(world):
    """The damaged images that `verify` is tested with: each restored, or refused, cleanly."""
    assert DAMAGE
    kinds = {type(error_of(world, make())) for _, _, make in SAMPLES}
    assert {type(None), ImageError} < kinds
    assert kinds <= {type(None), ImageError, HostCannotTake, OutOfFrames, UsageError}
