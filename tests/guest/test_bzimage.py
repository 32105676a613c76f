"""bzImages: the kernel inside is found in every compression; anything else is one clear error."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.guest.bzimages import COMPRESS, bzimage, lz4_legacy, payload
from tests.guest.elves import make_elf
from xsave.errors import HostCannotTake
from xsave.guest.xen import elf
from xsave.guest.xen.bzimage import is_bzimage, unwrap

KERNEL = make_elf()
by_compression = pytest.mark.parametrize("compression", COMPRESS)
IMAGES = {name: bzimage(payload(KERNEL, name)) for name in COMPRESS}


def refused(data):
    """Unwrap what must be refused; return the message."""
    with pytest.raises(HostCannotTake) as caught:
        unwrap(data, "boot/vmlinuz")
    message = str(caught.value)
    assert message.startswith("boot/vmlinuz: not a bzImage to boot: ")
    assert "(at offset 0x" in message
    assert "\n" not in message
    return message


@by_compression
def test_the_kernel_inside(compression):
    """Each compression gives the very bytes back, and they are a kernel."""
    unpacked = unwrap(IMAGES[compression], "k")
    assert unpacked == KERNEL
    assert elf.parse(unpacked, "k").entry


@pytest.mark.parametrize("compression", ["lz4", "zstd"])
def test_more_than_one_block(compression):
    """A kernel larger than the largest block of its format comes back whole."""
    data = random.Random(4).randbytes(1 << 16) * 144  # 9 MiB
    assert unwrap(bzimage(payload(data, compression)), "k") == data


def test_no_bzimage_is_left_alone():
    """An ELF file, or anything too short to say, is returned as it is."""
    for data in (KERNEL, b"", b"MZ", bytes(0x205)):
        assert not is_bzimage(data)
        assert unwrap(data, "k") is data


def test_no_setup_sectors_are_four():
    """setup_sects 0 stands for 4, as in the first boot protocol."""
    assert unwrap(bzimage(payload(KERNEL, "gzip"), setup_sects=0), "k") == KERNEL


def test_bytes_behind_the_payload():
    """What follows the payload (a signature, say) does not matter."""
    assert unwrap(IMAGES["xz"] + b"signed", "k") == KERNEL


SMALL = payload(KERNEL, "zstd")


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (bzimage(SMALL, flag=0), "boot flag 0xaa55, found 0x0 (at offset 0x1fe)"),
        (bzimage(SMALL, version=0x207), "boot protocol 2.07"),
        (bzimage(SMALL)[:0x24F], "setup header is truncated (at offset 0x24f)"),
        (bzimage(SMALL, length=0), "a payload of 0 bytes (at offset 0x248)"),
        (bzimage(SMALL, length=7), "a payload of 7 bytes"),
        (bzimage(SMALL, length=len(SMALL) + 1), "ends behind the file"),
        (bzimage(SMALL, length=0xFFFFFFFF), "ends behind the file"),
        (bzimage(SMALL, offset=0xFFFFFFFF), "ends behind the file"),
        (bzimage(SMALL, offset=65, length=len(SMALL) - 1), "unknown compression"),
        (bzimage(payload(KERNEL, "gzip", 1)), "unpack to 1 bytes, found more"),
        (bzimage(payload(KERNEL, "xz", 10**8)), f"100000000 bytes, found {len(KERNEL)}"),
        (bzimage(payload(KERNEL, "lz4", 0)), "unpack to 0 bytes, found more"),
        (bzimage(payload(KERNEL, "lz4", (256 << 20) + 1)), "over 256 MiB"),
        (bzimage(b"\x89LZO\0\r\n\x1a\n" + bytes(9)), "compressed with lzo, which is not read"),
        (bzimage(lz4_legacy(KERNEL)[:-9] + bytes(4)), "its lz4 data is damaged: block of"),
        (bzimage(b"BZh9" + bytes(60)), "its bzip2 data is damaged"),
    ],
)
def test_what_is_wrong_is_named(data, says):
    """Each way of being no bzImage has its own words and its place."""
    assert says in refused(data)


@by_compression
def test_a_bomb_is_not_unpacked(compression):
    """A payload that expands to far more than it says is given up after one byte too many."""
    body = payload(bytes(64 << 20), compression, 1000)
    assert "found more" in refused(bzimage(body))


@by_compression
def test_truncated(compression):
    """A file cut anywhere behind the magic is refused."""
    image = IMAGES[compression]
    for cut in range(0x206, len(image), 3):
        refused(image[:cut])


@by_compression
def test_truncated_payload(compression):
    """A stream that lacks its end is refused, although the header fits the file."""
    whole = payload(KERNEL, compression)
    for cut in range(1, len(whole) - 12, 7):
        refused(bzimage(whole[: -4 - cut] + whole[-4:]))


def unwrap_or_refuse(data):
    """The one property of any bytes."""
    try:
        unpacked = unwrap(data, "k")
    except HostCannotTake:
        return
    assert unpacked is data or len(unpacked) <= 256 << 20


@given(st.binary(max_size=200))
def test_any_payload(data):
    """Any bytes for a payload are unpacked or refused; so are any behind a magic number."""
    unwrap_or_refuse(bzimage(data))
    for image in IMAGES.values():
        unwrap_or_refuse(bzimage(image[0x640:0x646] + data))


@given(
    st.sampled_from(sorted(IMAGES)),
    st.lists(st.tuples(st.integers(0x1F1, 0x800), st.binary(min_size=1, max_size=8)), min_size=1),
)
def test_a_damaged_image(compression, changes):
    """A bzImage with bytes of its header or payload overwritten is unpacked or refused."""
    data = bytearray(IMAGES[compression])
    for at, blob in changes:
        data[at : at + len(blob)] = blob
    unwrap_or_refuse(bytes(data))
