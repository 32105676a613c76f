"""The grammar of xl's configuration files: text in, settings with their places out.

Only the grammar: what the settings mean is in xldomain.py. Mirrors tools/libs/util/libxlu_cfg*:

    file     = { [ setting ] ( newline | ";" ) }
    setting  = name ( "=" | "+=" ) value
    value    = string | number | "[" [ value { "," value } [ "," ] ] "]"

Strings stand in ' or " and may hold the backslash escapes of C; a comment runs from # to the
end of its line; newlines count for nothing inside brackets or behind a backslash. xl itself
keeps numbers as the strings they are, so this does too. `+=` appends to what the name had.
Nothing is ever executed, and nothing is looked up.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from xsave.errors import UsageError

_MAX_DEPTH = 16
_TOKEN = re.compile(
    r"""(?P<space>[ \t\r]+|\\[ \t\r]*\n|\#[^\n]*)
      | (?P<newline>\n)
      | (?P<name>[A-Za-z_][A-Za-z0-9_]*)
      | (?P<number>-?[0-9][0-9A-Za-z]*)
      | (?P<string>'(?:[^'\\\n]|\\[^\n])*'|"(?:[^"\\\n]|\\[^\n])*")
      | (?P<mark>\+=|[=\[\],;])""",
    re.VERBOSE,
)
_ESCAPE = re.compile(r"\\(?:x([0-9A-Fa-f]{2})|([0-7]{1,3})|(.))", re.DOTALL)
_ESCAPES = {
    "a": "\a", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "v": "\v",
    "\\": "\\", '"': '"', "'": "'",
}  # fmt: skip

Value = str | list["Value"]


@dataclass(frozen=True)
class Place:
    """Where something stands: a file (or an argument), a line and a column, both from 1."""

    source: str
    line: int
    column: int

    def error(self, message: str) -> UsageError:
        return UsageError(f"{self}: {message}")

    def __str__(self) -> str:
        return f"{self.source}:{self.line}:{self.column}"


@dataclass(frozen=True)
class Setting:
    """A setting's value, with the place of its name."""

    value: Value
    place: Place


@dataclass(frozen=True)
class _Token:
    kind: str
    text: str
    place: Place


def parse(text: str, source: str) -> dict[str, Setting]:
    """Return the settings; the last one of a name counts. Raises UsageError with the place."""
    return _Parser(text, source).file()


def parse_argument(argument: str) -> dict[str, Setting]:
    """Parse one `name=value` of a command line. A value that is no string, number or list of
    the grammar stands for itself, so that nothing needs to be quoted twice."""
    name, _, value = argument.partition("=")
    source = f"argument {name}"
    try:
        return parse(argument, source)
    except UsageError:
        plain = value.strip()
        if plain[:1] in ("'", '"', "[") or not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII):
            raise
        return {name: Setting(plain, Place(source, 1, 1))}


class _Parser:
    """Recursive descent over the tokens, one ahead."""

    def __init__(self, text: str, source: str) -> None:
        self._tokens = _tokens(text, source)
        self._next = next(self._tokens)
        self._settings: dict[str, Setting] = {}

    def _take(self, *wanted: str) -> _Token:
        """Take the next token, which must be one of these kinds or marks; none: any."""
        token = self._next
        if wanted and token.kind not in wanted and token.text not in wanted:
            raise token.place.error(f"expected {_either(wanted)}, found {_show(token)}")
        if token.kind != "end":
            self._next = next(self._tokens)
        return token

    def _skip_newlines(self) -> None:
        while self._next.kind == "newline":
            self._take()

    def file(self) -> dict[str, Setting]:
        while self._next.kind != "end":
            if self._next.kind == "newline" or self._next.text == ";":
                self._take()
                continue
            self._setting()
            if self._next.kind != "end":
                self._take("newline", ";")
        return self._settings

    def _setting(self) -> None:
        name = self._take("name")
        adds = self._take("=", "+=").text == "+="
        value = self._value(0)
        before = self._settings.get(name.text)
        if adds and before is not None:
            match before.value, value:
                case (str() as old, str() as new):
                    value = old + new
                case (list() as first, list() as more):
                    value = first + more
                case _:
                    what = f"{name.text}: a list and a single value cannot be added"
                    raise name.place.error(what)
        self._settings[name.text] = Setting(value, name.place)

    def _value(self, depth: int) -> Value:
        token = self._take("string", "number", "[")
        if token.kind == "string":
            return _unquote(token)
        if token.kind == "number":
            return token.text
        if depth == _MAX_DEPTH:
            raise token.place.error(f"lists are nested more than {_MAX_DEPTH} deep")
        return self._list(depth)

    def _list(self, depth: int) -> list[Value]:
        values: list[Value] = []
        self._skip_newlines()
        while self._next.text != "]" or self._next.kind != "mark":
            values.append(self._value(depth + 1))
            self._skip_newlines()
            if self._next.text != "]":
                self._take(",", "]")
                self._skip_newlines()
        self._take("]")
        return values


def _tokens(text: str, source: str) -> Iterator[_Token]:
    """Yield the tokens, at last one of kind "end"."""
    line, start, at = 1, 0, 0
    while at < len(text):
        place = Place(source, line, at - start + 1)
        match = _TOKEN.match(text, at)
        if match is None:
            if text[at] in "'\"":
                raise place.error("a string that does not end on its line")
            raise place.error(f"unexpected character {text[at]!r}")
        kind = match.lastgroup or ""
        at = match.end()
        if match[0].endswith("\n"):
            line, start = line + 1, at
        if kind != "space":
            yield _Token(kind, match[0], place)
    yield _Token("end", "", Place(source, line, at - start + 1))


def _unquote(token: _Token) -> str:
    def replace(match: re.Match[str]) -> str:
        if match[3]:
            if match[3] not in _ESCAPES:
                raise token.place.error(f"unknown escape \\{match[3]} in a string")
            return _ESCAPES[match[3]]
        code = int(match[1], 16) if match[1] else int(match[2], 8)
        if code > 0x7F:  # of which character it is a byte, nobody knows
            raise token.place.error(f"escape {match[0]} in a string is no ASCII character")
        return chr(code)

    text = _ESCAPE.sub(replace, token.text[1:-1])
    if "\0" in text:
        raise token.place.error("a zero byte in a string")
    return text


def _either(wanted: tuple[str, ...]) -> str:
    names = {"name": "a name", "string": "a string", "number": "a number", "newline": "a newline"}
    return " or ".join(names.get(w, f"'{w}'") for w in wanted)


def _show(token: _Token) -> str:
    if token.kind == "end":
        return "the end"
    return "a newline" if token.kind == "newline" else token.text
