"""Two machines with a network between them: namespaces and a pair of virtual interfaces, slow and
lossy (tc netem) or cut. Root may do that, on most kernels."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys

import pytest

from tests.conftest import ROOT, Xsave
from tests.flows.flow import MIB, create, nothing_is_left, runs_on, state, wait_for, wait_for_tick
from tests.flows.live import Oracle, migrate_live
from tests.transport import test_faults
from tests.transport.sshd import Sshd, far_command
from xsave.errors import StorageError
from xsave.host import receivers, transport
from xsave.host.handover import sender
from xsave.host.ssh import add_ssh_host
from xsave.progress import Stage

#: It takes longer to pull a cable than the far end to be ready: when the guest is asked to suspend,
#: the end of the image is still to be sent.
MOMENTS = test_faults.MOMENTS | {
    "hand-over": lambda event: isinstance(event, Stage) and event.name == "freeze"
}
_NUMBERS = itertools.count(os.getpid() % 4000)


def ip(*words):
    """Run ip(8), or another command that begins so."""
    return subprocess.run(["ip", *words], capture_output=True, text=True, check=False)


class Network:
    """Two namespaces, `here` and `there`, and the address of the one over there."""

    def __init__(self):
        number = next(_NUMBERS)
        self.here, self.there = f"xs{number}a", f"xs{number}b"
        # 198.18.0.0/15 is for tests of networks.
        part = f"198.18.{number % 250}"
        self.address = f"{part}.2"
        for name in (self.here, self.there):
            done = ip("netns", "add", name)
            if done.returncode:
                pytest.skip(f"no network namespaces here: {done.stderr.strip()}")
        ends = ("veth", "peer", "name", "xs", "netns", self.there)
        assert not ip("link", "add", "xs", "netns", self.here, "type", *ends).returncode
        for name, address in ((self.here, f"{part}.1/24"), (self.there, f"{part}.2/24")):
            ip("-n", name, "addr", "add", address, "dev", "xs")
            ip("-n", name, "link", "set", "xs", "up")

    def shape(self, *netem):
        """Delay and lose what goes out, on both sides; skips where the kernel cannot."""
        for name in (self.here, self.there):
            words = ["tc", "qdisc", "replace", "dev", "xs", "root", "netem", *netem]
            done = ip("netns", "exec", name, *words)
            if done.returncode:
                pytest.skip(f"no tc netem here: {done.stderr.strip()}")

    def cut(self, state="down"):
        """Pull the plug: nobody hears of it."""
        assert not ip("-n", self.there, "link", "set", "xs", state).returncode

    def close(self):
        for name in (self.here, self.there):
            ip("netns", "del", name)


@pytest.fixture
def network():
    if os.getuid() or not shutil.which("ip") or not shutil.which("tc"):
        pytest.skip("network namespaces want root, ip and tc")
    network = Network()
    yield network
    network.close()


@pytest.fixture
def by_ssh(network, far, far_home, tmp_path, monkeypatch):
    """The far host, by way of the network."""
    sshd = Sshd(
        tmp_path / "sshd", network.address,
        before_server=["ip", "netns", "exec", network.there],
        before_client=["ip", "netns", "exec", network.here],
    )  # fmt: skip
    monkeypatch.setenv("PATH", f"{sshd.bin}:{os.environ['PATH']}")
    yield add_ssh_host("far", "far", far_command(far_home))
    sshd.stop()


@pytest.fixture
def guest(host):
    """A heavy writer."""
    create(host, memory_bytes=16 * MIB, cmdline="touch=1M write=4M rate=40M rest=2")
    wait_for_tick(host)


@pytest.mark.parametrize("netem", [None, "delay 20ms", "delay 20ms 5ms loss 2%"])
def test_live(host, guest, far, network, by_ssh, monkeypatch, netem):
    """Page for page, however slow the network is and whatever it loses."""
    if netem:
        network.shape(*netem.split())
    oracle = Oracle(monkeypatch, far)
    migrate_live(host, by_ssh)
    assert oracle.found.different == ()
    assert state(host) is None
    runs_on(far)


@pytest.mark.parametrize("moment", MOMENTS)
def test_the_cable_is_pulled(host, guest, far, network, by_ssh, monkeypatch, moment):
    """No end of a connection, just silence: after the time-out the guest goes on here. When the
    network is back the far end sees that it is alone, and nothing is left there."""
    monkeypatch.setattr(transport, "STALL_TIMEOUT_S", 2.0)
    monkeypatch.setattr(sender, "READY_TIMEOUT_S", 2.0)
    monkeypatch.setattr(receivers, "_EXIT_WAIT_S", 0.5)
    cut = []

    def report(event):
        if not cut and MOMENTS[moment](event):
            cut.append(event)
            network.cut()

    with pytest.raises(StorageError, match=r"the guest goes on here: .*2 s"):
        migrate_live(host, by_ssh, report=report)
    runs_on(host)
    network.cut("up")
    wait_for(lambda: not far.records(), seconds=60)
    nothing_is_left(far)


def test_tcp(host, guest, far, far_home, network):
    """The same through a raw socket, between two commands in two namespaces."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    there = ["ip", "netns", "exec", network.there, "env", f"XSAVE_HOME={far_home}"]
    listen = [sys.executable, "-m", "xsave", "migrate-receive", "--listen"]
    command = [*there, *listen, f"tcp:{network.address}:0", "--json"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) as process:
        address = json.loads(process.stdout.readline())["listening"]
        here = ["ip", "netns", "exec", network.here, sys.executable, "-m", "xsave"]
        done = subprocess.run([*here, "migrate", "g", "--to", address], env=environment, timeout=90)
        assert (done.returncode, process.wait(20)) == (0, 0)
    assert Xsave(None).json("list") == []
    runs_on(far)
