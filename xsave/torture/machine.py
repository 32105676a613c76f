"""A machine of the laboratory: anonymous memory, copied on write, frames handed out in one order.

A host's machine is a file that processes share. Here the opposite is wanted: a `fork` must be a
snapshot of both machines, so their memory is private to a process, and a restore must put the
same guest into the same frames every time, so that code translated once stays valid. The machine
is far larger than the guests on it, and sparse: its frame numbers can then be such that no pfn
and no count is taken for one.
"""

from __future__ import annotations

import mmap
from pathlib import Path

import numpy as np

from xsave.errors import OutOfFrames
from xsave.frames import INVALID_M2P_ENTRY, PAGE_SHIFT, PAGE_SIZE
from xsave.guest.xen import machine as shared
from xsave.guest.xen.machine import DOMID_FREE, M2P_FIRST_FRAME, Machine, first_domain_frame

_MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)
_FLAGS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE


class PrivateMachine(Machine):
    """`frames` are the ones it hands out, in this order; `directory` takes the domains' files."""

    def __init__(self, name: str, nr_frames: int, directory: Path, frames: np.ndarray) -> None:
        self.directory = directory
        self.name = name
        self.nr_frames = nr_frames
        self.first_frame = first_domain_frame(nr_frames)
        self.map = mmap.mmap(-1, nr_frames << PAGE_SHIFT, flags=_FLAGS)
        self.mem = np.frombuffer(self.map, np.uint64).reshape(-1, 512)
        self.pages = np.frombuffer(self.map, np.uint8).reshape(-1, PAGE_SIZE)
        self.m2p = self.mem[M2P_FIRST_FRAME : self.first_frame].reshape(-1)[:nr_frames]
        self._tables()
        shared._initialise(self, 0)
        self.frames = frames.astype(np.uint64)
        self._next = 0

    def _tables(self) -> None:
        """The frame tables, as frames.tab holds them."""
        row_bytes = sum(np.dtype(dtype).itemsize for _, dtype in shared._COLUMNS)
        offset = shared._HEADER_BYTES
        self._tab = mmap.mmap(-1, offset + self.nr_frames * row_bytes, flags=_FLAGS)
        self.header = np.frombuffer(self._tab, np.uint64, 512)
        for column, dtype in shared._COLUMNS:
            setattr(self, column, np.frombuffer(self._tab, dtype, self.nr_frames, offset))
            offset += self.nr_frames * np.dtype(dtype).itemsize

    def allocate(self, domid: int, nr: int, order: int | None = None) -> np.ndarray:
        """Give the next nr frames to domid, (nr,) u64, in no other order. Raises OutOfFrames."""
        mfns = self.frames[self._next : self._next + nr]
        if mfns.size < nr:
            raise OutOfFrames(wanted=nr, free=int(mfns.size), host=self.name)
        self._next += nr
        self.owner[mfns] = domid
        return mfns

    def free(self, mfns: np.ndarray) -> None:
        """Take frames back, all zero again."""
        for mfn in mfns.tolist():
            self.map.madvise(mmap.MADV_DONTNEED, int(mfn) << PAGE_SHIFT, PAGE_SIZE)
        self.m2p[mfns] = INVALID_M2P_ENTRY
        for column, _ in shared._COLUMNS[1:]:
            getattr(self, column)[mfns] = 0
        self.owner[mfns] = DOMID_FREE

    def rewind(self) -> None:
        """Hand frames out from the first one again; all must have been given back."""
        self._next = 0

    def write_frames(self, mfns: np.ndarray, pages: np.ndarray, rows: np.ndarray) -> None:
        """Fill frames mfns (n,) with these rows (n,) of pages (m, 4096) u8."""
        self.pages[mfns] = pages[rows]

    def resident(self, mfns: np.ndarray) -> np.ndarray:
        """Return (n,) bool: which frames may hold something; here nobody knows, so all."""
        return np.ones(mfns.size, bool)
