"""The command line's contract: exit codes, help, --json, what goes to stdout and what to stderr."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from xsave import cli as cli_module
from xsave import errors
from xsave.cli import cli
from xsave.commands.common import SIZE, pass_settings
from xsave.errors import EXIT_CODES

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def invoke(xsave_home):
    """Run a command line in this process, on an empty home."""
    return lambda *arguments, **options: CliRunner().invoke(cli, list(arguments), **options)


def commands(group=cli, prefix=()):
    """Yield every command with its words."""
    ctx = click.Context(group)
    for name in group.list_commands(ctx):
        command = group.get_command(ctx, name)
        yield (*prefix, name), command
        if isinstance(command, click.Group):
            yield from commands(command, (*prefix, name))


ALL = list(commands())


# ---- help


def test_the_contract_is_there():
    """Every command of this stage exists, under its name."""
    words = {" ".join(name) for name, _ in ALL}
    assert words >= {
        *("create", "list", "info", "console", "pause", "unpause", "shutdown", "destroy"),
        *("save", "restore", "migrate"),
        "migrate-receive",
        "demo",
        "host add",
        "host list",
        "host remove",
        *(f"image {verb}" for verb in ["info", "verify", "decode", "encode", "convert"]),
    }


@pytest.mark.parametrize("name", [name for name, _ in ALL], ids=" ".join)
def test_help_of_every_command(name, invoke):
    """--help and -h say what the command does, and exit with 0."""
    for option in ("--help", "-h"):
        result = invoke(*name, option)
        assert result.exit_code == 0
        assert f"Usage: xsave {' '.join(name)}" in result.output


@pytest.mark.parametrize(
    "command", [pytest.param(c, id=" ".join(n)) for n, c in ALL if not isinstance(c, click.Group)]
)
def test_every_command_takes_json(command):
    """--json is an option of every command, and each option says what it is for."""
    options = [p for p in command.params if isinstance(p, click.Option)]
    assert any("--json" in option.opts for option in options)
    assert [o.name for o in options if not o.help] == []


def test_help_names_every_exit_code(invoke):
    """The table of exit codes in the help is the one the errors use."""
    text = " ".join(invoke("--help").output.split())
    for code, meaning in EXIT_CODES.items():
        assert f"{code} {meaning}" in text


def test_every_error_has_a_documented_exit_code():
    """No error class exits with a code that EXIT_CODES does not explain."""
    classes = [c for c in vars(errors).values() if isinstance(c, type)]
    assert {c.exit_code for c in classes} <= set(EXIT_CODES)


def test_version(invoke):
    from xsave import __version__

    assert __version__ in invoke("--version").output


# ---- exit codes


class Raiser:
    """A command that fails in a given way."""

    def __init__(self, problem):
        self.problem = problem

    def __call__(self, invoke, *arguments, **options):
        @click.command()
        @click.option("--json", is_flag=True)
        @pass_settings
        def fail(settings, json):
            raise self.problem

        group = cli_module.Cli("xsave", params=cli.params, callback=cli.callback)
        group.get_command = lambda ctx, name: fail
        return CliRunner().invoke(group, [*arguments, "fail", *options.get("after", ())])


PROBLEMS = [
    (errors.XsaveError("x"), 1),
    (RuntimeError("x"), 1),
    (errors.UsageError("x"), 2),
    (click.UsageError("x"), 2),
    (errors.ImageError("x", offset=16, record="END"), 3),
    (errors.HostCannotTake("x"), 4),
    (errors.NotFound("x"), 5),
    (errors.NameTaken("x"), 5),
    (errors.SuspendFailed("x", stage="freeze"), 6),
    (errors.GuestStateError("x"), 6),
    (errors.StorageError("x"), 7),
    (errors.ConnectionLost("x"), 7),
    (errors.OutOfFrames(wanted=2, free=1, host="h"), 8),
    (errors.HandoverUndecided("x"), 9),
    (KeyboardInterrupt(), 130),
    (click.Abort(), 130),
]


@pytest.mark.parametrize(("problem", "code"), PROBLEMS, ids=lambda p: type(p).__name__)
def test_each_problem_has_its_exit_code(problem, code, invoke):
    """One line on stderr that begins with `xsave: error:`, nothing on stdout, no traceback."""
    result = Raiser(problem)(invoke)
    assert result.exit_code == code
    assert code in EXIT_CODES
    assert result.stdout == ""
    assert result.stderr.startswith("xsave: error: ")
    assert result.stderr.count("\n") == 1


def test_problems_cover_every_exit_code():
    """The list above leaves no documented code out."""
    assert {code for _, code in PROBLEMS} | {0} == set(EXIT_CODES)


@pytest.mark.parametrize(("problem", "code"), PROBLEMS, ids=lambda p: type(p).__name__)
def test_errors_in_json(problem, code, invoke):
    """With --json the error is a JSON object on stdout, and the line stays on stderr."""
    result = Raiser(problem)(invoke, after=["--json"])
    answer = json.loads(result.stdout)
    assert answer["exit_code"] == result.exit_code == code
    assert result.stderr == f"xsave: error: {answer['error']}\n"


def test_an_unexpected_exception_is_called_our_bug(invoke):
    """It says so in one line; -v adds the traceback."""
    raiser = Raiser(RuntimeError("boom"))
    assert "this is a bug in xsave: RuntimeError: boom" in raiser(invoke).stderr
    assert "Traceback" not in raiser(invoke).stderr
    assert "Traceback" in raiser(invoke, "-v").stderr


def test_xsave_debug_asks_for_the_traceback(invoke, monkeypatch):
    monkeypatch.setenv("XSAVE_DEBUG", "1")
    assert "Traceback" in Raiser(RuntimeError("boom"))(invoke).stderr


def test_a_message_is_one_line(invoke):
    """Whatever an error's text holds: scripts read lines."""
    assert Raiser(errors.StorageError("a\nb"))(invoke).stderr == "xsave: error: a b\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["nosuch"],
        ["--nosuch"],
        ["list", "--nosuch"],
        ["create"],
        ["create", "x", "memory=5"],
        ["create", "/dev/null"],
        ["create", "/dev/null", "name=x", "vcpus"],
        ["create", "/dev/null", "name=x"],
        ["create", "x", "--memory", "lots"],
        ["create", "x", "--memory", "1K"],
        ["create", "x", "--vcpus", "0"],
        ["create", "-bad-name"],
        ["create", "x y"],
        ["save", "x"],
        ["save", "x", "f", "-c", "-p"],
        ["save", "x", "f", "--compress-level", "0"],
        ["restore", "f", "--cpu-mismatch", "maybe"],
        ["migrate", "x"],
        ["host"],
        ["host", "add", "../x"],
        ["host", "add", "x", "--seed", "-1"],
        ["--progress", "loud", "list"],
        ["-q", "-v", "list"],
        [],
    ],
    ids=" ".join,
)
def test_usage_errors(arguments, invoke, xsave_home):
    """What makes no sense exits with 2 and leaves nothing behind."""
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert result.stderr
    assert result.stdout == ""
    assert [p for p in xsave_home.rglob("*") if p.name == "f"] == []


