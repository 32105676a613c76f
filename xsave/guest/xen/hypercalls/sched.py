"""sched_op, vcpu_op, set_timer_op: blocking, shutting down, timers, vCPU registration."""

from __future__ import annotations

import ctypes
import errno
import struct

from xsave.guest.xen.adopt import adopt_context
from xsave.guest.xen.context import Vcpu
from xsave.guest.xen.events import MAX_PORTS
from xsave.guest.xen.hypervisor import Hypervisor
from xsave.guest.xen.pagetypes import PGT_L4, PGT_WRITABLE
from xsave.guest.xen.progress import ERESTART
from xsave.public import SHUTDOWN_NAMES, VcpuGuestContext, VcpuInfo

_YIELD, _BLOCK, _SHUTDOWN, _POLL = range(4)
_POLL_LIMIT = 128

(
    _INITIALISE, _UP, _DOWN, _IS_UP, _GET_RUNSTATE, _REGISTER_RUNSTATE, _SET_PERIODIC,
    _STOP_PERIODIC, _SET_SINGLESHOT, _STOP_SINGLESHOT, _REGISTER_VCPU_INFO,
) = range(11)  # fmt: skip
_OWN_TIMER = (_SET_SINGLESHOT, _STOP_SINGLESHOT)
_SINGLESHOT_FUTURE = 1


def sched_op(hv: Hypervisor, vcpu: Vcpu, command: int, argument: int, *_: int) -> int:
    if command == _BLOCK:
        vcpu.info.evtchn_upcall_mask = 0
        if not vcpu.info.evtchn_upcall_pending:
            vcpu.blocked = True
            hv.cpu.stop()
        return 0
    if command == _YIELD:
        hv.cpu.stop()
        return 0
    if command == _SHUTDOWN:
        (reason,) = struct.unpack("<I", hv.read(argument, 4))
        if reason >= len(SHUTDOWN_NAMES):
            return -errno.EINVAL
        hv.domain.shutdown_reason = reason
        hv.cpu.stop()
        return 0
    if command == _POLL:
        return _poll(hv, vcpu, argument)
    return -errno.ENOSYS


def _poll(hv: Hypervisor, vcpu: Vcpu, argument: int) -> int:
    """Block until one of the ports is pending or the time is come, with upcalls masked."""
    ports_ptr, nr_ports, timeout = struct.unpack("<QIxxxxQ", hv.read(argument, 24))
    if nr_ports > _POLL_LIMIT:
        return -errno.EINVAL
    ports = struct.unpack(f"<{nr_ports}I", hv.read(ports_ptr, 4 * nr_ports))
    if any(port >= MAX_PORTS for port in ports):
        return -errno.EINVAL
    if any(hv.domain.events.is_pending(port) for port in ports if port in hv.domain.events.ports):
        return 0
    vcpu.polling = ports
    vcpu.poll_deadline_ns = timeout or None
    vcpu.blocked = True
    hv.cpu.stop()
    return 0


def set_timer_op(hv: Hypervisor, vcpu: Vcpu, timeout: int, *_: int) -> int:
    vcpu.timer_ns = timeout or None
    return 0


def vcpu_op(hv: Hypervisor, vcpu: Vcpu, command: int, vcpu_id: int, argument: int, *_: int) -> int:
    if vcpu_id >= len(hv.domain.vcpus):
        return -errno.ENOENT
    target = hv.domain.vcpus[vcpu_id]
    if command == _INITIALISE:
        return _initialise(hv, target, argument)
    if command == _UP:
        if not target.initialised:
            return -errno.EINVAL
        target.online = True
        return 0
    if command == _DOWN:
        target.online = False
        if target is vcpu:
            hv.cpu.stop()
        return 0
    if command == _IS_UP:
        return int(target.online)
    if command == _STOP_PERIODIC:
        return 0
    if command in _OWN_TIMER and target is not vcpu:
        return -errno.EINVAL
    if command == _SET_SINGLESHOT:
        timeout, flags = struct.unpack("<QI", hv.read(argument, 12))
        if flags & _SINGLESHOT_FUTURE and timeout <= hv.domain.clock.now():
            return -errno.ETIME
        target.timer_ns = timeout
        return 0
    if command == _STOP_SINGLESHOT:
        target.timer_ns = None
        return 0
    if command == _REGISTER_RUNSTATE:
        return 0
    if command == _REGISTER_VCPU_INFO:
        if target is not vcpu and target.online:  # its events would go astray meanwhile
            return -errno.EINVAL
        return _register_vcpu_info(hv, target, argument)
    return -errno.ENOSYS


def _initialise(hv: Hypervisor, target: Vcpu, argument: int) -> int:
    """VCPUOP_initialise: the context of a vCPU that was never up; `up` starts it."""
    if target.initialised:
        return -errno.EEXIST
    blob = hv.read(argument, ctypes.sizeof(VcpuGuestContext))
    rc = hv.tables.attempt(hv.preempted, lambda: _adopt(hv, target, blob))
    return hv.continue_with(_INITIALISE, target.id, argument) if rc == -ERESTART else rc


def _adopt(hv: Hypervisor, target: Vcpu, blob: bytes) -> int:
    """Take a context; its page tables are validated before, as that may take long."""
    tables, held = hv.tables, []
    context = VcpuGuestContext.from_buffer_copy(blob)
    rc = 0
    for root in (context.ctrlreg[3] >> 12, context.ctrlreg[1] >> 12):
        if root and not rc:
            rc = tables.get_type(root, PGT_L4)
            held += [] if rc else [root]
    if not rc and not adopt_context(hv.domain, target, blob):
        target.initialised = True
    for root in held:
        tables.put_type(root)
    if rc == -ERESTART or target.initialised:
        return rc
    return -errno.EINVAL


def _register_vcpu_info(hv: Hypervisor, target: Vcpu, argument: int) -> int:
    """Move a vCPU's info from shared_info into a frame of the guest's own, once."""
    mfn, offset, _pad = struct.unpack("<QII", hv.read(argument, 16))
    if offset & 7 or offset > 4096 - ctypes.sizeof(VcpuInfo) or target.info_mfn is not None:
        return -errno.EINVAL
    rc = hv.tables.get_type(mfn, PGT_WRITABLE)
    if rc:
        return rc
    moved = hv.domain.vcpu_info_at((mfn << 12) + offset)
    ctypes.memmove(ctypes.addressof(moved), ctypes.addressof(target.info), ctypes.sizeof(moved))
    target.info, target.info_mfn = moved, mfn
    # Whatever came in between was noted in the old place: look at every port again.
    moved.evtchn_upcall_pending = 1
    moved.evtchn_pending_sel = (1 << 64) - 1
    return 0


HYPERCALLS = {15: set_timer_op, 24: vcpu_op, 29: sched_op}
