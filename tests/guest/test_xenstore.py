"""xenstore: the wire operations, transactions, watches, quotas and the shared ring."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xsave.errors import GuestStateError, UsageError
from xsave.guest.xen.xenstore import (
    Connection,
    Op,
    Quota,
    XenStore,
    drain_request_ring,
    fill_response_ring,
    service_ring,
)

HOME = "/local/domain/5"


def request(op, payload=b"", transaction=0, number=7):
    """One request message."""
    return struct.pack("<4I", op, number, transaction, len(payload)) + payload


def messages(data):
    """Split output into (op, req_id, tx_id, payload)."""
    found = []
    while data:
        op, number, transaction, length = struct.unpack_from("<4I", data)
        assert len(data) >= 16 + length
        found.append((op, number, transaction, data[16 : 16 + length]))
        data = data[16 + length :]
    return found


class Guest:
    """A guest's side of a connection."""

    def __init__(self, store=None, domid=5):
        self.store = store or XenStore()
        self.connection = Connection(self.store, domid)

    def received(self):
        """Everything the server has sent and we have not read."""
        return messages(self.connection.take(1 << 24))

    def ask(self, op, payload=b"", transaction=0):
        """Ask; return the reply's payload, or the error's name as a str. Events stay out."""
        self.connection.feed(request(op, payload, transaction))
        (reply,) = [m for m in self.received() if m[0] != Op.WATCH_EVENT]
        assert reply[1:3] == (7, transaction)
        if reply[0] == Op.ERROR:
            return reply[3].removesuffix(b"\0").decode()
        assert reply[0] == op
        return reply[3]

    def begin(self):
        return int(self.ask(Op.TRANSACTION_START, b"\0").removesuffix(b"\0"))

    def end(self, transaction, verdict=b"T\0"):
        return self.ask(Op.TRANSACTION_END, verdict, transaction)

    def events(self):
        return [tuple(m[3].split(b"\0")[:2]) for m in self.received() if m[0] == Op.WATCH_EVENT]


@pytest.fixture
def guest():
    return Guest()


def test_write_then_read_relative_and_absolute(guest):
    """A relative path is below the domain's home; parents are made, with empty values."""
    assert guest.ask(Op.WRITE, b"data/key\0value") == b"OK\0"
    assert guest.ask(Op.READ, HOME.encode() + b"/data/key\0") == b"value"
    assert guest.ask(Op.READ, b"data\0") == b""
    assert guest.store.read(f"{HOME}/data/key") == b"value"


def test_values_are_bytes(guest):
    """A value may hold any byte and be empty; it has no terminator."""
    for value in (b"", b"\0", bytes(range(256))):
        guest.ask(Op.WRITE, b"k\0" + value)
        assert guest.ask(Op.READ, b"k\0") == value


def test_directory_lists_children_in_order_of_creation(guest):
    for name in (b"b", b"a", b"c"):
        guest.ask(Op.MKDIR, b"dir/" + name + b"\0")
    assert guest.ask(Op.DIRECTORY, b"dir\0") == b"b\0a\0c\0"
    assert guest.store.ls(f"{HOME}/dir") == ["b", "a", "c"]


def test_mkdir_keeps_what_exists(guest):
    """MKDIR of an existing node succeeds and changes neither value nor children."""
    guest.ask(Op.WRITE, b"k\0v")
    assert guest.ask(Op.MKDIR, b"k\0") == b"OK\0"
    assert guest.ask(Op.READ, b"k\0") == b"v"


def test_rm_takes_the_subtree(guest):
    guest.ask(Op.WRITE, b"a/b/c\0v")
    assert guest.ask(Op.RM, b"a\0") == b"OK\0"
    assert guest.ask(Op.READ, b"a/b/c\0") == "ENOENT"
    assert guest.ask(Op.DIRECTORY, HOME.encode() + b"\0") == b""


