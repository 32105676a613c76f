"""The grammar of xl's configuration files: what is read, and where an error is."""

from __future__ import annotations

import string

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from xsave.errors import UsageError
from xsave.host.xlcfg import parse, parse_argument


def values(text):
    """Return {name: value} of a file."""
    return {name: setting.value for name, setting in parse(text, "f").items()}


def refused(text):
    with pytest.raises(UsageError) as caught:
        parse(text, "web.cfg")
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", {}),
        ("\n\n # nothing\n;;", {}),
        ("a=1", {"a": "1"}),
        ("a = 0x10 ; b=-3\nc='x'", {"a": "0x10", "b": "-3", "c": "x"}),
        ("a = 'it is \"so\"' # why", {"a": 'it is "so"'}),
        (r'a = "q\"\'\\ \t\n\x41\101"', {"a": "q\"'\\ \t\nAA"}),
        ("a = '# no comment; none'", {"a": "# no comment; none"}),
        ("a=[]", {"a": []}),
        ("a = [ 'x', 'y', ]", {"a": ["x", "y"]}),
        ("a = [\n 'x', # first\n\n 5\n]\nb=1", {"a": ["x", "5"], "b": "1"}),
        ("a = [['x'], []]", {"a": [["x"], []]}),
        ("a = \\\n 'x'", {"a": "x"}),
        ("a='1'\r\nb='2'\r\n", {"a": "1", "b": "2"}),
        ("a='x' ; a+=\"y\"; a += 3", {"a": "xy3"}),
        ("a=[1]; a+=[2,3]", {"a": ["1", "2", "3"]}),
        ("a += 'x'", {"a": "x"}),
        ("a=1; a=[2]", {"a": ["2"]}),
        ("a='ä€'", {"a": "ä€"}),
        ("a=','; b=']'; c=[']', ',']", {"a": ",", "b": "]", "c": ["]", ","]}),
    ],
)
def test_what_is_read(text, found):
    """Strings with both quotes and escapes, numbers as they are, lists over lines, comments,
    continued lines, appended values; the last of a name counts."""
    assert values(text) == found


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a", "web.cfg:1:2: expected '=' or '+=', found the end"),
        ("\n a 1", "web.cfg:2:4: expected '=' or '+=', found 1"),
        ("a = True", "web.cfg:1:5: expected a string or a number or '[', found True"),
        ("a = 1 b = 2", "web.cfg:1:7: expected a newline or ';', found b"),
        ("a =\n1", "web.cfg:1:4: expected a string or a number or '[', found a newline"),
        ("a = 'x\nb = 'y'", "web.cfg:1:5: a string that does not end on its line"),
        ("a = 'x\\", "web.cfg:1:5: a string that does not end"),
        ("a = 'x\\q'", "web.cfg:1:5: unknown escape \\q"),
        ("a = 'x\\xZZ'", "web.cfg:1:5: unknown escape \\x"),
        ("a = '\\0'", "web.cfg:1:5: a zero byte"),
        ("a = '\\777'", "web.cfg:1:5: escape \\777 in a string is no ASCII"),
        ("a = '\0'", "web.cfg:1:5: a zero byte"),
        ("a = [1\n2]", "web.cfg:2:1: expected ',' or ']', found 2"),
        ("a = [1,\n", "web.cfg:2:1: expected a string or a number or '[', found the end"),
        ("a = [,]", "web.cfg:1:6: expected a string or a number or '[', found ,"),
        ("a = [" * 1 + "[" * 40, "web.cfg:1:21: lists are nested more than 16 deep"),
        ("a = 1\na += [2]", "web.cfg:2:1: a: a list and a single value cannot be added"),
        ("import os", "web.cfg:1:8: expected '=' or '+=', found os"),
        ("a = f(1)", "web.cfg:1:5: expected a string"),
        ("a = 1 + 1", "web.cfg:1:7: unexpected character '+'"),
        ("a = $(id)", "web.cfg:1:5: unexpected character '$'"),
    ],
)
def test_what_is_refused(text, says):
    """An error has file, line and column, and says what was expected."""
    assert refused(text).startswith(says)


@pytest.mark.parametrize(
    ("argument", "found"),
    [
        ("memory=512", {"memory": "512"}),
        ("name=web2", {"name": "web2"}),
        ('name="web 2"', {"name": "web 2"}),
        ("cmdline=console=hvc0 quiet", {"cmdline": "console=hvc0 quiet"}),
        ("uuid=0a1b-2c", {"uuid": "0a1b-2c"}),
        ("disk=[]", {"disk": []}),
        ("extra=", {"extra": ""}),
    ],
)
def test_arguments(argument, found):
    """name=value of a command line: as in the file, or the plain text without quotes."""
    assert {k: s.value for k, s in parse_argument(argument).items()} == found


@pytest.mark.parametrize("argument", ["=x", "a b=x", "a='x", "a=[", "3=4", "a=[1] x"])
def test_wrong_arguments(argument):
    """What begins as a string or list must be one, and a name must be a name."""
    with pytest.raises(UsageError):
        parse_argument(argument)


names = st.text(string.ascii_letters + "_", min_size=1, max_size=8)
strings = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20)
trees = st.recursive(strings, lambda inner: st.lists(inner, max_size=4), max_leaves=12)


def written(value, quote):
    """Write a value in the grammar."""
    if isinstance(value, list):
        return "[" + ",\n ".join(written(v, quote) for v in value) + "]"
    escaped = value.replace("\\", "\\\\").replace(quote, "\\" + quote).replace("\n", "\\n")
    return quote + escaped + quote


@given(st.dictionaries(names, trees, max_size=5), st.sampled_from("'\""))
@example({"a": "ends in a backslash\\"}, "'")
def test_what_is_written_is_read(settings, quote):
    """Any strings and lists, quoted, come back as they were."""
    text = "\n".join(f"{name} = {written(value, quote)}" for name, value in settings.items())
    assert values(text) == settings


@given(st.text(alphabet="ab1 =+[],;'\"\\\n#x\t$\0") | st.text())
def test_any_text(text):
    """Any text is settings, or one error with a place inside the text."""
    try:
        assert all(name.isidentifier() for name in values(text))
    except UsageError as error:
        source, line, column, *_ = str(error).split(":")
        lines = text.split("\n")
        assert source == "f"
        assert 1 <= int(line) <= len(lines)
        assert 1 <= int(column) <= len(lines[int(line) - 1]) + 1
