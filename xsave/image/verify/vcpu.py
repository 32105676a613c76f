"""Check the vCPU contexts of a PV guest: frames they name, and for 64-bit guests the rest.

A real Xen refuses few of these: the restore succeeds and the guest spins, or dies without a word.
Each rule here was a dead guest once. Two of them depend on the kernel: one that never enters user
mode (a unikernel) may do without IOPL, GS base and syscall entry, so these are asked only of a
kernel that has a syscall entry, a user page table or a 0x80 gate.
"""

from __future__ import annotations

from xsave import public
from xsave.image.libxc import X86PvVcpuBasic
from xsave.image.stream import Item
from xsave.image.verify.context import CONTEXT_OFFSET, MAX_GDT_ENTRIES, basic_items, paging_of
from xsave.image.verify.findings import Findings
from xsave.image.verify.model import Image
from xsave.image.verify.tables import LEVELS

_CONTEXT, _REGS = public.VcpuGuestContext, public.UserRegs
_CR1, _CR3, _CR4 = (_CONTEXT.ctrlreg.offset + 8 * n for n in (1, 3, 4))
_EFLAGS_IOPL = 3 << 12
_ASSIST_WRITABLE_PAGETABLES = 1 << 2
_PAGE_FAULT, _SYSCALL_GATE = 14, 0x80
_MAX_LDT_ENTRIES = 8192
#: L4 slots below are the lower half of the address space: user mode's.
_FIRST_KERNEL_SLOT = 256


def check(image: Image, findings: Findings) -> None:
    """Check every vCPU."""
    if image.vcpus and 0 not in image.vcpus:
        text = f"no record for vCPU 0, there is one for vCPU {min(image.vcpus)}"
        findings.add("missing-record", text, record=X86PvVcpuBasic.NAME)
    for number, records in sorted(image.vcpus.items()):
        if X86PvVcpuBasic.NAME not in records:
            name, item = next(iter(records.items()))
            text = f"vCPU {number} has no {X86PvVcpuBasic.NAME}"
            findings.add("vcpu-id", text, record=name, offset=item.offset)
    for number, item in basic_items(image).items():
        _check_frames(image, findings, number, item)
        if image.guest_width == 8:
            _Vcpu(image, findings, number, item).check()


def _check_frames(image: Image, findings: Findings, number: int, item: Item) -> None:
    """Check what both guest widths have: cr3 and GDT."""
    paging, top = paging_of(image)[number], image.nr_levels

    def tell(rule: str, text: str) -> None:
        text, offset = f"vCPU {number}: {text}", item.offset + CONTEXT_OFFSET + _offset(image, rule)
        findings.add(rule, text, record=item.value.NAME, offset=offset)

    if LEVELS[image.frames.type_of(paging.cr3)] != top:
        tell("vcpu-cr3", f"cr3 names pfn {paging.cr3:#x}, which is no L{top} table")
    if not 0 < paging.gdt_ents <= MAX_GDT_ENTRIES:
        tell("vcpu-gdt", f"{paging.gdt_ents} GDT entries, expected 1 to {MAX_GDT_ENTRIES}")
    for pfn in paging.gdt_frames:
        if image.frames.type_of(pfn) != 0:
            tell("vcpu-gdt", f"GDT frame {pfn:#x} is no ordinary page with content")


def _offset(image: Image, rule: str) -> int:
    if image.guest_width == 4:
        return {"vcpu-cr3": 0xAA8, "vcpu-gdt": 0xA50}[rule]
    return {"vcpu-cr3": _CR3, "vcpu-gdt": _CONTEXT.gdt_frames.offset}[rule]


