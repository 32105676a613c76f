"""How far a request on page tables is that may be preempted.

A page table may lead to as many others as the guest has frames: to validate them all, or to give
up what they name, takes too long to be done at a stroke. So a request that is preempted keeps
references of the type (`kept`) on the tables it has validated, and finds them done when it is made
again; and of the tables that nobody uses any more (`dying`) some are left for later. Nobody can
use these again before they have given up everything. Mirrors PGT_partial, old_guest_table and
put_old_guest_table of xen/arch/x86/mm.c.
"""

from __future__ import annotations

from collections.abc import Callable

#: What a request returns that must be made again.
ERESTART = 85


class Progress:
    """`dying` are (frame, level); `releasing` while somebody is at them. `preempted` is asked
    only within a request that can be made again."""

    def __init__(self) -> None:
        self.preempted: Callable[[], bool] | None = None
        self.nr_steps = 0
        self.kept: list[int] = []
        self.dying: list[tuple[int, int]] = []
        self.releasing = False

    def must_stop(self) -> bool:
        """True between two steps if somebody waits; never before the first, so that it ends."""
        return self.preempted is not None and self.nr_steps > 0 and self.preempted()
