"""migrate --postcopy: the guest goes after one round, and the rest of its memory follows it.

The oracle compares page by page when all has come and before the source ends; the target's guest is
kept from running until then, or its own writes would differ. Where it runs, it checks itself what
it reads.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from tests.conftest import ROOT
from tests.flows import faulty, standstill
from tests.flows.bringing import filler, guard, only_process
from tests.flows.flow import (
    MIB,
    console,
    create,
    is_complete,
    nothing_is_left,
    processes,
    restore,
    runs_on,
    state,
    wait_for,
    wait_for_tick,
)
from tests.flows.live import HEAVY, migrate_live, moved, start
from tests.flows.moving import migrate, one_runs, recover_all
from xsave.commands.migration import RISK
from xsave.compare import compare
from xsave.errors import ImageError, StorageError
from xsave.guest.xen.domctl import Domctl
from xsave.guest.xen.logdirty import KINDS, USERFAULTFD
from xsave.host import prestart, receivers
from xsave.host.handover.journal import Journals
from xsave.host.handover.table import State
from xsave.host.host import add_host
from xsave.host.transport import Channel
from xsave.image import postwire
from xsave.image.buffers import Rows, Zeros, reader
from xsave.image.postcopy import PostcopyPfns
from xsave.image.stream import StreamDecoder
from xsave.precopy import POSTCOPY, Limits
from xsave.progress import Decided, Round


class Sent:
    """Counts how often each pfn was sent behind the guest."""

    def __init__(self, monkeypatch):
        self.pfns = []
        page_data = postwire.page_data

        def noted(pfns, pages):
            self.pfns += pfns.tolist()
            return page_data(pfns, pages)

        monkeypatch.setattr(postwire, "page_data", noted)


class Oracle:
    """Compares the two when all has come. Nobody may run at the target until then."""

    def __init__(self, monkeypatch, target):
        self.found = None
        still = target.directory / standstill.STILL
        destroy, command = Domctl.destroy, receivers.own_command

        def still_command(host, arguments):
            python, m, _, *rest = command(host, arguments)
            return [python, m, standstill.PROCESS_MODULE, *rest]

        def compare_and_destroy(domctl):
            if domctl.journal is not None and self.found is None:
                with target.find(domctl.name) as other:
                    self.found = compare(domctl, other)
                    still.unlink()
                    other.info()  # wakes it
            destroy(domctl)

        still.touch()
        monkeypatch.setattr(receivers, "own_command", still_command)
        monkeypatch.setattr(Domctl, "destroy", compare_and_destroy)


@pytest.mark.parametrize("kind", KINDS)
def test_the_target_has_the_source_as_it_was(host, target, monkeypatch, kind):
    """Not one page differs though nobody ever asked for one; what came behind came once, and is
    what was written since the one round."""
    if kind == USERFAULTFD and host.info()["dirty_log"] != USERFAULTFD:
        pytest.skip("this kernel cannot log writes by write protection")
    sent, events = Sent(monkeypatch), []
    oracle = Oracle(monkeypatch, target)
    start(host, vcpus=2)
    result = migrate_live(host, target, postcopy=True, dirty_log=kind, report=events.append)
    assert oracle.found.different == ()
    assert oracle.found.equal_pages > 3000
    assert oracle.found.equal_tables > 20
    assert len(sent.pfns) == len(set(sent.pfns)) == result.postcopy_pages > 500
    assert [e.number for e in events if isinstance(e, Round)] == [1]
    assert [e.action for e in events if isinstance(e, Decided)] == [POSTCOPY]
    assert result.nr_rounds == 2
    moved(host, target)


def test_the_guest_runs_meanwhile(host, target, monkeypatch):
    """It asks for pages long before all are there, gets them, and finds nothing wrong."""
    sent = Sent(monkeypatch)
    start(host)
    result = migrate_live(host, target, postcopy=True, bandwidth=3 * MIB)
    assert result.postcopy_faults > 0  # few: one leads to those behind it
    assert len(sent.pfns) == len(set(sent.pfns)) == result.postcopy_pages
    assert result.downtime_ns < result.total_ns / 4
    moved(host, target)


# ---- whatever dies


def slow(parameter):
    """One that differs from its neighbours in little."""
    return pytest.param(parameter, marks=pytest.mark.slow)


@pytest.fixture
def hosts(localhost, monkeypatch):
    """localhost with a busy guest g, and b."""
    monkeypatch.setattr(prestart, "PROCESS_MODULE", faulty.PROCESS_MODULE)
    target = add_host("b", 64 * MIB, seed=4)
    create(localhost, memory_bytes=16 * MIB, cmdline=HEAVY)
    wait_for(lambda: "TICK 1" in console(localhost))
    return localhost, target


def postcopy(*hosts, **faults):
    """Migrate with post-copy, slowly enough to have a middle; return exit code and what was
    said."""
    return migrate(*hosts, "--postcopy", "--bandwidth", "24M", **faults)


def journal_state(host):
    """Return the state in the host's one journal."""
    (journal,) = Journals(host.directory).all()
    return journal.read().state


