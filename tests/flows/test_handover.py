"""The hand-over of a migration, with a fault at each of its steps: whatever dies, is cut or full,
one copy runs after `xsave migrate --recover`, it is the guest as it was, and nothing else is left.

XSAVE_MIGRATIONS says how many migrations in a row the long test does (8).
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys

import pytest
import zstandard

from tests.conftest import ROOT
from tests.flows import faulty
from tests.flows.flow import (
    MIB,
    console,
    create,
    nothing_is_left,
    processes,
    runs_on,
    state,
    wait_for,
)
from tests.flows.moving import migrate, one_runs, receivers, recover_all
from xsave.errors import NotFound
from xsave.host import handshake, prestart
from xsave.host.handover import table
from xsave.host.handover.ends import CommandEnd, far_end
from xsave.host.handover.journal import Journals
from xsave.host.handover.recovery import recover
from xsave.host.host import add_host

MIGRATIONS = int(os.environ.get("XSAVE_MIGRATIONS") or 8)
BUSY = "touch=1M write=1M rate=8M rest=2"
SENDER_PLACES = ["sent", "held", "holding", "asked", "won"]
#: Of a migration that is not live the guest is held later.
ALL_PLACES = [*SENDER_PLACES, "offered"]
RECEIVER_PLACES = ["complete", "offering", "offered", "told", "running"]


@pytest.fixture
def hosts(localhost, monkeypatch):
    """localhost with a busy guest g, and b."""
    monkeypatch.setattr(prestart, "PROCESS_MODULE", faulty.PROCESS_MODULE)
    target = add_host("b", 64 * MIB, seed=4)
    create(localhost, cmdline=BUSY)
    wait_for(lambda: "TICK 1" in console(localhost))
    return localhost, target


def kind(place):
    """Options with which a migration comes to this place."""
    return ["--no-live"] if place == "offered" else []


@pytest.mark.parametrize("when", ["before", "behind"])
@pytest.mark.parametrize("place", ALL_PLACES)
def test_the_sender_is_killed(xsave, hosts, place, when):
    """kill -9 of the sender around each of its steps."""
    code, _ = migrate(*hosts, *kind(place), sender={"at": place, "when": when, "what": "kill"})
    assert code == -signal.SIGKILL
    recover_all(xsave, *hosts)
    where = one_runs(*hosts)
    if place in ("sent", "held", "offered"):
        assert where is hosts[0]
    if place == "won":
        assert where is hosts[1]


def test_the_sender_is_killed_and_the_receiver_lives(xsave, hosts):
    """A receiver that does not see yet that its sender is gone is no reason to leave the guest as
    it is: recovery of whatever there is takes it back at once."""
    source, _ = hosts
    stop = {"at": "complete", "when": "before", "what": "stop"}
    kill = {"at": "sent", "when": "behind", "what": "kill"}
    code, _ = migrate(*hosts, sender=kill, receiver=stop)
    assert code == -signal.SIGKILL
    (receiver,) = receivers(xsave.home)
    try:
        (before,) = xsave.json("migrate", "--status")
        assert (before["at_work"], before["verdict"]) == (True, "keep")
        assert "it is to go on at localhost" in before["meaning"]
        (answer,) = xsave.json("migrate", "--recover")
        assert answer["outcome"] == "kept"
        runs_on(source)
    finally:
        os.kill(receiver, signal.SIGKILL)
    recover_all(xsave, *hosts)
    assert one_runs(*hosts) is source


@pytest.mark.parametrize("when", ["before", "behind"])
@pytest.mark.parametrize("place", RECEIVER_PLACES)
def test_the_receiver_is_killed(xsave, hosts, place, when):
    """kill -9 of the receiver around each of its steps: the sender finds out by itself."""
    code, said = migrate(*hosts, receiver={"at": place, "when": when, "what": "kill"})
    where = one_runs(*hosts)
    ran = (place, when) in (("told", "behind"), ("running", "before"), ("running", "behind"))
    assert (where is hosts[1]) == ran, said
    assert code == (0 if ran else 7), said
    recover_all(xsave, *hosts)
    assert one_runs(*hosts) is where


@pytest.mark.parametrize("place", ["offering", "offered", "told", "running"])
def test_both_are_killed(xsave, hosts, place):
    """The receiver dies at its step, the sender when it waits for it."""
    fault = {"at": "asked", "when": "before", "what": "kill"}
    if place == "offering":
        fault["at"] = "sent"
    kill = {"at": place, "when": "behind", "what": "kill"}
    code, _ = migrate(*hosts, sender=fault, receiver=kill)
    assert code == -signal.SIGKILL
    wait_for(lambda: not any(j.at_work() for h in hosts for j in Journals(h.directory).all()))
    recover_all(xsave, *hosts)
    one_runs(*hosts)


@pytest.mark.parametrize("place", ALL_PLACES)
def test_the_link_is_cut_by_the_sender(xsave, hosts, place):
    """Both pipes end at the sender's side."""
    code, said = migrate(
        *hosts, *kind(place), sender={"at": place, "when": "before", "what": "cut"}
    )
    where = one_runs(*hosts)
    assert code == (0 if where is hosts[1] else 7), said
    recover_all(xsave, *hosts)
    assert one_runs(*hosts) is where