def test_rm_of_a_missing_node_needs_its_parent(guest):
    """xenstore.txt: no error if the node does not exist, ENOENT if its parent does not."""
    guest.ask(Op.MKDIR, b"a\0")
    assert guest.ask(Op.RM, b"a/x\0") == b"OK\0"
    assert guest.ask(Op.RM, b"x/y\0") == "ENOENT"
    assert guest.ask(Op.RM, b"/\0") == "EINVAL"


@pytest.mark.parametrize(
    ("op", "payload", "error"),
    [
        (Op.READ, b"nothing\0", "ENOENT"),
        (Op.READ, b"unterminated", "EINVAL"),
        (Op.READ, b"two\0strings\0", "EINVAL"),
        (Op.READ, b"", "EINVAL"),
        (Op.READ, b"\0", "EINVAL"),
        (Op.READ, b"a//b\0", "EINVAL"),
        (Op.READ, b"a/\0", "EINVAL"),
        (Op.READ, b"@releaseDomain\0", "ENOENT"),
        (Op.READ, "ä\0".encode(), "EINVAL"),
        (Op.READ, b"a\nb\0", "EINVAL"),
        (Op.READ, b"a\n\0", "EINVAL"),
        (Op.READ, b"x" * 2049 + b"\0", "EINVAL"),
        (Op.READ, b"/" + b"x" * 3072 + b"\0", "EINVAL"),
        (Op.WRITE, b"a", "EINVAL"),
        (Op.SET_PERMS, b"a\0r5\0", "ENOENT"),
        (Op.GET_DOMAIN_PATH, b"x\0", "EINVAL"),
        (Op.GET_DOMAIN_PATH, b"5", "EINVAL"),
        (Op.TRANSACTION_END, b"T\0", "ENOENT"),
        (Op.UNWATCH, b"a\0t\0", "ENOENT"),
        (Op.WATCH, b"a\0", "EINVAL"),
        (Op.WATCH, b"@nothing\0t\0x\0", "EINVAL"),
        (Op.INTRODUCE, b"5\0", "EACCES"),
        (Op.RELEASE, b"5\0", "EACCES"),
        (Op.CONTROL, b"check\0", "EACCES"),
        (Op.WATCH_EVENT, b"a\0t\0", "ENOSYS"),
        (20, b"", "ENOSYS"),
        (0xFFFF, b"", "ENOSYS"),
        (Op.DIRECTORY_PART, b"/\0x\0", "EINVAL"),
    ],
)
def test_errors(guest, op, payload, error):
    """What cannot be done is answered with xenstored's error, and the connection lives on."""
    assert guest.ask(op, payload) == error
    assert guest.connection.dead is None
    assert guest.ask(Op.WRITE, b"k\0v") == b"OK\0"


def test_domain_questions(guest):
    assert guest.ask(Op.GET_DOMAIN_PATH, b"5\0") == b"/local/domain/5\0"
    assert guest.ask(Op.IS_DOMAIN_INTRODUCED, b"5\0") == b"F\0"
    guest.store.introduce(5)
    assert guest.ask(Op.IS_DOMAIN_INTRODUCED, b"5\0") == b"T\0"


def test_permissions_are_kept_and_inherited(guest):
    """What SET_PERMS wrote is what GET_PERMS answers, and what a new child starts with."""
    guest.ask(Op.WRITE, b"k\0v")
    assert guest.ask(Op.GET_PERMS, b"k\0") == b"n5\0"
    assert guest.ask(Op.SET_PERMS, b"k\0b5\0r7\0") == b"OK\0"
    guest.ask(Op.MKDIR, b"k/below\0")
    assert guest.ask(Op.GET_PERMS, b"k/below\0") == b"n5\0r7\0"


@pytest.mark.parametrize("perms", [b"", b"x5\0", b"r\0", b"r5", b"r-1\0"])
def test_bad_permissions_are_refused(guest, perms):
    guest.ask(Op.WRITE, b"k\0v")
    assert guest.ask(Op.SET_PERMS, b"k\0" + perms) == "EINVAL"
    assert guest.ask(Op.GET_PERMS, b"k\0") == b"n5\0"


