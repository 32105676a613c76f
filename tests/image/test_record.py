"""record.py, xl.py, libxl.py, libxc*.py: every header and record, both ways."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.image.strategies import HEADERS, LIBXC, LIBXL, unknown
from xsave.errors import ImageError
from xsave.image import libxc, libxl, order, pages, record
from xsave.image.xl import FIXED_SIZE, MAGIC, XlHeader

RECORDS = {**LIBXC, **LIBXL}


def name(cls):
    return cls.__name__


def decode_record(cls, data):
    """Take a framed record apart by hand."""
    kind, length = record.RECORD_HEADER.unpack(data[:8])
    assert kind == cls.TYPE
    assert len(data) == 8 + length + -length % 8
    return cls.unframe(memoryview(data)[8 : 8 + length], data[8 + length :], offset=0)


#: Each record with the bytes the specs give it.
GOLDEN = [
    (libxc.End(), "00000000 00000000"),
    (libxc.X86PvInfo(8, 4), "02000000 08000000 08 04 0000 00000000"),
    (
        libxc.X86PvP2mFrames(0, 511, np.array([7], np.uint64)),
        "03000000 10000000 00000000 ff010000 0700000000000000",
    ),
    (libxc.X86PvVcpuExtended(1, b"\xaa"), "05000000 09000000 01000000 00000000 aa 00000000000000"),
    (
        libxc.X86TscInfo(1, 2, 3, 4),
        "08000000 18000000 01000000 02000000 0300000000000000 04000000 00000000",
    ),
    (
        libxc.HvmParams(((1, 2),)),
        "0a000000 18000000 01000000 00000000 0100000000000000 0200000000000000",
    ),
    (libxc.Verify(), "0d000000 00000000"),
    (libxc.Checkpoint(), "0e000000 00000000"),
    (libxc.StaticDataEnd(), "10000000 00000000"),
    (libxl.LibxcContext(), "01000000 00000000"),
    (
        libxl.EmulatorXenstoreData(2, 0, b"a\0b\0"),
        "02000000 0c000000 02000000 00000000 61006200 00000000",
    ),
    (libxl.CheckpointEnd(), "04000000 00000000"),
    (libxl.LibxlHeader(), "4c6962786c466d74 00000002 00000000"),
    (libxc.ImageHeader(), "ffffffffffffffff 58454e46 00000003 0000 0000 00000000"),
    (libxc.DomainHeader(1, xen_minor=21), "01000000 0c00 0000 04000000 15000000"),
    (
        XlHeader.for_config(b'{"a":1}'),
        MAGIC.hex() + "04030201 03000000 00000000 0c000000 08000000 7b2261223a317d 00",
    ),
]


@pytest.mark.parametrize(("value", "text"), GOLDEN, ids=lambda v: getattr(v, "NAME", ""))
def test_golden_bytes(value, text):
    """Records and headers have the very bytes of the specs, in both directions."""
    data = bytes.fromhex(text)
    assert value.encode() == data
    if isinstance(value, record.Record):
        assert decode_record(type(value), data) == value
    else:
        assert type(value).decode(data) == value


@pytest.mark.parametrize("cls", RECORDS, ids=name)
@given(data=st.data())
def test_record_round_trip(cls, data):
    """Any value of any record survives encoding and decoding, reserved fields included."""
    value = data.draw(RECORDS[cls])
    encoded = value.encode()
    assert decode_record(cls, encoded) == value
    assert decode_record(cls, encoded).encode() == encoded


@pytest.mark.parametrize("cls", RECORDS, ids=name)
@given(data=st.data())
def test_padding_is_kept(cls, data):
    """Padding that is not zero survives; verify is who complains of it."""
    encoded = bytearray(data.draw(RECORDS[cls]).encode())
    nr_padding = -record.RECORD_HEADER.unpack(encoded[:8])[1] % 8
    if nr_padding:
        encoded[-nr_padding] = 0x5A
        assert decode_record(cls, encoded).padding[0] == 0x5A
    assert decode_record(cls, encoded).encode() == encoded


@pytest.mark.parametrize("cls", HEADERS, ids=name)
@given(data=st.data())
def test_header_round_trip(cls, data):
    """Any value of any header survives encoding and decoding, reserved fields included."""
    value = data.draw(HEADERS[cls])
    assert cls.decode(value.encode()) == value


@given(unknown)
def test_unknown_record_round_trip(value):
    """An optional record nobody knows is carried as it is."""
    data = value.encode()
    assert record.RECORD_HEADER.unpack(data[:8]) == (value.type, len(value.content))
    assert data[8 : 8 + len(value.content)] == value.content


@pytest.mark.parametrize("cls", RECORDS, ids=name)
@given(body=st.binary(max_size=80))
def test_any_body_decodes_or_is_an_image_error(cls, body):
    """Any body is an ImageError, with its place, or a value that encodes to that body again."""
    try:
        value = cls.unframe(memoryview(body), b"", offset=64)
    except ImageError as error:
        assert error.offset == 64
        assert error.record == cls.NAME
    else:
        assert value.encode()[8 : 8 + len(body)] == body


@pytest.mark.parametrize("cls", [c for c in (*RECORDS, *HEADERS) if c.size()], ids=name)
def test_body_one_byte_short(cls):
    """A body one byte shorter than its fixed part is refused with both lengths named."""
    with pytest.raises(ImageError, match=f"{cls.size()} bytes, found {cls.size() - 1} bytes"):
        cls.parse(bytes(cls.size() - 1), 0)


@pytest.mark.parametrize(
    ("cls", "body", "what"),
    [
        (libxc.End, b"x", "wrong length"),
        (libxc.X86PvInfo, bytes([8, 3, 0, 0, 0, 0, 0, 0]), r"\(8, 3\)"),
        (libxc.X86PvP2mFrames, bytes.fromhex("0200000001000000"), "in front of"),
        (libxc.X86PvP2mFrames, bytes(9), "no multiple of 8"),
        (libxc.X86PvVcpuBasic, bytes(8 + 5167), "5168 or 2800"),
        (libxc.X86PvVcpuExtended, bytes(8 + 129), "at most 128"),
        (libxc.X86PvVcpuXsave, bytes(8 + 15), "at least 16"),
        (libxc.X86PvVcpuMsrs, bytes(8 + 17), "multiple of 16"),
        (libxc.SharedInfo, bytes(4095), "4096 bytes, found 4095"),
        (libxc.HvmContext, b"", "an HVM context"),
        (libxc.HvmParams, bytes([2]) + bytes(7 + 16), "expected 1, found 2"),
        (libxc.X86CpuidPolicy, b"", "multiple of 24"),
        (libxc.X86CpuidPolicy, bytes(25), "multiple of 24"),
        (libxc.X86MsrPolicy, bytes(8), "multiple of 16"),
    ],
)
def test_bodies_the_reference_reader_refuses(cls, body, what):
    """What no Xen would take is refused, with the expectation in the message."""
    with pytest.raises(ImageError, match=what):
        cls.unframe(memoryview(body), b"", offset=0)


def test_empty_vcpu_records_are_read():
    """Xen 4.6 to 4.8 sent EXTENDED, XSAVE and MSRS records without content."""
    for cls in (libxc.X86PvVcpuExtended, libxc.X86PvVcpuXsave, libxc.X86PvVcpuMsrs):
        assert cls.unframe(memoryview(bytes(8)), b"", offset=0) == cls(0, b"")


def test_policy_rows():
    """Policies show their rows in the order and the fields of Xen's structures."""
    leaf = np.arange(1, 7, dtype="<u4").tobytes()
    assert libxc.X86CpuidPolicy(leaf).leaves == [libxc.CpuidLeaf(1, 2, 3, 4, 5, 6)]
    msr = bytes.fromhex("ce00000001000000 8877665544332211")
    assert libxc.X86MsrPolicy(msr).entries == [libxc.MsrEntry(0xCE, 1, 0x1122334455667788)]


