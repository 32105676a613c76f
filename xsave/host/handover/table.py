"""The protocol of the hand-over, as data.

Nothing decides about a hand-over but these tables: journal.py takes no step that STEPS does not
have, play.py does what the rows say, recovery.py what VERDICTS says. A model checker
(tests/host/handover_model.py) goes through every order of their steps, messages, losses and deaths.

The source, by its journal                    The target, by its journal

    prepared --hold--> held                       receiving --offer--> ready
       |                |  '--give up--> given-up      |                 |'--take over--> running
       '---take back----+--> taken-back                '---abandon-------+-> abandoned       |
                                                                              end--> ended <-'

With post-copy a part of the guest's memory follows behind it, and in between it needs both hosts:

    ready --take over early--> partial --complete--> running
                                  |'--lose--> lost
                                  '--end--> ended

Before `held` the guest is the source's, by a lease that ends with the sender. Once held it stays
suspended until somebody takes it back or gives it up, and which of the two is right only the
target's journal says. A guest that is lost is stopped at the target, and what is held is an older
one: whether that is to go on no journal says.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

SOURCE, TARGET = "source", "target"


class State(StrEnum):
    """What a journal says of a side."""

    # of the source
    PREPARED = "prepared"  # the guest is here; it runs, or is suspended as long as the sender lives
    HELD = "held"  # suspended, whoever dies; the go-ahead may be on its way
    GIVEN_UP = "given-up"  # destroyed: it is at the target
    TAKEN_BACK = "taken-back"  # it goes on here
    # of the target
    RECEIVING = "receiving"
    READY = "ready"  # complete and paused; removed if the receiver dies
    RUNNING = "running"  # the guest is here
    PARTIAL = "partial"  # the guest is here, a part of its memory still at the source
    LOST = "lost"  # that part will never come: the guest is stopped for good
    ENDED = "ended"  # it was, and came to its end or went elsewhere
    ABANDONED = "abandoned"  # it never ran here and never will
    # of neither
    UNKNOWN = "unknown"  # there is no journal


class Step(StrEnum):
    """What changes a journal."""

    HOLD = "hold"
    GIVE_UP = "give up"
    TAKE_BACK = "take back"
    OFFER = "offer"
    TAKE_OVER = "take over"
    TAKE_OVER_EARLY = "take over early"
    COMPLETE = "complete"
    LOSE = "lose"
    ABANDON = "abandon"
    END = "end"


class Message(StrEnum):
    """What goes over the wire, in xl's words (host/handshake.py)."""

    READY = "ready"
    GO = "go"
    STARTED = "started"  # the report with status 0
    FAILED = "failed"  # the report with another
    PERMISSION = "permission"
    # post-copy: image/postwire.py
    PAGES = "pages"  # all that was left out is sent
    COMPLETED = "completed"  # and has come


class Act(StrEnum):
    """Of what kind a row is."""

    SEND = "send"
    RECEIVE = "receive"
    DO = "do"


class Verdict(StrEnum):
    """What a pair of journals means."""

    NOTHING = "nothing"  # it is over
    KEEP = "keep"  # the guest is the source's: abandon the copy, take the guest back
    HAND_ON = "hand on"  # the guest is the target's: give up the source's
    ASK_A_PERSON = "ask a person"  # nothing that was written down decides it


@dataclass(frozen=True)
class Row:
    """One thing an end does at a place, and where it stands then.

    lost: where it stands if that failed, or nobody can say whether it was done.
    """

    at: str
    act: Act
    what: Step | Message
    then: str
    lost: str


_S = State
#: Step -> (the states in which it may be taken, the one it leads to).
STEPS: dict[Step, tuple[frozenset[State], State]] = {
    Step.HOLD: (frozenset({_S.PREPARED}), _S.HELD),
    Step.GIVE_UP: (frozenset({_S.HELD}), _S.GIVEN_UP),
    Step.TAKE_BACK: (frozenset({_S.PREPARED, _S.HELD}), _S.TAKEN_BACK),
    Step.OFFER: (frozenset({_S.RECEIVING}), _S.READY),
    Step.TAKE_OVER: (frozenset({_S.READY}), _S.RUNNING),
    Step.ABANDON: (frozenset({_S.RECEIVING, _S.READY}), _S.ABANDONED),
    Step.TAKE_OVER_EARLY: (frozenset({_S.READY}), _S.PARTIAL),
    Step.COMPLETE: (frozenset({_S.PARTIAL}), _S.RUNNING),
    Step.LOSE: (frozenset({_S.PARTIAL}), _S.LOST),
    Step.END: (frozenset({_S.RUNNING, _S.PARTIAL}), _S.ENDED),
}
FIRST = {SOURCE: _S.PREPARED, TARGET: _S.RECEIVING}
#: A side in one of these has nothing left to decide by itself.
SETTLED = frozenset({_S.GIVEN_UP, _S.TAKEN_BACK, _S.RUNNING, _S.LOST, _S.ENDED, _S.ABANDONED})

