"""Hypercalls made by hand, and where the tests put their structures."""

from __future__ import annotations

import errno

from tests.guest.rig import Guest

REFUSED, FAULT, UNKNOWN = -errno.EINVAL, -errno.EFAULT, -errno.ENOSYS
M64 = (1 << 64) - 1
ARGS, OUT = 3, 4  # pages of the guest
M2P = 0xFFFF_8000_0000_0000


def call(guest: Guest, number: int, *arguments: int) -> int:
    """Make a hypercall with up to five arguments."""
    return guest.hv.call(number, *arguments, *[0] * (5 - len(arguments)))
