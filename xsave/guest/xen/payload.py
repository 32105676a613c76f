"""The compressions a Linux kernel's payload may have (arch/x86/boot/compressed/Makefile).

The build pipes vmlinux.bin through one program and, except for gzip, appends its size. The magic
number says which program it was. Output is bounded by the caller: a few kilobytes can expand
to anything.
"""

from __future__ import annotations

import bz2
import lzma
import struct
import zlib
from collections.abc import Callable
from typing import Protocol

import lz4.block
import zstandard

_LZ4_BLOCK_BYTES = 8 << 20  # LEGACY_BLOCKSIZE
_XZ_MEMORY_BYTES = 512 << 20
_ZSTD_WINDOW_BYTES = 1 << 27  # zstd -22 --ultra
_GZIP_WRAPPER = 16 + zlib.MAX_WBITS

#: What each library raises for input it cannot decode, MemoryError aside.
_ERRORS = (
    zlib.error, OSError, EOFError, ValueError, lzma.LZMAError, zstandard.ZstdError,
    lz4.block.LZ4BlockError, struct.error,
)  # fmt: skip

#: Decompress at most `limit` bytes; input that ends early may give less, or raise one of _ERRORS.
Decompress = Callable[[memoryview, int], bytes | memoryview]


class PayloadError(Exception):
    """The payload cannot be decompressed; one phrase says why."""


def decompress(data: memoryview, limit: int) -> bytes | memoryview:
    """Return what is compressed in `data`; at most limit + 1 bytes, which is one too many.

    Raises PayloadError for an unknown format and for damage. Bytes that a stream lacks are seen
    by the caller, who knows how long the result must be.
    """
    for name, magic, function in _FORMATS:
        if bytes(data[: len(magic)]) == magic:
            if function is None:
                raise PayloadError(f"it is compressed with {name}, which is not read here")
            try:
                return function(data, limit + 1)
            except _ERRORS as e:
                raise PayloadError(f"its {name} data is damaged: {e}") from e
    raise PayloadError(f"unknown compression (it begins with {bytes(data[:6]).hex(' ')})")


class _Decoder(Protocol):
    """A stream decoder of the standard library."""

    @property
    def eof(self) -> bool: ...

    def decompress(self, data: memoryview, max_length: int, /) -> bytes: ...


def _whole(decoder: _Decoder, data: memoryview, limit: int) -> bytes:
    """Decompress to the stream's end, where its checksum is."""
    out = decoder.decompress(data, limit)
    if not decoder.eof and len(out) < limit:
        raise EOFError(f"it ends early, after {len(out)} bytes unpacked")
    return out


def _gunzip(data: memoryview, limit: int) -> bytes:
    return _whole(zlib.decompressobj(_GZIP_WRAPPER), data, limit)


def _bunzip2(data: memoryview, limit: int) -> bytes:
    return _whole(bz2.BZ2Decompressor(), data, limit)


def _unxz(data: memoryview, limit: int) -> bytes:
    """xz and the older lzma; the x86 filter is named in the stream."""
    return _whole(lzma.LZMADecompressor(lzma.FORMAT_AUTO, _XZ_MEMORY_BYTES), data, limit)


def _unzstd(data: memoryview, limit: int) -> bytes:
    decoder = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW_BYTES)
    with decoder.stream_reader(data) as reader:
        return reader.read(limit)


def _unlz4(data: memoryview, limit: int) -> memoryview:
    """The legacy frame: its magic, then blocks of {u32 bytes, data}, each up to 8 MiB unpacked."""
    out, end = memoryview(bytearray(limit)), 0
    at = 4
    while at < len(data) and end < limit:
        (size,) = struct.unpack_from("<I", data, at)
        block = data[at + 4 : at + 4 + size]
        if len(block) < size:
            raise ValueError(f"block of {size} bytes, {len(block)} left")
        piece = lz4.block.decompress(block, uncompressed_size=_LZ4_BLOCK_BYTES)[: limit - end]
        out[end : end + len(piece)] = piece
        end += len(piece)
        at += 4 + size
    return out[:end]


_FORMATS: tuple[tuple[str, bytes, Decompress | None], ...] = (
    ("gzip", b"\x1f\x8b", _gunzip),
    ("bzip2", b"BZh", _bunzip2),
    ("lzma", b"\x5d\0\0", _unxz),
    ("xz", b"\xfd7zXZ\0", _unxz),
    ("lz4", b"\x02\x21\x4c\x18", _unlz4),
    ("zstd", b"\x28\xb5\x2f\xfd", _unzstd),
    ("lzo", b"\x89LZO", None),
)
