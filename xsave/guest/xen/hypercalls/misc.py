"""xen_version, console_io, multicall, and the families a guest may probe for and not find."""

from __future__ import annotations

import errno
import struct

from xsave.guest.xen.context import Vcpu
from xsave.guest.xen.cpuid import XEN_VERSION
from xsave.guest.xen.domain import HYPERVISOR_VIRT_START
from xsave.guest.xen.guestcpu import M64
from xsave.guest.xen.hypervisor import Hypervisor

_VERSION, _EXTRAVERSION, _COMPILE_INFO, _CAPABILITIES, _CHANGESET, _PLATFORM = range(6)
_GET_FEATURES, _PAGESIZE, _GUEST_HANDLE = 6, 7, 8
#: XENFEAT pae_pgdir_above_4gb, mmu_pt_update_preserve_ad, highmem_assist, gnttab_map_avail_bits:
#: those every Xen gives a PV guest. Linux panics without the last, whether it uses grants or not.
_FEATURES = 0xF0
_CONSOLE_WRITE = 0
_PHYSDEV_SET_IOPL, _PHYSDEV_SET_IOBITMAP = 6, 7
_MULTICALL_ENTRY = struct.Struct("<QqQQQQQQ")
_MAX_CONSOLE_BYTES = 4096
_MULTICALL = 13


def xen_version(hv: Hypervisor, vcpu: Vcpu, command: int, argument: int, *_: int) -> int:
    """The version pretends to be the Xen whose formats are spoken."""
    if command == _VERSION:
        return XEN_VERSION[0] << 16 | XEN_VERSION[1]
    if command == _PAGESIZE:
        return 4096
    answers = {
        _EXTRAVERSION: b".0-xsave".ljust(16, b"\0"),
        _COMPILE_INFO: bytes(144),
        _CAPABILITIES: b"xen-3.0-x86_64 ".ljust(1024, b"\0"),
        _CHANGESET: b"xsave".ljust(64, b"\0"),
        _PLATFORM: struct.pack("<Q", HYPERVISOR_VIRT_START),
        _GUEST_HANDLE: bytes(16),
    }
    if command == _GET_FEATURES:
        (index,) = struct.unpack("<I", hv.read(argument, 4))
        hv.write(argument + 4, struct.pack("<I", _FEATURES if index == 0 else 0))
        return 0
    if command not in answers:
        return -errno.ENOSYS
    hv.write(argument, answers[command])
    return 0


def console_io(hv: Hypervisor, vcpu: Vcpu, command: int, nr: int, buffer: int, *_: int) -> int:
    if command != _CONSOLE_WRITE:
        return -errno.ENOSYS
    hv.domain.console.put(hv.read(buffer, min(nr, _MAX_CONSOLE_BYTES)))
    return 0


def multicall(hv: Hypervisor, vcpu: Vcpu, calls: int, nr: int, *_: int) -> int:
    """Preemptible between two calls and, by the arguments its entry then gets, inside of one."""
    nr &= 0xFFFFFFFF
    for i in range(nr):
        address = calls + i * _MULTICALL_ENTRY.size
        if i and hv.preempted():
            return hv.continue_with(address, nr - i)
        op, _result, *args = _MULTICALL_ENTRY.unpack(hv.read(address, _MULTICALL_ENTRY.size))
        result = -errno.ENOSYS if op & 0xFFFFFFFF == _MULTICALL else hv.call(op, *args[:5])
        if hv.continuation is not None:
            args[: len(hv.continuation)] = hv.continuation
            hv.continuation = None
            hv.write(address + 16, struct.pack("<6Q", *args))
            return hv.continue_with(address, nr - i)
        hv.write(address + 8, struct.pack("<Q", result & M64))
        if hv.domain.shutdown_reason is not None:
            break
    return 0


def physdev_op(hv: Hypervisor, vcpu: Vcpu, command: int, argument: int, *_: int) -> int:
    if command == _PHYSDEV_SET_IOPL:
        (level,) = struct.unpack("<I", hv.read(argument, 4))
        if level > 3:
            return -errno.EINVAL
        vcpu.iopl = level
        return 0
    return 0 if command == _PHYSDEV_SET_IOBITMAP else -errno.ENOSYS


HYPERCALLS = {13: multicall, 17: xen_version, 18: console_io, 33: physdev_op}
