"""Tell from its first eight bytes which wrapping an image has, or what else the bytes are.

Detect by content, never by name or flag: handing one version over as another broke restores
in other toolstacks. What is known but not read gets its own words.
"""

from __future__ import annotations

from xsave.errors import ImageError
from xsave.image.xl import MAGIC

_FORMATS = {MAGIC[:8]: "xl", b"LibxlFmt": "libxl", b"\xff" * 8: "libxc"}

_STRANGERS = {
    b"libvirt-": "a libvirt save file, which is not read yet",
    b"XenSaved": "a XAPI (XenServer, XCP-ng) save file, which is not read yet",
    b"LinuxGue": "a legacy xend save file (Xen 4.4 or older), which is not read yet",
    b"\x7fELF": "an ELF file (a kernel, or a core of xl dump-core), not a saved image",
    b"QEVM": "a QEMU save file, not a Xen image",
    b"\x1f\x8b": "gzip data: decompress it first",
    b"\xfd7zXZ": "xz data: decompress it first",
    b"\x28\xb5\x2f\xfd": "zstd data inside zstd data",
}


def recognise(start: bytes) -> str:
    """Return "xl", "libxl" or "libxc" for the first eight bytes; ImageError for all else."""
    if start in _FORMATS:
        return _FORMATS[start]
    for magic, what in _STRANGERS.items():
        if start.startswith(magic):
            raise ImageError(what, offset=0)
    if start[4:] == bytes(4) and start[:4] != bytes(4):
        # A 64-bit legacy stream begins with its p2m size, which fits 32 bits.
        raise ImageError("maybe a legacy libxc stream (Xen 4.5 or older), not read yet", offset=0)
    raise ImageError("not a Xen image", offset=0, found=start.hex(" "))