def test_a_guest_cannot_give_its_nodes_away(guest):
    """Else it would escape its quota."""
    guest.ask(Op.WRITE, b"k\0v")
    assert guest.ask(Op.SET_PERMS, b"k\0n0\0") == "EPERM"


# ---- large directories


def test_directory_too_large_for_a_message(guest):
    """DIRECTORY answers E2BIG, DIRECTORY_PART gives the same names in pieces."""
    names = [f"{n:04}-{'x' * 20}".encode() for n in range(400)]
    for name in names:
        guest.ask(Op.MKDIR, b"d/" + name + b"\0")
    assert guest.ask(Op.DIRECTORY, b"d\0") == "E2BIG"
    data, generations = b"", set()
    while not data.endswith(b"\0\0"):
        part = guest.ask(Op.DIRECTORY_PART, b"d\0%d\0" % len(data))
        generation, _, piece = part.partition(b"\0")
        generations.add(generation)
        data += piece
    assert data[:-2].split(b"\0") == names
    assert len(generations) == 1


# ---- transactions


def test_a_transaction_is_isolated_until_it_commits(guest):
    transaction = guest.begin()
    guest.ask(Op.WRITE, b"k\0v", transaction)
    assert guest.ask(Op.READ, b"k\0") == "ENOENT"
    assert guest.ask(Op.READ, b"k\0", transaction) == b"v"
    assert guest.end(transaction) == b"OK\0"
    assert guest.ask(Op.READ, b"k\0") == b"v"


def test_an_aborted_transaction_leaves_nothing(guest):
    transaction = guest.begin()
    guest.ask(Op.WRITE, b"k\0v", transaction)
    assert guest.end(transaction, b"F\0") == b"OK\0"
    assert guest.ask(Op.READ, b"k\0") == "ENOENT"
    assert guest.end(transaction) == "ENOENT"


def test_a_node_changed_meanwhile_is_a_conflict(guest):
    """EAGAIN where a node the transaction has read was changed, and nothing is applied."""
    guest.store.write(f"{HOME}/control/shutdown", "suspend")
    transaction = guest.begin()
    assert guest.ask(Op.READ, b"control/shutdown\0", transaction) == b"suspend"
    guest.ask(Op.WRITE, b"control/shutdown\0", transaction)
    guest.store.write(f"{HOME}/control/shutdown", "poweroff")
    assert guest.end(transaction) == "EAGAIN"
    assert guest.store.read(f"{HOME}/control/shutdown") == b"poweroff"


def test_a_node_made_meanwhile_is_a_conflict(guest):
    """That a node did not exist is a fact a transaction may rest on."""
    transaction = guest.begin()
    assert guest.ask(Op.READ, b"k\0", transaction) == "ENOENT"
    guest.store.write(f"{HOME}/k", "v")
    assert guest.end(transaction) == "EAGAIN"


def test_transactions_over_other_nodes_do_not_conflict(guest):
    guest.store.write(f"{HOME}/a", "1")
    guest.store.write(f"{HOME}/b", "1")
    transaction = guest.begin()
    guest.ask(Op.WRITE, b"a\x002", transaction)
    guest.store.write(f"{HOME}/b", "2")
    assert guest.end(transaction) == b"OK\0"
    assert (guest.store.read(f"{HOME}/a"), guest.store.read(f"{HOME}/b")) == (b"2", b"2")


def test_reads_in_a_transaction_repeat(guest):
    """A node read twice in a transaction has the same value, whatever happened outside."""
    guest.store.write(f"{HOME}/a", "1")
    transaction = guest.begin()
    guest.ask(Op.READ, b"a\0", transaction)
    guest.store.write(f"{HOME}/a", "2")
    assert guest.ask(Op.READ, b"a\0", transaction) == b"1"


