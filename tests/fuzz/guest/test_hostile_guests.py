"""A few of the guests that `make fuzz-guest` lets loose by the thousand, and what it notices."""

from __future__ import annotations

import gc
import shutil

import pytest

from tests.conftest import end_processes, make_home
from tests.fuzz.guest.deeds import DEEDS
from tests.fuzz.guest.forks import HostileForks
from tests.fuzz.guest.kernel import HostileKernel
from tests.fuzz.guest.life import Finding, Life, World
from tests.fuzz.guest.machinecode import JUMP_TO_ITSELF
from xsave.guest.xen import elf
from xsave.host import suspension
from xsave.host.operations import Operations

STRANGERS = [1, 2, 1 << 40]


@pytest.fixture
def arena():
    """A host with a victim, for hostile guests."""
    home = make_home()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XSAVE_HOME", str(home))
        patch.setattr(Operations, "op_audit", None, raising=False)
        patch.setattr(suspension, "SUSPEND_TIMEOUT_S", suspension.SUSPEND_TIMEOUT_S)
        forks = HostileForks(patch)
        yield World(forks, home, suspend_timeout_s=5)
        forks.kill()
    gc.collect()  # of what failed on purpose a socket or two may be left in tracebacks
    end_processes(home)
    shutil.rmtree(home)


@pytest.mark.parametrize("deed", DEEDS)
def test_a_deed_makes_a_kernel(deed):
    """Each deed is code that fits, in a kernel that the domain builder takes, and the same from
    the same seed."""
    for seed in range(3):
        kernels = [HostileKernel(seed, STRANGERS, only=[deed]) for _ in range(2)]
        first, second = (kernel.elf() for kernel in kernels)
        assert first == second
        assert elf.parse(first, deed).entry
        assert kernels[0].names[0] == deed


@pytest.mark.slow
def test_guests_of_all_deeds(arena):
    """Guests that do anything: the process answers, the counts are right, it dies when told to
    and leaves nothing, and the victim is untouched."""
    lives = [Life(arena, seed) for seed in range(1, 26)]
    for life in lives:
        life.live(0.4)
    assert sum(life.crossings for life in lives) > len(lives)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [205, 214])
def test_guests_of_endless_batches(arena, seed):
    """Multicalls of thousands of batches of thousands of requests: somebody who asks is answered
    in the midst of them."""
    Life(arena, seed, only=["batch", "address space"]).live(1)


@pytest.mark.slow
def test_guests_that_are_saved(arena):
    """Guests that suspend when nobody and when somebody asked, with their tables and start_info in
    any state: they are saved to an image, or not, and what was saved is restored, or not."""
    lives = [Life(arena, seed, only=["suspend", "hypercall"]) for seed in range(100, 114)]
    for life in lives:
        life.live(0.1)
    seen = {text.split(":")[0] for life in lives for text in life.seen}
    assert {"saved", "restored"} <= seen


@pytest.mark.slow
def test_it_would_be_noticed(arena, monkeypatch):
    """A wrong count, a changed victim and an exception of ours are found."""

    def spoil(operations, _request):
        operations._running.machine.refs[operations._running.domain.shared_info_mfn] += 1
        return {}, b""

    monkeypatch.setattr(Operations, "op_pause", spoil)
    life = Life(arena, 1)
    life.kernel.code.blob[:2] = JUMP_TO_ITSELF
    ask = life._ask
    life._ask = lambda pid, op, **given: [ask(pid, "pause"), ask(pid, op, **given)][1]
    with pytest.raises(Finding, match="refs count of frame"):
        life.live(0.1)
    monkeypatch.undo()
    victim = int(arena.victim[7])
    arena.host.machine.pages[victim, 5] ^= 1
    with pytest.raises(Finding, match="victim"):
        Life(arena, 2).live(0.05)
    arena.host.machine.pages[victim, 5] ^= 1
    from xsave.guest.xen.hypervisor import Hypervisor

    monkeypatch.setattr(Hypervisor, "call", lambda *_: 1 / 0)
    with pytest.raises(Finding, match="ZeroDivisionError"):
        Life(arena, 3).live(30)  # until it has crashed
