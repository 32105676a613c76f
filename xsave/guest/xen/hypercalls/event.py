"""event_channel_op: arguments to events.EventChannels and back."""

from __future__ import annotations

import errno
import struct

from xsave.guest.xen.context import Vcpu
from xsave.guest.xen.events import EVTCHNSTAT, FIFO_LINK_BITS, FIFO_QUEUES, Port
from xsave.guest.xen.guestmem import GuestFault
from xsave.guest.xen.hypervisor import Hypervisor

(
    _BIND_INTERDOMAIN, _BIND_VIRQ, _BIND_PIRQ, _CLOSE, _SEND, _STATUS, _ALLOC_UNBOUND, _BIND_IPI,
    _BIND_VCPU, _UNMASK, _RESET, _INIT_CONTROL, _EXPAND_ARRAY, _SET_PRIORITY,
) = range(14)  # fmt: skip
_DOMID_SELF = 0x7FF0


def event_channel_op(hv: Hypervisor, vcpu: Vcpu, command: int, argument: int, *_: int) -> int:
    handler = _COMMANDS.get(command)
    return handler(hv, argument) if handler else -errno.ENOSYS


def _out_port(hv: Hypervisor, address: int, port: int) -> int:
    """Return a bound port to the guest; take it back if the guest cannot be told."""
    if port < 0:
        return port
    try:
        hv.write(address, struct.pack("<I", port))
    except GuestFault:
        hv.domain.events.close(port)
        raise
    return 0


def _bind_virq(hv: Hypervisor, argument: int) -> int:
    virq, vcpu = struct.unpack("<II", hv.read(argument, 8))
    return _out_port(hv, argument + 8, hv.domain.events.bind_virq(virq, vcpu))


def _bind_ipi(hv: Hypervisor, argument: int) -> int:
    (vcpu,) = struct.unpack("<I", hv.read(argument, 4))
    if vcpu >= len(hv.domain.vcpus):
        return -errno.ENOENT
    return _out_port(hv, argument + 4, hv.domain.events.bind(Port("ipi", vcpu=vcpu)))


def _alloc_unbound(hv: Hypervisor, argument: int) -> int:
    domid, remote = struct.unpack("<HH", hv.read(argument, 4))
    if domid not in (_DOMID_SELF, hv.domain.domid):
        return -errno.EPERM
    port = hv.domain.events.bind(Port("unbound", remote_domid=remote))
    return _out_port(hv, argument + 4, port)


def _port(hv: Hypervisor, argument: int) -> int:
    return struct.unpack("<I", hv.read(argument, 4))[0]


def _close(hv: Hypervisor, argument: int) -> int:
    return hv.domain.events.close(_port(hv, argument))


def _send(hv: Hypervisor, argument: int) -> int:
    return hv.domain.events.send(_port(hv, argument))


def _unmask(hv: Hypervisor, argument: int) -> int:
    return hv.domain.events.unmask(_port(hv, argument))


def _status(hv: Hypervisor, argument: int) -> int:
    domid, number = struct.unpack("<HxxI", hv.read(argument, 8))
    if domid not in (_DOMID_SELF, hv.domain.domid):
        return -errno.ESRCH
    port = hv.domain.events.ports.get(number)
    kind, vcpu = (port.kind, port.vcpu) if port else ("closed", 0)
    detail = port.virq if port and port.kind == "virq" else 0
    hv.write(argument + 8, struct.pack("<III", EVTCHNSTAT[kind], vcpu, detail))
    return 0


def _bind_vcpu(hv: Hypervisor, argument: int) -> int:
    number, vcpu = struct.unpack("<II", hv.read(argument, 8))
    port = hv.domain.events.ports.get(number)
    if port is None or port.kind == "ipi":
        return -errno.EINVAL
    if vcpu >= len(hv.domain.vcpus):
        return -errno.ENOENT
    port.vcpu = vcpu
    return 0


def _reset(hv: Hypervisor, argument: int) -> int:
    hv.domain.events.reset()
    return 0


def _init_control(hv: Hypervisor, argument: int) -> int:
    gfn, offset, vcpu = struct.unpack("<QII", hv.read(argument, 16))
    rc = hv.domain.events.init_control(gfn, offset, vcpu)
    if rc == 0:
        hv.write(argument + 16, bytes([FIFO_LINK_BITS]))
    return rc


def _expand_array(hv: Hypervisor, argument: int) -> int:
    return hv.domain.events.expand_array(struct.unpack("<Q", hv.read(argument, 8))[0])


def _set_priority(hv: Hypervisor, argument: int) -> int:
    number, priority = struct.unpack("<II", hv.read(argument, 8))
    port = hv.domain.events.ports.get(number)
    if port is None or priority >= FIFO_QUEUES:
        return -errno.EINVAL
    port.priority = priority
    return 0


_COMMANDS = {
    _BIND_VIRQ: _bind_virq,
    _CLOSE: _close,
    _SEND: _send,
    _STATUS: _status,
    _ALLOC_UNBOUND: _alloc_unbound,
    _BIND_IPI: _bind_ipi,
    _BIND_VCPU: _bind_vcpu,
    _UNMASK: _unmask,
    _RESET: _reset,
    _INIT_CONTROL: _init_control,
    _EXPAND_ARRAY: _expand_array,
    _SET_PRIORITY: _set_priority,
}

HYPERCALLS = {32: event_channel_op}