def test_transactions_do_not_nest(guest):
    transaction = guest.begin()
    assert guest.ask(Op.TRANSACTION_START, b"\0", transaction) == "EBUSY"


def test_bad_verdict_keeps_the_transaction(guest):
    transaction = guest.begin()
    assert guest.end(transaction, b"X\0") == "EINVAL"
    assert guest.end(transaction) == b"OK\0"


# ---- watches


def test_a_watch_fires_at_once_behind_its_reply(guest):
    guest.connection.feed(request(Op.WATCH, b"control/shutdown\0tok\0"))
    reply, event = guest.received()
    assert reply == (Op.WATCH, 7, 0, b"OK\0")
    assert event == (Op.WATCH_EVENT, 0, 0, b"control/shutdown\0tok\0")


def test_a_watch_sees_its_node_and_below(guest):
    """Relative watches report relative paths, absolute ones absolute paths."""
    guest.ask(Op.WATCH, b"dir\0rel\0")
    guest.ask(Op.WATCH, HOME.encode() + b"/dir\0abs\0")
    guest.received()
    guest.store.write(f"{HOME}/dir/x", "1")
    guest.store.write(f"{HOME}/directory", "1")
    assert guest.events() == [(b"dir/x", b"rel"), (HOME.encode() + b"/dir/x", b"abs")]


def test_removal_above_fires_the_watches_below(guest):
    """Only where the watched node was really there."""
    guest.store.write(f"{HOME}/a/b", "1")
    guest.ask(Op.WATCH, b"a/b\0there\0")
    guest.ask(Op.WATCH, b"a/c\0not\0")
    guest.received()
    guest.store.rm(f"{HOME}/a")
    assert guest.events() == [(b"a/b", b"there")]


def test_watches_fire_at_commit_only(guest):
    guest.ask(Op.WATCH, b"k\0t\0")
    guest.received()
    transaction = guest.begin()
    guest.ask(Op.WRITE, b"k\x001", transaction)
    guest.ask(Op.WRITE, b"k\x002", transaction)
    assert guest.events() == []
    guest.connection.feed(request(Op.TRANSACTION_END, b"T\0", transaction))
    assert [m[0] for m in guest.received()] == [Op.TRANSACTION_END, Op.WATCH_EVENT]


def test_a_failed_commit_fires_nothing(guest):
    fired = []
    transaction = guest.begin()
    guest.ask(Op.WRITE, b"k\x001", transaction)
    guest.store.write(f"{HOME}/k", "2")
    guest.store.watch(HOME, fired.append)
    fired.clear()
    assert guest.end(transaction) == "EAGAIN"
    assert fired == []


def test_unwatch_and_duplicates(guest):
    """Path and token together name a watch."""
    assert guest.ask(Op.WATCH, b"k\0t\0") == b"OK\0"
    assert guest.ask(Op.WATCH, b"k\0t\0") == "EEXIST"
    assert guest.ask(Op.WATCH, b"k\0u\0") == b"OK\0"
    assert guest.ask(Op.UNWATCH, b"k\0t\0") == b"OK\0"
    guest.received()
    guest.store.write(f"{HOME}/k", "1")
    assert guest.events() == [(b"k", b"u")]


def test_reset_watches(guest):
    """RESET_WATCHES drops watches and transactions, and the same watch may be set again."""
    guest.ask(Op.WATCH, b"k\0t\0")
    transaction = guest.begin()
    assert guest.ask(Op.RESET_WATCHES, b"\0") == b"OK\0"
    guest.store.write(f"{HOME}/k", "1")
    assert guest.events() == []
    assert guest.end(transaction) == "ENOENT"
    assert guest.ask(Op.WATCH, b"k\0t\0") == b"OK\0"


