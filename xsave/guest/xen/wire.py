"""The bytes between a toolstack command and a domain process: small requests, never pages.

Wire: u32 JSON length, u32 blob length, JSON object, blob. Answers carry `error` (a class name of
xsave.errors, its message and facts) or the result; events of a long request come before its
answer.
"""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Iterator
from typing import Any

from xsave import errors
from xsave.errors import (
    ConnectionLost,
    GuestStateError,
    OutOfFrames,
    SuspendFailed,
    XsaveError,
)

_HEADER = struct.Struct("<II")
_MAX_MESSAGE = 64 << 20


def send_message(sock: socket.socket, message: dict[str, Any], blob: bytes = b"") -> None:
    """Send one message. Raises ConnectionLost."""
    text = json.dumps(message).encode()
    try:
        sock.sendall(_HEADER.pack(len(text), len(blob)) + text + blob)
    except OSError as e:
        raise ConnectionLost(f"the domain's process is gone ({e.strerror})") from e


def receive_message(sock: socket.socket) -> tuple[dict[str, Any], bytes]:
    """Receive one message. Raises ConnectionLost."""
    json_bytes, blob_bytes = _HEADER.unpack(receive_exact(sock, _HEADER.size))
    if json_bytes + blob_bytes > _MAX_MESSAGE:
        raise ConnectionLost("the domain's process speaks another protocol")
    message = json.loads(receive_exact(sock, json_bytes))
    return message, receive_exact(sock, blob_bytes)


def receive_exact(sock: socket.socket, nr: int) -> bytes:
    chunks = []
    while nr:
        try:
            chunk = sock.recv(min(nr, 1 << 20))
        except OSError as e:
            raise ConnectionLost(f"the domain's process is gone ({e.strerror})") from e
        if not chunk:
            raise ConnectionLost("the domain's process is gone")
        chunks.append(chunk)
        nr -= len(chunk)
    return b"".join(chunks)


def pack_blobs(*blobs: bytes) -> bytes:
    """Put several byte strings into one blob; unpack_blobs is the inverse."""
    return struct.pack(f"<{len(blobs)}I", *map(len, blobs)) + b"".join(blobs)


def unpack_blobs(blob: bytes, nr: int) -> Iterator[bytes]:
    lengths = struct.unpack_from(f"<{nr}I", blob)
    at = 4 * nr
    for length in lengths:
        yield blob[at : at + length]
        at += length


def error_message(error: XsaveError) -> dict[str, Any]:
    """An error as the wire carries it."""
    facts = {k: v for k, v in error.facts.items() if isinstance(v, str | int)}
    return {"error": type(error).__name__, "message": str(error), "facts": facts}


def raise_error(message: dict[str, Any]) -> None:
    """Raise the error of an answer, if it is one."""
    if "error" not in message:
        return
    kind, facts = message["error"], message["facts"]
    if kind == SuspendFailed.__name__:
        raise SuspendFailed(message["message"], stage=facts["stage"])
    if kind == OutOfFrames.__name__:
        raise OutOfFrames(**facts)
    error: type[XsaveError] = getattr(errors, kind, GuestStateError)
    plain = error.__init__ is XsaveError.__init__
    raise error(message["message"], **(facts if plain else {}))
