"""Bring a migration to exactly one running copy, by what both ends wrote down.

The target is asked to give its copy up unless it runs. That is one write there, so its answer
cannot change any more; the source then goes on, or ends. Every step may be repeated, by whoever,
at any time: the journals take each only once.
"""

from __future__ import annotations

import time
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
from xsave.host.handover.status import FarEnd, Side, copy_of, in_part, is_second, runs
from xsave.host.handover.table import SETTLED, TARGET, State, Step, Verdict, verdict
from xsave.host.host import Host

#: How long a target may take to see that its source is gone.
_MOMENT_S, _LOOK_AGAIN_S = 5.0, 0.1
MIGRATED, KEPT, LOST, TWO = "migrated", "kept", "lost", "two"


@dataclass(frozen=True)
class Outcome:
    """What recovery came to. what: migrated (the guest is the target's), kept (the source's), lost
    (its process died, and with it the only copy, or what that needed), two (somebody has let both
    run)."""

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
        with suppress(XsaveError):
            end = ask(entry)
            target = _decided(end, end.look(entry.transaction), entry.transaction)
            if target.state in (State.PARTIAL, State.LOST):
                said = f"{entry.name}: the guest was destroyed here; {in_part(target)}"
                return Outcome(LOST, said)
        return Outcome(MIGRATED, f"{entry.name}: its guest is not here any more")
    with suppress(XsaveError):  # its copy can never run: it ends by itself as well
        target = ask(entry).abandon(entry.transaction)
        if is_second(target):
            return Outcome(TWO, f"{entry.name}: somebody has let it run here and at {target.host}")
    return _woken(host, journal, entry)


def _recover_target(host: Host, journal: Journal, named: bool) -> Outcome:
    entry = journal.read()
    if journal.at_work() and not named and entry.state in (State.RECEIVING, State.READY):
        raise GuestStateError(
            f"migration {entry.transaction} of {entry.name} to here is at work (name it by its id "
            "to give it up)"
        )
    if journal.at_work() and entry.state == State.PARTIAL:
        raise GuestStateError(f"migration {entry.transaction} of {entry.name} to here is at work")
    state = abandon(host, entry.transaction).state
    if state == State.LOST:
        raise HandoverUndecided(
            f"{entry.name}: it ran here before all of its memory was here, and the rest never "
            "came: it is stopped for good. What is left of it is at the source, see `xsave migrate "
            "--status` there",
            name=entry.name,
            transaction=entry.transaction,
        )
    if state == State.ABANDONED:
        return Outcome(KEPT, f"{entry.name}: the copy here is given up")
    return Outcome(MIGRATED, f"{entry.name}: the guest came here")


def _decide(host: Host, journal: Journal, entry: Entry, ask: Callable[[Entry], FarEnd]) -> Outcome:
    """The source is held: the target's journal decides."""
    try:
        end = ask(entry)
        target = _decided(end, end.abandon(entry.transaction), entry.transaction)
    except (ConnectionLost, StorageError) as e:
        raise undecided(host, entry, f"{entry.peer} cannot be asked: {e}") from e
    if target.state in (State.PARTIAL, State.LOST):
        raise lost_on_its_way(host, entry, target)
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


def _decided(end: FarEnd, target: Side, transaction: str) -> Side:
    """Return how the target stands when its memory has come, or it has seen that the rest never
    will: that takes it a moment."""
    deadline = time.monotonic() + _MOMENT_S
    while target.state == State.PARTIAL and runs(target) and time.monotonic() < deadline:
        time.sleep(_LOOK_AGAIN_S)
        target = end.look(transaction)
    return target


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


def lost_on_its_way(host: Host, entry: Entry, target: Side) -> HandoverUndecided:
    """What is said when the guest ran at the target and a part of its memory never came there."""
    command = f"xsave --host {host.name}"
    return HandoverUndecided(
        f"{entry.name}: {in_part(target)}. What is held here is the guest as it was before that: "
        f"nothing makes it run by itself. `{command} unpause {entry.name}` does, if what it did "
        f"at {target.host} may be forgotten (its disks have not forgotten it) and it does not run "
        f"there; `{command} destroy {entry.name}` gives it up",
        name=entry.name,
        transaction=entry.transaction,
    )


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
