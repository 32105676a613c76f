"""Suspends at random moments of a busy guest, each restored on other frames."""

from __future__ import annotations

import random
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

from xsave.errors import GuestStateError
from xsave.torture import forks
from xsave.torture.inmemory import make_directory
from xsave.torture.laboratory import Laboratory
from xsave.torture.point import FATES, Memo, attempt
from xsave.torture.settings import ON_OFF, Cell, Settings
from xsave.torture.stale import live
from xsave.torture.worker import remember

#: Instructions between two tries, at most.
_MOST_INSTRUCTIONS = 200_000


def suspends(cell: Cell, settings: Settings, nr: int) -> dict[str, Any]:
    """Try nr suspends; return what the JSON of a cell holds. The same seed gives the same ones."""
    share = -(-nr // settings.jobs)
    children = []
    for first in range(0, nr, share):
        numbers = range(first, min(first + share, nr))
        children.append(forks.start(partial(_part, cell, settings, numbers)))
    parts = [forks.answer(*child) for child in children]
    fates: Counter[str] = Counter()
    stale = failed = 0
    for part in parts:
        assert isinstance(part, list)
        for fate, is_stale, is_failed in part:
            fates[fate] += 1
            stale += is_stale
            failed += is_failed
    return {
        "preempt": cell.preempt,
        "freezer": ON_OFF[cell.freezer],
        "stop_machine": ON_OFF[cell.stop_machine],
        "vcpus": cell.vcpus,
        "points": sum(fates.values()),
        "stale": stale,
        "guest_failed": failed,
        "fates": {fate: fates[fate] for fate in FATES if fates[fate]},
    }


def _part(cell: Cell, settings: Settings, numbers: range) -> list[tuple[str, bool, bool]]:
    """Try the suspends with these numbers: each is led to from the one before, tried or not."""
    memo: Memo = {}
    results = []
    with make_directory() as directory:
        lab = Laboratory(cell, settings, Path(directory))
        lab.clockwork.first = None
        rng = random.Random(settings.seed)
        for number in range(numbers.stop):
            lead_on(lab, rng)
            if number in numbers:
                outcome = forks.in_child(lambda: attempt(lab, memo))
                remember(memo, outcome)
                results.append((outcome.fate, bool(live(list(outcome.stale))), outcome.failed))
    return results


def lead_on(lab: Laboratory, rng: random.Random) -> None:
    """Let the guest run for a random number of instructions, until a vCPU is in the middle of
    something."""
    left = rng.randrange(1, _MOST_INSTRUCTIONS)
    while True:
        if not lab.clockwork.turn(left):
            raise GuestStateError("the guest stands still")
        if not lab.door.xen.vcpu.blocked:
            return
