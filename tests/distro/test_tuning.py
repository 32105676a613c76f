"""A Linux that is asked to have more or less memory, or more or fewer processors."""

from __future__ import annotations

import re

import pytest

from tests.distro.linux import (
    MIB,
    PATIENCE_S,
    boot,
    do,
    told,
    wait_for_ticks,
    without_complaint,
)
from tests.flows.flow import destroy, nothing_is_left, restore, save, wait_for

pytestmark = pytest.mark.slow


def test_memory(host, kernel, ramdisk, tmp_path):
    """It shrinks to its target and no further, stays so in an image and after it, and grows to its
    maximum; the memory it has in use is unharmed."""
    boot(host, kernel, ramdisk, memory_bytes=192 * MIB, max_memory_bytes=224 * MIB)
    wait_for_ticks(host, 1)
    assert memory(host) == 192 * MIB
    set_memory(host, 144 * MIB)
    save(host, tmp_path / "img")
    restore(host, tmp_path / "img")
    assert memory(host) == 144 * MIB
    ticked = wait_for_ticks(host, 1)
    assert memory(host) == 144 * MIB
    set_memory(host, 224 * MIB)
    without_complaint(wait_for_ticks(host, int(re.findall(r"TICK (\d+)", ticked)[-1]) + 2))
    do(host, "mkdir /full && mount -t tmpfs -o size=100% none /full")
    do(host, "dd if=/dev/zero of=/full/file bs=1M count=128 && umount /full")
    save(host, tmp_path / "img2")
    restore(host, tmp_path / "img2")
    assert memory(host) == 224 * MIB
    without_complaint(wait_for_ticks(host, 1))
    destroy(host)
    nothing_is_left(host)


def test_more_than_the_host_has(host, kernel, ramdisk):
    """A guest that asks for frames its host has not goes on with those it could get, and has the
    others once they are there."""
    boot(host, kernel, ramdisk, memory_bytes=192 * MIB, max_memory_bytes=224 * MIB)
    wait_for_ticks(host, 1)
    kept = host.machine.allocate(99, host.machine.free_frames() - 1000)
    with host.find("g") as domctl:
        domctl.set_target(224 * MIB >> 12)
    wait_for(lambda: host.machine.free_frames() == 0, PATIENCE_S)
    last = int(re.findall(r"TICK (\d+)", told(host))[-1])
    without_complaint(wait_for_ticks(host, last + 3))
    host.machine.free(kept)
    wait_for(lambda: memory(host) == 224 * MIB, PATIENCE_S)
    without_complaint(told(host))
    destroy(host)
    nothing_is_left(host)


@pytest.mark.parametrize("vcpus", [4, 8])
def test_processors(host, kernel, ramdisk, tmp_path, vcpus):
    """It boots with all its processors, takes all but two offline when asked, is saved so, goes on
    so, and brings them online again, which another save and restore keep."""
    boot(host, kernel, ramdisk, vcpus=vcpus)
    wait_for_cpus(host, vcpus)
    with host.find("g") as domctl:
        domctl.set_available_vcpus(2)
    wait_for_cpus(host, 2)
    save(host, tmp_path / "img")
    restore(host, tmp_path / "img")
    wait_for_cpus(host, 2)
    with host.find("g") as domctl:
        domctl.set_available_vcpus(vcpus)
    last = f"/sys/devices/system/cpu/cpu{vcpus - 1}"
    do(host, f"until grep -q 0 {last}/online; do sleep 1; done")
    do(host, "for cpu in /sys/devices/system/cpu/cpu*/online; do echo 1 > $cpu; done")
    wait_for_cpus(host, vcpus)
    save(host, tmp_path / "img2")
    restore(host, tmp_path / "img2")
    wait_for_cpus(host, vcpus)
    destroy(host)
    nothing_is_left(host)


def memory(host):
    return info(host).memory_bytes


def info(host):
    with host.find("g") as domctl:
        return domctl.info()


def set_memory(host, size):
    """Ask the guest to have so much and wait until it has."""
    with host.find("g") as domctl:
        domctl.set_target(size >> 12)
    wait_for(lambda: memory(host) == size, PATIENCE_S)


def wait_for_cpus(host, number):
    """Wait until user space and Xen both see so many processors, and the kernel no fault."""
    line = re.compile(rf"^TICK \d+ cpus={number} [0-9a-f]+\n", re.MULTILINE)
    wait_for(lambda: line.search(told(host)), PATIENCE_S)
    wait_for(lambda: info(host).online_vcpus == number, PATIENCE_S)
    without_complaint(told(host), same=False)
