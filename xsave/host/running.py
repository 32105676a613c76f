"""The domain of this process, as its loop and its requests share it.

Only the vCPU thread changes anything here; other threads look.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Sequence
from pathlib import Path

from xsave.errors import GuestStateError
from xsave.guest.xen.domain import Domain
from xsave.guest.xen.hypervisor import Hypervisor
from xsave.guest.xen.machine import Machine
from xsave.guest.xen.vcpu import Cpu
from xsave.host.control import Control
from xsave.host.disk.disks import Disks
from xsave.host.filling import Filling
from xsave.host.throttle import Throttle
from xsave.host.unpacking import Unpacking


class RunningDomain:
    """`hypervisor` and with it `domain` and `xen` exist after the `begin` request.

    paused: xl pause, and every domain at first; builtin: the kernel is ours; finished: the
    process is to end; unpacking: of the kernel, if it has begun before anybody asked.
    """

    def __init__(
        self,
        directory: Path,
        machine: Machine,
        domid: int,
        name: str,
        control: Control,
        alive: int = -1,
        lazy: Sequence[int] = (),
    ) -> None:
        """alive, lazy: descriptors, as Filling has them."""
        self.directory = directory
        self.machine = machine
        self.domid = domid
        self.name = name
        self.control = control
        self.hypervisor: Hypervisor | None = None
        self._alive = alive
        self.filling = self._filling(lazy)
        self.disks = Disks([], self.disk_done, self.have)
        self.throttle = Throttle()
        self.unpacking: Unpacking | None = None
        self._cpu: Cpu | None = None
        self.paused = True
        self.builtin = False
        self.finished = False

    @property
    def built(self) -> bool:
        return self.hypervisor is not None

    @property
    def xen(self) -> Hypervisor:
        """Raises GuestStateError before `begin`."""
        if self.hypervisor is None:
            raise GuestStateError("the domain is not built yet")
        return self.hypervisor

    @property
    def domain(self) -> Domain:
        """Raises GuestStateError before `begin`."""
        return self.xen.domain

    # -- memory that is still to come ---

    def _filling(self, lazy: Sequence[int]) -> Filling:
        return Filling(self.machine, self._alive, lazy, self._filled, self._cut_off)

    def _filled(self) -> None:
        self.control.wake()

    def _cut_off(self) -> None:
        """The guest's memory is lost: it does nothing to the world any more."""
        if self.hypervisor is not None:
            self.hypervisor.cut_off()

    def have(self, buffers: Sequence[memoryview]) -> bool:
        """Filling.have, whichever it is by then."""
        return self.filling.have(buffers)

    def end_filling(self) -> None:
        """The frames are about to be given back: no page comes any more."""
        self.filling.stop()
        self.filling = self._filling(())

    def warm_up(self) -> None:
        """Make the emulated CPU in advance: that takes 20 ms, and the guest's state is not needed
        for it."""
        if self._cpu is None and not self.xen.powered:
            self._cpu = self.xen.make_cpu()

    def forget_cpu(self) -> None:
        """What was made in advance was for a domain that is no more."""
        self._cpu = None

    def get_ready(self) -> None:
        """The state is complete, and there is time until the first run: have it on the CPU. What
        is wrong with it is the guest's, once that runs."""
        if not self.xen.powered and not self.filling.active:
            try:
                self._load_cpu()
            except Exception:  # noqa: BLE001 - power_on() meets it again
                self.forget_cpu()

    def power_on(self) -> None:
        """The first run: from here on the clocks run and the state is the guest's."""
        if self.domain.never_run:
            self.domain.start()
        self._load_cpu()

    def _load_cpu(self) -> None:
        domain, xen = self.domain, self.xen
        self.warm_up()
        assert self._cpu is not None
        xen.start_cpu(self._cpu)
        self._cpu = None
        xen.hands_over = len(domain.vcpus) > 1 and not domain.clock.virtual

    def disk_done(self) -> None:
        """A disk's thread has done something: the vCPU thread is to look at it."""
        self.control.wake()
        if self.hypervisor is not None:
            self.hypervisor.kick()

    def forget_code(self) -> None:
        """Bytes came to where the guest's code may be."""
        if self.xen.powered:
            self.xen.cpu.forget_code()

    def holding(self) -> bool:
        """True if a deterministic guest reached its horizon: nothing moves without a command."""
        clock = self.domain.clock
        return clock.virtual and clock.now() >= clock.horizon_ns

    def remove(self) -> None:
        """Free the frames and forget the domain; `dying` lets the next command wait for it."""
        with contextlib.suppress(OSError):
            (self.directory / "dying").touch()
            (self.directory / "domain.json").unlink()  # before the rest, which takes a moment
        self.disks.close_quietly()
        self.end_filling()
        self.machine.free_domain(self.domid)
        shutil.rmtree(self.directory, ignore_errors=True)
