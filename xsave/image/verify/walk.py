"""Verify a whole image: one walk over it, then the checks of what it leaves behind."""

from __future__ import annotations

from xsave.errors import ImageError
from xsave.image import libxc
from xsave.image.buffers import Read
from xsave.image.pages import PageBatch
from xsave.image.stream import GO_MESSAGE, Item, StreamDecoder
from xsave.image.verify import (
    blobs,
    config,
    hvm,
    pagetables,
    pvmemory,
    records,
    startinfo,
    strict,
    vcpu,
)
from xsave.image.verify.collect import Collector
from xsave.image.verify.findings import Finding, Findings
from xsave.image.verify.model import Check, Image
from xsave.image.verify.pvpages import ZeroPages

_ANY: tuple[Check, ...] = (records.check, blobs.check, config.check)
_PV: tuple[Check, ...] = (pvmemory.check, vcpu.check, startinfo.check, pagetables.check)
_HVM: tuple[Check, ...] = (hvm.check,)


def verify(read: Read, zero_pages: ZeroPages | None = None) -> list[Finding]:
    """Return what is wrong with the image that `read` delivers, worst first.

    Any bytes end in findings, never in an exception of this package; what `read` raises itself is
    passed on. `zero_pages(offset, n)` may tell which of n pages of the image are known to be zero
    (holes of a file): those are not touched. Memory is bounded by a few percent of a sound image,
    by a fixed limit (tables.py) and twice the PAGE_DATA entries of a hostile one.
    """
    findings = Findings()
    decoder = StreamDecoder(read, strict_order=False)
    collector = Collector(findings, zero_pages)
    try:
        _walk(decoder, collector, findings)
    except ImageError as error:
        findings.add_error("damaged", error)
        return findings.result()
    _check_tail(decoder, findings)
    image = collector.finish()
    for check in _ANY + _checks_of(image):
        check(image, findings)
    return findings.result()


def _checks_of(image: Image) -> tuple[Check, ...]:
    """Return the checks of this kind of guest; a PV guest without a p2m gives no measure."""
    if not image.is_pv:
        return _HVM
    return _PV if image.p2m.max_pfn >= 0 else ()


def _walk(decoder: StreamDecoder, collector: Collector, findings: Findings) -> None:
    order = strict.OrderCheck(findings)
    for item in decoder:
        order.take(item)
        strict.check_item(item, findings)
        if isinstance(item.value, PageBatch):
            strict.check_batch(item, findings)
        _check_late(item, collector, findings)
        collector.take(item)


def _check_late(item: Item, collector: Collector, findings: Findings) -> None:
    policies = libxc.X86CpuidPolicy | libxc.X86MsrPolicy
    if isinstance(item.value, policies) and collector.image.counts[libxc.StaticDataEnd.NAME]:
        text = f"behind {libxc.StaticDataEnd.NAME}"
        findings.add("policy-late", text, record=item.value.NAME, offset=item.offset)


def _check_tail(decoder: StreamDecoder, findings: Findings) -> None:
    offset = decoder.position
    tail = decoder.tail(len(GO_MESSAGE) + 1)
    if tail == GO_MESSAGE:
        findings.add("go-message", f"{len(tail)} bytes", offset=offset)
    elif tail:
        start = tail[:16].hex(" ")
        findings.add("tail", f"the image is over, and there follow {start} ..", offset=offset)
