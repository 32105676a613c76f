"""Distributions' kernels as they come: booted, asked, saved, rebooted, crashed."""

from __future__ import annotations

import pytest

from tests.distro.linux import (
    PATIENCE_S,
    boot,
    ticks,
    told,
    type_line,
    wait_for_ticks,
    without_complaint,
)
from tests.flows.flow import (
    console,
    destroy,
    nothing_is_left,
    restore,
    save,
    state,
    wait_for,
)

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("vcpus", [1, 2])
def test_from_boot_to_boot(host, kernel, ramdisk, tmp_path, vcpus):
    """A kernel as it comes boots to user space with all its processors; it is saved in one domain
    and goes on in another, without a tick lost; rebooted there, it comes up again; asked to power
    off, it is gone."""
    boot(host, kernel, ramdisk, vcpus=vcpus)
    first = wait_for_ticks(host, 3)
    without_complaint(first)
    assert f"cpus={vcpus} " in first
    save(host, tmp_path / "img")
    restore(host, tmp_path / "img")
    second = wait_for_ticks(host, ticks(first)[-1][0] + 3)
    without_complaint(second)
    assert ticks(second)[0][1] == ticks(first)[0][1]
    with host.find("g") as domctl:
        domctl.shutdown("reboot")
    wait_for(lambda: "it is started again" in console(host), PATIENCE_S)
    again = wait_for_ticks(host, 2, after="it is started again")
    without_complaint(again)
    assert ticks(again)[0][0] == 1
    with host.find("g") as domctl:
        domctl.shutdown("poweroff")
    wait_for(lambda: state(host) is None, PATIENCE_S)
    nothing_is_left(host)


def test_its_console_is_read_and_a_panic_is_a_crash(host, kernel, ramdisk):
    """What is typed reaches user space; a kernel that panics is a crashed domain with its last
    words on the console."""
    boot(host, kernel, ramdisk)
    wait_for_ticks(host, 1)
    type_line(host, b"echo one two\n")
    wait_for(lambda: "heard  one two" in told(host), PATIENCE_S)
    type_line(host, b"crash\n")
    wait_for(lambda: state(host) == "crashed", PATIENCE_S)
    assert "Kernel panic - not syncing: sysrq triggered crash" in told(host)
    destroy(host)
    nothing_is_left(host)
