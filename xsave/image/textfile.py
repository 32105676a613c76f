"""A whole image as one JSON document, and back: what `image decode` and `image encode` write.

    {"xsave_image": 1, "format": "xl", "records": [
    {"offset": 0, "layer": "xl", "record": "xl header", ...},
    ...
    ]}

Each record stands on a line of its own, so that both ways hold one record in memory. A document
that some other program has laid out differently is read too, as a whole. Bytes behind the image
are records of the layer `tail`. Offsets are for the reader's eyes and ignored on the way back.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from xsave.errors import ImageError
from xsave.image.buffers import Buffer, Read
from xsave.image.stream import StreamDecoder, StreamEncoder
from xsave.image.text import from_json, to_json

VERSION = 1
_TAIL_STEP = 1 << 20
_READ_STEP = 1 << 20
_TAIL = "tail"


def decode(decoder: StreamDecoder, *, with_pages: bool = True) -> Iterator[str]:
    """Yield the lines of the document of an image. Raises ImageError where it is damaged."""
    separator = ""
    for fields in _objects(decoder, with_pages):
        if not separator:
            head = json.dumps({"xsave_image": VERSION, "format": decoder.format})
            yield head[:-1] + ', "records": [\n'
        yield separator + json.dumps(fields)
        separator = ",\n"
    yield "\n]}\n"


def _objects(decoder: StreamDecoder, with_pages: bool) -> Iterator[dict[str, Any]]:
    for item in decoder:
        fields = to_json(item.layer, item.value, with_pages=with_pages)
        yield {"offset": item.offset, **fields}
    offset = decoder.position
    while piece := decoder.tail(_TAIL_STEP):
        yield {"offset": offset, "layer": _TAIL, "record": _TAIL, "content": piece.hex()}
        offset = decoder.position


def encode(read: Read) -> Iterator[list[Buffer]]:
    """Yield the buffers of the image of a document. Raises ImageError where it is no such."""
    for number, fields in enumerate(_parse(read)):
        try:
            yield _buffers(fields)
        except ImageError as error:
            raise ImageError(f"record {number} of the JSON: {error.what}") from error


def _buffers(fields: Any) -> list[Buffer]:
    if isinstance(fields, dict) and fields.get("layer") == _TAIL:
        try:
            return [bytes.fromhex(fields["content"])]
        except (KeyError, TypeError, ValueError) as error:
            raise ImageError("the tail has no content in hex") from error
    return StreamEncoder.buffers(from_json(fields))


def _parse(read: Read) -> Iterator[Any]:
    """Yield the objects of the records, one by one if they stand on lines of their own."""
    lines = _lines(read)
    first = next(lines, "")
    if first.rstrip().endswith("["):
        _check_head(_loads(first + "]}"))
        for line in lines:
            if line.strip() == "]}":
                break
            yield _loads(line.strip().removesuffix(","))
        else:
            raise ImageError("the JSON is cut off", expected="]} at its end")
        if any(line.strip() for line in lines):
            raise ImageError("something follows the end of the JSON")
    else:
        document = _loads(first + "".join(lines))
        _check_head(document)
        yield from document["records"]


def _check_head(document: Any) -> None:
    if not isinstance(document, dict) or not isinstance(document.get("records"), list):
        raise ImageError("the JSON is no decoded image", expected='an object with "records"')
    if document.get("xsave_image") != VERSION:
        found = document.get("xsave_image")
        raise ImageError("unknown version of the JSON", expected=VERSION, found=found)


def _loads(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ImageError(f"this is no JSON: {error}") from error


def _lines(read: Read) -> Iterator[str]:
    parts: list[bytes] = []
    while piece := bytes(read(_READ_STEP)):
        *ends, rest = piece.split(b"\n")
        for end in ends:
            yield _text(b"".join([*parts, end, b"\n"]))
            parts = []
        parts.append(rest)
    if any(parts):
        yield _text(b"".join(parts))


def _text(line: bytes) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        raise ImageError(f"this is no JSON: {error}") from error
