"""One OS process per domain: it owns the vCPUs and does what the control socket asks.

    python -m xsave.host.process HOST_DIRECTORY DOMID NAME LISTEN_FD ALIVE_FD

It is started detached by `spawn`, with no descriptor but the listening socket and the locked
`alive` file. The vCPU loop below is the only place that changes the domain; requests are done
between two runs of the guest (operations.py), at once when it blocks.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import traceback
from pathlib import Path

from xsave.errors import ConnectionLost, GuestStateError, StorageError
from xsave.guest.xen.domain import Domain
from xsave.guest.xen.domctl import Domctl
from xsave.guest.xen.hypervisor import Hypervisor
from xsave.guest.xen.machine import Machine
from xsave.host import host as hosts
from xsave.host.control import Control, Ticker
from xsave.host.operations import Operations

#: Instructions per slice of a deterministic guest.
SLICE_INSTRUCTIONS = 100_000
#: An asynchronous stop is exact unless the guest is just patching its own code, as Linux does
#: at boot: a foreign kernel gets time to cross by itself first.
GRACE_BUILTIN_S = 0.002
GRACE_FOREIGN_S = 0.1
_NS_PER_S = 1_000_000_000
_LONGEST_WAIT_S = 3600.0


class DomainProcess:
    """The loop of one domain. `domain` and `hypervisor` exist after the `begin` request."""

    def __init__(self, directory: Path, machine: Machine, domid: int, name: str,
                 listener: socket.socket) -> None:  # fmt: skip
        self.directory = directory
        self.machine = machine
        self.domid = domid
        self.name = name
        self.hypervisor: Hypervisor | None = None
        self.builtin = False
        self.finished = False
        self.control = Control(listener, self._type)
        self.operations = Operations(self)
        self._ticker = Ticker(GRACE_BUILTIN_S, self._crossings, self._due, self._stop)

    @property
    def domain(self) -> Domain:
        """The domain. Raises GuestStateError before `begin`."""
        return self.xen.domain

    @property
    def xen(self) -> Hypervisor:
        if self.hypervisor is None:
            raise GuestStateError("the domain is not built yet")
        return self.hypervisor

    # -- called by other threads ---

    def _type(self, data: bytes) -> None:
        if self.hypervisor is not None:
            self.domain.console.type(data)

    def _crossings(self) -> int:
        return self.hypervisor.nr_crossings if self.hypervisor else 0

    def _due(self) -> bool:
        if self.control.has_requests():
            return True
        domain = self.domain
        now = domain.clock.now()
        return any(v.timer_ns is not None and v.timer_ns <= now for v in domain.vcpus)

    def _stop(self) -> None:
        if self.xen.powered:
            self.xen.cpu.stop()

    # -- the loop ---

    def serve(self) -> None:
        """Run until the domain is destroyed."""
        self.control.start()
        self._ticker.start()
        while not self.finished:
            self.operations.serve()
            if self.finished:
                break
            if not self._runnable():
                self._wait(self.operations.deadline_s())
            else:
                self._run_guest()

    def _runnable(self) -> bool:
        return (
            self.hypervisor is not None
            and not self.operations.paused
            and self.domain.shutdown_reason is None
            and not self.holding()
        )

    def holding(self) -> bool:
        """True if a deterministic guest reached its horizon: nothing moves without a command."""
        clock = self.domain.clock
        return clock.virtual and clock.now() >= clock.horizon_ns

    def _run_guest(self) -> None:
        domain, hv = self.domain, self.xen
        try:
            if not hv.powered:
                self._first_run()
            domain.serve_console()
            domain.serve_store()
            domain.run_timers(domain.clock.now())
            if domain.vcpus[0].blocked and not self._unblock():
                self._idle()
                return
            if not domain.clock.virtual:  # slices end by count there, whatever waits
                self._ticker.running.set()
            hv.run(SLICE_INSTRUCTIONS if domain.clock.virtual else 0)
        except Exception as e:  # noqa: BLE001 - a bug of ours must not take the control socket down
            domain.crash(f"hypervisor: {type(e).__name__}: {e}")
            domain.console.put(traceback.format_exc().encode())
        finally:
            self._ticker.running.clear()
        if domain.clock.virtual and not domain.vcpus[0].blocked:
            domain.clock.slice()
        self.operations.after_run()

    def _first_run(self) -> None:
        """The first unpause: from here on the clocks run and the state is the guest's."""
        domain = self.domain
        self._ticker.grace_s = GRACE_BUILTIN_S if self.builtin else GRACE_FOREIGN_S
        domain.start()
        self.xen.power_on()

    def _unblock(self) -> bool:
        """True if the blocked vCPU may run: an upcall, a polled port, a poll's end."""
        vcpu, domain = self.domain.vcpus[0], self.domain
        polled = any(domain.events.is_pending(port) for port in vcpu.polling)
        late = vcpu.poll_deadline_ns is not None and vcpu.poll_deadline_ns <= domain.clock.now()
        upcall = vcpu.info.evtchn_upcall_pending and not vcpu.info.evtchn_upcall_mask
        if not (polled or late or upcall):
            return False
        vcpu.blocked, vcpu.polling, vcpu.poll_deadline_ns = False, (), None
        return True

    def _idle(self) -> None:
        """Nothing to run: wait for the next timer (or jump to it, in virtual time)."""
        domain = self.domain
        vcpu = domain.vcpus[0]
        times = [t for t in (vcpu.timer_ns, vcpu.poll_deadline_ns) if t is not None]
        if domain.clock.virtual:
            domain.clock.jump(min(times, default=domain.clock.horizon_ns))
            return
        wait = (min(times) - domain.clock.now()) / _NS_PER_S if times else None
        deadline = self.operations.deadline_s()
        waits = [w for w in (wait, deadline) if w is not None]
        # A guest may ask for a timer in 600 years, select() for no such wait.
        self._wait(max(min(*waits, _LONGEST_WAIT_S), 0.0) if waits else None)

    def _wait(self, seconds: float | None) -> None:
        if not self.control.has_requests():
            select.select([self.control.wake_fd], [], [], seconds)
        self.control.clear_wake()

    # -- the end ---

    def remove(self) -> None:
        """Free the frames and forget the domain; `dying` lets the next command wait for it."""
        with contextlib.suppress(OSError):
            (self.directory / "dying").touch()
        self.machine.free_domain(self.domid)
        shutil.rmtree(self.directory, ignore_errors=True)


