"""What a host says of a disk to the backend: its name in the store, and how its bytes move.

Nothing of the emulator is imported here: commands that only speak of disks want these too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

_CDROM, _REMOVABLE, _READONLY = 1, 2, 4


class Disk(Protocol):
    """What is behind the device. Methods raise OSError; each moves all of the bytes or fails."""

    readonly: bool

    @property
    def nr_sectors(self) -> int: ...
    def read(self, offset: int, buffers: list[memoryview]) -> None: ...
    def write(self, offset: int, buffers: list[memoryview]) -> None: ...
    def flush(self) -> None: ...


@dataclass(frozen=True)
class Vbd:
    """What the store says of a device. devid: its number (51712 is xvda); params: FORMAT:PATH."""

    devid: int
    name: str
    params: str
    readonly: bool
    cdrom: bool

    @property
    def info(self) -> int:
        cdrom = _CDROM | _REMOVABLE if self.cdrom else 0
        return cdrom | (_READONLY if self.readonly else 0)
