"""The header of a qcow2 image: read and checked before anything else is believed."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from xsave.errors import StorageError
from xsave.host.disk.file import DiskFile

MAGIC = b"QFI\xfb"
_HEADER = struct.Struct(">4sIQIIQIIQQIIQ")
_VERSION_3 = struct.Struct(">QQQII")
_COMPRESSION_OFFSET = 104
AUTOCLEAR_OFFSET = 88
REFCOUNT_TABLE_OFFSET = 48
_EXTENSION_BACKING_FORMAT = 0xE2792ACA
_DIRTY, _CORRUPT, _COMPRESSION = 1, 2, 8
_FEATURES = {4: "an external data file", 16: "extended L2 entries"}
_MAX_BACKING_NAME = 1023
_MAX_L1_BYTES, _MAX_TABLE_BYTES = 32 << 20, 8 << 20
_MAX_OFFSET = 1 << 56  # as the tables' entries have it
_MAX_ORDER = 6


@dataclass(frozen=True)
class Header:
    """size: of the disk, bytes; backing: a path as the image has it, "" if none; backing_format:
    "" if the image does not say; autoclear: features that end when a writer does not know them."""

    version: int
    cluster_bits: int
    size: int
    l1_size: int
    l1_offset: int
    refcount_offset: int
    refcount_clusters: int
    refcount_bits: int
    autoclear: int
    zstd: bool
    backing: str
    backing_format: str

    @property
    def cluster_bytes(self) -> int:
        return 1 << self.cluster_bits


def read_header(file: DiskFile, *, readonly: bool) -> Header:
    """Raises StorageError: what is no qcow2 image, or one that cannot be used so."""

    def refuse(what: str) -> StorageError:
        return StorageError(f"disk {file.path}: {what}", path=file.path)

    (
        magic, version, backing_offset, backing_bytes, cluster_bits, size, crypt, l1_size,
        l1_offset, refcount_offset, refcount_clusters, _snapshots, _snapshots_offset,
    ) = _HEADER.unpack(file.read_bytes(0, _HEADER.size))  # fmt: skip
    if magic != MAGIC:
        raise refuse("it is no qcow2 image")
    if version not in (2, 3):
        raise refuse(f"qcow2 version {version}: expected 2 or 3")
    if crypt:
        raise refuse("the qcow2 image is encrypted, which is not supported")
    if not 9 <= cluster_bits <= 21:
        raise refuse(f"qcow2 clusters of 2^{cluster_bits} bytes: expected 2^9 to 2^21")
    incompatible = autoclear = 0
    order, length, zstd = 4, _HEADER.size, False
    if version == 3:
        raw = file.read_bytes(_HEADER.size, _VERSION_3.size + 8)
        incompatible, _compatible, autoclear, order, length = _VERSION_3.unpack_from(raw)
        if not _HEADER.size + _VERSION_3.size <= length <= 1 << cluster_bits:
            raise refuse(f"a qcow2 header of {length} bytes")
        zstd = bool(incompatible & _COMPRESSION)
        if zstd and (length <= _COMPRESSION_OFFSET or raw[_VERSION_3.size] != 1):
            raise refuse("the qcow2 image is compressed in an unknown way")
    offsets = (backing_offset, l1_offset, refcount_offset)
    if max(*offsets, size) >= _MAX_OFFSET or order > _MAX_ORDER:
        raise refuse("its header cannot be right")
    if why := _unusable(incompatible, order, readonly=readonly):
        raise refuse(why)
    cluster = 1 << cluster_bits
    covered = l1_size * (cluster // 8) * cluster
    if l1_size * 8 > _MAX_L1_BYTES or covered < size or l1_offset % cluster:
        raise refuse("its L1 table cannot be right")
    if refcount_clusters * cluster > _MAX_TABLE_BYTES or refcount_offset % cluster:
        raise refuse("its refcount table cannot be right")
    if backing_offset and not 0 < backing_bytes <= _MAX_BACKING_NAME:
        raise refuse("the name of its backing file cannot be right")
    backing = bytes(file.read_bytes(backing_offset, backing_bytes)) if backing_offset else b""
    if b"\0" in backing:
        raise refuse("the name of its backing file cannot be right")
    return Header(
        version, cluster_bits, size, l1_size, l1_offset, refcount_offset, refcount_clusters,
        1 << order, autoclear, zstd, backing.decode(errors="surrogateescape"),
        _backing_format(file, length, cluster),
    )  # fmt: skip


def _unusable(incompatible: int, order: int, *, readonly: bool) -> str:
    """Return why the image cannot be used, "" if it can."""
    if incompatible & _CORRUPT and not readonly:
        return "the qcow2 image is marked corrupt: it can only be read (qemu-img check -r all)"
    if incompatible & _DIRTY and not readonly:
        return "the qcow2 image was not closed: it can only be read (qemu-img check -r all)"
    unknown = incompatible & ~(_DIRTY | _CORRUPT | _COMPRESSION)
    if unknown:
        bit = unknown & -unknown
        named = _FEATURES.get(bit, f"feature {bit.bit_length() - 1}")
        return f"the qcow2 image needs {named}, which is not supported"
    if order != 4 and not readonly:
        return f"qcow2 reference counts of {1 << order} bits: only 16 can be written"
    return ""


def _backing_format(file: DiskFile, offset: int, end: int) -> str:
    """Look through the header extensions (type, length, data to a multiple of 8)."""
    while offset + 8 <= end:
        kind, length = struct.unpack(">II", file.read_bytes(offset, 8))
        if not kind or length > end - offset - 8:
            break
        if kind == _EXTENSION_BACKING_FORMAT:
            return bytes(file.read_bytes(offset + 8, length)).decode(errors="replace")
        offset += 8 + (length + 7 & ~7)
    return ""