@pytest.mark.parametrize("place", RECEIVER_PLACES)
def test_the_link_is_cut_by_the_receiver(xsave, hosts, place):
    """Both pipes end at the receiver's side."""
    code, said = migrate(*hosts, receiver={"at": place, "when": "before", "what": "cut"})
    where = one_runs(*hosts)
    assert code == (0 if where is hosts[1] else 7), said
    recover_all(xsave, *hosts)
    assert one_runs(*hosts) is where


@pytest.mark.parametrize(
    ("end", "place"),
    [("sender", p) for p in ("sent", "holding", "asked", "won")]
    + [("receiver", p) for p in ("complete", "offered", "running")],
)
def test_the_disk_is_full(xsave, hosts, end, place):
    """No journal of that host can be written from some step on, by nobody: what cannot be written
    down is not done, and when there is room again one copy runs."""
    migrate(*hosts, **{end: {"at": place, "when": "before", "what": "full"}})
    recover_all(xsave, *hosts)
    one_runs(*hosts)


def test_full_before_it_begins(xsave, hosts):
    """A migration that cannot be written down does not begin."""
    (hosts[0].directory / faulty.FULL).touch()
    code, said = migrate(*hosts)
    assert (code, "No space left" in said) == (7, True)
    assert one_runs(*hosts) is hosts[0]
    assert Journals(hosts[0].directory).all() == []


@pytest.mark.parametrize("place", ALL_PLACES)
def test_ctrl_c(xsave, hosts, place):
    """Before the go-ahead it cancels; behind it the journals say how it ended, and so does the exit
    code."""
    code, said = migrate(
        *hosts, *kind(place), sender={"at": place, "when": "before", "what": "interrupt"}
    )
    where = one_runs(*hosts)
    assert code == (0 if where is hosts[1] else 130), said
    if place in ("sent", "held", "offered"):
        assert where is hosts[0]
    if place == "won":
        assert where is hosts[1]
    recover_all(xsave, *hosts)


def test_the_other_end_cannot_be_reached(xsave, hosts):
    """Nothing is done, and it is said; with the other end back it is decided."""
    migrate(*hosts, sender={"at": "won", "when": "before", "what": "kill"})
    source, target = hosts
    away = target.directory.with_name("away")
    record = target.directory / "host.json"
    record.rename(away)
    ended = xsave("migrate", "--recover", "g")
    assert ended.code == 9
    assert "--recover" in ended.err and "cannot be asked" in ended.err
    assert state(source) == "suspended"
    (said,) = xsave.json("migrate", "--status", "g")
    assert (said["target"], said["finished"]) == (None, False)
    assert "not known" in said["meaning"]
    away.rename(record)
    (done,) = xsave.json("migrate", "--recover", "g")
    assert (done["outcome"], done["source"]["state"]) == ("migrated", "given-up")
    assert one_runs(*hosts) is target


@pytest.mark.parametrize("place", ["asked", "won"])
def test_by_a_command_at_the_other_end(xsave, hosts, place):
    """The far end is asked through its own `xsave migrate`: what a remote host is asked by."""
    migrate(*hosts, sender={"at": place, "when": "before", "what": "kill"})
    source, target = hosts
    asked = []

    def run(arguments):
        asked.append(list(arguments))
        answer = xsave("--host", target.name, *arguments, "--json")
        if answer.code == NotFound.exit_code:
            raise NotFound(answer.err)
        return answer.json()

    (journal,) = Journals(source.directory).all()
    end = CommandEnd(run)
    assert end.look(journal.read().transaction).state in table.SETTLED
    outcome = recover(source, journal, lambda entry: end)
    assert (outcome.what == "migrated") == (one_runs(*hosts) is target)
    assert end.look("nothing-of-that-name").state == table.State.UNKNOWN
    assert ["migrate", "--recover", journal.read().transaction] in asked
    assert far_end(journal.read()).look(journal.read().transaction) == end.look(
        journal.read().transaction
    )


def test_the_processes_of_domains_die(xsave, hosts):
    """The held source's dies, the guest runs at the target: only cleaning is to do. A target's that
    dies when it has run leaves the choice to a person."""
    source, target = hosts
    migrate(*hosts, sender={"at": "won", "when": "before", "what": "kill"})
    os.kill(processes(source)[0], signal.SIGKILL)
    wait_for(lambda: not processes(source))
    (done,) = xsave.json("migrate", "--recover", "g")
    assert (done["outcome"], done["finished"]) == ("migrated", True)
    assert one_runs(*hosts) is target
    migrate(target, source, sender={"at": "won", "when": "before", "what": "kill"})
    os.kill(processes(source)[0], signal.SIGKILL)
    wait_for(lambda: not processes(source))
    died = xsave("--host", "b", "migrate", "--recover", "g")
    assert died.code == 9
    assert "its process has died" in died.err
    assert state(target) == "suspended"
    xsave.ok("--host", "b", "unpause", "g")
    assert one_runs(*hosts) is target
    assert all(one["finished"] for one in xsave.json("--host", "b", "migrate", "--status", "g"))


