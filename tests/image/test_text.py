"""structtext.py, text.py, textfile.py: images as JSON, and back."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.image.strategies import HEADERS, LIBXC, LIBXL, batches, hvm_values, image, unknown
from xsave.errors import ImageError
from xsave.image import libxc, textfile
from xsave.image.buffers import reader
from xsave.image.stream import StreamDecoder
from xsave.image.text import from_json, parse_pfns, show_pfns, to_json
from xsave.image.xl import XlHeader
from xsave.public import VcpuGuestContext

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=6,
)


def to_text(data, **options):
    return "".join(textfile.decode(StreamDecoder(reader(data)), **options))


def to_image(text):
    found = textfile.encode(reader(text if isinstance(text, bytes) else text.encode()))
    return b"".join(bytes(buffer) for buffers in found for buffer in buffers)


def through_json(layer, value):
    return from_json(json.loads(json.dumps(to_json(layer, value))))


@pytest.mark.parametrize(
    ("layer", "cls"),
    [("libxc", c) for c in LIBXC] + [("libxl", c) for c in LIBXL],
    ids=lambda v: getattr(v, "__name__", v),
)
@given(data=st.data())
def test_records_survive(layer, cls, data):
    """Any value of any record survives JSON."""
    value = data.draw((LIBXC if layer == "libxc" else LIBXL)[cls])
    assert through_json(layer, value) == value


@given(st.one_of(*HEADERS.values()), unknown, batches())
def test_other_values_survive(header, optional, batch):
    """So do headers, unknown records, padding, and batches with all their odd bits."""
    layer = {"xl": "xl", "libxl": "libxl"}.get(header.NAME.split()[0], "libxc")
    assert through_json(layer, header) == header
    assert through_json("libxl", optional) == optional
    assert through_json("libxc", batch).encode() == batch.encode()
    padded = libxc.Toolstack(b"abc", padding=b"12345")
    assert through_json("libxc", padded) == padded


@given(st.lists(st.tuples(st.integers(0, 5167), st.integers(1, 255)), max_size=30))
def test_any_vcpu_context_survives(changes):
    """A context is shown by field, and every byte of it comes back, those of gaps too."""
    context = bytearray(5168)
    for offset, byte in changes:
        context[offset] = byte
    context = bytes(context)
    value = libxc.X86PvVcpuBasic(0, context)
    assert "fields" in to_json("libxc", value)
    assert through_json("libxc", value) == value


def test_fields_are_readable():
    """Registers, leaves and the configuration can be read and edited."""
    context = VcpuGuestContext()
    context.user_regs.rip = 0xFFFFFFFF81000000
    context.ctrlreg[3] = 0x5000
    shown = to_json("libxc", libxc.X86PvVcpuBasic(0, bytes(context)))
    expected = {"user_regs": {"rip": "0xffffffff81000000"}, "ctrlreg": [0, 0, 0, 0x5000]}
    assert shown["fields"] == expected
    shown["fields"]["user_regs"]["rax"] = 7
    context.user_regs.rax = 7
    assert from_json(shown).context == bytes(context)
    assert to_json("xl", XlHeader.for_config(b'{"a": 1}'))["config"] == '{"a": 1}'
    odd = XlHeader(0x01020304, 3, 0, b"\x02\0\0\0{}junk")
    assert "config" not in to_json("xl", odd)
    assert through_json("xl", odd) == odd


@given(st.lists(st.integers(0, 9) | st.integers(0, 2**64 - 1), max_size=12))
def test_runs_of_pfns(values):
    """Runs are numbers and [first, last], and give the same pfns back."""
    pfns = np.array(values, np.uint64)
    assert parse_pfns(json.loads(json.dumps(show_pfns(pfns)))).tolist() == values
    assert show_pfns(np.arange(5, 9, dtype=np.uint64)) == [[5, 8]]


@pytest.mark.parametrize("fmt", ["xl", "libxl", "libxc"])
def test_images_survive(fmt):
    """A whole image with a tail survives, a record per line, offsets those of the image."""
    data = image(fmt, tail=b"t" * 1_500_000)
    text = to_text(data)
    assert to_image(text) == data
    document = json.loads(text)
    assert document["format"] == fmt
    lines = text.splitlines()
    assert len(lines) == len(document["records"]) + 2
    found = [item.offset for item in StreamDecoder(reader(data))]
    assert [r["offset"] for r in document["records"]][: len(found)] == found


def test_a_document_laid_out_anew_is_read():
    """What jq or an editor made of the document is the same image."""
    data = image(values=hvm_values(), guest_type=2)
    document = json.loads(to_text(data))
    assert to_image(json.dumps(document, indent=2)) == data
    assert to_image(json.dumps(document)) == data


def test_real_images_survive(xen_image):
    """encode(decode(x)) == x for what a real Xen wrote."""
    for name in ("pv-micro-migrate.stdin", "pvh-1cpu.img"):
        data = xen_image(name).read_bytes()
        assert to_image(to_text(data)) == data


def test_without_pages():
    """--no-pages is for reading; encoding it again is refused in so many words."""
    text = to_text(image(), with_pages=False)
    assert len(text) < len(to_text(image()))
    with pytest.raises(ImageError, match="no-pages"):
        to_image(text)


def test_a_damaged_image_is_an_error():
    """The document of a cut image ends in the ImageError of its decoder."""
    with pytest.raises(ImageError, match="cut off"):
        to_text(image()[:-9])


def changed(name, **fields):
    document = json.loads(to_text(image()))
    found = next(r for r in document["records"] if r["record"] == name)
    found.update(fields)
    return json.dumps(document)


@pytest.mark.parametrize(
    ("record", "fields"),
    [
        ("X86_TSC_INFO", {"mode": -1}),
        ("X86_TSC_INFO", {"mode": 2**32}),
        ("X86_TSC_INFO", {"mode": True}),
        ("X86_TSC_INFO", {"mode": 1.5}),
        ("X86_TSC_INFO", {"mode": "zz"}),
        ("X86_TSC_INFO", {"other": 1}),
        ("X86_TSC_INFO", {"record": "NO_SUCH"}),
        ("X86_TSC_INFO", {"layer": "xl"}),
        ("X86_TSC_INFO", {"layer": []}),
        ("SHARED_INFO", {"content": "00"}),
        ("SHARED_INFO", {"content": "xx"}),
        ("X86_PV_P2M_FRAMES", {"pfns": [[0, 2**60]]}),
        ("X86_PV_P2M_FRAMES", {"pfns": [[5, 4]]}),
        ("X86_PV_P2M_FRAMES", {"pfns": [2**64]}),
        ("X86_PV_P2M_FRAMES", {"pfns": 5}),
        ("PAGE_DATA", {"types": [["NOTAB", 5]]}),
        ("PAGE_DATA", {"types": [["NOTAB", -1], ["NOTAB", 5]]}),
        ("PAGE_DATA", {"types": [["NO_SUCH", 4]]}),
        ("PAGE_DATA", {"types": []}),
        ("PAGE_DATA", {"pages": "AAAA"}),
        ("PAGE_DATA", {"pages": 5}),
        ("PAGE_DATA", {"reserved_bits": "00"}),
        ("X86_PV_VCPU_BASIC", {"fields": {"user_regs": {"rip": 2**64}}}),
        ("X86_PV_VCPU_BASIC", {"fields": {"user_regs": 5}}),
        ("X86_PV_VCPU_BASIC", {"fields": {"no_such": 5}}),
        ("X86_PV_VCPU_BASIC", {"fields": {"ctrlreg": [0] * 9}}),
        ("X86_CPUID_POLICY", {"leaves": [[1, 2, 3]]}),
        ("X86_CPUID_POLICY", {"leaves": [[2**32] * 6]}),
    ],
)
def test_wrong_fields_are_image_errors(record, fields):
    """A value that means nothing, or does not fit, is an ImageError that names the record."""
    with pytest.raises(ImageError, match=r"record \d+ of the JSON"):
        to_image(changed(record, **fields))


@given(JSON, st.sampled_from(["fields", "types", "pfns", "pages", "leaves", "mode", "config"]))
def test_any_field_is_an_image_or_an_error(value, key):
    """No JSON value in any place raises anything but ImageError."""
    for name in ("xl header", "PAGE_DATA", "X86_TSC_INFO", "X86_PV_VCPU_BASIC", "X86_CPUID_POLICY"):
        try:
            to_image(changed(name, **{key: value}))
        except ImageError:
            continue


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"\xff",
        b"[",
        b"[" * 200_000,
        b"[]",
        b"5",
        b'{"records": []}',
        b'{"xsave_image": 2, "records": []}',
        b'{"xsave_image": 1, "records": 5}',
        b'{"xsave_image": 1, "records": [5]}',
        b'{"xsave_image": 1, "records": [{"layer": "tail"}]}',
        b'{"xsave_image": 1, "records": [\n{"layer": "libxc", "record": "END"}',
        b'{"xsave_image": 1, "records": [\n]}\nmore',
        b'{"xsave_image": 2, "records": [\n]}\n',
        b'{"x": [\n',
    ],
)
def test_no_document(text):
    """What is no such document is an ImageError."""
    with pytest.raises(ImageError):
        to_image(text)


@given(st.binary(max_size=200))
def test_any_bytes(junk):
    """Any bytes are an image or an ImageError, also inside a good document."""
    for text in (junk, to_text(image("libxc", hvm_values(), guest_type=2)).encode() + junk):
        try:
            to_image(text)
        except ImageError:
            continue
