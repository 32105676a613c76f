"""How a domain begins and what becomes of it at its end: the part of the libxl_domain_config
that `create` writes, that travels in images, and that a restart reads again.

    c_info  type, name, uuid
    b_info  max_vcpus, max_memkb, target_memkb, kernel, ramdisk, cmdline
    disks   libxl_device_disk, one each
    on_*    libxl_action_on_shutdown; what is not there has libxl's default
    xsave   guest (builtin or kernel), deterministic: our own, real tools ignore it
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from xsave.errors import HostCannotTake
from xsave.frames import PAGE_SIZE
from xsave.host.disk.spec import DiskSpec
from xsave.public import XEN_LEGACY_MAX_VCPUS

BUILTIN_KERNEL = Path(__file__).parents[1] / "guest" / "kernel" / "xsave-guest.elf"
_BUILTIN_NAME = "xsave-guest"
#: Namespace of the uuids of deterministic guests: the same commands give the same image.
_UUID_NAMESPACE = uuid.UUID("2008052c-0000-5000-8000-000000000012")

DESTROY, RESTART, PRESERVE = "destroy", "restart", "preserve"
ACTIONS = (DESTROY, RESTART, PRESERVE)
#: The events a guest ends with, in the order of SHUTDOWN_*, and what libxl does if nobody says
#: otherwise. A suspended guest is not at its end.
DEFAULT_ACTIONS = {
    "poweroff": DESTROY, "reboot": RESTART, "crash": DESTROY, "watchdog": DESTROY,
    "soft_reset": DESTROY,
}  # fmt: skip
#: libxl's other actions begin or end with what we do for them.
_LIKE = {"coredump_destroy": DESTROY, "coredump_restart": RESTART, "rename_restart": RESTART}


@dataclass(frozen=True)
class BootConfig:
    """kernel None: the built-in guest. Paths are absolute. max_memory_bytes >= memory_bytes."""

    kernel: str | None = None
    ramdisk: str | None = None
    cmdline: str = ""
    memory_bytes: int = 64 << 20
    max_memory_bytes: int = 64 << 20
    vcpus: int = 1
    available_vcpus: tuple[int, ...] | None = None  # None: all
    deterministic: int | None = None
    actions: Mapping[str, str] = field(default_factory=dict)
    disks: Sequence[DiskSpec] = ()

    @property
    def builtin(self) -> bool:
        return self.kernel is None

    @property
    def kernel_path(self) -> str:
        return str(BUILTIN_KERNEL) if self.kernel is None else self.kernel

    def to_json(self, name: str, domain_uuid: str | None = None) -> bytes:
        """Return the libxl_domain_config that a real `xl restore` takes."""
        boot = {
            "kernel": self.kernel or _BUILTIN_NAME,
            "ramdisk": self.ramdisk,
            "cmdline": self.cmdline,
        }
        config = {
            "c_info": {"type": "pv", "name": name, "uuid": domain_uuid or self._uuid(name)},
            "b_info": {
                "max_vcpus": self.vcpus,
                "avail_vcpus": list(self.available_vcpus or range(self.vcpus)),
                "max_memkb": self.max_memory_bytes >> 10,
                "target_memkb": self.memory_bytes >> 10,
                "video_memkb": 0,
                **{key: value for key, value in boot.items() if value},
                "type.pv": {},
            },
            **({"disks": self.disks_json()} if self.disks else {}),
            "on_reboot": RESTART,
            **{f"on_{event}": action for event, action in self.actions.items()},
            "xsave": {
                "guest": "builtin" if self.builtin else "kernel",
                "deterministic": self.deterministic,
            },
        }
        return json.dumps(config, indent=4).encode() + b"\n"

    def disks_json(self) -> list[dict[str, Any]]:
        """The disks as libxl's JSON has them."""
        return [disk.to_json() for disk in self.disks]

    def _uuid(self, name: str) -> str:
        seed = self.deterministic
        unique = uuid.uuid4() if seed is None else uuid.uuid5(_UUID_NAMESPACE, f"{name}/{seed}")
        return str(unique)


def action_on(config: bytes, event: str) -> str:
    """Return what is to happen when a domain with this configuration ends with `event`."""
    action = _object(config).get(f"on_{event}")
    action = _LIKE.get(action, action) if isinstance(action, str) else None
    return action if action in ACTIONS else DEFAULT_ACTIONS[event]


def read(config: bytes) -> BootConfig:
    """Read how a domain is started again. Raises HostCannotTake if the configuration, which may
    have come with an image, does not say."""
    top = _object(config)
    b_info = top.get("b_info")
    b_info = b_info if isinstance(b_info, dict) else {}
    # Older libxl kept what boots a PV guest with the rest of its type.
    pv = b_info.get("type.pv")
    boot = (pv if isinstance(pv, dict) else {}) | b_info
    own = top.get("xsave")
    builtin = isinstance(own, dict) and own.get("guest") == "builtin"
    kernel = _text(boot, "kernel")
    if not kernel:
        raise HostCannotTake("its configuration names no kernel")
    memory = _number(boot, "target_memkb") << 10
    config_read = BootConfig(
        kernel=None if builtin else kernel,
        ramdisk=_text(boot, "ramdisk") or None,
        cmdline=_text(boot, "cmdline"),
        memory_bytes=memory,
        max_memory_bytes=max(memory, _number(boot, "max_memkb") << 10),
        vcpus=_number(boot, "max_vcpus", 1),
        available_vcpus=_available(boot),
    )
    if memory < PAGE_SIZE or not 1 <= config_read.vcpus <= XEN_LEGACY_MAX_VCPUS:
        raise HostCannotTake(
            f"its configuration wants {memory >> 10} KiB of memory and {config_read.vcpus} vCPUs"
        )
    return config_read


def _object(config: bytes) -> dict[str, Any]:
    """The JSON object; what is none says nothing."""
    try:
        top = json.loads(config)
    except (ValueError, RecursionError):
        return {}
    return top if isinstance(top, dict) else {}


def _text(values: Mapping[str, Any], key: str) -> str:
    value = values.get(key)
    return value if isinstance(value, str) and "\0" not in value else ""


def _number(values: Mapping[str, Any], key: str, default: int = 0) -> int:
    value = values.get(key, default)
    return value if isinstance(value, int) and 0 <= value < 1 << 40 else default


def _available(b_info: Mapping[str, Any]) -> tuple[int, ...] | None:
    """Which vCPUs are in use, None if all are or it is not said."""
    listed = b_info.get("avail_vcpus")
    numbers = tuple(n for n in listed if isinstance(n, int)) if isinstance(listed, list) else ()
    everything = set(range(min(_number(b_info, "max_vcpus", 1), XEN_LEGACY_MAX_VCPUS)))
    return None if not numbers or everything <= set(numbers) else numbers
