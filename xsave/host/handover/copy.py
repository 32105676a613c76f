"""The domain process's part of a hand-over: it takes the steps that let its guest run or end.

A step is written down here, by the only process that can do it, and then done: no death of a
command comes between. A domain may have come by one migration (incoming) and leave by another.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from xsave.errors import GuestStateError, NotFound, XsaveError
from xsave.host.handover.journal import Journal
from xsave.host.handover.table import Step


class Copy:
    """A domain as one of the two copies of a migration, or none.

    incoming: it is the target's, and may not run yet.
    """

    def __init__(self) -> None:
        self._source: Journal | None = None
        self._target: Journal | None = None
        self.incoming = False
        #: It runs, and how that ends with its memory is not written down yet.
        self.partial = False

    # -- the source's ---

    def hold(self, path: str | None) -> None:
        """From here on only the target's journal says whose the guest is. Raises XsaveError."""
        journal = Journal(Path(path)) if path else None
        if journal:
            journal.take(Step.HOLD)
        self._source = journal

    def is_held_by(self, path: str | None) -> bool:
        """True if this migration holds it."""
        return path is not None and self._source is not None and self._source.path == Path(path)

    def is_held_by_another(self, path: str | None) -> bool:
        """True if this migration has no say in it."""
        return self._source is not None and not self.is_held_by(path)

    def take_back(self) -> None:
        """It is about to run here, if it was held. Raises XsaveError."""
        self._leave(Step.TAKE_BACK)

    def give_up(self) -> None:
        """It is about to end here, if it was held. Raises XsaveError."""
        self._leave(Step.GIVE_UP)

    def _leave(self, step: Step) -> None:
        if self._source is not None:
            with suppress(NotFound):
                self._source.take(step)
            self._source = None

    # -- the target's ---

    def receive(self, path: str | None) -> None:
        """It is being made by a migration."""
        self._target = Journal(Path(path)) if path else None
        self.incoming = path is not None

    def is_made_by(self, path: str | None) -> bool:
        """True if it came, or comes, by this migration."""
        return path is not None and self._target is not None and self._target.path == Path(path)

    def take_over(self, *, early: bool = False) -> None:
        """It is about to run here. early: before all of its memory is. Raises XsaveError: it must
        not."""
        if self.incoming and self._target is not None:
            self._target.take(Step.TAKE_OVER_EARLY if early else Step.TAKE_OVER)
            self.incoming, self.partial = False, early

    def complete(self) -> None:
        """All of its memory is here. Raises XsaveError: that is not written down."""
        if self.partial and self._target is not None:
            self._target.take(Step.COMPLETE)
            self.partial = False

    def lose(self) -> None:
        """A part of its memory never came. Raises XsaveError: that is not written down."""
        if self.partial and self._target is not None:
            self._target.take(Step.LOSE)
            self.partial = False

    def abandon(self) -> None:
        """It will never run here. Raises GuestStateError if it does."""
        if self._target is None:
            return
        if not self.incoming:
            raise GuestStateError("the copy runs: it cannot be abandoned any more")
        with suppress(NotFound):
            self._target.take(Step.ABANDON)

    def abandon_quietly(self) -> None:
        """abandon(), when nobody is there to be told: it ends without having run in any case."""
        with suppress(XsaveError):
            self.abandon()

    def end(self) -> None:
        """It came to its end, if it ever was the guest."""
        if self._target is not None and not self.incoming:
            with suppress(XsaveError):
                self._target.take(Step.END)
