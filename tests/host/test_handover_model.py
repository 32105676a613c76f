"""The protocol of the hand-over, checked in every state it can come to; and that the check finds
what it is there for: each of these changes to the tables is one that somebody might make."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.host.handover_model import SOURCE_SIDE, Model, Tables, explore
from xsave.host.handover import table
from xsave.host.handover.table import Act, Message, Row, State, Step, Verdict

S = State


@pytest.fixture(params=[Tables, Tables.live, Tables.postcopy], ids=["plain", "live", "postcopy"])
def tables(request):
    """The tables of a migration, held late and early, and with post-copy."""
    return request.param()


def test_one_copy_runs_in_every_world(tables):
    """Whatever is lost, late or dies, with a recovery at either end at any time: never two running
    copies; and once both ends recover, exactly one, and no other is left. With post-copy it may be
    that none is: a guest that was lost on its way is stopped, and what is held stays held."""
    nr_worlds, wrong, _ = explore(Model(tables))
    assert wrong == ""
    assert nr_worlds > 40_000


@pytest.mark.slow
def test_two_recoveries_of_one_end(tables):
    """The same with two recoveries at the source at a time."""
    nr_worlds, wrong, _ = explore(Model(tables, recoveries=(SOURCE_SIDE, SOURCE_SIDE)))
    assert wrong == ""
    assert nr_worlds > 60_000


def test_domains_die_too(tables):
    """The processes of the domains themselves may die at any moment: a guest is lost with its own,
    but no second copy of it ever runs, and recoveries leave none that waits."""
    nr_worlds, wrong, _ = explore(Model(tables, recoveries=(SOURCE_SIDE,), mortal=True))
    assert wrong == ""
    assert nr_worlds > 10_000


def test_all_of_the_tables_is_explored():
    """No row, step or verdict is there that no world ever comes to: what is not explored would not
    be checked."""
    places, states, pairs = set(), set(), set()

    class Watching(Model):
        def next(self, w):
            places.update({w.sender, w.receiver})
            states.update({w.source, w.target})
            pairs.add((w.source, w.target))
            return super().next(w)

    explore(Watching(recoveries=(SOURCE_SIDE,)))
    explore(Watching(Tables.live(), recoveries=(SOURCE_SIDE,)))
    explore(Watching(Tables.postcopy(), recoveries=(SOURCE_SIDE,)))
    senders = (*table.SENDER, *table.SENDER_LIVE, *table.SENDER_POSTCOPY)
    rows = (*senders, *table.RECEIVER, *table.RECEIVER_POSTCOPY)
    assert {row.at for row in rows} | table.SENDER_ENDS | table.RECEIVER_ENDS <= places
    # A guest that ends is not in the model, nor is a host that is lost with its journals.
    beyond = {S.ENDED, S.UNKNOWN}
    assert set(S) - states == beyond
    by_hand = {  # somebody destroyed the guest, or let it run, while it was held
        (S.GIVEN_UP, S.ABANDONED),
        (S.GIVEN_UP, S.PARTIAL),
        (S.GIVEN_UP, S.LOST),
        (S.TAKEN_BACK, S.LOST),
    }
    assert {pair for pair in table.VERDICTS if not beyond & set(pair)} - pairs == by_hand


def changed(rows, at, what, **changes):
    """Return the rows with one changed."""
    assert any((row.at, row.what) == (at, what) for row in rows)
    return tuple(
        replace(row, **changes) if (row.at, row.what) == (at, what) else row for row in rows
    )


def allowing(step, *states):
    """Return a step that may be taken in more states."""
    allowed, after = table.STEPS[step]
    return {step: (allowed | set(states), after)}


GO_FIRST = (
    table.SENDER[0],
    Row("offered", Act.SEND, Message.GO, then="holding", lost="unsaid"),
    Row("holding", Act.DO, Step.HOLD, then="asked", lost="unknown"),
    *table.SENDER[3:],
)
START_FIRST = (
    Row("complete", Act.DO, Step.OFFER, then="told", lost="failed"),
    *table.RECEIVER[3:],
)
REPORT_FIRST = (
    *table.RECEIVER[:3],
    Row("told", Act.SEND, Message.STARTED, then="running", lost="unable"),
    Row("running", Act.DO, Step.TAKE_OVER, then="taken", lost="unable"),
    *table.RECEIVER[5:],
)
MUTATIONS = {
    "the go-ahead before the hold": Tables(sender=GO_FIRST),
    "taken back when the go-ahead may be on its way": Tables(
        sender=changed(table.SENDER, "holding", Message.GO, lost="unsaid")
    ),
    "taken back when no report comes": Tables(
        sender=changed(table.SENDER, "asked", Message.STARTED, lost="unsaid")
    ),
    "given up when the copy failed": Tables(
        sender=changed(table.SENDER, "asked", Message.FAILED, then="won")
    ),
    "held early, and taken back when the go-ahead may be on its way": Tables.live(
        sender=changed(table.SENDER_LIVE, "holding", Message.GO, lost="unsaid")
    ),
    "a guest that is held stays so, as its copy was not ready": Tables.live(
        verdicts={(S.HELD, S.ABANDONED): Verdict.NOTHING}
    ),
    "started before the go-ahead": Tables(receiver=START_FIRST),
    "reported before it is started": Tables(receiver=REPORT_FIRST),
    "said to have failed before it is abandoned": Tables(
        receiver=changed(table.RECEIVER, "told", Step.TAKE_OVER, lost="gave up")
    ),
    "said to have failed though it could not be abandoned": Tables(
        receiver=changed(table.RECEIVER, "unable", Step.ABANDON, lost="gave up")
    ),
    "an abandoned copy may run": Tables(steps=allowing(Step.TAKE_OVER, S.ABANDONED)),
    "a copy that runs may be abandoned": Tables(steps=allowing(Step.ABANDON, S.RUNNING)),
    "kept though the copy runs": Tables(verdicts={(S.HELD, S.RUNNING): Verdict.KEEP}),
    "handed on though the copy is abandoned": Tables(
        verdicts={(S.HELD, S.ABANDONED): Verdict.HAND_ON}
    ),
    "nobody decides about an abandoned copy": Tables(
        verdicts={(S.HELD, S.ABANDONED): Verdict.NOTHING}
    ),
    "a recovery that does not look twice": Tables(careful=False),
    "given up before the pages are sent": Tables.postcopy(
        sender=changed(table.SENDER_POSTCOPY, "asked", Message.STARTED, then="won")
    ),
    "given up before the pages have come": Tables.postcopy(
        sender=changed(table.SENDER_POSTCOPY, "behind", Message.PAGES, then="won")
    ),
    "taken back when the connection breaks": Tables.postcopy(
        sender=changed(table.SENDER_POSTCOPY, "behind", Message.PAGES, lost="unsaid")
    ),
    "said to have come before it is written down": Tables.postcopy(
        receiver=changed(table.RECEIVER_POSTCOPY, "partial", Step.COMPLETE, lost="whole")
    ),
    "what is held goes on when the guest was lost": Tables.postcopy(
        verdicts={(S.HELD, S.LOST): Verdict.KEEP}
    ),
    "what is held is given up when the guest was lost": Tables.postcopy(
        verdicts={(S.HELD, S.LOST): Verdict.HAND_ON}
    ),
    "a copy that runs in part may be abandoned": Tables.postcopy(
        steps=allowing(Step.ABANDON, S.PARTIAL)
    ),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mistake_in_the_tables_is_found(name):
    """The check fails, and shows how it comes to that."""
    _, wrong, path = explore(Model(MUTATIONS[name]))
    assert wrong
    assert len(path) > 1
