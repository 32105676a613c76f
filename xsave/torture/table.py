"""The result: one line for each cell, and whether it is what the original series claims."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from xsave.torture.journal import Journal
from xsave.torture.point import FATES
from xsave.torture.settings import ON_OFF, Cell, claimed_clean

COLUMNS = (
    "preempt", "freezer", "stop_machine", "vCPUs", "window", "points", "stale", "register",
    "stack", "page", "guest failed", "as claimed",
)  # fmt: skip


def summarise(cells: Sequence[Cell], journal: Journal) -> list[dict[str, Any]]:
    """Return one object for each cell, in this order."""
    return [_summary(cell, journal) for cell in cells]


def _summary(cell: Cell, journal: Journal) -> dict[str, Any]:
    names = [sweep.name for sweep in cell.sweeps()]
    sweeps = [journal.sweeps[name] for name in names if name in journal.sweeps]
    tried = [p for at, p in journal.points.items() if at.rpartition("/")[0] in names]
    kinds = Counter(kind for point in tried for kind in point["kinds"])
    fates = Counter(point["fate"] for point in tried)
    stale = sum(bool(point["kinds"]) for point in tried)
    failed = sum(point["failed"] for point in tried)
    traced = [sweep["traced"] for sweep in sweeps]
    return {
        "preempt": cell.preempt,
        "freezer": ON_OFF[cell.freezer],
        "stop_machine": ON_OFF[cell.stop_machine],
        "vcpus": cell.vcpus,
        "points": len(tried),
        "stale": stale,
        "guest_failed": failed,
        "cell": cell.name,
        "window": sum(sweep["window"] for sweep in sweeps),
        "traced": None if None in traced else sum(traced),
        "instructions": sum(sweep["instructions"] for sweep in sweeps),
        "places": {kind: kinds[kind] for kind in ("register", "stack", "page")},
        "dead_stack": sum(bool(point["dead"]) for point in tried),
        "fates": {fate: fates[fate] for fate in FATES if fates[fate]},
        "claimed_clean": claimed_clean(cell),
        "as_claimed": claimed_clean(cell) == (not stale and not failed),
    }


def rows(summaries: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Return the cells of the table a person reads."""
    return [
        [
            *(str(s[key]) for key in ("preempt", "freezer", "stop_machine", "vcpus", "window")),
            *(str(s[key]) for key in ("points", "stale")),
            *(str(s["places"][kind]) for kind in ("register", "stack", "page")),
            str(s["guest_failed"]),
            "yes" if s["as_claimed"] else "NO",
        ]
        for s in summaries
    ]