def nobody_is_at_work(*hosts):
    return not any(j.at_work() for host in hosts for j in Journals(host.directory).all())


def was_lost(xsave, source, target):
    """Assert that the guest is stopped at the target, that nobody lets the older copy run, that
    everybody says so, and that a person can have the older one."""
    assert journal_state(target) == State.LOST
    assert state(target) == "crashed"
    assert "a part of its memory was lost" in console(target)
    for _ in range(2):
        told = xsave("migrate", "--recover")
        assert told.code == 9
        assert "it is stopped there for good" in told.err
        assert state(source) == "suspended"
    (said,) = xsave.json("migrate", "--status", "g")
    assert (said["finished"], said["verdict"]) == (False, "ask a person")
    assert "is held at localhost as it was before it moved" in said["meaning"]
    assert xsave("--host", "b", "unpause", "g").code == 7
    assert xsave("--host", "b", "migrate", "--recover").code == 9
    xsave.ok("unpause", "g")
    xsave.ok("--host", "b", "destroy", "g")
    recover_all(xsave, source, target)
    assert one_runs(source, target) is source


def ends_well(xsave, source, target, *, where=None, lost=None):
    """Assert that after recovery one copy runs, there if it is known, or the guest was lost."""
    wait_for(lambda: nobody_is_at_work(source, target))
    wait_for(lambda: journal_state(target) != State.PARTIAL)
    if journal_state(target) == State.LOST:
        assert lost is not False
        was_lost(xsave, source, target)
    else:
        assert lost is not True
        recover_all(xsave, source, target)
        found = one_runs(source, target)
        assert where in (None, found)


@pytest.mark.parametrize("when", ["before", slow("behind")])
@pytest.mark.parametrize("place", ["sent", "holding", "asked", "behind", "served", "won"])
def test_the_sender_is_killed(xsave, hosts, place, when):
    """kill -9 of the sender around its steps: before the go-ahead the guest stays, when all has
    been sent it moves, in between it is lost."""
    code, _ = postcopy(*hosts, sender={"at": place, "when": when, "what": "kill"})
    assert code == -signal.SIGKILL
    step = (place, when)
    stays = place == "sent" or step == ("holding", "before")
    goes = place in ("served", "won") or step == ("behind", "behind")
    lost = place == "asked" or step == ("behind", "before") or None
    where = hosts[0] if stays else hosts[1] if goes else None
    ends_well(xsave, *hosts, where=where, lost=False if stays or goes else lost)


