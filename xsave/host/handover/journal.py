"""What a side of a hand-over wrote down: one small file for each, on its host.

    hosts/NAME/migrations/ID.source    (or .target)

A file has two slots of 4 KiB, each a line of JSON with its checksum in front. A change is written
to the slot that is not the newest, and synced: whoever dies in between, the one before stands. The
room for both is taken when the migration begins, so that a disk that is full later stops nothing.
The host's memory is volatile and its journals live beside it: neither outlives the other.

Whoever works on a migration holds a lock on its file for life: that asks the kernel, not a pid,
whether it is at work still.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import secrets
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from xsave.errors import GuestStateError, NameTaken, NotFound, StorageError, UsageError
from xsave.filelock import exclusive, is_locked
from xsave.host.handover.table import FIRST, SETTLED, STEPS, State, Step

_SLOT_BYTES = 4096
#: So many settled ones are kept, for who asks later.
NR_KEPT = 256
_TRANSACTION = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{3,63}\Z")
_ROLES = tuple(FIRST)


@dataclass(frozen=True)
class Entry:
    """What stands in a journal. peer: the other host as it is known here, "" if it is not.

    began, changed: seconds since the epoch."""

    transaction: str
    role: str  # source, target
    state: State
    name: str
    domid: int | None
    peer: str
    began: float
    changed: float


def new_transaction() -> str:
    """Return an id for a migration."""
    return secrets.token_hex(6)


def check_transaction(transaction: str) -> str:
    """Return it. Raises UsageError: it becomes part of a file's name."""
    if not _TRANSACTION.match(transaction):
        raise UsageError(f"transaction {transaction!r}: expected 4 to 64 letters, digits, _ and -")
    return transaction


