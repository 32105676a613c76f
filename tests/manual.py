"""Read the manual (mdoc(7)) as far as tests want to: sections, options, tables, examples."""

from __future__ import annotations

import re
import shlex
from itertools import pairwise
from pathlib import Path

import click

from xsave.cli import cli

ROOT = Path(__file__).resolve().parents[1]
MAN = ROOT / "man"
PAGES = {path.name: path.read_text() for path in sorted(MAN.iterdir())}
#: What click gives every command.
HELP = {"-h", "--help"}
_OPERATORS = set("|&;()<>")


# ---- the commands


def walk(command=cli, path=()):
    """Yield (path, command) of every command that is no group: ("image", "info"), ..."""
    if not isinstance(command, click.Group):
        yield path, command
        return
    ctx = click.Context(command)
    for name in command.list_commands(ctx):
        yield from walk(command.get_command(ctx, name), (*path, name))


COMMANDS = dict(walk())


def page_name(path):
    """Return the page of a command."""
    return f"xsave-{path[0]}.1"


def options(command):
    """Return the options of a command, short and long, but for those of HELP."""
    found = set()
    for param in command.params:
        if isinstance(param, click.Option):
            found |= {*param.opts, *param.secondary_opts}
    return found - HELP


def parse(words):
    """Have click parse the words behind `xsave`; raises click's usage errors. Nothing runs, if
    the caller made `click.Command.invoke` do nothing."""
    try:
        with cli.make_context("xsave", list(words)) as ctx:
            click.Group.invoke(cli, ctx)
    except click.exceptions.Exit:  # --help and --version
        return


# ---- the pages


def sections(text, macro="Sh"):
    """Return {heading: text below it} of a page (Sh) or of a section (Ss); "" is in front."""
    parts = re.split(rf"^\.{macro} (.+)$", text, flags=re.MULTILINE)
    return {"": parts[0], **dict(zip(parts[1::2], parts[2::2], strict=True))}


def macro_arguments(text, macro):
    """Return the word behind each occurrence of a macro, as in `.It Fl p , Fl -paused`."""
    found = []
    for line in text.splitlines():
        if line.startswith("."):
            words = line[1:].split()
            found += [b for a, b in pairwise(words) if a == macro]
    return found


def flags(text):
    """Return the options a text marks as such: {"-p", "--paused"}."""
    return {f"-{word}" for word in macro_arguments(text, "Fl")}


def synopses(page):
    """Return {path: text} of the lines of a SYNOPSIS, by command."""
    found = {}
    for part in re.split(r"^\.Nm xsave$", sections(page)["SYNOPSIS"], flags=re.MULTILINE)[1:]:
        name = re.search(r"^\.Cm (.+)$", part, re.MULTILINE)
        found[tuple(name[1].split()) if name else ()] = part
    return found


def rows(text):
    """Return the cells of the tables in a text, without the headings."""
    lines = re.findall(r"^\.It (.+ Ta .+)$", text, re.MULTILINE)
    cells = [[cell.strip() for cell in re.split(r"\bTa\b", line)] for line in lines]
    return [row for row in cells if not row[0].startswith("Em ")]


def items(text):
    """Return {tag: text below it} of the lists in a text; tags without their macros."""
    parts = re.split(r"^\.It (?:Li |Ev |Cm )?(.+)$", text, flags=re.MULTILINE)
    tails = [re.split(r"^\.(?:El|Ss|Sh)\b", part, flags=re.MULTILINE)[0] for part in parts[2::2]]
    return {tag: " ".join(tail.split()) for tag, tail in zip(parts[1::2], tails, strict=True)}


# ---- command lines


def literal_blocks(page):
    """Return the literal blocks of a page, as they are printed."""
    blocks = re.findall(r"^\.Bd -literal.*?\n(.*?)^\.Ed", page, re.MULTILINE | re.DOTALL)
    return [block.replace(r"\e", "\\").replace(r"\&", "") for block in blocks]


def fenced_blocks(markdown):
    """Return the fenced blocks of a Markdown text."""
    return re.findall(r"^```.*?\n(.*?)^```", markdown, re.MULTILINE | re.DOTALL)


def command_lines(blocks):
    """Return the words behind each `xsave` in the lines that begin with a prompt."""
    found = []
    for block in blocks:
        joined = re.sub(r"\\\n\s*|(?<=\|)\n\s*", " ", block)
        for line in re.findall(r"^\$ (.+)$", joined, re.MULTILINE):
            found += [words[words.index("xsave") + 1 :] for words in _split(line)]
    return found


def _split(line):
    """Cut a shell line into its simple commands; return those that have xsave in them."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    commands = [[]]
    for word in lexer:
        if set(word) <= _OPERATORS:
            commands.append([])
        else:
            commands[-1].append(word)
    return [words for words in commands if "xsave" in words]
