"""What has not come yet of a domain's memory, and where it is: shared by those who see to it.

    mfns  (nr_frames,) u64   the frames to be filled, in the order of their pages in the image
    at    (nr_frames,) u64   by frame: the position of its page in the image's file, plus one;
                             0 once it has come, and for frames with nothing to come

A file without a name, of which only what is used takes memory. The command that restores fills it
in, the process that brings the pages crosses them off, the domain's process looks.
"""

from __future__ import annotations

import mmap
import os

import numpy as np


class Outstanding:
    """The mapped tables; `nr` is how many of mfns are used."""

    def __init__(self, fd: int) -> None:
        """fd: of create(); it is the caller's to close."""
        self._map = mmap.mmap(fd, 0)
        table = np.frombuffer(self._map, np.uint64)
        half = (table.size - 1) // 2
        self._nr, self.mfns, self.at = table[:1], table[1 : 1 + half], table[1 + half :]

    @staticmethod
    def create(nr_frames: int) -> int:
        """Return the descriptor of empty tables."""
        fd = os.memfd_create("outstanding", os.MFD_CLOEXEC)
        os.ftruncate(fd, 8 * (1 + 2 * nr_frames))
        return fd

    @property
    def nr(self) -> int:
        return int(self._nr[0])

    def put(self, mfns: np.ndarray, positions: np.ndarray) -> None:
        """Say that the pages of these frames (n,) are at these positions of the file (n,)."""
        self.at[mfns] = positions + np.uint64(1)
        self.mfns[: mfns.size] = mfns
        self._nr[0] = mfns.size
