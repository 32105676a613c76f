"""One point tried: a suspend is asked for right here, and what becomes of the guest is told.

    request -> the guest's own suspend -> image -> what is stale in it? -> restore on B -> run on

All of it happens in a child, so the guest goes on from the point as if nothing had been. The
guest is deterministic: two images of the same bytes have the same future, so it is run on B once
for each image and remembered (Memo).

Fates:

    fine            all threads ended what they were at, and every check of theirs was right
    luck            the same, although something was stale
    foreign         the hypervisor refused a frame of another domain: its memory was to be changed
    refused         the hypervisor refused something else
    check           a check of the guest's own failed
    crash           it panicked, or did what no guest may
    hang            it goes on, but its threads do not
    unrestorable    the image was refused
    unsavable       the save refused the guest, which goes on as before
    no_suspend      it did not suspend in its time
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from xsave.errors import XsaveError
from xsave.public import SHUTDOWN_SUSPEND
from xsave.torture.door import Door
from xsave.torture.laboratory import Laboratory
from xsave.torture.refusals import Refusals
from xsave.torture.stale import Stale, live

FINE, LUCK, FOREIGN, REFUSED, CHECK = "fine", "luck", "foreign", "refused", "check"
CRASH, HANG, UNRESTORABLE = "crash", "hang", "unrestorable"
UNSAVABLE, NO_SUSPEND = "unsavable", "no_suspend"
FATES = (
    FINE, LUCK, FOREIGN, REFUSED, CHECK, CRASH, HANG, UNRESTORABLE, UNSAVABLE, NO_SUSPEND,
)  # fmt: skip
#: The guest is lost.
FAILED = {FOREIGN, REFUSED, CHECK, CRASH, HANG, UNRESTORABLE}
_CHECK_FAILED, _RESUMED = "CHECK FAILED", "RESUME new"
_DETAIL_LINES = 3
_HASH_BYTES = 12
#: image -> (fate, detail)
Memo = dict[str, tuple[str, str]]


@dataclass(frozen=True)
class Outcome:
    """What a point came to. `image`: a hash of its bytes, "" without one."""

    fate: str
    detail: str
    image: str
    stale: tuple[Stale, ...]

    @property
    def failed(self) -> bool:
        return self.fate in FAILED


def attempt(lab: Laboratory, memo: Memo) -> Outcome:
    """Try a suspend with the guest as it stands. In a child: the laboratory is used up."""
    before = len(lab.door.ear.heard)
    lab.request_suspend()
    suspended = lab.run_to_suspend()
    said = lab.door.ear.text[before:]
    if not suspended:
        return Outcome(NO_SUSPEND, _tail(said), "", ())
    if lab.door.xen.domain.shutdown_reason != SHUTDOWN_SUSPEND:
        return Outcome(_ended(said), _tail(said), "", ())
    try:
        image = lab.image()
    except XsaveError as e:
        return Outcome(UNSAVABLE, str(e), "", ())
    stale = tuple(lab.stale(image))
    digest = hashlib.blake2b(image, digest_size=_HASH_BYTES).hexdigest()
    fate, detail = memo[digest] if digest in memo else future(lab, image)
    if fate == FINE and live(list(stale)):
        fate = LUCK
    return Outcome(fate, detail, digest, stale)


def future(lab: Laboratory, image: bytes) -> tuple[str, str]:
    """Restore an image on B and run on; return the guest's fate there and its last words."""
    try:
        door, clockwork, refusals = lab.restore(image)
    except XsaveError as e:
        return UNRESTORABLE, str(e)
    lived = lab.run_on(clockwork)
    if not lab.other_domain_is_unharmed():
        raise AssertionError("the hypervisor let a guest into another domain's memory")
    return _fate(door, refusals, lived), _tail(door.ear.text)


def _fate(door: Door, refusals: Refusals, lived: bool) -> str:
    if refusals.foreign:
        return FOREIGN
    if door.xen.domain.shutdown_reason is not None:
        return REFUSED if refusals.refused else _ended(door.ear.text)
    if not lived or _RESUMED not in door.ear.text:
        return HANG
    return FINE


def _ended(said: str) -> str:
    return CHECK if _CHECK_FAILED in said else CRASH


def _tail(said: str) -> str:
    """The last words: from the first complaint on, in one line."""
    lines = [line for line in said.splitlines() if line.strip()]
    for i, line in enumerate(lines):
        if any(word in line for word in (_CHECK_FAILED, "PANIC", "TRAP", "crashed", "failed")):
            return " | ".join(lines[i : i + 1])
    return " | ".join(lines[-_DETAIL_LINES:])