#: The sender, from the last byte of the image on.
SENDER = (
    Row("sent", Act.RECEIVE, Message.READY, then="offered", lost="unsaid"),
    Row("offered", Act.DO, Step.HOLD, then="holding", lost="unsaid"),
    Row("holding", Act.SEND, Message.GO, then="asked", lost="unknown"),
    Row("asked", Act.RECEIVE, Message.STARTED, then="won", lost="unknown"),
    Row("asked", Act.RECEIVE, Message.FAILED, then="refused", lost="unknown"),
    Row("refused", Act.RECEIVE, Message.PERMISSION, then="unsaid", lost="unknown"),
    Row("won", Act.DO, Step.GIVE_UP, then="migrated", lost="unknown"),
    Row("unsaid", Act.DO, Step.TAKE_BACK, then="kept", lost="unknown"),
)
#: Where the guest stands still for no longer than this takes, and the target can be asked: it is
#: held while the target still works on the end of the image.
SENDER_LIVE = (
    Row("sent", Act.DO, Step.HOLD, then="held", lost="unsaid"),
    Row("held", Act.RECEIVE, Message.READY, then="holding", lost="unsaid"),
    *(row for row in SENDER if row.at not in ("sent", "offered")),
)
#: With post-copy: the copy's own process says STARTED, too, so that no death of the receiver keeps
#: the pages from the guest. It runs there already while it needs what is held here. What goes wrong
#: from then on only the target's journal knows.
SENDER_POSTCOPY = (
    *(row for row in SENDER_LIVE if row.what != Message.STARTED),
    Row("asked", Act.RECEIVE, Message.STARTED, then="behind", lost="unknown"),
    Row("behind", Act.SEND, Message.PAGES, then="served", lost="unknown"),
    Row("served", Act.RECEIVE, Message.COMPLETED, then="won", lost="unknown"),
)
#: Where the sender ends. "unknown": it asks both journals, as `xsave migrate --recover` does.
SENDER_ENDS = frozenset({"migrated", "kept", "unknown"})

#: The receiver, once its copy is complete.
RECEIVER = (
    Row("complete", Act.DO, Step.OFFER, then="offering", lost="failed"),
    Row("offering", Act.SEND, Message.READY, then="offered", lost="failed"),
    Row("offered", Act.RECEIVE, Message.GO, then="told", lost="failed"),
    Row("told", Act.DO, Step.TAKE_OVER, then="running", lost="unable"),
    Row("running", Act.SEND, Message.STARTED, then="taken", lost="taken"),
    Row("unable", Act.DO, Step.ABANDON, then="gave up", lost="failed"),
    Row("gave up", Act.SEND, Message.FAILED, then="said", lost="failed"),
    Row("said", Act.SEND, Message.PERMISSION, then="failed", lost="failed"),
)
#: With post-copy: it has nothing to do with the pages, and waits until they are there.
RECEIVER_POSTCOPY = (
    *(row for row in RECEIVER if row.at not in ("told", "running")),
    Row("told", Act.DO, Step.TAKE_OVER_EARLY, then="running", lost="unable"),
    Row("running", Act.SEND, Message.STARTED, then="partial", lost="partial"),
    Row("partial", Act.DO, Step.COMPLETE, then="whole", lost="taken"),
    Row("whole", Act.SEND, Message.COMPLETED, then="taken", lost="taken"),
)
#: Where the receiver ends. "failed": its copy is abandoned, unless it runs after all.
RECEIVER_ENDS = frozenset({"taken", "failed"})

_UNDECIDED = (_S.RECEIVING, _S.READY)
#: (the source's state, the target's) -> what it means. Pairs that are not here: ask a person.
VERDICTS: dict[tuple[State, State], Verdict] = {
    **{(_S.PREPARED, t): Verdict.KEEP for t in (*_UNDECIDED, _S.ABANDONED, _S.UNKNOWN)},
    **{(_S.HELD, t): Verdict.KEEP for t in (*_UNDECIDED, _S.ABANDONED)},
    **{(_S.HELD, t): Verdict.HAND_ON for t in (_S.RUNNING, _S.ENDED)},
    **{(_S.TAKEN_BACK, t): Verdict.KEEP for t in _UNDECIDED},
    **{(_S.TAKEN_BACK, t): Verdict.NOTHING for t in (_S.ABANDONED, _S.LOST, _S.ENDED, _S.UNKNOWN)},
    **{(_S.GIVEN_UP, t): Verdict.NOTHING for t in (_S.RUNNING, _S.ENDED, _S.ABANDONED, _S.UNKNOWN)},
    **{(_S.GIVEN_UP, t): Verdict.NOTHING for t in (_S.PARTIAL, _S.LOST)},
    # The source's journal is out of reach: the target may give up what does not run there.
    **{(_S.UNKNOWN, t): Verdict.KEEP for t in _UNDECIDED},
    **{(_S.UNKNOWN, t): Verdict.NOTHING for t in (_S.RUNNING, _S.ENDED, _S.ABANDONED)},
    **{(_S.UNKNOWN, t): Verdict.NOTHING for t in (_S.PARTIAL, _S.LOST)},
}


def verdict(source: State, target: State) -> Verdict:
    """Return what a pair of journals means."""
    return VERDICTS.get((source, target), Verdict.ASK_A_PERSON)