@pytest.mark.parametrize("place", ["sent", "holding", "asked", "behind", "served", "won"])
def test_the_link_is_cut_by_the_sender(xsave, hosts, place):
    """Both pipes end at the sender's side: it says which of the three it came to."""
    code, said = postcopy(*hosts, sender={"at": place, "when": "before", "what": "cut"})
    stays, goes = place in ("sent", "holding"), place in ("served", "won")
    assert code == (7 if stays else 0 if goes else 9), said
    if code == 9:
        assert "it is stopped there for good" in said
        assert "as it was before that" in said
    where = hosts[0] if stays else hosts[1] if goes else None
    ends_well(xsave, *hosts, where=where, lost=not (stays or goes))


@pytest.mark.parametrize("what", ["kill", slow("cut")])
@pytest.mark.parametrize("place", ["complete", "offered", "told", "running", "partial", "whole"])
def test_the_receiver_ends(xsave, hosts, place, what):
    """Once the guest runs it does not need the command that received it: the connection is with
    the process that fetches the pages."""
    code, said = postcopy(*hosts, receiver={"at": place, "when": "before", "what": what})
    ran = place in ("running", "partial", "whole") or (place, what) == ("told", "cut")
    assert code == (0 if ran else 7), said
    ends_well(xsave, *hosts, where=hosts[1] if ran else hosts[0], lost=False)


@pytest.mark.parametrize("place", ["sent", slow("held"), "holding", "asked", slow("behind")])
def test_ctrl_c(xsave, hosts, place):
    """Before the go-ahead it cancels; behind it nothing is left undone for it."""
    code, said = postcopy(*hosts, sender={"at": place, "when": "before", "what": "interrupt"})
    stays = place in ("sent", "held", "holding")
    assert code == (130 if stays else 0), said
    ends_well(xsave, *hosts, where=hosts[0] if stays else hosts[1], lost=False)


SLOWLY = """
import time
from xsave import cli
from xsave.postcopy import LeftOut

send_more = LeftOut.send_more

def slowly(self):
    time.sleep(0.5)
    return send_more(self)

LeftOut.send_more = slowly
cli.main()
"""


@contextlib.contextmanager
def middle(hosts):
    """Start a migration, and give its process at a time when the guest runs there and some
    seconds of pages are still to follow."""
    command = [sys.executable, "-c", SLOWLY, "migrate", "g", "--to", "b", "--postcopy", "--yes"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE)
    try:
        wait_for(lambda: journal_state_if(hosts[1]) == State.PARTIAL)
        yield process
    finally:
        process.kill()
        process.communicate()


def journal_state_if(host):
    """Return the state in the host's journal, None if it has none yet."""
    journals = Journals(host.directory).all()
    return journals[0].read().state if journals else None


def the_source(hosts, _process):
    (pid,) = processes(hosts[0])
    return pid


def the_sender(_hosts, process):
    return process.pid


def the_guard(hosts, _process):
    return guard(hosts[1])


def the_fetcher(hosts, _process):
    return filler(hosts[1])


@pytest.mark.parametrize("victim", [the_source, the_sender, the_fetcher, the_guard])
def test_killed_in_the_middle(xsave, hosts, victim):
    """Whatever of the two ends that are needed dies: the guest is lost, and everybody says so."""
    with middle(hosts) as process:
        assert state(hosts[1]) == "running"
        (said,) = xsave.json("migrate", "--status", "g")
        assert "its memory is on the way there" in said["meaning"]
        assert xsave("migrate", "--recover", "g").code == 6
        assert xsave("unpause", "g").code == 6
        os.kill(victim(hosts, process), signal.SIGKILL)
        _, told = process.communicate(timeout=60)
    assert process.returncode == (-signal.SIGKILL if victim is the_sender else 9), told
    if victim is not the_sender:
        assert b"it is stopped there for good" in told
    wait_for(lambda: nobody_is_at_work(*hosts))
    wait_for(lambda: journal_state(hosts[1]) == State.LOST)
    if victim is not the_source:
        was_lost(xsave, *hosts)
        return
    wait_for(lambda: not processes(hosts[0]))
    assert xsave("migrate", "--recover", "g").code == 9
    assert (state(hosts[0]), state(hosts[1])) == (None, "crashed")
    xsave.ok("--host", "b", "destroy", "g")
    for host in hosts:
        nothing_is_left(host)


