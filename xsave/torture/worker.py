"""One worker: a laboratory of its own, one sweep, a part of its points.

Its answers are lines: first what the window is, then each point as it was tried. The points come
in order and the guest is led through the window once; every try is a child.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from xsave.torture import forks
from xsave.torture.inmemory import make_directory
from xsave.torture.laboratory import Laboratory
from xsave.torture.plan import choose
from xsave.torture.point import FINE, LUCK, Memo, Outcome, attempt
from xsave.torture.settings import Settings, Sweep
from xsave.torture.stale import live
from xsave.torture.window import Point

Emit = Callable[[dict[str, Any]], None]
_MOST_PLACES = 4
#: Of the instructions that qualify, a quick run tries each so manieth.
_QUICK_STEP = 17


def work(
    sweep: Sweep, settings: Settings, limit: int, part: tuple[int, int], done: set[int], emit: Emit
) -> None:
    """Try the points of one part, (which, of how many), that are not done."""
    with make_directory() as directory:
        lab = Laboratory(sweep.cell, settings, Path(directory))
        lab.prepare(sweep)
        gc.freeze()
        if settings.quick:
            sweep_quickly(lab, sweep, limit, done, emit)
            return
        rips, depths = forks.in_child(lambda: survey(lab, sweep))
        chosen = choose(rips, depths, settings, limit)
        if part[0] == 0:
            traced = None
            if settings.trace:
                traced = forks.in_child(lambda: lab.window(sweep.vcpu).trace())
            emit(facts_of(sweep, rips, chosen, traced))
        mine = set(chosen[part[0] :: part[1]].tolist()) - done
        sweep_points(lab, sweep, mine, emit)


def survey(lab: Laboratory, sweep: Sweep) -> tuple[np.ndarray, np.ndarray]:
    """Return rip and depth of every point of the window, (n,) u64 each."""
    points = [(p.rip, p.depth) for p in lab.window(sweep.vcpu).walk()]
    both = np.array(points, np.uint64).reshape(-1, 2)
    return both[:, 0], both[:, 1]


def facts_of(
    sweep: Sweep, rips: np.ndarray, chosen: np.ndarray, traced: int | None
) -> dict[str, Any]:
    """What a journal holds of a sweep: its window, the instructions in it, how many are tried."""
    return {
        "sweep": sweep.name,
        "window": int(rips.size),
        "instructions": int(np.unique(rips).size),
        "planned": int(chosen.size),
        "traced": traced,
    }


def sweep_points(lab: Laboratory, sweep: Sweep, numbers: set[int], emit: Emit) -> None:
    """Try these points of a sweep."""
    memo: Memo = {}
    for point in points_of(lab, sweep, numbers):
        outcome = forks.in_child(lambda: attempt(lab, memo))
        remember(memo, outcome)
        emit(line_of(sweep, point, lab.symbols.name(point.rip), outcome))


def sweep_quickly(lab: Laboratory, sweep: Sweep, limit: int, done: set[int], emit: Emit) -> None:
    """Try the first boundary of some instructions at which a register holds a frame number: found
    on the way, without a survey of the window."""
    seen: set[int] = set()
    candidates = planned = window = 0
    memo: Memo = {}
    for point in lab.window(sweep.vcpu).walk():
        window += 1
        if point.rip in seen:
            continue
        seen.add(point.rip)
        if planned == limit or not lab.held():
            continue
        candidates += 1
        if candidates % _QUICK_STEP:
            continue
        planned += 1
        if point.index not in done:
            outcome = forks.in_child(lambda: attempt(lab, memo))
            remember(memo, outcome)
            emit(line_of(sweep, point, lab.symbols.name(point.rip), outcome))
    emit(
        {
            "sweep": sweep.name,
            "window": window,
            "instructions": len(seen),
            "planned": planned,
            "traced": None,
        }
    )


def points_of(lab: Laboratory, sweep: Sweep, numbers: set[int]) -> Iterator[Point]:
    """Lead the guest to each of these points, as far as the last of them."""
    last = max(numbers, default=-1)
    for point in lab.window(sweep.vcpu).walk():
        if point.index > last:
            return
        if point.index in numbers:
            yield point


def remember(memo: Memo, outcome: Outcome) -> None:
    if outcome.image:
        fate = FINE if outcome.fate == LUCK else outcome.fate
        memo[outcome.image] = (fate, outcome.detail)


def line_of(sweep: Sweep, point: Point, name: str, outcome: Outcome) -> dict[str, Any]:
    """What a journal holds of a point."""
    found = live(list(outcome.stale))
    return {
        "at": f"{sweep.name}/{point.index}",
        "instruction": name,
        "fate": outcome.fate,
        "failed": outcome.failed,
        "kinds": sorted({stale.kind for stale in found}),
        "dead": len(outcome.stale) - len(found),
        "places": [f"{stale.where} = {stale.value:#x}" for stale in found[:_MOST_PLACES]],
        "image": outcome.image,
        "detail": outcome.detail if outcome.failed or not outcome.image else "",
    }
