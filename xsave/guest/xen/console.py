"""The guest's console: the xencons ring on one side, a bounded log and listeners on the other.

Ring layout (xen/include/public/io/console.h): in[1024], out[2048], u32 in_cons, in_prod,
out_cons, out_prod. The guest owns in_cons and out_prod and may write anything there.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from pathlib import Path

_IN_BYTES, _OUT_BYTES = 1024, 2048
_IN, _OUT, _INDICES = 0, 1024, 3072
#: The log lives in the host's RAM: it keeps the newest part of what a guest ever said.
LOG_LIMIT_BYTES = 4 << 20
#: So much input may wait for a guest that does not read; what is more waits with who types.
_ENOUGH_TYPED_BYTES = 64 << 10


class Console:
    """`page` is a memoryview of the ring page (None until the guest has one)."""

    def __init__(self, log_path: Path) -> None:
        self._log_path = log_path
        self._fd = os.open(log_path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._log_bytes = os.fstat(self._fd).st_size
        self.page: memoryview | None = None
        self.listeners: list[Callable[[bytes], None]] = []
        #: Called when there is room for input again after type() said that there is none.
        self.on_room: Callable[[], None] = lambda: None
        #: Whether input waits for release(), instead of reaching the guest at once.
        self.holds_input = False
        self._input = bytearray()
        self._typed = bytearray()

    def put(self, data: bytes) -> None:
        """Guest output, from the ring or from the console_io hypercall."""
        if not data:
            return
        self._log_bytes += os.write(self._fd, data)
        if self._log_bytes > LOG_LIMIT_BYTES:
            self._trim()
        for listener in self.listeners:
            listener(data)

    def _trim(self) -> None:
        keep = self._log_path.read_bytes()[-LOG_LIMIT_BYTES // 2 :]
        os.ftruncate(self._fd, 0)
        self._log_bytes = os.write(self._fd, keep)

    def drain(self) -> bool:
        """Take what the guest wrote, give it what was typed. True if the ring moved."""
        page = self.page
        if page is None:
            return False
        in_cons, in_prod, out_cons, out_prod = struct.unpack_from("<4I", page, _INDICES)
        moved = False
        nr = (out_prod - out_cons) & 0xFFFFFFFF
        if nr:
            # More than the ring holds is a lie: take nothing, fall in step again.
            if nr <= _OUT_BYTES:
                start = out_cons % _OUT_BYTES
                ring = bytes(page[_OUT : _OUT + _OUT_BYTES])
                self.put((ring[start:] + ring[:start])[:nr])
            struct.pack_into("<I", page, _INDICES + 8, out_prod)
            moved = True
        if self._input:
            moved |= self._feed(page, in_cons, in_prod)
        return moved

    def _feed(self, page: memoryview, in_cons: int, in_prod: int) -> bool:
        room = _IN_BYTES - ((in_prod - in_cons) & 0xFFFFFFFF)
        chunk = bytes(self._input[: max(room, 0)])
        for i, byte in enumerate(chunk):
            page[_IN + (in_prod + i) % _IN_BYTES] = byte
        was_full = len(self._input) >= _ENOUGH_TYPED_BYTES
        del self._input[: len(chunk)]
        if was_full and len(self._input) < _ENOUGH_TYPED_BYTES:
            self.on_room()
        struct.pack_into("<I", page, _INDICES + 4, (in_prod + len(chunk)) & 0xFFFFFFFF)
        return bool(chunk)

    def type(self, data: bytes) -> bool:
        """Queue keyboard input. False if this is enough until on_room() is called."""
        queue = self._typed if self.holds_input else self._input
        queue += data
        return len(queue) < _ENOUGH_TYPED_BYTES

    def release(self) -> bool:
        """Let the guest have what was typed so far. True if there was anything."""
        nr = len(self._typed)  # another thread may add to it
        self._input += self._typed[:nr]
        del self._typed[:nr]
        if nr >= _ENOUGH_TYPED_BYTES > len(self._input):
            self.on_room()
        return nr > 0

    def close(self) -> None:
        os.close(self._fd)
