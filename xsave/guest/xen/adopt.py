"""A vCPU takes over a whole context: from an image, or from its guest (VCPUOP_initialise).

The frames a context names (page-table roots, GDT) are validated like those of any hypercall;
what the vCPU held before is given up. Mirrors arch_set_info_guest of xen/arch/x86/domain.c.
"""

from __future__ import annotations

from xsave.guest.xen.context import Vcpu
from xsave.guest.xen.domain import Domain
from xsave.guest.xen.ldt import is_valid
from xsave.guest.xen.pagetypes import PGT_L4
from xsave.public import VCPU_CONTEXT_BYTES_64, VGCF_IN_KERNEL

_MAX_GDT_ENTRIES = 14 * 512
_ROOTS = (3, 1)  # cr3, and cr1: the user page tables


def adopt_context(domain: Domain, vcpu: Vcpu, blob: bytes) -> str:
    """Load a vcpu_guest_context with mfns in it. Return "" or what is wrong with it."""
    if len(blob) != VCPU_CONTEXT_BYTES_64:
        return "only 64-bit guests can run here"
    _release(domain, vcpu)
    vcpu.load_context(blob)
    context = vcpu.context
    entries, context.gdt_ents = context.gdt_ents, 0
    ldt = context.ldt_base, context.ldt_ents
    context.ldt_base = context.ldt_ents = 0
    roots = {register: context.ctrlreg[register] & ~0xFFF for register in _ROOTS}
    context.ctrlreg[3] = context.ctrlreg[1] = 0
    if not context.flags & VGCF_IN_KERNEL:
        return f"vCPU {vcpu.id} is outside its kernel"
    for register, root in roots.items():
        if (register == 3 or root) and domain.tables.get_type(root >> 12, PGT_L4):
            return f"cr{register} names frame {root >> 12:#x}, which is no valid page table"
        context.ctrlreg[register] = root
    frames = [context.gdt_frames[i] for i in range(min(-(-entries // 512), 14))]
    if entries > _MAX_GDT_ENTRIES or domain.set_gdt(vcpu, frames, entries):
        return f"vCPU {vcpu.id}: its GDT frames are no valid descriptor tables"
    if not is_valid(*ldt):
        return f"vCPU {vcpu.id}: it has {ldt[1]} LDT entries at {ldt[0]:#x}"
    domain.ldts.set(vcpu, *ldt)
    return ""


def _release(domain: Domain, vcpu: Vcpu) -> None:
    """Drop the references of the context that goes."""
    context = vcpu.context
    for register in _ROOTS:
        if context.ctrlreg[register] >> 12:
            domain.tables.put_type(context.ctrlreg[register] >> 12)
        context.ctrlreg[register] = 0
    domain.set_gdt(vcpu, [], 0)
    domain.ldts.set(vcpu, 0, 0)
