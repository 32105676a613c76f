"""What a domain's process tells a guest before its first instruction."""

from __future__ import annotations

import socket
from types import SimpleNamespace

import pytest

from tests.flows.flow import MIB
from xsave.host.building import Building
from xsave.host.control import Client, Request
from xsave.host.host import add_host


@pytest.mark.parametrize("target", [200, 256])
def test_the_target_of_a_balloon_is_in_xenstore(xsave_home, tmp_path, target):
    """A guest that was ballooned finds the target it had, not its maximum: it would grow."""
    host = add_host("a", 64 * MIB, seed=3)
    running = SimpleNamespace(
        hypervisor=None,
        machine=host.machine,
        domid=1,
        name="g",
        directory=tmp_path,
        control=SimpleNamespace(console_output=print, resume_input=print),
        disk_done=print,
        have=lambda _buffers: True,
        forget_code=print,
        forget_cpu=lambda: None,
    )
    ours, _theirs = socket.socketpair()
    arguments = {"nr_vcpus": 1, "max_pages": 256, "target_pages": target}
    Building(running).op_begin(Request(Client(ours), "begin", arguments))
    domain = running.hypervisor.domain
    read = [domain.store.read(f"{domain.home}/memory/{node}") for node in ("target", "static-max")]
    assert read == [str(4 * target).encode(), b"1024"]
