"""migrate: a running guest moves to another host; at no moment two copies run.

The simplest honest form: suspend, stream, hand over, destroy the source (no live rounds yet).
The conversation is xl's (host/handshake.py). What xl leaves open is closed by the order of
steps: before GO is sent the source's process is told to hold, so that from then on nothing but
an explicit word resumes it, whatever becomes of this process:

    before GO   any failure: the source resumes, the receiver removes its copy
    after GO    report 0: the source is destroyed
                report not 0 and permission: the source resumes
                no report: HandoverUndecided; the source stays suspended, held
"""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass, replace

from xsave.errors import (
    ConnectionLost,
    HandoverUndecided,
    StorageError,
    UsageError,
    XsaveError,
)
from xsave.guest.xen.domctl import DomainInfo, Domctl
from xsave.host import handshake
from xsave.host.channel import open_source
from xsave.host.host import Host
from xsave.host.sink import DescriptorSink
from xsave.host.transport import Receiver
from xsave.progress import Event, Finished, Report, Stage, ignore
from xsave.restore import MakeDomain, Source, restore
from xsave.save import Writer

BANNER_TIMEOUT_S = 30.0
#: From the last byte of the image to the receiver's READY: page tables, vCPUs.
READY_TIMEOUT_S = 120.0
REPORT_TIMEOUT_S = 60.0
INCOMING_SUFFIX = "--incoming"


@dataclass(frozen=True)
class MigrateResult:
    """What a migration did. downtime_ns: from the suspend to the report."""

    nr_pages: int
    bytes_sent: int
    total_ns: int
    downtime_ns: int


def migrate(
    domctl: Domctl, target: Host, *, cpu_mismatch: str = "refuse", report: Report = ignore
) -> MigrateResult:
    """Move the guest to the host `target`.

    Raises SuspendFailed, StorageError (the guest runs on here), HandoverUndecided.
    """
    if target.directory == domctl.machine.directory:
        raise UsageError(f"the domain is on host {target.name} already")
    started = time.monotonic_ns()
    with Receiver(target, cpu_mismatch) as receiver:
        result = Sender(domctl, receiver, report).run()
    result = replace(result, total_ns=time.monotonic_ns() - started)
    seconds = result.total_ns / 1e9
    downtime = f"downtime {result.downtime_ns / 1e6:.0f} ms"
    report(Finished("migrate", seconds, result.nr_pages, result.bytes_sent, downtime))
    return result


