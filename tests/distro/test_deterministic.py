"""A Linux in virtual time: the same commands give the same console and the same images."""

from __future__ import annotations

import pytest

from tests.distro.linux import MIB, PATIENCE_S, boot, ticks, told, type_line, without_complaint
from tests.flows.flow import nothing_is_left, restore, wait_for
from tests.flows.series import save_said
from xsave.host.host import add_host

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("vcpus", [1, 2])
def test_twice_the_same(xsave_home, kernel, ramdisk, tmp_path, vcpus):
    """Two hosts that hand out frames in different orders, the same commands on both: boot, run,
    type, save, restore, run, save. Consoles and images are the same, byte for byte."""
    hosts = [add_host("a", 512 * MIB, seed=3), add_host("b", 512 * MIB, seed=44)]
    stories = [story(host, kernel, ramdisk, tmp_path / host.name, vcpus) for host in hosts]
    for first, second in zip(*stories, strict=True):
        assert first == second
    for host in hosts:
        nothing_is_left(host)


def story(host, kernel, ramdisk, directory, vcpus):
    """Yield what there is to compare, in the order in which it comes."""
    directory.mkdir()
    boot(host, kernel, ramdisk, vcpus=vcpus, deterministic=5)
    run_on(host)
    type_line(host, b"echo one two\n")
    wait_for(lambda: "heard  one two" in told(host), PATIENCE_S)
    first = saved(host, directory / "first")
    without_complaint(first)
    assert len(ticks(first)) > 3
    assert "heard  one two" in first
    yield first
    yield (directory / "first").read_bytes()
    restore(host, directory / "first")
    run_on(host)
    second = saved(host, directory / "second")
    without_complaint(second)
    assert ticks(second)[0][0] == ticks(first)[-1][0] + 1
    yield second
    yield (directory / "second").read_bytes()


def saved(host, path):
    """Save the guest; return what it said until it was suspended, and not only until we look."""
    return save_said(host, path).replace("\r\n", "\n")


def run_on(host):
    """Let the guest run to its horizon, which is where it takes this request, and a horizon on."""
    with host.find("g") as domctl:
        domctl.unpause()
