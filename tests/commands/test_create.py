"""`xsave create`: where its options come from."""

from __future__ import annotations

import pytest

from tests.flows.flow import console, state, wait_for, wait_for_tick
from xsave.host.create import BUILTIN_KERNEL
from xsave.host.host import add_host

CONFIG = f"""
name = "web"
kernel = "{BUILTIN_KERNEL}"
extra = "seed=5"
memory = 8
vif = ['bridge=xenbr0']
on_reboot = 'preserve'
"""


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "web.cfg"
    path.write_text(CONFIG)
    return path


@pytest.fixture
def host(xsave_home):
    return add_host("localhost", 64 << 20, seed=4)


def test_a_configuration_file(xsave, host, config):
    """The file makes the domain; what it runs without is warned about; its actions count."""
    result = xsave.ok("create", config)
    assert f"warning: {config}:6:1: vif: domains have no network" in result.err
    (info,) = host.domains()
    assert (info.name, info.memory_bytes, info.vcpus) == ("web", 8 << 20, 1)
    wait_for_tick(host, "web")
    xsave.ok("reboot", "web")
    wait_for(lambda: state(host, "web") == "shutdown")


def test_what_overrides_what(xsave, host, config):
    """Options over arguments over the file."""
    info = xsave.json(
        "create", config, "name=two", "memory=16", "vcpus=2", "--vcpus", "1", "--memory", "12M"
    )
    assert (info["name"], info["memory_bytes"], info["vcpus"]) == ("two", 12 << 20, 1)
    xsave.ok("create", config, "name=three", "--cmdline", "seed=6", "--paused")
    assert state(host, "three") == "paused"
    assert console(host, "three") == ""


def test_a_wrong_file(xsave, host, config):
    """An error has its place, and nothing was made."""
    config.write_text(CONFIG + "pci = ['01:00.0']\n")
    result = xsave("create", config)
    assert result.code == 2
    assert f"{config}:8:1: pci: there are no PCI devices to pass through" in result.err
    assert host.domains() == []
    config.write_text(CONFIG + "disk = ['/no/such/disk,raw,xvda,rw']\n")
    result = xsave("create", config)
    assert result.code == 7
    assert "/no/such/disk" in result.err
    assert host.domains() == []
    config.write_text("name='x'\nmemory=[\n")
    assert f"{config}:3:1: expected" in xsave("create", config).err
    config.write_text("name='x'")
    assert "has no kernel" in xsave("create", config).err
    config.write_text(f"kernel='{BUILTIN_KERNEL}'")
    assert "has no name" in xsave("create", config).err
    assert xsave("create", config.with_name("none.cfg")).code == 7
