"""A bzImage, the file distributions call vmlinuz, and the ELF kernel inside it.

Its setup header (Documentation/arch/x86/boot.rst, "The Real-Mode Kernel Header") says where the
compressed payload lies; a PV guest never runs any of the code around it. Mirrors
tools/libs/guest/xg_dom_bzimageloader.c.

    0x1f1  u8   setup_sects, sectors of real-mode code behind the first; 0 means 4
    0x1fe  u16  0xaa55
    0x202  "HdrS"
    0x206  u16  version; the payload's fields are there from 2.08 on (Linux 2.6.26)
    0x248  u32  payload_offset, from the end of the real-mode code
    0x24c  u32  payload_length; the payload's last four bytes are its length unpacked
"""

from __future__ import annotations

import struct

from xsave.errors import HostCannotTake
from xsave.guest.xen.payload import PayloadError, decompress

_SETUP_SECTS, _BOOT_FLAG, _MAGIC, _VERSION, _PAYLOAD = 0x1F1, 0x1FE, 0x202, 0x206, 0x248
_HEADER_END = 0x250
_SECTOR_BYTES = 512
_OLDEST_VERSION = 0x0208
_MAX_BYTES = 256 << 20
_GZIP = b"\x1f\x8b"


def is_bzimage(data: bytes) -> bool:
    return data[_MAGIC : _MAGIC + 4] == b"HdrS"


def unwrap(data: bytes, name: str) -> bytes | memoryview:
    """Return the ELF file inside a bzImage; what is no bzImage is returned as it is.

    Raises HostCannotTake, naming what is wrong and where.
    """
    if not is_bzimage(data):
        return data
    offset, payload = _payload(data, name)
    (size,) = struct.unpack("<I", payload[-4:])
    if size > _MAX_BYTES:
        raise _bad(
            name, offset, f"its payload unpacks to {size} bytes, over {_MAX_BYTES >> 20} MiB"
        )
    # The last four bytes belong to gzip itself; behind the others the kernel's build put them.
    compressed = payload if payload[:2] == _GZIP else payload[:-4]
    try:
        unpacked = decompress(compressed, size)
    except PayloadError as e:
        raise _bad(name, offset, f"its payload: {e}") from e
    if len(unpacked) != size:
        more = "more" if len(unpacked) > size else str(len(unpacked))
        raise _bad(name, offset, f"its payload should unpack to {size} bytes, found {more}")
    return unpacked


def _payload(data: bytes, name: str) -> tuple[int, memoryview]:
    """Return the payload's offset in the file and its bytes."""
    if len(data) < _HEADER_END:
        raise _bad(name, len(data), "its setup header is truncated")
    (flag,) = struct.unpack_from("<H", data, _BOOT_FLAG)
    if flag != 0xAA55:
        raise _bad(name, _BOOT_FLAG, f"expected the boot flag 0xaa55, found {flag:#x}")
    (version,) = struct.unpack_from("<H", data, _VERSION)
    if version < _OLDEST_VERSION:
        found = f"{version >> 8}.{version & 0xFF:02}"
        raise _bad(name, _VERSION, f"boot protocol {found}: its payload can be found from 2.08 on")
    start, length = struct.unpack_from("<II", data, _PAYLOAD)
    offset = ((data[_SETUP_SECTS] or 4) + 1) * _SECTOR_BYTES + start
    if offset + length > len(data):
        what = f"its payload of {length} bytes at {offset:#x} ends behind the file"
        raise _bad(name, _PAYLOAD, what)
    if length < 8:
        raise _bad(name, _PAYLOAD, f"it has a payload of {length} bytes")
    return offset, memoryview(data)[offset : offset + length]


def _bad(name: str, offset: int, what: str) -> HostCannotTake:
    return HostCannotTake(f"{name}: not a bzImage to boot: {what} (at offset {offset:#x})")
