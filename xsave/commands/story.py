"""What the demo finds and shows: the guest's ticks, the chapters, the proof."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from xsave import console
from xsave.commands.common import Settings
from xsave.errors import GuestStateError

if TYPE_CHECKING:
    from xsave.compare import Comparison
    from xsave.host.host import Host

GUEST = "demo"
TICK = re.compile(rb"^TICK (\d+) ([0-9a-f]+)\r?$", re.MULTILINE)
TICK_TIMEOUT_S = 20.0
_POLL_S = 0.05


@dataclass
class Story:
    """What happened; `ticks` are those each incarnation of the guest printed."""

    ticks: dict[str, list[int]] = field(default_factory=dict)
    hashes: set[str] = field(default_factory=set)
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def gapless(self) -> bool:
        """True if the guest counted on through every move, and its memory's hash held."""
        seen = [tick for ticks in self.ticks.values() for tick in ticks]
        return seen == list(range(1, len(seen) + 1)) and len(self.hashes) == 1


def chapter(settings: Settings, text: str) -> None:
    """Say what comes next."""
    detail(settings, f"* {text}", indent="")


def detail(settings: Settings, text: str, indent: str = "    ") -> None:
    """Say what came of it."""
    if not settings.quiet:
        console.text(indent + text, stderr=settings.stdout_is_data)


# ---- ticks


def ticks_so_far(story: Story, host: Host) -> list[int]:
    """Return the numbers the guest printed on this host; note the hashes."""
    with host.find(GUEST) as domctl:
        return ticks_in(story, domctl.console_log())


def ticks_in(story: Story, output: bytes) -> list[int]:
    """Return the numbers of the ticks in a console's output; note the hashes."""
    found = TICK.findall(output)
    story.hashes |= {digest.decode() for _, digest in found}
    return [int(number) for number, _ in found]


def watch_ticks(settings: Settings, story: Story, name: str, host: Host, count: int) -> None:
    """Wait until the guest has ticked `count` times on this host."""
    deadline = time.monotonic() + TICK_TIMEOUT_S
    while len(ticks := ticks_so_far(story, host)) < count:
        if time.monotonic() > deadline:
            raise GuestStateError(f"the guest {name} did not tick within {TICK_TIMEOUT_S:.0f} s")
        time.sleep(_POLL_S)
    story.ticks[name] = ticks
    for tick in ticks:
        detail(settings, f"TICK {tick} {' '.join(sorted(story.hashes))}")


# ---- the proof


def show_proof(story: Story, found: Comparison) -> None:
    """Print what was found."""
    samples = [
        [f"{s.pfn:#x}", s.page_type, f"{s.old_mfn:#x}", f"{s.new_mfn:#x}"] for s in found.samples
    ]
    console.text("")
    console.table(
        "Where some of the guest's pages were and are",
        ["pfn", "type", "mfn on a", "mfn on b"],
        samples,
    )
    identical = "the same bytes" if story.facts["image_identical"] else "DIFFERENT BYTES"
    rows = [
        ["pages on other frames than before", f"{found.moved_pages} of {found.nr_pages}"],
        ["pages equal, byte for byte", str(found.equal_pages)],
        ["page tables equal after canonicalisation", str(found.equal_tables)],
        ["pages of the p2m, true on both sides", str(found.p2m_pages)],
        ["start_info and frame lists, filled in anew", str(found.rewritten_pages)],
        ["pages that differ", str(len(found.different))],
        ["image saved on a and image saved on b", identical],
        *[[f"ticks {name}", " ".join(map(str, ticks))] for name, ticks in story.ticks.items()],
        ["ticks without a gap, memory's hash constant", "yes" if story.gapless else "NO"],
    ]
    console.table("The proof", ["", ""], rows)


def judge(story: Story, found: Comparison) -> None:
    """Raise if the proof fails."""
    if found.different:
        raise GuestStateError(f"{len(found.different)} pages differ: pfn {found.different[0]:#x}")
    if not story.facts["image_identical"]:
        raise GuestStateError("the image saved on b is not the image saved on a")
    if not story.gapless:
        raise GuestStateError(f"the guest's ticks have a gap: {story.ticks}")
