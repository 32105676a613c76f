"""Virtual device names and their numbers: xen-vbd-interface(7), libxl__device_disk_dev_number."""

from __future__ import annotations

import re

_MAX_EXTENDED_DISK, _MAX_EXTENDED_PARTITION = 1 << 20, 1 << 8
_XVD_MAJOR, _SD_MAJOR, _IDE_MAJORS = 202, 8, (3, 22)
_NAME = re.compile(r"(?:d([0-9]{1,7})(?:p([0-9]{1,3}))?|(xvd|sd|hd)([a-z]{1,3})([0-9]{0,3}))\Z")


def device_number(vdev: str) -> int | None:
    """Return the number of xvda, sdb1, hdc, d3p2, or of a number written down; None: it is none."""
    match = _NAME.match(vdev)
    if match is None:
        return int(vdev, 0) if re.fullmatch(r"0x[0-9a-fA-F]{1,7}|[1-9][0-9]{0,8}", vdev) else None
    if match[3] is None:
        return _xvd(int(match[1]), int(match[2] or 0))
    disk, partition = _letters(match[4]), int(match[5] or 0)
    if match[3] == "xvd":
        return _xvd(disk, partition)
    if match[3] == "sd":
        return _SD_MAJOR << 8 | disk << 4 | partition if disk < 16 and partition < 16 else None
    if disk > 3 or partition > 63:
        return None
    return _IDE_MAJORS[disk // 2] << 8 | (disk & 1) << 6 | partition


def _letters(letters: str) -> int:
    """a is 0, z is 25, aa is 26."""
    number = 0
    for letter in letters:
        number = number * 26 + ord(letter) - ord("a") + 1
    return number - 1


def _xvd(disk: int, partition: int) -> int | None:
    if disk < 16 and partition < 16:
        return _XVD_MAJOR << 8 | disk << 4 | partition
    if disk < _MAX_EXTENDED_DISK and partition < _MAX_EXTENDED_PARTITION:
        return 1 << 28 | disk << 8 | partition
    return None
