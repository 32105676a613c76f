"""Check what the guest reads first when it wakes up: start_info and shared_info.

start_info is the page that vCPU 0's rdx names (the third argument of its suspend hypercall). The
guest has put pfns in the place of the mfns of the xenstore and console pages; a restore replaces
those and a few other fields, of whatever page it is. shared_info comes as the source left it; a
restore takes vcpu_info and arch from it.
"""

from __future__ import annotations

import struct

from xsave import public
from xsave.frames import PageType
from xsave.image.libxc import PageBatch, SharedInfo
from xsave.image.verify.context import CONTEXT_OFFSET, basic_items, paging_of
from xsave.image.verify.findings import Findings
from xsave.image.verify.model import Image, KeptPage

_RDX = public.VcpuGuestContext.user_regs.offset + public.UserRegs.rdx.offset
_EDX_32 = 0x20C
#: xenstore and console frame in start_info: (name, offset), by guest width.
_RINGS = {8: (("xenstore", 0x38), ("console", 0x48)), 4: (("xenstore", 0x2C), ("console", 0x34))}
#: arch in shared_info: max_pfn, pfn_to_mfn_frame_list_list, (nmi_reason,) p2m_cr3, by guest width.
_ARCH = {8: 0xC10, 4: 0x90C}
_SLOTS = 32
_SLOT_BYTES = 64
_RECORD_HEADER = 8


def check(image: Image, findings: Findings) -> None:
    """Check both pages."""
    if 0 in paging_of(image):
        _check_start_info(image, findings)
    if image.value(SharedInfo.NAME):
        _check_shared_info(image, findings)


def _check_start_info(image: Image, findings: Findings) -> None:
    pfn, item = paging_of(image)[0].rdx, basic_items(image)[0]
    page_type, page = image.frames.type_of(pfn), image.start_infos.get(pfn)
    if page and page_type == PageType.NOTAB:
        _check_rings(image, findings, page)
        return
    if pfn > image.p2m.max_pfn:
        what = f"behind the last pfn {image.p2m.max_pfn:#x}"
    elif page_type != PageType.NOTAB:
        what = "no ordinary page with content"
    else:
        what = "a page that does not begin with the magic of start_info"
    offset = item.offset + CONTEXT_OFFSET + (_RDX if image.guest_width == 8 else _EDX_32)
    text = f"rdx of vCPU 0 is {pfn:#x}: {what}"
    findings.add("start-info", text, record=item.value.NAME, offset=offset)


def _check_rings(image: Image, findings: Findings, page: KeptPage) -> None:
    width = image.guest_width
    for name, at in _RINGS[width]:
        pfn = int.from_bytes(page.content[at : at + width], "little")
        page_type = image.frames.type_of(pfn)
        if pfn > image.p2m.max_pfn or page_type != PageType.NOTAB:
            hint = " (an mfn?)" if pfn > image.p2m.max_pfn else ""
            text = (
                f"the {name} page is said to be pfn {pfn:#x}{hint}, no ordinary page of the guest"
            )
            findings.add("start-info-rings", text, record=PageBatch.NAME, offset=page.offset + at)
    _note_host_frames(image, findings, page)


def _note_host_frames(image: Image, findings: Findings, page: KeptPage) -> None:
    at = public.StartInfo.shared_info.offset if image.guest_width == 8 else 0x24
    address = int.from_bytes(page.content[at : at + image.guest_width], "little")
    if address:
        text = f"start_info says that shared_info was at machine address {address:#x}"
        findings.add("host-frames", text, record=PageBatch.NAME, offset=page.offset + at)


def _check_shared_info(image: Image, findings: Findings) -> None:
    item = image.items[SharedInfo.NAME]
    content: bytes = item.value.content
    for vcpu in basic_items(image):
        at = _SLOT_BYTES * vcpu + 1
        if vcpu < _SLOTS and content[at] == 0:
            rule = "upcall-mask" if vcpu == 0 else "shared-info"
            text = f"evtchn_upcall_mask of vCPU {vcpu} is 0"
            offset = item.offset + _RECORD_HEADER + at
            findings.add(rule, text, record=SharedInfo.NAME, offset=offset)
    _check_arch(image, findings, content)


def _check_arch(image: Image, findings: Findings, content: bytes) -> None:
    width, start = image.guest_width, _ARCH[image.guest_width]
    fields = struct.unpack_from("<4Q" if width == 8 else "<4I", content, start)
    max_pfn, list_list, _, p2m_cr3 = fields
    offset = image.items[SharedInfo.NAME].offset + _RECORD_HEADER + start
    if max_pfn != image.p2m.max_pfn + 1:
        text = f"max_pfn is {max_pfn:#x}, the p2m has {image.p2m.max_pfn + 1:#x} entries"
        findings.add("shared-info", text, record=SharedInfo.NAME, offset=offset)
    canonical = p2m_cr3 & 0xFFF == 0 and p2m_cr3 >> 12 <= image.p2m.max_pfn
    if list_list or not canonical:
        text = f"frame_list_list is {list_list:#x}, p2m_cr3 {p2m_cr3:#x}"
        findings.add("host-frames", text, record=SharedInfo.NAME, offset=offset + width)
