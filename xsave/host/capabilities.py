"""What this machine and this xsave can do, for `xsave info`: looked up, never assumed."""

from __future__ import annotations

import ctypes
import fcntl
import os
import platform
import struct
from pathlib import Path
from typing import Any

from xsave.guest.xen.cpuid import XEN_VERSION, CpuPolicy, emulated_features, lacking_features

_PACKAGES = ("xsave", "unicorn", "numpy", "zstandard", "construct")
_SHMEM_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")

_SYS_USERFAULTFD = 323
_UFFD_USER_MODE_ONLY = 1
_UFFD_API = 0xAA
_UFFDIO_API = 0xC018AA3F
_UFFD_FEATURE_WP_ASYNC = 1 << 15


def capabilities() -> dict[str, Any]:
    """Return cpu_features, cpu_lacking, dirty_log, huge_pages and versions."""
    return {
        "cpu_features": emulated_features(CpuPolicy.default().cpuid),
        "cpu_lacking": lacking_features(),
        "dirty_log": "userfaultfd" if _has_async_write_protect() else "compare",
        "huge_pages": _shmem_huge_pages(),
        "versions": _versions(),
    }


def _has_async_write_protect() -> bool:
    """True if userfaultfd can log writes without stopping the writer (Linux 6.7 and newer)."""
    libc = ctypes.CDLL(None, use_errno=True)
    fd = libc.syscall(_SYS_USERFAULTFD, os.O_CLOEXEC | os.O_NONBLOCK | _UFFD_USER_MODE_ONLY)
    if fd < 0:
        return False
    try:
        fcntl.ioctl(fd, _UFFDIO_API, struct.pack("<QQQ", _UFFD_API, _UFFD_FEATURE_WP_ASYNC, 0))
    except OSError:
        return False
    finally:
        os.close(fd)
    return True


def _shmem_huge_pages() -> str:
    """Return what the kernel does about huge pages in shared memory; "unknown" if it hides it."""
    try:
        words = _SHMEM_HUGE_PAGES.read_text().split()
    except OSError:
        return "unknown"
    return next((word.strip("[]") for word in words if word.startswith("[")), "unknown")


def _versions() -> dict[str, str]:
    from importlib import metadata  # 10 ms that no other command needs

    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:  # run from its source, not installed
            found[name] = "unknown"
    return found | {"linux": platform.release(), "xen": ".".join(map(str, XEN_VERSION))}
