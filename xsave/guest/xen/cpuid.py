"""CPUID and MSR policies: what a guest is told of its CPU, and what the emulator can honour.

A new domain sees the qemu64 feature set, which every x86-64 host can honour, so that its image
can be restored anywhere; a restored domain goes on seeing the policy of its image. The policy
is kept in the form of the X86_CPUID_POLICY record: 24-byte leaves {leaf, subleaf, a, b, c, d}.

What the emulator lacks matters: a guest that was promised AVX finds its programs killed by invalid
opcodes (vextrap.py), and so must not be started unless its user insists.
"""

from __future__ import annotations

import struct

NO_SUBLEAF = 0xFFFFFFFF
XEN_LEAVES = 0x40000000
XEN_VERSION = (4, 17)
OSXSAVE = 1 << 27

Leaf = tuple[int, int, int, int]

_VENDOR_AMD = (0x68747541, 0x444D4163, 0x69746E65)  # ebx, ecx, edx
_BRAND = b"xsave emulated CPU".ljust(32, b"\0")

_DEFAULT_LEAVES: dict[tuple[int, int], Leaf] = {
    (0x0, NO_SUBLEAF): (0xD, *_VENDOR_AMD),
    (0x1, NO_SUBLEAF): (0x00060FB1, 0x00010800, 0x80002001, 0x1789C3F5),
    (0x80000000, NO_SUBLEAF): (0x80000008, *_VENDOR_AMD),
    (0x80000001, NO_SUBLEAF): (0x00060FB1, 0, 0x3, 0x2191CBF5),
    (0x80000002, NO_SUBLEAF): struct.unpack_from("<4I", _BRAND),
    (0x80000003, NO_SUBLEAF): struct.unpack_from("<4I", _BRAND, 16),
    (0x80000005, NO_SUBLEAF): (0x01FF01FF, 0x01FF01FF, 0x40020140, 0x40020140),
    (0x80000006, NO_SUBLEAF): (0, 0x42004200, 0x02008140, 0x00808140),
    (0x80000008, NO_SUBLEAF): (0x00003028, 0, 0, 0),
}
# MSR_INTEL_PLATFORM_INFO and MSR_ARCH_CAPABILITIES, both empty: what Xen writes on such a CPU.
_DEFAULT_MSRS = struct.pack("<IIQIIQ", 0xCE, 0, 0, 0x10A, 0, 0)

#: What the emulator executes of what leaves 1, 7, 0xd and 0x80000001 name: unicorn's CPU model.
EMULATED: dict[tuple[int, int, int], int] = {
    (0x1, NO_SUBLEAF, 2): 0xC6D82203,
    (0x7, 0, 1): 0x389,
    (0xD, 1, 0): 0x1,
    (0x80000001, NO_SUBLEAF, 2): 0x21,
    (0x80000001, NO_SUBLEAF, 3): 0x28100800,
}
_XSAVE, _AVX = 1 << 26, 1 << 28

#: Features the emulator does not execute: (leaf, subleaf, register index) -> bit -> name.
_LACKING: dict[tuple[int, int, int], dict[int, str]] = {
    (0x1, NO_SUBLEAF, 2): {3: "MONITOR", 12: "FMA", 17: "PCID", 28: "AVX", 29: "F16C"},
    (0x7, 0, 1): {
        4: "HLE", 5: "AVX2", 11: "RTM", 16: "AVX512F", 17: "AVX512DQ", 18: "RDSEED",
        21: "AVX512_IFMA", 26: "AVX512PF", 27: "AVX512ER", 28: "AVX512CD", 29: "SHA",
        30: "AVX512BW", 31: "AVX512VL",
    },
    (0x7, 0, 2): {
        1: "AVX512_VBMI", 6: "AVX512_VBMI2", 8: "GFNI", 9: "VAES", 10: "VPCLMULQDQ",
        11: "AVX512_VNNI", 12: "AVX512_BITALG", 14: "AVX512_VPOPCNTDQ", 27: "MOVDIRI",
        28: "MOVDIR64B",
    },
    (0x7, 0, 3): {2: "AVX512_4VNNIW", 3: "AVX512_4FMAPS", 8: "AVX512_VP2INTERSECT",
                  14: "SERIALIZE", 23: "AVX512_FP16"},
    (0x7, 1, 0): {4: "AVX_VNNI", 5: "AVX512_BF16", 23: "AVX_IFMA"},
    (0xD, 1, 0): {1: "XSAVEC", 3: "XSAVES"},
    (0x80000001, NO_SUBLEAF, 2): {11: "XOP", 16: "FMA4", 21: "TBM"},
}  # fmt: skip


