"""Check an HVM or PVH guest: its two records, its emulator's, and the pages they name.

The context is a chain of {u16 typecode, u16 instance, u32 length} and a body each, from HEADER to
END (xen/include/public/hvm/save.h). Its parts are Xen's own; only the chain is looked at.
"""

from __future__ import annotations

import struct

import numpy as np

from xsave.image.libxc import HvmContext, HvmParams, PageBatch
from xsave.image.libxl import EmulatorContext, EmulatorXenstoreData
from xsave.image.stream import Item
from xsave.image.verify.findings import Findings
from xsave.image.verify.model import Image
from xsave.image.verify.tables import LEVELS

_DESCRIPTOR = struct.Struct("<HHI")
_END, _HEADER, _CPU = 0, 1, 2
_RECORD_HEADER = 8
#: Entries of a context and strings of xenstore data that are looked at; far more than there are.
_MAX_LINKS = 1 << 16
_MAGIC = 0x5438_1286
#: Parameters that name a page the guest shares with the toolstack. (The pages of IOREQ_PFN and
#: BUFIOREQ_PFN may be out of the p2m: Xen takes them away while an emulator uses them.)
_PFN_PARAMS = {1: "STORE_PFN", 17: "CONSOLE_PFN"}
_EMULATORS = (0, 1, 2)


def check(image: Image, findings: Findings) -> None:
    """Check the records and the types of the pages."""
    wrong = np.flatnonzero(LEVELS[image.frames.types])
    if len(wrong):
        text = f"pfn {image.frames.pfns[wrong[0]]:#x} is a page table"
        offset = int(image.frames.offsets[wrong[0]])
        more = len(wrong) - 1
        findings.add("page-type", text, record=PageBatch.NAME, offset=offset, more=more)
    if item := image.items.get(HvmContext.NAME):
        _check_context(findings, item)
    else:
        findings.add("missing-record", "it never came", record=HvmContext.NAME)
    if item := image.items.get(HvmParams.NAME):
        _check_params(image, findings, item)
    else:
        findings.add("hvm-sparse", "it never came", record=HvmParams.NAME)
    _check_emulator(image, findings)


def _check_context(findings: Findings, item: Item) -> None:
    content: bytes = item.value.content
    seen: list[int] = []
    at, behind, what = 0, 0, ""
    while not what and _END not in seen[-1:]:
        at, what, kind, behind = behind, *_link(content, behind, is_first=not seen)
        seen.append(kind)
        if len(seen) > _MAX_LINKS:
            what = f"more than {_MAX_LINKS} entries"
    if not what and behind != len(content):
        what = f"{len(content) - behind} bytes behind END"
    if not what and _CPU not in seen:
        what = "no CPU"
    if what:
        offset = item.offset + _RECORD_HEADER + min(at, len(content) - 1)
        findings.add("hvm-context", what, record=item.value.NAME, offset=offset)


def _link(content: bytes, at: int, *, is_first: bool) -> tuple[str, int, int]:
    """Return what is wrong with one link of the chain ("": nothing), its type, its end."""
    if at + _DESCRIPTOR.size > len(content):
        return "the chain has no END", _END, at
    kind, _, length = _DESCRIPTOR.unpack_from(content, at)
    what = _link_fault(content, at, kind, length, is_first=is_first)
    return what, kind, at + _DESCRIPTOR.size + length


def _link_fault(content: bytes, at: int, kind: int, length: int, *, is_first: bool) -> str:
    """Return what is wrong with one link of the chain, "" if nothing is."""
    body = at + _DESCRIPTOR.size
    if body + length > len(content):
        return f"an entry of type {kind} has {length} bytes, {len(content) - body} are left"
    if is_first != (kind == _HEADER):
        return f"an entry of type {kind}, expected the header" if is_first else "a second header"
    if is_first and (length < 4 or int.from_bytes(content[body : body + 4], "little") != _MAGIC):
        return "the header has not the magic of an HVM context"
    return f"END has {length} bytes" if kind == _END and length else ""


def _check_params(image: Image, findings: Findings, item: Item) -> None:
    params: tuple[tuple[int, int], ...] = item.value.params
    place = {"record": item.value.NAME, "offset": item.offset}
    values = dict(params)
    if len(values) != len(params):
        findings.add("hvm-params", "a parameter comes twice", **place)
    for index, name in _PFN_PARAMS.items():
        if not values.get(index):
            findings.add("hvm-sparse", f"no {name}", **place)
        elif image.frames.type_of(values[index]) != 0:
            text = f"{name} is {values[index]:#x}, which has no content in the image"
            findings.add("hvm-params", text, **place)


def _check_emulator(image: Image, findings: Findings) -> None:
    for name in (EmulatorXenstoreData.NAME, EmulatorContext.NAME):
        item = image.items.get(name)
        if item and item.value.emulator_id not in _EMULATORS:
            text = f"unknown emulator {item.value.emulator_id}"
            findings.add("emulator", text, record=name, offset=item.offset)
    item = image.items.get(EmulatorXenstoreData.NAME)
    if item and (what := _xenstore_fault(item.value.content)):
        findings.add("emulator", what, record=item.value.NAME, offset=item.offset)


def _xenstore_fault(content: bytes) -> str:
    if not content:
        return ""
    if not content.endswith(b"\0"):
        return "the last string has no NUL"
    if content.count(b"\0") > _MAX_LINKS:
        return f"more than {_MAX_LINKS} strings"
    strings = content[:-1].split(b"\0")
    if len(strings) % 2:
        return "a key has no value"
    wrong = [key for key in strings[::2] if not key or key.startswith(b"/")]
    return f"{wrong[0]!r} is no relative key" if wrong else ""