def test_its_process_is_killed_in_the_middle(xsave, hosts):
    """The target's process dies with the guest in it: the same, but there is nothing to look at."""
    with middle(hosts) as process:
        os.kill(only_process(hosts[1]), signal.SIGKILL)
        _, told = process.communicate(timeout=60)
    assert process.returncode == 9
    assert b"its process there has died" in told
    assert xsave("migrate", "--recover", "g").code == 9
    assert state(hosts[0]) == "suspended"
    xsave.ok("unpause", "g")
    recover_all(xsave, *hosts)
    assert one_runs(*hosts) is hosts[0]


def test_signals_in_the_middle(xsave, hosts):
    """A Ctrl-C, a SIGTERM, a closed terminal: the command goes on until the guest needs it no
    more."""
    with middle(hosts) as process:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            process.send_signal(number)
        _, told = process.communicate(timeout=60)
    assert process.returncode == 0, told
    recover_all(xsave, *hosts)
    assert one_runs(*hosts) is hosts[1]


def test_destroyed_in_the_middle(xsave, hosts):
    """The guest is destroyed at the target: then it is nowhere."""
    with middle(hosts) as process:
        xsave.ok("--host", "b", "destroy", "g")
        _, told = process.communicate(timeout=60)
    assert process.returncode == 0, told
    recover_all(xsave, *hosts)
    for host in hosts:
        nothing_is_left(host)


def test_the_source_is_destroyed_in_the_middle(xsave, hosts):
    """Somebody takes away what the guest still needs: it is lost, and that is said."""
    with middle(hosts) as process:
        xsave.ok("destroy", "g")
        _, told = process.communicate(timeout=60)
    assert process.returncode == 6
    assert b"was destroyed here" in told
    assert b"it is stopped there for good" in told
    assert (state(hosts[0]), state(hosts[1])) == (None, "crashed")
    (said,) = xsave.json("migrate", "--status", "g")
    assert said["finished"]
    xsave.ok("--host", "b", "destroy", "g")
    for host in hosts:
        nothing_is_left(host)


def test_it_waits_with_what_needs_all_memory(xsave, hosts, tmp_path):
    """A save of the guest at the target waits until all has come, and is whole."""
    with middle(hosts) as process:
        saved = xsave.start("--host", "b", "save", "g", str(tmp_path / "img"))
        time.sleep(2)
        assert journal_state(hosts[1]) == State.PARTIAL
        saved.communicate(timeout=60)
        assert saved.returncode == 0
        wait_for(lambda: journal_state(hosts[1]) == State.ENDED)
        process.communicate(timeout=60)
        assert process.returncode == 0
    assert is_complete(tmp_path / "img")
    assert xsave("image", "verify", str(tmp_path / "img")).code == 0
    for host in hosts:
        nothing_is_left(host)


def test_a_full_disk(xsave, hosts):
    """That all has come cannot be written down: the source is not given up before it is."""
    fault = {"at": "partial", "when": "before", "what": "full"}
    code, said = postcopy(*hosts, receiver=fault)
    assert code == 9, said
    assert state(hosts[0]) == "suspended"
    recover_all(xsave, *hosts)
    assert one_runs(*hosts) is hosts[1]


# ---- what cannot be


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--no-live"], "--no-live exclude"),
        (["--compress"], "--compress exclude"),
        (["--connections", "2"], "--connections exclude"),
        (["--auto-converge"], "--auto-converge exclude"),
        (["--to", "xl:cat"], "a real xl takes no post-copy"),
    ],
)
def test_usage(xsave, guest, options, why):
    """What it cannot do is refused before anything is done."""
    add_host("b", 16 * MIB)
    refused = xsave("migrate", "g", "--to", "b", "--postcopy", *options)
    assert (refused.code, why in refused.err) == (2, True), refused.err
    assert state(guest) == "running"
    assert Journals(guest.directory).all() == []


