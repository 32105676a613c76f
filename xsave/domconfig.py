"""What a restore reads out of an image's configuration, libxl's JSON: as little as it needs.

The text goes on to the next image byte for byte, unless the domain gets another name or its disks
other files. Anything odd in it counts as absent: only what is no JSON at all is an error.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from xsave.errors import ImageError, UsageError
from xsave.image import xl
from xsave.public import XEN_LEGACY_MAX_VCPUS

_MAX_KIB = 1 << 40


@dataclass(frozen=True)
class DomainConfig:
    """name: "" if there is none; pages, target_pages: None if it says nothing of memory;
    available_vcpus: None if it says nothing of them, which means all."""

    name: str
    pages: int | None
    target_pages: int | None
    nr_vcpus: int
    available_vcpus: frozenset[int] | None
    deterministic: bool
    builtin: bool
    #: libxl_device_disk, one each, as they are.
    disks: list[Any]
    seed: int | None


def read_config(text: bytes) -> DomainConfig:
    """Read an image's configuration; an empty one says nothing. Raises ImageError."""
    config = _parse(text)

    def get(*path: str) -> Any:
        value = config
        for key in path:
            value = value.get(key) if isinstance(value, dict) else None
        return value

    def pages(key: str) -> int | None:
        kib = get("b_info", key)
        return kib // 4 if isinstance(kib, int) and 4 <= kib < _MAX_KIB else None

    disks = get("disks")
    seed = get("xsave", "deterministic")
    available = get("b_info", "avail_vcpus")
    name, vcpus = get("c_info", "name"), get("b_info", "max_vcpus")
    return DomainConfig(
        name=name if isinstance(name, str) else "",
        pages=pages("max_memkb"),
        target_pages=pages("target_memkb"),
        nr_vcpus=vcpus if isinstance(vcpus, int) else XEN_LEGACY_MAX_VCPUS,
        available_vcpus=_available(available),
        deterministic=seed is not None,
        builtin=get("xsave", "guest") == "builtin",
        disks=disks if isinstance(disks, list) else [],
        seed=seed if isinstance(seed, int) else None,
    )


def _available(listed: object) -> frozenset[int] | None:
    """A libxl_bitmap, as libxl writes it: the numbers of the bits that are set."""
    if not isinstance(listed, list):
        return None
    return frozenset(n for n in listed if isinstance(n, int) and not isinstance(n, bool)) or None


def renamed(text: bytes, name: str) -> bytes:
    """Return the configuration with another name, its very bytes if it has that name already."""
    if name == read_config(text).name:
        return text
    config = _parse(text)
    if not isinstance(config, dict):
        config = {}
    info = config.setdefault("c_info", {})
    if not isinstance(info, dict):
        raise ImageError(
            "the configuration's c_info is no object",
            offset=xl.CONFIG_OFFSET,
            record=xl.XlHeader.NAME,
        )
    info.setdefault("type", "pv")
    info["name"] = name
    config.setdefault("b_info", {"type.pv": {}})
    return json.dumps(config, indent=4).encode() + b"\n"


def with_disk_files(text: bytes, files: Mapping[str, str]) -> bytes:
    """Return the configuration with other files (by vdev) for the disks it has, its very bytes if
    there are none. Raises UsageError: there is no such disk."""
    if not files:
        return text
    config = _parse(text)
    disks = config.get("disks") if isinstance(config, dict) else None
    named = {
        disk["vdev"]: disk
        for disk in (disks if isinstance(disks, list) else [])
        if isinstance(disk, dict) and isinstance(disk.get("vdev"), str)
    }
    for vdev, path in files.items():
        if vdev not in named:
            there = ", ".join(named) or "none"
            raise UsageError(f"--disk {vdev}: the image has no such disk (its disks: {there})")
        named[vdev]["pdev_path"] = path
    return json.dumps(config, indent=4).encode() + b"\n"


def _parse(text: bytes) -> Any:
    try:
        return json.loads(text or b"{}")
    except (ValueError, RecursionError) as e:
        raise ImageError(
            f"the configuration is no JSON ({e})",
            offset=xl.CONFIG_OFFSET,
            record=xl.XlHeader.NAME,
        ) from e
