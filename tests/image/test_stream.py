"""stream.py and detect.py: whole images, sound ones and every way to damage one."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.image.strategies import HEADERS, LIBXC, batches, hvm_values, image, pv_values, unknown
from xsave.errors import ImageError
from xsave.image import libxc, libxl
from xsave.image.buffers import Zeros, nbytes, reader
from xsave.image.record import MAX_BODY, RECORD_HEADER, frame
from xsave.image.stream import GO_MESSAGE, StreamDecoder, StreamEncoder

FORMATS = ["xl", "libxl", "libxc"]
IMAGES = [
    "pv-micro-1cpu.img",
    "pv-micro-2cpu.img",
    "pv-micro-1cpu-qemu64.img",
    "pv-micro-1cpu-p.img",
    "pv-micro-migrate.stdin",
    "pv-debian-1cpu-A.img",
    "pv-debian-1cpu-qemu64.img",
    "pvh-1cpu.img",
]


def items(data, **options):
    return list(StreamDecoder(reader(data), **options))


def encoded(found):
    return b"".join(StreamEncoder.record(item.value) for item in found)


def boundaries(data):
    return [item.offset for item in items(data)][1:]


@pytest.mark.parametrize("name", IMAGES)
def test_real_images_survive(xen_image, name):
    """encode(decode(x)) == x for what a real Xen wrote, with every item at its offset."""
    data = xen_image(name).read_bytes()
    decoder = StreamDecoder(reader(data))
    position = 0
    for item in decoder:
        assert item.offset == position
        for buffer in StreamEncoder.buffers(item.value):
            piece = memoryview(buffer).cast("B")
            assert data[position : position + len(piece)] == piece
            position += len(piece)
    assert decoder.format == "xl"
    assert decoder.position == position
    assert decoder.tail(1 << 20) == data[position:]
    assert data[position:] in (b"", GO_MESSAGE)


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("version", [2, 3])
def test_small_images_survive(fmt, version):
    """The same for each wrapping and version; the wrapping is recognised."""
    data = image(fmt, version=version, tail=b"tail")
    decoder = StreamDecoder(reader(data))
    found = list(decoder)
    assert encoded(found) + b"tail" == data
    assert decoder.format == fmt
    assert decoder.tail(2) + decoder.tail(9) + decoder.tail(9) == b"tail"
    assert {item.layer for item in found} == set(FORMATS[FORMATS.index(fmt) :])


@given(st.lists(st.one_of(*LIBXC.values(), batches(), unknown).filter(lambda v: v.NAME != "END")))
def test_any_records_survive(values):
    """Any sequence of records survives without the order rules; each keeps its class."""
    data = image("libxc", values)
    found = items(data, strict_order=False)
    assert encoded(found) == data
    assert [type(item.value) for item in found[2:-1]] == [type(value) for value in values]


@given(HEADERS[libxc.ImageHeader], HEADERS[libxc.DomainHeader], HEADERS[libxl.LibxlHeader])
def test_any_headers_survive(image_header, domain_header, libxl_header):
    """Reserved bits of the headers are read past and kept."""
    values = hvm_values() if domain_header.type == 2 else pv_values(version=image_header.version)
    head = libxl_header.encode() + libxl.LibxcContext().encode()
    head += image_header.encode() + domain_header.encode()
    body = b"".join(StreamEncoder.record(value) for value in values)
    data = head + body + StreamEncoder.trailer("libxl")
    assert encoded(items(data, strict_order=False)) == data


def test_a_batch_is_a_view_of_what_read_returned():
    """Pages are not copied, and their offset is where they lie in the image."""
    data = image()
    for item in items(data):
        if item.value.NAME == "PAGE_DATA":
            batch = item.value
            assert not batch.pages.flags.owndata
            assert not batch.pages.flags.writeable
            start = batch.pages_offset
            assert data[start : start + batch.pages.nbytes] == batch.pages.tobytes()


def test_at_most_two_reads_per_batch_body():
    """The entries come in one read and the pages in one, whatever their number."""
    sizes = []
    data = image()
    read = reader(data)

    def counting(n):
        sizes.append(n)
        return read(n)

    list(StreamDecoder(counting))
    assert sizes.count(3 * 4096) == 1
    assert sizes.count(4 * 8) >= 1


@pytest.mark.parametrize("fmt", FORMATS)
def test_truncated_anywhere(fmt):
    """An image cut at any byte is an ImageError; at a record boundary it names the missing one."""
    data = image(fmt, [*pv_values()[:5], *pv_values()[8:]])
    dense = {*range(3000), *range(len(data) - 300, len(data))}
    cuts = {*dense, *range(0, len(data), 509), *boundaries(data)} & {*range(len(data))}
    for cut in sorted(cuts):
        with pytest.raises(ImageError, match="cut off") as found:
            items(data[:cut])
        assert found.value.offset <= cut


def test_truncated_real_image(xen_image):
    """The same for a real image, at every record boundary."""
    data = xen_image("pv-micro-1cpu.img").read_bytes()
    for cut in boundaries(data):
        with pytest.raises(ImageError, match="cut off"):
            items(data[:cut])


@given(st.integers(0), st.integers(1, 255), st.sampled_from(FORMATS))
def test_one_damaged_byte(where, change, fmt):
    """A changed byte gives items that encode to the same bytes again, or an ImageError."""
    data = bytearray(image(fmt))
    data[where % len(data)] ^= change
    try:
        found = items(bytes(data))
    except ImageError as error:
        assert str(error)
    else:
        assert encoded(found) == data[: len(encoded(found))]


def test_every_bit_of_the_headers():
    """Any one bit of the first 500 bytes flipped: the same items back, or an ImageError."""
    data = image("xl", config=b"{}")
    for bit in range(500 * 8):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        try:
            found = items(bytes(damaged))
        except ImageError:
            continue
        assert encoded(found) == damaged


@pytest.mark.parametrize("length", [0, 1, 7, 8, 4096, MAX_BODY, MAX_BODY + 1, 2**32 - 1])
def test_each_record_length_damaged(length):
    """A record with a length that is not its own is an ImageError.

    Or zero bytes of a cut content pass for an END: then something follows the image.
    """
    data = image("libxc")
    for item in items(data)[2:]:
        at = item.offset + 4
        if data[at : at + 4] == length.to_bytes(4, "little"):
            continue
        damaged = data[:at] + length.to_bytes(4, "little") + data[at + 4 :]
        decoder = StreamDecoder(reader(damaged))
        try:
            found = list(decoder)
        except ImageError:
            continue
        assert encoded(found) == damaged[: decoder.position]
        assert decoder.tail(1)


@given(st.binary(max_size=300), st.sampled_from([0, 8, 24, 40, 56]))
@example(b"", 0)
def test_any_bytes(junk, keep):
    """Any bytes, also behind a good beginning, are items or an ImageError."""
    data = image("libxc")[:keep] + junk
    try:
        found = items(data)
    except ImageError:
        return
    assert encoded(found) == data[: len(encoded(found))]


@pytest.mark.parametrize(
    ("start", "what"),
    [
        (b"\x7fELF\x02\x01\x01\0", "ELF"),
        (b"libvirt-xml", "libvirt"),
        (b"XenSavedDomain\n", "XAPI"),
        (b"LinuxGuestRecord", "legacy"),
        (b"\x00\x20\0\0\0\0\0\0", "legacy"),
        (b"\x1f\x8b\x08\0\0\0\0\0", "gzip"),
        (b"hello world", "not a Xen image"),
        (b"\0" * 8, "not a Xen image"),
    ],
)
def test_strangers_are_named(start, what):
    """What is no image, or one that is not read yet, is called by its name."""
    with pytest.raises(ImageError, match=what):
        items(start + bytes(100))


def test_big_endian_is_refused():
    """The byte-order bits of both headers are honoured."""
    for offset, fmt in ((17, "libxc"), (15, "libxl")):
        data = bytearray(image(fmt))
        data[offset] |= 1
        with pytest.raises(ImageError, match="big-endian"):
            items(bytes(data))


def test_unknown_records():
    """An optional unknown record is carried in either layer, a mandatory one refused."""
    optional, mandatory = frame(0x80000042, b"abc", b"pad!!"), frame(0x42, b"abc")
    end, both = libxl.LibxlEnd().encode(), StreamEncoder.trailer("libxl")
    data = image()
    inside = data.removesuffix(both) + optional + both
    outside = data.removesuffix(end) + optional + end
    for changed, layer in ((inside, "libxc"), (outside, "libxl")):
        found = items(changed)
        assert encoded(found) == changed
        kept = [item for item in found if isinstance(item.value, libxc.Unknown)]
        assert [(item.layer, item.value.content) for item in kept] == [(layer, b"abc")]
    for changed in (data.removesuffix(both) + mandatory, data.removesuffix(end) + mandatory):
        with pytest.raises(ImageError, match=r"unknown mandatory record.*0x42"):
            items(changed + end)


def test_a_lying_length_is_not_believed():
    """A record that claims 128 MiB in a short image is a cut image, not an allocation."""
    asked = []
    data = image("libxc")[:40] + RECORD_HEADER.pack(9, MAX_BODY) + b"short"
    read = reader(data)

    def spying(n):
        asked.append(n)
        return read(n)

    with pytest.raises(ImageError, match="cut off"):
        list(StreamDecoder(spying))
    assert max(asked) == MAX_BODY  # one record is the bound


def test_headers_and_trailer_are_what_the_decoder_reads():
    """The encoder's headers carry configuration, Xen's version and the guest's type."""
    data = StreamEncoder.headers("xl", b'{"x":1}', xen=(4, 20), guest_type=2)
    body = b"".join(StreamEncoder.record(value) for value in hvm_values())
    found = items(data + body + StreamEncoder.trailer("xl"))
    assert found[0].value.config == b'{"x":1}'
    domain = next(item.value for item in found if item.value.NAME == "domain header")
    assert (domain.type, domain.xen_major, domain.xen_minor) == (2, 4, 20)


