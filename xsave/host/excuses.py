"""Why a guest did not suspend, in its own words.

The built-in guest writes the reason to `error/suspend` in its directory of xenstore. Linux tells
nobody but its console: what it printed since the request and sounds like a reason is quoted.
Whatever it is comes from the guest: one line of bounded length and printable characters.
"""

from __future__ import annotations

import re

from xsave.guest.xen.domain import Domain

_NODE = "error/suspend"
_MAX_TEXT, _MAX_LINES, _MAX_CONSOLE_BYTES = 400, 3, 64 << 10
#: drivers/xen/manage.c, kernel/power/process.c and drivers/base/power say what went wrong so.
_REASONS = re.compile(rb"freez|suspend|\bPM: |dpm_", re.IGNORECASE)
_TIMESTAMP = re.compile(r"^\[ *\d+\.\d+\] ")


class Excuses:
    """Listens to a domain from a request to suspend on."""

    def __init__(self, domain: Domain) -> None:
        self._domain = domain
        self._console = bytearray()
        self._node = f"{domain.home}/{_NODE}"
        domain.store.rm(self._node)
        domain.console.listeners.append(self._hear)

    def close(self) -> None:
        """Listen no more."""
        self._domain.console.listeners.remove(self._hear)

    def _hear(self, data: bytes) -> None:
        self._console += data
        del self._console[:-_MAX_CONSOLE_BYTES]

    def written(self) -> str:
        """Return what the guest wrote to the node, "" if nothing."""
        return _one_line(self._domain.store.read(self._node) or b"")

    def printed(self) -> str:
        """Return the last lines of its console that may say why, "" if there are none."""
        lines = [line for line in bytes(self._console).splitlines() if _REASONS.search(line)]
        return "; ".join(_one_line(line) for line in lines[-_MAX_LINES:])


def _one_line(raw: bytes) -> str:
    text = raw.decode(errors="replace")
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return _TIMESTAMP.sub("", text)[:_MAX_TEXT]