def test_usage_errors_say_where_help_is(invoke):
    assert "xsave save --help" in invoke("save").stderr


def test_a_usage_error_in_json_keeps_out_of_the_image(invoke):
    """`save NAME - --nosuch --json`: stdout may be a pipe into restore."""
    result = invoke("save", "x", "-", "--nosuch", "--json")
    assert result.stdout == ""
    assert '"exit_code": 2' in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["pause", "x"],
        ["unpause", "x"],
        ["destroy", "x"],
        ["shutdown", "x"],
        ["console", "x", "--log"],
        ["mem-set", "x", "64M"],
        ["vcpu-set", "x", "1"],
        ["save", "x", "f"],
        ["migrate", "x", "--to", "localhost"],
        ["migrate", "--to", "localhost"],
        ["migrate", "x", "--to", "nowhere"],
        ["--host", "nowhere", "list"],
        ["host", "remove", "nowhere"],
    ],
    ids=" ".join,
)
def test_not_found(arguments, invoke, tmp_path, monkeypatch):
    """What does not exist exits with 5 and makes no file."""
    monkeypatch.chdir(tmp_path)
    result = invoke(*arguments)
    assert result.exit_code == 5
    assert list(tmp_path.iterdir()) == []


def test_restore_of_what_is_not_there(invoke, tmp_path):
    assert invoke("restore", str(tmp_path / "none")).exit_code == 7


def test_restore_of_what_is_no_image(invoke, tmp_path):
    """3, with the offset, and no domain."""
    (tmp_path / "f").write_bytes(b"no image at all, but long enough to be one")
    result = invoke("restore", str(tmp_path / "f"))
    assert result.exit_code == 3
    assert "offset" in result.stderr
    assert json.loads(invoke("list", "--json").stdout) == []


def test_create_where_no_frames_are(invoke):
    """8: a guest larger than its host."""
    assert invoke("host", "add", "small", "--memory", "32M").exit_code == 0
    result = invoke("--host", "small", "create", "x", "--memory", "64M")
    assert result.exit_code == 8
    assert "small" in result.stderr


# ---- hosts


def test_hosts_come_and_go(invoke):
    """add, list, remove; a name is taken once."""
    made = invoke("host", "add", "h", "--memory", "64M", "--seed", "3", "--json")
    assert json.loads(made.stdout)["memory_bytes"] == 64 << 20
    assert invoke("host", "add", "h").exit_code == 5
    assert [h["name"] for h in json.loads(invoke("host", "list", "--json").stdout)] == ["h"]
    assert invoke("host", "remove", "h").exit_code == 0
    assert json.loads(invoke("host", "list", "--json").stdout) == []