def test_how_it_would_go(xsave, guest):
    """An estimate of one round, without a question; nothing moves."""
    b = add_host("b", 16 * MIB)
    asked = xsave("migrate", "g", "--to", "b", "--postcopy", "--dry-run", "--json")
    assert asked.code == 0, asked.err
    answer = json.loads(asked.out)
    assert answer["outcome"] == "post-copy"
    assert answer["nr_rounds"] == 1
    assert 0 < answer["downtime_ns"] < answer["total_ns"]
    assert answer["bytes_sent"] > 1 * MIB
    assert state(guest) == "running"
    assert (state(b), Journals(b.directory).all()) == (None, [])


def test_a_target_without_faults(host, target, monkeypatch):
    """It says so before anything is sent, and the guest runs on here."""
    command = receivers.own_command

    def without(there, arguments):
        python, _, _, *rest = command(there, arguments)
        return [python, "-c", WITHOUT_FAULTS, *rest]

    monkeypatch.setattr(receivers, "own_command", without)
    events = []
    start(host)
    with pytest.raises(StorageError, match="unprivileged_userfaultfd"):
        migrate_live(host, target, postcopy=True, report=events.append)
    assert not [event for event in events if isinstance(event, Round)]
    nothing_is_left(target)
    runs_on(host)


WITHOUT_FAULTS = """
from xsave import cli
from xsave.guest.xen import userfault

def forbidden(*_):
    raise PermissionError(1, "Operation not permitted")

userfault.open_fd = forbidden
cli.main()
"""


def recorded(host, tmp_path, monkeypatch):
    """Return what a post-copy migration sent up to its hand-over."""
    path = tmp_path / "stream"
    write = Channel.write

    def tee(channel, buffers):
        buffers = list(buffers)
        with path.open("ab") as copy:
            for buffer in buffers:
                plain = bytes(buffer.nbytes) if isinstance(buffer, Zeros) else buffer
                copy.write(plain.gather() if isinstance(plain, Rows) else plain)
        write(channel, buffers)

    monkeypatch.setattr(Channel, "write", tee)
    return path


def test_nobody_else_takes_its_stream(xsave, host, target, tmp_path, monkeypatch):
    """It is no image: all that read images refuse it, in one sentence, and so does a receiver that
    was not started for it."""
    path = recorded(host, tmp_path, monkeypatch)
    start(host)
    migrate_live(host, target, postcopy=True)
    stream = path.read_bytes()
    records = [i.value for i in StreamDecoder(reader(stream), postcopy=True)]
    assert sum(len(r.pfns) for r in records if isinstance(r, PostcopyPfns)) > 500
    with pytest.raises(ImageError, match="whose memory comes behind it"):
        list(StreamDecoder(reader(stream)))
    for words in (("image", "info"), ("image", "verify"), ("--host", "a", "restore")):
        refused = xsave(*words, str(path))
        said = refused.err + refused.out.decode()
        assert (refused.code, "migration with post-copy" in said) == (3, True), words
    received = xsave("--host", "a", "migrate-receive", stdin=stream)
    assert received.code == 3
    assert "migrate-receive --postcopy" in received.err
    nothing_is_left(host)


def test_what_it_risks_is_said(xsave, hosts):
    """In the help, the man page, and before it is done, unless --yes says that it is known."""
    wanted = " ".join(RISK.split())
    assert wanted in " ".join(xsave("migrate", "--help").out.decode().split())
    page = " ".join((ROOT / "man" / "xsave-migrate.1").read_text().split())
    assert page.count(wanted) == 2
    moved = xsave.ok("migrate", "g", "--to", "b", "--postcopy")
    assert wanted in moved.err
    moved = xsave.ok("--host", "b", "migrate", "g", "--to", "localhost", "--postcopy", "-y")
    assert wanted not in moved.err
    recover_all(xsave, *hosts)
    one_runs(*hosts)


