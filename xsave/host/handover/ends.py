"""How the source of a migration asks the target's end: on this machine, or by a command there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from xsave.errors import ConnectionLost, GuestStateError, NotFound, UsageError
from xsave.host.asking import ask
from xsave.host.handover.journal import Entry, Journals
from xsave.host.handover.status import FarEnd, Side, copy_of, look
from xsave.host.handover.table import TARGET, State, Step
from xsave.host.host import Host
from xsave.host.receivers import open_target
from xsave.host.ssh import SshHost

#: Run this xsave command for the other end, asked for JSON; return its answer. Raises what it
#: failed with, NotFound if it knows no such migration, ConnectionLost if there is no answer.
Run = Callable[[Sequence[str]], Any]


def far_end(entry: Entry) -> FarEnd:
    """Return how the target of a migration that began here is asked. Raises ConnectionLost."""
    try:
        target = open_target(entry.peer)
    except (NotFound, UsageError) as e:
        raise ConnectionLost(str(e)) from e
    if isinstance(target, Host):
        return LocalEnd(target)
    if isinstance(target, SshHost):
        return CommandEnd(partial(ask, target))
    raise ConnectionLost(f"{entry.peer}: nobody can be asked there")


def abandon(host: Host, transaction: str) -> Side:
    """At the target: give the copy up, unless it runs; return how this side stands then.

    Raises StorageError if that cannot be written down."""
    journal = Journals(host.directory).get(TARGET, transaction)
    if journal is None:
        return Side(host.name, State.UNKNOWN)
    entry = journal.read()
    if entry.state in (State.RECEIVING, State.READY, State.ABANDONED):
        copy = copy_of(host, entry, journal)
        if copy is not None:
            with copy, suppress(ConnectionLost, GuestStateError):  # it has just died; it runs
                copy.give_up_copy()
        with suppress(GuestStateError):  # it runs
            journal.take(Step.ABANDON)
    return look(host, TARGET, transaction)


class LocalEnd:
    """A target on this machine."""

    def __init__(self, host: Host) -> None:
        self._host = host

    def look(self, transaction: str) -> Side:
        return look(self._host, TARGET, transaction)

    def abandon(self, transaction: str) -> Side:
        return abandon(self._host, transaction)


class CommandEnd:
    """A target that is asked by running xsave there."""

    def __init__(self, run: Run) -> None:
        self._run = run

    def look(self, transaction: str) -> Side:
        return self._ask("--status", transaction)

    def abandon(self, transaction: str) -> Side:
        return self._ask("--recover", transaction)

    def _ask(self, what: str, transaction: str) -> Side:
        try:
            answer = self._run(["migrate", what, transaction])
        except NotFound:
            return Side("", State.UNKNOWN)
        try:
            (side,) = [one["target"] for one in answer if one["role"] == TARGET]
            return Side(side["host"], State(side["state"]), side["domain"], bool(side["at_work"]))
        except (TypeError, KeyError, ValueError) as e:
            raise ConnectionLost(f"the other end's answer makes no sense: {answer!r}"[:500]) from e
