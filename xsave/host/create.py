"""create: a new domain from a kernel, on a host."""

from __future__ import annotations

import json
import uuid
from pathlib import Path

from xsave.errors import HostCannotTake, StorageError, UsageError
from xsave.frames import PAGE_SIZE
from xsave.guest.xen.cpuid import XEN_VERSION, CpuPolicy
from xsave.guest.xen.domctl import DomainInfo, DomainState
from xsave.guest.xen.time import DEFAULT_TSC_KHZ
from xsave.host.host import Host
from xsave.host.prestart import WaitingProcess
from xsave.host.spawn import spawn
from xsave.progress import Report, Stage, ignore
from xsave.public import XEN_LEGACY_MAX_VCPUS

BUILTIN_KERNEL = Path(__file__).parents[1] / "guest" / "kernel" / "xsave-guest.elf"
MIN_MEMORY_BYTES = 4 << 20
#: NR_CPUS of the built-in kernel.
MAX_BUILTIN_VCPUS = 8
#: "boot" goes into b_info, "xsave" stays our own (real tools ignore it).
Settings = dict[str, dict[str, object]]
#: Namespace of the uuids of deterministic guests: the same commands give the same image.
_UUID_NAMESPACE = uuid.UUID("2008052c-0000-5000-8000-000000000012")


def create(
    host: Host,
    name: str,
    *,
    kernel: str | None = None,
    ramdisk: str | None = None,
    cmdline: str = "",
    memory_bytes: int = 64 << 20,
    max_memory_bytes: int | None = None,
    vcpus: int = 1,
    paused: bool = False,
    deterministic: int | None = None,
    process: WaitingProcess | None = None,
    report: Report = ignore,
) -> DomainInfo:
    """Build a domain and start it (unless paused). No kernel: the built-in guest.

    process: one that waits for a domain already.

    It begins with memory_bytes and may grow to max_memory_bytes (not at all, if None).

    Raises NameTaken, HostCannotTake, OutOfFrames, StorageError, UsageError.
    """
    builtin = kernel is None
    _check(memory_bytes, vcpus, builtin)
    max_pages = max(memory_bytes, max_memory_bytes or 0) // PAGE_SIZE
    path = str(BUILTIN_KERNEL if kernel is None else Path(kernel).absolute())
    for file in (path, ramdisk):
        if file is not None and not Path(file).is_file():
            raise StorageError(f"{file}: no such file")
    if builtin and deterministic is not None and "seed=" not in cmdline:
        cmdline = f"seed={deterministic} {cmdline}".strip()
    host.check_room(memory_bytes // PAGE_SIZE)
    report(Stage("create", "build", f"{memory_bytes >> 20} MiB"))
    with spawn(host, name, process) as domctl:
        domctl.begin(
            nr_vcpus=vcpus,
            max_pages=max_pages,
            target_pages=memory_bytes // PAGE_SIZE,
            deterministic=deterministic is not None,
            builtin=builtin,
        )
        initrd = str(Path(ramdisk).absolute()) if ramdisk else None
        domctl.build(path, initrd, cmdline, memory_bytes // PAGE_SIZE)
        settings = _settings(kernel, ramdisk, cmdline, builtin, deterministic)
        domctl.set_state(_state(name, memory_bytes, max_pages, vcpus, settings, deterministic))
        domctl.commit()
        if paused:
            return domctl.info()
        report(Stage("create", "start"))
        return domctl.unpause()


def _check(memory_bytes: int, vcpus: int, builtin: bool) -> None:
    if memory_bytes < MIN_MEMORY_BYTES or memory_bytes % PAGE_SIZE:
        raise UsageError(
            f"memory of {memory_bytes} bytes: expected whole pages, {MIN_MEMORY_BYTES >> 20} MiB "
            "or more"
        )
    if not 1 <= vcpus <= XEN_LEGACY_MAX_VCPUS:
        raise UsageError(f"{vcpus} vCPUs: expected 1 to {XEN_LEGACY_MAX_VCPUS}")
    if builtin and vcpus > MAX_BUILTIN_VCPUS:
        raise HostCannotTake(
            f"the built-in guest has {MAX_BUILTIN_VCPUS} vCPUs at most, not {vcpus}: "
            "give a --kernel"
        )


def _settings(
    kernel: str | None, ramdisk: str | None, cmdline: str, builtin: bool, seed: int | None
) -> Settings:
    """The part of the config that real tools ignore and xsave needs after a restore."""
    own: dict[str, object] = {"guest": "builtin" if builtin else "kernel", "deterministic": seed}
    boot = {"kernel": kernel or "xsave-guest", "ramdisk": ramdisk or "", "cmdline": cmdline}
    return {"boot": {k: v for k, v in boot.items() if v}, "xsave": own}


def _state(
    name: str,
    memory_bytes: int,
    max_pages: int,
    vcpus: int,
    settings: Settings,
    seed: int | None,
) -> DomainState:
    policy = CpuPolicy.default()
    return DomainState(
        never_run=True,
        nr_vcpus=vcpus,
        max_pages=max_pages,
        shared_info_mfn=0,
        tsc=(0, DEFAULT_TSC_KHZ, 0, 0),
        config=config_json(name, memory_bytes, max_pages, vcpus, settings, seed),
        cpuid_policy=policy.cpuid,
        msr_policy=policy.msrs,
        p2m_frames=None,
        p2m_size=memory_bytes // PAGE_SIZE,
        xen_version=XEN_VERSION,
    )


def config_json(
    name: str,
    memory_bytes: int,
    max_pages: int,
    vcpus: int,
    settings: Settings,
    seed: int | None,
) -> bytes:
    """Return the libxl_domain_config that a real `xl restore` takes."""
    unique = uuid.uuid4() if seed is None else uuid.uuid5(_UUID_NAMESPACE, f"{name}/{seed}")
    config = {
        "c_info": {"type": "pv", "name": name, "uuid": str(unique)},
        "b_info": {
            "max_vcpus": vcpus,
            "avail_vcpus": list(range(vcpus)),
            "max_memkb": max_pages * PAGE_SIZE >> 10,
            "target_memkb": memory_bytes >> 10,
            "video_memkb": 0,
            **settings["boot"],
            "type.pv": {},
        },
        "on_reboot": "restart",
        "xsave": settings["xsave"],
    }
    return json.dumps(config, indent=4).encode() + b"\n"
