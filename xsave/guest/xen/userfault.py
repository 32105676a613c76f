"""userfaultfd(2): what writeprotect.py and missing.py have in common.

Only faults of user mode are handled here: an ordinary user may have these whatever
vm.unprivileged_userfaultfd says. Structures and numbers: include/uapi/linux/userfaultfd.h.
"""

from __future__ import annotations

import ctypes
import errno
import os

import numpy as np

_SYS_USERFAULTFD = 323
_UFFD_USER_MODE_ONLY = 1
_UFFD_API = 0xAA
_UFFDIO_API = 0xC018AA3F
_UFFDIO_REGISTER = 0xC020AA00

_libc = ctypes.CDLL(None, use_errno=True)


def open_fd(features: int) -> int:
    """Return a new descriptor with these UFFD_FEATURE bits. Raises OSError."""
    flags = os.O_CLOEXEC | os.O_NONBLOCK | _UFFD_USER_MODE_ONLY
    fd: int = _libc.syscall(_SYS_USERFAULTFD, flags)
    if fd < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    try:
        ioctl(fd, _UFFDIO_API, np.array([_UFFD_API, features, 0], np.uint64))
    except OSError:
        os.close(fd)
        raise
    return fd


def register(fd: int, address: int, nr_bytes: int, mode: int) -> None:
    """Have faults of this mode (UFFDIO_REGISTER_MODE) in a mapping handled. Raises OSError."""
    ioctl(fd, _UFFDIO_REGISTER, np.array([address, nr_bytes, mode, 0], np.uint64))


def ioctl(fd: int, request: int, argument: np.ndarray) -> int:
    """Call ioctl with a structure of u64 in place, without the GIL. Raises OSError."""
    address = ctypes.c_void_p(argument.ctypes.data)
    while True:
        result: int = _libc.ioctl(fd, ctypes.c_ulong(request), address)
        if result >= 0:
            return result
        if ctypes.get_errno() != errno.EINTR:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