class Sender:
    """One migration, seen from the source."""

    def __init__(self, domctl: Domctl, receiver: Receiver, report: Report) -> None:
        self._domctl = domctl
        self._receiver = receiver
        self._report = report
        self._suspended_ns = 0

    def _stage(self, name: str, detail: str = "") -> None:
        self._report(Stage("migrate", name, detail))

    def run(self) -> MigrateResult:
        try:
            self._stage("connect")
            handshake.expect(
                self._receiver.output, handshake.BANNER, "its banner", BANNER_TIMEOUT_S
            )
            writer = self._send_image()
            self._stage("hand over")
            handshake.expect(self._receiver.output, handshake.READY, "ready", READY_TIMEOUT_S)
            self._domctl.hold()
        except BaseException as e:  # noqa: BLE001 - _explain raises it again
            if self._suspended_ns:  # else the guest is not ours to resume
                with suppress(XsaveError):
                    self._domctl.resume()
            self._explain(e)
        status = self._go()
        downtime_ns = time.monotonic_ns() - self._suspended_ns
        if status != handshake.STATUS_OK:
            self._take_back(status)
        self._domctl.destroy()
        return MigrateResult(writer.nr_pages, writer.image_bytes, 0, downtime_ns)

    def _send_image(self) -> Writer:
        self._stage("freeze", "asking the guest to suspend")
        self._domctl.suspend(lambda stage: self._stage("suspend", stage))
        self._suspended_ns = time.monotonic_ns()
        sink = DescriptorSink(self._receiver.input, "the receiving end")
        writer = Writer(self._domctl, sink.write, self._relabel)
        writer.run()
        return writer

    def _relabel(self, event: Event) -> None:
        self._report(replace(event, operation="migrate"))

    def _explain(self, error: BaseException) -> None:
        """Raise the error, with what the receiver said if it is the one that failed."""
        if isinstance(error, StorageError) and (complaint := self._receiver.complaint()):
            reason = complaint.removeprefix("xsave: error: ")
            raise StorageError(
                f"migration failed, the guest goes on here: the receiving end said: {reason}"
            ) from error
        raise error

    def _go(self) -> bytes:
        """Send GO; return the status byte. From here on only the receiver knows."""
        output = self._receiver.output
        try:
            handshake.send(self._receiver.input, handshake.GO, "the go-ahead")
            handshake.expect(output, handshake.REPORT, "its report", REPORT_TIMEOUT_S)
            return handshake.receive(output, 1, "its status", REPORT_TIMEOUT_S)
        except BaseException as e:
            raise self._undecided(e) from e

    def _undecided(self, error: BaseException) -> HandoverUndecided:
        name = self._domctl.name
        return HandoverUndecided(
            f"the go-ahead was sent and no report came back ({error}): {name} stays suspended "
            f"here. If it runs at the target, `xsave destroy {name}` here; if it does not, "
            f"`xsave unpause {name}` here",
            name=name,
        )

    def _take_back(self, status: bytes) -> None:
        """The receiver could not start its copy and gave it up: the guest goes on here."""
        try:
            handshake.expect(
                self._receiver.output, handshake.PERMISSION, "its permission", REPORT_TIMEOUT_S
            )
        except BaseException as e:
            raise self._undecided(e) from e
        self._domctl.resume()
        self._explain(
            StorageError(
                f"the receiving end could not start its copy (status {status[0]}); the guest "
                "goes on here"
            )
        )


def receive(
    make_domain: MakeDomain,
    channel: str,
    output: int,
    *,
    nr_frames: int,
    cpu_mismatch: str = "refuse",
    paused: bool = False,
    report: Report = ignore,
) -> DomainInfo:
    """The far end: take an image from `channel` ("-": stdin), start its guest at the sender's GO.

    Messages go to the descriptor `output`. Raises what restore raises, and ConnectionLost
    without a go-ahead; nothing is left here then.
    """
    handshake.send(output, handshake.BANNER, "the banner")  # the sender waits for it
    with open_source(channel) as source:
        return _take(make_domain, source, output, nr_frames, cpu_mismatch, paused, report)


def _take(
    make_domain: MakeDomain,
    source: Source,
    output: int,
    nr_frames: int,
    cpu_mismatch: str,
    paused: bool,
    report: Report,
) -> DomainInfo:
    went = False

    def hand_over(domctl: Domctl) -> None:
        nonlocal went
        handshake.send(output, handshake.READY, "ready")
        go = bytes(source.read(len(handshake.GO)))
        if go != handshake.GO:
            raise ConnectionLost(f"expected the go-ahead, found {go!r}")
        went = True
        domctl.attach_disks()  # the sender has given them up
        domctl.rename(domctl.name.removesuffix(INCOMING_SUFFIX))

    try:
        info = restore(
            source,
            make_domain,
            suffix=INCOMING_SUFFIX,
            paused=paused,
            cpu_mismatch=cpu_mismatch,
            nr_frames=nr_frames,
            until_end=False,
            before_unpause=hand_over,
            report=report,
        )
    except XsaveError:
        if went:  # the copy is gone, so the sender may have its guest back
            status = handshake.REPORT + handshake.STATUS_FAIL + handshake.PERMISSION
            handshake.send(output, status, "the report")
        raise
    handshake.send(output, handshake.REPORT + handshake.STATUS_OK, "the report")
    return info
