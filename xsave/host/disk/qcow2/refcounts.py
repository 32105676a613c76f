"""Reference counts of the file's clusters, 16 bits each: a table of blocks of them.

New clusters are taken behind the end of the file, so that they hold zeros; what becomes free is
left to qemu-img, or to a later writer. Nothing is written before write(): see the package.
"""

from __future__ import annotations

import errno
import struct
import sys
from array import array

from xsave.host.disk.file import DiskFile
from xsave.host.disk.qcow2.header import REFCOUNT_TABLE_OFFSET, Header

_MAX_COUNT = 0xFFFF


def read_words(file: DiskFile, offset: int, nr: int, code: str = "Q") -> array[int]:
    """Return nr big-endian words of the file as numbers."""
    words = array(code)
    words.frombytes(file.read_bytes(offset, nr * words.itemsize))
    return _swapped(words)


def write_words(file: DiskFile, offset: int, words: array[int]) -> None:
    """The inverse."""
    file.write_bytes(offset, _swapped(array(words.typecode, words)).tobytes())


def _swapped(words: array[int]) -> array[int]:
    if sys.byteorder == "little":
        words.byteswap()
    return words


class Refcounts:
    """Of a writable image."""

    def __init__(self, file: DiskFile, header: Header) -> None:
        self._file = file
        self._cluster = header.cluster_bytes
        self._per_block = self._cluster // 2
        self._offset = header.refcount_offset
        nr = header.refcount_clusters * self._cluster // 8
        self._table = read_words(file, self._offset, nr)
        self._blocks: dict[int, array[int]] = {}
        self._dirty: set[int] = set()
        self._table_dirty = self._moved = False
        self._retired: list[int] = []
        self._next = -(-file.size // self._cluster)

    def allocate(self, nr: int = 1) -> int:
        """Return the offset of nr new clusters in a row. Raises OSError."""
        first = self._next
        while any(self._get(first + i) for i in range(nr)):
            first += 1
        self._next = first + nr
        for cluster in range(first, first + nr):
            self._set(cluster, 1)
        return first * self._cluster

    def drop(self, offset: int) -> None:
        """One reference to the cluster at this offset is no more."""
        cluster = offset // self._cluster
        if count := self._get(cluster):
            self._set(cluster, count - 1)

    def write(self) -> None:
        """Write all that changed; data are on the disk before, this is when it returns."""
        self._write_blocks()
        self._write_table()
        retired, self._retired = self._retired, []
        if retired:  # now that nothing names them, nor will after a crash
            for offset in retired:
                self.drop(offset)
            self._write_blocks()

    def _write_blocks(self) -> None:
        for index in sorted(self._dirty):
            write_words(self._file, self._table[index], self._blocks[index])
        self._file.sync()
        self._dirty.clear()

    def _write_table(self) -> None:
        """The table, and then where it is."""
        if self._table_dirty:
            write_words(self._file, self._offset, self._table)
            self._file.sync()
            self._table_dirty = False
        if self._moved:
            clusters = len(self._table) * 8 // self._cluster
            place = struct.pack(">QI", self._offset, clusters)
            self._file.write_bytes(REFCOUNT_TABLE_OFFSET, place)
            self._file.sync()
            self._moved = False

    def _get(self, cluster: int) -> int:
        index, slot = divmod(cluster, self._per_block)
        if index >= len(self._table) or not self._table[index]:
            return 0
        return self._block(index)[slot]

    def _block(self, index: int) -> array[int]:
        if index not in self._blocks:
            offset = self._table[index]
            if offset % self._cluster:
                raise OSError(errno.EIO, "a refcount block is at no cluster")
            self._blocks[index] = read_words(self._file, offset, self._per_block, "H")
        return self._blocks[index]

    def _set(self, cluster: int, count: int) -> None:
        index, slot = divmod(cluster, self._per_block)
        if index >= len(self._table):
            self._grow(index)
        if not self._table[index]:
            self._add_block(index)
        self._block(index)[slot] = count
        self._dirty.add(index)

    def _add_block(self, index: int) -> None:
        """A block for clusters beyond all others; it may have to count itself."""
        cluster, self._next = self._next, self._next + 1
        self._table[index] = cluster * self._cluster
        self._blocks[index] = array("H", bytes(2 * self._per_block))
        self._table_dirty = True
        self._set(cluster, 1)

    def _grow(self, index: int) -> None:
        """Move the table to where it can be larger."""
        old, size = self._offset, len(self._table)
        clusters = size * 8 // self._cluster
        while size <= index:
            size, clusters = size * 2 or self._cluster // 8, clusters * 2 or 1
        first, self._next = self._next, self._next + clusters
        previous = len(self._table) * 8 // self._cluster
        self._table.extend([0] * (size - len(self._table)))
        self._offset = first * self._cluster
        self._table_dirty = self._moved = True
        for cluster in range(first, first + clusters):
            self._set(cluster, 1)
        self._retired += [old + i * self._cluster for i in range(previous)]
