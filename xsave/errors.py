"""Every error xsave raises on purpose, and the exit code each one means.

A leaf: imports nothing of xsave. Each class says whose fault it is and what the user can do;
each error carries its facts as attributes and builds its one-line message from them. Anything
else that reaches the command line is a bug of ours and exits with 1.
"""

from __future__ import annotations


class XsaveError(Exception):
    """Base class; never raised itself."""

    exit_code = 1

    def __init__(self, message: str, **facts: object) -> None:
        super().__init__(message)
        self.facts = facts


class UsageError(XsaveError):
    """The command was asked for something that makes no sense: change the command."""

    exit_code = 2


class ImageError(XsaveError):
    """The bytes of the image are wrong: it is damaged, truncated, or no Xen image at all.

    `offset` is the position in the (decompressed) image, `record` the record's name there.
    """

    exit_code = 3

    def __init__(
        self,
        what: str,
        *,
        offset: int | None = None,
        record: str | None = None,
        expected: object = None,
        found: object = None,
    ) -> None:
        self.what = what
        self.offset = offset
        self.record = record
        self.expected = expected
        self.found = found
        text = what
        if expected is not None:
            text += f": expected {expected}"
            if found is not None:
                text += f", found {found}"
        elif found is not None:
            text += f": found {found}"
        where = []
        if record is not None:
            where.append(f"in {record}")
        if offset is not None:
            where.append(f"at offset {offset:#x}")
        if where:
            text += f" ({' '.join(where)})"
        super().__init__(
            text, what=what, offset=offset, record=record, expected=expected, found=found
        )


class HostCannotTake(XsaveError):
    """The image is sound, this host cannot run it (CPU features, guest type, vCPUs)."""

    exit_code = 4


class NotFound(XsaveError):
    """No such domain or host."""

    exit_code = 5


class NameTaken(XsaveError):
    """A domain or host of that name exists already."""

    exit_code = 5


class SuspendFailed(XsaveError):
    """The guest did not suspend (or cannot: it is paused, crashed or shut down); it runs on
    as before. `stage` names the step that did not happen."""

    exit_code = 6

    def __init__(self, message: str, *, stage: str) -> None:
        super().__init__(message, stage=stage)
        self.stage = stage


class GuestStateError(XsaveError):
    """The domain is not in a state in which it could do what was asked."""

    exit_code = 6


class MigrationCancelled(XsaveError):
    """The guest writes faster than it can be moved within what was asked for; it runs on as
    before."""

    exit_code = 6


class StorageError(XsaveError):
    """Reading or writing failed, or there is no room: a file, a pipe, the runtime directory."""

    exit_code = 7


class ConnectionLost(StorageError):
    """The process at the other end of a control socket or of a migration is gone."""


class OutOfFrames(XsaveError):
    """The host has not enough free machine frames for this domain."""

    exit_code = 8

    def __init__(self, *, wanted: int, free: int, host: str) -> None:
        super().__init__(
            f"host {host} has {free} free frames ({free * 4} KiB), "
            f"the domain needs {wanted} ({wanted * 4} KiB)",
            wanted=wanted,
            free=free,
            host=host,
        )


class HandoverUndecided(XsaveError):
    """GO was sent and no report came back: look at both ends before starting either copy."""

    exit_code = 9


#: What `xsave` exits with, for the man page, the help and the test that compares them.
EXIT_CODES = {
    0: "success",
    1: "a bug in xsave",
    2: "usage error",
    3: "the image is damaged",
    4: "this host cannot take the image",
    5: "no such domain or host, or the name is taken",
    6: "the guest did not suspend, or is in no state to do what was asked",
    7: "input/output error, or no space",
    8: "out of machine frames",
    9: "hand-over undecided",
    130: "interrupted",
}
