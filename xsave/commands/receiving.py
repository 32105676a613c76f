"""migrate-receive: the far end of a migration."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from xsave import console
from xsave.commands.common import Settings, json_option, pass_settings
from xsave.commands.flows import STDIO, cpu_mismatch_option, domain_maker
from xsave.errors import ConnectionLost, StorageError, UsageError, XsaveError

if TYPE_CHECKING:
    from socket import socket

    from xsave.host.address import Listener
    from xsave.host.prestart import WaitingProcess
    from xsave.host.striping import Part
    from xsave.postponed import Postponed


@click.command("migrate-receive")
@click.option(
    "--listen",
    metavar="ADDRESS",
    help="Wait at a socket, tcp:ADDRESS:PORT or unix:PATH, neither encrypted nor authenticated.",
)
@click.option("--part", metavar="ID/NUMBER/COUNT", help="Be one of several connections.")
@click.option("--transaction", metavar="ID", help="The migration's id (default: a new one).")
@click.option("--postcopy", is_flag=True, help="A part of the memory may follow the guest.")
@click.option("--probe", is_flag=True, help="Take nothing: count what comes, for --dry-run.")
@cpu_mismatch_option
@json_option
@pass_settings
def migrate_receive(
    settings: Settings,
    listen: str | None,
    part: str | None,
    transaction: str | None,
    postcopy: bool,
    probe: bool,
    cpu_mismatch: str,
    as_json: bool,
) -> None:
    """The far end of a migration: a stream on stdin, answers on stdout."""
    from xsave.host.striping import Part, join

    settings.stdout_is_data = listen is None
    mine = Part.parse(part) if part else None
    if probe and (mine or listen or postcopy):
        raise UsageError("--probe excludes --part, --listen and --postcopy")
    if probe:
        from xsave.host.counting import count

        settings.open_host()  # or say that there is none
        count(sys.stdin.fileno(), sys.stdout.fileno())
        return
    if postcopy and (mine or listen):
        raise UsageError("--postcopy excludes --part and --listen (there the sender says it)")
    if mine and mine.number:
        join(settings.open_host().directory, mine, sys.stdin.fileno())
        return
    chosen = {"cpu-mismatch": cpu_mismatch, "transaction": transaction or ""}
    with settings.prestart() as process:
        if postcopy:
            answer = take_early(settings, process, sys.stdout.fileno(), chosen)
        elif listen is None:
            answer = take_at_stdin(settings, process, mine, chosen)
        else:
            with listening(settings, listen, as_json) as listener:
                answer = take_at_socket(settings, process, listener, chosen)
    sentence = f"{answer['name']}: received as domain {answer['domid']}"
    if listen and as_json:
        console.emit_json_line(answer)
    else:
        settings.answer(as_json, answer, sentence)


def take(
    settings: Settings,
    process: WaitingProcess,
    channel: str | Sequence[int],
    output: int,
    chosen: dict[str, str],
    postponed: Postponed | None = None,
) -> dict[str, Any]:
    """Take a domain from stdin or several descriptors; return the answer of the command."""
    from xsave import receive as verb
    from xsave.host.handover.journal import Journals

    host = settings.open_host()
    with settings.progress() as report:
        received = verb.receive(
            domain_maker(host, process, postponed.descriptors if postponed else ()),
            channel,
            output,
            Journals(host.directory),
            transaction=chosen["transaction"] or None,
            cpu_mismatch=chosen["cpu-mismatch"],
            nr_frames=host.nr_frames,
            postponed=postponed,
            report=report,
        )
    more = {"resumed_ns": received.resumed_ns, "transaction": received.transaction}
    return asdict(received.info) | more


def take_early(
    settings: Settings, process: WaitingProcess, output: int, chosen: dict[str, str]
) -> dict[str, Any]:
    """Take a domain from stdin that may run before all of its memory is here; its sender hears at
    the descriptor `output`.

    Raises HostCannotTake if this host cannot do that: before the sender has sent anything."""
    from xsave.host.filling import require_faults
    from xsave.postponed import Postponed

    host = settings.open_host()
    require_faults(host.machine)
    with Postponed(sys.stdin.fileno(), output, host.nr_frames) as postponed:
        return take(settings, process, STDIO, output, chosen, postponed)


def take_at_stdin(
    settings: Settings, process: WaitingProcess, part: Part | None, chosen: dict[str, str]
) -> dict[str, Any]:
    """Take a domain from stdin, and, as number 0 of several, from what the others bring."""
    from xsave.host.striping import Gathering

    output = sys.stdout.fileno()
    if part is None:
        return take(settings, process, STDIO, output, chosen)
    others = Gathering(settings.open_host().directory, part)
    try:
        fds = [os.dup(sys.stdin.fileno()), *others.fds]
        return take(settings, process, fds, output, chosen)
    finally:
        others.close()


@contextmanager
def listening(settings: Settings, listen: str, as_json: bool) -> Iterator[Listener]:
    """Listen, and say where."""
    from xsave.host.address import Address, Listener

    with Listener(Address.parse(listen)) as listener:
        if as_json:
            console.emit_json_line({"listening": listener.text})
        else:
            settings.say(f"listening on {listener.text}")
        yield listener


def take_at_socket(
    settings: Settings, process: WaitingProcess, listener: Listener, chosen: dict[str, str]
) -> dict[str, Any]:
    """Take a domain from the first one who connects and does not only want to see how fast that
    is; the sender hears there how that ended."""
    from xsave.host.address import say_goodbye

    with ExitStack() as stack:
        sock, options = accept_sender(listener)
        stack.enter_context(sock)
        chosen |= {key: value for key, value in options.items() if key in chosen}
        try:
            socks = [sock, *others_of(options.get("part"), listener, stack.enter_context)]
            listener.close()
            fds = [os.dup(one.fileno()) for one in socks]
            if len(fds) == 1:
                os.dup2(fds.pop(), sys.stdin.fileno())
            if "postcopy" in options and not fds:
                answer = take_early(settings, process, sock.fileno(), chosen)
            else:
                answer = take(settings, process, fds or STDIO, sock.fileno(), chosen)
        except XsaveError as e:
            say_goodbye(sock, f"{console.ERROR_PREFIX}{e}")
            raise
        say_goodbye(sock, json.dumps(answer))
        return answer


def accept_sender(listener: Listener) -> tuple[socket, dict[str, str]]:
    """Return the connection of one who has a domain, and its options."""
    from xsave.host.counting import count
    from xsave.host.handshake import welcome

    while True:
        sock = listener.accept()
        try:
            options = welcome(sock.fileno())
            if "probe" not in options:
                return sock, options
            with suppress(ConnectionLost):
                count(sock.fileno(), sock.fileno())
        except BaseException:
            sock.close()
            raise
        sock.close()


def others_of(
    part: str | None, listener: Listener, keep: Callable[[socket], socket]
) -> list[socket]:
    """Accept the other connections of a migration, in their order."""
    from xsave.host.handshake import welcome
    from xsave.host.striping import GATHER_TIMEOUT_S, Part

    if part is None:
        return []
    first = Part.parse(part)
    socks = []
    for number in range(1, first.count):
        sock = keep(listener.accept(GATHER_TIMEOUT_S))
        found = Part.parse(welcome(sock.fileno()).get("part", ""))
        if found != Part(first.token, number, first.count):
            raise StorageError(f"expected connection {number} of {first.token}, found {found}")
        socks.append(sock)
    return socks
