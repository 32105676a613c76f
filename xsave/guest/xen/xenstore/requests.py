"""Requests of the wire: their numbers, their payloads, and those that work on one node.

A payload is NUL-terminated strings (only WRITE's value is raw). The operations here take the
view the request works in, the absolute path, the rest of the payload and the domid that asks,
and return the reply and the change whose watches fire. They raise nothing but WireError.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum

from xsave.guest.xen.xenstore import nodes
from xsave.guest.xen.xenstore.nodes import PAYLOAD_MAX, Change, View, WireError


class Op(IntEnum):
    """enum xsd_sockmsg_type."""

    CONTROL = 0
    DIRECTORY = 1
    READ = 2
    GET_PERMS = 3
    WATCH = 4
    UNWATCH = 5
    TRANSACTION_START = 6
    TRANSACTION_END = 7
    INTRODUCE = 8
    RELEASE = 9
    GET_DOMAIN_PATH = 10
    WRITE = 11
    MKDIR = 12
    RM = 13
    SET_PERMS = 14
    WATCH_EVENT = 15
    ERROR = 16
    IS_DOMAIN_INTRODUCED = 17
    RESUME = 18
    SET_TARGET = 19
    RESET_WATCHES = 21
    DIRECTORY_PART = 22


OK = b"OK\0"


def strings(payload: bytes, count: int) -> list[bytes]:
    """Split a payload of exactly `count` NUL-terminated strings."""
    parts = payload.split(b"\0")
    if len(parts) != count + 1 or parts[-1]:
        raise WireError("EINVAL")
    return parts[:-1]


def split_path(payload: bytes) -> tuple[str, bytes]:
    """Split off the path that begins most payloads."""
    path, nul, rest = payload.partition(b"\0")
    if not nul:
        raise WireError("EINVAL")
    return path.decode("latin-1"), rest


def domid_of(payload: bytes) -> int:
    """Return the domid a payload names in decimal."""
    text = strings(payload, 1)[0]
    if not text.isdigit() or len(text) > 5:
        raise WireError("EINVAL")
    return int(text)


# ---- operations on a node: (view, absolute path, rest of the payload, domid)

NodeOp = Callable[[View, str, bytes, int], tuple[bytes, Change | None]]


def _no_more(rest: bytes) -> None:
    if rest:
        raise WireError("EINVAL")


def _read(view: View, path: str, rest: bytes, _domid: int) -> tuple[bytes, None]:
    _no_more(rest)
    return nodes.existing(view, path).value, None


def _directory(view: View, path: str, rest: bytes, _domid: int) -> tuple[bytes, None]:
    _no_more(rest)
    return _names(nodes.existing(view, path)), None


def _directory_part(view: View, path: str, rest: bytes, _domid: int) -> tuple[bytes, None]:
    """Reply `<generation>\\0<names from offset>`; an empty name ends the last part."""
    offset = strings(rest, 1)[0]
    if not offset.isdigit() or len(offset) > 9:
        raise WireError("EINVAL")
    node = nodes.existing(view, path)
    generation = b"%d\0" % node.generation
    names = _names(node)[int(offset) :]
    room = PAYLOAD_MAX - len(generation) - 1
    if len(names) <= room:
        return generation + names + b"\0", None
    return generation + names[: names.rfind(b"\0", 0, room) + 1], None


def _names(node: nodes.Node) -> bytes:
    return b"".join(name.encode() + b"\0" for name in node.children)


def _get_perms(view: View, path: str, rest: bytes, _domid: int) -> tuple[bytes, None]:
    _no_more(rest)
    perms = nodes.existing(view, path).perms
    return b"".join(perm.encode() + b"\0" for perm in perms), None


def _set_perms(view: View, path: str, rest: bytes, domid: int) -> tuple[bytes, Change]:
    perms = strings(rest, rest.count(b"\0"))
    texts = tuple(perm.decode("latin-1") for perm in perms)
    return OK, nodes.set_perms(view, path, texts, domid)


def _write(view: View, path: str, rest: bytes, domid: int) -> tuple[bytes, Change]:
    return OK, nodes.write(view, path, rest, domid)


def _mkdir(view: View, path: str, rest: bytes, domid: int) -> tuple[bytes, Change | None]:
    _no_more(rest)
    return OK, nodes.mkdir(view, path, domid)


def _rm(view: View, path: str, rest: bytes, _domid: int) -> tuple[bytes, Change | None]:
    _no_more(rest)
    return OK, nodes.remove(view, path)


NODE_OPS: dict[int, NodeOp] = {
    Op.DIRECTORY: _directory,
    Op.DIRECTORY_PART: _directory_part,
    Op.READ: _read,
    Op.WRITE: _write,
    Op.MKDIR: _mkdir,
    Op.RM: _rm,
    Op.GET_PERMS: _get_perms,
    Op.SET_PERMS: _set_perms,
}
