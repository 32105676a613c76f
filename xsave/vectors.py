"""Scattered memory in one system call: writev(2) and pwritev(2) with vectors that numpy makes.

The rows of a big array (a guest's pages in machine memory) go to the kernel by their addresses,
so that nobody gathers them first and no Python runs per row. The GIL is free meanwhile. A leaf:
imports nothing of xsave.
"""

from __future__ import annotations

import ctypes
import os

import numpy as np

#: Vectors of one system call (IOV_MAX).
MAX_VECTORS = 1024

_libc = ctypes.CDLL(None, use_errno=True)
_libc.writev.restype = _libc.pwritev.restype = ctypes.c_ssize_t


def row_vectors(array: np.ndarray, index: np.ndarray) -> np.ndarray:
    """Return the iovecs of these rows of an array, (k, 2) u64: address and length.

    The rows must be contiguous. No reference is held: the array must live while they are used.
    """
    row_bytes = np.uint64(array.strides[0])
    found = np.empty((len(index), 2), np.uint64)
    found[:, 0] = index
    found[:, 0] *= row_bytes
    found[:, 0] += np.uint64(array.ctypes.data)
    found[:, 1] = row_bytes
    return found


def write_vectors(fd: int, some: np.ndarray, position: int | None = None) -> int:
    """Write the first vectors, at most MAX_VECTORS; return how many bytes went out.

    At a position of the file, or where the descriptor stands. Raises OSError.
    """
    address, nr = ctypes.c_void_p(some.ctypes.data), min(len(some), MAX_VECTORS)
    while True:
        if position is None:
            written = _libc.writev(fd, address, nr)
        else:
            written = _libc.pwritev(fd, address, nr, ctypes.c_int64(position))
        if written >= 0:
            return int(written)
        error = OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        if not isinstance(error, InterruptedError):  # a signal: its handler has run by now
            raise error


def behind(some: np.ndarray, written: int) -> np.ndarray:
    """Return what is left of the vectors behind their first `written` bytes."""
    ends = np.cumsum(some[:, 1])
    first = int(np.searchsorted(ends, written, side="right"))
    rest = some[first:]
    if len(rest) and (done := written - int(ends[first] - rest[0, 1])):
        rest = rest.copy()
        rest[0, 0] += np.uint64(done)
        rest[0, 1] -= np.uint64(done)
    return rest
