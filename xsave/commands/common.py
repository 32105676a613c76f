"""What all commands share: the options given before the command, `--json`, parameter types."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.shell_completion import CompletionItem

from xsave import console
from xsave.errors import StorageError, UsageError, XsaveError
from xsave.progress import Report

if TYPE_CHECKING:
    from xsave.guest.xen.domctl import Domctl
    from xsave.host.host import Host
    from xsave.host.prestart import WaitingProcess

_F = TypeVar("_F", bound=Callable[..., Any])


DEFAULT_HOST = "localhost"
#: Commands that do not work on the chosen host.
NO_HOST = ("host", "image", "demo", "torture")


@dataclass
class Settings:
    """The options before the command. `stdout_is_data`: the command writes an image there.

    failure: what a command that answers in lines adds to the last one if it fails."""

    host: str = DEFAULT_HOST
    quiet: bool = False
    verbose: bool = False
    progress_mode: str = "auto"
    stdout_is_data: bool = False
    failure: dict[str, Any] = field(default_factory=dict)

    def open_host(self) -> Host:
        """Open the chosen host. Raises NotFound."""
        from xsave.host.host import open_host

        return open_host(self.host)

    def send_away(self, command: str, arguments: Sequence[str]) -> int | None:
        """Run a command where the chosen host is, if that is another machine, and return its exit
        code; None if it is ours to do. Raises UsageError, ConnectionLost."""
        if self.host == DEFAULT_HOST or command in NO_HOST:
            return None
        from xsave.host.ssh import find_ssh_host, run_there

        if not (there := find_ssh_host(self.host)):
            return None
        if command == "migrate":
            raise UsageError(
                f"host {self.host} is on another machine, whose hosts `--to` would mean: "
                "run `xsave migrate` there"
            )
        switches = ["-q"] * self.quiet + ["-v"] * self.verbose
        terminal = command == "console" and sys.stdin.isatty() and sys.stdout.isatty()
        given = [*switches, "--progress", self.progress_mode, *arguments]
        return run_there(there, given, terminal=terminal)

    def prestart(self, kernel: str | None = None) -> WaitingProcess:
        """Start the process of a domain to come, before anything else is even imported. kernel:
        what it will be built from."""
        from xsave.host.paths import hosts_directory
        from xsave.host.prestart import WaitingProcess

        try:
            return WaitingProcess(hosts_directory() / self.host, kernel)
        except OSError as e:
            raise StorageError(f"cannot start the domain's process: {e}") from e

    def find(self, domain: str) -> Domctl:
        """Open a domain of the chosen host. Raises NotFound."""
        return self.open_host().find(domain)

    def progress(self) -> AbstractContextManager[Report]:
        """Give the `report` callable for a flow."""
        return console.progress(self.progress_mode, quiet=self.quiet, verbose=self.verbose)

    def say(self, message: str) -> None:
        """Tell a person, unless told to be quiet."""
        if not self.quiet:
            console.say(message)

    def answer(self, as_json: bool, result: object, sentence: str) -> None:
        """End a command that did something: its result as JSON, or a sentence on stderr."""
        if as_json:
            console.emit_json(result, stderr=self.stdout_is_data)
        else:
            self.say(sentence)


pass_settings = click.make_pass_decorator(Settings, ensure=True)


def json_option(function: _F) -> _F:
    """The option every command has."""
    option = click.option("--json", "as_json", is_flag=True, help="Answer (and fail) in JSON.")
    return option(function)


class Size(click.ParamType):  # type: ignore[type-arg]
    """A number of bytes: `64M`, `1.5GiB`, `4096K`; a bare number is MiB, as in xl."""

    name = "size"
    _UNITS = {"k": 10, "m": 20, "g": 30, "t": 40}
    _PATTERN = re.compile(r"(\d{1,9}(?:\.\d{1,6})?)\s*(?:([kmgt])(?:i?b)?)?", re.IGNORECASE)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        match = self._PATTERN.fullmatch(value.strip())
        if match is None:
            self.fail(f"{value!r} is no size (like 64M or 1G; a bare number is MiB)", param, ctx)
        size = int(float(match[1]) * (1 << self._UNITS[(match[2] or "m").lower()]))
        if size < 1 << 12:
            self.fail(f"{value!r} is less than one page", param, ctx)
        return size


class DomainName(click.ParamType):  # type: ignore[type-arg]
    """A domain by name or domid; the shell completes the names of the chosen host."""

    name = "name"

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        try:
            domains = (ctx.find_object(Settings) or Settings()).open_host().domains()
        except XsaveError:
            return []
        return [CompletionItem(d.name) for d in domains if d.name.startswith(incomplete)]


class HostName(click.ParamType):  # type: ignore[type-arg]
    """A host by name; the shell completes those there are."""

    name = "host"

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        from xsave.host.host import list_hosts
        from xsave.host.ssh import list_ssh_hosts

        try:
            names = [host.name for host in list_hosts()]
            names += [host.name for host in list_ssh_hosts()]
        except XsaveError:
            return []
        return [CompletionItem(name) for name in names if name.startswith(incomplete)]


SIZE = Size()
DOMAIN = DomainName()
HOST = HostName()