def test_special_watches(guest):
    """@introduceDomain and @releaseDomain fire by their names, and a watch on / misses them."""
    guest.ask(Op.WATCH, b"@introduceDomain\0i\0")
    guest.ask(Op.WATCH, b"@releaseDomain\0r\0")
    guest.ask(Op.WATCH, b"/\0root\0")
    guest.received()
    guest.store.introduce(5)
    guest.store.release(5)
    assert guest.events() == [(b"@introduceDomain", b"i"), (b"@releaseDomain", b"r")]


def test_equal_unread_events_are_one(guest):
    """A guest that does not read is not told the same twice."""
    guest.ask(Op.WATCH, b"k\0t\0")
    guest.received()
    for value in "123":
        guest.store.write(f"{HOME}/k", value)
    assert guest.events() == [(b"k", b"t")]
    guest.store.write(f"{HOME}/k", "4")
    assert guest.events() == [(b"k", b"t")]


def test_an_event_begun_does_not_swallow_the_next(guest):
    guest.ask(Op.WATCH, b"k\0t\0")
    guest.received()
    guest.store.write(f"{HOME}/k", "1")
    begun = guest.connection.take(5)
    guest.store.write(f"{HOME}/k", "2")
    assert len(messages(begun + guest.connection.take(1 << 20))) == 2


# ---- the toolstack's side


def test_toolstack_watch_may_change_the_store(guest):
    """A callback that writes is not entered again from within; its change is seen afterwards."""
    store, seen = guest.store, []

    def notify(path):
        seen.append((path, store.read(path)))
        if store.read(path) == b"ping":
            store.write(path, b"pong")
            assert seen[-1] == (path, b"ping")

    store.watch(f"{HOME}/k", notify)
    guest.ask(Op.WRITE, b"k\0ping")
    assert seen == [(f"{HOME}/k", None), (f"{HOME}/k", b"ping"), (f"{HOME}/k", b"pong")]


def test_toolstack_unwatch(guest):
    seen = []
    watch = guest.store.watch("/a", seen.append)
    guest.store.unwatch(watch)
    guest.store.write("/a", "1")
    assert seen == ["/a"]


def test_toolstack_reads_of_nothing():
    store = XenStore()
    assert store.read("/a") is None
    assert store.ls("/a") == []
    store.rm("/a/b")


def test_toolstack_permissions():
    store = XenStore()
    store.write(HOME, "", perms=("n0", "r5"))
    assert Guest(store).ask(Op.GET_PERMS, HOME.encode() + b"\0") == b"n0\0r5\0"


@pytest.mark.parametrize("path", ["", "/a/", "/a b", "@releaseDomain"])
def test_toolstack_paths_are_checked(path):
    with pytest.raises(UsageError, match="xenstore"):
        XenStore().write(path, "x")


# ---- quotas


def test_node_quota(guest):
    """A guest's nodes are limited, the toolstack's are not; removing makes room."""
    quota = guest.store.quota.nodes
    answers = [guest.ask(Op.MKDIR, b"n%d\0" % n) for n in range(quota + 5)]
    # Two nodes of the limit went to /local/domain/5's own chain.
    assert answers.count(b"OK\0") == quota - 3
    assert answers[-1] == "ENOSPC"
    guest.store.write("/anywhere", "1")
    assert guest.ask(Op.RM, b"n0\0") == b"OK\0"
    assert guest.ask(Op.MKDIR, b"again\0") == b"OK\0"


def test_node_quota_in_transactions():
    """Neither one transaction nor many side by side get past the quota."""
    guest = Guest(XenStore(Quota(nodes=10)))
    guest.store.write(HOME, "")
    first, second = guest.begin(), guest.begin()
    for n in range(8):
        assert guest.ask(Op.MKDIR, b"/a%d\0" % n, first) == b"OK\0"
        assert guest.ask(Op.MKDIR, HOME.encode() + b"/b%d\0" % n, second) == b"OK\0"
    assert [guest.ask(Op.MKDIR, b"/c%d\0" % n, first) for n in range(3)] == [
        b"OK\0",
        b"OK\0",
        "ENOSPC",
    ]
    assert guest.end(first) == b"OK\0"
    assert guest.end(second) == "ENOSPC"
    assert guest.store.ls(HOME) == []


