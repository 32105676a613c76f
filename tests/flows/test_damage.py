"""Damaged bytes: each header field, each record's length and type, cut off anywhere, a wrong tail.

The invariant is in ruined.py.
"""

from __future__ import annotations

import resource
import struct
import subprocess
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.flows import flow, forked
from tests.flows.flow import MIB
from tests.flows.ruined import PIECES, RECORDS, SOUND, damaged, error_of, refused
from tests.image.pieces import index, patched, twice, without
from tests.image.synthetic import NR_POPULATED
from xsave.errors import HostCannotTake, ImageError
from xsave.guest.xen.machine import XEN_FRAMES
from xsave.host.channel import open_sink
from xsave.host.host import add_host
from xsave.image.buffers import reader
from xsave.image.stream import GO_MESSAGE, StreamDecoder


def boundaries(data):
    """Return the offset of every header and record, and the end."""
    decoder = StreamDecoder(reader(data))
    return [item.offset for item in decoder] + [decoder.position]


def test_the_sound_image_is_taken(world):
    """Else all of this would prove nothing. The domain has as many frames as the image has pages;
    what was taken for the holes in its memory is given back."""
    host, _ = world
    info = forked.restore(host, SOUND, cpu_mismatch="allow")
    assert info.memory_bytes == NR_POPULATED * 4096
    assert np.count_nonzero(host.machine.owner == info.domid) - NR_POPULATED <= XEN_FRAMES
    flow.destroy(host, str(info.domid))
    host.settle()
    assert error_of(world, SOUND) is None


# ---- headers and lengths


@pytest.mark.parametrize(
    ("piece", "at", "value"),
    [
        ("xl header", 0, b"Y"),
        ("xl header", 31, b"\0"),
        ("xl header", 32, b"\x03\x02\x01\x00"),
        ("xl header", 36, b"\xff\0\0\0"),
        ("xl header", 44, b"\xff\xff\xff\xff"),
        ("xl header", 44, b"\xff\xff\xff\x00"),
        ("xl header", 44, b"\0\0\0\0"),
        ("xl header", 48, b"\xff\xff\0\0"),
        ("xl header", 52, b"not JSON"),
        ("libxl header", 0, b"l"),
        ("libxl header", 8, struct.pack(">I", 3)),
        ("libxl header", 8, struct.pack(">I", 0)),
        ("libxl header", 12, struct.pack(">I", 1)),
        ("image header", 0, b"\0"),
        ("image header", 7, b"\0"),
        ("image header", 8, b"\0"),
        ("image header", 12, struct.pack(">I", 1)),
        ("image header", 12, struct.pack(">I", 4)),
        ("image header", 12, b"\xff\xff\xff\xff"),
        ("image header", 16, struct.pack(">H", 1)),
        ("domain header", 0, struct.pack("<I", 0)),
        ("domain header", 0, struct.pack("<I", 3)),
        ("domain header", 4, struct.pack("<H", 13)),
        ("domain header", 4, struct.pack("<H", 0)),
    ],
)
def test_a_header_field(world, piece, at, value):
    """Every field that means something, out of its range: refused at that header."""
    error = refused(world, damaged(lambda pieces: patched(pieces, piece, at, value)))
    assert (
        error.offset <= len(b"".join(p.data for p in PIECES[: index(PIECES, "LIBXC_CONTEXT")])) + 64
    )


def test_another_kind_of_guest(world):
    """HVM in the domain header, 32 bits in PV_INFO: sound, perhaps, but not for this host; or not
    sound, as the records are of the other kind."""
    for piece, at, value in (("domain header", 0, 2), ("X86_PV_INFO", 8, 4)):
        data = damaged(lambda pieces, p=piece, a=at, v=value: patched(pieces, p, a, bytes([v])))
        assert isinstance(error_of(world, data), ImageError | HostCannotTake)


@pytest.mark.parametrize("change", [-8, 8, 1 << 20, 0x7FFFFFF8, 0xFFFFFFFF])
@pytest.mark.parametrize("name", RECORDS)
def test_a_record_length(world, name, change):
    """Too short, too long, absurd: refused at that record or at what is then taken for the next
    one, with no more memory than the image has bytes."""
    at = index(PIECES, name)
    (length,) = struct.unpack_from("<I", PIECES[at].data, 4)
    new = change if change > 1 << 30 else max(length + change, 0)
    if new == length:
        return  # it cannot be shorter
    data = damaged(lambda pieces: patched(pieces, name, 4, struct.pack("<I", new)))
    tracemalloc.start()
    try:
        error = refused(world, data)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < len(data) + 4 * MIB
    assert error.offset >= sum(len(piece.data) for piece in PIECES[:at])


