"""What the hypervisor of machine B had to refuse, and whether a frame of another domain was meant.

Every hypercall that changes page tables is listened to. One that returns an error is searched for
a frame number of machine A: in its arguments, in the list of updates they point to, and, as a
table that is pinned names its frames by its entries, in the guest's memory.
"""

from __future__ import annotations

import errno

import numpy as np

from xsave.guest.xen.context import Vcpu
from xsave.guest.xen.guestmem import GuestFault
from xsave.guest.xen.hypervisor import Hypercall, Hypervisor
from xsave.torture.stale import mfns_in

_MMU_UPDATE, _UPDATE_VA_MAPPING, _MMUEXT_OP, _SET_GDT = 1, 14, 26, 2
_LISTENED = (_MMU_UPDATE, _UPDATE_VA_MAPPING, _MMUEXT_OP, _SET_GDT)
_ENTRY_BYTES = {_MMU_UPDATE: 16, _MMUEXT_OP: 24}
_MOST_ENTRIES = 512
_HARMLESS = {-errno.EBUSY, -errno.ENOSYS}


class Refusals:
    """Counts them, from now on, on one hypervisor. `foreign`: those that named another's frame."""

    def __init__(self, hv: Hypervisor, first: int, nr: int) -> None:
        self._hv, self._first, self._nr = hv, first, nr
        self.refused = 0
        self.foreign = 0
        hv.table = hv.table | {
            number: self._listen(number, hv.table[number])
            for number in _LISTENED
            if number in hv.table
        }

    def _listen(self, number: int, handler: Hypercall) -> Hypercall:
        def call(hv: Hypervisor, vcpu: Vcpu, *arguments: int) -> int:
            result = handler(hv, vcpu, *arguments)
            signed = result - (1 << 64) if result >> 63 else result
            if signed < 0 and signed not in _HARMLESS:
                self.refused += 1
                self.foreign += self._is_foreign(number, arguments)
            return result

        return call

    def _is_foreign(self, number: int, arguments: tuple[int, ...]) -> bool:
        words = [np.array([a & (1 << 64) - 1 for a in arguments], np.uint64)]
        entry_bytes = _ENTRY_BYTES.get(number)
        if entry_bytes:
            nr = min(arguments[1] & 0xFFFF, _MOST_ENTRIES)
            try:
                data = self._hv.read(arguments[0], nr * entry_bytes)
            except GuestFault:
                data = b""
            words.append(np.frombuffer(data, np.uint64))
        if any(mfns_in(w, self._first, self._nr).any() for w in words):
            return True
        machine = self._hv.domain.machine
        mine = np.flatnonzero(machine.owner == self._hv.domain.domid)
        return bool(mfns_in(machine.mem[mine], self._first, self._nr).any())
