"""Bring a migration to exactly one running copy, by what both ends wrote down.

The target is asked to give its copy up unless it runs. That is one write there, so its answer
cannot change any more; the source then goes on, or ends. Every step may be repeated, by whoever,
at any time: the journals take each only once.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from xsave.errors import (
    ConnectionLost,
    GuestStateError,
    HandoverUndecided,
    StorageError,
    XsaveError,
)
from xsave.host.handover.ends import abandon, far_end
from xsave.host.handover.journal import Entry, Journal
from xsave.host.handover.status import FarEnd, copy_of
from xsave.host.handover.table import SETTLED, TARGET, State, Step, Verdict, verdict
from xsave.host.host import Host

MIGRATED, KEPT, LOST, TWO = "migrated", "kept", "lost", "two"


@dataclass(frozen=True)
class Outcome:
    """What recovery came to. what: migrated (the guest is the target's), kept (the source's), lost
    (its process died, and with it the only copy), two (somebody has let both run)."""

    what: str
    said: str


def recover(
    host: Host,
    journal: Journal,
    ask: Callable[[Entry], FarEnd] = far_end,
    *,
    working: bool = False,
    named: bool = False,
) -> Outcome:
    """Recover one side. working: whoever asks is the one who works on it; named: an incoming
    copy is given up though its receiver waits for the sender.

    Raises HandoverUndecided (the target cannot be asked, or does not know), GuestStateError (it
    is at work), StorageError."""
    entry = journal.read()
    if entry.role == TARGET:
        return _recover_target(host, journal, named)
    if journal.at_work() and not working:
        raise GuestStateError(f"migration {entry.transaction} of {entry.name} is at work")
    if entry.state == State.PREPARED:
        with suppress(GuestStateError):  # it was held meanwhile
            journal.take(Step.TAKE_BACK, only_in=State.PREPARED)
        entry = journal.read()
    if entry.state == State.HELD:
        return _decide(host, journal, entry, ask)
    if entry.state == State.GIVEN_UP:
        return Outcome(MIGRATED, f"{entry.name}: its guest is not here any more")
    with suppress(XsaveError):  # its copy can never run: it ends by itself as well
        target = ask(entry).abandon(entry.transaction)
        if target.state == State.RUNNING and target.domain:
            return Outcome(TWO, f"{entry.name}: somebody has let it run here and at {target.host}")
    return _woken(host, journal, entry)


def _recover_target(host: Host, journal: Journal, named: bool) -> Outcome:
    entry = journal.read()
    if journal.at_work() and not named and entry.state in (State.RECEIVING, State.READY):
        raise GuestStateError(
            f"migration {entry.transaction} of {entry.name} to here is at work (name it by its id "
            "to give it up)"
        )
    state = abandon(host, entry.transaction).state
    if state == State.ABANDONED:
        return Outcome(KEPT, f"{entry.name}: the copy here is given up")
    return Outcome(MIGRATED, f"{entry.name}: the guest came here")


def _decide(host: Host, journal: Journal, entry: Entry, ask: Callable[[Entry], FarEnd]) -> Outcome:
    """The source is held: the target's journal decides."""
    try:
        target = ask(entry).abandon(entry.transaction)
    except (ConnectionLost, StorageError) as e:
        raise undecided(host, entry, f"{entry.peer} cannot be asked: {e}") from e
    if target.state not in SETTLED and target.state != State.UNKNOWN:
        raise undecided(host, entry, f"the copy at {target.host} could not be given up")
    decision = verdict(State.HELD, target.state)
    if decision == Verdict.KEEP:
        return _woken(host, journal, entry)
    if decision != Verdict.HAND_ON:
        raise undecided(host, entry, f"{entry.peer} does not know of it (any more)")
    if target.state == State.RUNNING and target.domain is None:
        raise undecided(host, entry, f"it ran at {target.host}, where its process has died")
    copy = copy_of(host, entry, journal)
    if copy is None:
        journal.take(Step.GIVE_UP)
    else:
        with copy:
            copy.destroy()
    return Outcome(MIGRATED, f"{entry.name}: the guest is at {target.host}, and here no more")


def _woken(host: Host, journal: Journal, entry: Entry) -> Outcome:
    """The guest is the source's: have it run."""
    copy = copy_of(host, entry, journal)
    if copy is not None:
        with copy, suppress(ConnectionLost):
            if copy.info().state == "suspended":
                with suppress(GuestStateError):  # for another save or migration
                    copy.resume()
            journal.take(Step.TAKE_BACK)
            return Outcome(KEPT, f"{entry.name}: the guest goes on here")
    journal.take(Step.TAKE_BACK)
    if entry.state == State.TAKEN_BACK:
        return Outcome(KEPT, f"{entry.name}: the guest stayed here, and has ended")
    return Outcome(LOST, f"{entry.name}: the guest was here, and its process has died")


def undecided(host: Host, entry: Entry, why: str) -> HandoverUndecided:
    """What is said when nobody can know."""
    command = f"xsave --host {host.name} migrate"
    return HandoverUndecided(
        f"the hand-over of {entry.name} to {entry.peer or 'the other end'} is undecided, it stays "
        f"suspended here: {why}. `{command} --status {entry.transaction}` shows both ends, "
        f"`{command} --recover {entry.transaction}` decides; `xsave --host {host.name} unpause "
        f"{entry.name}` or `destroy` does without the other end, if you know that it runs there "
        "not, or does",
        name=entry.name,
        transaction=entry.transaction,
    )
