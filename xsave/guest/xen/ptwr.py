"""Writes to a page table through an ordinary mapping: decoded, checked and done for the guest.

Guests with VMASST_writable_pagetables (Linux) write to their read-only tables and expect Xen to
emulate the store (ptwr_do_page_fault). The value the instruction would have stored is computed
from the registers and goes through the same checks as mmu_update. Decoding is capstone's, but for
what is usual (stores.py).
"""

from __future__ import annotations

import contextlib
from functools import cache
from typing import Any

from xsave.guest.xen import stores
from xsave.guest.xen.cpuregs import RAX, RCX, RDI, RIP, RSI
from xsave.guest.xen.guestcpu import GuestCpu
from xsave.guest.xen.guestmem import GuestFault

M64 = (1 << 64) - 1
CF, PF, AF, ZF, SF, DF, OF = 1, 4, 0x10, 0x40, 0x80, 0x400, 0x800
_ARITHMETIC_FLAGS = CF | PF | AF | ZF | SF | OF
_MAX_INSTRUCTION = 15

_REGISTERS = (
    *(("r" + n + "x", "e" + n + "x", n + "x", n + "l") for n in "acdb"),
    *(("r" + n, "e" + n, n, n + "l") for n in ("sp", "bp", "si", "di")),
    *((f"r{i}", f"r{i}d", f"r{i}w", f"r{i}b") for i in range(8, 16)),
)
#: register name -> (index in the CPU state, width in bits)
_BY_NAME = {
    name: (index, width)
    for index, names in enumerate(_REGISTERS)
    for name, width in zip(names, (64, 32, 16, 8), strict=True)
}


@cache
def _decoder() -> Any:
    import capstone  # 50 ms, and few guests need it

    decoder = capstone.Cs(capstone.CS_ARCH_X86, capstone.CS_MODE_64)
    decoder.detail = True
    return decoder


def emulate_table_write(hv: GuestCpu, address: int) -> bool:
    """Emulate the faulting store to a page table. False: the guest gets its #PF."""
    instruction = _decode(hv)
    if instruction is None:
        return False
    operands = instruction.operands
    size = operands[0].size if operands else 8
    maddr = hv.tables.walk(hv.vcpu.cr3 >> 12, address)
    if maddr & 7 and (maddr & 7) + size > 8:
        return False
    shift = 8 * (maddr & 7)
    width_mask = (1 << 8 * size) - 1
    entry = hv.tables.q[maddr >> 3]
    stored = _compute(hv, instruction, (entry >> shift) & width_mask, size)
    if stored is None:
        return False
    new = entry & ~(width_mask << shift) | (stored.value & width_mask) << shift
    if hv.tables.update_entry(maddr >> 12, (maddr & 0xFFF) >> 3, new):
        return False
    stored.commit()
    if not stored.again:
        hv.q[RIP] += instruction.size
    return True


def _decode(hv: GuestCpu) -> Any:
    """Disassemble at rip; the page behind the instruction's need not be mapped."""
    rip = hv.q[RIP]
    here = min(_MAX_INSTRUCTION, 4096 - (rip & 0xFFF))
    code = b""
    with contextlib.suppress(GuestFault):
        code = hv.read(rip, here)
        code += hv.read(rip + here, _MAX_INSTRUCTION - here)
    return stores.decode(code) or next(_decoder().disasm(code, rip, 1), None)


class _Store:
    """The value to store, and the register and flag changes that follow if it is accepted."""

    def __init__(self, hv: GuestCpu, value: int) -> None:
        self.hv = hv
        self.value = value
        self.registers: dict[int, int] = {}
        self.flags: int | None = None
        self.again = False

    def commit(self) -> None:
        for index, value in self.registers.items():
            self.hv.q[index] = value & M64
        if self.flags is not None:
            self.hv.cpu.rflags = self.flags


def _operand(hv: GuestCpu, instruction: Any, operand: Any) -> int:
    if operand.type == stores.IMM:
        return operand.imm & M64
    index, width = _BY_NAME[instruction.reg_name(operand.reg)]
    return hv.q[index] & ((1 << width) - 1)


