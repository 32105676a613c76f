"""Which record may come when: the specs' "Layout" chapters as a table, and one walk over it.

A rule names the guests and stream versions a record belongs to, the records that must have come
before it, and whether it may come only once. The table is as lax as the reference reader: what
floats in practice floats here; `verify` is the strict one. The reader, verify and the man page
use the same table.

Besides the order, `Walk.admit` refuses what only earlier records can tell: a P2M_FRAMES of the
wrong length for the guest's width, a vCPU context of the other width, a pfn behind the p2m.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from xsave.errors import ImageError
from xsave.image import libxc
from xsave.image.libxc import TYPE_X86_HVM, TYPE_X86_PV
from xsave.image.pageindex import PageIndex
from xsave.image.pages import PageBatch

_PV = frozenset({TYPE_X86_PV})
_HVM = frozenset({TYPE_X86_HVM})
_ANY = _PV | _HVM


@dataclass(frozen=True)
class Rule:
    """When a record may come."""

    guests: frozenset[int] = _ANY
    after: tuple[str, ...] = ()
    once: bool = False
    since_version: int = 2


#: libxc layer. STATIC_DATA_END is inferred in version 2, which has none.
LIBXC: dict[str, Rule] = {
    # "An x86 PV stream: ... X86_PV_INFO record" comes first of what others are measured by.
    "X86_PV_INFO": Rule(_PV, once=True),
    "X86_CPUID_POLICY": Rule(since_version=3),
    "X86_MSR_POLICY": Rule(since_version=3),
    # "STATIC_DATA_END ... must appear before any memory or register record".
    "STATIC_DATA_END": Rule(once=True, since_version=3),
    "X86_PV_P2M_FRAMES": Rule(_PV, after=("X86_PV_INFO", "STATIC_DATA_END")),
    "PAGE_DATA": Rule(after=("STATIC_DATA_END", "X86_PV_P2M_FRAMES")),
    "VERIFY": Rule(),
    "X86_TSC_INFO": Rule(),
    "SHARED_INFO": Rule(_PV, after=("X86_PV_INFO",)),
    "X86_PV_VCPU_BASIC": Rule(_PV, after=("X86_PV_INFO", "X86_PV_P2M_FRAMES")),
    "X86_PV_VCPU_EXTENDED": Rule(_PV, after=("X86_PV_INFO", "X86_PV_P2M_FRAMES")),
    "X86_PV_VCPU_XSAVE": Rule(_PV, after=("X86_PV_INFO", "X86_PV_P2M_FRAMES")),
    "X86_PV_VCPU_MSRS": Rule(_PV, after=("X86_PV_INFO", "X86_PV_P2M_FRAMES")),
    "HVM_CONTEXT": Rule(_HVM),
    "HVM_PARAMS": Rule(_HVM),
    "TOOLSTACK": Rule(),
    "CHECKPOINT": Rule(after=("STATIC_DATA_END",)),
    "CHECKPOINT_DIRTY_PFN_LIST": Rule(),
    "END": Rule(after=("STATIC_DATA_END", "X86_PV_P2M_FRAMES", "X86_PV_VCPU_BASIC")),
}

#: libxl layer. What follows a libxc CHECKPOINT ends in CHECKPOINT_END.
LIBXL: dict[str, Rule] = {
    "LIBXC_CONTEXT": Rule(once=True),
    "EMULATOR_XENSTORE_DATA": Rule(_HVM, after=("LIBXC_CONTEXT",)),
    "EMULATOR_CONTEXT": Rule(_HVM, after=("LIBXC_CONTEXT",)),
    "CHECKPOINT_END": Rule(after=("LIBXC_CONTEXT",)),
    "CHECKPOINT_STATE": Rule(after=("LIBXC_CONTEXT",)),
    "END": Rule(after=("LIBXC_CONTEXT",)),
}


@dataclass
class Walk:
    """One walk over the records of one layer; guest type and version come from the headers."""

    table: dict[str, Rule]
    guest_type: int = TYPE_X86_PV
    version: int = libxc.VERSION
    seen: set[str] = field(default_factory=set)
    guest_width: int = 8
    max_pfn: int | None = None

    def admit(self, value: Any, offset: int) -> None:
        """Raise ImageError if `value` may not come now; remember it otherwise."""
        if isinstance(value, libxc.Unknown):
            return
        self._admit_name(value.NAME, offset)
        if isinstance(value, libxc.X86PvInfo):
            self.guest_width = value.guest_width
        elif isinstance(value, libxc.X86PvP2mFrames):
            self._admit_p2m(value, offset)
        elif isinstance(value, libxc.X86PvVcpuBasic):
            self._admit_vcpu(value, offset)
        elif isinstance(value, PageBatch | PageIndex):
            self._admit_pages(value, offset)
        self.seen.add(value.NAME)

    def _admit_name(self, name: str, offset: int) -> None:
        rule = self.table[name]
        if self.guest_type not in rule.guests:
            guest = libxc.DOMAIN_TYPES[self.guest_type]
            raise ImageError(f"no record of an {guest} guest", offset=offset, record=name)
        if self.version < rule.since_version:
            what = f"no record of a version {self.version} stream"
            raise ImageError(what, offset=offset, record=name)
        if rule.once and name in self.seen:
            raise ImageError("a second record of its kind", offset=offset, record=name)
        for needed in rule.after:
            if needed not in self.seen and self._applies(needed):
                raise ImageError(f"no {needed} in front of it", offset=offset, record=name)

    def _applies(self, name: str) -> bool:
        rule = self.table[name]
        return self.guest_type in rule.guests and self.version >= rule.since_version

    def _admit_p2m(self, value: libxc.X86PvP2mFrames, offset: int) -> None:
        expected = value.nr_frames(self.guest_width)
        if len(value.pfns) != expected:
            value.refuse(offset, "wrong number of p2m frames", expected, len(value.pfns))
        self.max_pfn = max(value.end_pfn, self.max_pfn or 0)

    def _admit_vcpu(self, value: libxc.X86PvVcpuBasic, offset: int) -> None:
        expected = value.SIZES[self.guest_width]
        if len(value.context) != expected:
            value.refuse(offset, "wrong context size", f"{expected} bytes", len(value.context))

    def _admit_pages(self, batch: PageBatch | PageIndex, offset: int) -> None:
        if self.max_pfn is None or (highest := int(batch.pfns.max())) <= self.max_pfn:
            return
        expected = f"at most {self.max_pfn:#x}"
        raise ImageError(
            "pfn outside the p2m",
            offset=offset,
            record=batch.NAME,
            expected=expected,
            found=f"{highest:#x}",
        )


def libxc_walk(guest_type: int, version: int) -> Walk:
    """Return a walk over the libxc layer."""
    return Walk(LIBXC, guest_type, version)


def libxl_walk() -> Walk:
    """Return a walk over the libxl layer; set `guest_type` once the domain header is known."""
    return Walk(LIBXL)