def test_info_is_about_the_chosen_host(invoke):
    invoke("host", "add", "h", "--memory", "64M")
    facts = json.loads(invoke("--host", "h", "info", "--json").stdout)
    assert (facts["name"], facts["memory_bytes"]) == ("h", 64 << 20)
    assert "free_frames" in invoke("info").stdout


def test_empty_list(invoke):
    """A header without rows for people, an empty array for scripts."""
    assert invoke("list").stdout.split()[:2] == ["Name", "ID"]
    assert json.loads(invoke("list", "--all", "--json").stdout) == []


def test_talk_goes_to_stderr_and_can_be_silenced(invoke):
    """A command that only does something leaves stdout alone."""
    result = invoke("host", "add", "h", "--memory", "64M")
    assert result.stdout == ""
    assert "h: 64.0 MiB" in result.stderr
    assert invoke("-q", "host", "remove", "h").output == ""


# ---- sizes


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("64", 64 << 20),
        ("64M", 64 << 20),
        ("64m", 64 << 20),
        ("64MiB", 64 << 20),
        ("64MB", 64 << 20),
        ("1.5G", 3 << 29),
        ("4096k", 4 << 20),
        ("2 GiB", 2 << 30),
    ],
)
def test_sizes(text, size):
    """Binary units; a bare number is MiB, as in xl."""
    assert SIZE.convert(text, None, None) == size


@pytest.mark.parametrize(
    "text", ["", "M", "-1M", "1X", "1MM", "0", "0.001K", "nan", "1e3", "9" * 99]
)
def test_no_sizes(text):
    with pytest.raises(click.BadParameter):
        SIZE.convert(text, None, None)


# ---- as a process


def run(*arguments, home, **options):
    environment = os.environ | {"XSAVE_HOME": str(home)}
    command = [sys.executable, "-m", "xsave", *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, timeout=60, check=False, **options
    )


def modules_after(*arguments, home):
    """Return what is imported by the end of a command line."""
    code = (
        "import sys\nfrom xsave.cli import cli\ntry:\n cli.main(sys.argv[1:])\n"
        "finally:\n print('MODULES', sorted(sys.modules), file=sys.stderr)"
    )
    environment = os.environ | {"XSAVE_HOME": str(home)}
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    line = result.stderr.rpartition("MODULES ")[2]
    return {name.split(".")[0] for name in ast.literal_eval(line)}


HEAVY = {"numpy", "rich", "unicorn", "construct", "zstandard", "lz4", "capstone"}


@pytest.mark.parametrize("arguments", [["--help"], ["save", "--help"], ["image", "--help"], ["x"]])
def test_help_imports_nothing_heavy(arguments, xsave_home):
    """`xsave --help` starts as quick as Python and click do."""
    assert modules_after(*arguments, home=xsave_home) & HEAVY == set()


def test_create_does_without_the_emulator(xsave_home):
    """Only the domain's process loads it: the command is ready long before."""
    made = modules_after("-q", "create", "g", "--paused", home=xsave_home)
    assert made & HEAVY == {"numpy"}


def test_the_import_test_can_fail(xsave_home):
    """A command that needs numpy is seen to import it."""
    assert "numpy" in modules_after("list", home=xsave_home) & HEAVY


def test_a_reader_that_leaves_is_a_clean_stop(xsave_home):
    """`xsave list | true`: no message, no traceback, exit 0."""
    read, write = os.pipe()
    os.close(read)
    process = subprocess.Popen(
        [sys.executable, "-m", "xsave", "list"],
        cwd=ROOT,
        stdout=write,
        stderr=subprocess.PIPE,
    )
    os.close(write)
    _, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr) == (0, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_is_an_io_error(xsave_home):
    """`xsave list > /dev/full` exits with 7, not with a traceback."""
    with Path("/dev/full").open("wb") as full:
        process = subprocess.run(
            [sys.executable, "-m", "xsave", "list"],
            cwd=ROOT,
            stdout=full,
            stderr=subprocess.PIPE,
            timeout=60,
            check=False,
        )
    assert process.returncode == 7
    assert process.stderr.count(b"\n") == 1


def test_completion(xsave_home):
    """Click's completion knows the commands and the hosts."""
    run("host", "add", "other", "--memory", "64M", home=xsave_home)
    assert completions("xsave mi", 1, xsave_home) == {"migrate", "migrate-receive"}
    assert completions("xsave host remove ot", 3, xsave_home) == {"other"}


def completions(words, index, home):
    environment = os.environ | {
        "XSAVE_HOME": str(home),
        "_XSAVE_COMPLETE": "bash_complete",
        "COMP_WORDS": words,
        "COMP_CWORD": str(index),
    }
    result = subprocess.run(
        [sys.executable, "-m", "xsave"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return {line.partition(",")[2] for line in result.stdout.split()}
