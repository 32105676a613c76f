"""What becomes of a domain whose guest powers off, reboots or crashes: xl's on_* actions."""

from __future__ import annotations

import os
import socket

import numpy as np
import pytest

from tests.flows import kernels
from tests.flows.flow import (
    console,
    create,
    destroy,
    hashes,
    nothing_is_left,
    processes,
    restore,
    save,
    state,
    ticks,
    wait_for,
    wait_for_tick,
)
from xsave.errors import GuestStateError
from xsave.host.create import BUILTIN_KERNEL
from xsave.host.host import add_host

AGAIN = "(xsave) g: {}: it is started again"


def ask(host, what, name="g"):
    with host.find(name) as domctl:
        domctl.shutdown(what)


def gone(host):
    """Wait until the domain is; then nothing of it may be left."""
    wait_for(lambda: state(host) is None)
    nothing_is_left(host)


def console_since(host, word):
    """The console behind the last occurrence of word."""
    return console(host).rpartition(word)[2]


def rebooted(host, times=1):
    """Wait until the guest has begun again and ticks; return what it said since."""
    word = AGAIN.format("reboot")
    wait_for(lambda: console(host).count(word) == times and ticks(console_since(host, word)))
    return console_since(host, word)


def test_a_reboot_begins_again(host):
    """The guest starts from its kernel in the same domain, with as many frames; who was attached
    to its console still is, and hears both lives."""
    before = create(host, cmdline="seed=7 touch=1M")
    pattern = hashes(wait_for_tick(host))
    owned = np.count_nonzero(host.machine.owner == before.domid)
    with host.find("g") as domctl:
        heard = domctl.console_attach()
        ask(host, "reboot")
        again = rebooted(host)
        assert ticks(again)[0] == 1
        assert hashes(again) == pattern
        heard.settimeout(5)
        text = b""
        while b"TICK 1 " not in text.partition(b"started again")[2]:
            text += heard.recv(1 << 16)
    (after,) = host.domains()
    assert (after.domid, after.name, after.state) == (before.domid, "g", "running")
    assert np.count_nonzero(host.machine.owner == before.domid) == owned
    destroy(host)
    gone(host)


def test_many_reboots(host):
    """Life after life costs neither frames nor descriptors."""
    domid = create(host).domid
    wait_for_tick(host)
    (pid,) = processes(host)

    def holds():
        frames = int(np.count_nonzero(host.machine.owner == domid))
        return len(os.listdir(f"/proc/{pid}/fd")), frames  # noqa: PTH208

    at_first = holds()
    for times in range(1, 5):
        ask(host, "reboot")
        rebooted(host, times)
        wait_for(lambda: holds() <= at_first)  # a connection takes a moment to be closed
    destroy(host)
    gone(host)


def test_a_rebooted_guest_is_saved(host, tmp_path):
    """After a reboot a guest is like any other: saved, restored, and rebooted there."""
    create(host, cmdline="seed=7 touch=1M")
    wait_for_tick(host)
    ask(host, "reboot")
    pattern = hashes(rebooted(host))
    save(host, tmp_path / "img")
    restore(host, tmp_path / "img")
    last = ticks(wait_for_tick(host))[-1]
    assert last > 1
    ask(host, "reboot")
    again = rebooted(host)
    assert ticks(again)[0] == 1
    assert hashes(again) == pattern
    destroy(host)
    gone(host)


def test_a_deterministic_reboot(xsave_home, host):
    """Two guests with the same commands also reboot alike: what one wrote so far, the other one
    writes too."""
    hosts = [host, add_host("b", 64 << 20, seed=77)]
    for one in hosts:
        create(one, deterministic=3)
        ask(one, "reboot")
        rebooted(one)
    shorter, longer = sorted((console(one) for one in hosts), key=len)
    assert longer.startswith(shorter)
    assert ticks(shorter.rpartition("again")[2])
    for one in hosts:
        destroy(one)


@pytest.mark.parametrize(
    ("event", "action", "becomes"),
    [
        ("poweroff", "preserve", "shutdown"),
        ("poweroff", "destroy", None),
        ("reboot", "preserve", "shutdown"),
        ("reboot", "destroy", None),
    ],
)
def test_what_was_chosen_happens(host, event, action, becomes):
    """A domain that is kept shows how it ended and can only be destroyed."""
    create(host, actions={event: action})
    wait_for_tick(host)
    ask(host, event)
    wait_for(lambda: state(host) == becomes)
    if becomes:
        with host.find("g") as domctl, pytest.raises(GuestStateError, match=becomes):
            domctl.unpause()
        with pytest.raises(GuestStateError, match=becomes):
            ask(host, "poweroff")
        destroy(host)
    gone(host)


def test_a_poweroff_can_begin_again(host):
    """on_poweroff=restart."""
    create(host, actions={"poweroff": "restart"})
    wait_for_tick(host)
    ask(host, "poweroff")
    word = AGAIN.format("poweroff")
    wait_for(lambda: ticks(console_since(host, word)) if word in console(host) else None)
    destroy(host)
    gone(host)


def test_a_crash_destroys_if_so_chosen(host, tmp_path):
    """on_crash=destroy, xl's default: nothing is left of the domain."""
    kernel = tmp_path / "kernel"
    kernel.write_bytes(kernels.CRASHING)
    create(host, kernel=str(kernel), actions={})
    gone(host)


def test_a_crash_loop_can_be_ended(host, tmp_path):
    """on_crash=restart of a kernel that crashes at once: it goes round, and still can be seen
    and destroyed."""
    kernel = tmp_path / "kernel"
    kernel.write_bytes(kernels.CRASHING)
    create(host, kernel=str(kernel), actions={"crash": "restart"})
    word = AGAIN.format("crash")
    wait_for(lambda: console(host).count(word) >= 3)
    assert "exception 6" in console(host)
    destroy(host)
    gone(host)


def test_a_kernel_that_is_not_there_any_more(host, tmp_path):
    """A guest whose kernel file is gone cannot begin again: its console says so and the domain
    is destroyed, all of it."""
    kernel = tmp_path / "kernel"
    kernel.write_bytes(BUILTIN_KERNEL.read_bytes())
    create(host, kernel=str(kernel))
    wait_for_tick(host)
    kernel.unlink()
    with host.find("g") as domctl:
        heard = domctl.console_attach()
        ask(host, "reboot")
        text = listen(heard)
    assert f"cannot be started again: {kernel}: " in text
    gone(host)


def listen(heard: socket.socket) -> str:
    """Read a console until it ends."""
    heard.settimeout(20)
    text = b""
    while chunk := heard.recv(1 << 16):
        text += chunk
    return text.decode()


def test_reboot_is_a_command(xsave, localhost):
    """`xsave reboot` asks, and says so; `create` takes the actions."""
    xsave.ok("create", "g", "--memory", "8M", "--on-reboot", "preserve", "--on-poweroff", "restart")
    wait_for_tick(localhost)
    answer = xsave.json("reboot", "g")
    assert answer == {"name": "g", "requested": "reboot"}
    wait_for(lambda: state(localhost) == "shutdown")
    assert xsave("reboot", "g").code == 6
    assert xsave("reboot", "nobody").code == 5
    assert xsave("create", "h", "--on-crash", "dance").code == 2
    xsave.ok("destroy", "g")
    gone(localhost)
