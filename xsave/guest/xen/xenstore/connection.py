"""One guest's connection to the store: raw request bytes in, replies and watch events out.

A message is `struct xsd_sockmsg` (type, req_id, tx_id, len: four little-endian u32) and `len`
bytes of payload (xs_wire.h). A request is answered by a message of its own type or by ERROR with
the error's name. A request that makes no sense is answered EINVAL; a header whose length is
beyond any message loses the framing for good, so the connection is dead from there on (xenstored
ignores it likewise): `dead` says why, and nothing a guest sends ever raises.

A guest that asks but does not read its answers is not served until it does (`wants_input`), so
what is held for it stays bounded by its quota.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Callable

from xsave.guest.xen.xenstore import nodes
from xsave.guest.xen.xenstore.nodes import PAYLOAD_MAX, Change, Transaction, View, WireError
from xsave.guest.xen.xenstore.requests import NODE_OPS, OK, Op, domid_of, split_path, strings
from xsave.guest.xen.xenstore.store import SPECIAL_PATHS, Watch, XenStore

_HEADER = struct.Struct("<4I")
_MAX_ID = 0xFFFF_FFFF


class Connection:
    """The server's end of one guest's ring."""

    def __init__(self, store: XenStore, domid: int, home: str | None = None) -> None:
        self.domid = domid
        #: Why the connection is dead; None while it lives.
        self.dead: str | None = None
        self._store = store
        self._home = home or f"/local/domain/{domid}"
        self._input = bytearray()
        self._output: deque[bytes] = deque()
        self._output_bytes = 0
        self._sent_of_first = 0
        self._pending_events: set[bytes] = set()
        self._watches: dict[tuple[str, bytes], Watch] = {}
        self._transactions: dict[int, Transaction] = {}
        self._next_transaction = 1
        #: What the request in hand sets off once its reply is queued.
        self._afterwards: list[Callable[[], None]] = []

    @property
    def pending(self) -> int:
        """Bytes that wait to be taken."""
        return self._output_bytes - self._sent_of_first

    @property
    def wants_input(self) -> bool:
        """False while the guest must first read its answers, and for ever once dead."""
        return self.dead is None and self.pending < self._store.quota.output_bytes

    def feed(self, data: bytes) -> None:
        """Take request bytes, in pieces of any size, and handle every request they complete."""
        if self.dead is not None:
            return
        self._input += data
        self._handle_input()
        if len(self._input) > self._store.quota.output_bytes:
            self.kill("more requests than answers taken")

    def take(self, n: int) -> bytes:
        """Return up to `n` bytes of output and forget them."""
        pieces = []
        while n > 0 and self._output:
            first = self._output[0]
            self._pending_events.discard(first)
            piece = first[self._sent_of_first : self._sent_of_first + n]
            pieces.append(piece)
            n -= len(piece)
            self._sent_of_first += len(piece)
            if self._sent_of_first == len(first):
                self._drop_first()
        self._handle_input()
        return b"".join(pieces)

    def kill(self, reason: str) -> None:
        """Stop serving: nothing is read or answered any more, watches and transactions go."""
        self.dead = self.dead or reason
        self._reset()
        self._input.clear()
        self._output.clear()
        self._pending_events.clear()
        self._output_bytes = self._sent_of_first = 0

    def close(self) -> None:
        """The domain is gone."""
        self.kill("closed")

    # ---- messages

    def _handle_input(self) -> None:
        while self.wants_input and len(self._input) >= _HEADER.size:
            op, request, transaction, length = _HEADER.unpack_from(self._input)
            if length > PAYLOAD_MAX:
                self.kill(f"a message of {length} bytes (at most {PAYLOAD_MAX})")
                return
            end = _HEADER.size + length
            if len(self._input) < end:
                return
            payload = bytes(self._input[_HEADER.size : end])
            del self._input[:end]
            self._handle(op, request, transaction, payload)

    def _handle(self, op: int, request: int, transaction: int, payload: bytes) -> None:
        self._afterwards = []
        try:
            reply = self._answer(op, transaction, payload)
            if len(reply) > PAYLOAD_MAX:
                raise WireError("E2BIG")
        except WireError as error:
            self._send(Op.ERROR, request, transaction, error.code.encode() + b"\0")
            return
        self._send(op, request, transaction, reply)
        # Events come behind the reply: a watch registered just now fires behind its own OK.
        for act in self._afterwards:
            act()

    def _answer(self, op: int, transaction: int, payload: bytes) -> bytes:
        session = _SESSION_OPS.get(op)
        if session is not None:
            return session(self, transaction, payload)
        node_op = NODE_OPS.get(op)
        if node_op is None:
            raise WireError("EACCES" if op in _PRIVILEGED_OPS else "ENOSYS")
        path, rest = split_path(payload)
        view = self._view(transaction)
        reply, change = node_op(view, nodes.absolute_path(path, self._home), rest, self.domid)
        if change is not None and isinstance(view, Transaction):
            view.record(change)
        elif change is not None:
            self._fire_afterwards([change])
        return reply

    def _fire_afterwards(self, changes: list[Change]) -> None:
        self._afterwards.append(lambda: self._store.fire(changes))

    def _view(self, transaction: int) -> View:
        return self._transaction(transaction) if transaction else self._store.tree

    def _transaction(self, number: int) -> Transaction:
        try:
            return self._transactions[number]
        except KeyError:
            raise WireError("ENOENT") from None

    def _send(self, op: int, request: int, transaction: int, payload: bytes) -> None:
        message = _HEADER.pack(op, request, transaction, len(payload)) + payload
        self._output.append(message)
        self._output_bytes += len(message)
        if self.pending > self._store.quota.output_bytes_fatal:
            self.kill("the guest does not read its answers")

    def _drop_first(self) -> None:
        message = self._output.popleft()
        self._output_bytes -= len(message)
        self._sent_of_first = 0

    # ---- watches

    def _watch_key(self, payload: bytes) -> tuple[str, bytes]:
        path, token = strings(payload, 2)
        return path.decode("latin-1"), token

    def _watch(self, _transaction: int, payload: bytes) -> bytes:
        path, token = key = self._watch_key(payload)
        if key in self._watches:
            raise WireError("EEXIST")
        if len(self._watches) >= self._store.quota.watches:
            raise WireError("ENOSPC")
        full = path if path in SPECIAL_PATHS else nodes.absolute_path(path, self._home)
        # A relative watch hears of relative paths.
        skip = 0 if full == path else len(self._home) + 1
        watch = Watch(full, lambda changed: self._event(changed[skip:], token))
        self._watches[key] = watch
        self._afterwards.append(lambda: self._stand(watch))
        return OK

    def _stand(self, watch: Watch) -> None:
        if self.dead is None:  # the reply may have been the last straw
            self._store.add_watch(watch)

    def _unwatch(self, _transaction: int, payload: bytes) -> bytes:
        watch = self._watches.pop(self._watch_key(payload), None)
        if watch is None:
            raise WireError("ENOENT")
        self._store.unwatch(watch)
        return OK

    def _event(self, path: str, token: bytes) -> None:
        payload = path.encode() + b"\0" + token + b"\0"
        message = _HEADER.pack(Op.WATCH_EVENT, 0, 0, len(payload)) + payload
        # An event the guest has not begun to read tells it all that a second one would.
        # One too long for a message is dropped, as xenstored does.
        fits = len(payload) <= PAYLOAD_MAX
        if fits and self.dead is None and message not in self._pending_events:
            self._pending_events.add(message)
            self._send(Op.WATCH_EVENT, 0, 0, payload)

    # ---- transactions, domains

    def _start(self, transaction: int, _payload: bytes) -> bytes:
        if transaction:
            raise WireError("EBUSY")
        if len(self._transactions) >= self._store.quota.transactions:
            raise WireError("ENOSPC")
        number = self._next_transaction
        self._next_transaction = number % _MAX_ID + 1
        self._transactions[number] = self._store.begin(self.domid)
        return b"%d\0" % number

    def _end(self, number: int, payload: bytes) -> bytes:
        verdict = strings(payload, 1)[0]
        transaction = self._transaction(number)
        if verdict not in (b"T", b"F"):
            raise WireError("EINVAL")
        del self._transactions[number]
        if verdict == b"T":
            self._fire_afterwards(transaction.commit())
        return OK

    def _domain_path(self, _transaction: int, payload: bytes) -> bytes:
        return b"/local/domain/%d\0" % domid_of(payload)

    def _is_introduced(self, _transaction: int, payload: bytes) -> bytes:
        return b"T\0" if domid_of(payload) in self._store.introduced else b"F\0"

    def _reset_watches(self, _transaction: int, _payload: bytes) -> bytes:
        self._reset()
        return OK

    def _reset(self) -> None:
        for watch in self._watches.values():
            self._store.unwatch(watch)
        self._watches.clear()
        self._transactions.clear()


_SESSION_OPS: dict[int, Callable[[Connection, int, bytes], bytes]] = {
    Op.WATCH: Connection._watch,
    Op.UNWATCH: Connection._unwatch,
    Op.TRANSACTION_START: Connection._start,
    Op.TRANSACTION_END: Connection._end,
    Op.GET_DOMAIN_PATH: Connection._domain_path,
    Op.IS_DOMAIN_INTRODUCED: Connection._is_introduced,
    Op.RESET_WATCHES: Connection._reset_watches,
}
_PRIVILEGED_OPS = frozenset({Op.CONTROL, Op.INTRODUCE, Op.RELEASE, Op.RESUME, Op.SET_TARGET})
