"""Which pages of a machine's memory were ever touched, asked of the kernel without reading them.

mincore(2) answers for a whole range at once, but it knows only what is in memory at this moment:
a page in swap, or on a disk file system written back and evicted, looks like one that never was.
So it is believed on tmpfs while no swap is in use; elsewhere the holes of the file are asked for,
extent by extent.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from xsave.frames import PAGE_SHIFT, PAGE_SIZE

_TMPFS_MAGIC = 0x01021994
_SYSINFO_TOTALSWAP, _SYSINFO_FREESWAP = 8, 9  # of struct sysinfo, in longs
_libc = ctypes.CDLL(None, use_errno=True)


def mark_touched(
    path: Path, address: int, runs: Iterable[tuple[int, int]], touched: np.ndarray
) -> None:
    """Fill touched[first : first + nr] for each run (first, nr) of pages of a file.

    The file is mapped at `address`; touched is bool, one per page of the file. False only for
    pages that are holes and hold zeros.
    """
    runs = list(runs)
    if _all_in_memory(path) and _mincore(address, runs, touched) and not _swap_in_use():
        return
    for first, nr in runs:
        touched[first : first + nr] = _data_pages(path, first, nr)


def _mincore(address: int, runs: list[tuple[int, int]], touched: np.ndarray) -> bool:
    """Ask what is in memory; return whether the kernel answered."""
    vector = np.empty(max((nr for _, nr in runs), default=0), np.uint8)
    answer = ctypes.c_void_p(vector.ctypes.data)
    for first, nr in runs:
        start = ctypes.c_void_p(address + (first << PAGE_SHIFT))
        if _libc.mincore(start, ctypes.c_size_t(nr << PAGE_SHIFT), answer):
            return False
        touched[first : first + nr] = vector[:nr] & 1
    return True


def _all_in_memory(path: Path) -> bool:
    status = (ctypes.c_long * 64)()
    failed = _libc.statfs(os.fsencode(path), ctypes.byref(status))
    return not failed and status[0] == _TMPFS_MAGIC and not _swap_in_use()


def _swap_in_use() -> bool:
    """sysinfo(2), as containers often show a /proc/meminfo of their own."""
    info = (ctypes.c_ulong * 64)()
    failed = _libc.sysinfo(ctypes.byref(info))
    return bool(failed) or info[_SYSINFO_TOTALSWAP] != info[_SYSINFO_FREESWAP]


def _data_pages(path: Path, first: int, nr: int) -> np.ndarray:
    """Walk the extents of the file: SEEK_DATA, SEEK_HOLE."""
    found = np.zeros(nr, bool)
    end = (first + nr) << PAGE_SHIFT
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        at = first << PAGE_SHIFT
        while at < end:
            data = os.lseek(fd, at, os.SEEK_DATA)
            at = os.lseek(fd, data, os.SEEK_HOLE)
            pages = slice((data >> PAGE_SHIFT) - first, -(-at // PAGE_SIZE) - first)
            found[pages] = True
    except OSError as e:
        if e.errno != errno.ENXIO:  # that means: no data behind `at`
            found[:] = True
    finally:
        os.close(fd)
    return found
