"""An image as a list of pieces, and edits of such a list: take one away, move one, patch one."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple


class Piece(NamedTuple):
    """One header or record, or what follows the image."""

    name: str
    data: bytes


Edit = Callable[[list[Piece]], list[Piece]]


def without(pieces, name):
    """Return the pieces but those of that name."""
    assert any(piece.name == name for piece in pieces), name
    return [piece for piece in pieces if piece.name != name]


def twice(pieces, name):
    """Return the pieces, the first one of that name twice."""
    i = index(pieces, name)
    return pieces[: i + 1] + pieces[i:]


def moved(pieces, name, before):
    """Return the pieces, the first one of a name in front of the first one of another."""
    piece = pieces[index(pieces, name)]
    rest = [p for p in pieces if p is not piece]
    i = index(rest, before)
    return [*rest[:i], piece, *rest[i:]]


def replaced(pieces, name, data):
    """Return the pieces, the first one of that name with other bytes."""
    i = index(pieces, name)
    return [*pieces[:i], Piece(name, data), *pieces[i + 1 :]]


def patched(pieces, name, at, data):
    """Return the pieces, some bytes of the first one of that name changed."""
    old = pieces[index(pieces, name)].data
    return replaced(pieces, name, old[:at] + data + old[at + len(data) :])


def index(pieces, name):
    """Return where the first piece of that name is."""
    return [piece.name for piece in pieces].index(name)


def offset(pieces, name):
    """Return where in the image the first piece of that name begins."""
    return sum(len(piece.data) for piece in pieces[: index(pieces, name)])
