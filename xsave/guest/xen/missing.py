"""Pages of a mapping that come when they are first touched, or before: userfaultfd, missing mode.

The mapping of machine memory is registered; a thread that touches a page of which the file has
nothing yet waits in the kernel until somebody puts the page there (`copy`, `zero`). That may be
another process than the one whose mapping it is, and has to be: the thread that waits may hold
the GIL. A page that is there is never put there again.

Two ways lead past this. A mapping of the same file that is not registered finds zeros in a
hole, and fills it with them; and a system call that is given a page that is not there (the faults
of the kernel itself are not handled) fails with EFAULT. So nobody else may look before all has
come, and who hands memory to the kernel touches it first.
"""

from __future__ import annotations

import errno
import os
import struct

import numpy as np

from xsave.frames import PAGE_SHIFT, PAGE_SIZE
from xsave.guest.xen import userfault
from xsave.guest.xen.userfault import ioctl

_MISSING_SHMEM = 1 << 5
_REGISTER_MODE_MISSING = 1
_UFFDIO_UNREGISTER = 0x8010AA01
_UFFDIO_WAKE = 0x8010AA02
_UFFDIO_COPY = 0xC028AA03
_UFFDIO_ZEROPAGE = 0xC020AA04
#: struct uffd_msg: the event, and of a fault the address.
_MESSAGE = struct.Struct("<B15xQ8x")
_EVENT_PAGEFAULT = 0x12
_MAX_MESSAGES = 64


def check(address: int, nr_pages: int) -> None:
    """Raise OSError if this mapping's faults cannot be had here."""
    MissingPages(address, nr_pages).close()


class MissingPages:
    """The faults of one mapping of nr pages (a page-aligned address) on pages that are missing.

    Raises OSError, where the kernel cannot do it or may not for us, too.
    """

    def __init__(self, address: int, nr_pages: int) -> None:
        self._address, self._nr_bytes = address, nr_pages << PAGE_SHIFT
        self.fd = userfault.open_fd(_MISSING_SHMEM)
        self._argument = np.zeros(5, np.uint64)
        try:
            userfault.register(self.fd, address, self._nr_bytes, _REGISTER_MODE_MISSING)
        except OSError:
            self.close()
            raise

    def faults(self) -> list[int]:
        """Return the numbers of pages that are waited for and were not asked for yet."""
        try:
            data = os.read(self.fd, _MESSAGE.size * _MAX_MESSAGES)
        except BlockingIOError:
            return []
        return [
            (address - self._address) >> PAGE_SHIFT
            for event, address in _MESSAGE.iter_unpack(data)
            if event == _EVENT_PAGEFAULT
        ]

    def copy(self, page: int, source: int) -> bool:
        """Put a page there, from a page at address `source` of this process. False if it was there:
        then it stays as it is."""
        target = self._address + (page << PAGE_SHIFT)
        return self._put(_UFFDIO_COPY, page, target, source, PAGE_SIZE, 0, 0)

    def zero(self, page: int) -> bool:
        """Put a page of zeros there; as copy()."""
        target = self._address + (page << PAGE_SHIFT)
        return self._put(_UFFDIO_ZEROPAGE, page, target, PAGE_SIZE, 0, 0)

    def _put(self, request: int, page: int, *fields: int) -> bool:
        while True:
            self._argument[: len(fields)] = fields
            try:
                ioctl(self.fd, request, self._argument)
            except OSError as e:
                if e.errno == errno.EAGAIN:  # the process's memory map is changing
                    continue
                if e.errno != errno.EEXIST:
                    raise
                self._wake(page)
                return False
            return True

    def _wake(self, page: int) -> None:
        """Whoever waits for a page that came by another way."""
        span = [self._address + (page << PAGE_SHIFT), PAGE_SIZE]
        ioctl(self.fd, _UFFDIO_WAKE, np.array(span, np.uint64))

    def wake(self) -> None:
        """Have all who wait ask again."""
        ioctl(self.fd, _UFFDIO_WAKE, np.array([self._address, self._nr_bytes], np.uint64))

    def end(self) -> None:
        """Nothing is missing any more, and nobody waits: what has not come is zero."""
        span = np.array([self._address, self._nr_bytes], np.uint64)
        ioctl(self.fd, _UFFDIO_UNREGISTER, span)

    def close(self) -> None:
        """Close the descriptor of this process. The last one to do so does what end() does."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
