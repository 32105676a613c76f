"""A deterministic guest: whatever reaches it, reaches it where its time stands still."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from tests.guest.rig import Machines, make_domain
from xsave.host.control import Client, Request
from xsave.host.disk.disks import Disks
from xsave.host.operations import Operations
from xsave.host.throttle import Throttle


class Control:
    """As much of the control socket as requests need."""

    def __init__(self):
        self.waiting = []

    def next_request(self):
        return self.waiting.pop(0) if self.waiting else None

    def put_back(self, requests):
        self.waiting[:0] = requests


class Scene:
    """A deterministic domain that runs, and what is asked of it."""

    def __init__(self, machines):
        self.domain = make_domain(machines.make())
        self.domain.console.holds_input = True
        self.clock = self.domain.clock
        self.control = Control()
        self.running = SimpleNamespace(
            domain=self.domain,
            control=self.control,
            disks=Disks([], lambda: None),
            built=True,
            paused=False,
            holding=self.holds,
            throttle=Throttle(),
            filling=SimpleNamespace(active=False, lost=""),
        )
        self.operations = Operations(self.running)
        self.operations._building.committed = True
        self.answers = []
        self.operations._reply = lambda _client, message, _blob=b"": self.answers.append(message)
        self.clock.extend()

    def holds(self):
        return self.clock.now() >= self.clock.horizon_ns

    def ask(self, op):
        self.control.waiting.append(Request(Client(None), op, {}))
        self.operations.serve()

    def to_horizon(self):
        self.clock.jump(self.clock.horizon_ns)
        self.operations.serve()


@pytest.fixture
def scene():
    machines = Machines()
    yield Scene(machines)
    machines.close()


@pytest.mark.parametrize("op", ["pause", "unpause", "shutdown", "target", "vcpus", "suspend"])
def test_requests_wait_for_the_horizon(scene, op):
    """What changes the guest is not done, nor answered, before its time stands still."""
    before = scene.clock.horizon_ns
    scene.ask(op)
    assert len(scene.control.waiting) == 1
    assert scene.answers == []
    assert scene.clock.horizon_ns == before
    scene.to_horizon()
    assert scene.control.waiting == []


def test_answers_keep_their_order(scene):
    """What the same client asks behind such a request waits with it, and so does its leaving; who
    else asks does not."""
    client = Client(None)
    for op in ("pause", "info", "closed"):
        scene.control.waiting.append(Request(client, op, {}))
    scene.ask("info")
    assert [answer["state"] for answer in scene.answers] == ["running"]
    assert [request.op for request in scene.control.waiting] == ["pause", "info", "closed"]
    scene.to_horizon()
    assert [answer.get("state") for answer in scene.answers[1:]] == [None, "paused"]
    assert scene.control.waiting == []


def test_answers_keep_their_order_while_memory_comes(scene):
    """The same of a request that waits for all of the memory."""
    client = Client(None)
    scene.running.filling.active = True
    for op in ("filled", "info"):
        scene.control.waiting.append(Request(client, op, {}))
    scene.ask("info")
    assert [answer["state"] for answer in scene.answers] == ["running"]
    scene.running.filling.active = False
    scene.operations.serve()
    assert [answer.get("state") for answer in scene.answers[1:]] == [None, "running"]


def test_unpause_gives_more_time(scene):
    """At the horizon, and only there, unpause moves it on."""
    scene.ask("unpause")
    first = scene.clock.horizon_ns
    scene.to_horizon()
    assert scene.clock.horizon_ns > first


def test_looking_does_not_wait(scene):
    """info is answered at once."""
    scene.ask("info")
    assert scene.answers[0]["state"] == "running"


def test_what_is_typed_waits_for_the_horizon(scene):
    """Input is given to the guest where its time stands still, and is given time to be read; a
    paused guest hears nothing."""
    scene.domain.console.page = memoryview(bytearray(4096))
    before = scene.clock.horizon_ns
    scene.domain.console.type(b"ls\n")
    scene.operations.serve()
    assert not scene.domain.console.drain()
    scene.running.paused = True
    scene.to_horizon()
    assert not scene.domain.console.drain()
    assert scene.clock.horizon_ns == before
    scene.running.paused = False
    scene.operations.serve()
    assert scene.clock.horizon_ns > before
    assert scene.domain.console.drain()
    assert bytes(scene.domain.console.page[:3]) == b"ls\n"
