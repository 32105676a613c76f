"""Which instructions the emulated CPU has: those that its guest's CPUID policy promises.

CPUID alone hides nothing from a program that does not ask. Unicorn's translator takes an optional
instruction for an invalid one if the feature words of its CPU model lack the bit (`features[]` of
CPUX86State, a u64 for each register of a CPUID leaf that names features). So bits are taken from
the model in place while a guest runs: RDRAND and RDSEED, which would give it the host's entropy,
RDTSCP, the XSAVE family, FSGSBASE, BMI, AES, PCLMULQDQ, SSSE3, SSE4, POPCNT and MOVBE are #UD then,
as on a CPU that lacks them. MONITOR, MWAIT, CLAC and STAC are #UD in ring 3 whatever the words say.

RDSEED has no bit of its own there: it goes with RDRAND.
"""

from __future__ import annotations

from xsave.guest.xen.cpuid import EMULATED, NO_SUBLEAF, CpuPolicy
from xsave.guest.xen.cpuregs import UnsupportedEmulator

#: u64 words before features[] in the state of the pinned release. That is behind what a parked
#: CPU state holds: it stays as it is when vCPUs take turns.
_FEATURES = 5632 >> 3
#: Index in features[] (FEAT_*) -> (leaf, subleaf, register).
_WORDS = {
    1: (0x1, NO_SUBLEAF, 2),
    2: (0x7, 0, 1),
    6: (0x80000001, NO_SUBLEAF, 3),
    7: (0x80000001, NO_SUBLEAF, 2),
    19: (0xD, 1, 0),
}
#: FEAT_1_EDX: of the base of x86-64, nothing of which can be missed.
_BASE = 0x78BFBFD
#: What is base as well: SYSCALL, NX, LM.
_ALWAYS = {6: 1 << 11 | 1 << 20 | 1 << 29}
_XSAVE, _XSAVEOPT = (1, 1 << 26), (19, 1)


class CpuFeatures:
    """The feature words of one emulated CPU. q: its state as u64 words."""

    def __init__(self, q: memoryview) -> None:
        """Raises UnsupportedEmulator if the words are not where and what they are known to be."""
        self._words = q[_FEATURES : _FEATURES + max(_WORDS) + 1]
        if self._words[0] != _BASE or any(
            self._words[index] != EMULATED[name] for index, name in _WORDS.items()
        ):
            raise UnsupportedEmulator("this unicorn has another CPU model (2.1.4 is known)")

    def have_all(self) -> None:
        """Be the model as it is: to load a vCPU's state, whatever its guest may use."""
        for index, name in _WORDS.items():
            self._words[index] = EMULATED[name]

    def have_promised(self, policy: CpuPolicy, *, xsave: bool) -> None:
        """Be the CPU of this policy, before any code of its guest is translated.

        xsave: the vCPU has XSAVE state, so its guest uses these instructions, though an image
        without a policy does not say so."""
        words = self._words
        for index, name in _WORDS.items():
            words[index] = policy.executes(*name) | EMULATED[name] & _ALWAYS.get(index, 0)
        if xsave and not words[_XSAVE[0]] & _XSAVE[1]:
            for index, bit in (_XSAVE, _XSAVEOPT):
                words[index] |= bit
