"""console: a guest's console on this terminal."""

from __future__ import annotations

import sys

import click

from xsave import console as output
from xsave.commands.common import DOMAIN, Settings, json_option, pass_settings


@click.command()
@click.argument("name", type=DOMAIN)
@click.option("--log", is_flag=True, help="Print everything so far and end.")
@json_option
@pass_settings
def console(settings: Settings, name: str, log: bool, as_json: bool) -> None:
    """Attach to a guest's console; Ctrl-] leaves.

    Without a terminal on stdin: stdin goes to the guest, its output to stdout, until the domain
    ends or stdin does.
    """
    settings.stdout_is_data = not (log and as_json)
    with settings.find(name) as domctl:
        if log:
            show_log(name, domctl.console_log(), as_json)
            return
        from xsave.host.terminal import relay

        ended = relay(domctl.console_attach(), sys.stdin.fileno(), sys.stdout.fileno())
    settings.answer(as_json, {"name": name, "ended": ended}, f"{name}: {ended}")


def show_log(name: str, log: bytes, as_json: bool) -> None:
    """Print a console's output as the bytes they are, or as JSON text."""
    if as_json:
        output.emit_json({"name": name, "log": log.decode("utf-8", "replace")})
    else:
        output.raw(log)
