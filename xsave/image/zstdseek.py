"""Seekable zstd: independent frames, checksummed, and a table of their sizes at the end.

    FILE ::= { FRAME } SEEK_TABLE          (SEEK_TABLE is a skippable frame: `zstd -d` reads it all)

This module knows the bytes, it neither compresses nor reads files. Walking the blocks of a frame
needs no decompressor: each block says how long it is and holds 128 KiB of content at most. So a
reader finds the end of each frame (and notices a cut one), hands whole frames to its threads,
and feeds a long frame in pieces whose content is bounded, whatever the data claim.

references: RFC 8878 section 3.1 (frames, blocks), zstd contrib/seekable_format/
zstd_seekable_compression_format.md (the table).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from xsave.errors import ImageError
from xsave.image.buffers import Read

MAGIC = b"\x28\xb5\x2f\xfd"
#: Largest window (and with it, memory) a reader grants: that of `zstd --ultra -22`.
MAX_WINDOW = 128 << 20
#: Content of one of our own frames.
FRAME_CONTENT = 1 << 20
#: Blocks per piece of a walk: their content is 1 MiB at most.
BLOCKS_PER_PIECE = 8

_SKIPPABLE_MAGIC = 0x184D2A50  # to ...5F
_SEEK_TABLE_MAGIC = 0x184D2A5E
_SEEKABLE_MAGIC = 0x8F92EAB1
_FOOTER = struct.Struct("<IBI")
_SKIP_STEP = 1 << 20


@dataclass(frozen=True)
class FrameHeader:
    """What a frame says of itself; `data` are the header's own bytes."""

    data: bytes
    window_bytes: int
    content_bytes: int | None
    has_checksum: bool


@dataclass(frozen=True)
class Piece:
    """Some consecutive bytes of one frame, of 1 MiB of content at most."""

    header: FrameHeader
    offset: int  # of the frame, in the compressed data
    data: bytes
    is_first: bool
    is_last: bool


class _Input:
    """Exact reads with a position; the end of input inside something is an ImageError."""

    def __init__(self, read: Read) -> None:
        self._read = read
        self.position = 0

    def at_most(self, n: int) -> memoryview:
        data = self._read(n)
        self.position += len(data)
        return data

    def exact(self, n: int) -> memoryview:
        offset = self.position
        data = self.at_most(n)
        if len(data) != n:
            raise damaged("cut off", offset, expected=f"{n} bytes", found=f"{len(data)} bytes")
        return data


def damaged(what: str, offset: int, *, expected: object = None, found: object = None) -> ImageError:
    """Return the error for compressed data; `offset` counts compressed bytes."""
    return ImageError(
        f"compressed data: {what}",
        offset=offset,
        record="zstd frame",
        expected=expected,
        found=found,
    )


def walk(read: Read) -> Iterator[Piece]:
    """Yield the frames of the input, piece by piece; skippable frames are skipped.

    Raises ImageError where the input ends inside a frame or goes on with something else.
    """
    source = _Input(read)
    while magic := source.at_most(4):
        if magic == MAGIC:
            yield from _frame(source)
        elif len(magic) == 4 and _is_skippable(magic):
            _skip(source)
        else:
            offset = source.position - len(magic)
            raise damaged("no zstd frame", offset, expected=MAGIC.hex(" "), found=magic.hex(" "))


def _is_skippable(magic: memoryview) -> bool:
    return int.from_bytes(magic, "little") & ~0xF == _SKIPPABLE_MAGIC


def _skip(source: _Input) -> None:
    left = int.from_bytes(source.exact(4), "little")
    while left:
        left -= len(source.exact(min(left, _SKIP_STEP)))


def _frame(source: _Input) -> Iterator[Piece]:
    offset = source.position - len(MAGIC)
    header = _frame_header(source, offset)
    parts: list[bytes | memoryview] = [header.data]
    is_first = True
    while True:
        nr_blocks = 0
        is_last = False
        while nr_blocks < BLOCKS_PER_PIECE and not is_last:
            *block, is_last = _block(source)
            parts += block
            nr_blocks += 1
        if is_last and header.has_checksum:
            parts.append(source.exact(4))
        yield Piece(header, offset, b"".join(parts), is_first, is_last)
        if is_last:
            return
        parts, is_first = [], False


def _frame_header(source: _Input, offset: int) -> FrameHeader:
    descriptor = source.exact(1)[0]
    is_single = bool(descriptor & 0x20)
    dictionary_size = (0, 1, 2, 4)[descriptor & 3]
    content_size_size = (1 if is_single else 0, 2, 4, 8)[descriptor >> 6]
    data = source.exact((0 if is_single else 1) + dictionary_size + content_size_size)
    content_bytes = None
    if content_size_size:
        content_bytes = int.from_bytes(data[-content_size_size:], "little")
        content_bytes += 256 if content_size_size == 2 else 0
    window_bytes = content_bytes if is_single else _window_bytes(data[0])
    if window_bytes is None or window_bytes > MAX_WINDOW:
        raise damaged("window too large", offset, expected=MAX_WINDOW, found=window_bytes)
    if dictionary_size and any(data[-content_size_size - dictionary_size :][:dictionary_size]):
        raise damaged("compressed with a dictionary", offset)
    whole = b"".join((MAGIC, bytes([descriptor]), data))
    return FrameHeader(whole, window_bytes, content_bytes, bool(descriptor & 4))


def _window_bytes(descriptor: int) -> int:
    base = 1 << (10 + (descriptor >> 3))
    return base + (base >> 3) * (descriptor & 7)


def _block(source: _Input) -> tuple[memoryview, memoryview, bool]:
    """Return a block's header and the rest of it, and whether it is the frame's last."""
    offset = source.position
    head = source.exact(3)
    value = int.from_bytes(head, "little")
    kind, size = (value >> 1) & 3, value >> 3
    if kind == 3 or size > 128 << 10:
        raise damaged("wrong block", offset, found=f"type {kind}, {size} bytes")
    return head, source.exact(1 if kind == 1 else size), bool(value & 1)


def seek_table(sizes: list[tuple[int, int]]) -> bytes:
    """Return the table for frames of these (compressed, content) sizes in bytes."""
    entries = np.array(sizes, "<u4").reshape(-1, 2).tobytes()
    footer = _FOOTER.pack(len(sizes), 0, _SEEKABLE_MAGIC)
    head = struct.pack("<II", _SEEK_TABLE_MAGIC, len(entries) + len(footer))
    return head + entries + footer


def parse_seek_table(end: bytes) -> np.ndarray | None:
    """Return the (n, 2) u32 sizes of a table that ends `end`, the last bytes of a file.

    None where there is no table, or where `end` holds only a part of it.
    """
    if len(end) < _FOOTER.size:
        return None
    nr_frames, descriptor, magic = _FOOTER.unpack(end[-_FOOTER.size :])
    width = 12 if descriptor & 0x80 else 8
    start = len(end) - _FOOTER.size - nr_frames * width
    if magic != _SEEKABLE_MAGIC or descriptor & 0x7C or start < 8:
        return None
    expected = (_SEEK_TABLE_MAGIC, nr_frames * width + _FOOTER.size)
    if struct.unpack_from("<II", end, start - 8) != expected:
        return None
    rows = np.frombuffer(end[start : -_FOOTER.size], "<u4").reshape(nr_frames, width // 4)
    return rows[:, :2]
