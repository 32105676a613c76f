"""What the settings of an xl configuration file mean here (xl.cfg(5), tools/xl/xl_parse.c).

A setting is honoured, or refused because the guest would miss what it asks for, or warned
about because the guest runs without it.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xsave.errors import StorageError, UsageError
from xsave.host.bootconfig import DEFAULT_ACTIONS, DESTROY, PRESERVE, RESTART
from xsave.host.disk.spec import parse_all
from xsave.host.xlcfg import Place, Setting, parse, parse_argument

_MAX_FILE_BYTES = 1 << 20
_MAX_MIB = 1 << 30
_REFUSED = {
    "bootloader": "boot loaders are not run: give kernel and ramdisk",
    "pci": "there are no PCI devices to pass through",
    "usbdev": "there are no USB devices to pass through",
    "dtdev": "there are no devices to pass through",
    "device_tree": "there are no device trees on x86",
    "driver_domain": "there are no driver domains",
    "vtpm": "domains have no vTPM",
    "p9": "domains have no 9pfs",
}
_MISSING = {
    "vif": "domains have no network yet: this one runs without",
    "vfb": "domains have no framebuffer: this one runs without",
    "vkb": "domains have no keyboard but the console: this one runs without",
    "channel": "domains have no channels: this one runs without",
}
#: Settings that would change nothing that a guest here could notice.
_WITHOUT_EFFECT = frozenset({
    "acpi", "apic", "blkdev_start", "cap", "claim_mode", "cpu_weight", "cpus", "cpus_soft",
    "cpuid", "description", "features", "gfx_passthru", "hap", "iomem", "ioports", "irqs",
    "keymap", "localtime", "max_event_channels", "max_grant_frames", "max_grant_version",
    "max_maptrack_frames", "nestedhvm", "nographic", "nomigrate", "numa_placement", "pae", "pool",
    "rtc_timeoffset", "sched", "sdl", "seclabel", "serial", "shadow_memory", "stdvga", "tsc_mode",
    "usb", "usbdevice", "videoram", "viridian", "vnc", "vncconsole", "vnclisten", "vncpasswd",
    "vncunused", "vuart", "xend_suspend_evtchn_compat",
})  # fmt: skip
_ACTIONS = {
    "destroy": DESTROY, "restart": RESTART, "preserve": PRESERVE,
    "coredump-destroy": DESTROY, "coredump-restart": RESTART, "rename-restart": RESTART,
}  # fmt: skip
_EVENTS = tuple(DEFAULT_ACTIONS)
_BUILDERS = {"generic": "pv", "linux": "pv", "hvm": "hvm"}


@dataclass(frozen=True)
class DomainSettings:
    """`options` are arguments of create(), only those the file has; `name` is there or None."""

    name: str | None
    options: Mapping[str, Any]
    warnings: Sequence[str]


def read_file(path: str, arguments: Sequence[str] = ()) -> DomainSettings:
    """Read a configuration file and the name=value arguments that override it.

    Raises StorageError if it cannot be read, UsageError, with the place, for what is wrong in it.
    """
    try:
        with Path(path).open("rb") as file:
            data = file.read(_MAX_FILE_BYTES + 1)
    except OSError as e:
        raise StorageError(f"{path}: {e.strerror}") from e
    if len(data) > _MAX_FILE_BYTES:
        raise Place(path, 1, 1).error(f"more than {_MAX_FILE_BYTES >> 20} MiB: no such file")
    try:
        text = data.decode()
    except UnicodeDecodeError as e:
        before = data[: e.start].decode()
        line, column = before.count("\n") + 1, len(before.rpartition("\n")[2]) + 1
        raise Place(path, line, column).error("the file is no UTF-8 text") from e
    settings = parse(text, path)
    for argument in arguments:
        settings |= parse_argument(argument)
    return Reader(settings).read()


class Reader:
    """Takes the settings one by one; what is left in the end is unknown."""

    def __init__(self, settings: Mapping[str, Setting]) -> None:
        self._left = dict(settings)
        self._warnings: list[str] = []

    def read(self) -> DomainSettings:
        self._check_type()
        self._refuse()
        name = self._text("name")
        options: dict[str, Any] = {
            "kernel": self._text("kernel"),
            "ramdisk": self._text("ramdisk"),
            "cmdline": self._cmdline(),
            "memory_bytes": self._mebibytes("memory"),
            "max_memory_bytes": self._mebibytes("maxmem"),
            "vcpus": self._vcpus(),
            "uuid": self._uuid(),
            "disks": self._disks(),
        }
        options = {key: value for key, value in options.items() if value is not None}
        options["actions"] = self._actions()
        for key, setting in self._left.items():
            known = key in _WITHOUT_EFFECT or key in _MISSING
            what = _MISSING.get(key, "it has no effect here" if known else "unknown, ignored")
            if setting.value != []:
                self._warn(setting.place, f"{key}: {what}")
        return DomainSettings(name, options, self._warnings)

    def _warn(self, place: Place, message: str) -> None:
        self._warnings.append(f"{place}: {message}")

    def _text(self, key: str) -> str | None:
        """Take a single value; an empty one is as good as none."""
        setting = self._left.pop(key, None)
        if setting is None:
            return None
        if not isinstance(setting.value, str):
            raise setting.place.error(f"{key}: expected a single value, found a list")
        return setting.value or None

    def _number(self, key: str, least: int, most: int) -> int | None:
        setting = self._left.get(key)
        text = self._text(key)
        if setting is None or text is None:
            return None
        number = _integer(text)
        if number is None or not least <= number <= most:
            raise setting.place.error(
                f"{key}: expected a number from {least} to {most}, found {text!r}"
            )
        return number

    def _check_type(self) -> None:
        """type= names the guest's type, builder= did so in older files."""
        for key, types in (("type", {"pv": "pv"}), ("builder", _BUILDERS)):
            setting = self._left.get(key)
            text = self._text(key)
            if setting is not None and text is not None and types.get(text) != "pv":
                raise setting.place.error(f'{key}: {text!r} guests cannot be run, only type="pv"')

    def _refuse(self) -> None:
        for key, why in _REFUSED.items():
            setting = self._left.pop(key, None)
            if setting is not None and setting.value not in ([], ""):
                raise setting.place.error(f"{key}: {why}")

    def _cmdline(self) -> str | None:
        """cmdline, or else what root and extra make of it."""
        setting = self._left.get("cmdline")
        cmdline, root, extra = self._text("cmdline"), self._text("root"), self._text("extra")
        if cmdline is None:
            parts = [f"root={root}" if root else None, extra]
            return " ".join(part for part in parts if part) or None
        if setting is not None and (root or extra):
            self._warn(setting.place, "cmdline: root and extra are ignored beside it")
        return cmdline

    def _mebibytes(self, key: str) -> int | None:
        number = self._number(key, 1, _MAX_MIB)
        return None if number is None else number << 20

    def _vcpus(self) -> int | None:
        most = self._left.get("maxvcpus")
        vcpus, maximum = self._number("vcpus", 1, 4096), self._number("maxvcpus", 1, 4096)
        if most and maximum is not None and vcpus is not None:
            if maximum < vcpus:
                raise most.place.error(f"maxvcpus: {maximum} is less than vcpus, {vcpus}")
            if maximum > vcpus:
                self._warn(most.place, f"maxvcpus: vCPUs cannot be added: there will be {vcpus}")
        return vcpus or maximum

    def _uuid(self) -> str | None:
        setting = self._left.get("uuid")
        text = self._text("uuid")
        if setting is None or text is None:
            return None
        if not re.fullmatch(r"[0-9a-fA-F]{8}(-?[0-9a-fA-F]{4}){3}-?[0-9a-fA-F]{12}", text):
            raise setting.place.error(f"uuid: {text!r} is none")
        return str(uuid.UUID(text))

    def _disks(self) -> list[str] | None:
        """The list of specifications; what is wrong with one is said with the list's place."""
        setting = self._left.pop("disk", None)
        if setting is None or setting.value == "":
            return None
        if not isinstance(setting.value, list):
            raise setting.place.error("disk: expected a list")
        texts = [text for text in setting.value if isinstance(text, str)]
        if len(texts) < len(setting.value):
            raise setting.place.error("disk: expected a list of strings")
        try:
            parse_all(texts)
        except UsageError as e:
            raise setting.place.error(str(e)) from e
        return texts

    def _actions(self) -> dict[str, str]:
        actions = {}
        for event in _EVENTS:
            key = f"on_{event}"
            setting = self._left.get(key)
            text = self._text(key)
            if setting is None or text is None:
                continue
            if text == "soft-reset" or text not in _ACTIONS:
                expected = ", ".join(_ACTIONS)
                raise setting.place.error(f"{key}: expected {expected}, found {text!r}")
            actions[event] = _ACTIONS[text]
            if text not in (DESTROY, RESTART, PRESERVE):
                what = f"{key}: {text} is taken as {actions[event]}: nothing is kept aside"
                self._warn(setting.place, what)
        return actions


def _integer(text: str) -> int | None:
    """strtol(text, NULL, 0): decimal, 0x hexadecimal, 0 octal."""
    match = re.fullmatch(
        r"(-?)(?:0[xX]([0-9a-fA-F]{1,16})|0([0-7]{1,20})|(0|[1-9][0-9]{0,19}))", text
    )
    if match is None:
        return None
    sign, hexadecimal, octal, decimal = match.groups()
    bases = ((hexadecimal, 16), (octal, 8), (decimal, 10))
    number = next(int(digits, base) for digits, base in bases if digits is not None)
    return -number if sign else number
