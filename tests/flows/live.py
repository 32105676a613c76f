"""What the tests of live migrations share: the two copies, compared while both stand still."""

from __future__ import annotations

from tests.flows.flow import MIB, console, create, nothing_is_left, runs_on, state, wait_for
from xsave.compare import compare
from xsave.host.handover.sender import HandingOver
from xsave.host.handover.table import Message
from xsave.migrate import Options, migrate
from xsave.precopy import Limits
from xsave.receive import INCOMING_SUFFIX

#: Writes all of its 4 MiB ten times a second, makes and destroys page tables without rest.
HEAVY = "touch=1M write=4M rate=40M rest=2"
#: Many rounds: no estimate is ever within this.
ROUNDS = Limits(downtime_s=1e-6, max_rounds=5)


def start(host, cmdline=HEAVY, **options):
    """Create a guest and wait until it is at work."""
    create(host, **{"memory_bytes": 16 * MIB, "cmdline": cmdline, **options})
    wait_for(lambda: "TICK 1" in console(host))


def moved(host, target):
    """Assert that the guest is here no more, and runs on there with its checks clean."""
    assert state(host) is None
    nothing_is_left(host)
    runs_on(target)
    assert "CHECK FAILED" not in console(target)


class Oracle:
    """Compares source and target between READY and GO: the one is suspended, the other complete,
    paused, and has never run. `found` is the Comparison."""

    def __init__(self, monkeypatch, target):
        self.found = None
        send = HandingOver.send

        def compare_and_send(handing, message):
            if message == Message.GO:
                with target.find(handing._domctl.name + INCOMING_SUFFIX) as incoming:
                    self.found = compare(handing._domctl, incoming)
            send(handing, message)

        monkeypatch.setattr(HandingOver, "send", compare_and_send)


def migrate_live(host, target, name="g", *, report=lambda event: None, **options):
    """Migrate with these options; several rounds unless told otherwise."""
    with host.find(name) as domctl:
        return migrate(domctl, target, Options(**{"limits": ROUNDS, **options}), report=report)
