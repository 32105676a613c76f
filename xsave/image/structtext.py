"""The C structures inside records as JSON, and back: fields by name, without loss.

A field that is zero is left out, an array loses its trailing zeros, bytes are hex; what is left out
reads back as zero. Numbers a double cannot hold (as many JSON tools have only those) are strings
like "0xffffffff81000000"; any number may be written so.
"""

from __future__ import annotations

import ctypes as c
from typing import Any

_EXACT = 1 << 53


def number(value: int) -> int | str:
    """Return a JSON number, or its hex string where a double could not hold it."""
    return value if value < _EXACT else f"{value:#x}"


def parse_number(value: Any) -> int:
    """Return the number of `number`; TypeError or ValueError if it is none."""
    if isinstance(value, str):
        return int(value, 16)
    if type(value) is not int:
        raise TypeError(f"{value!r} is no whole number")
    return value


def struct_to_json(struct: c.Structure) -> dict[str, Any]:
    """Return the fields of a structure that are not zero."""
    named = ((name, _to_json(getattr(struct, name))) for name, _ in struct._fields_)  # type: ignore[misc]
    return {name: value for name, value in named if value not in (0, "", [], {})}


def _to_json(value: Any) -> Any:
    if isinstance(value, c.Structure):
        return struct_to_json(value)
    if not isinstance(value, c.Array):
        return number(value)
    if value._type_ is c.c_uint8:
        return bytes(value).rstrip(b"\0").hex()
    items = [_to_json(item) for item in value]
    while items and items[-1] in (0, {}):
        items.pop()
    return items


def fill_struct(struct: Any, fields: dict[str, Any]) -> None:
    """Set these fields; KeyError, TypeError or ValueError where one does not fit."""
    types = dict(struct._fields_)
    for name, value in fields.items():
        kind = types[name]
        if issubclass(kind, c.Structure):
            fill_struct(getattr(struct, name), value)
        elif issubclass(kind, c.Array):
            _fill_array(getattr(struct, name), value)
        else:
            setattr(struct, name, _in_range(kind, value))


def _fill_array(array: Any, value: Any) -> None:
    is_bytes = array._type_ is c.c_uint8
    items = bytes.fromhex(value) if is_bytes else list(value)
    if len(items) > len(array):
        raise ValueError(f"{len(items)} elements where {len(array)} fit")
    for index, item in enumerate(items):
        if issubclass(array._type_, c.Structure):
            fill_struct(array[index], item)
        else:
            array[index] = _in_range(array._type_, item)


def _in_range(kind: Any, value: Any) -> int:
    """Return the number; ctypes would cut off what does not fit."""
    found = parse_number(value)
    if not 0 <= found < 1 << (8 * c.sizeof(kind)):
        raise ValueError(f"{found:#x} does not fit {c.sizeof(kind)} bytes")
    return found