def test_depth_counts_as_nodes():
    """One write of a deep path makes no more nodes than the quota allows."""
    guest = Guest(XenStore(Quota(nodes=10)))
    assert guest.ask(Op.WRITE, b"/" + b"/".join([b"d"] * 11) + b"\0v") == "ENOSPC"
    assert guest.store.ls("/") == []


def test_watch_and_transaction_quotas():
    guest = Guest(XenStore(Quota(watches=2, transactions=2, transaction_nodes=3)))
    assert [guest.ask(Op.WATCH, b"k\0%d\0" % n) for n in range(3)][-1] == "ENOSPC"
    numbers = [guest.begin(), guest.begin()]
    assert guest.ask(Op.TRANSACTION_START, b"\0") == "ENOSPC"
    answers = [guest.ask(Op.READ, b"/k%d\0" % n, numbers[0]) for n in range(4)]
    assert answers == ["ENOENT"] * 3 + ["ENOSPC"]


def test_answers_unread_stop_the_requests():
    """A guest that asks without reading is not served until it reads, and loses nothing."""
    guest = Guest(XenStore(Quota(output_bytes=1000)))
    for n in range(50):
        guest.connection.feed(request(Op.READ, b"k\0", number=n))
    assert guest.connection.pending < 1100
    assert not guest.connection.wants_input
    data = b""
    while piece := guest.connection.take(100):
        data += piece
    assert [m[1] for m in messages(data)] == list(range(50))


def test_unread_events_end_the_connection():
    """Events that pile up without end kill the connection, not the server."""
    guest = Guest(XenStore(Quota(output_bytes=1000, output_bytes_fatal=2000)))
    guest.ask(Op.WATCH, b"/\0t\0")
    for n in range(100):
        guest.store.write(f"/n{n}", "")
    assert guest.connection.dead is not None
    assert guest.connection.take(100) == b""


def test_requests_piling_up_end_the_connection():
    guest = Guest(XenStore(Quota(output_bytes=1000)))
    for _ in range(1000):
        guest.connection.feed(request(Op.READ, b"k\0"))
    assert "answers" in guest.connection.dead


def test_a_message_beyond_all_limits_ends_the_connection(guest):
    """The framing is lost: the connection says why it is dead and takes nothing more."""
    guest.connection.feed(struct.pack("<4I", Op.READ, 1, 0, 4097))
    assert "4097" in guest.connection.dead
    guest.connection.feed(request(Op.READ, b"k\0"))
    assert guest.connection.take(100) == b""


def test_close_forgets_the_watches(guest):
    guest.ask(Op.WATCH, b"k\0t\0")
    guest.connection.close()
    guest.store.write(f"{HOME}/k", "1")
    assert guest.connection.take(100) == b""


# ---- properties

NAMES = st.sampled_from(["a", "b", "c", "a/a", "a/b", "a/b/c", "b/a"])
OPS = st.lists(
    st.tuples(st.sampled_from(["write", "rm", "mkdir"]), NAMES, st.binary(max_size=4)), max_size=30
)


class Model:
    """The store as a plain dict of absolute paths."""

    def __init__(self):
        self.values = {}

    def make(self, path):
        parts = path.split("/")
        for n in range(1, len(parts) + 1):
            self.values.setdefault("/".join(parts[:n]), b"")

    def apply(self, op, path, value):
        if op == "rm":
            parent = path.rpartition("/")[0]
            if parent and parent not in self.values:
                return "ENOENT"
            doomed = [p for p in self.values if p == path or p.startswith(path + "/")]
            for p in doomed:
                del self.values[p]
            return b"OK\0"
        self.make(path)
        if op == "write":
            self.values[path] = value
        return b"OK\0"