@pytest.mark.parametrize("answer", ["n", "y"])
def test_on_a_terminal_it_asks(xsave, hosts, answer):
    """No is no: the guest stays, and nothing was begun."""
    ours, theirs = os.openpty()
    process = xsave.start("migrate", "g", "--to", "b", "--postcopy", stdin=theirs, stderr=theirs)
    os.close(theirs)
    said = b""
    while b"Go on?" not in said:
        said += os.read(ours, 4096)
    os.write(ours, answer.encode() + b"\n")
    with contextlib.suppress(OSError):
        while piece := os.read(ours, 4096):
            said += piece
    process.communicate(timeout=60)
    os.close(ours)
    assert process.returncode == (0 if answer == "y" else 130), said
    assert one_runs(*hosts) is hosts[answer == "y"]
    assert bool(Journals(hosts[0].directory).all()) == (answer == "y")


def test_json(xsave, hosts):
    """A line for each event, and the result with the keys it always has and two more."""
    done = xsave.ok("migrate", "g", "--to", "b", "--postcopy", "--yes", "--json")
    lines = [json.loads(line) for line in done.out.splitlines()]
    assert [one["event"] for one in lines[:-1]].count("followed") == 1
    last = lines[-1]
    (followed,) = [one for one in lines if one.get("event") == "followed"]
    assert (last["postcopy_pages"], last["postcopy_faults"]) == (
        followed["nr_pages"],
        followed["nr_faults"],
    )
    assert last["outcome"] == "migrated"
    assert last["postcopy_pages"] > 100
    one_runs(*hosts)


def test_a_guest_that_does_not_run(xsave, localhost, builtin_image):
    """It has nothing that could follow it: it moves at once."""
    target = add_host("b", 64 * MIB, seed=4)
    restore(localhost, builtin_image, paused=True)
    said = xsave.ok("migrate", "g", "--to", "b", "--postcopy", "--yes", "--json")
    done = json.loads(said.out.splitlines()[-1])
    assert (done["postcopy_pages"], done["nr_rounds"]) == (0, 0)
    wait_for_tick(target)


# ---- a Linux; another machine


def test_a_linux(host, target, micro_linux, monkeypatch):
    """A real kernel, too: page for page, and it goes on."""
    sent, oracle = Sent(monkeypatch), Oracle(monkeypatch, target)
    kernel, ramdisk = map(str, micro_linux)
    options = {"memory_bytes": 32 * MIB, "kernel": kernel, "ramdisk": ramdisk}
    create(host, cmdline="console=hvc0", **options)
    wait_for(lambda: "TICK" in console(host), 120)
    result = migrate_live(host, target, postcopy=True)
    assert oracle.found.different == ()
    assert len(sent.pfns) == len(set(sent.pfns)) == result.postcopy_pages > 0
    assert state(host) is None
    nothing_is_left(host)
    before = console(target).count("TICK")
    wait_for(lambda: console(target).count("TICK") > before + 1, 60)


def test_a_guest_that_cannot_be_copied_live(host, target, monkeypatch):
    """It writes ten times what the wire takes: without post-copy it stands still for all of that,
    with it for next to nothing, there and back."""
    slow = {"bandwidth": 8 * MIB}
    start(host, cmdline="write=6M rate=80M")
    stopped = migrate_live(host, target, limits=Limits(downtime_s=0.05, max_rounds=3), **slow)
    went = migrate_live(target, host, postcopy=True, **slow)
    assert went.postcopy_pages > 1000
    assert went.downtime_ns < stopped.downtime_ns / 2
    moved(target, host)
