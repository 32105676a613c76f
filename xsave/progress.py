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


Event = Stage | Pages | Finished
Report = Callable[[Event], None]


def ignore(event: Event) -> None:
    """A report callable for callers that do not care."""
