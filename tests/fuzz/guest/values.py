"""What a hostile guest puts into its words: mostly what belongs there, of the wrong object.

The letters are those of tests/guest/hostile.py, whose shapes say what each argument and each word
of a structure is meant to be; here a frame is drawn before there are any (machinecode.Value).
"""

from __future__ import annotations

from tests.fuzz.guest import layout
from tests.fuzz.guest.layout import NR_PAGES, SCRATCH, STRUCT2, entry, mfn, va
from tests.fuzz.guest.machinecode import M64, Value
from tests.guest.hostile import ADDRESSES, DESCRIPTORS, FLAGS, ODD, SELF

_TABLES = (layout.L4_PFN, layout.L3_PFN, layout.L2_PFN, layout.L1_PFN, layout.L1_PFN + 1)
_RINGS = (layout.STORE_PFN, layout.CONSOLE_PFN)
_MORE_ODD = (0x8000_0000_0000_0000, 0x7FFF_FFFF_FFFF_FFFF, 0x8000_0001, 1 << 15, 4096, 1 << 20, 16)


class Values:
    """Draws words. `strangers`: frames that are not the guest's (a victim's, Xen's, none's)."""

    def __init__(self, rng, strangers):
        self.rng = rng
        self.strangers = strangers

    def word(self, letter):
        """A word for a letter of a shape, now and then anything."""
        rng = self.rng
        if rng.random() < 0.05:
            return self.anything()
        draw = {
            "0": lambda: 0,
            "1": lambda: 1,
            "2": lambda: rng.choice((1, 2, 3, 8, 8, 600)),
            "3": lambda: rng.choice((1, 2, 3, 8, 8, 600)),
            "8": lambda: 8 * rng.randrange(512),
            "?": self.anything,
            "c": lambda: rng.randrange(21),
            "n": self.count,
            "s": lambda: rng.choice((SELF, SELF, SELF, SELF, 1, 2, 3, 0x7FF1)),
            "p": lambda: SCRATCH if rng.random() < 0.95 else self.address(),
            "q": lambda: STRUCT2,
            "f": self.frame,
            "k": lambda: rng.randrange(NR_PAGES + 20),
            "e": lambda: self.frame(12, rng.choice(FLAGS)),
            "a": lambda: self.frame(12, 8 * rng.randrange(512)),
            "u": lambda: self.frame(12, 8 * rng.randrange(512) | rng.choice((0, 0, 0, 1, 2, 3))),
            "v": self.address,
            "w": lambda: rng.choice((0, 1, 2, 3, 2, 2)),
            "d": lambda: rng.choice(DESCRIPTORS),
            "g": lambda: rng.choice((0, 1, 16, 512, 513, 1024)),
            "t": lambda: rng.randrange(256) | rng.choice((0, 3, 4, 7)) << 8 | 0xE033 << 16,
            "o": lambda: rng.choice((0, 8, 64, 2048, 4032, 4040)),
            "b": lambda: rng.randrange(21) | rng.choice((0, 0, 1)) << 32,
            "m": lambda: rng.randrange(21),
            "M": lambda: rng.choice((1, 6)) | (rng.randrange(9) << 6 if rng.random() < 0.1 else 0),
            "C": lambda: rng.randrange(32),
            "h": lambda: 14,
            "G": lambda: SELF | rng.choice((1, 2, 3, 64, 65, 1 << 31)) << 32,
            "x": lambda: rng.choice((14, 3, 8, 25, 1, 26, 12, 13)),
            "y": lambda: rng.choice((8, 9, 9, 21, 5)),
        }[letter]
        return draw()

    def count(self):
        """A length: most often small, else at a limit or beyond all."""
        rng = self.rng
        if rng.random() < 0.9:
            return rng.randrange(9)
        return rng.choice((*_MORE_ODD, 1 << 14, 16385, 1 << 31, (1 << 31) | 3, 1 << 12))

    def own_pfn(self):
        """A page of the guest's: a table, a ring, a page of the kernel, or one of nobody."""
        rng = self.rng
        return rng.choice(
            (
                rng.choice(_TABLES),
                rng.choice(_RINGS),
                layout.SCRATCH_PFN + rng.randrange(12),
                layout.TABLES_PFN + rng.randrange(16),
                layout.TABLES_PFN + rng.randrange(16),
                rng.randrange(NR_PAGES),
            )
        )

    def frame(self, shift=0, bits=0):
        """A frame, or an entry with one."""
        rng = self.rng
        if rng.random() < 0.2:
            return Value((rng.choice(self.strangers) << shift | bits) & M64)
        if rng.random() < 0.05:
            return Value(bits, layout.SHARED_INFO_MADDR) if shift else Value(1)
        return Value(bits, mfn(self.own_pfn()).address, shift)

    def anything(self):
        """Any word."""
        rng = self.rng
        return rng.choice(
            (
                lambda: rng.choice(ODD + _MORE_ODD),
                lambda: rng.getrandbits(64),
                lambda: rng.choice(ADDRESSES),
                self.address,
                self.frame,
                lambda: self.frame(12, rng.choice(FLAGS)),
                lambda: entry(rng.randrange(NR_PAGES), rng.getrandbits(12) | rng.choice(FLAGS)),
            )
        )()

    def address(self):
        """A place in the guest's memory, or one that is nowhere, or half there."""
        rng = self.rng
        if rng.random() < 0.15:
            return rng.choice(ADDRESSES)
        pfn = rng.choice((self.own_pfn(), layout.SCRATCH_PFN + rng.randrange(12)))
        return va(pfn, rng.choice((0, 0, 8, 4088, 4092, 8 * rng.randrange(512))))
