"""bzImages made to measure, in every compression a kernel build knows."""

from __future__ import annotations

import bz2
import gzip
import lzma
import struct

import lz4.block
import zstandard

LZ4_BLOCK = 8 << 20
X86_FILTERS = [{"id": lzma.FILTER_X86}, {"id": lzma.FILTER_LZMA2, "preset": 1}]


def lz4_legacy(data: bytes) -> bytes:
    """What `lz4 -l` writes."""
    out = b"\x02\x21\x4c\x18"
    for at in range(0, len(data), LZ4_BLOCK):
        block = lz4.block.compress(data[at : at + LZ4_BLOCK], store_size=False)
        out += struct.pack("<I", len(block)) + block
    return out


#: name -> compress, as cmd_gzip, cmd_xzkern_with_size and so on of the kernel's Makefile.lib.
COMPRESS = {
    "gzip": lambda data: gzip.compress(data, mtime=0),
    "bzip2": bz2.compress,
    "lzma": lambda data: lzma.compress(data, lzma.FORMAT_ALONE),
    "xz": lambda data: lzma.compress(data, check=lzma.CHECK_CRC32, filters=X86_FILTERS),
    "lz4": lz4_legacy,
    "zstd": zstandard.ZstdCompressor(level=3, write_content_size=False).compress,
}


def payload(data: bytes, compression: str, size: int | None = None) -> bytes:
    """What the kernel's build makes of vmlinux.bin; size: another one than the true."""
    packed = COMPRESS[compression](data)
    stated = struct.pack("<I", len(data) if size is None else size)
    return (packed[:-4] if compression == "gzip" else packed) + stated


def bzimage(body: bytes, **header: int) -> bytes:
    """A bzImage around a payload; header: setup_sects, flag, version, offset, length."""
    fields = {"setup_sects": 2, "flag": 0xAA55, "version": 0x20F, "offset": 64} | header
    real_mode = bytearray(((fields["setup_sects"] or 4) + 1) * 512)
    real_mode[0x1F1] = fields["setup_sects"]
    struct.pack_into("<H", real_mode, 0x1FE, fields["flag"])
    real_mode[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", real_mode, 0x206, fields["version"])
    length = fields.get("length", len(body))
    struct.pack_into("<II", real_mode, 0x248, fields["offset"], length)
    return bytes(real_mode) + bytes(64) + body
