"""One record as a JSON object, and back, without loss.

    {"layer": "libxc", "record": "X86_PV_INFO", "guest_width": 8, "pt_levels": 4}

Fields are those of the dataclass; reserved fields and padding are left out where they are zero.
Bytes are hex. Where it is known what they are, they are shown as that instead, if nothing gets
lost: the configuration of the xl header as text, CPUID leaves and MSRs as rows, a vCPU's context
by field. Runs of pfns are [first, last]; the pages of a batch are base64 of one zstd frame.
"""

from __future__ import annotations

import base64
import ctypes
import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import zstandard

from xsave.errors import ImageError
from xsave.frames import PAGE_SIZE, PageType
from xsave.image import libxc, libxl, xl
from xsave.image.pages import PageBatch, has_data
from xsave.image.record import MAX_BODY, Layout
from xsave.image.structtext import fill_struct, number, parse_number, struct_to_json
from xsave.public import VcpuExtended, VcpuGuestContext

_HEADERS: dict[str, tuple[type[Layout], ...]] = {
    "xl": (xl.XlHeader,),
    "libxl": (libxl.LibxlHeader,),
    "libxc": (libxc.ImageHeader, libxc.DomainHeader),
}
_CLASSES: dict[tuple[str, str], Any] = {
    **{(layer, cls.NAME): cls for layer, classes in _HEADERS.items() for cls in classes},
    **{("libxl", cls.NAME): cls for cls in libxl.RECORDS.values()},
    **{("libxc", cls.NAME): cls for cls in libxc.RECORDS.values()},
    **{(layer, libxc.Unknown.NAME): libxc.Unknown for layer in ("libxl", "libxc")},
}
_LEAVES = np.dtype("<u4,<u4,<u4,<u4,<u4,<u4")
_MSRS = np.dtype("<u4,<u4,<u8")
_MAX_ENTRIES = MAX_BODY // 8


def to_json(layer: str, value: Any, *, with_pages: bool = True) -> dict[str, Any]:
    """Return the object of a header or record."""
    head = {"layer": layer, "record": value.NAME}
    if isinstance(value, PageBatch):
        return {**head, **_batch_to_json(value, with_pages)}
    fields: dict[str, Any] = {}
    for field in dataclasses.fields(value):
        content = getattr(value, field.name)
        is_spare = field.name.startswith(("reserved", "padding"))
        if not is_spare or content != field.default:
            fields.update(_field_to_json(value, field, content))
    return {**head, **fields}


def from_json(fields: Any) -> Any:
    """Return the header or record of an object; ImageError says what is wrong with it."""
    try:
        fields = dict(fields)
        layer, name = fields.pop("layer"), fields.pop("record")
        fields.pop("offset", None)
        if (layer, name) == ("libxc", PageBatch.NAME):
            return _batch_from_json(**fields)
        cls = _CLASSES[layer, name]
        return cls(**dict(_field_from_json(cls, key, value) for key, value in fields.items()))
    except (
        AttributeError,
        KeyError,
        OverflowError,
        RecursionError,
        TypeError,
        ValueError,
    ) as error:
        what = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise ImageError(f"JSON of a record: {what}") from error
    except zstandard.ZstdError as error:
        raise ImageError(f"JSON of PAGE_DATA: pages: {error}") from error


def _field_to_json(value: Any, field: Any, content: Any) -> dict[str, Any]:
    special = _SPECIAL.get((value.NAME, field.name))
    if special and (shown := special[1](content)) is not None:
        return {special[0]: shown}
    return {field.name: _BY_TYPE[field.type][0](content)}


def _field_from_json(cls: Any, key: str, value: Any) -> tuple[str, Any]:
    for (name, field_name), (shown_as, _, parse) in _SPECIAL.items():
        if name == cls.NAME and shown_as == key:
            return field_name, parse(value)
    types = {field.name: field.type for field in dataclasses.fields(cls)}
    return key, _BY_TYPE[types[key]][1](value)


def _rows(dtype: np.dtype[Any]) -> tuple[Callable[[bytes], Any], Callable[[Any], bytes]]:
    def show(content: bytes) -> list[list[int | str]]:
        return [[number(v) for v in row] for row in np.frombuffer(content, dtype).tolist()]

    def parse(rows: Any) -> bytes:
        found = [tuple(parse_number(v) for v in row) for row in rows]
        return np.array(found, dtype).tobytes()

    return show, parse


def _struct(cls: Any) -> tuple[Callable[[bytes], Any], Callable[[Any], bytes]]:
    def show(content: bytes) -> dict[str, Any] | None:
        exact = len(content) == ctypes.sizeof(cls)
        return struct_to_json(cls.from_buffer_copy(content)) if exact else None

    def parse(fields: Any) -> bytes:
        struct = cls()
        fill_struct(struct, fields)
        return bytes(struct)

    return show, parse


def _show_config(optional_data: bytes) -> str | None:
    config = xl.XlHeader(0, 0, 0, optional_data).config
    if xl.XlHeader.for_config(config).optional_data != optional_data:
        return None
    try:
        return config.decode()
    except UnicodeDecodeError:
        return None


