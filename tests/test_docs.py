"""README, CHANGELOG and the manual's pages on commands say what is true, and all of it."""

from __future__ import annotations

import dataclasses
import re
import shutil
import subprocess

import click
import pytest

from tests import manual
from tests.image.strategies import image
from tests.manual import COMMANDS, HELP, PAGES, ROOT
from xsave import cli
from xsave.commands.host import describe
from xsave.errors import EXIT_CODES
from xsave.guest.xen.domctl import DomainInfo
from xsave.host.host import add_host, open_host
from xsave.image.buffers import reader
from xsave.image.info import summary
from xsave.image.stream import StreamDecoder
from xsave.image.verify import RULES
from xsave.migrate import MigrateResult
from xsave.progress import Decided, Round
from xsave.rounds import DryRun
from xsave.save import SaveResult

README = (ROOT / "README.md").read_text()
TEXTS = {**PAGES, "README.md": README, "CHANGELOG.md": (ROOT / "CHANGELOG.md").read_text()}
COMMAND_SECTIONS = [
    "NAME",
    "SYNOPSIS",
    "DESCRIPTION",
    "OPTIONS",
    "EXIT STATUS",
    "EXAMPLES",
    "SEE ALSO",
]
GLOBAL_OPTIONS = manual.options(cli.cli)
ALL_OPTIONS = GLOBAL_OPTIONS | HELP | set().union(*map(manual.options, COMMANDS.values()))
#: Long options of other programs that the texts mention.
FOREIGN_OPTIONS = {"--sparse", "--debug"}
#: What is said of a domain at the far end of a migration; not an option.
NO_OPTIONS = {"--incoming"}
by_command = pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
by_page = pytest.mark.parametrize("name", PAGES)


@pytest.fixture
def nothing_runs(monkeypatch):
    """Make click parse command lines and run none."""
    monkeypatch.setattr(click.Command, "invoke", lambda *_: None)


# ---- commands and options


def test_every_command_has_a_page_and_every_page_a_command():
    """The pages of section 1 are xsave.1 and one for each command or group."""
    expected = {"xsave.1", *map(manual.page_name, COMMANDS)}
    assert {name for name in PAGES if name.endswith(".1")} == expected


@by_command
def test_synopsis(path):
    """The synopsis of a command has its options, all of them and no other."""
    found = manual.synopses(PAGES[manual.page_name(path)])[path]
    assert manual.flags(found) == manual.options(COMMANDS[path])


@by_command
def test_options_are_described(path):
    """OPTIONS describes the options of a command (of a group: below its name), and no other."""
    described = manual.sections(PAGES[manual.page_name(path)])["OPTIONS"]
    if len(path) > 1:
        described = manual.sections(described, "Ss")["xsave " + " ".join(path)]
    tags = "\n".join(line for line in described.splitlines() if line.startswith(".It"))
    assert manual.flags(tags) == manual.options(COMMANDS[path])


def test_global_options_are_described():
    """xsave.1 describes the options in front of the command, and no other."""
    found = manual.sections(PAGES["xsave.1"])
    assert manual.flags(found["SYNOPSIS"]) == GLOBAL_OPTIONS | HELP
    tags = "\n".join(line for line in found["OPTIONS"].splitlines() if line.startswith(".It"))
    assert manual.flags(tags) == GLOBAL_OPTIONS | HELP


@by_page
def test_marked_options_belong_to_the_page(name):
    """What a page marks as an option is one of its commands, or stands before the command."""
    own = [manual.options(c) for path, c in COMMANDS.items() if manual.page_name(path) == name]
    known = ALL_OPTIONS if name == "xsave.1" else GLOBAL_OPTIONS.union(*own)
    assert manual.flags(PAGES[name]) <= known | HELP


@pytest.mark.parametrize("name", TEXTS)
def test_no_text_names_an_option_that_is_not_there(name):
    """Every long option in running text is one of some command, or of another program."""
    found = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*[a-z]", TEXTS[name]))
    assert found <= ALL_OPTIONS | FOREIGN_OPTIONS | NO_OPTIONS


@by_page
def test_command_sections(name):
    """A page of section 1 has the sections such a page has, in their order."""
    if name.endswith(".1"):
        found = [heading for heading in manual.sections(PAGES[name]) if heading in COMMAND_SECTIONS]
        assert found == COMMAND_SECTIONS


@by_page
def test_header_and_name(name):
    """Title, section and name of a page are those of its file."""
    stem, _, section = name.rpartition(".")
    assert f"\n.Dt {stem.upper()} {section}\n" in PAGES[name]
    assert f"\n.Sh NAME\n.Nm {stem}\n.Nd " in PAGES[name]


def test_commands_are_listed():
    """xsave.1 lists every command with its page, in the order of the help."""
    listed = manual.items(manual.sections(PAGES["xsave.1"])["DESCRIPTION"])
    names = [name for name in listed if name in cli.COMMANDS]
    assert names == list(cli.COMMANDS)
    assert all(f".Xr xsave-{name} 1" in listed[name] for name in names)


@by_page
def test_references_lead_somewhere(name):
    """A page named in a reference is there, unless it is another program's; none names itself."""
    found = set(re.findall(r"\bXr (xsave[\w-]*) (\d)", PAGES[name]))
    assert {f"{stem}.{section}" for stem, section in found} <= set(PAGES) - {name}