class Journal:
    """One side's file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> Entry:
        """Raises NotFound."""
        try:
            fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as e:
            raise self._unknown(e) from e
        try:
            return self._newest(fd)[1]
        finally:
            os.close(fd)

    def _unknown(self, error: OSError) -> NotFound:
        return NotFound(f"no migration {self.path.stem} on this host: {error.strerror}")

    @contextlib.contextmanager
    def _changing(self) -> Iterator[int]:
        """The file, locked. Who may do without a journal (NotFound) may not do without writing
        into one that there is (StorageError)."""
        with self._locked():
            try:
                fd = os.open(self.path, os.O_RDWR | os.O_CLOEXEC)
            except FileNotFoundError as e:
                raise self._unknown(e) from e
            except OSError as e:
                raise StorageError(f"{self.path}: {e.strerror}") from e
            try:
                yield fd
            finally:
                os.close(fd)

    def _newest(self, fd: int) -> tuple[int, Entry]:
        """Return (number, entry) of the last change."""
        slots = [_decode(os.pread(fd, _SLOT_BYTES, at)) for at in (0, _SLOT_BYTES)]
        whole = [slot for slot in slots if slot is not None]
        if not whole:
            raise NotFound(f"{self.path} is no journal of a migration")
        return max(whole, key=lambda slot: slot[0])

    def take(self, step: Step, *, only_in: State | None = None, **changes: Any) -> Entry:
        """Write a step down, on disk when this returns. One that was taken already is none.
        only_in: take it in this state only.

        Raises GuestStateError if the journal says otherwise, StorageError, NotFound."""
        allowed, after = STEPS[step]
        with self._changing() as fd:
            number, entry = self._newest(fd)
            if entry.state == after:
                return entry
            if entry.state not in allowed or (only_in and entry.state != only_in):
                raise GuestStateError(
                    f"migration {entry.transaction} is {entry.state} on this host: it cannot "
                    f"{step} any more",
                    state=str(entry.state),
                )
            return self._write(fd, number + 1, replace(entry, state=after, **changes))

    def note(self, **changes: Any) -> Entry:
        """Write down what is no step."""
        with self._changing() as fd:
            number, entry = self._newest(fd)
            return self._write(fd, number + 1, replace(entry, **changes))

    def _write(self, fd: int, number: int, entry: Entry) -> Entry:
        entry = replace(entry, changed=time.time())
        try:
            _write_slot(fd, number, entry)
            os.fsync(fd)
        except OSError as e:
            raise StorageError(f"{self.path}: {e.strerror}") from e
        return entry

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with _lock(self.path.parent):
            yield

    def at_work(self) -> bool:
        """True while the command that began it lives."""
        return is_locked(self.path)


class Journals:
    """Those of one host."""

    def __init__(self, host_directory: Path) -> None:
        self._directory = host_directory / "migrations"

    def begin(self, role: str, transaction: str, name: str, peer: str = "") -> OwnJournal:
        """Begin one, and hold its lock. Raises UsageError, NameTaken, StorageError."""
        path = self._directory / f"{check_transaction(transaction)}.{role}"
        now = time.time()
        entry = Entry(transaction, role, FIRST[role], name, None, peer, now, now)
        try:
            self._directory.mkdir(mode=0o700, exist_ok=True)
            with _lock(self._directory):
                self._forget_old()
                return OwnJournal(path, self._make(path, entry))
        except FileExistsError as e:
            raise NameTaken(f"there is a migration {transaction} on this host already") from e
        except OSError as e:
            raise StorageError(f"{path}: {e.strerror}") from e

    def _make(self, path: Path, entry: Entry) -> int:
        """Make the file, whole at once; return it, open and locked."""
        making = path.with_name(f".{path.name}")
        making.unlink(missing_ok=True)
        fd = os.open(making, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            _write_slot(fd, 0, entry)
            _write_slot(fd, 1, entry)
            os.fsync(fd)
            os.link(making, path)  # fails where a rename would replace
            _sync_directory(self._directory)
        except BaseException:
            os.close(fd)
            raise
        finally:
            making.unlink(missing_ok=True)
        return fd

    def all(self) -> list[Journal]:
        """Return them, the oldest first; files that are none are left out."""
        found = []
        with contextlib.suppress(OSError):
            for path in self._directory.iterdir():
                if path.suffix[1:] in _ROLES and not path.name.startswith("."):
                    with contextlib.suppress(NotFound):
                        found.append((Journal(path).read().began, path))
        return [Journal(path) for _, path in sorted(found)]

    def get(self, role: str, transaction: str) -> Journal | None:
        """Return the side of a migration, None if it is not known here."""
        journal = Journal(self._directory / f"{check_transaction(transaction)}.{role}")
        with contextlib.suppress(NotFound):
            journal.read()
            return journal
        return None

    def _forget_old(self) -> None:
        """Keep the newest of those that are settled."""
        settled = []
        for journal in self.all():
            with contextlib.suppress(NotFound):
                if journal.read().state in SETTLED and not journal.at_work():
                    settled.append(journal.path)
        for path in settled[:-NR_KEPT]:
            path.unlink(missing_ok=True)


class OwnJournal(Journal):
    """A journal of a migration that this process does: locked for as long as it lives."""

    def __init__(self, path: Path, fd: int) -> None:
        super().__init__(path)
        self._fd = fd

    def close(self) -> None:
        """Be at work no more."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> OwnJournal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextlib.contextmanager
def _lock(directory: Path) -> Iterator[None]:
    """One change at a time on a host, by whichever process."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(exclusive(directory / ".lock"))
        except OSError as e:
            raise StorageError(f"{directory}: {e.strerror}") from e
        yield


def _write_slot(fd: int, number: int, entry: Entry) -> None:
    text = json.dumps({"number": number, **vars(entry)}).encode()
    line = b"%08x %s" % (zlib.crc32(text), text)
    line = line.ljust(_SLOT_BYTES - 1) + b"\n"
    at = number % 2 * _SLOT_BYTES
    while line:
        written = os.pwrite(fd, line, at)
        line, at = line[written:], at + written


def _decode(slot: bytes) -> tuple[int, Entry] | None:
    """Return (number, entry), None if the slot was never or not wholly written."""
    checksum, _, text = slot.rstrip().partition(b" ")
    with contextlib.suppress(ValueError, TypeError, KeyError):
        if int(checksum, 16) == zlib.crc32(text):
            fields = json.loads(text)
            number = int(fields.pop("number"))
            return number, Entry(**fields | {"state": State(fields["state"])})
    return None


def _sync_directory(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
