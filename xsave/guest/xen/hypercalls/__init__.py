"""One module per hypercall family; each exports HYPERCALLS: number -> handler.

A handler gets the hypervisor, the calling vCPU and five arguments as unsigned 64-bit integers;
it returns the result or a negative errno. It may raise GuestFault for a bad pointer (-EFAULT).
"""

from __future__ import annotations

from xsave.guest.xen.hypercalls import cpu, event, gnttab, memory, misc, mmu, sched
from xsave.guest.xen.hypervisor import Hypercall


def table() -> dict[int, Hypercall]:
    """Return the dispatch table of all families."""
    merged: dict[int, Hypercall] = {}
    for family in (cpu, event, gnttab, memory, misc, mmu, sched):
        merged |= family.HYPERCALLS
    return merged