def test_a_copy_on_its_way_is_nobody_elses(xsave, hosts):
    """What waits for the go-ahead cannot be unpaused or saved by others, nor recovered by name
    while its receiver works; who asks for all of them is told so. By its id it is given up, and the
    guest stays."""
    source, target = hosts
    stop = {"at": "holding", "when": "before", "what": "stop"}
    arguments = ["migrate", "g", "--to", "b"]
    command = [sys.executable, "-m", "tests.flows.faulty", json.dumps({"sender": stop}), *arguments]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        try:
            wait_for(lambda: state(target, "g--incoming") == "paused")
            (journal,) = wait_for(
                lambda: [j for j in Journals(target.directory).all() if j.read().state == "ready"]
            )
            for refused in (("unpause", "g--incoming"), ("save", "g--incoming", os.devnull)):
                assert xsave("--host", "b", *refused).code == 6
            assert xsave("--host", "b", "migrate", "--recover", "g").code == 6
            assert xsave("migrate", "--recover", "g").code == 6
            for host in hosts:
                all_of_them = xsave.ok("--host", host.name, "migrate", "--recover")
                assert re.fullmatch(r"migration \w+ of g is at work\n", all_of_them.err)
            xsave.ok("--host", "b", "migrate", "--recover", journal.read().transaction)
            assert state(target, "g--incoming") is None
            os.kill(process.pid, signal.SIGCONT)
            process.communicate(timeout=60)
            assert process.returncode == 7
        finally:
            process.kill()  # it is stopped, if something went wrong
    assert one_runs(*hosts) is source


IMPATIENT = """
import sys
from xsave import cli, receive
receive.GO_TIMEOUT_S = 1.0
sys.argv[1:] = ["migrate-receive", "--json"]
cli.main()
"""


@pytest.mark.parametrize("compressed", [False, True])
def test_a_sender_that_falls_silent(localhost, builtin_image, compressed):
    """It has sent all and is never heard of again, though the link stands: the copy does not wait
    for ever."""
    image = builtin_image.read_bytes()
    if compressed:
        image = zstandard.ZstdCompressor().compress(image)
    with subprocess.Popen(
        [sys.executable, "-c", IMPATIENT],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        process.stdin.write(image)
        process.stdin.flush()
        said = process.stdout.read()
        assert process.wait(60) == 7
        assert b"no go-ahead" in process.stderr.read()
    assert said == handshake.BANNER + handshake.READY
    (journal,) = Journals(localhost.directory).all()
    assert journal.read().state == table.State.ABANDONED
    nothing_is_left(localhost)


def test_a_sender_without_an_id(xsave, localhost, builtin_image):
    """As `xl migrate` is one: the words are the same, and the receiver's journal has an id of its
    own."""
    image = builtin_image.read_bytes()
    received = xsave("migrate-receive", "--json", stdin=image + handshake.GO)
    assert received.code == 0
    report = handshake.REPORT + handshake.STATUS_OK
    assert received.out == handshake.BANNER + handshake.READY + report
    (said,) = xsave.json("migrate", "--status", "g")
    assert said["id"] in received.err
    assert (said["source"], said["target"]["state"]) == (None, "running")
    assert (said["target"]["domain"], said["finished"]) == ("running", True)


def faults(rng):
    """Return random faults for one migration, none in a quarter of them."""
    found = {}
    for end, places in (("sender", SENDER_PLACES), ("receiver", RECEIVER_PLACES)):
        if rng.random() < 0.5:
            what = rng.choice(["kill", "cut", "full"] + ["interrupt"] * (end == "sender"))
            when = rng.choice(["before", "behind"])
            found[end] = {"at": rng.choice(places), "when": when, "what": what}
    return found


@pytest.mark.slow
@pytest.mark.timeout(0)  # as long as XSAVE_MIGRATIONS says
def test_migrations_in_a_row(xsave, hosts):
    """Back and forth under load with random faults: always exactly one running copy."""
    rng = random.Random(MIGRATIONS)
    where, moved = hosts[0], 0
    for number in range(MIGRATIONS):
        (other,) = [host for host in hosts if host is not where]
        chosen = faults(rng)
        code, said = migrate(where, other, **chosen)
        try:
            recover_all(xsave, *hosts)
            now = one_runs(*hosts)
        except BaseException as error:
            error.add_note(f"migration {number}: {chosen}: {code}: {said}")
            raise
        moved += now is not where
        where = now
        if number % 25 == 24:
            print(f"{number + 1}: {moved} of them moved the guest", flush=True)
    print(f"{MIGRATIONS} migrations, {moved} of them moved the guest")
    assert moved > 0
