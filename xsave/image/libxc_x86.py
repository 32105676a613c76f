"""The records of a libxc stream that hold what a virtual x86 was promised (CPUID, MSRs, TSC) and
the two of an HVM guest; libxc.py has the others and the theory."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from xsave.image.record import Record, layout, rest, u32, u64, u64_pairs

#: More HVM parameters than this are no parameters (Xen knows about forty).
MAX_HVM_PARAMS = 4096
#: Subleaf of a CPUID leaf that has none.
NO_SUBLEAF = 0xFFFF_FFFF


@dataclass(frozen=True)
class X86TscInfo(Record):
    """How the TSC is virtualised; `nsec` is the guest's time at the save."""

    TYPE, NAME = 0x08, "X86_TSC_INFO"
    LAYOUT = layout(mode=u32, khz=u32, nsec=u64, incarnation=u32, reserved=u32)

    mode: int
    khz: int
    nsec: int
    incarnation: int
    reserved: int = 0


@dataclass(frozen=True)
class HvmContext(Record):
    """Xen's own HVM save blob, opaque."""

    TYPE, NAME, LAYOUT = 0x09, "HVM_CONTEXT", layout(content=rest)

    content: bytes = field(repr=False)

    def check(self, offset: int) -> None:
        """Refuse an empty context."""
        if not self.content:
            self.refuse(offset, "no content", "an HVM context")


@dataclass(frozen=True)
class HvmParams(Record):
    """The HVM parameters: (index, value) pairs."""

    TYPE, NAME = 0x0A, "HVM_PARAMS"
    LAYOUT = layout(count=u32, reserved=u32, pairs=u64_pairs)

    params: tuple[tuple[int, int], ...]
    reserved: int = 0

    @classmethod
    def parse(cls, data: bytes | memoryview, offset: int) -> dict[str, Any]:
        """Return the fields; refuse a count that is not that of the pairs."""
        fields = super().parse(data, offset)
        count, pairs = fields.pop("count"), fields.pop("pairs")
        if count != len(pairs) or count > MAX_HVM_PARAMS:
            cls.refuse(offset, "wrong number of parameters", len(pairs), count)
        return {"params": tuple((i, v) for i, v in pairs.tolist()), **fields}

    @property
    def count(self) -> int:
        """How many parameters there are."""
        return len(self.params)

    @property
    def pairs(self) -> np.ndarray:
        """The parameters as an array of (n, 2) u64."""
        return np.array(self.params, "<u8").reshape(-1, 2)


class CpuidLeaf(NamedTuple):
    """xen_cpuid_leaf_t; subleaf NO_SUBLEAF where the leaf has none."""

    leaf: int
    subleaf: int
    eax: int
    ebx: int
    ecx: int
    edx: int


class MsrEntry(NamedTuple):
    """xen_msr_entry_t."""

    idx: int
    flags: int
    value: int


@dataclass(frozen=True)
class X86CpuidPolicy(Record):
    """The CPUID leaves the guest was promised."""

    TYPE, NAME, LAYOUT = 0x11, "X86_CPUID_POLICY", layout(content=rest)

    content: bytes = field(repr=False)

    @property
    def leaves(self) -> list[CpuidLeaf]:
        """The leaves, in the order of the record."""
        return [
            CpuidLeaf(*row) for row in np.frombuffer(self.content, "<u4").reshape(-1, 6).tolist()
        ]

    def check(self, offset: int) -> None:
        """Refuse what is no whole number of leaves."""
        if not self.content or len(self.content) % 24:
            self.refuse(offset, "wrong length", "a multiple of 24", len(self.content))


@dataclass(frozen=True)
class X86MsrPolicy(Record):
    """The MSRs the guest was promised."""

    TYPE, NAME, LAYOUT = 0x12, "X86_MSR_POLICY", layout(content=rest)

    content: bytes = field(repr=False)

    @property
    def entries(self) -> list[MsrEntry]:
        """The entries, in the order of the record."""
        rows = np.frombuffer(self.content, [("idx", "<u4"), ("flags", "<u4"), ("value", "<u8")])
        return [MsrEntry(*row) for row in rows.tolist()]

    def check(self, offset: int) -> None:
        """Refuse what is no whole number of entries."""
        if not self.content or len(self.content) % 16:
            self.refuse(offset, "wrong length", "a multiple of 16", len(self.content))
