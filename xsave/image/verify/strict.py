"""What can be said of a header or record by itself, and of its place among the others.

The reader ignores reserved fields and padding, as the specs want it to; here they are looked at.
The order is that of order.py, the same table the reader uses, but a breach does not end the walk.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from xsave.errors import ImageError
from xsave.image import libxc, libxl, order, xl
from xsave.image.pages import MAX_BATCH, PageBatch
from xsave.image.stream import Item
from xsave.image.verify.findings import Findings

#: What order.py finds besides the order, by the first words of its message.
_OTHER_RULES = {
    "wrong number of p2m frames": "p2m-frames",
    "wrong context size": "vcpu-size",
    "pfn outside the p2m": "pfn-range",
}
_RESERVED = ("reserved", "reserved1", "reserved2", "optional_flags")


class OrderCheck:
    """Walks the libxl and the libxc layer side by side."""

    def __init__(self, findings: Findings) -> None:
        self._findings = findings
        self._walks = {"libxl": order.libxl_walk(), "libxc": order.libxl_walk()}
        self._version = libxc.VERSION
        self._told: set[str] = set()

    def take(self, item: Item) -> None:
        """Note a breach of the order; one that only follows from an earlier one is not told."""
        value = item.value
        if isinstance(value, libxc.ImageHeader):
            self._version = value.version
        elif isinstance(value, libxc.DomainHeader):
            self._walks["libxc"] = order.libxc_walk(value.type, self._version)
            self._walks["libxl"].guest_type = value.type
        elif not isinstance(value, libxl.LibxlHeader | xl.XlHeader):
            self._admit(item)

    def _admit(self, item: Item) -> None:
        walk = self._walks[item.layer]
        try:
            walk.admit(item.value, item.offset)
        except ImageError as error:
            walk.seen.add(item.value.NAME)
            if error.what not in self._told:
                self._told.add(error.what)
                self._findings.add_error(_OTHER_RULES.get(error.what, "order"), error)


def check_item(item: Item, findings: Findings) -> None:
    """Look at the reserved fields and the padding of one header or record."""
    value = item.value
    for name in _RESERVED:
        if content := getattr(value, name, 0):
            _reserved(item, findings, f"{name} is {content:#x}, not 0")
    for what in _special(value):
        _reserved(item, findings, what)
    if getattr(value, "padding", b""):
        text = f"padding is {value.padding.hex(' ')}, not 0"
        findings.add("padding", text, record=value.NAME, offset=item.offset)
    if isinstance(value, libxc.Unknown):
        text = f"type {value.type:#x}, {len(value.content)} bytes"
        findings.add("unknown-optional", text, record=value.NAME, offset=item.offset)


def _reserved(item: Item, findings: Findings, what: str) -> None:
    findings.add("reserved", what, record=item.value.NAME, offset=item.offset)


def _special(value: Any) -> list[str]:
    """Return what is wrong with reserved parts that are no field of their own."""
    if isinstance(value, libxc.ImageHeader) and (bits := value.options & ~1):
        return [f"options has reserved bits {bits:#x}"]
    if isinstance(value, libxl.LibxlHeader) and (bits := value.options & ~3):
        return [f"options has reserved bits {bits:#x}"]
    if isinstance(value, libxc.X86PvVcpuMsrs):
        words = np.frombuffer(value.context, "<u4").reshape(-1, 4)
        return ["an MSR has a reserved field that is not 0"] if words[:, 1].any() else []
    if isinstance(value, PageBatch) and value.reserved_bits is not None:
        pfn = value.pfns[np.flatnonzero(value.reserved_bits)[0]]
        return [f"bits 52-59 of the entry of pfn {pfn:#x} are not 0"]
    return []


def check_batch(item: Item, findings: Findings) -> None:
    """Look at one batch by itself."""
    batch = item.value
    if len(batch.pfns) > MAX_BATCH:
        text = f"{len(batch.pfns)} entries, Xen writes {MAX_BATCH} at most"
        findings.add("batch", text, record=batch.NAME, offset=item.offset)
    ordered = np.sort(batch.pfns)
    if (twice := ordered[1:] == ordered[:-1]).any():
        text = f"pfn {ordered[1:][twice][0]:#x} comes twice"
        findings.add("batch", text, record=batch.NAME, offset=item.offset)
