"""Declare a record once: a frozen dataclass with its Construct layout beside it.

    @dataclass(frozen=True)
    class X86PvInfo(Record):
        TYPE, NAME = 0x02, "X86_PV_INFO"
        LAYOUT = layout(guest_width=u8, pt_levels=u8, reserved1=u16, reserved2=u32)
        guest_width: int
        ...

`Layout.decode` and `Layout.encode` are the only callers of Construct, interpreted, never
compiled; a body of the wrong length is found before Construct sees it, and whatever Construct
still refuses becomes an ImageError with the record's name, its offset and the failing field.
Reserved fields and padding that are not zero are kept, so that encode(decode(x)) == x; only
`verify` complains of them. Bulk data stays one buffer: `u64s` is an array view of it.

Framing (specs, "Record"): u32 type, u32 body length, body, 0..7 bytes to a multiple of 8.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any, ClassVar, NoReturn, Self

import construct
import numpy as np

from xsave.errors import ImageError

u8, u16, u32, u64 = construct.Int8ul, construct.Int16ul, construct.Int32ul, construct.Int64ul
u16be, u32be, u64be = construct.Int16ub, construct.Int32ub, construct.Int64ub
rest = construct.GreedyBytes
blob = construct.Bytes

RECORD_HEADER = struct.Struct("<II")
#: Longest body a reader accepts and a writer may write (REC_LENGTH_MAX of libxc).
MAX_BODY = 128 << 20
#: Set in the type of a record that a reader may skip when it does not know it.
OPTIONAL = 0x8000_0000


class _Array(construct.Adapter):  # type: ignore[misc]
    """The rest of a body as a little-endian array of `columns` u64 per row."""

    def __init__(self, columns: int = 1) -> None:
        super().__init__(rest)
        self.columns = columns

    def _decode(self, obj: bytes, context: Any, path: str) -> np.ndarray:
        if len(obj) % (8 * self.columns):
            raise construct.ValidationError(
                f"{len(obj)} bytes are no multiple of {8 * self.columns}", path=path
            )
        array = np.frombuffer(obj, "<u8")
        return array if self.columns == 1 else array.reshape(-1, self.columns)

    def _encode(self, obj: Any, context: Any, path: str) -> bytes:
        return np.ascontiguousarray(obj, "<u8").tobytes()


u64s = _Array()
u64_pairs = _Array(2)


@dataclass(frozen=True)
class Body:
    """A Construct struct, the size of its fixed part, and whether bytes may follow that."""

    fields: Any
    names: tuple[str, ...]
    size: int
    is_open: bool


def layout(**fields: Any) -> Body:
    """Return the layout of these fields; the last one may take the rest of the body."""
    size, is_open = 0, False
    for field in fields.values():
        try:
            size += field.sizeof()
        except construct.SizeofError:
            is_open = True
    return Body(construct.Struct(**fields), tuple(fields), size, is_open)


class Layout:
    """Something with a name and a layout: a header, or (see Record) the body of a record."""

    NAME: ClassVar[str]
    LAYOUT: ClassVar[Body]

    @classmethod
    def size(cls) -> int:
        """Return the bytes of the fixed part."""
        return cls.LAYOUT.size

    @classmethod
    def parse(cls, data: bytes | memoryview, offset: int) -> dict[str, Any]:
        """Return the fields by name; ImageError for a wrong length and where Construct fails."""
        body, found = cls.LAYOUT, len(data)
        if found < body.size or (found > body.size and not body.is_open):
            bound = "at least " if body.is_open else ""
            cls.refuse(offset, "wrong length", f"{bound}{body.size} bytes", f"{found} bytes")
        try:
            parsed = body.fields.parse(data)
        except construct.ConstructError as error:
            raise ImageError(_reason(error), offset=offset, record=cls.NAME) from error
        del parsed["_io"]
        return dict(parsed)

    @classmethod
    def decode(cls, data: bytes | memoryview, *, offset: int = 0) -> Self:
        """Return the value of exactly these bytes, which begin at `offset` of the image.

        Raises ImageError for a wrong length and for what `check` refuses.
        """
        value = cls(**cls.parse(data, offset))
        value.check(offset)
        return value

    def encode(self) -> bytes:
        """Return the bytes of this value; ImageError if a field does not fit its place."""
        try:
            values = {name: getattr(self, name) for name in self.LAYOUT.names}
            return bytes(self.LAYOUT.fields.build(values))
        except (construct.ConstructError, TypeError, ValueError, OverflowError) as error:
            raise ImageError(f"cannot be encoded: {_reason(error)}", record=self.NAME) from error

    def check(self, offset: int) -> None:
        """Raise ImageError if no reader could make sense of the value (not for mere oddities)."""

    @classmethod
    def refuse(
        cls, offset: int, what: str, expected: object = None, found: object = None
    ) -> NoReturn:
        """Raise the ImageError of this record at this offset."""
        raise ImageError(what, offset=offset, record=cls.NAME, expected=expected, found=found)


@dataclass(frozen=True, kw_only=True)
class Record(Layout):
    """A value that travels in a record's frame; `padding` is kept only where it is not zero."""

    TYPE: ClassVar[int]
    padding: bytes = b""

    @classmethod
    def unframe(cls, body: memoryview, padding: bytes, *, offset: int) -> Self:
        """Return the value of a record's body and padding; `offset` is that of its header."""
        fields = cls.parse(body, offset)
        value = cls(**fields, padding=padding if any(padding) else b"")
        value.check(offset)
        return value

    def encode(self) -> bytes:
        """Return the whole record: header, body and padding."""
        return frame(self.record_type, super().encode(), self.padding)

    @property
    def record_type(self) -> int:
        """The number in the record's header."""
        return self.TYPE


def frame(record_type: int, body: bytes, padding: bytes = b"") -> bytes:
    """Return a record of this type and body; padding is zero unless given (and of its length)."""
    nr_padding = -len(body) % 8
    if len(body) > MAX_BODY:
        raise ImageError(
            "record too long", expected=f"at most {MAX_BODY} bytes", found=f"{len(body)} bytes"
        )
    if padding and len(padding) != nr_padding:
        raise ImageError("wrong padding", expected=f"{nr_padding} bytes", found=len(padding))
    return RECORD_HEADER.pack(record_type, len(body)) + body + (padding or bytes(nr_padding))


def _reason(error: Exception) -> str:
    """Return the first line of an error in words, with the field's path where there is one."""
    lines = [line.strip() for line in str(error).splitlines()]
    words = [line for line in lines if line and not line.startswith("Error in path")]
    path = getattr(error, "path", None)
    where = f"{path.split('->')[-1].strip()}: " if path and "->" in path else ""
    return where + (words[0] if words else type(error).__name__)
