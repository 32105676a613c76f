"""What a migration's two sides say of themselves, and what that means."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from xsave.errors import ConnectionLost, GuestStateError, NotFound, XsaveError
from xsave.guest.xen.domctl import Domctl
from xsave.host.handover.journal import Entry, Journal, Journals
from xsave.host.handover.table import SETTLED, SOURCE, State, Verdict, verdict
from xsave.host.host import Host, list_hosts
from xsave.host.registry import alive, connect_socket, has_ended

_ENOUGH_OF_AN_ID = 4


@dataclass(frozen=True)
class Side:
    """One end. domain: the state of its copy (xsave list), None if there is none.

    at_work: the command that began it lives."""

    host: str
    state: State
    domain: str | None = None
    at_work: bool = False


class FarEnd(Protocol):
    """The target, as the source asks it. Both raise ConnectionLost if it cannot be asked."""

    def look(self, transaction: str) -> Side: ...

    def abandon(self, transaction: str) -> Side:
        """Give its copy up, unless it runs; return how it stands then."""
        ...


@dataclass(frozen=True)
class Status:
    """A migration as it is known on a host. None: that side cannot be asked (unreachable says
    why)."""

    entry: Entry
    source: Side | None
    target: Side | None
    unreachable: str = ""

    @property
    def verdict(self) -> Verdict:
        """What is to be done; to ask a person also if a side cannot be asked that matters."""
        source = self.source.state if self.source else State.UNKNOWN
        if self.target is None:
            done = source in (State.GIVEN_UP, State.TAKEN_BACK)
            early = source == State.PREPARED
            return Verdict.NOTHING if done else Verdict.KEEP if early else Verdict.ASK_A_PERSON
        if source == State.TAKEN_BACK and self.target.domain is None:
            return Verdict.NOTHING  # whatever it was at the target, it is not there any more
        return verdict(source, self.target.state)

    @property
    def at_work(self) -> bool:
        return any(side is not None and side.at_work for side in (self.source, self.target))

    @property
    def in_hand(self) -> bool:
        """True while it is to be left alone. One that began here is its sender's work: when that is
        gone, the receiver may live a moment longer, to no avail."""
        mine = self.source if self.entry.role == SOURCE else None
        return mine.at_work if mine else self.at_work

    @property
    def finished(self) -> bool:
        """True if recovery has nothing to do."""
        return self.verdict == Verdict.NOTHING

    def to_json(self) -> dict[str, Any]:
        """Return what `xsave migrate --status --json` shows of it."""
        entry = self.entry
        return {
            "id": entry.transaction,
            "name": entry.name,
            "role": entry.role,
            "peer": entry.peer,
            "began": entry.began,
            "at_work": self.at_work,
            "finished": self.finished,
            "source": asdict(self.source) if self.source else None,
            "target": asdict(self.target) if self.target else None,
            "verdict": str(self.verdict),
            "meaning": meaning(self),
        }


def runs(side: Side) -> bool:
    """True if the copy of a side may do anything."""
    return side.domain not in (None, "crashed", "shutdown")


def is_second(target: Side) -> bool:
    """True if there is a guest at the target, besides one that the source has taken back."""
    if target.state == State.PARTIAL:
        return runs(target)
    return target.state == State.RUNNING and target.domain is not None


def in_part(target: Side) -> str:
    """Say how a guest stands whose memory did not all follow it (post-copy)."""
    there = f"it ran at {target.host} before all of its memory was there"
    if target.domain is None:
        return f"{there}, and its process there has died"
    if target.state == State.LOST or not runs(target):
        return f"{there}, and the rest never came: it is stopped there for good"
    return f"{there}, and nobody sends the rest any more"


def look(host: Host, role: str, transaction: str) -> Side:
    """Ask this host for its side."""
    journal = Journals(host.directory).get(role, transaction)
    if journal is None:
        return Side(host.name, State.UNKNOWN)
    entry = journal.read()
    return Side(host.name, entry.state, domain_state(host, entry), journal.at_work())


def copy_of(host: Host, entry: Entry, journal: Journal | None = None) -> Domctl | None:
    """Connect to the domain of a side, None if its process is gone; one that is about to go is
    waited for. journal: what is asked of it is asked for this migration. Raises ConnectionLost if
    it lives and does not answer."""
    directory = host.directory / "domains" / str(entry.domid)
    if entry.domid is None or not alive(directory):
        return None
    try:
        domctl = Domctl(host.machine, entry.domid, entry.name, connect_socket(directory))
    except ConnectionLost:
        if not has_ended(directory):
            raise
        return None
    domctl.journal = str(journal.path) if journal else None
    return domctl


def domain_state(host: Host, entry: Entry) -> str | None:
    """Return the state of a side's domain, None if it is gone."""
    copy = copy_of(host, entry)
    if copy is None:
        return None
    with copy, suppress(ConnectionLost):
        try:
            return copy.info().state
        except GuestStateError:
            return "building"
    return None