@pytest.mark.parametrize("kind", [0x13, 0x7FFFFFFF, 0x7F000001])
@pytest.mark.parametrize("name", RECORDS)
def test_a_record_type(world, name, kind):
    """A type that nobody knows, not marked as optional: refused where it stands."""
    data = damaged(lambda pieces: patched(pieces, name, 0, struct.pack("<I", kind)))
    error = refused(world, data)
    assert error.offset == sum(len(piece.data) for piece in PIECES[: index(PIECES, name)])


@pytest.mark.parametrize("name", RECORDS)
def test_a_record_that_is_missing(world, name):
    """Without it the guest is not whole. (Policies, TSC and the vCPU's extras have defaults; of
    pages some only may be there.)"""
    data = damaged(lambda pieces: without(pieces, name))
    optional = (
        "X86_CPUID_POLICY",
        "X86_MSR_POLICY",
        "X86_TSC_INFO",
        "X86_PV_VCPU_EXTENDED",
        "X86_PV_VCPU_XSAVE",
        "X86_PV_VCPU_MSRS",
    )
    error = error_of(world, data)
    assert isinstance(error, ImageError) != (name in optional), error


@pytest.mark.parametrize("name", ["LIBXC_CONTEXT", "X86_PV_INFO", "STATIC_DATA_END"])
def test_a_record_that_comes_twice(world, name):
    """Of these there is one. (Of X86_PV_P2M_FRAMES there may be more: test_series_p2m.py.)"""
    refused(world, damaged(lambda pieces: twice(pieces, name)))


# ---- cut off, and more than there should be


def test_cut_at_every_record(world):
    """At the first byte of each header and record, and one before and behind it."""
    edges = boundaries(SOUND)
    assert edges[-1] == len(SOUND)
    for edge in edges:
        for end in {edge - 1, edge, edge + 1}:
            if 0 <= end < len(SOUND):
                error = refused(world, SOUND[:end])
                assert error.offset <= end
                assert "cut off" in str(error)


@settings(max_examples=60)
@given(data=st.data())
def test_cut_anywhere(world, data):
    """At any byte."""
    end = data.draw(st.integers(0, len(SOUND) - 1))
    assert refused(world, SOUND[:end]).offset <= end


@pytest.mark.parametrize(
    "tail", [b"\0", b"x", bytes(4096), GO_MESSAGE[:-1], GO_MESSAGE + b"\0", SOUND]
)
def test_bytes_behind_the_end(world, tail):
    """Nothing may follow but the message that ends a migration."""
    assert refused(world, SOUND + tail).offset == len(SOUND)
    assert error_of(world, SOUND + GO_MESSAGE) is None


# ---- an image of a guest that ran, from a file, compressed, and through a pipe


def test_a_builtin_guest_cut_at_every_record(world, builtin_image):
    """The image of the built-in guest as `save` writes it, cut at each record and behind it."""
    data = builtin_image.read_bytes()
    for edge in boundaries(data):
        for end in (edge, edge + 9):
            if end < len(data):
                assert refused(world, data[:end]).offset <= end


@pytest.mark.parametrize("level", [None, 1], ids=["plain", "zstd"])
@pytest.mark.parametrize("part", [0.0, 0.001, 0.4, 0.97])
def test_a_file_cut_short(world, builtin_image, tmp_path, level, part):
    """A file, with holes or of zstd frames, that ends too early."""
    host, forks = world
    path = tmp_path / "img"
    with open_sink(str(path), compress_level=level) as sink:
        sink.write([builtin_image.read_bytes()])
        sink.commit()
    with path.open("r+b") as file:
        file.truncate(int(path.stat().st_size * part))
    with pytest.raises(ImageError):
        flow.restore(host, path, paused=True)
    forked.nothing_is_left(host, forks)


@pytest.mark.parametrize("length", [0xFFFFFFFF, 0x7FFFFFF8, 128 * MIB])
@pytest.mark.parametrize("name", ["PAGE_DATA", "X86_CPUID_POLICY"])
def test_a_length_that_lies_costs_no_memory(xsave, name, length):
    """From a pipe, whose length nobody knows: a record that claims up to 4 GiB ends in an error
    with less than 1 GiB of address space, in an instant."""
    add_host("localhost", 16 * MIB)
    data = damaged(lambda pieces: patched(pieces, name, 4, struct.pack("<I", length)))
    limit = 1024 * MIB, 1024 * MIB
    process = xsave.start(
        "restore", "-", "--cpu-mismatch", "allow", stdin=subprocess.PIPE,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, limit),
    )  # fmt: skip
    _, err = process.communicate(data, timeout=60)
    assert process.returncode == 3, err
    (line,) = err.decode().splitlines()
    assert name in line
    assert "at offset 0x" in line
