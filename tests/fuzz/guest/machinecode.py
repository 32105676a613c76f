"""Machine code put together by hand, of the few instructions that a hostile kernel is made of.

A value is what a word of an argument or of a structure will be when the guest gets there: a
number, or the word at an address of the guest's memory, shifted, with bits set. So a kernel made
before its domain can still name its own frames: the word is an entry of its p2m list.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

M64 = (1 << 64) - 1
SYSCALL = b"\x0f\x05"
JUMP_TO_ITSELF = b"\xeb\xfe"
_TO_ARGUMENT = (b"\x48\x89\xc7", b"\x48\x89\xc6", b"\x48\x89\xc2", b"\x49\x89\xc2", b"\x49\x89\xc0")


@dataclass(frozen=True)
class Value:
    """[address] << shift | bits; only bits where there is no address."""

    bits: int = 0
    address: int | None = None
    shift: int = 0


def quad(number):
    """The eight bytes of a number."""
    return struct.pack("<Q", number & M64)


class Code:
    """Instructions from `base` on. Values go through rax; rcx is lost too."""

    def __init__(self, base):
        self.base = base
        self.blob = bytearray()

    @property
    def here(self):
        """The address of the next instruction."""
        return self.base + len(self.blob)

    def raw(self, code):
        """Any bytes."""
        self.blob += code

    def load(self, value):
        """mov rax, value."""
        if isinstance(value, int):
            value = Value(value)
        if value.address is None:
            self.raw(b"\x48\xb8" + quad(value.bits))
            return
        self.raw(b"\x48\xa1" + quad(value.address))
        if value.shift:
            self.raw(b"\x48\xc1\xe0" + bytes([value.shift]))
        if value.bits:
            self.raw(b"\x48\xb9" + quad(value.bits) + b"\x48\x09\xc8")

    def store(self, address, value):
        """mov [address], value."""
        self.load(value)
        self.raw(b"\x48\xa3" + quad(address))

    def store_words(self, address, values):
        """Quadwords, one behind the other."""
        for i, value in enumerate(values):
            self.store(address + 8 * i, value)

    def set_rsp(self, address):
        """mov rsp, address."""
        self.raw(b"\x48\xbc" + quad(address))

    def set_rdi(self, address):
        """mov rdi, address."""
        self.raw(b"\x48\xbf" + quad(address))

    def set_rsi(self, address):
        """mov rsi, address."""
        self.raw(b"\x48\xbe" + quad(address))

    def set_rcx(self, number):
        """mov rcx, number."""
        self.raw(b"\x48\xb9" + quad(number))

    def copy(self, source, target, nr):
        """rep movsb."""
        self.set_rsi(source)
        self.set_rdi(target)
        self.set_rcx(nr)
        self.raw(b"\xf3\xa4")

    def fill(self, target, value, nr):
        """rep stosq of a value."""
        self.load(value)
        self.set_rdi(target)
        self.set_rcx(nr)
        self.raw(b"\xf3\x48\xab")

    def jump_through(self, address):
        """mov rax, [address]; jmp rax."""
        self.raw(b"\x48\xa1" + quad(address) + b"\xff\xe0")

    def hypercall(self, number, *arguments):
        """Load the arguments, last one first as rax and rcx are lost, and call."""
        for index in reversed(range(len(arguments))):
            self.load(arguments[index])
            self.raw(_TO_ARGUMENT[index])
        self.load(number)
        self.raw(SYSCALL)

    def back_to(self, address):
        """jmp address, not farther than 2 GiB."""
        self.raw(b"\xe9" + struct.pack("<i", address - self.here - 5))