def select(host: Host, which: str | None) -> list[Journal]:
    """Return the journals of a host that an id, the beginning of one, or a name means; all of
    them for None. Raises NotFound."""
    journals = Journals(host.directory).all()
    if which is None:
        return journals
    entries = [(journal, journal.read()) for journal in journals]
    rules: list[Callable[[Entry], bool]] = [
        lambda e: e.transaction == which,
        lambda e: len(which) >= _ENOUGH_OF_AN_ID and e.transaction.startswith(which),
        lambda e: e.name == which,
    ]
    for fits in rules:
        if found := [journal for journal, entry in entries if fits(entry)]:
            return found
    raise NotFound(f"no migration {which} is known on host {host.name}")


def status(host: Host, journal: Journal, far_end: Callable[[Entry], FarEnd]) -> Status:
    """Ask both ends, as far as they can be asked."""
    entry = journal.read()
    mine = look(host, entry.role, entry.transaction)
    if entry.role == SOURCE:
        try:
            return Status(entry, mine, far_end(entry).look(entry.transaction))
        except XsaveError as e:
            return Status(entry, mine, None, str(e))
    for other in list_hosts():
        with suppress(NotFound):
            found = look(other, SOURCE, entry.transaction)
            if found.state != State.UNKNOWN:
                return Status(entry, found, mine)
    return Status(entry, None, mine)


def meaning(found: Status) -> str:
    """Say in a sentence what the two sides come to."""
    if found.at_work and found.target and found.target.state == State.PARTIAL:
        return f"the guest runs at {found.target.host}, and its memory is on the way there"
    if found.in_hand and not (found.source and found.source.state in SETTLED):
        return "the migration is at work"
    source, target = found.source, found.target
    if source is None or source.state == State.UNKNOWN:
        return _of_target(target)
    here = f"at {source.host}"
    if source.state == State.PREPARED:
        return f"it failed before the hand-over: the guest is {here}"
    if source.state == State.TAKEN_BACK:
        if target and is_second(target):
            return f"somebody has let it run {here} as well as at {target.host}: end one of them"
        return f"the guest stayed {here}"
    if source.state == State.GIVEN_UP:
        if target and target.state in (State.PARTIAL, State.LOST):
            return f"the guest was destroyed {here}; {in_part(target)}"
        if target and target.state in (State.RUNNING, State.ENDED):
            return f"the guest moved to {target.host}"
        return f"the guest was destroyed {here}"
    return _of_held(source, target, found)


def _of_target(target: Side | None) -> str:
    state = target.state if target else State.UNKNOWN
    return {
        State.RUNNING: "the guest moved here",
        State.PARTIAL: "the guest came here, and a part of its memory is still where it was",
        State.LOST: "the guest came here, and a part of its memory never did: it is stopped",
        State.ENDED: "the guest moved here, and has ended or moved on",
        State.ABANDONED: "the copy here was given up: the guest stayed where it was",
    }.get(state, "the sender is gone or silent: the copy here is to be given up")


def _of_held(source: Side, target: Side | None, found: Status) -> str:
    held = f"the guest is held at {source.host}"
    if source.domain is None:
        held = f"the guest was held at {source.host} and its process there has died"
    if target is None:
        return f"{held}; whether it runs at {found.entry.peer} is not known: {found.unreachable}"
    if target.state == State.UNKNOWN:
        return f"{held}; {target.host or found.entry.peer} has lost its journal, or is no xsave"
    if target.state in (State.PARTIAL, State.LOST):
        return f"{held} as it was before it moved; {in_part(target)}"
    if target.state == State.RUNNING and target.domain is None:
        return f"{held}; it ran at {target.host}, where its process has died"
    if target.state in (State.RUNNING, State.ENDED):
        return f"{held}, and is {target.host}'s: the copy at {source.host} is to be destroyed"
    return f"{held}, and never ran at {target.host}: it is to go on at {source.host}"
