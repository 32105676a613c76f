"""Which frames of a domain were written, for the log of dirty frames in the domain's own process.

Only chunks of which a page was ever touched are write-protected (writeprotect.py). A large guest
that uses little of its memory has few of these, and a scan takes time for each protected page,
touched or not. What the guest touches in another chunk is a page that was not in the file before,
and the file says so, a system call for each such chunk (SEEK_DATA): then all pages of the chunk
that are there are named, and from then on it is protected like the others.
"""

from __future__ import annotations

import errno
import os
from bisect import bisect_left

import numpy as np

from xsave.errors import StorageError
from xsave.frames import PAGE_SHIFT
from xsave.guest.xen.machine import CHUNK_FRAMES, Machine
from xsave.guest.xen.writeprotect import WriteProtection

_CHUNK_SHIFT = PAGE_SHIFT + CHUNK_FRAMES.bit_length() - 1


class WrittenFrames:
    """Those of one domain of this process. Raises StorageError where the kernel cannot tell."""

    def __init__(self, machine: Machine, domid: int) -> None:
        self._machine = machine
        self._domid = domid
        self._protection = WriteProtection(machine.pages.ctypes.data, machine.nr_frames)
        self._file = -1
        self._protected = np.zeros(nr_chunks(machine), bool)
        self._owned = owned_chunks(machine, domid)  # at any time
        try:
            self._file = os.open(machine.directory / "machine.mem", os.O_RDONLY | os.O_CLOEXEC)
            self._protect(self._touched(self._owned))
        except OSError as e:
            self.close()
            raise StorageError(f"writes cannot be logged by write protection: {e}") from e

    def written(self, marked: np.ndarray, *, clear: bool) -> np.ndarray:
        """Return frames (n,) i64, none twice: those written since the last time with clear, and
        perhaps others that were touched since. marked: frames (m,) i64, among them those that
        have become the domain's since the last time. Raises StorageError."""
        mine = self._machine.owner[marked] == self._domid
        self._owned[marked[mine] // CHUNK_FRAMES] = True
        try:
            return self._written(clear=clear)
        except OSError as e:
            raise StorageError(f"the log of dirty frames cannot be read: {e}") from e

    def _written(self, *, clear: bool) -> np.ndarray:
        machine = self._machine
        known = self._owned & self._protected
        new = self._touched(self._owned & ~self._protected)
        if clear:  # first: what is touched from here on is found the next time
            self._protect(new)
        frames = (np.flatnonzero(new)[:, None] * CHUNK_FRAMES + np.arange(CHUNK_FRAMES)).reshape(-1)
        frames = frames[frames < machine.nr_frames]
        frames = frames[machine.resident(frames)] if frames.size else frames
        written = self._protection.written(runs(known, machine.nr_frames), clear=clear)
        found = np.concatenate((written, frames))
        return found[machine.owner[found] == self._domid]

    def _protect(self, chunks: np.ndarray) -> None:
        self._protection.protect(runs(chunks, self._machine.nr_frames))
        self._protected |= chunks

    def _touched(self, chunks: np.ndarray) -> np.ndarray:
        """Return those of these chunks (n,) bool that have a page in the file."""
        touched, asked, i = np.zeros(chunks.size, bool), np.flatnonzero(chunks).tolist(), 0
        try:
            while i < len(asked):
                there = os.lseek(self._file, asked[i] << _CHUNK_SHIFT, os.SEEK_DATA) >> _CHUNK_SHIFT
                i = bisect_left(asked, there, i)
                if i < len(asked) and asked[i] == there:
                    touched[there] = True
                    i += 1
        except OSError as e:
            if e.errno != errno.ENXIO:  # there is nothing behind
                raise
        return touched

    def close(self) -> None:
        """Take all protection off."""
        self._protection.close()
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def nr_chunks(machine: Machine) -> int:
    """How many chunks the machine's frames are, the last one perhaps a part of one."""
    return -(-machine.nr_frames // CHUNK_FRAMES)


def owned_chunks(machine: Machine, domid: int) -> np.ndarray:
    """Return the chunks (n,) bool in which there is a frame of the domain."""
    owned = np.zeros(nr_chunks(machine) * CHUNK_FRAMES, bool)
    np.equal(machine.owner, domid, out=owned[: machine.nr_frames])
    words = owned.view(np.uint64).reshape(-1, CHUNK_FRAMES // 8)
    return np.asarray(words.any(axis=1))


def runs(chunks: np.ndarray, nr_frames: int) -> list[tuple[int, int]]:
    """Return runs (first, nr) of frames, those of these chunks (n,) bool."""
    padded = np.zeros(chunks.size + 2, bool)
    padded[1:-1] = chunks
    edges = np.flatnonzero(np.diff(padded)) * CHUNK_FRAMES
    ends = np.minimum(edges[1::2], nr_frames)
    return list(zip(edges[::2].tolist(), (ends - edges[::2]).tolist(), strict=True))
