"""Check the final state of a PV guest's memory: every pfn, its type, and the p2m pages."""

from __future__ import annotations

import numpy as np

from xsave.frames import PageType
from xsave.image.libxc import PageBatch, X86PvP2mFrames
from xsave.image.verify.findings import Findings
from xsave.image.verify.frames import ABSENT
from xsave.image.verify.model import Image
from xsave.image.verify.tables import LEVELS


def check(image: Image, findings: Findings) -> None:
    """Check coverage, types and p2m pages."""
    _check_coverage(image, findings)
    _check_types(image, findings)
    _check_p2m(image, findings)
    if image.nr_repeated:
        text = f"{image.nr_repeated} entries were replaced by later ones"
        findings.add("repeated", text, record=PageBatch.NAME)


def _check_coverage(image: Image, findings: Findings) -> None:
    pfns = image.frames.pfns
    end = image.p2m.max_pfn + 1
    known = pfns[pfns < np.uint64(max(end, 0))]
    nr_missing = end - len(known)
    if nr_missing <= 0:
        return
    gaps = np.flatnonzero(known != np.arange(len(known), dtype=np.uint64))
    first = int(gaps[0]) if len(gaps) else len(known)
    behind = known[first : first + 1].tolist() or [end]
    span = f"{first:#x} to {behind[0] - 1:#x}"
    text = f"{nr_missing} of {end} pfns never came, the first of them are {span}"
    findings.add("coverage", text, record=X86PvP2mFrames.NAME, offset=image.p2m.offset)


def _check_types(image: Image, findings: Findings) -> None:
    """A 32-bit guest has no L4 tables."""
    wrong = np.flatnonzero(LEVELS[image.frames.types] > image.nr_levels)
    if len(wrong):
        pfn, page_type = int(image.frames.pfns[wrong[0]]), int(image.frames.types[wrong[0]])
        findings.add(
            "page-type",
            f"pfn {pfn:#x} is {PageType(page_type).name} in a guest of {image.nr_levels} levels",
            record=PageBatch.NAME,
            offset=int(image.frames.offsets[wrong[0]]),
            more=len(wrong) - 1,
        )


def _check_p2m(image: Image, findings: Findings) -> None:
    p2m, per_page = image.p2m, image.pfns_per_p2m_page
    nr_pages = p2m.max_pfn // per_page + 1
    types = image.frames.types_of(p2m.pfns)
    wrong = np.flatnonzero(types != PageType.NOTAB)
    if len(wrong):
        i, page_type = int(wrong[0]), int(types[wrong[0]])
        kind = PageType(page_type).name if page_type != ABSENT else "not in the image"
        _tell(image, findings, f"p2m page {i} (pfn {p2m.pfns[i]:#x}) is {kind}", len(wrong) - 1)
    if len(p2m.pfns) < nr_pages:
        _tell(image, findings, f"{len(p2m.pfns)} p2m pages for {nr_pages}", 0)
    _check_shared(image, findings)


def _check_shared(image: Image, findings: Findings) -> None:
    """One page may stand for many: all of them must be without any frame (a hole of the guest)."""
    p2m, per_page = image.p2m, image.pfns_per_p2m_page
    ordered, counts = np.unique(p2m.pfns, return_counts=True)
    shared = np.flatnonzero(np.isin(p2m.pfns, ordered[counts > 1]))
    populated = image.frames.populated // np.uint64(per_page)
    wrong = shared[np.isin(shared.astype(np.uint64), populated)]
    if len(wrong):
        text = f"p2m page {wrong[0]} (pfn {p2m.pfns[wrong[0]]:#x}) serves for others too"
        _tell(image, findings, text, len(wrong) - 1)


def _tell(image: Image, findings: Findings, text: str, more: int) -> None:
    record = X86PvP2mFrames.NAME
    findings.add("p2m-frames", text, record=record, offset=image.p2m.offset, more=more)
