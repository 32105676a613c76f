"""A qcow2 image as a disk: reads go down the chain of backing files, writes make clusters ours."""

from __future__ import annotations

import errno
import zlib
from pathlib import Path
from typing import Protocol

from xsave.errors import StorageError
from xsave.host.disk.file import DiskFile
from xsave.host.disk.qcow2.clusters import COMPRESSED, COPIED, OFFSET_MASK, ZERO, Clusters
from xsave.host.disk.qcow2.header import AUTOCLEAR_OFFSET, Header, read_header
from xsave.host.disk.qcow2.refcounts import Refcounts

_SECTOR_BYTES = 512
_MAX_CHAIN = 16
_DEFLATE_WINDOW_BITS = 12


class Backing(Protocol):
    """What lies below an image."""

    @property
    def nr_bytes(self) -> int: ...
    def read(self, offset: int, buffers: list[memoryview]) -> None: ...
    def close(self) -> None: ...


class _RawBacking:
    def __init__(self, file: DiskFile) -> None:
        self.nr_bytes = file.size
        self.read, self.close = file.read, file.close


class Qcow2:
    """An open image. read, write and flush raise OSError."""

    def __init__(
        self, file: DiskFile, header: Header, clusters: Clusters,
        refcounts: Refcounts | None, backing: Backing | None,
    ) -> None:  # fmt: skip
        self._file = file
        self._header = header
        self._clusters = clusters
        self._refcounts = refcounts
        self._backing = backing
        self.readonly = refcounts is None
        self.nr_bytes = header.size
        self.nr_sectors = header.size // _SECTOR_BYTES

    @classmethod
    def open(cls, file: DiskFile, *, readonly: bool, depth: int = 0) -> Qcow2:
        """The file is the image's from then on. Raises StorageError; it is the caller's then."""
        header = read_header(file, readonly=readonly)
        if not readonly and not file.is_regular:
            raise StorageError(
                f"disk {file.path}: a qcow2 image on a block device can only be read",
                path=file.path,
            )
        refcounts = None if readonly else Refcounts(file, header)
        clusters = Clusters(file, header, refcounts)
        backing = _open_backing(file.path, header, depth + 1)
        if not readonly and header.autoclear:
            file.write_bytes(AUTOCLEAR_OFFSET, bytes(8))
        return cls(file, header, clusters, refcounts, backing)

    # -- reading ---

    def read(self, offset: int, buffers: list[memoryview]) -> None:
        """Fill the buffers; behind the end there are zeros."""
        for cluster, within, part in _by_cluster(offset, buffers, self._header.cluster_bytes):
            self._read_cluster(cluster, within, part)
        self._clusters.trim()

    def _read_cluster(self, cluster: int, within: int, buffers: list[memoryview]) -> None:
        start = cluster << self._header.cluster_bits
        entry = self._clusters.entry(cluster) if start < self.nr_bytes else ZERO
        if entry & COMPRESSED:
            _scatter(memoryview(self._decompress(entry))[within:], buffers)
        elif entry & ZERO:
            _scatter(None, buffers)
        elif entry & OFFSET_MASK:
            self._file.read(self._clusters.offset(entry) + within, buffers)
        else:
            self._read_below(start + within, buffers)

    def _read_below(self, offset: int, buffers: list[memoryview]) -> None:
        backing = self._backing
        room = backing.nr_bytes - offset if backing else 0
        if backing is None or room <= 0:
            _scatter(None, buffers)
            return
        backing.read(offset, _cut(buffers, 0, room))
        _scatter(None, _cut(buffers, room))

    def _compressed_range(self, entry: int) -> tuple[int, int]:
        """(offset, bytes) of a compressed cluster's data in the file."""
        bits = 62 - (self._header.cluster_bits - 8)
        offset = entry & (1 << bits) - 1
        sectors = (entry & COMPRESSED - 1) >> bits
        return offset, (sectors + 1) * _SECTOR_BYTES - offset % _SECTOR_BYTES

    def _decompress(self, entry: int) -> bytes:
        offset, nr = self._compressed_range(entry)
        data = bytes(self._file.read_bytes(offset, nr))
        size = self._header.cluster_bytes
        cluster = _unzstd(data, size) if self._header.zstd else _inflate(data, size)
        if len(cluster) != size:
            raise OSError(errno.EIO, "a compressed cluster ends early")
        return cluster

    # -- writing ---

    def write(self, offset: int, buffers: list[memoryview]) -> None:
        """Write the buffers."""
        size = self._header.cluster_bytes
        for cluster, within, part in _by_cluster(offset, buffers, size):
            entry = self._clusters.entry(cluster)
            own = entry & COPIED and not entry & (COMPRESSED | ZERO) and entry & OFFSET_MASK
            if own:
                self._file.write(self._clusters.offset(entry) + within, part)
            else:
                self._write_new(cluster, within, part, entry)
        if self._clusters.crowded:
            self.flush()
        self._clusters.trim()

    def _write_new(self, cluster: int, within: int, buffers: list[memoryview], entry: int) -> None:
        """Write into a cluster that is not ours alone yet: give it a place, whole."""
        assert self._refcounts is not None
        whole = bytearray(self._header.cluster_bytes)
        nr = sum(map(len, buffers))
        if nr < len(whole):
            self._read_cluster(cluster, 0, [memoryview(whole)])
        at = within
        for view in buffers:
            whole[at : at + len(view)] = view
            at += len(view)
        offset = self._refcounts.allocate()
        self._file.write_bytes(offset, whole)
        self._clusters.set(cluster, offset, self._held_by(entry))

    def _held_by(self, entry: int) -> list[int]:
        """The clusters of the file that an entry refers to."""
        if entry & COMPRESSED:
            offset, nr = self._compressed_range(entry)
            size = self._header.cluster_bytes
            return list(range(offset // size * size, offset + nr, size))
        return [entry & OFFSET_MASK] if entry & OFFSET_MASK else []

    def flush(self) -> None:
        """All that was written is on the disk, and found there, when this returns."""
        if self._refcounts is not None:
            self._clusters.write()

    def close(self) -> None:
        """Raises OSError: what was not flushed could not be written; it is closed all the same."""
        try:
            self.flush()
        finally:
            self._file.close()
            if self._backing is not None:
                self._backing.close()


def _open_backing(path: str, header: Header, depth: int) -> Backing | None:
    if not header.backing:
        return None
    if not header.backing_format:  # to guess would let who writes the file choose
        what = "the format of its backing file is not named (qemu-img rebase -u -F)"
        raise StorageError(f"disk {path}: {what}", path=path)
    if header.backing.startswith("json:") or header.backing_format not in ("raw", "qcow2"):
        name = f"{header.backing} ({header.backing_format})"
        raise StorageError(f"disk {path}: its backing file {name} is not supported", path=path)
    if depth > _MAX_CHAIN:
        raise StorageError(f"disk {path}: more than {_MAX_CHAIN} backing files", path=path)
    below = DiskFile.open(str(Path(path).parent / header.backing), readonly=True)
    try:
        if header.backing_format == "qcow2":
            return Qcow2.open(below, readonly=True, depth=depth)
        return _RawBacking(below)
    except BaseException:
        below.close()
        raise


def _inflate(data: bytes, size: int) -> bytes:
    try:
        return zlib.decompressobj(-_DEFLATE_WINDOW_BITS).decompress(data, size)
    except zlib.error as e:
        raise OSError(errno.EIO, f"a compressed cluster: {e}") from e


def _unzstd(data: bytes, size: int) -> bytes:
    import zstandard  # takes a moment, and few images need it

    try:
        return zstandard.ZstdDecompressor().stream_reader(data).read(size)
    except zstandard.ZstdError as e:
        raise OSError(errno.EIO, f"a compressed cluster: {e}") from e


def _by_cluster(
    offset: int, buffers: list[memoryview], size: int
) -> list[tuple[int, int, list[memoryview]]]:
    """Split a transfer: (cluster, offset within it, its part of the buffers)."""
    parts, done, nr = [], 0, sum(map(len, buffers))
    while done < nr:
        cluster, within = divmod(offset + done, size)
        step = min(size - within, nr - done)
        parts.append((cluster, within, _cut(buffers, done, step)))
        done += step
    return parts


def _cut(buffers: list[memoryview], start: int, nr: int = 1 << 62) -> list[memoryview]:
    """The views of nr bytes (all, if there are fewer) from `start` on."""
    found = []
    for view in buffers:
        if start < len(view) and nr > 0:
            part = view[start : start + nr]
            found.append(part)
            nr -= len(part)
        start = max(start - len(view), 0)
    return found


def _scatter(data: memoryview | None, buffers: list[memoryview]) -> None:
    """Fill the buffers from data; None: with zeros."""
    at = 0
    for view in buffers:
        view[:] = bytes(len(view)) if data is None else data[at : at + len(view)]
        at += len(view)
