"""create: a new domain from a kernel, on a host."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from xsave.errors import HostCannotTake, StorageError, UsageError
from xsave.frames import PAGE_SIZE
from xsave.guest.xen.cpuid import XEN_VERSION, CpuPolicy
from xsave.guest.xen.domctl import DomainInfo, DomainState
from xsave.guest.xen.time import DEFAULT_TSC_KHZ
from xsave.host.bootconfig import BUILTIN_KERNEL, PRESERVE, BootConfig
from xsave.host.disk.image import check as check_disk
from xsave.host.disk.spec import parse_all
from xsave.host.host import Host
from xsave.host.prestart import WaitingProcess
from xsave.host.spawn import spawn
from xsave.progress import Report, Stage, ignore
from xsave.public import XEN_LEGACY_MAX_VCPUS

__all__ = ["BUILTIN_KERNEL", "create"]

MIN_MEMORY_BYTES = 4 << 20
#: NR_CPUS of the built-in kernel.
MAX_BUILTIN_VCPUS = 8
#: Whoever builds a guest by hand wants to see why it crashed; xl's own default is to destroy it.
DEFAULT_ACTIONS = {"crash": PRESERVE}


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
    actions: Mapping[str, str] = DEFAULT_ACTIONS,
    uuid: str | None = None,
    disks: Sequence[str] = (),
    process: WaitingProcess | None = None,
    report: Report = ignore,
) -> DomainInfo:
    """Build a domain and start it (unless paused). No kernel: the built-in guest.

    process: one that waits for a domain already. actions: what happens when the guest ends, by
    event (bootconfig.DEFAULT_ACTIONS); events that are missing have libxl's default.

    disks: xl's disk specifications (disk/spec.py).

    It begins with memory_bytes and may grow to max_memory_bytes (not at all, if None).

    Raises NameTaken, HostCannotTake, OutOfFrames, StorageError, UsageError.
    """
    _check(memory_bytes, vcpus, kernel is None)
    if max_memory_bytes is not None and max_memory_bytes < memory_bytes:
        raise UsageError(
            f"maximum memory of {max_memory_bytes >> 10} KiB: it begins with {memory_bytes >> 10}"
        )
    if kernel is None and deterministic is not None and "seed=" not in cmdline:
        cmdline = f"seed={deterministic} {cmdline}".strip()
    boot = BootConfig(
        kernel=kernel and str(Path(kernel).absolute()),
        ramdisk=ramdisk and str(Path(ramdisk).absolute()),
        cmdline=cmdline,
        memory_bytes=memory_bytes,
        max_memory_bytes=max(memory_bytes, max_memory_bytes or 0) // PAGE_SIZE * PAGE_SIZE,
        vcpus=vcpus,
        deterministic=deterministic,
        actions=actions,
        disks=parse_all(disks),
    )
    for file in (boot.kernel_path, boot.ramdisk):
        if file is not None and not Path(file).is_file():
            raise StorageError(f"{file}: no such file")
    for disk in boot.disks:
        check_disk(disk, fresh=True)
    host.check_room(memory_bytes // PAGE_SIZE)
    report(Stage("create", "build", f"{memory_bytes >> 20} MiB"))
    with spawn(host, name, process) as domctl:
        domctl.begin(
            nr_vcpus=vcpus,
            max_pages=boot.max_memory_bytes // PAGE_SIZE,
            target_pages=memory_bytes // PAGE_SIZE,
            deterministic=deterministic is not None,
            builtin=boot.builtin,
            disks=boot.disks_json(),
            warm=not boot.builtin,  # while its kernel is being unpacked
            seed=deterministic,
        )
        domctl.build(boot.kernel_path, boot.ramdisk, cmdline, memory_bytes // PAGE_SIZE)
        domctl.ask_set_state(_state(boot, boot.to_json(name, uuid)))()
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


def _state(boot: BootConfig, config: bytes) -> DomainState:
    policy = CpuPolicy.default()
    return DomainState(
        never_run=True,
        nr_vcpus=boot.vcpus,
        max_pages=boot.max_memory_bytes // PAGE_SIZE,
        shared_info_mfn=0,
        tsc=(0, DEFAULT_TSC_KHZ, 0, 0),
        config=config,
        cpuid_policy=policy.cpuid,
        msr_policy=policy.msrs,
        p2m_frames=None,
        p2m_size=boot.memory_bytes // PAGE_SIZE,
        xen_version=XEN_VERSION,
    )
