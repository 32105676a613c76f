"""A model of two hosts that hand over a guest, explored state by state.

The tables are the program's own (xsave/host/handover/table.py). Around them the model has what the
program has: two commands, two domain processes that do one request after the other, a journal at
either end, a wire each way, recoveries. At any moment any of these may happen: a message is lost or
late, a wait is given up (time-out, cut link, Ctrl-C), a request was sent and its answer is not
awaited, a command dies, a journal cannot be written, a recovery dies or cannot reach the target,
and all of that again. A lost message is a wait that was given up.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

from xsave.host.handover import table
from xsave.host.handover.table import Act, Message, State, Step, Verdict

DEAD = "dead"
#: A domain at the source: under the sender's lease (it runs, or will if the sender dies), held, on
#: its own, gone.
LEASED, HELD, FREE, GONE = "leased", "held", "free", "gone"
#: A domain at the target: paused and the receiver's; running; gone. With post-copy it runs in part,
#: or whole and nobody has written that down, or is stopped as the rest never came.
COPY, RUNS = "copy", "runs"
PART, WHOLE, STOPPED = "part", "whole", "stopped"


@dataclass(frozen=True)
class Tables:
    """What is checked. careful: a recovery takes back only what it has seen prepared."""

    steps: dict = None
    sender: tuple = table.SENDER
    receiver: tuple = table.RECEIVER
    verdicts: dict = None
    careful: bool = True

    @classmethod
    def live(cls, **changes):
        """Those of a migration whose guest is held early."""
        return cls(**{"sender": table.SENDER_LIVE, **changes})

    @classmethod
    def postcopy(cls, **changes):
        """Those of a migration with post-copy."""
        rows = {"sender": table.SENDER_POSTCOPY, "receiver": table.RECEIVER_POSTCOPY}
        return cls(**{**rows, **changes})

    def __post_init__(self):
        object.__setattr__(self, "steps", {**table.STEPS, **(self.steps or {})})
        object.__setattr__(self, "verdicts", {**table.VERDICTS, **(self.verdicts or {})})

    def after(self, state, step):
        """Return the journal's state after a step, None if it refuses."""
        allowed, after = self.steps[step]
        if state == after:
            return state
        return after if state in allowed else None


class World(NamedTuple):
    """All of it. A recovery is (place, what it has seen)."""

    source: State = State.PREPARED
    target: State = State.RECEIVING
    here: str = LEASED
    there: str = COPY
    sender: str = "sent"
    receiver: str = "complete"
    to_target: tuple = ()
    to_source: tuple = ()
    asked_here: tuple = ()  # requests of the sender to its domain; it waits for the last one
    asked_there: tuple = ()
    answer_here: str = ""
    answer_there: str = ""
    late_here: frozenset = frozenset()  # requests of recoveries that nobody may wait for any more
    late_there: frozenset = frozenset()
    recoveries: tuple = ()
    deaths: bool = False  # of domains


IDLE = ("idle", None)
SOURCE_SIDE, TARGET_SIDE = "source", "target"


