"""The nodes of a xenstore, and views of them: the live tree and a transaction over it.

Nodes are immutable and kept flat, `path -> Node`; a change puts a new node with a new
generation. A transaction remembers every node it saw and lays its own changes over them. It
commits only if each node it saw is still the very node in the tree, else the guest is told
EAGAIN and tries again: the rule of xenstored since Xen 4.9 (xenstored_transaction.c), under which
transactions over disjoint nodes never disturb each other.

The operations below work on any view, so a request is the same code inside a transaction and
outside. Each returns the paths whose watches must fire.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

#: XENSTORE_ABS_PATH_MAX, XENSTORE_REL_PATH_MAX and XENSTORE_PAYLOAD_MAX of xs_wire.h.
ABS_PATH_MAX = 3072
REL_PATH_MAX = 2048
PAYLOAD_MAX = 4096
#: domid whose requests no quota limits: the toolstack.
TOOLSTACK = 0

_VALID_PATH = re.compile(r"/|(?:/[A-Za-z0-9_@-]+)+")


class WireError(Exception):
    """A request that xenstore answers with an error; `code` is the name the wire carries."""

    def __init__(self, code: str) -> None:
        super().__init__(code)
        self.code = code


@dataclass(frozen=True, slots=True)
class Quota:
    """What one guest may make the server hold (xenstored's quotas, its defaults or wider)."""

    nodes: int = 1000
    watches: int = 128
    transactions: int = 10
    transaction_nodes: int = 1024
    #: Unread output after which no request is read, and after which the connection is dropped.
    output_bytes: int = 64 << 10
    output_bytes_fatal: int = 4 << 20


@dataclass(frozen=True, slots=True)
class Node:
    """One node. `perms` as on the wire ("n0", "r5"; the first names the owner)."""

    value: bytes
    perms: tuple[str, ...]
    children: tuple[str, ...] = ()
    generation: int = 0

    @property
    def owner(self) -> int:
        """The domid that pays for the node."""
        return int(self.perms[0][1:])


class View(Protocol):
    """Somewhere nodes are looked up and put: the live tree or a transaction."""

    def get(self, path: str) -> Node | None: ...

    def put(self, path: str, node: Node | None) -> None: ...

    def check_quota(self, domid: int, new_nodes: int) -> None: ...


class Tree:
    """The live nodes, and how many of them each domain owns."""

    def __init__(self, quota: Quota) -> None:
        self.quota = quota
        self.owned: Counter[int] = Counter()
        self._generation = 0
        self._nodes: dict[str, Node] = {}
        self.put("/", Node(b"", ("n0",)))

    def get(self, path: str) -> Node | None:
        return self._nodes.get(path)

    def put(self, path: str, node: Node | None) -> None:
        old = self._nodes.pop(path, None)
        if old is not None:
            self.owned[old.owner] -= 1
        if node is not None:
            self._generation += 1
            self._nodes[path] = replace(node, generation=self._generation)
            self.owned[node.owner] += 1

    def check_quota(self, domid: int, new_nodes: int) -> None:
        """Refuse (ENOSPC) `new_nodes` more nodes of `domid` than its quota has room for."""
        if domid != TOOLSTACK and self.owned[domid] + new_nodes > self.quota.nodes:
            raise WireError("ENOSPC")


class Transaction:
    """Changes that become visible together, or not at all."""

    def __init__(self, tree: Tree, domid: int) -> None:
        self._changed: dict[Change, None] = {}
        self._tree = tree
        self._domid = domid
        self._seen: dict[str, Node | None] = {}
        self._overlay: dict[str, Node | None] = {}

    def get(self, path: str) -> Node | None:
        if path in self._overlay:
            return self._overlay[path]
        if path not in self._seen:
            if len(self._seen) >= self._tree.quota.transaction_nodes:
                raise WireError("ENOSPC")
            self._seen[path] = self._tree.get(path)
        return self._seen[path]

    def put(self, path: str, node: Node | None) -> None:
        self.get(path)
        self._overlay[path] = node

    def check_quota(self, domid: int, new_nodes: int) -> None:
        self._tree.check_quota(domid, self._growth() + new_nodes)

    def record(self, change: Change) -> None:
        """Remember watches to fire at the commit; each change once, however often it is made."""
        if len(self._changed) >= self._tree.quota.transaction_nodes:
            raise WireError("ENOSPC")
        self._changed[change] = None

    def commit(self) -> list[Change]:
        """Put the changes into the tree, or raise EAGAIN if one of the nodes seen changed."""
        if any(self._tree.get(path) is not node for path, node in self._seen.items()):
            raise WireError("EAGAIN")
        self._tree.check_quota(self._domid, self._growth())
        for path, node in self._overlay.items():
            self._tree.put(path, node)
        return list(self._changed)

    def _growth(self) -> int:
        now = sum(node is not None for node in self._overlay.values())
        return now - sum(self._seen[path] is not None for path in self._overlay)


@dataclass(frozen=True, slots=True)
class Change:
    """A path whose watches fire; `removed` are the nodes that vanished below it."""

    path: str
    removed: frozenset[str] = frozenset()


def absolute_path(path: str, home: str) -> str:
    """Return `path` made absolute under `home`; EINVAL if xenstored would not take it."""
    limit = ABS_PATH_MAX if path.startswith("/") else REL_PATH_MAX
    full = path if path.startswith("/") else f"{home}/{path}"
    if len(path) > limit or len(full) > ABS_PATH_MAX or not _VALID_PATH.fullmatch(full):
        raise WireError("EINVAL")
    return full


def existing(view: View, path: str) -> Node:
    """Return the node of `path`, or raise ENOENT."""
    node = view.get(path)
    if node is None:
        raise WireError("ENOENT")
    return node


def write(view: View, path: str, value: bytes, domid: int) -> Change:
    """Set a value; the node and its parents are made where they do not exist."""
    if len(value) > PAYLOAD_MAX:
        raise WireError("ENOSPC")
    _update(view, path, domid, lambda node: replace(node, value=value))
    return Change(path)


def mkdir(view: View, path: str, domid: int) -> Change | None:
    """Make a node with its parents; nothing changes where it exists."""
    if view.get(path) is not None:
        return None
    _update(view, path, domid, lambda node: node)
    return Change(path)


def remove(view: View, path: str) -> Change | None:
    """Remove a node and all below it. Nothing changes if only the node itself is missing."""
    if path == "/":
        raise WireError("EINVAL")
    parent, name = _split(path)
    above = existing(view, parent) if view.get(path) is None else view.get(parent)
    if above is None or name not in above.children:
        return None
    removed = [path]
    for doomed in removed:  # grows while it is walked
        removed += [f"{doomed}/{child}" for child in existing(view, doomed).children]
    for doomed in removed:
        view.put(doomed, None)
    view.put(parent, replace(above, children=tuple(c for c in above.children if c != name)))
    return Change(path, frozenset(removed[1:]))


def set_perms(view: View, path: str, perms: tuple[str, ...], domid: int) -> Change:
    """Replace the permissions; a guest may not give a node to another owner (EPERM)."""
    node = existing(view, path)
    if not perms or not all(re.fullmatch(r"[nrwb][0-9]{1,5}", perm) for perm in perms):
        raise WireError("EINVAL")
    changed = replace(node, perms=perms)
    if domid != TOOLSTACK and changed.owner != node.owner:
        raise WireError("EPERM")
    view.put(path, changed)
    return Change(path)


def _split(path: str) -> tuple[str, str]:
    parent, _, name = path.rpartition("/")
    return parent or "/", name


def _update(view: View, path: str, domid: int, edit: Callable[[Node], Node]) -> None:
    """Put `edit(node)`, having made the node and the parents that are missing."""
    missing: list[str] = []
    while (node := view.get(path)) is None:
        missing.append(path)
        path = _split(path)[0]
    view.check_quota(domid, len(missing))
    perms = node.perms if domid == TOOLSTACK else (f"n{domid}", *node.perms[1:])
    for below in reversed(missing):
        view.put(path, replace(node, children=(*node.children, _split(below)[1])))
        path, node = below, Node(b"", perms)
    view.put(path, edit(node))