class _Vcpu:
    """One vCPU of a 64-bit guest."""

    def __init__(self, image: Image, findings: Findings, number: int, item: Item) -> None:
        self.image = image
        self.number = number
        self.state = _CONTEXT.from_buffer_copy(item.value.context)
        self.regs = self.state.user_regs
        self.paging = paging_of(image)[number]
        self._findings = findings
        self._item = item

    def tell(self, rule: str, text: str, at: int) -> None:
        """Note a breach; `at` is the offset in vcpu_guest_context."""
        self._findings.add(
            rule,
            f"vCPU {self.number}: {text}",
            record=self._item.value.NAME,
            offset=self._item.offset + CONTEXT_OFFSET + at,
        )

    def tell_reg(self, rule: str, text: str, name: str) -> None:
        """Note a breach by one of user_regs."""
        self.tell(rule, text, _CONTEXT.user_regs.offset + getattr(_REGS, name).offset)

    def check(self) -> None:
        """Check all fields."""
        self._check_cr1()
        self._check_mode()
        self._check_segments()
        self._check_entry_points()
        canonical = self._check_canonical()
        if canonical:
            self._check_mapped()
        if self.number == 0 and self.regs.rax:
            self.tell_reg("vcpu-rax", f"rax is {self.regs.rax:#x}, expected 0", "rax")
        if not self.state.vm_assist & _ASSIST_WRITABLE_PAGETABLES:
            text = f"vm_assist is {self.state.vm_assist:#x}"
            self.tell("assists", text, _CONTEXT.vm_assist.offset)

    def _check_cr1(self) -> None:
        cr1, user_table = self.paging.cr1, self.paging.user_table
        if user_table is None and cr1:
            self.tell("vcpu-cr1", f"cr1 is {cr1:#x}, without its valid bit", _CR1)
        elif user_table is None and (twin := self._user_table_left_out()) is not None:
            self.tell("vcpu-cr1", f"cr1 is 0, the user table of cr3 is at pfn {twin:#x}", _CR1)
        elif user_table is not None and LEVELS[self.image.frames.type_of(user_table)] != 4:
            self.tell("vcpu-cr1", f"cr1 names pfn {user_table:#x}, which is no L4 table", _CR1)

    def _user_table_left_out(self) -> int | None:
        """Return another L4 table with the very lower half of cr3's; None if that half is empty."""
        tables = self.image.tables
        mine = _lower_half(tables.entries_of(self.paging.cr3))
        for pfn in tables.pfns[tables.levels == 4].tolist() if mine else []:
            if pfn != self.paging.cr3 and _lower_half(tables.entries_of(pfn)) == mine:
                return int(pfn)
        return None

    @property
    def has_user_mode(self) -> bool:
        """Whether this kernel ever enters user mode, as far as one can tell."""
        state = self.state
        gate = state.trap_ctxt[_SYSCALL_GATE].address
        return bool(state.syscall_callback_eip or self.paging.cr1 or gate)

    def _check_mode(self) -> None:
        state, regs = self.state, self.regs
        in_kernel = state.flags & public.VGCF_IN_KERNEL
        # A vCPU in user mode was stopped there; vCPU 0 is in its suspend hypercall.
        if not in_kernel and (self.number == 0 or self.paging.user_table is None):
            text = f"flags are {state.flags:#x}: not in kernel mode"
            self.tell("vcpu-flags", text, _CONTEXT.flags.offset)
        if not self.has_user_mode:
            self.tell("no-user-mode", "no syscall entry", _CONTEXT.syscall_callback_eip.offset)
            return
        if not regs.rflags & _EFLAGS_IOPL:
            self.tell_reg("vcpu-iopl", f"rflags are {regs.rflags:#x}: IOPL 0", "rflags")
        if not state.gs_base_kernel:
            self.tell("vcpu-gs-base", "gs_base_kernel is 0", _CONTEXT.gs_base_kernel.offset)

    def _check_segments(self) -> None:
        for name in ("cs", "ss"):
            selector = getattr(self.regs, name)
            index, in_ldt = selector >> 3, selector & 4
            if not selector & ~3:
                self.tell_reg("vcpu-segments", f"{name} is null", name)
            elif not in_ldt and self.state.gdt_ents <= index < MAX_GDT_ENTRIES:
                text = f"{name} is {selector:#x}, the GDT has {self.state.gdt_ents} entries"
                self.tell_reg("vcpu-segments", text, name)

    def _check_entry_points(self) -> None:
        state = self.state
        names = ["event_callback_eip"]
        if self.has_user_mode:
            names.append("syscall_callback_eip")
        for name in names:
            if not getattr(state, name):
                self.tell("vcpu-callbacks", f"{name} is 0", getattr(_CONTEXT, name).offset)
        if not any(trap.address for trap in state.trap_ctxt):
            self.tell("vcpu-traps", "all entries are empty", _CONTEXT.trap_ctxt.offset)

    def _addresses(self) -> dict[str, int]:
        """Return the addresses that Xen checks, by the name of the field."""
        state, regs = self.state, self.regs
        names = ["kernel_sp", "fs_base", "gs_base_kernel", "gs_base_user"]
        names += ["event_callback_eip", "failsafe_callback_eip", "syscall_callback_eip"]
        found = {"rip": regs.rip, "rsp": regs.rsp} | {name: getattr(state, name) for name in names}
        return found | ({"ldt_base": state.ldt_base} if state.ldt_ents else {})

    def _check_canonical(self) -> bool:
        wrong = {name: a for name, a in self._addresses().items() if not _is_canonical(a)}
        for name, address in wrong.items():
            self._tell_field("vcpu-canonical", f"{name} is {address:#x}", name)
        for vector, trap in enumerate(self.state.trap_ctxt):
            if not _is_canonical(trap.address):
                text = f"the handler of trap {vector} is at {trap.address:#x}"
                self.tell("vcpu-canonical", text, _CONTEXT.trap_ctxt.offset + 16 * vector)
                return False
        return not wrong

    def _tell_field(self, rule: str, text: str, name: str) -> None:
        if hasattr(_CONTEXT, name):
            self.tell(rule, text, getattr(_CONTEXT, name).offset)
        else:
            self.tell_reg(rule, text, name)

    def _check_mapped(self) -> None:
        """Walk the page tables for the addresses that the vCPU uses first."""
        state, regs = self.state, self.regs
        in_kernel = self.number == 0 or state.flags & public.VGCF_IN_KERNEL
        root = self.paging.cr3 if in_kernel else self.paging.user_table
        tables = self.image.tables
        if root is None or self.image.nr_tables_skipped or not tables.entries_of(root):
            return
        if self.image.frames.type_of(root) not in (4, 12):
            return
        places = {"rip": regs.rip, "rsp": (regs.rsp - 8) % (1 << 64)}
        if in_kernel:
            names = ("event_callback_eip", "failsafe_callback_eip", "syscall_callback_eip")
            places |= {name: getattr(state, name) for name in names if getattr(state, name)}
        for name, address in places.items():
            if tables.translate(root, address) is None:
                self._tell_field("vcpu-unmapped", f"{name} leads to {address:#x}", name)


def _is_canonical(address: int) -> bool:
    return address >> 47 in (0, (1 << 17) - 1)


def _lower_half(entries: dict[int, int]) -> dict[int, int]:
    """Return slot -> frame of the lower half of an L4 table's entries."""
    return {slot: pte >> 12 for slot, pte in entries.items() if slot < _FIRST_KERNEL_SLOT}