def _set_register(store: _Store, name: str, value: int) -> None:
    index, width = _BY_NAME[name]
    if width >= 32:
        store.registers[index] = value
    else:
        mask = (1 << width) - 1
        store.registers[index] = store.hv.q[index] & ~mask | value & mask


def _compute(hv: GuestCpu, instruction: Any, old: int, size: int) -> _Store | None:
    """Return what the instruction stores over `old`, None for one that is not known."""
    mnemonic = instruction.mnemonic.removeprefix("lock ")
    try:
        if mnemonic in ("mov", "movnti"):
            return _Store(hv, _operand(hv, instruction, instruction.operands[1]))
        if mnemonic == "xchg":
            return _xchg(hv, instruction, old)
        if mnemonic in ("and", "or", "xor"):
            return _logic(hv, instruction, mnemonic, old, size)
        if mnemonic in ("btr", "bts"):
            return _bit(hv, instruction, mnemonic, old, size)
        if mnemonic == "cmpxchg":
            return _cmpxchg(hv, instruction, old, size)
        if mnemonic in ("stosq", "rep stosq", "movsq", "rep movsq"):
            return _string(hv, mnemonic)
    except (KeyError, GuestFault):  # a high-byte register, or a source that is not there
        return None
    return None


def _xchg(hv: GuestCpu, instruction: Any, old: int) -> _Store:
    first, second = instruction.operands
    register = second if first.type == stores.MEM else first
    store = _Store(hv, _operand(hv, instruction, register))
    _set_register(store, instruction.reg_name(register.reg), old)
    return store


def _logic(hv: GuestCpu, instruction: Any, mnemonic: str, old: int, size: int) -> _Store:
    source = _operand(hv, instruction, instruction.operands[1])
    value = {"and": old & source, "or": old | source, "xor": old ^ source}[mnemonic]
    value &= (1 << 8 * size) - 1
    store = _Store(hv, value)
    store.flags = hv.cpu.rflags & ~_ARITHMETIC_FLAGS | _result_flags(value, size)
    return store


def _bit(hv: GuestCpu, instruction: Any, mnemonic: str, old: int, size: int) -> _Store:
    bit = 1 << (_operand(hv, instruction, instruction.operands[1]) % (8 * size))
    store = _Store(hv, old | bit if mnemonic == "bts" else old & ~bit)
    store.flags = hv.cpu.rflags & ~CF | (CF if old & bit else 0)
    return store


def _cmpxchg(hv: GuestCpu, instruction: Any, old: int, size: int) -> _Store:
    accumulator = hv.q[RAX] & ((1 << 8 * size) - 1)
    if accumulator == old:
        store = _Store(hv, _operand(hv, instruction, instruction.operands[1]))
    else:
        store = _Store(hv, old)
        _set_register(store, _REGISTERS[0][{8: 0, 4: 1, 2: 2, 1: 3}[size]], old)
    store.flags = hv.cpu.rflags & ~_ARITHMETIC_FLAGS | _compare_flags(accumulator, old, size)
    return store


def _compare_flags(a: int, b: int, size: int) -> int:
    """The flags of a - b."""
    difference = (a - b) & ((1 << 8 * size) - 1)
    sign = 8 * size - 1
    flags = CF if a < b else 0
    flags |= AF if (a ^ b ^ difference) & 0x10 else 0
    flags |= OF if ((a ^ b) & (a ^ difference)) >> sign & 1 else 0
    return flags | _result_flags(difference, size)


def _result_flags(value: int, size: int) -> int:
    flags = ZF if value == 0 else 0
    flags |= SF if value >> (8 * size - 1) else 0
    return flags | (PF if (value & 0xFF).bit_count() % 2 == 0 else 0)


def _string(hv: GuestCpu, mnemonic: str) -> _Store:
    """One step of stosq/movsq; with rep the instruction is left to run, or fault, again."""
    q = hv.q
    step = -8 if hv.cpu.rflags & DF else 8
    if "movs" in mnemonic:
        store = _Store(hv, int.from_bytes(hv.read(q[RSI], 8), "little"))
        store.registers[RSI] = q[RSI] + step
    else:
        store = _Store(hv, q[RAX])
    store.registers[RDI] = q[RDI] + step
    if mnemonic.startswith("rep"):
        store.registers[RCX] = q[RCX] - 1
        store.again = q[RCX] > 1
    return store