def main(arguments: list[str]) -> None:
    host_directory, domid, name, listen_fd, _alive_fd = arguments
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    faulthandler.register(signal.SIGUSR1)  # where does it hang? the answer is in process.log
    listener = socket.socket(fileno=int(listen_fd))
    listener.set_inheritable(False)
    host = hosts.Host(Path(host_directory))
    directory = host.directory / "domains" / domid
    process = DomainProcess(directory, host.machine, int(domid), name, listener)
    try:
        process.serve()
    finally:
        process.remove()


def spawn(host: hosts.Host, name: str) -> Domctl:
    """Register a domain and start its process; return the connection that builds it.

    Raises NameTaken, StorageError. Closing the connection before commit() undoes everything.
    """
    domid, directory, alive = host.register(name)
    try:
        with hosts.socket_address(directory) as address:
            listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            listener.bind(address)
            listener.listen(16)
        with (directory / "process.log").open("wb") as log:
            subprocess.Popen(
                [
                    sys.executable, "-m", __name__, str(host.directory), str(domid), name,
                    str(listener.fileno()), str(alive),
                ],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd="/",
                start_new_session=True, pass_fds=(listener.fileno(), alive),
                env=_environment(),
            )  # fmt: skip
        sock = hosts.connect_socket(directory)
        listener.close()
        return Domctl(host.machine, domid, name, sock)
    except (OSError, ConnectionLost) as e:
        host.forget(domid, directory)
        raise StorageError(f"cannot start the domain's process: {e}") from e
    finally:
        os.close(alive)


def _environment() -> dict[str, str]:
    """Let the child find this very package, installed or not; one thread per numpy is enough."""
    root = str(Path(__file__).resolve().parents[2])
    path = os.environ.get("PYTHONPATH", "")
    return os.environ | {
        "PYTHONPATH": f"{root}:{path}" if path else root,
        "OPENBLAS_NUM_THREADS": "1",
    }


if __name__ == "__main__":
    main(sys.argv[1:])