def _parse_config(text: str) -> bytes:
    return xl.XlHeader.for_config(text.encode()).optional_data


def show_pfns(pfns: np.ndarray) -> list[Any]:
    """Return pfns u64 (n,) as numbers and [first, last] for ascending runs."""
    if not len(pfns):
        return []
    # The difference of two u64 wraps around: nothing follows the largest one.
    edges = np.flatnonzero((np.diff(pfns) != 1) | (pfns[1:] == 0))
    firsts = pfns[np.append(0, edges + 1)].tolist()
    lasts = pfns[np.append(edges, len(pfns) - 1)].tolist()
    return [
        number(a) if a == b else [number(a), number(b)] for a, b in zip(firsts, lasts, strict=True)
    ]


def parse_pfns(runs: Any) -> np.ndarray:
    """Return the pfns u64 (n,) of `show_pfns`."""
    found, nr_pfns = [], 0
    for run in runs:
        first, last = (parse_number(v) for v in (run if isinstance(run, list) else (run, run)))
        nr_pfns += last - first + 1
        if first < 0 or last < first or last >> 64 or nr_pfns > _MAX_ENTRIES:
            raise ValueError(f"{run} is no run of pfns")
        found.append(np.arange(last - first + 1, dtype=np.uint64) + np.uint64(first))
    return np.concatenate(found) if found else np.zeros(0, np.uint64)


def _batch_to_json(batch: PageBatch, with_pages: bool) -> dict[str, Any]:
    edges = np.append(np.flatnonzero(np.diff(batch.types)), len(batch.types) - 1)
    lengths = np.diff(edges, prepend=-1).tolist()
    names = [PageType(t).name for t in batch.types[edges].tolist()]
    fields: dict[str, Any] = {
        "pfns": show_pfns(batch.pfns),
        "types": [list(run) for run in zip(names, lengths, strict=True)],
    }
    if batch.reserved:
        fields["reserved"] = batch.reserved
    if batch.reserved_bits is not None:
        fields["reserved_bits"] = batch.reserved_bits.tobytes().hex()
    if not with_pages:
        return {**fields, "pages": None}
    frame = zstandard.ZstdCompressor(level=1).compress(np.ascontiguousarray(batch.pages).data)
    return {**fields, "pages": base64.b64encode(frame).decode()}


def _batch_from_json(
    pfns: Any, types: Any, pages: Any, reserved: int = 0, reserved_bits: str | None = None
) -> PageBatch:
    if pages is None:
        raise ValueError("PAGE_DATA without pages (decoded with --no-pages) cannot be encoded")
    numbers = parse_pfns(pfns)
    if sum(parse_number(length) for _, length in types) != len(numbers):
        raise ValueError(f"types of {len(numbers)} pfns were expected")
    runs = [np.full(length, PageType[name], np.uint8) for name, length in types]
    all_types = np.concatenate(runs)
    bits = None
    if reserved_bits is not None:
        bits = np.frombuffer(bytes.fromhex(reserved_bits), np.uint8)
        if len(bits) != len(numbers):
            raise ValueError("reserved_bits of another length than pfns")
    nr_bytes = int(np.count_nonzero(has_data(all_types))) * PAGE_SIZE
    content = _parse_pages(pages, nr_bytes).reshape(-1, PAGE_SIZE)
    return PageBatch(numbers, all_types, content, 0, parse_number(reserved), bits)


def _parse_pages(text: str, nr_bytes: int) -> np.ndarray:
    frame = base64.b64decode(text, validate=True)
    if zstandard.frame_content_size(frame) != nr_bytes or nr_bytes > MAX_BODY:
        raise ValueError(f"pages of {nr_bytes} bytes were expected")
    return np.frombuffer(zstandard.ZstdDecompressor().decompress(frame), np.uint8)


#: Annotation of a field -> to JSON, from JSON.
_BY_TYPE: dict[Any, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "int": (number, parse_number),
    "bytes": (bytes.hex, bytes.fromhex),
    "np.ndarray": (show_pfns, parse_pfns),
    "tuple[tuple[int, int], ...]": (
        lambda pairs: [[number(v) for v in pair] for pair in pairs],
        lambda pairs: tuple((parse_number(i), parse_number(v)) for i, v in pairs),
    ),
}
#: (record, field) -> key, to JSON (None: show the bytes after all), from JSON.
_SPECIAL: dict[tuple[str, str], tuple[str, Callable[[Any], Any], Callable[[Any], Any]]] = {
    (xl.XlHeader.NAME, "optional_data"): ("config", _show_config, _parse_config),
    (libxc.X86CpuidPolicy.NAME, "content"): ("leaves", *_rows(_LEAVES)),
    (libxc.X86MsrPolicy.NAME, "content"): ("entries", *_rows(_MSRS)),
    (libxc.X86PvVcpuBasic.NAME, "context"): ("fields", *_struct(VcpuGuestContext)),
    (libxc.X86PvVcpuExtended.NAME, "context"): ("fields", *_struct(VcpuExtended)),
}