def apply(guest, op, path, value, transaction=0):
    payload = path.encode() + b"\0" + (value if op == "write" else b"")
    number = {"write": Op.WRITE, "rm": Op.RM, "mkdir": Op.MKDIR}[op]
    return guest.ask(number, payload, transaction)


def contents(store):
    """Every node below the home, by relative path."""
    found, todo = {}, store.ls(HOME)
    while todo:
        path = todo.pop()
        found[path] = store.read(f"{HOME}/{path}")
        todo += [f"{path}/{name}" for name in store.ls(f"{HOME}/{path}")]
    return found


def fresh_guest():
    guest = Guest()
    guest.store.write(HOME, "")
    return guest


@given(OPS)
def test_any_history_leaves_what_the_model_says(history):
    """Values, structure and answers are those of a dict; so is the count behind the quota."""
    guest, model = fresh_guest(), Model()
    for step in history:
        assert apply(guest, *step) == model.apply(*step)
    assert contents(guest.store) == model.values
    assert guest.store.tree.owned[5] == len(model.values)


@given(OPS, OPS, OPS)
def test_a_transaction_is_all_or_nothing(before, inside, outside):
    """A commit gives the history as if it ran at the commit's moment, or EAGAIN and nothing."""
    guest, model = fresh_guest(), Model()
    for step in before:
        apply(guest, *step)
        model.apply(*step)
    transaction = guest.begin()
    mirror = Model()
    mirror.values = dict(model.values)
    answers = []
    for index in range(max(len(inside), len(outside))):
        if index < len(inside):
            answers.append((inside[index], apply(guest, *inside[index], transaction)))
        if index < len(outside):
            apply(guest, *outside[index])
            model.apply(*outside[index])
    verdict = guest.end(transaction)
    if verdict == b"OK\0":
        for step, answer in answers:
            assert model.apply(*step) == answer
    else:
        assert verdict == "EAGAIN"
        assert outside
    assert contents(guest.store) == model.values


@given(st.binary(max_size=3000), st.integers(1, 50))
def test_garbage_never_raises(data, piece):
    """Whatever a guest sends, in whatever pieces, the server answers messages or hangs up."""
    guest = Guest()
    output = b""
    for start in range(0, len(data), piece):
        guest.connection.feed(data[start : start + piece])
        output += guest.connection.take(piece)
    output += guest.connection.take(1 << 24)
    if guest.connection.dead is None:
        messages(output)


@given(
    st.lists(
        st.tuples(
            st.sampled_from([*Op, 20, 99]),
            st.sampled_from([0, 0, 1, 2, 0xFFFFFFFF]),
            st.one_of(
                st.binary(max_size=20),
                st.sampled_from(
                    [b"T\0", b"F\0", b"\0", b"a\0", b"a/b\0t\0", b"/\0n5\0", b"@x\0y\0"]
                ),
            ),
        ),
        max_size=40,
    )
)
@settings(max_examples=300)
def test_well_framed_nonsense_never_raises(requests):
    """Every well-framed request gets exactly one reply with its own req_id, in order."""
    guest = Guest()
    for number, (op, transaction, payload) in enumerate(requests):
        guest.connection.feed(request(op, payload, transaction, number))
    replies = [m for m in guest.received() if m[0] != Op.WATCH_EVENT]
    assert guest.connection.dead is None
    assert [m[1] for m in replies] == list(range(len(requests)))


# ---- the ring


def ring(req_cons=0, req_prod=0, rsp_cons=0, rsp_prod=0):
    page = memoryview(bytearray(4096))
    struct.pack_into("<4I", page, 2048, req_cons, req_prod, rsp_cons, rsp_prod)
    return page


def indices(page):
    return struct.unpack_from("<4I", page, 2048)


