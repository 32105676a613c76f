"""One disk as xl's configuration files say it (xl-disk-configuration(5)) and as libxl's JSON does.

    [target],[format],[vdev],[access]      by place; what is empty has its default
    format=, vdev=, access=, devtype=, cdrom, target=PATH      by name; target takes all the rest

Formats are raw (the default) and qcow2, accesses w or rw (the default) and r or ro.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xsave.errors import HostCannotTake, UsageError
from xsave.guest.xen.blkback.disk import Vbd
from xsave.host.disk.vdev import device_number

FORMATS = ("raw", "qcow2")
_ACCESS = {"w": False, "rw": False, "": False, "r": True, "ro": True}
_PLACES = ("target", "format", "vdev", "access")
_WITHOUT_EFFECT = {"direct-io-safe", "discard", "no-discard"}
_BACKENDS = {"phy", "tap", "qdisk"}
_KEYS = {*_PLACES, "devtype", "backendtype", "backend"}


@dataclass(frozen=True)
class DiskSpec:
    """path is absolute; vdev is a name that device_number() knows."""

    path: str
    format: str
    vdev: str
    readonly: bool
    cdrom: bool = False

    def vbd(self) -> Vbd:
        """What the guest's store says of it."""
        number = device_number(self.vdev)
        assert number is not None
        params = f"{self.format}:{self.path}"
        return Vbd(number, self.vdev, params, self.readonly, self.cdrom)

    def to_json(self) -> dict[str, Any]:
        """libxl_device_disk as libxl writes it: zeros are left out."""
        flags = {"removable": self.cdrom, "readwrite": not self.readonly, "is_cdrom": self.cdrom}
        return {
            "pdev_path": self.path, "vdev": self.vdev, "format": self.format,
            **{key: 1 for key, value in flags.items() if value},
        }  # fmt: skip


def parse(text: str) -> DiskSpec:
    """Read one specification of a configuration file or a command line. Raises UsageError."""
    values: dict[str, str] = {}
    flags: set[str] = set()
    rest = text
    while rest:
        rest = rest.lstrip()
        if rest.startswith("target="):
            word, rest = rest, ""
        else:
            word, _, rest = rest.partition(",")
        _take(text, word, values, flags)
    return _checked(text, values, cdrom="cdrom" in flags or values.get("devtype") == "cdrom")


def _take(text: str, word: str, values: dict[str, str], flags: set[str]) -> None:
    key, equals, value = word.partition("=")
    if equals:
        if key not in _KEYS:
            raise _error(text, f"unknown setting {key!r}")
        values[key] = value
        return
    if word == "cdrom" or word in _WITHOUT_EFFECT:
        flags.add(word)
        return
    place = next((name for name in _PLACES if name not in values), None)
    if place is None:
        raise _error(text, f"{word!r} is one too many")
    values[place] = word


def _checked(text: str, values: dict[str, str], *, cdrom: bool) -> DiskSpec:
    if not values.get("target"):
        raise _error(text, "it names no file")
    vdev = values.get("vdev", "").removesuffix(":cdrom")
    if not vdev:
        raise _error(text, "it names no virtual device (xvda, say)")
    cdrom = cdrom or values["vdev"].endswith(":cdrom")
    if device_number(vdev) is None:
        raise _error(text, f"{vdev!r} is no virtual device (xvda is one)")
    access = values.get("access", "")
    if access not in _ACCESS:
        raise _error(text, f"access {access!r}: expected r, ro, w or rw")
    if values.get("devtype", "disk") not in ("disk", "cdrom"):
        raise _error(text, f"devtype {values['devtype']!r}: expected disk or cdrom")
    if values.get("backendtype", "qdisk") not in _BACKENDS or values.get("backend", "0") != "0":
        raise _error(text, "there is only domain 0 to provide it")
    kind = values.get("format") or "raw"
    if kind not in FORMATS:
        raise _error(text, f"format {kind!r}: expected {' or '.join(FORMATS)}")
    path = str(Path(values["target"]).absolute())
    if "\0" in path:
        raise _error(text, "a zero byte in a path")
    return DiskSpec(path, kind, vdev, _ACCESS[access] or cdrom, cdrom)


def _error(text: str, what: str) -> UsageError:
    return UsageError(f"disk {text!r}: {what}")


def parse_all(texts: Sequence[str]) -> tuple[DiskSpec, ...]:
    """Read several, which must be different devices. Raises UsageError."""
    specs = tuple(map(parse, texts))
    seen: set[int] = set()
    for spec in specs:
        number = spec.vbd().devid
        if number in seen:
            raise UsageError(f"two disks are {spec.vdev}")
        seen.add(number)
    return specs


def from_json(disks: Any) -> tuple[DiskSpec, ...]:
    """Read the `disks` of a libxl_domain_config, which may have come with an image; drives with
    nothing in them are none. Raises HostCannotTake."""
    if not isinstance(disks, list):
        raise HostCannotTake("its configuration's disks are no list")
    specs = [_from_json(disk) for disk in disks]
    found = tuple(spec for spec in specs if spec is not None)
    if len({spec.vbd().devid for spec in found}) != len(found):
        raise HostCannotTake("its configuration has two disks of one name")
    return found


def _from_json(disk: Any) -> DiskSpec | None:
    if not isinstance(disk, Mapping):
        raise HostCannotTake("its configuration has a disk that is no object")
    path, vdev = disk.get("pdev_path"), disk.get("vdev")
    kind = disk.get("format", "raw")
    cdrom = bool(disk.get("is_cdrom"))
    if cdrom and (not path or kind == "empty"):
        return None
    if not (isinstance(path, str) and path.startswith("/") and "\0" not in path):
        raise HostCannotTake("its configuration has a disk without an absolute path")
    if not isinstance(vdev, str) or device_number(vdev) is None:
        raise HostCannotTake(f"disk {path}: {vdev!r} is no virtual device")
    if kind not in FORMATS:
        raise HostCannotTake(f"disk {path}: its format is {kind!r}, not {' or '.join(FORMATS)}")
    return DiskSpec(path, kind, vdev, cdrom or not disk.get("readwrite"), cdrom)