#: Names of the features a policy can promise here: (leaf, register index) -> bit -> name.
_NAMES: dict[tuple[int, int], dict[int, str]] = {
    (0x1, 3): {
        0: "FPU", 2: "DE", 3: "PSE", 4: "TSC", 5: "MSR", 6: "PAE", 7: "MCE", 8: "CX8", 9: "APIC",
        11: "SEP", 12: "MTRR", 13: "PGE", 14: "MCA", 15: "CMOV", 16: "PAT", 17: "PSE36",
        19: "CLFLUSH", 23: "MMX", 24: "FXSR", 25: "SSE", 26: "SSE2",
    },
    (0x1, 2): {
        0: "SSE3", 1: "PCLMULQDQ", 9: "SSSE3", 13: "CX16", 19: "SSE4_1", 20: "SSE4_2",
        22: "MOVBE", 23: "POPCNT", 25: "AES", 26: "XSAVE", 30: "RDRAND", 31: "HYPERVISOR",
    },
    (0x80000001, 3): {11: "SYSCALL", 20: "NX", 29: "LM"},
    (0x80000001, 2): {0: "LAHF_LM", 1: "CMP_LEGACY", 5: "ABM", 6: "SSE4A"},
}  # fmt: skip


def emulated_features(content: bytes) -> list[str]:
    """Name the features a CPUID policy promises, of those this emulator executes."""
    leaves = parse_policy(content)
    return [
        name
        for (leaf, register), bits in _NAMES.items()
        for bit, name in bits.items()
        if leaves.get((leaf, NO_SUBLEAF), (0, 0, 0, 0))[register] >> bit & 1
    ]


def lacking_features() -> list[str]:
    """Name all the features this emulator is known to lack."""
    return [name for bits in _LACKING.values() for name in bits.values()]


def parse_policy(content: bytes) -> dict[tuple[int, int], Leaf]:
    """Return {(leaf, subleaf): (a, b, c, d)} of an X86_CPUID_POLICY body (length % 24 == 0)."""
    whole = len(content) - len(content) % 24
    return {
        (leaf, subleaf): (a, b, c, d)
        for leaf, subleaf, a, b, c, d in struct.iter_unpack("<6I", content[:whole])
    }


def missing_features(content: bytes) -> list[str]:
    """Name the features a CPUID policy promises and this emulator cannot execute."""
    leaves = parse_policy(content)
    return [
        name
        for (leaf, subleaf, register), bits in _LACKING.items()
        for bit, name in bits.items()
        if leaves.get((leaf, subleaf), (0, 0, 0, 0))[register] >> bit & 1
    ]


class CpuPolicy:
    """A domain's CPUID and MSR policy, in record form, and the answers it gives."""

    def __init__(self, cpuid: bytes, msrs: bytes) -> None:
        self.cpuid = cpuid
        self.msrs = msrs
        self.leaves = parse_policy(cpuid)

    @classmethod
    def default(cls) -> CpuPolicy:
        body = b"".join(struct.pack("<6I", *key, *leaf) for key, leaf in _DEFAULT_LEAVES.items())
        return cls(body, _DEFAULT_MSRS)

    @classmethod
    def of_emulator(cls) -> CpuPolicy:
        """All that the emulator has, but for XSAVE: of a guest whose image, of a Xen before 4.14,
        says nothing of what it was promised. It was its host's CPU, so it goes on to be that."""
        leaves = dict(_DEFAULT_LEAVES)
        for (leaf, subleaf, register), word in EMULATED.items():
            if leaf != 0xD:
                words = list(leaves.get((leaf, subleaf), (0, 0, 0, 0)))
                words[register] |= word & ~_XSAVE if leaf == 1 else word
                leaves[leaf, subleaf] = (words[0], words[1], words[2], words[3])
        body = b"".join(struct.pack("<6I", *key, *leaves[key]) for key in sorted(leaves))
        return cls(body, _DEFAULT_MSRS)

    def promises_avx(self) -> bool:
        return bool(self.leaves.get((0x1, NO_SUBLEAF), (0, 0, 0, 0))[2] & _AVX)

    def executes(self, leaf: int, subleaf: int, register: int) -> int:
        """Return the features that a register of a leaf names, the guest was promised, and the
        emulator has."""
        promised = self.leaves.get((leaf, subleaf), (0, 0, 0, 0))[register]
        return promised & EMULATED[leaf, subleaf, register]

    def leaf(self, leaf: int, subleaf: int, *, khz: int, osxsave: bool) -> Leaf:
        """Answer CPUID. Unknown leaves are zero, as on a CPU that does not have them."""
        if XEN_LEAVES <= leaf < XEN_LEAVES + 0x100:
            return _xen_leaf(leaf - XEN_LEAVES, subleaf, khz)
        a, b, c, d = self.leaves.get((leaf, subleaf)) or self.leaves.get(
            (leaf, NO_SUBLEAF), (0, 0, 0, 0)
        )
        if leaf == 1:
            c = c & ~OSXSAVE | (OSXSAVE if osxsave else 0)
        return a, b, c, d


def _xen_leaf(index: int, subleaf: int, khz: int) -> Leaf:
    """XEN_CPUID leaves; nothing in them depends on the host the guest happens to run on."""
    if index == 0:
        return XEN_LEAVES + 4, 0x566E6558, 0x65584D4D, 0x4D4D566E  # "XenVMMXenVMM"
    if index == 1:
        return XEN_VERSION[0] << 16 | XEN_VERSION[1], 0, 0, 0
    if index == 2:
        return 1, XEN_LEAVES, 0, 0  # one hypercall page, by this MSR
    if index == 3 and subleaf == 0:
        return 0, 0, khz, 0
    return 0, 0, 0, 0