@given(st.integers(0, 0xFFFFFFFF), st.binary(max_size=1024))
def test_request_ring_gives_what_was_put(start, data):
    """At every position of the ring, across the end and across the wrap of the indices."""
    page = ring(start, (start + len(data)) & 0xFFFFFFFF)
    for n, byte in enumerate(data):
        page[(start + n) % 1024] = byte
    assert drain_request_ring(page) == data
    assert indices(page)[0] == indices(page)[1]
    assert drain_request_ring(page) == b""


@given(st.integers(0, 0xFFFFFFFF), st.integers(0, 1024), st.binary(max_size=2000))
def test_response_ring_takes_what_fits(start, used, data):
    """Never more than there is room for, nothing outside the response ring changes."""
    page = ring(rsp_cons=start, rsp_prod=(start + used) & 0xFFFFFFFF)
    before = bytes(page)
    count = fill_response_ring(page, data)
    assert count == min(len(data), 1024 - used)
    end = start + used
    assert bytes(page[1024 + (end + n) % 1024] for n in range(count)) == data[:count]
    assert (indices(page)[3] - start) & 0xFFFFFFFF == used + count
    assert bytes(page[:1024]) == before[:1024]
    assert bytes(page[2048:2060]) == before[2048:2060]
    assert bytes(page[2064:]) == before[2064:]


@given(st.integers(0, 0xFFFFFFFF), st.integers(1025, 0xFFFFFFFF))
def test_impossible_indices_are_the_guests_fault(start, distance):
    """A distance beyond the ring raises GuestStateError and touches nothing."""
    end = (start + distance) & 0xFFFFFFFF
    for page, call in (
        (ring(start, end), lambda page: drain_request_ring(page)),
        (ring(rsp_cons=start, rsp_prod=end), lambda page: fill_response_ring(page, b"x")),
    ):
        before = bytes(page)
        with pytest.raises(GuestStateError, match="broke its xenstore"):
            call(page)
        assert bytes(page) == before


def put_requests(page, data):
    """What a guest does: append to the request ring as far as there is room."""
    cons, prod = indices(page)[:2]
    count = min(len(data), 1024 - (prod - cons))
    for n in range(count):
        page[(prod + n) % 1024] = data[n]
    struct.pack_into("<I", page, 2052, prod + count)
    return count


def get_responses(page, limit=1024):
    """What a guest does: take what is in the response ring."""
    cons, prod = indices(page)[2:]
    count = min(prod - cons, limit)
    data = bytes(page[1024 + (cons + n) % 1024] for n in range(count))
    struct.pack_into("<I", page, 2056, cons + count)
    return data


@given(st.integers(1, 300), st.integers(1, 300))
@settings(max_examples=50)
def test_a_value_larger_than_the_ring_goes_through(chunk_in, chunk_out):
    """A 4000-byte value is written and read back through 1024-byte rings, however slowly."""
    page, guest = ring(), Guest()
    value = bytes(range(250)) * 16
    todo = request(Op.WRITE, b"k\0" + value) + request(Op.READ, b"k\0")
    answer = b""
    for _ in range(10_000):
        count = put_requests(page, todo[:chunk_in])
        todo = todo[count:]
        service_ring(page, guest.connection)
        answer += get_responses(page, chunk_out)
        if not todo and len(answer) == 16 + 3 + 16 + len(value):
            break
    assert [m[3] for m in messages(answer)] == [b"OK\0", value]


def test_service_ring_says_when_to_notify():
    """True exactly where the guest has something new to look at."""
    page, guest = ring(), Guest()
    assert not service_ring(page, guest.connection)
    put_requests(page, request(Op.READ, b"k\0"))
    assert service_ring(page, guest.connection)
    assert not service_ring(page, guest.connection)


def test_service_ring_survives_a_broken_ring():
    """The connection dies with the reason; the next call does nothing."""
    page, guest = ring(req_prod=5000), Guest()
    assert not service_ring(page, guest.connection)
    assert "request ring" in guest.connection.dead
    before = bytes(page)
    assert not service_ring(page, guest.connection)
    assert bytes(page) == before
