"""What an image is, in numbers: the answer of `xsave image info`, in one pass and without
looking into a page.

The keys are a contract (docs: xsave-image(5)): format, domain_type, xen_version, stream_version,
endianness, nr_vcpus, max_pfn, nr_pages, pinned, records, config, trailing_bytes, and a few more.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from xsave.frames import TYPE_LTAB_MASK, PageType, table_level
from xsave.image import libxc
from xsave.image.lasttypes import LastTypes
from xsave.image.pages import PageBatch
from xsave.image.record import Record
from xsave.image.stream import GO_MESSAGE, Item, StreamDecoder
from xsave.image.xl import XlHeader

_TAIL_STEP = 1 << 20
_TYPE_NAMES = ("NOTAB", "L1TAB", "L2TAB", "L3TAB", "L4TAB", "BROKEN", "XALLOC", "XTAB")


@dataclass
class _Tally:
    """What one pass over the items collects."""

    config: bytes | None = None
    guest_width: int | None = None
    vcpu_ids: set[int] = field(default_factory=set)
    types: LastTypes = field(default_factory=LastTypes)
    records: dict[tuple[str, str], list[int]] = field(default_factory=dict)
    end_pfn: int | None = None
    nr_entries: int = 0

    def add(self, item: Item, nr_bytes: int) -> None:
        """Count one item, which takes `nr_bytes` of the stream."""
        value = item.value
        if isinstance(value, Record | PageBatch):
            name = f"{value.type:#010x}" if isinstance(value, libxc.Unknown) else value.NAME
            count = self.records.setdefault((item.layer, name), [0, 0])
            count[0] += 1
            count[1] += nr_bytes
        if isinstance(value, PageBatch):
            self.types.add(value.pfns, value.types)
            self.nr_entries += len(value.pfns)
        elif isinstance(value, XlHeader):
            self.config = value.config
        elif isinstance(value, libxc.X86PvInfo):
            self.guest_width = value.guest_width
        elif isinstance(value, libxc.X86PvP2mFrames):
            self.end_pfn = max(value.end_pfn, self.end_pfn or 0)
        elif isinstance(value, libxc.X86PvVcpuBasic):
            self.vcpu_ids.add(value.vcpu_id)


def summary(decoder: StreamDecoder) -> dict[str, Any]:
    """Return the answer of `image info`; reads the image and all that follows it.

    Raises ImageError where the image is damaged.
    """
    tally = _Tally()
    for item in decoder:
        tally.add(item, decoder.position - item.offset)
    image_bytes = decoder.position
    trailing_bytes, is_go = _count_tail(decoder)
    return {
        **_headers(decoder),
        **_contents(tally, is_pv=decoder.domain_header.type == libxc.TYPE_X86_PV),
        "config": _config(tally.config),
        "image_bytes": image_bytes,
        "trailing_bytes": trailing_bytes,
        "trailing": "go_message" if is_go else ("unknown" if trailing_bytes else None),
    }


def _headers(decoder: StreamDecoder) -> dict[str, Any]:
    """Return what the headers say."""
    domain = decoder.domain_header
    return {
        "format": decoder.format,
        "domain_type": libxc.DOMAIN_TYPES[domain.type],
        "xen_version": f"{domain.xen_major}.{domain.xen_minor}",
        "stream_version": decoder.image_header.version,
        "endianness": "little",
    }


def _contents(tally: _Tally, *, is_pv: bool) -> dict[str, Any]:
    """Return what the records hold."""
    pfns, types = tally.types.result()
    last_pfn = int(pfns[-1]) if len(pfns) else None
    return {
        "guest_width": tally.guest_width,
        "nr_vcpus": len(tally.vcpu_ids) if is_pv else None,
        "max_pfn": tally.end_pfn if is_pv else last_pfn,
        "nr_pages": count_types(types),
        "pinned": _nr_pinned(types),
        "nr_entries": tally.nr_entries,
        "records": [
            {"layer": layer, "type": name, "count": count, "bytes": nr_bytes}
            for (layer, name), (count, nr_bytes) in tally.records.items()
        ],
    }


def count_types(types: np.ndarray) -> dict[str, int]:
    """Return how many of these final types there are by name, pinned or not; and `pinned`."""
    counts = np.bincount(types, minlength=16).tolist()
    by_name = dict.fromkeys(_TYPE_NAMES, 0)
    for page_type in PageType:
        base = page_type & TYPE_LTAB_MASK if table_level(page_type) else page_type
        by_name[PageType(base).name] += counts[page_type]
    return {**by_name, "pinned": _nr_pinned(types)}


def _nr_pinned(types: np.ndarray) -> int:
    is_pinned = (types >= PageType.L1TAB_PINNED) & (types <= PageType.L4TAB_PINNED)
    return int(np.count_nonzero(is_pinned))


def _count_tail(decoder: StreamDecoder) -> tuple[int, bool]:
    """Return how many bytes follow the image, and whether they are xl's GO message."""
    first = decoder.tail(len(GO_MESSAGE))
    nr_bytes = len(first)
    while piece := decoder.tail(_TAIL_STEP):
        nr_bytes += len(piece)
    return nr_bytes, first == GO_MESSAGE and nr_bytes == len(GO_MESSAGE)


def _config(config: bytes | None) -> Any:
    """Return the parsed JSON, the text where it is none, None where there is no xl header."""
    if config is None:
        return None
    text = config.decode(errors="backslashreplace")
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
