"""Whole images: bytes to items and back, one record at a time.

    IMAGE ::= XL_FILE | LIBXL_STREAM | LIBXC_STREAM        (xl.py, libxl.py, libxc.py)

StreamDecoder pulls bytes with `read(n)` and yields Items; at no time it holds more than one
record. A PAGE_DATA record takes one read for its entries and one for its pages, so that a
memory-mapped source hands out views and nobody copies or touches a page. It stops behind the
outermost END and leaves what follows to `tail`, because a migration stream is not at its end
there. Whatever the bytes, it yields items or raises ImageError, nothing else.

In a checkpointed stream the libxl records of each checkpoint come between two runs of libxc
records (CHECKPOINT .. CHECKPOINT_END), with headers and static data only at the very start.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from xsave.errors import ImageError
from xsave.frames import PAGE_SIZE
from xsave.image import libxc, libxl, order, pages, postcopy, xl
from xsave.image.buffers import Buffer, Read, Zeros
from xsave.image.detect import recognise
from xsave.image.pageindex import PageIndex, index_run
from xsave.image.pages import PageBatch
from xsave.image.record import MAX_BODY, OPTIONAL, RECORD_HEADER, Record

__all__ = [
    "GO_MESSAGE", "Item", "PageBatch", "PageIndex", "StreamDecoder", "StreamEncoder", "Zeros",
]  # fmt: skip

#: What a migrating xl sends behind the image: the go-ahead (44 bytes with its NUL).
GO_MESSAGE = b"domain is yours, you are cleared to unpause\0"

FORMATS = ("xl", "libxl", "libxc")


@dataclass(frozen=True)
class Item:
    """A header or record, the layer it belongs to, and the offset of its first byte."""

    offset: int
    layer: str
    value: Any


class StreamDecoder:
    """Iterate over the items of one image; `format` is set once the first one is there.

    `image_header` and `domain_header` may be asked for once their items were yielded; an image
    that came to its end had both, with the rules of order or without.
    Raises ImageError on anything the reference readers refuse. `strict_order=False` turns off the
    rules of order.py only (to look at a broken image). With `whole`, the image from its first byte
    on in memory, PAGE_DATA records come many at a time as a PageIndex; `read` must follow.
    `postcopy`: the records of postcopy.py may come, too: it is the first part of a migration.
    """

    def __init__(
        self,
        read: Read,
        *,
        strict_order: bool = True,
        whole: memoryview | None = None,
        postcopy: bool = False,
    ) -> None:
        self._read = read
        self._postcopy = postcopy
        self._strict = strict_order
        self._whole = whole
        self._items = self._image()
        self.position = 0
        self.format = ""
        self.image_header: libxc.ImageHeader
        self.domain_header: libxc.DomainHeader

    def __iter__(self) -> Iterator[Item]:
        return self._items

    def tail(self, limit: int) -> bytes:
        """Return what follows the image, `limit` bytes of it at most."""
        pieces = []
        while limit > 0 and (piece := bytes(self._read(limit))):
            pieces.append(piece)
            limit -= len(piece)
            self.position += len(piece)
        return b"".join(pieces)

    def _exact(self, n: int, record: str, start: bytes = b"") -> memoryview:
        """Return `start` and what follows it, n bytes in all; ImageError at the end of input."""
        offset, missing = self.position, n - len(start)
        data = self._read(missing) if missing else memoryview(b"")
        self.position += len(data)
        if len(data) != missing:
            raise ImageError(
                "the image is cut off",
                offset=offset - len(start),
                record=record,
                expected=f"{n} bytes",
                found=f"{len(start) + len(data)} bytes",
            )
        return memoryview(start + bytes(data)) if start else data

    def _image(self) -> Iterator[Item]:
        start = bytes(self._exact(8, "the first 8 bytes"))
        self.format = recognise(start)
        if self.format == "xl":
            yield self._xl_header(start)
            start = b""
        if self.format in ("xl", "libxl"):
            yield from self._libxl_stream(start)
        else:
            yield from self._libxc_stream(start)

    def _xl_header(self, start: bytes) -> Item:
        fixed = bytes(self._exact(xl.FIXED_SIZE, xl.XlHeader.NAME, start))
        size = xl.XlHeader.optional_size(fixed, 0)
        data = fixed + bytes(self._exact(size, xl.XlHeader.NAME))
        return Item(0, "xl", xl.XlHeader.decode(data))

    def _libxl_stream(self, start: bytes) -> Iterator[Item]:
        offset = self.position - len(start)
        data = self._exact(libxl.LibxlHeader.size(), libxl.LibxlHeader.NAME, start)
        yield Item(offset, "libxl", libxl.LibxlHeader.decode(data, offset=offset))
        walk, context = order.libxl_walk(), None
        while True:
            item = self._record("libxl", walk)
            if context is None and isinstance(item.value, libxl.LibxlEnd):
                raise ImageError("no libxc stream in front of it", offset=item.offset, record="END")
            yield item
            if isinstance(item.value, libxl.LibxcContext):
                context = self._libxc_stream()
            if isinstance(item.value, libxl.LibxcContext | libxl.CheckpointEnd) and context:
                yield from self._libxc_part(context)
                walk.guest_type = self.domain_header.type
            if isinstance(item.value, libxl.LibxlEnd):
                return

    def _libxc_part(self, context: Iterator[Item]) -> Iterator[Item]:
        """Yield libxc items up to the next place where the libxl layer has its say."""
        for item in context:
            yield item
            if isinstance(item.value, libxc.Checkpoint):
                return

    def _libxc_stream(self, start: bytes = b"") -> Iterator[Item]:
        offset = self.position - len(start)
        data = self._exact(libxc.ImageHeader.size(), libxc.ImageHeader.NAME, start)
        self.image_header = libxc.ImageHeader.decode(data, offset=offset)
        yield Item(offset, "libxc", self.image_header)
        offset = self.position
        data = self._exact(libxc.DomainHeader.size(), libxc.DomainHeader.NAME)
        self.domain_header = libxc.DomainHeader.decode(data, offset=offset)
        yield Item(offset, "libxc", self.domain_header)
        walk = order.libxc_walk(self.domain_header.type, self.image_header.version)
        if self._postcopy:
            walk.table = walk.table | postcopy.ORDER
        while True:
            if self._whole is not None and (run := self._run(self._whole, walk)):
                yield run
            item = self._record("libxc", walk)
            yield item
            if isinstance(item.value, libxc.End):
                return

    def _run(self, whole: memoryview, walk: order.Walk) -> Item | None:
        """Return the PAGE_DATA records that come next, if they may come and are as they should."""
        offset = self.position
        if walk.max_pfn is None or (index := index_run(whole, offset, walk.max_pfn)) is None:
            return None
        self._exact(index.nbytes, index.NAME)
        walk.admit(index, offset)
        return Item(offset, "libxc", index)

    def _record(self, layer: str, walk: order.Walk) -> Item:
        offset = self.position
        header = self._exact(RECORD_HEADER.size, f"{layer} record header")
        record_type, length = RECORD_HEADER.unpack(header)
        if layer == "libxc" and record_type == pages.TYPE:
            value: Any = self._page_data(length, offset)
        else:
            value = self._small_record(layer, record_type, length, offset)
        if self._strict:
            walk.admit(value, offset)
        return Item(offset, layer, value)

    def _small_record(self, layer: str, record_type: int, length: int, offset: int) -> Record:
        registry = self._registry(layer, record_type, offset)
        cls = registry.get(record_type, libxc.Unknown)
        name = cls.NAME if record_type in registry else f"{layer} record {record_type:#x}"
        if record_type not in registry and not record_type & OPTIONAL:
            raise ImageError("unknown mandatory record", offset=offset, record=name)
        self._check_length(length, offset, name)
        body = self._exact(length, name)
        padding = bytes(self._exact(-length % 8, name))
        if cls is libxc.Unknown:
            return libxc.Unknown(record_type, bytes(body), padding=padding.strip(b"\0") and padding)
        return cls.unframe(body, padding, offset=offset)

    def _registry(self, layer: str, record_type: int, offset: int) -> dict[int, type[Record]]:
        if layer == "libxl":
            return libxl.RECORDS
        if record_type not in postcopy.RECORDS:
            return libxc.RECORDS
        if not self._postcopy:
            raise ImageError(
                "this is a migration with post-copy, whose memory comes behind it: only the "
                "migrate-receive --postcopy that it is made for can take it",
                offset=offset,
                record=postcopy.RECORDS[record_type].NAME,
            )
        return postcopy.RECORDS

    def _check_length(self, length: int, offset: int, name: str) -> None:
        if length > MAX_BODY:
            raise ImageError(
                "record too long",
                offset=offset,
                record=name,
                expected=f"at most {MAX_BODY} bytes",
                found=f"{length} bytes",
            )

    def _page_data(self, length: int, offset: int) -> PageBatch:
        self._check_length(length, offset, pages.NAME)
        head = self._exact(min(length, pages.PageDataHeader.size()), pages.NAME)
        header = pages.PageDataHeader.decode(head, offset=offset)
        pages.check_count(header, length, offset)
        entries = self._exact(8 * header.count, pages.NAME)
        pfns, types, reserved_bits, nr_pages = pages.split_entries(entries, length, offset)
        start = self.position
        data = np.frombuffer(self._exact(nr_pages * PAGE_SIZE, pages.NAME), np.uint8)
        content = data.reshape(nr_pages, PAGE_SIZE)
        return PageBatch(pfns, types, content, start, header.reserved, reserved_bits)


class StreamEncoder:
    """The way back: pure functions that return the bytes to write."""

    @staticmethod
    def headers(
        format: str,  # noqa: A002 - the word of the command line and of `image info`
        config: bytes = b"",
        xen: tuple[int, int] = (4, 17),
        guest_type: int = libxc.TYPE_X86_PV,
        version: int = libxc.VERSION,
    ) -> bytes:
        """Return everything up to and including the domain header; `config` is the JSON of xl."""
        head = xl.XlHeader.for_config(config).encode() if format == "xl" else b""
        if format in ("xl", "libxl"):
            head += libxl.LibxlHeader().encode() + libxl.LibxcContext().encode()
        domain = libxc.DomainHeader(guest_type, xen_major=xen[0], xen_minor=xen[1])
        return head + libxc.ImageHeader(version=version).encode() + domain.encode()

    @staticmethod
    def record(value: Any) -> bytes:
        """Return the bytes of any header or record (of a PageBatch: a copy of its pages too)."""
        return bytes(value.encode())

    @staticmethod
    def page_data_header(pfns: np.ndarray, types: np.ndarray) -> bytes:
        """Return a PAGE_DATA record up to its first page; the caller writes the pages."""
        return pages.page_data_header(pfns, types)

    @staticmethod
    def buffers(value: Any) -> list[Buffer]:
        """Return the buffers of any header or record, without a copy of its pages."""
        if isinstance(value, PageBatch):
            return [value.header(), value.pages] if len(value.pages) else [value.header()]
        return [StreamEncoder.record(value)]

    @staticmethod
    def trailer(format: str) -> bytes:  # noqa: A002
        """Return what ends the stream: the libxc END and, outside it, the libxl END."""
        end = libxc.End().encode()
        return end if format == "libxc" else end + libxl.LibxlEnd().encode()
