"""Open a disk's file as its format says."""

from __future__ import annotations

from typing import Protocol

from xsave.errors import StorageError
from xsave.guest.xen.blkback.disk import Disk
from xsave.host.disk.file import DiskFile
from xsave.host.disk.qcow2 import MAGIC, Qcow2, read_header
from xsave.host.disk.spec import DiskSpec

_SECTOR_BYTES = 512


class Image(Disk, Protocol):
    """An open image. close() writes what is not yet written."""

    def close(self) -> None: ...


class Raw:
    """The file is the disk."""

    def __init__(self, file: DiskFile, *, readonly: bool) -> None:
        self._file = file
        self.readonly = readonly
        self.nr_sectors = file.size // _SECTOR_BYTES
        self.read, self.write = file.read, file.write

    def flush(self) -> None:
        if not self.readonly:
            self._file.sync()

    def close(self) -> None:
        self._file.close()


def open_image(spec: DiskSpec) -> Image:
    """Open and lock it. Raises StorageError."""
    file = DiskFile.open(spec.path, readonly=spec.readonly)
    try:
        if spec.format == "qcow2":
            return Qcow2.open(file, readonly=spec.readonly)
        return Raw(file, readonly=spec.readonly)
    except BaseException:
        file.close()
        raise


def check(spec: DiskSpec, *, fresh: bool = False) -> None:
    """Look whether the disk could be attached; its lock is not looked at. fresh: somebody has
    just named it, so a wrong format is noticed that the guest itself could feign later.

    Raises StorageError."""
    file = DiskFile.open(spec.path, readonly=spec.readonly, lock=False)
    try:
        if spec.format == "qcow2":
            read_header(file, readonly=spec.readonly)
    finally:
        file.close()
    if fresh and spec.format == "raw":
        file = DiskFile.open(spec.path, readonly=True, lock=False)
        try:
            magic = bytes(file.read_bytes(0, len(MAGIC)))
        finally:
            file.close()
        if magic == MAGIC:
            raise StorageError(
                f"disk {spec.path}: it is a qcow2 image, and its format was given as raw",
                path=spec.path,
            )
