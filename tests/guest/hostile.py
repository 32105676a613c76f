"""Hypercalls that a guest might make if it meant harm: mostly well-formed, about anything.

A shape says what each argument and each word of the structure behind the pointer is meant to be;
`Attacker` draws them, and something else now and then. Everything follows from one seed.
"""

from __future__ import annotations

import contextlib
import random

from tests.guest.arena import BASE, M64, NR_PAGES, SCRATCH, Arena, fill_scratch
from xsave.guest.xen.guestmem import GuestFault
from xsave.public import VcpuGuestContext

SELF = 0x7FF0
VCPU_OP = 24
CONTEXT = BASE + (480 << 12)  # two pages for a vCPU's context
STRUCT2 = SCRATCH + 1024  # a second structure, for what points to pointers
#: number -> shapes: (arguments, words at SCRATCH, words at STRUCT2); the words repeat.
SHAPES = {
    0: [("p", "tv", ""), ("0", "", "")],
    1: [("pn0s", "ue", ""), ("pnqs", "ue", ""), ("pn0s", "ue", "")],
    2: [("pg", "ff", "")],
    3: [("?v", "", "")],
    4: [("vvv", "", "")],
    5: [("c", "", "")],
    8: [("c?", "", "")],
    9: [("c", "", "")],
    10: [("ad", "", "")],
    12: [("Mp", "q20", "f"), ("Mp", "q30", "k"), ("Cp", "nv", ""), ("Cp", "nq", "")],
    13: [("pn", "h0vec0s0", ""), ("pn", "x0vec000", ""), ("pn", "y0c?0000", "")],
    14: [("vew", "", ""), ("v0w", "", "")],
    15: [("?", "", "")],
    17: [("cp", "c", ""), ("cq", "", "")],
    18: [("cnp", "", "")],
    20: [("cp1", "G0q", ""), ("cp1", "G0v", ""), ("cp1", "c", ""), ("cpn", "??", "")],
    21: [("cc", "", "")],
    24: [("ccp", "fo", ""), ("c0p", "fo", ""), ("c0p", "?c", "")],
    25: [("c?", "", "")],
    26: [("pn0s", "mff", ""), ("pnqs", "mff", ""), ("p100", "mff", "")],
    29: [("cp", "c", ""), ("cp", "qn?", "cc")],
    30: [("cp", "cv", "")],
    32: [("cp", "cc", ""), ("cp", "f0", ""), ("cp", "bb", ""), ("cp", "sc", ""), ("cp", "f8", "")],
    33: [("cp", "c", "")],
}
FLAGS = (0, 1, 3, 5, 7, 0x67, 0x63, 0x65, 0x25, 0xE7, 0x1F, 1 << 63 | 0x67)
ODD = (
    0,
    1,
    SELF,
    0x7FF1,
    2,
    512,
    513,
    7168,
    7169,
    1 << 14,
    1 << 16,
    1 << 31,
    1 << 32,
    1 << 63,
    M64,
)
ADDRESSES = (
    0, 8, 0x7FFF_FFFF_F000, 0x8000_0000_0000, 0xFFFF_8000_0000_0000, 0xFFFF_8080_0000_0000,
    SCRATCH + 4088, SCRATCH + 4092, SCRATCH + 4095, SCRATCH + 3, M64 - 7, M64,
)  # fmt: skip
DESCRIPTORS = (0, 0x00AFFB000000FFFF, 0x00CFF3000000FFFF, 0x00AF9B000000FFFF, 0x8E00 << 32)


