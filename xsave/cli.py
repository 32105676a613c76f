"""The command `xsave`: its group, and the one place where errors become exit codes.

The commands live in xsave/commands and are imported when they are asked for. Everything that
ends a run goes through `run`: an XsaveError is one line on stderr and its own exit code; a
click usage error is 2; Ctrl-C (or SIGTERM) is 130; a reader of our stdout that left is a clean
stop; anything else is a bug of ours, 1, with a traceback if -v or XSAVE_DEBUG asks for it.
With --json the error is also a JSON object, where the answer would have been.
"""

from __future__ import annotations

import gc
import importlib
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NoReturn

import click

from xsave import __version__, console
from xsave.commands.common import Settings
from xsave.errors import EXIT_CODES, UsageError, XsaveError

#: Command -> where it is, below xsave.commands.
COMMANDS = {
    "create": "create:create",
    "list": "domain:list_domains",
    "info": "host:info",
    "console": "terminal:console",
    "pause": "domain:pause",
    "unpause": "domain:unpause",
    "shutdown": "domain:shutdown",
    "reboot": "domain:reboot",
    "destroy": "domain:destroy",
    "mem-set": "tuning:mem_set",
    "vcpu-set": "tuning:vcpu_set",
    "save": "flows:save",
    "restore": "flows:restore",
    "migrate": "migration:migrate",
    "migrate-receive": "receiving:migrate_receive",
    "host": "host:host",
    "image": "image:image",
    "demo": "demo:demo",
    "torture": "torture:torture",
}
_INTERRUPTED = 130
_REST = "xsave.rest"
_DEBUG_VARIABLE = "XSAVE_DEBUG"
_COMPLETE_VARIABLE = "_XSAVE_COMPLETE"


class Cli(click.Group):
    """A group that imports a command when it is wanted and ends every run in `run`."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[cmd_name].partition(":")
        command: click.Command = getattr(
            importlib.import_module(f"xsave.commands.{module}"), attribute
        )
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Note the command line behind our own options: it may be run on another machine."""
        ctx.meta[_REST] = list(args)
        return super().resolve_command(ctx, args)

    def main(self, args: Sequence[str] | None = None, *_: Any, **__: Any) -> NoReturn:
        """Run and exit, whatever click's own main would have done with the error."""
        if _COMPLETE_VARIABLE in os.environ:
            super().main(prog_name="xsave")
        code = run(self, list(sys.argv[1:] if args is None else args))
        sys.exit(code)


@click.group(
    cls=Cli,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: "
    + "; ".join(f"{code} {meaning}" for code, meaning in EXIT_CODES.items())
    + '. Completion for bash: eval "$(_XSAVE_COMPLETE=bash_source xsave)" (or zsh_source, '
    "fish_source). xsave(1) tells the whole story.",
)
@click.option("--host", default="localhost", metavar="NAME", help="The host to work on.")
@click.option("-q", "--quiet", is_flag=True, help="No talk; errors only.")
@click.option("-v", "--verbose", is_flag=True, help="More talk, and tracebacks of bugs.")
@click.option(
    "--progress",
    type=click.Choice(["auto", "json", "none"]),
    default="auto",
    help="auto: on a terminal; json: one line per event on stderr.",
)
@click.version_option(__version__, prog_name="xsave")
@click.pass_context
def cli(ctx: click.Context, host: str, quiet: bool, verbose: bool, progress: str) -> None:
    """Save, restore and migrate Xen PV guests, in Xen's own formats, without a Xen host."""
    if quiet and verbose:
        raise UsageError("--quiet and --verbose exclude each other")
    ctx.obj = settings = Settings(host, quiet, verbose, progress)
    status = settings.send_away(str(ctx.invoked_subcommand), ctx.meta[_REST])
    if status is not None:
        ctx.exit(status)


def run(group: click.Group, args: list[str]) -> int:
    """Run one command line and return its exit code; nothing is raised."""
    ctx: click.Context | None = None
    try:
        with group.make_context("xsave", list(args)) as ctx:
            group.invoke(ctx)
        sys.stdout.flush()
        return 0
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except BrokenPipeError:
        _forget_stdout()
        return 0
    except (KeyboardInterrupt, click.Abort):
        return _fail("interrupted", _INTERRUPTED, ctx, args)
    except Exception as problem:  # noqa: BLE001 - the one place that catches all
        return _report(problem, ctx, args)


def _report(problem: Exception, ctx: click.Context | None, args: list[str]) -> int:
    """Say what went wrong, return the exit code."""
    if isinstance(problem, XsaveError):
        return _fail(str(problem), problem.exit_code, ctx, args)
    if isinstance(problem, click.ClickException):
        if isinstance(problem, click.exceptions.NoArgsIsHelpError):
            with suppress(OSError):
                problem.show()
            return UsageError.exit_code
        return _fail(_usage_message(problem), UsageError.exit_code, ctx, args)
    settings = ctx and ctx.find_object(Settings)
    if (settings and settings.verbose) or os.environ.get(_DEBUG_VARIABLE):
        import traceback

        traceback.print_exception(problem)
    what = f"{type(problem).__name__}: {problem}"
    return _fail(f"this is a bug in xsave: {what}", XsaveError.exit_code, ctx, args)


def _usage_message(problem: click.ClickException) -> str:
    message = problem.format_message()
    ctx = getattr(problem, "ctx", None)
    return f"{message} (try `{ctx.command_path} --help`)" if ctx else message


def _fail(message: str, code: int, ctx: click.Context | None, args: list[str]) -> int:
    console.error(message)
    if "--json" in args:
        settings = (ctx and ctx.find_object(Settings)) or Settings()
        # A usage error comes before the command could claim stdout: any "-" may stand for it.
        data_on_stdout = settings.stdout_is_data or (code == UsageError.exit_code and "-" in args)
        answer = {"error": message, "exit_code": code}
        with suppress(OSError, XsaveError):
            if settings.failure:
                console.emit_json_line(answer | settings.failure)
            else:
                console.emit_json(answer, stderr=data_on_stdout)
    return code


def _forget_stdout() -> None:
    """Keep the interpreter from complaining about stdout when it exits."""
    with suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)


def _interrupt(_signal: int, _frame: object) -> NoReturn:
    raise KeyboardInterrupt


def main() -> NoReturn:
    """Entry point of the command `xsave`."""
    # A SIGTERM cleans up like a Ctrl-C: temporary files go, the guest runs on.
    signal.signal(signal.SIGTERM, _interrupt)
    # Nothing here is linear algebra: numpy need not start a thread per core for it.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    # What a command imports stays: looking for garbage in it takes a tenth of its start.
    gc.set_threshold(200_000)
    try:
        cli.main()
    except SystemExit as end:
        _end(end.code)


def _end(code: object) -> NoReturn:
    """Leave at once: to take the interpreter apart, with all its maps, takes 30 ms after a save
    of 1 GiB, and the kernel does the same in 7."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))
