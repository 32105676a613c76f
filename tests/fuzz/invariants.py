"""What must hold for any bytes whatsoever; the fuzzer and a short Hypothesis test share it.

1. Decoding yields items or raises ImageError, nothing else, with the order rules or without.
2. What was decoded encodes to the very bytes it came from, and so does its JSON.
3. With the rules or without, the items are the same as far as both go.
4. `verify` returns findings, whatever the bytes; bytes that do not decode have an error.
5. As JSON text, or as zstd, the same bytes are an image, or content, or an ImageError.
"""

from __future__ import annotations

import json

from xsave.errors import ImageError
from xsave.image import textfile
from xsave.image.buffers import reader
from xsave.image.stream import StreamDecoder, StreamEncoder
from xsave.image.text import from_json, to_json
from xsave.image.verify import verify
from xsave.image.zstdseek import parse_seek_table, walk


def decode(data, *, strict_order):
    """Return the items up to the end or the error, and the error."""
    items = []
    try:
        for item in StreamDecoder(reader(data), strict_order=strict_order):
            items.append(item)
    except ImageError as error:
        return items, error
    return items, None


def check(data):
    """Raise AssertionError where an invariant is broken."""
    strict, error = decode(data, strict_order=True)
    lax, _ = decode(data, strict_order=False)
    assert [item.offset for item in strict] == [item.offset for item in lax[: len(strict)]]
    position = 0
    for item in lax:
        assert item.offset == position
        encoded = StreamEncoder.record(item.value)
        assert encoded == data[position : position + len(encoded)]
        text = json.dumps(to_json(item.layer, item.value))
        assert StreamEncoder.record(from_json(json.loads(text))) == encoded
        position += len(encoded)
    findings = verify(reader(data))
    assert error is None or any(finding.severity == "error" for finding in findings)
    check_containers(data)


def check_containers(data):
    """Take the bytes for JSON and for zstd."""
    try:
        for buffers in textfile.encode(reader(data)):
            assert buffers is not None
    except ImageError:
        pass
    try:
        nr_bytes = sum(len(piece.data) for piece in walk(reader(data)))
        assert nr_bytes <= len(data)
    except ImageError:
        pass
    parse_seek_table(data)
