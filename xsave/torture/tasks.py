"""The guest's threads as they lie in its memory, found by the kernel's own table of offsets.

`xsave_task_layout` (guest/kernel/sched.h) says where in a task its name, its saved stack pointer
and its list node are. A task and its stack are one block; what is on a stack above the
stack pointer is the thread's, what is below is dead. Above it lie the frames of its functions
and, where an event interrupted it, the pt_regs that entry.S saved.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np

from xsave.frames import PAGE_SHIFT, PAGE_SIZE
from xsave.guest.xen.hypervisor import Hypervisor
from xsave.torture.symbols import Symbols

LAYOUT = struct.Struct("<8Q")
_COMM_BYTES = 16
_MOST_TASKS = 1024
#: struct pt_regs, low to high (entry.S, SAVE_REGS and the frame Xen pushes).
PT_REGS = (
    "r15", "r14", "r13", "r12", "rbp", "rbx", "r11", "r10", "r9", "r8", "rax", "rcx", "rdx",
    "rsi", "rdi", "error_code", "rip", "cs", "rflags", "rsp", "ss",
)  # fmt: skip
_RIP, _CS, _SS = PT_REGS.index("rip"), PT_REGS.index("cs"), PT_REGS.index("ss")
_KERNEL_CS, _KERNEL_SS = (0xE030, 0xE033), 0xE02B


@dataclass(frozen=True)
class Task:
    """One thread: its name, its block of memory, its stack pointer (live if it has a vCPU)."""

    comm: str
    block: int
    sp: int
    words: np.ndarray  # the whole block, u64


class Tasks:
    """The threads of a guest that stands still."""

    def __init__(self, hv: Hypervisor, symbols: Symbols) -> None:
        self._hv, self._symbols = hv, symbols
        layout = LAYOUT.unpack(hv.read(symbols.address["xsave_task_layout"], LAYOUT.size))
        self._comm, self._sp, _state, _flags, self._node, self.stack_bytes, self._struct, _ = layout
        hv.read_registers()
        online = [vcpu for vcpu in hv.domain.vcpus if vcpu.online]
        self._running = [vcpu.context.user_regs.rsp for vcpu in online]
        self.tasks = [self._task(block) for block in self._blocks()]
        self._by_pfn = {
            pfn: (task, page)
            for task in self.tasks
            for page in range(self.stack_bytes // PAGE_SIZE)
            if (pfn := self._pfn(task.block + page * PAGE_SIZE)) >= 0
        }

    def _blocks(self) -> list[int]:
        head = self._symbols.address["all_tasks"]
        blocks: list[int] = []
        node = self._word(head)
        while node != head and len(blocks) < _MOST_TASKS:
            blocks.append(node - self._node)
            node = self._word(node)
        return blocks

    def _task(self, block: int) -> Task:
        data = self._hv.read(block, self.stack_bytes)
        comm = data[self._comm : self._comm + _COMM_BYTES].split(b"\0")[0].decode("latin-1")
        (sp,) = struct.unpack_from("<Q", data, self._sp)
        for rsp in self._running:
            if block < rsp <= block + self.stack_bytes:
                sp = rsp
        return Task(comm, block, sp, np.frombuffer(data, np.uint64))

    def _word(self, address: int) -> int:
        return int(struct.unpack("<Q", self._hv.read(address, 8))[0])

    def _pfn(self, address: int) -> int:
        domain = self._hv.domain
        maddr = domain.tables.walk(self._hv.vcpu.cr3 >> PAGE_SHIFT, address)
        return -1 if maddr < 0 else int(domain.machine.m2p[maddr >> PAGE_SHIFT])

    def place(self, pfn: int, offset: int) -> tuple[str, str]:
        """Return the class and the name of a word of a page."""
        if pfn not in self._by_pfn:
            return "page", f"pfn {pfn:#x}+{offset:#x}"
        task, page = self._by_pfn[pfn]
        inside = page * PAGE_SIZE + offset
        if inside < self._struct:
            return "page", f"{task.comm}: task+{inside:#x}"
        if task.block + inside < task.sp:
            return "dead", f"{task.comm}: dead stack"
        return "stack", f"{task.comm}: {self._slot(task, inside // 8)}"

    def _slot(self, task: Task, slot: int) -> str:
        """Name a word above the stack pointer."""
        words, first = task.words, (task.sp - task.block) // 8
        for start in range(max(first, slot - len(PT_REGS) + 1), slot + 1):
            if self._is_pt_regs(words[start : start + len(PT_REGS)]):
                return f"saved {PT_REGS[slot - start]} of {self._function(words[start + _RIP])}"
        for at in range(slot + 1, len(words)):
            if self._symbols.is_code(int(words[at])):
                return f"a frame below {self._function(words[at])}"
        return "stack"

    def _is_pt_regs(self, words: np.ndarray) -> bool:
        return (
            len(words) == len(PT_REGS)
            and int(words[_CS]) & 0xFFFF in _KERNEL_CS
            and int(words[_SS]) & 0xFFFF == _KERNEL_SS
            and self._symbols.is_code(int(words[_RIP]))
        )

    def _function(self, address: int) -> str:
        return self._symbols.function(int(address))[0]
