"""grant_table_op: a guest sets up its grant table, version 1 only (Xen's gnttab=max-ver:1).

No domain here maps another's frames: of the operations that would, none is there.
Mirrors do_grant_table_op of xen/common/grant_table.c.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Callable

from xsave.guest.xen import grants
from xsave.guest.xen.context import Vcpu
from xsave.guest.xen.guestmem import GuestFault
from xsave.guest.xen.hypervisor import Hypervisor

_SETUP_TABLE, _QUERY_SIZE, _SET_VERSION, _GET_VERSION = 2, 6, 8, 10
_COMMAND_MASK = 0xFFF
_ARGUMENT_MASK = 0xFFFFFFFF & ~_COMMAND_MASK
_DOMID_SELF = 0x7FF0
_SETUP = struct.Struct("<HxxIhxxxxxxQ")


def grant_table_op(
    hv: Hypervisor, vcpu: Vcpu, command: int, argument: int, count: int, *_: int
) -> int:
    count &= 0xFFFFFFFF
    if count >> 31 or command & _ARGUMENT_MASK:
        return -errno.EINVAL
    handler = _COMMANDS.get(command & _COMMAND_MASK)
    return handler(hv, argument, count) if handler else -errno.ENOSYS


def _is_self(hv: Hypervisor, domid: int) -> bool:
    return domid in (_DOMID_SELF, hv.domain.domid)


def _setup_table(hv: Hypervisor, argument: int, count: int) -> int:
    if count != 1:
        return -errno.EINVAL
    domid, nr_frames, _status, frame_list = _SETUP.unpack(hv.read(argument, _SETUP.size))
    table, status = hv.domain.grants, grants.BAD_DOMAIN
    if _is_self(hv, domid):
        status = table.setup(nr_frames)
    if status == grants.OKAY:
        try:
            hv.write(frame_list, struct.pack(f"<{nr_frames}Q", *table.frames[:nr_frames]))
        except GuestFault:
            status = grants.BAD_VIRT_ADDR
    hv.write(argument + 8, struct.pack("<h", status))
    return 0


def _query_size(hv: Hypervisor, argument: int, count: int) -> int:
    if count != 1:
        return -errno.EINVAL
    (domid,) = struct.unpack("<H", hv.read(argument, 2))
    if _is_self(hv, domid):
        sizes = (len(hv.domain.grants.frames), grants.MAX_GRANT_FRAMES, grants.OKAY)
        hv.write(argument + 4, struct.pack("<IIh", *sizes))
    else:
        hv.write(argument + 12, struct.pack("<h", grants.BAD_DOMAIN))
    return 0


def _set_version(hv: Hypervisor, argument: int, _count: int) -> int:
    """Version 2 is answered as by a Xen that is limited to version 1: the guest goes on with 1."""
    (version,) = struct.unpack("<I", hv.read(argument, 4))
    hv.write(argument, struct.pack("<I", grants.VERSION))
    return {grants.VERSION: 0, 2: -errno.ENOSYS}.get(version, -errno.EINVAL)


def _get_version(hv: Hypervisor, argument: int, _count: int) -> int:
    (domid,) = struct.unpack("<H", hv.read(argument, 2))
    if not _is_self(hv, domid):
        return -errno.ESRCH
    hv.write(argument + 4, struct.pack("<I", grants.VERSION))
    return 0


_COMMANDS: dict[int, Callable[[Hypervisor, int, int], int]] = {
    _SETUP_TABLE: _setup_table,
    _QUERY_SIZE: _query_size,
    _SET_VERSION: _set_version,
    _GET_VERSION: _get_version,
}

HYPERCALLS = {20: grant_table_op}
