"""L1 and L2 tables: where each cluster of the disk lies in the file, and putting it elsewhere."""

from __future__ import annotations

import errno
from array import array

from xsave.host.disk.file import DiskFile
from xsave.host.disk.qcow2.header import Header
from xsave.host.disk.qcow2.refcounts import Refcounts, read_words, write_words

COPIED = 1 << 63  # exactly one reference: it may be written where it is
COMPRESSED = 1 << 62
ZERO = 1
OFFSET_MASK = 0x00FF_FFFF_FFFF_FE00
_CACHE_BYTES = 8 << 20
_MIN_CACHED = 8


class Clusters:
    """`refcounts` None: the image is only read."""

    def __init__(self, file: DiskFile, header: Header, refcounts: Refcounts | None) -> None:
        self._file = file
        self._header = header
        self._refcounts = refcounts
        self._per_table = header.cluster_bytes // 8
        self._l1 = read_words(file, header.l1_offset, header.l1_size)
        self._l1_dirty = False
        self._tables: dict[int, array[int]] = {}
        self._dirty: set[int] = set()
        self._dropped: list[int] = []
        self._room = max(_CACHE_BYTES // header.cluster_bytes, _MIN_CACHED)

    def entry(self, cluster: int) -> int:
        """Return the L2 entry of a cluster of the disk; 0: there is none. Raises OSError."""
        index, slot = divmod(cluster, self._per_table)
        if not self._l1[index] & OFFSET_MASK:
            return 0
        return self._table(index)[slot]

    def _table(self, index: int) -> array[int]:
        table = self._tables.pop(index, None)
        if table is None:
            offset = self._l1[index] & OFFSET_MASK
            if offset % self._header.cluster_bytes:
                raise OSError(errno.EIO, "an L2 table is at no cluster")
            table = read_words(self._file, offset, self._per_table)
        self._tables[index] = table  # the one used last is the last one
        return table

    def offset(self, entry: int) -> int:
        """Where an ordinary entry's cluster is in the file. Raises OSError."""
        offset = entry & OFFSET_MASK
        if offset % self._header.cluster_bytes:
            raise OSError(errno.EIO, "a cluster's offset is none")
        return offset

    # -- changes ---

    @property
    def crowded(self) -> bool:
        """True if so many tables have changed that it is time to write them."""
        return len(self._dirty) >= self._room

    def set(self, cluster: int, offset: int, released: list[int]) -> None:
        """The cluster lies at `offset` from now on; these clusters of the file lose a reference
        when that is known on the disk. Raises OSError."""
        index, slot = divmod(cluster, self._per_table)
        self._make_own(index)
        self._table(index)[slot] = offset | COPIED
        self._dirty.add(index)
        self._dropped += released

    def _make_own(self, index: int) -> None:
        """See to it that the L2 table is there and no snapshot's too."""
        refcounts, entry = self._refcounts, self._l1[index]
        assert refcounts is not None
        if entry & COPIED and entry & OFFSET_MASK:
            return
        old = entry & OFFSET_MASK
        table = array("Q", self._table(index)) if old else array("Q", bytes(8 * self._per_table))
        new = refcounts.allocate()
        if old:
            self._dropped.append(old)
        self._tables[index] = table
        self._l1[index] = new | COPIED
        self._l1_dirty = True
        self._dirty.add(index)

    def write(self) -> None:
        """Write what changed, in an order that leaves nothing pointing to nothing."""
        refcounts = self._refcounts
        assert refcounts is not None
        refcounts.write()
        for index in sorted(self._dirty):
            write_words(self._file, self._l1[index] & OFFSET_MASK, self._tables[index])
        if self._dirty:
            self._file.sync()
        self._dirty.clear()
        if self._l1_dirty:
            write_words(self._file, self._header.l1_offset, self._l1)
            self._file.sync()
            self._l1_dirty = False
        dropped, self._dropped = self._dropped, []
        for offset in dropped:
            refcounts.drop(offset)
        if dropped:
            refcounts.write()

    def trim(self) -> None:
        """Forget the tables used least lately that did not change."""
        for index in list(self._tables):
            if len(self._tables) <= self._room:
                return
            if index not in self._dirty:
                del self._tables[index]
