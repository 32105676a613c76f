"""What must be true of a domain's frames whatever its guest did: asked of the domain process.

`install` gives the domain processes forked from here one more request, `audit`. It is answered
between two runs of the guest, like any other, with a list of what is wrong.
"""

from __future__ import annotations

from collections import Counter

import numpy as np

from tests.guest.arena import mfn_of_page
from tests.guest.pagetable_model import FRAME, XEN_SLOTS, recount
from xsave.frames import INVALID_M2P_ENTRY
from xsave.guest.xen.machine import DOMID_FREE
from xsave.guest.xen.pagetypes import PGT_L4, PGT_XEN
from xsave.host.operations import Operations


def install():
    """Let the processes that are forked from now on answer `audit`."""
    Operations.op_audit = _op_audit


def _op_audit(operations, _request):
    running = operations._running
    return {
        "problems": problems(running.domain),
        "crash": running.domain.crash_message,
        "crossings": running.xen.nr_crossings,
    }, b""


def problems(domain):
    """Every count is what the tables and Xen's own uses add up to; no table is writable; nothing
    is known of free frames; the domain has not more than it may have."""
    machine, found = domain.machine, []
    own = np.flatnonzero((machine.owner == domain.domid) & (machine.page_type != PGT_XEN)).tolist()
    try:
        uses, refs = recount(machine, set(own))
    except AssertionError as broken:
        return [f"an entry that may not be: {broken}"]
    uses += held(domain)
    dying_uses, dying_refs = dying(domain)
    uses, refs = uses + dying_uses, refs + dying_refs
    for name, column, wanted in (("type", machine.type_count, uses), ("refs", machine.refs, refs)):
        counted = {mfn: int(column[mfn]) for mfn in own if column[mfn]}
        wrong = {mfn for mfn in {*counted, *wanted} if counted.get(mfn, 0) != wanted.get(mfn, 0)}
        found += [
            f"{name} count of frame {mfn:#x} (type {machine.page_type[mfn]}): "
            f"{counted.get(mfn, 0)}, expected {wanted.get(mfn, 0)}"
            for mfn in sorted(wrong)[:5]
        ]
    free = machine.owner == DOMID_FREE
    if (machine.m2p[free] != INVALID_M2P_ENTRY).any() or machine.type_count[free].any():
        found.append("something is known of free frames")
    if domain.nr_pages() > domain.max_pages:
        found.append(f"{domain.nr_pages()} pages, {domain.max_pages} allowed")
    return found


def dying(domain):
    """What a preempted request left: tables that still hold what they name; validated ones."""
    progress, q = domain.tables.progress, domain.tables.q
    uses, refs = Counter(progress.kept), Counter()
    for mfn, level in progress.dying:
        uses[mfn] += 1
        for slot in range(512):
            entry = q[(mfn << 9) + slot]
            if entry & 1 and not (level == PGT_L4 and slot in XEN_SLOTS):
                uses[(entry & FRAME) >> 12] += 1
                refs[(entry & FRAME) >> 12] += 1
    return uses, refs


def held(domain):
    """Uses of frames that are in none of the guest's tables: frame -> how often."""
    machine = domain.machine
    uses = np.flatnonzero((machine.pinned != 0) & (machine.owner == domain.domid)).tolist()
    for vcpu in domain.vcpus:
        context = vcpu.context
        uses += [context.ctrlreg[i] >> 12 for i in (1, 3) if context.ctrlreg[i]]
        uses += list(context.gdt_frames)[: -(-context.gdt_ents // 512)]
        uses += [vcpu.info_mfn] if vcpu.info_mfn is not None else []
    uses += [queues.control >> 12 for queues in domain.events._fifo.values()]
    uses += [address >> 12 for address in domain.events._array]
    rings = (domain.store_page, domain.console.page)
    uses += [mfn_of_page(machine, page) for page in rings if page is not None]
    return Counter([*uses, *domain.grants.frames, domain.shared_info_mfn])
