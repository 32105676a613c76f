"""What the operating system says about a channel, as an error of ours."""

from __future__ import annotations

from typing import NoReturn

from xsave.errors import StorageError


class BrokenPipe(StorageError):
    """Whoever read our output is gone: a clean stop, not a fault."""


def storage_error(error: OSError, name: str, verb: str) -> NoReturn:
    """Raise the StorageError for what the operating system said about the channel `name`."""
    reason = error.strerror or str(error)
    if isinstance(error, BrokenPipeError | ConnectionResetError) and verb == "write":
        raise BrokenPipe(f"cannot {verb} {name}: {reason}", path=name) from error
    raise StorageError(f"cannot {verb} {name}: {reason}", path=name, errno=error.errno) from error
