"""What the tests with Linux's own blkfront share: the modules it needs, and whether a file system
is sound."""

from __future__ import annotations

import lzma
import shutil
import subprocess
from pathlib import Path

import pytest

#: In the order in which they need one another; a kernel may have some of them built in.
MODULES = ("crc16", "libcrc32c", "crc32c_generic", "mbcache", "jbd2", "ext4", "xen-blkfront")


def modules(directory: Path, kernel: str) -> dict[str, bytes]:
    """{file in the ramdisk: contents} of the modules of directory/kernel that a block device and
    ext4 need; skips where tests/distro/fetch has left none."""
    found = directory / kernel.replace("vmlinuz", "modules")
    if not found.is_dir():
        pytest.skip(f"no {found.name} in {directory}")
    read = {f"{name}.ko": _module(found, name) for name in MODULES}
    return {name: data for name, data in read.items() if data is not None}


def _module(directory: Path, name: str) -> bytes | None:
    """A module's bytes, None if the kernel's package has none of that name."""
    plain, packed = directory / f"{name}.ko", directory / f"{name}.ko.xz"
    if plain.exists():
        return plain.read_bytes()
    return lzma.decompress(packed.read_bytes()) if packed.exists() else None


def is_sound(image: Path) -> None:
    """Assert that e2fsck, where there is one, finds nothing wrong with a raw image."""
    if shutil.which("e2fsck"):
        done = subprocess.run(["e2fsck", "-fn", str(image)], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
