"""The stores that Linux makes to its page tables by the hundred, decoded without a library.

ptep_get_and_clear is `xchg [mem], reg`, set_pte a `mov`, and ptep_set_wrprotect and its like are
`and` and `or` of a byte, locked; where there is one CPU Linux puts another prefix in the place of
the lock. Everything else is capstone's (ptwr.py), which takes 50 ms to load and 45 us for each of
these.
"""

from __future__ import annotations

from dataclasses import dataclass

#: Types of operands, as capstone numbers them.
REG, IMM, MEM = 1, 2, 3

_REGISTERS = (
    "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi",
    "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15",
)  # fmt: skip
_LOCK, _DS = 0xF0, 0x3E
_REX, _REX_W, _REX_R = 0x40, 8, 4
_MOV, _XCHG = 0x89, 0x87
_OF_REGISTER = {_MOV: "mov", _XCHG: "xchg"}
_BYTE_GROUP = 0x80
_OF_BYTE = {1: "or", 4: "and"}


@dataclass(frozen=True, slots=True)
class Operand:
    """reg: a number for Store.reg_name; imm: its value, sign-extended; size in bytes."""

    type: int
    size: int
    reg: int = 0
    imm: int = 0


@dataclass(frozen=True, slots=True)
class Store:
    """What ptwr.py looks at of a decoded instruction. size: its length in bytes."""

    mnemonic: str
    size: int
    operands: tuple[Operand, Operand]

    def reg_name(self, reg: int) -> str:
        return _REGISTERS[reg]


def decode(code: bytes) -> Store | None:
    """Decode one of the usual stores of 64-bit code; None: it is another instruction, or is cut
    off."""
    try:
        return _decode(code)
    except IndexError:
        return None


def _decode(code: bytes) -> Store | None:
    at = 1 if code[0] in (_LOCK, _DS) else 0
    rex = code[at] if code[at] & 0xF0 == _REX else 0
    at += bool(rex)
    opcode, modrm = code[at], code[at + 1]
    middle = modrm >> 3 & 7
    end = at + 2 + _address_bytes(code, at + 1)
    if opcode in _OF_REGISTER and rex & _REX_W and modrm < 0xC0:
        if end > len(code) or (code[0] == _LOCK and opcode == _MOV):
            return None
        register = Operand(REG, 8, reg=middle | (8 if rex & _REX_R else 0))
        return Store(_OF_REGISTER[opcode], end, (Operand(MEM, 8), register))
    if opcode == _BYTE_GROUP and middle in _OF_BYTE and modrm < 0xC0:
        value = code[end]
        immediate = Operand(IMM, 1, imm=value - (value >> 7 << 8))
        return Store(_OF_BYTE[middle], end + 1, (Operand(MEM, 1), immediate))
    return None


def _address_bytes(code: bytes, at: int) -> int:
    """Return how many bytes of a memory operand follow its ModRM byte."""
    mod, rm = code[at] >> 6, code[at] & 7
    sib = rm == 4
    if mod == 0:
        anchor = code[at + 1] & 7 if sib else rm
        return sib + (4 if anchor == 5 else 0)
    return sib + (1 if mod == 1 else 4)
