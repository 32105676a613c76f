"""Which pages of a mapping were written, asked of the kernel: userfaultfd and PAGEMAP_SCAN.

The mapping of machine memory is registered for write protection that resolves by itself
(UFFD_FEATURE_WP_ASYNC, Linux 6.7): the first write to a protected page takes the protection off
in the kernel, nobody is woken and no writer waits. A scan lists the pages without protection and
protects them again, page by page in one step, so that no write is lost between the two.

What counts is the page table of this process: whoever writes through the registered mapping is
seen, be it the emulated guest, the emulator's MMU, the hypervisor's numpy views or a read(2) of a
back end; another process's mapping of the same file is not. So it belongs into the process whose
mapping that is, the domain's.

Structures and numbers: include/uapi/linux/userfaultfd.h and fs.h; Documentation/admin-guide/mm.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Self

import numpy as np

from xsave.errors import StorageError
from xsave.frames import PAGE_SHIFT
from xsave.guest.xen import userfault
from xsave.guest.xen.userfault import ioctl

_WP_UNPOPULATED, _WP_ASYNC, _WP_SHMEM = 1 << 13, 1 << 15, 1 << 12
_UFFDIO_WRITEPROTECT = 0xC018AA06
_REGISTER_MODE_WP, _WRITEPROTECT_MODE_WP = 2, 1

_PAGEMAP_SCAN = 0xC0606610
_SCAN_WP_MATCHING, _SCAN_CHECK_WPASYNC = 1, 2
_PAGE_IS_WRITTEN = 2
#: Of struct pm_scan_arg, twelve u64.
_SCAN_BYTES = 96
_MAX_REGIONS = 4096


class WriteProtection:
    """The write protection of one mapping of nr pages (a page-aligned address).

    Raises StorageError where the kernel cannot do it, or not with what is mapped (a file that is
    not on tmpfs). Closing it takes all protection off.
    """

    def __init__(self, address: int, nr_pages: int) -> None:
        self._address, self._nr_pages = address, nr_pages
        self._fd = self._pagemap = -1
        try:
            self._fd = userfault.open_fd(_WP_ASYNC | _WP_UNPOPULATED | _WP_SHMEM)
            userfault.register(self._fd, address, nr_pages << PAGE_SHIFT, _REGISTER_MODE_WP)
            self._pagemap = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
            self.written([(0, 1)], clear=False)  # PAGEMAP_SCAN is a little younger
        except OSError as e:
            self.close()
            raise StorageError(f"writes cannot be logged by write protection: {e}") from e

    def protect(self, runs: Iterable[tuple[int, int]]) -> None:
        """Protect runs (first, nr) of pages, also those that are not there yet. Raises OSError."""
        for first, nr in runs:
            start = self._address + (first << PAGE_SHIFT)
            span = np.array([start, nr << PAGE_SHIFT, _WRITEPROTECT_MODE_WP], np.uint64)
            ioctl(self._fd, _UFFDIO_WRITEPROTECT, span)

    def written(self, runs: Iterable[tuple[int, int]], *, clear: bool) -> np.ndarray:
        """Return (nr_pages,) bool: the pages of these runs (first, nr) that lost their
        protection; with clear they have it again. Raises OSError."""
        found = np.zeros(self._nr_pages, bool)
        flags = _SCAN_CHECK_WPASYNC | (_SCAN_WP_MATCHING if clear else 0)
        regions = np.empty((_MAX_REGIONS, 3), np.uint64)
        for first, nr in runs:
            start = self._address + (first << PAGE_SHIFT)
            end = start + (nr << PAGE_SHIFT)
            while start < end:
                argument = np.zeros(_SCAN_BYTES // 8, np.uint64)
                argument[:4] = _SCAN_BYTES, flags, start, end
                argument[5:7] = regions.ctypes.data, len(regions)
                argument[9] = argument[11] = _PAGE_IS_WRITTEN
                count = ioctl(self._pagemap, _PAGEMAP_SCAN, argument)
                self._mark(regions[:count], found)
                start = int(argument[4])  # walk_end: before the end if the regions are full
        return found

    def _mark(self, regions: np.ndarray, found: np.ndarray) -> None:
        """Set found for regions (n, 3): start, end, categories; ascending and apart."""
        if not len(regions):
            return
        offsets = regions[:, :2] - np.uint64(self._address)
        pages = (offsets >> np.uint64(PAGE_SHIFT)).astype(np.intp)
        low, high = int(pages[0, 0]), int(pages[-1, 1])
        edges = np.zeros(high - low + 1, np.int8)
        edges[pages[:, 0] - low] += 1
        edges[pages[:, 1] - low] -= 1
        found[low:high] |= np.cumsum(edges[:-1], dtype=np.int8).astype(bool)

    def close(self) -> None:
        """Take all protection off."""
        for fd in (self._fd, self._pagemap):
            if fd >= 0:
                os.close(fd)
        self._fd = self._pagemap = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
