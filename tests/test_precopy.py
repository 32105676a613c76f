"""The pre-copy policy, as a function of numbers: it ends, keeps its promises, gives its reason."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xsave.commands import migration
from xsave.precopy import (
    CANCEL,
    CONTINUE,
    DEFAULT_DOWNTIME_S,
    DEFAULT_TIMEOUT_S,
    MAX_ROUNDS,
    STOP,
    Limits,
    Progress,
    Stats,
    decide,
    simulate,
)
from xsave.rounds import dirty_after

rates = st.floats(0, 1e11)
stats = st.builds(
    Stats,
    nr_rounds=st.integers(1, 100),
    elapsed_s=st.floats(0, 1e4),
    pending_bytes=st.integers(0, 1 << 42),
    dirty_rate=rates,
    bandwidth=rates,
    overhead_s=st.floats(0, 10),
    stalled_rounds=st.integers(0, 50),
    throttle_percent=st.integers(0, 99),
    again_bytes=rates,
)
limits = st.builds(
    Limits,
    downtime_s=st.floats(0, 100),
    timeout_s=st.floats(0, 1e4),
    on_timeout=st.sampled_from([STOP, CANCEL]),
    auto_converge=st.booleans(),
)


@given(stats, limits)
def test_every_decision_has_a_reason(stats, limits):
    """One of three actions, some words, the estimate it is based on, a throttle that exists and
    never gets less."""
    decision = decide(stats, limits)
    assert decision.action in (CONTINUE, STOP, CANCEL)
    assert decision.reason
    assert decision.estimated_downtime_s == stats.downtime_s
    assert stats.throttle_percent <= decision.throttle_percent <= 99
    assert limits.auto_converge or decision.throttle_percent == stats.throttle_percent


@given(stats, limits)
def test_nothing_goes_on_for_ever(stats, limits):
    """Behind the time-out, or after the last round, it does not continue, whatever the rest."""
    late = replace(stats, elapsed_s=max(stats.elapsed_s, limits.timeout_s))
    assert decide(late, limits).action != CONTINUE
    worn = replace(stats, nr_rounds=max(stats.nr_rounds, MAX_ROUNDS))
    assert decide(worn, limits).action != CONTINUE


@given(stats, limits, st.floats(0, 100))
def test_who_allows_more_downtime_stops_no_later(stats, limits, more):
    """Monotone in the downtime: what stops for little stops for more, and what goes on for much
    goes on for less."""
    looser = replace(limits, downtime_s=limits.downtime_s + more)
    if decide(stats, limits).action == STOP:
        assert decide(stats, looser).action == STOP
    if decide(stats, looser).action == CONTINUE:
        assert decide(stats, limits).action == CONTINUE


@given(stats, limits, st.integers(0, 1 << 42))
def test_more_pending_is_never_better(stats, limits, more):
    """Monotone in the pending bytes, too: who would not fit with few does not with more."""
    worse = replace(stats, pending_bytes=stats.pending_bytes + more)
    if "are within" in decide(worse, limits).reason:
        assert "are within" in decide(stats, limits).reason


@given(stats, limits)
def test_the_promise_of_downtime(stats, limits):
    """It stops above the downtime that was asked for only where the operator let it: at the end
    of time, rounds or hope, with stop-and-copy. With cancel never."""
    decision = decide(stats, limits)
    if decision.action == STOP and decision.estimated_downtime_s > limits.downtime_s:
        assert limits.on_timeout == STOP
        assert "would" in decision.reason
    if decision.action == CANCEL:
        assert limits.on_timeout == CANCEL


@pytest.mark.parametrize(
    ("nr_rounds", "pending", "action"),
    [(1, 1 << 19, STOP), (1, 1 << 24, CONTINUE), (2, 1 << 24, STOP), (2, 1 << 30, CONTINUE)],
)
def test_the_first_round_is_followed_by_another(nr_rounds, pending, action):
    """What is left by the long first round is sent by a short one, though it would fit; unless it
    is next to nothing."""
    seen = Stats(nr_rounds, 1.0, pending, 0.0, 1e9)
    assert decide(seen, Limits(downtime_s=0.3)).action == action


@pytest.mark.parametrize(
    ("again", "downtime", "action"),
    [
        (7 << 20, 0.3, CONTINUE), (9 << 20, 0.3, STOP), (16 << 20, 0.3, STOP),
        (9 << 20, 0.01, CONTINUE),
    ],
)  # fmt: skip
def test_a_second_round_is_to_be_worth_it(again, downtime, action):
    """Of 16 MiB that fit into the downtime anyway, it is to leave less than half."""
    seen = Stats(1, 1.0, 16 << 20, 0.0, 1e9, again_bytes=again)
    decision = decide(seen, Limits(downtime_s=downtime))
    assert decision.action == action
    assert ("more than asked for" in decision.reason) == (downtime == 0.01)


def test_auto_converge_throttles_step_by_step():
    """Each round that brought nothing throttles more, up to 99 %; then hope is over."""
    seen = Stats(3, 1.0, 1 << 32, 1e9, 1e9, stalled_rounds=3)
    percents = []
    while (decision := decide(seen, Limits(auto_converge=True))).action == CONTINUE:
        seen = replace(seen, throttle_percent=decision.throttle_percent)
        percents.append(decision.throttle_percent)
    assert percents == [20, 30, 40, 50, 60, 70, 80, 90, 99]
    assert decision.action == STOP


def test_hopeless_rounds_are_not_waited_for_to_no_end():
    """Three rounds that brought nothing: stop-and-copy at once, cancel only at the time-out, as
    the guest may calm down."""
    seen = Stats(5, 1.0, 1 << 32, 1e9, 1e9, stalled_rounds=3)
    assert decide(seen, Limits(on_timeout=STOP)).action == STOP
    assert decide(seen, Limits(on_timeout=CANCEL)).action == CONTINUE


def test_progress_is_counted():
    """A tenth less than the least so far is progress; a throttle begins the count anew."""
    progress = Progress()
    for pending, stalled in ((100, 0), (80, 0), (75, 1), (90, 2), (60, 0), (60, 1)):
        progress.saw(pending)
        assert progress.stalled_rounds == stalled
    progress.begin_anew()
    progress.saw(1000)
    assert progress.stalled_rounds == 0


@given(
    st.integers(0, 1 << 36), rates, st.floats(1, 1e11), st.floats(0, 1), limits, st.floats(0, 1e10)
)
def test_a_simulation_ends(first, rate, bandwidth, overhead, limits, set_bytes):
    """Whatever was measured: an outcome, within the rounds, and if the guest is moved, all bytes
    sent at least once."""
    estimate = simulate(first, lambda s: min(rate * s, set_bytes), bandwidth, overhead, limits)
    assert estimate.outcome in (STOP, CANCEL)
    assert 1 <= estimate.nr_rounds <= MAX_ROUNDS
    assert estimate.bytes_sent >= (first if estimate.outcome == STOP else 0)
    assert estimate.total_s >= estimate.downtime_s >= 0


def test_what_is_written_all_the_time_is_sent_once_or_half():
    """32 MiB of 96 within any time there is: what a round leaves out, half of that, comes at the
    stop; and the stop comes behind the first round, as no other one would bring anything."""
    estimate = simulate(96 << 20, lambda s: 32 << 20 if s else 0, 1e9, 0.0, Limits())
    assert (estimate.outcome, estimate.nr_rounds) == (STOP, 1)
    assert estimate.bytes_sent == (96 - 16 + 32) << 20


@given(st.lists(st.tuples(st.floats(0.01, 10), st.floats(0, 1e9)), min_size=1, max_size=5))
def test_between_two_looks_writes_are_taken_to_be_even(steps):
    """At each look what it found, between in proportion, and never less than nothing."""
    looks = [(0.0, 0.0)]
    for seconds, nr_bytes in steps:
        looks.append((looks[-1][0] + seconds, looks[-1][1] + nr_bytes))
    for (a, low), (b, high) in pairwise(looks):
        assert dirty_after(b, looks) == pytest.approx(high)
        assert dirty_after((a + b) / 2, looks) == pytest.approx((low + high) / 2)
    assert dirty_after(looks[-1][0] + 1, looks) >= looks[-1][1]
    assert dirty_after(5, [(0, 0), (1, 10), (2, 0)]) == 0


def test_the_command_has_the_same_defaults():
    """It does not import the policy only to show them."""
    assert migration.DOWNTIME_MS == DEFAULT_DOWNTIME_S * 1000
    assert migration.TIMEOUT_S == DEFAULT_TIMEOUT_S
    assert migration.ENDINGS == (STOP, CANCEL)
