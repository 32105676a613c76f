"""One image made of another: another wrapping, version 3 of version 2, no tail.

    xl  = xl header + libxl          libxl = libxl header, LIBXC_CONTEXT + libxc + END

A pure function from items to buffers. Nothing inside a record changes, so that converting there
and back gives the same bytes. What the target has no place for is refused, not dropped, but for
the wrappings themselves and CHECKPOINT_END, which is one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from xsave.errors import UsageError
from xsave.image import libxc, libxl
from xsave.image.buffers import Buffer
from xsave.image.pages import PageBatch, with_holes, zero_pages
from xsave.image.stream import Item, StreamDecoder, StreamEncoder
from xsave.image.xl import XlHeader

#: Which pages of (offset in the image, how many) are surely zero; None: unknown.
ZeroHint = Callable[[int, int], np.ndarray | None]

_TAIL_STEP = 1 << 20
_WRAPPINGS = (libxl.LibxlHeader, libxl.LibxcContext, libxl.CheckpointEnd, libxl.LibxlEnd)


def convert(
    decoder: StreamDecoder,
    target: str = "",
    *,
    config: bytes | None = None,
    stream_version: int | None = None,
    drop_tail: bool = False,
    zero_hint: ZeroHint | None = None,
) -> Iterator[list[Buffer]]:
    """Yield the buffers of the image in its new form, record by record.

    `target` is xl, libxl, libxc, or empty for the wrapping it has; `config` replaces the JSON of
    the xl header. With a `zero_hint` zero pages become Zeros. Raises ImageError for the input,
    UsageError for what the target cannot hold.
    """
    values = _rewrap((item for item in decoder), decoder, target, config)
    if stream_version == libxc.VERSION:
        values = _upgrade(values)
    for value in values:
        yield _buffers(value, zero_hint)
    while not drop_tail and (piece := decoder.tail(_TAIL_STEP)):
        yield [piece]


def _rewrap(
    items: Iterator[Item], decoder: StreamDecoder, target: str, config: bytes | None
) -> Iterator[Any]:
    """Yield the values of the items in the wrapping `target`."""
    first = next(items)
    target = target or decoder.format
    if config is not None and target != "xl":
        raise UsageError(f"a configuration has no place in the format {target}")
    if target == "xl":
        yield _xl_header(first.value, config)
    if decoder.format == "libxc" and target != "libxc":
        yield from (libxl.LibxlHeader(), libxl.LibxcContext())
    for item in (first, *items) if decoder.format != "xl" else items:
        if target != "libxc" or item.layer == "libxc":
            yield item.value
        elif not isinstance(item.value, _WRAPPINGS):
            raise UsageError(f"the image has {item.value.NAME}, which has no place in libxc")
    if decoder.format == "libxc" and target != "libxc":
        yield libxl.LibxlEnd()


def _xl_header(first: Any, config: bytes | None) -> XlHeader:
    if config is not None:
        return XlHeader.for_config(config)
    if isinstance(first, XlHeader):
        return first
    raise UsageError("the image has no configuration (JSON), which the format xl needs: give one")


def _upgrade(values: Iterator[Any]) -> Iterator[Any]:
    """Yield the values of a version 2 stream as version 3: static data end where v2 implies it."""
    is_due = False
    for value in values:
        if isinstance(value, libxc.ImageHeader) and value.version < libxc.VERSION:
            is_due = True
            yield dataclasses.replace(value, version=libxc.VERSION)
            continue
        if is_due and isinstance(value, libxc.X86PvP2mFrames | PageBatch | libxc.End):
            is_due = False
            yield libxc.StaticDataEnd()
        yield value


def _buffers(value: Any, zero_hint: ZeroHint | None) -> list[Buffer]:
    if zero_hint is None or not isinstance(value, PageBatch):
        return StreamEncoder.buffers(value)
    return [value.header(), *with_holes(value.pages, _find_zeros(value, zero_hint))]


def _find_zeros(batch: PageBatch, zero_hint: ZeroHint) -> np.ndarray:
    """Return which pages are zero; those the hint knows of are not looked at."""
    known = zero_hint(batch.pages_offset, len(batch.pages))
    if known is None or not known.any():
        return zero_pages(batch.pages)
    zero = known.copy()
    edges = np.flatnonzero(np.diff(known)) + 1
    for start, end in zip([0, *edges], [*edges, len(known)], strict=True):
        if not known[start]:
            zero[start:end] = zero_pages(batch.pages[start:end])
    return zero