def test_page_data_header_needs_no_padding():
    """Header bytes and pages together are the record that encode() makes."""
    pfns, types = np.array([3, 4]), np.array([0, 0xF])
    head = StreamEncoder.page_data_header(pfns, types)
    whole = head + b"p" * 4096
    data = image("libxc", [*pv_values()[:5]])[: -len(StreamEncoder.trailer("libxc"))]
    found = items(data + whole + StreamEncoder.trailer("libxc"), strict_order=False)
    assert found[-2].value.pages.tobytes() == b"p" * 4096
    assert found[-2].value.pfns.tolist() == [3, 4]


def test_nbytes_of_buffers():
    """Zeros, arrays and bytes all say how long they are."""
    assert [nbytes(b) for b in (b"abc", np.zeros((2, 8), np.uint8), Zeros(5))] == [3, 16, 5]
    assert nbytes(memoryview(b"abcd")) == 4


def test_a_record_in_front_of_the_libxc_stream():
    """An optional record that nobody knows may even come in front of LIBXC_CONTEXT."""
    data = image("libxl")
    changed = data[:16] + frame(0x80000042, b"abc") + data[16:]
    assert encoded(items(changed)) == changed
    early = data[:16] + libxl.EmulatorContext(2, 0, b"").encode() + data[16:]
    assert encoded(items(early, strict_order=False)) == early