# ---- what commands do


def test_exit_codes():
    """xsave.1 lists every exit code, with the meaning that `xsave --help` gives it."""
    listed = manual.items(manual.sections(PAGES["xsave.1"])["EXIT STATUS"])
    assert [int(code) for code in listed] == list(EXIT_CODES)
    for code, meaning in EXIT_CODES.items():
        assert listed[str(code)].lower().startswith(meaning.lower())


def test_environment():
    """Every variable of our own that the program reads is in xsave.1, and no other."""
    sources = "".join(path.read_text() for path in (ROOT / "xsave").rglob("*.py"))
    read = set(re.findall(r'"(_?XSAVE_[A-Z_]+)"', sources))
    listed = manual.items(manual.sections(PAGES["xsave.1"])["ENVIRONMENT"])
    assert set(listed) == read | {"XDG_RUNTIME_DIR"}


def test_rules_of_verify():
    """xsave-image.1 lists every rule under its severity, with what rules.py says of it."""
    findings = manual.sections(manual.sections(PAGES["xsave-image.1"])["FINDINGS"], "Ss")
    listed = [
        (rule, heading.lower().rstrip("s"), why.rstrip(".").lower())
        for heading, text in findings.items()
        if heading
        for rule, why in manual.items(text).items()
    ]
    assert listed == [(rule, severity, why.lower()) for rule, (severity, why) in RULES.items()]


def keys(kind):
    """Return the names of a dataclass's fields."""
    return {field.name for field in dataclasses.fields(kind)}


def test_json_keys(xsave_home):
    """The keys of JSON answers are in the pages of their commands."""
    expected = {
        "list": keys(DomainInfo),
        "save": keys(SaveResult),
        "migrate": keys(MigrateResult)
        | keys(DryRun)
        | keys(Round)
        | keys(Decided)
        | {"name", "host"},
        "info": set(open_host().info()),
        "host": set(describe(add_host("a"))),
        "image": set(summary(StreamDecoder(reader(image("xl"))))),
    }
    for command, names in expected.items():
        named = set(manual.macro_arguments(PAGES[f"xsave-{command}.1"], "Li"))
        lines = set(re.findall(r"^\.Li (\S+)", PAGES[f"xsave-{command}.1"], re.MULTILINE))
        assert names <= named | lines, command


# ---- examples


@by_page
def test_examples_parse(name, nothing_runs):
    """Every xsave command line of a page parses; a page of section 1 has one of its command."""
    found = manual.command_lines(manual.literal_blocks(PAGES[name]))
    for words in found:
        manual.parse(words)
    stem = name.removesuffix(".1").removeprefix("xsave-")
    assert not name.endswith(".1") or stem == "xsave" or any(stem in words for words in found)


def test_readme_commands_parse(nothing_runs):
    """Every xsave command line of the README parses; it shows the main commands."""
    found = manual.command_lines(manual.fenced_blocks(README))
    for words in found:
        manual.parse(words)
    shown = {word for words in found for word in words if word in cli.COMMANDS}
    assert shown >= {"create", "console", "save", "restore", "migrate", "host", "image", "list"}


def test_readme_names_commands_correctly():
    """`xsave WORD ...` in running text begins with a command."""
    found = re.findall(r"`xsave ([a-z][\w-]*)[^`]*`", README)
    assert found
    assert set(found) <= set(cli.COMMANDS)


def test_wrong_command_lines_do_not_parse(nothing_runs):
    """The tests above can fail: an unknown option, command or missing argument is an error."""
    for line in ("save dom1", "restore x --lazily", "image look x", "--home x list"):
        with pytest.raises(click.UsageError):
            manual.parse(line.split())


def test_readme_leads_somewhere():
    """Files and make targets that the README names are there."""
    links = re.findall(r"\]\((?!https?:)([^)]+)\)", README)
    paths = re.findall(r"\b((?:man|tests|bench)/[\w./-]*\w)", README)
    assert links and paths
    assert [path for path in links + paths if not (ROOT / path).exists()] == []
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"^    make ([\w-]+)", README, re.MULTILINE)) <= set(targets)


def test_changelog():
    """One Unreleased section on top, and the headings of Keep a Changelog."""
    headings = re.findall(r"^## \[(.+?)\]", TEXTS["CHANGELOG.md"], re.MULTILINE)
    assert headings[0] == "Unreleased"
    assert headings.count("Unreleased") == 1
    kinds = set(re.findall(r"^### (.+)$", TEXTS["CHANGELOG.md"], re.MULTILINE))
    assert kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


# ---- formatting


FORMATTERS = {
    "groff": ["groff", "-mdoc", "-Tutf8", "-ww", "-z"],
    "mandoc": ["mandoc", "-Tlint", "-Wwarning"],
}


@by_page
@pytest.mark.parametrize("tool", FORMATTERS)
def test_formatting(name, tool):
    """groff and mandoc have nothing to complain about."""
    if not shutil.which(tool):
        pytest.skip(f"{tool} is not installed")
    command = [*FORMATTERS[tool], str(manual.MAN / name)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout + result.stderr) == (0, "")


@by_page
def test_line_length(name):
    """Lines of a page are no longer than 100 characters, but for the title lines of tables."""
    long = [line for line in PAGES[name].splitlines() if len(line) > 100]
    assert [line for line in long if not line.startswith(".Bl -column")] == []
