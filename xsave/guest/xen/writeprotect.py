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
import threading
from collections.abc import Iterable, Sequence
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
#: A gap of so many pages costs less than a scan more.
_GAP_PAGES = 1 << 12
#: From so many on (a millisecond's scan) two threads share the work.
_LARGE_PAGES = 1 << 17


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

    def written(self, runs: Sequence[tuple[int, int]], *, clear: bool) -> np.ndarray:
        """Return the pages (n,) i64 of these runs (first, nr) that lost their protection; with
        clear they have it again. Raises OSError."""
        flags = _SCAN_CHECK_WPASYNC | (_SCAN_WP_MATCHING if clear else 0)
        # With clear what lies in a gap would get the protection, too.
        spans = list(runs) if clear else _joined(runs)
        nr_pages = sum(nr for _, nr in spans)
        if nr_pages < _LARGE_PAGES:
            regions = self._scan(spans, flags)
        else:
            regions = self._scan_in_halves(*halves(spans, nr_pages // 2), flags)
        offsets = (regions[:, :2] - np.uint64(self._address)) >> np.uint64(PAGE_SHIFT)
        return pages_within(offsets.astype(np.int64), runs)

    def _scan(self, runs: Sequence[tuple[int, int]], flags: int) -> np.ndarray:
        """Return regions (n, 3) u64: start, end, categories."""
        full: list[np.ndarray] = []
        regions, used = np.empty((_MAX_REGIONS, 3), np.uint64), 0
        argument = np.zeros(_SCAN_BYTES // 8, np.uint64)
        argument[:2] = _SCAN_BYTES, flags
        argument[9] = argument[11] = _PAGE_IS_WRITTEN
        words, base = argument.data, regions.ctypes.data
        for first, nr in runs:
            start = self._address + (first << PAGE_SHIFT)
            end = start + (nr << PAGE_SHIFT)
            while start < end:
                if used == _MAX_REGIONS:
                    full.append(regions.copy())
                    used = 0
                words[2], words[3] = start, end
                words[5], words[6] = base + used * regions.strides[0], _MAX_REGIONS - used
                used += ioctl(self._pagemap, _PAGEMAP_SCAN, argument)
                if used < _MAX_REGIONS:
                    break
                # walk_end, which may lag behind what was found.
                start = max(words[4], int(regions[-1, 1]))
        return np.concatenate((*full, regions[:used]))

    def _scan_in_halves(
        self, runs: Sequence[tuple[int, int]], others: Sequence[tuple[int, int]], flags: int
    ) -> np.ndarray:
        """The guest stands still meanwhile, and its processor may have nothing else to do."""
        found: list[np.ndarray | OSError] = []

        def scan_others() -> None:
            try:
                found.append(self._scan(others, flags))
            except OSError as e:
                found.append(e)

        thread = threading.Thread(target=scan_others, name="scan")
        thread.start()
        try:
            regions = self._scan(runs, flags)
        finally:
            thread.join()
        if isinstance(found[0], OSError):
            raise found[0]
        return np.concatenate((regions, found[0]))

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


def pages_within(regions: np.ndarray, runs: Sequence[tuple[int, int]]) -> np.ndarray:
    """Return the pages (n,) i64 of regions (k, 2), start and end, that are in the runs (first,
    nr); both ascend and overlap nothing of their own."""
    begins, ends = regions.T
    first, nr = np.array(runs, np.int64).reshape(-1, 2).T
    low = np.searchsorted(first + nr, begins, side="right")
    counts = np.maximum(np.searchsorted(first, ends, side="left") - low, 0)
    run = _counting(low, counts)
    begins = np.maximum(np.repeat(begins, counts), first[run])
    return _counting(begins, np.minimum(np.repeat(ends, counts), (first + nr)[run]) - begins)


def _counting(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return so many numbers from each of these starts on, one behind the other."""
    before = np.cumsum(counts) - counts
    return np.arange(int(counts.sum())) + np.repeat(starts - before, counts)


def _joined(runs: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return the runs with those in one piece that are close to each other: a gap costs less."""
    spans: list[tuple[int, int]] = []
    for first, nr in runs:
        if spans and first - sum(spans[-1]) <= _GAP_PAGES:
            first, nr = spans[-1][0], first + nr - spans.pop()[0]
        spans.append((first, nr))
    return spans


def halves(
    runs: Sequence[tuple[int, int]], half: int
) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Cut the runs in two, the first one of `half` pages."""
    lower: list[tuple[int, int]] = []
    for i, (first, nr) in enumerate(runs):
        if nr > half:
            middle = [(first, half)] if half else []
            return [*lower, *middle], [(first + half, nr - half), *runs[i + 1 :]]
        lower.append((first, nr))
        half -= nr
    return lower, []
