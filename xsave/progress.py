"""What a flow reports while it works: frozen events, handed to a `report(event)` callable.

A leaf: imports nothing of xsave. Flows never print; the console draws these events, `--progress
json` writes them as lines, tests collect them in a list.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """A named step began (`freeze`, `suspend`, `pages`, `vcpus`, `sync`, ...)."""

    operation: str  # save, restore, migrate, create
    name: str
    detail: str = ""


@dataclass(frozen=True)
class Pages:
    """So many of the pages are through; zero pages are counted in both."""

    operation: str
    done_pages: int
    total_pages: int
    done_bytes: int  # bytes of the stream so far
    zero_pages: int = 0


@dataclass(frozen=True)
class Finished:
    """The operation is complete; `seconds` of wall time, `image_bytes` of stream."""

    operation: str
    seconds: float
    nr_pages: int
    image_bytes: int
    detail: str = ""


@dataclass(frozen=True)
class Round:
    """A round of a live migration is over. Rates in bytes a second; pending_pages: what was written
    meanwhile; deferred_pages: page tables that could not be sent yet; skipped_pages: what was
    written again before it was sent, and left out."""

    operation: str
    number: int
    nr_pages: int
    zero_pages: int
    deferred_pages: int
    nr_bytes: int
    seconds: float
    pending_pages: int
    dirty_rate: float
    bandwidth: float
    estimated_downtime_s: float
    skipped_pages: int = 0


@dataclass(frozen=True)
class Decided:
    """What a live migration does next (continue, stop-and-copy, cancel), and why."""

    operation: str
    action: str
    reason: str
    estimated_downtime_s: float
    throttle_percent: int = 0


@dataclass(frozen=True)
class Followed:
    """The pages that were left out of a migration have followed the guest; nr_faults of them it
    asked for, seconds from the report of the hand-over on."""

    operation: str
    nr_pages: int
    nr_faults: int
    seconds: float


Event = Followed | Stage | Pages | Finished | Round | Decided
Report = Callable[[Event], None]


def ignore(event: Event) -> None:
    """A report callable for callers that do not care."""


def undisturbed(report: Report) -> Report:
    """Return a report that tells nothing more once its reader has left (`| head -1`): what a flow
    does goes on as if somebody listened. Any other error of `report` is raised."""
    listening = True

    def tell(event: Event) -> None:
        nonlocal listening
        if not listening:
            return
        try:
            report(event)
        except BrokenPipeError:
            listening = False

    return tell