class Attacker:
    """Draws calls for one attacker, and makes them."""

    def __init__(self, arena: Arena, hv, seed: int) -> None:
        self.hv = hv
        self.random = random.Random(seed)
        self.frames = arena.frames(hv)
        self.made: list[tuple] = []

    # -- what a letter of a shape stands for ---

    def word(self, letter: str) -> int:
        rng = self.random
        if rng.random() < 0.06:
            return self.anything()
        frame = rng.choice(self.frames)
        return {
            "0": lambda: 0,
            "1": lambda: 1,
            "2": lambda: rng.choice((1, 2, 3, 8, 8, 8)),  # how many extents
            "3": lambda: rng.choice((1, 2, 3, 8, 8, 8)),
            "8": lambda: 8 * rng.randrange(512),
            "?": self.anything,
            "c": lambda: rng.randrange(21),  # a command, a port, a register
            "n": lambda: rng.randrange(9),
            "s": lambda: SELF,
            "p": lambda: SCRATCH,
            "q": lambda: STRUCT2,
            "f": lambda: frame,
            "k": lambda: rng.randrange(NR_PAGES + 20),
            "e": lambda: frame << 12 | rng.choice(FLAGS),
            "a": lambda: frame << 12 | 8 * rng.randrange(512),
            "u": lambda: frame << 12 | 8 * rng.randrange(512) | rng.choice((0, 0, 0, 1, 2, 3)),
            "v": self.address,
            "w": lambda: rng.randrange(4),
            "d": lambda: rng.choice(DESCRIPTORS),
            "g": lambda: rng.choice((0, 1, 16, 512, 513, 1024)),
            "t": lambda: rng.randrange(256) | rng.choice((0, 3, 4, 7)) << 8 | 0xE033 << 16,
            "o": lambda: rng.choice((0, 8, 64, 2048, 4032, 4040)),
            "b": lambda: rng.randrange(21) | rng.choice((0, 0, 1)) << 32,
            "m": lambda: rng.randrange(21),
            "M": lambda: rng.choice((1, 6)),
            "C": lambda: rng.randrange(14),
            "h": lambda: 14,
            "G": lambda: SELF | rng.choice((1, 2, 3, 64, 65, 1 << 31)) << 32,
            "x": lambda: rng.choice((14, 3, 8, 25)),
            "y": lambda: rng.choice((8, 9, 9, 21, 5)),
        }[letter]()

    def anything(self) -> int:
        rng = self.random
        kind = rng.randrange(5)
        if kind == 0:
            return rng.choice(ODD)
        if kind == 1:
            return rng.getrandbits(64)
        if kind == 2:
            return rng.choice(ADDRESSES)
        frame = rng.choice(self.frames)
        return frame if kind == 3 else frame << 12 | rng.choice(FLAGS)

    def address(self) -> int:
        rng = self.random
        if rng.random() < 0.1:
            return rng.choice(ADDRESSES)
        return BASE + (rng.randrange(NR_PAGES) << 12) + rng.choice((0, 0, 8, 4088))

    # -- calls ---

    def call(self, number: int) -> None:
        """Make one call of this hypercall; its answer must be a number."""
        if number == VCPU_OP and self.random.random() < 0.5:
            self.bring_up()
        arguments, first, second = self.random.choice(SHAPES.get(number, [("?????", "", "")]))
        values = [self.word(letter) for letter in arguments.ljust(5, "0")]
        words = self.words(first, 1024) + self.words(second, 1024)
        self.made.append((number, values, words[:16]))
        fill_scratch(self.hv, words)
        result = self.hv.call(number, *values)
        assert type(result) is int, self.made[-1]
        assert -(1 << 63) <= result <= M64, self.made[-1]

    def bring_up(self) -> None:
        """VCPUOP_initialise of the second vCPU, with a context of anything."""
        context = VcpuGuestContext(flags=self.random.choice((4, 4, 4, 0x24, 0)))
        for register in (1, 3):
            context.ctrlreg[register] = self.word("e") if self.random.random() < 0.7 else 0
        context.gdt_ents = self.word("g") if self.random.random() < 0.4 else 0
        for i in range(16):
            context.gdt_frames[i] = self.word("f")
        with contextlib.suppress(GuestFault):
            self.hv.write(CONTEXT, bytes(context))
        self.made.append((VCPU_OP, list(context.ctrlreg), context.gdt_ents))
        assert type(self.hv.call(VCPU_OP, 0, 1, CONTEXT, 0, 0)) is int

    def words(self, shape: str, nr_bytes: int) -> list[int]:
        shape = (shape or "0") * 8
        return [self.word(letter) for letter in shape][: nr_bytes // 8] + [0] * (
            nr_bytes // 8 - len(shape)
        )
