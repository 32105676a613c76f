"""Take the items of an image one by one and keep what the final checks need, and no more.

Kept are: the last entry of each pfn, the p2m frame list, the small records, and what pvpages.py
keeps of the pages of a PV guest.
"""

from __future__ import annotations

from xsave.image import libxc
from xsave.image.pages import PageBatch
from xsave.image.stream import Item
from xsave.image.verify.findings import Findings
from xsave.image.verify.frames import FrameLog
from xsave.image.verify.model import MAX_VCPUS, Image
from xsave.image.verify.pvpages import PvPages, ZeroPages

#: Bytes of a vCPU's blob that are kept; Xen's own are far smaller.
MAX_VCPU_BYTES = 1 << 16
#: From the start of a PAGE_DATA record to its first entry.
_ENTRIES_OFFSET = 16
_VCPU_RECORDS = (
    libxc.X86PvVcpuBasic,
    libxc.X86PvVcpuExtended,
    libxc.X86PvVcpuXsave,
    libxc.X86PvVcpuMsrs,
)


class Collector:
    """Builds an Image from items."""

    def __init__(self, findings: Findings, zero_pages: ZeroPages | None = None) -> None:
        self.image = Image()
        self._findings = findings
        self._frames = FrameLog()
        self._pages = PvPages(self.image, findings, zero_pages)

    def take(self, item: Item) -> None:
        """Take one header or record."""
        value = item.value
        self.image.counts[value.NAME] += 1
        if isinstance(value, PageBatch):
            self._frames.add(value.pfns, value.types, item.offset + _ENTRIES_OFFSET)
            if self.image.is_pv:
                self._pages.take(value)
        elif isinstance(value, _VCPU_RECORDS):
            self._vcpu(item)
        else:
            self.image.items[value.NAME] = item
            self._header(item)

    def finish(self) -> Image:
        """Return the image as it is in the end."""
        image = self.image
        image.frames = self._frames.finish()
        image.tables = self._pages.tables.finish(image.frames)
        image.nr_repeated = self._frames.nr_repeated
        image.nr_tables_skipped = self._pages.tables.nr_skipped
        return image

    def _header(self, item: Item) -> None:
        value = item.value
        if isinstance(value, libxc.ImageHeader):
            self.image.version = value.version
        elif isinstance(value, libxc.DomainHeader):
            self.image.guest_type = value.type
        elif isinstance(value, libxc.X86PvInfo):
            self.image.guest_width = value.guest_width
        elif isinstance(value, libxc.X86PvP2mFrames):
            self._p2m_frames(item)

    def _p2m_frames(self, item: Item) -> None:
        value, p2m = item.value, self.image.p2m
        per_page = self.image.pfns_per_p2m_page
        if len(value.pfns) != value.nr_frames(self.image.guest_width):
            return  # told by the order check
        if not p2m.lay(value.start_pfn // per_page, value.pfns):
            text = f"the list begins at pfn {value.start_pfn:#x}, those before it were never sent"
            self._findings.add("p2m-frames", text, record=value.NAME, offset=item.offset)
            return
        p2m.offset = item.offset
        p2m.max_pfn = max(p2m.max_pfn, value.end_pfn)

    def _vcpu(self, item: Item) -> None:
        value, vcpus = item.value, self.image.vcpus
        if what := self._refuse_vcpu(item):
            self._findings.add("vcpu-id", what, record=value.NAME, offset=item.offset)
        elif value.context:  # empty ones came from Xen 4.6 to 4.8 and say nothing
            highest = max(vcpus, default=0)
            if value.vcpu_id < highest and value.vcpu_id not in vcpus:
                text = f"vCPU {value.vcpu_id} behind vCPU {highest}"
                self._findings.add("vcpu-order", text, record=value.NAME, offset=item.offset)
            vcpus.setdefault(value.vcpu_id, {})[value.NAME] = item

    def _refuse_vcpu(self, item: Item) -> str:
        """Return why the record of a vCPU cannot be taken, "" if it can."""
        value = item.value
        if value.vcpu_id >= MAX_VCPUS:
            return f"vCPU {value.vcpu_id}, Xen has {MAX_VCPUS} at most"
        if len(value.context) > MAX_VCPU_BYTES:
            return f"{len(value.context)} bytes for vCPU {value.vcpu_id}"
        is_second = value.NAME in self.image.vcpus.get(value.vcpu_id, {})
        if is_second and not self.image.counts["CHECKPOINT"]:
            return f"a second record for vCPU {value.vcpu_id}"
        return ""
