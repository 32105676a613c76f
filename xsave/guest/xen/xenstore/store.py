"""The store as the toolstack sees it: read, write, remove, list, watch.

Watches fire when a change is made outside a transaction or when a transaction commits, in the
order of the changes and, for each, of the watches. A watch sees the changes of its node and of
all below it, and the removal of a node above it where its own node went too. Events are queued
and given out by a loop that is not entered twice, so a callback may change the store.

`@introduceDomain` and `@releaseDomain` are the two names outside the tree that can be watched.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from xsave.errors import UsageError
from xsave.guest.xen.xenstore import nodes
from xsave.guest.xen.xenstore.nodes import Change, Quota, Transaction, Tree, WireError

__all__ = ["Quota", "Watch", "WireError", "XenStore"]

INTRODUCE_DOMAIN = "@introduceDomain"
RELEASE_DOMAIN = "@releaseDomain"
SPECIAL_PATHS = (INTRODUCE_DOMAIN, RELEASE_DOMAIN)


@dataclass(frozen=True, eq=False, slots=True)
class Watch:
    """A callable that is told of every change at or below `path`; compared by identity."""

    path: str
    notify: Callable[[str], None]

    def sees(self, change: Change) -> str | None:
        """Return the path to report for `change`, None if it does not concern this watch."""
        if self.path in change.removed:
            return self.path
        at_or_below = self.path == "/" or f"{change.path}/".startswith(f"{self.path}/")
        if at_or_below and (self.path != "/" or change.path not in SPECIAL_PATHS):
            return change.path
        return None


class XenStore:
    """One store; the methods are the toolstack's, guests come through a `Connection`."""

    def __init__(self, quota: Quota | None = None) -> None:
        self.quota = quota or Quota()
        self.tree = Tree(self.quota)
        self.introduced: set[int] = {nodes.TOOLSTACK}
        self._watches: dict[Watch, None] = {}
        self._events: deque[tuple[Watch, str]] = deque()
        self._delivering = False

    def read(self, path: str) -> bytes | None:
        """Return the value of a node, None if there is none."""
        node = self.tree.get(_toolstack_path(path))
        return None if node is None else node.value

    def ls(self, path: str) -> list[str]:
        """Return the names of the children, in the order they were made; [] without a node."""
        node = self.tree.get(_toolstack_path(path))
        return [] if node is None else list(node.children)

    def write(self, path: str, value: bytes | str, perms: tuple[str, ...] | None = None) -> None:
        """Write a value, making parents; `perms` as on the wire, else those of the parent."""
        raw = value.encode() if isinstance(value, str) else value
        path = _toolstack_path(path)
        try:
            change = nodes.write(self.tree, path, raw, nodes.TOOLSTACK)
            if perms is not None:
                nodes.set_perms(self.tree, path, perms, nodes.TOOLSTACK)
        except WireError as error:
            raise UsageError(f"xenstore refuses to write {path}: {error.code}") from error
        self.fire([change])

    def rm(self, path: str) -> None:
        """Remove a node and all below it; nothing happens without one."""
        path = _toolstack_path(path)
        if path != "/" and self.tree.get(path) is not None:
            self.fire([nodes.remove(self.tree, path)])

    def watch(self, path: str, notify: Callable[[str], None]) -> Watch:
        """Call `notify(changed_path)` now (with `path`) and on each change from now on."""
        full = path if path in SPECIAL_PATHS else _toolstack_path(path)
        watch = Watch(full, notify)
        self.add_watch(watch)
        return watch

    def unwatch(self, watch: Watch) -> None:
        """Forget a watch; events of it not yet given out are dropped."""
        self._watches.pop(watch, None)

    def introduce(self, domid: int) -> None:
        """A domain came to be: `@introduceDomain` fires."""
        self.introduced.add(domid)
        self.fire([Change(INTRODUCE_DOMAIN)])

    def release(self, domid: int) -> None:
        """A domain is gone (or changed its state of health): `@releaseDomain` fires."""
        self.introduced.discard(domid)
        self.fire([Change(RELEASE_DOMAIN)])

    def add_watch(self, watch: Watch) -> None:
        """Register a watch; its first event tells the watcher that it stands."""
        self._watches[watch] = None
        self._events.append((watch, watch.path))
        self._deliver()

    def begin(self, domid: int) -> Transaction:
        """Start a transaction of `domid`."""
        return Transaction(self.tree, domid)

    def fire(self, changes: Iterable[Change | None]) -> None:
        """Queue the events of `changes` and give them out."""
        for change in changes:
            if change is not None:
                self._queue(change)
        self._deliver()

    def _queue(self, change: Change) -> None:
        for watch in self._watches:
            path = watch.sees(change)
            if path is not None:
                self._events.append((watch, path))

    def _deliver(self) -> None:
        if self._delivering:
            return
        self._delivering = True
        try:
            while self._events:
                watch, path = self._events.popleft()
                if watch in self._watches:
                    watch.notify(path)
        finally:
            self._delivering = False


def _toolstack_path(path: str) -> str:
    try:
        if path.startswith("/"):
            return nodes.absolute_path(path, "")
    except WireError:
        pass
    raise UsageError(f"{path!r} is no absolute xenstore path")
