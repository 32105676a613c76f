"""What this machine and this xsave can do, for `xsave info`: looked up, never assumed."""

from __future__ import annotations

import contextlib
import platform
from pathlib import Path
from typing import Any

from xsave.errors import StorageError
from xsave.guest.xen.cpuid import XEN_VERSION, CpuPolicy, emulated_features, lacking_features
from xsave.guest.xen.logdirty import COMPARE, USERFAULTFD
from xsave.guest.xen.machine import Machine
from xsave.guest.xen.writeprotect import WriteProtection

_PACKAGES = ("xsave", "unicorn", "numpy", "zstandard", "construct")
_SHMEM_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")


def capabilities(machine: Machine) -> dict[str, Any]:
    """Return cpu_features, cpu_lacking, dirty_log, huge_pages and versions."""
    return {
        "cpu_features": emulated_features(CpuPolicy.default().cpuid),
        "cpu_lacking": lacking_features(),
        "dirty_log": _dirty_log(machine),
        "huge_pages": _shmem_huge_pages(),
        "versions": _versions(),
    }


def _dirty_log(machine: Machine) -> str:
    """Return which log of dirty frames domains of this machine have, found by trying."""
    with contextlib.suppress(StorageError):
        WriteProtection(machine.pages.ctypes.data, machine.nr_frames).close()
        return USERFAULTFD
    return COMPARE


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
