"""The built-in kernel on several vCPUs: all of them work, are stopped, saved and come back."""

from __future__ import annotations

import pytest

from tests.flows import inside
from tests.flows.flow import (
    MIB,
    console,
    create,
    destroy,
    nothing_is_left,
    restore,
    runs_on,
    save,
    wait_for,
    wait_for_tick,
)
from tests.flows.test_identity import difference
from tests.flows.test_smp import contexts, errors
from xsave.errors import HostCannotTake
from xsave.host.host import add_host


def all_work(host, nr_cpus):
    """Assert that every CPU goes on switching threads (a few more times than the end of a suspend
    takes): its timer and its IPIs reach it."""
    end = [n + 8 for n in inside.switches(host, nr_cpus)]
    wait_for(lambda: all(n >= e for n, e in zip(inside.switches(host, nr_cpus), end, strict=True)))


@pytest.mark.parametrize("vcpus", [2, 4, 8])
def test_saved_and_restored(host, tmp_path, vcpus):
    """All vCPUs work before and after a restore; the image holds each one's context, each with a
    stack and a descriptor table of its own, and is sound."""
    create(host, vcpus=vcpus, cmdline="threads=8")
    wait_for_tick(host)
    assert f"{vcpus} CPUs" in console(host)
    all_work(host, vcpus)
    save(host, tmp_path / "img")
    found = contexts(tmp_path / "img")
    assert sorted(found) == list(range(vcpus))
    assert len({context.user_regs.rsp for context in found.values()}) == vcpus
    assert len({context.gdt_frames[0] for context in found.values()}) == vcpus
    assert errors(tmp_path / "img") == []
    restore(host, tmp_path / "img")
    runs_on(host)
    all_work(host, vcpus)
    destroy(host)
    nothing_is_left(host)


def test_timers_come_back(host, tmp_path):
    """With freezer=off all threads of a vCPU are in the image asleep, until a time that only its
    own timer brings: it is set anew on each vCPU in the new domain."""
    create(host, vcpus=4, cmdline="threads=8 freezer=off")
    wait_for_tick(host)
    for _ in range(4):
        save(host, tmp_path / "img")
        restore(host, tmp_path / "img")
        all_work(host, 4)
    runs_on(host)
    destroy(host)


def test_cancelled(host, tmp_path):
    """save -c: all vCPUs go on in the same domain, three times."""
    create(host, vcpus=4, cmdline="threads=8")
    for _ in range(3):
        wait_for_tick(host)
        save(host, tmp_path / "img", leave="running")
        all_work(host, 4)
    runs_on(host)
    assert console(host).count("RESUME cancelled") == 3
    destroy(host)


def test_the_machine_is_stopped(host, tmp_path):
    """In the image vCPU 0 is in its suspend, all others in stop_machine's loop, events masked, on
    the same page tables. (That none switched threads meanwhile, the kernel checks itself.)"""
    create(host, vcpus=4, cmdline="threads=8")
    wait_for_tick(host)
    save(host, tmp_path / "img", leave="paused")
    first, *others = contexts(tmp_path / "img").values()
    assert inside.function_at(first.user_regs.rip) == "HYPERVISOR_suspend"
    assert {inside.function_at(other.user_regs.rip) for other in others} == {"stop_cpu"}
    assert {other.ctrlreg[3] for other in others} == {first.ctrlreg[3]}
    assert inside.upcall_masks(host, 4) == [1, 1, 1, 1]
    destroy(host)


def test_without_stop_machine_others_run(host, tmp_path):
    """stop_machine=off: the other vCPUs are somewhere else, and idle ones survive it."""
    create(host, vcpus=2, cmdline="stop_machine=off threads=0")
    wait_for_tick(host)
    save(host, tmp_path / "img")
    other = contexts(tmp_path / "img")[1]
    assert inside.function_at(other.user_regs.rip) != "stop_cpu"
    restore(host, tmp_path / "img")
    runs_on(host)
    all_work(host, 2)
    destroy(host)


@pytest.mark.parametrize(
    "cmdline", ["preempt=full", "preempt=voluntary freezer=off", "preempt=none freezer=off"]
)
def test_no_frame_number_is_in_the_image(xsave_home, tmp_path, cmdline):
    """The same deterministic guest with 2 vCPUs on two hosts that hand out frames in different
    orders: the same bytes, so nothing of a host is in any register, stack or page."""
    for seed in (1, 2):
        host = add_host(f"h{seed}", 32 * MIB, seed)
        create(host, vcpus=2, cmdline=f"threads=7 {cmdline}", deterministic=5)
        save(host, tmp_path / str(seed))
    assert difference(tmp_path / "1", tmp_path / "2") is None


def test_nine_are_too_many(host):
    """More vCPUs than the built-in kernel can use are refused."""
    with pytest.raises(HostCannotTake, match="8 vCPUs at most, not 9"):
        create(host, vcpus=9)
    nothing_is_left(host)