class Model:
    """The worlds that follow a world. recoveries: which sides they are run on, at once; mortal:
    the domains' processes die, too."""

    def __init__(self, tables=None, recoveries=(SOURCE_SIDE, TARGET_SIDE), mortal=False):
        self.tables = tables or Tables()
        self.mortal = mortal
        self.sides = recoveries
        self._settled = {}

    def first(self):
        """The image is through, nothing was said yet."""
        return World(recoveries=(IDLE,) * len(self.sides))

    def next(self, w):
        """Yield every world that may follow."""
        yield from self._command(w, "sender", self.tables.sender)
        yield from self._command(w, "receiver", self.tables.receiver)
        yield from self._domain_here(w)
        yield from self._domain_there(w)
        if self.mortal:
            yield w._replace(here=GONE, deaths=True)
            yield w._replace(there=GONE, deaths=True)
        for number, side in enumerate(self.sides):
            yield from self._recovery(w, number, side)

    # ---- the two commands

    def _command(self, w, who, rows):
        place = getattr(w, who)
        here = [row for row in rows if row.at == place]
        if place == DEAD or not here:
            return
        yield self._die(w, who)
        row = here[0]
        lost = w._replace(**{who: row.lost})
        if row.act == Act.RECEIVE:
            yield lost
            inbox = "to_source" if who == "sender" else "to_target"
            queue = getattr(w, inbox)
            if place == "served" and queue and queue[0] == Message.STARTED:
                yield w._replace(**{inbox: queue[1:]})  # the receiver's, behind the other
            for row in here:
                if queue and queue[0] == row.what:
                    yield w._replace(**{who: row.then, inbox: queue[1:]})
        elif row.act == Act.SEND:
            yield lost
            if row.what == Message.PAGES and w.here != HELD:
                return  # they are not the guest's any more
            outbox = "to_target" if who == "sender" else "to_source"
            sent = {outbox: (*getattr(w, outbox), row.what)}
            yield w._replace(**{who: row.then, **sent})
            yield w._replace(**{who: row.lost, **sent})
        else:
            yield from self._do(w, who, row)

    def _die(self, w, who):
        """Or end: its requests stay, nobody waits for their answers."""
        answer = "answer_here" if who == "sender" else "answer_there"
        return w._replace(**{who: DEAD, answer: ""})

    def _do(self, w, who, row):
        """Ask the domain's process, and wait; or not."""
        if row.what == Step.OFFER:  # the receiver writes that itself
            state = self.tables.after(w.target, row.what)
            if state:
                yield w._replace(target=state, receiver=row.then)
                yield w._replace(target=state, receiver=row.lost)
            yield w._replace(receiver=row.lost)
            return
        if row.what == Step.COMPLETE:  # the domain's process writes that, and says so
            if w.target == State.RUNNING and w.there == RUNS:
                yield w._replace(receiver=row.then)
            yield w._replace(receiver=row.lost)
            return
        asked, answer = (
            ("asked_here", "answer_here") if who == "sender" else ("asked_there", "answer_there")
        )
        queue, said = getattr(w, asked), getattr(w, answer)
        waiting = (row.at, row.what)
        if said == "yes":
            done = w._replace(**{answer: ""})
            yield from self._and_write(done, who, row)
        elif said == "no":
            yield w._replace(**{answer: "", who: row.lost})
        elif waiting not in queue:
            yield w._replace(**{asked: (*queue, waiting)})
            yield w._replace(**{who: row.lost})
        else:
            yield w._replace(**{who: row.lost})

    def _and_write(self, w, who, row):
        """TAKE_BACK and ABANDON are written down by the command too: the domain may have had no
        reason to."""
        if row.what in (Step.TAKE_BACK, Step.ABANDON):
            side = "source" if who == "sender" else "target"
            state = self.tables.after(getattr(w, side), row.what)
            yield w._replace(**{who: row.lost})
            if state:
                yield w._replace(**{side: state, who: row.then})
        else:
            yield w._replace(**{who: row.then})

    # ---- the two domain processes

    def _domain_here(self, w):
        if w.here == GONE:
            if w.asked_here or w.late_here:
                answer = "no" if self._waits(w.sender, w.asked_here, self.tables.sender) else ""
                yield w._replace(asked_here=(), late_here=frozenset(), answer_here=answer)
            return
        if w.asked_here:
            (_, step), *rest = w.asked_here
            waits = not rest and self._waits(w.sender, w.asked_here, self.tables.sender)
            w2 = w._replace(asked_here=tuple(rest))
            for after in self._serve_here(w2, step, ours=True):
                done = after != w2
                answer = ("yes" if done else "no") if waits else ""
                yield after._replace(answer_here=answer)
        elif w.sender not in {row.at for row in self.tables.sender} and w.here == LEASED:
            yield w._replace(here=FREE)  # it hears that the sender is no more
        for step in w.late_here:
            yield from self._serve_here(
                w._replace(late_here=w.late_here - {step}), step, ours=False
            )

    def _waits(self, place, queue, rows):
        """Whether the command still waits for the last request it made."""
        return bool(queue) and place == queue[-1][0] and place in {row.at for row in rows}

    def _serve_here(self, w, step, *, ours):
        yield w  # the journal cannot be written, or the request makes no sense
        state = self.tables.after(w.source, step)
        if step == Step.HOLD and w.here == LEASED and state:
            yield w._replace(source=state, here=HELD)
        elif step == Step.GIVE_UP and (w.here == HELD or ours) and state:
            yield w._replace(source=state, here=GONE)
        elif step == Step.TAKE_BACK and w.here == HELD and state:
            yield w._replace(source=state, here=FREE)
        elif step == Step.TAKE_BACK and w.here == LEASED and ours:
            yield w._replace(here=FREE)

    def _domain_there(self, w):
        if w.there == GONE:
            if w.asked_there or w.late_there:
                waits = self._waits(w.receiver, w.asked_there, self.tables.receiver)
                # Who wants it gone finds it gone.
                gone = waits and w.asked_there[-1][1] == Step.ABANDON
                answer = ("yes" if gone else "no") if waits else ""
                yield w._replace(asked_there=(), late_there=frozenset(), answer_there=answer)
            return
        if w.asked_there:
            (_, step), *rest = w.asked_there
            waits = not rest and self._waits(w.receiver, w.asked_there, self.tables.receiver)
            w2 = w._replace(asked_there=tuple(rest))
            for after in self._serve_there(w2, step):
                answer = ("yes" if after != w2 else "no") if waits else ""
                yield after._replace(answer_there=answer)
        elif w.there in (PART, WHOLE, STOPPED):
            yield from self._pages(w)
        elif w.receiver not in {row.at for row in self.tables.receiver} and w.there == COPY:
            state = self.tables.after(w.target, Step.ABANDON)
            if state:
                yield w._replace(target=state, there=GONE)
            yield w._replace(there=GONE)
        for step in w.late_there:
            yield from self._serve_there(w._replace(late_there=w.late_there - {step}), step)

    def _pages(self, w):
        """A guest whose memory follows it. The connection may be cut at any time, and is when the
        sender has ended; the pages are the source's, held."""
        if w.there == PART:
            written = self.tables.after(w.target, Step.LOSE)
            yield w._replace(there=STOPPED)
            if written:
                yield w._replace(there=STOPPED, target=written)
            if w.to_target and w.to_target[0] == Message.PAGES:
                yield w._replace(there=WHOLE, to_target=w.to_target[1:])
        else:
            step, there = (Step.COMPLETE, RUNS) if w.there == WHOLE else (Step.LOSE, STOPPED)
            written = self.tables.after(w.target, step)
            if written and written != w.target:
                yield w._replace(there=there, target=written)

    def _serve_there(self, w, step):
        yield w
        state = self.tables.after(w.target, step)
        if step == Step.TAKE_OVER_EARLY and w.there == COPY and state:
            said = (*w.to_source, Message.STARTED)  # by the process that fetches pages
            yield w._replace(target=state, there=PART, to_source=said)
            yield w._replace(target=state, there=PART)
        if step == Step.TAKE_OVER and w.there == COPY and state:
            yield w._replace(target=state, there=RUNS)
        elif step == Step.ABANDON and w.there == COPY and state:
            yield w._replace(target=state, there=GONE)

    # ---- recoveries (recovery.py, ends.py)

    def _recovery(self, w, number, side):
        place, seen = w.recoveries[number]

        def at(place, seen=None, **changes):
            recoveries = list(w.recoveries)
            recoveries[number] = (place, seen)
            return w._replace(recoveries=tuple(recoveries), **changes)

        if place != "idle":
            yield at("idle")  # it dies, cannot reach the other end, cannot write
        yield from (self._ask_target if side == TARGET_SIDE else self._source_recovery)(
            w, at, place, seen
        )

    def _source_recovery(self, w, at, place, seen):
        at_work = w.sender in {row.at for row in self.tables.sender}
        if place == "idle":
            yield at("read", w.source)
        elif place == "read":
            if at_work:
                yield at("idle")
            elif seen == State.PREPARED:
                state = self.tables.after(w.source, Step.TAKE_BACK)
                if state and (w.source == State.PREPARED or not self.tables.careful):
                    yield at("reread", source=state)
                else:
                    yield at("reread")
            else:
                yield at("known", seen)
        elif place == "reread":
            yield at("known", w.source)
        elif place == "known":
            if seen == State.HELD:
                yield at("ask", seen)
            elif seen == State.TAKEN_BACK:
                yield at("wake")
                yield at("ask", seen)
            else:
                yield at("idle")
        elif place in ("ask", "ask domain", "ask journal"):
            yield from self._ask_target(w, at, place, seen)
        elif place == "told":
            yield from self._decide(w, at, seen)
        elif place in ("wake", "end"):
            step = Step.TAKE_BACK if place == "wake" else Step.GIVE_UP
            yield at(f"{place} journal", late_here=w.late_here | {step})
            if w.here == GONE:
                yield at(f"{place} journal")
        elif place in ("wake journal", "end journal"):
            step = Step.TAKE_BACK if place == "wake journal" else Step.GIVE_UP
            refused = w.here == HELD if step == Step.TAKE_BACK else w.here != GONE
            if step not in w.late_here and not refused:
                state = self.tables.after(w.source, step)
                yield at("idle", source=state or w.source)

    def _decide(self, w, at, seen):
        before, target = seen
        if before == State.TAKEN_BACK:
            yield at("wake")
            return
        verdict = self.tables.verdicts.get((State.HELD, target), Verdict.ASK_A_PERSON)
        died = target == State.RUNNING and w.there == GONE
        if target not in table.SETTLED or verdict == Verdict.ASK_A_PERSON or died:
            yield at("idle")
        else:
            yield at("wake" if verdict == Verdict.KEEP else "end")

    def _ask_target(self, w, at, place, seen):
        """ends.abandon: through the domain's process if there is one, then by the journal."""
        if place in ("idle", "ask"):
            if w.target in (State.RECEIVING, State.READY, State.ABANDONED):
                if w.there != GONE:
                    yield at("ask domain", seen, late_there=w.late_there | {Step.ABANDON})
                yield at("ask journal", seen)  # it is gone, or not known yet
            else:
                yield at("told", (seen, w.target))
        elif place == "ask domain":
            if Step.ABANDON not in w.late_there and w.there != COPY:
                yield at("ask journal", seen)
        elif place == "ask journal":
            state = self.tables.after(w.target, Step.ABANDON) or w.target
            yield at("told", (seen, state), target=state)

    # ---- what must hold

    def wrong(self, w):
        """Return what is wrong with a world, "" if nothing is."""
        if w.there in (RUNS, PART, WHOLE) and w.here in (LEASED, FREE):
            return "two copies run"
        if w.there == STOPPED and w.here in (LEASED, FREE):
            return "an older copy runs than the guest was"
        if w.there == PART and w.here != HELD and not w.deaths:
            return "the guest's memory is gone before it came"
        return self._wrong_when_settled(w)

    def _wrong_when_settled(self, w):
        """Everybody dies, what was asked is done, both ends recover: one copy must be left."""
        core = (*w[:4], w.asked_here, w.asked_there, w.late_here, w.late_there, w.deaths)
        core += (Message.PAGES in w.to_target,)
        if core not in self._settled:
            self._settled[core] = self._settle_both_ways(w)
        return self._settled[core]

    def _settle_both_ways(self, w):
        for order in ((SOURCE_SIDE, TARGET_SIDE), (TARGET_SIDE, SOURCE_SIDE)):
            for late_first in (False, True):
                end = self._settle(w, order, late_first)
                running = (end.here == FREE) + (end.there == RUNS)
                # What was lost on its way: a person says what becomes of what is held.
                lost = (end.here, end.there, end.target) == (HELD, STOPPED, State.LOST)
                if lost and not w.deaths:
                    continue
                if running > 1 or (not running and not w.deaths):
                    return f"{running} copies run when all is recovered ({order}): {end}"
                # One that ran, and whose process died: a person says what becomes of the other.
                died = w.deaths and end.target == State.RUNNING and end.there == GONE
                died |= w.deaths and end.target in (State.PARTIAL, State.LOST)
                if end.there == COPY or (end.here in (LEASED, HELD) and not died):
                    return f"a copy is left when all is recovered ({order}): {end}"
                verdict = self.tables.verdicts.get((end.source, end.target))
                if verdict != Verdict.NOTHING and not died:
                    return f"it is not over when all is recovered ({order}): {end}"
        return ""

    def _settle(self, w, order, late_first):
        w = self._die(self._die(w, "sender"), "receiver")
        w = w._replace(recoveries=())
        if not late_first:
            w = self._serve_all(w)
        for side in (*order, *order):
            w = self._recovered(w, side)
        return w

    def _serve_all(self, w):
        """Domain processes do what they can: the last of what may follow is success."""
        while True:
            following = list(self._domain_here(w)) or list(self._domain_there(w))
            if not following:
                return w
            best = [f for f in following if f[:4] != w[:4]] or following
            w = best[0]

    def _recovered(self, w, side):
        """One recovery to its end, with nothing in its way."""
        alone = Model(self.tables, (side,))
        w = w._replace(recoveries=(IDLE,))
        for _ in range(50):
            following = [
                f for f in alone._recovery(w, 0, side) if f.recoveries[0] != IDLE or f[:4] != w[:4]
            ]
            if following:
                asked = [f for f in following if f.recoveries[0][0] == "ask domain"]
                w = (asked or following)[-1]
            w = alone._serve_all(w)
            if w.recoveries[0][0] == "told" and side == TARGET_SIDE:
                break
            if not following:
                break
            if w.recoveries[0] == IDLE:
                break
        return alone._serve_all(w._replace(recoveries=()))


def explore(model, limit=2_000_000):
    """Return (number of worlds, what is wrong with the first that is, how it came to be)."""
    first = model.first()
    came_from = {first: None}
    queue = deque([first])
    while queue:
        world = queue.popleft()
        if wrong := model.wrong(world):
            return len(came_from), wrong, path(came_from, world)
        for following in model.next(world):
            if following not in came_from:
                came_from[following] = world
                queue.append(following)
        assert len(came_from) < limit, "too many worlds"
    return len(came_from), "", []


def path(came_from, world):
    """Return how a world came to be, from the first one on."""
    steps = []
    while world is not None:
        steps.append(world)
        world = came_from[world]
    return steps[::-1]