def test_a_value_that_does_not_fit_is_an_image_error():
    """Encoding an impossible value says which field, and raises nothing of Construct's."""
    with pytest.raises(ImageError, match="cannot be encoded"):
        libxc.X86TscInfo(1 << 32, 0, 0, 0).encode()
    with pytest.raises(ImageError, match="cannot be encoded"):
        libxc.X86PvVcpuExtended(-1, b"").encode()


def test_frame_refuses_what_no_reader_takes():
    """A body beyond 128 MiB and padding of the wrong length are not written."""
    with pytest.raises(ImageError, match="too long"):
        record.frame(0, bytes(record.MAX_BODY + 1))
    with pytest.raises(ImageError, match="padding"):
        record.frame(0, b"123", b"xx")


def test_every_record_is_in_the_order_table():
    """The tables of order.py know exactly the records that can be decoded."""
    assert set(order.LIBXC) == {cls.NAME for cls in libxc.RECORDS.values()} | {pages.NAME}
    assert set(order.LIBXL) == {cls.NAME for cls in libxl.RECORDS.values()}
    assert set(libxc.RECORDS.values()) == set(LIBXC)
    assert set(libxl.RECORDS.values()) == set(LIBXL)


@pytest.mark.parametrize(
    ("change", "offset", "what"),
    [
        ({"byteorder": 0x04030201}, 32, "byte order"),
        ({"mandatory_flags": 7}, 36, "unknown mandatory flags: found 0x4"),
        ({"mandatory_flags": 1}, 36, "legacy"),
        ({"optional_data": b"abc"}, 44, "at least 4"),
        ({"optional_data": b"\x05\0\0\0abcd"}, 48, "at most 4 bytes, found 5"),
    ],
)
def test_xl_headers_refused(change, offset, what):
    """A damaged xl header is refused at the offset of the field that is wrong."""
    data = dataclasses.replace(XlHeader.for_config(b"{}"), **change).encode()
    with pytest.raises(ImageError, match=what) as found:
        XlHeader.decode(data)
    assert found.value.offset == offset


def test_xl_config():
    """The configuration is found with and without NUL, and where there is none."""
    assert XlHeader.for_config(b"{}").config == b"{}"
    assert XlHeader(0x01020304, 3, 0, b"\x02\0\0\0{}junk").config == b"{}"
    assert XlHeader(0x01020304, 3, 0, b"").config == b""
    assert len(XlHeader.for_config(b"").encode()) == FIXED_SIZE + 5


def test_optional_flags_are_kept():
    """Flags xl does not look at survive."""
    value = XlHeader(0x01020304, 3, 0xDEAD, b"")
    assert XlHeader.decode(value.encode()) == value
