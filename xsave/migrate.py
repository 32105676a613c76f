"""migrate: a running guest moves to another host; at no moment two copies run.

    live     log-dirty on -> rounds until the policy says stop (rounds.py) -> suspend -> the rest
             -> hand-over
    no live  suspend -> all of it -> hand-over
    postcopy log-dirty on -> one round -> suspend -> what it takes to start the guest -> hand-over
             -> what it wrote since, as it asks for it and by and by -> the source ends

The conversation is xl's (host/handshake.py). What xl leaves open is closed by a journal at either
end (host/handover): before GO is sent the source's process is told to hold, so that from then on
nothing but an explicit word resumes it, whatever becomes of this process:

    before GO   any failure: the log is off, the source goes on, the receiver removes its copy
    after GO    report 0: the source is destroyed
                report not 0 and permission: the source resumes
                no report, or a Ctrl-C: the target's journal is asked which of the two it is
                it cannot be asked: HandoverUndecided; the source stays suspended, held

With post-copy the source stays held until all has come. If it, this process or the connection dies
before that, the guest is lost: what is held is what it was before it ran at the target.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace

from xsave.errors import (
    GuestStateError,
    HandoverUndecided,
    MigrationCancelled,
    StorageError,
    UsageError,
    XsaveError,
)
from xsave.guest.xen.domctl import Domctl
from xsave.host.handover.journal import Journal, Journals, new_transaction
from xsave.host.handover.patience import Patience
from xsave.host.handover.recovery import LOST, MIGRATED, recover, undecided
from xsave.host.handover.sender import HandingOver
from xsave.host.handover.table import SOURCE, Step
from xsave.host.host import Host
from xsave.host.receivers import NO_POSTCOPY, Target, XlTarget, connect
from xsave.host.transport import Channel, Receiver, measured_bandwidth
from xsave.live import LiveWriter
from xsave.postcopy import LeftOut
from xsave.precopy import CANCEL, Limits
from xsave.progress import Event, Finished, Followed, Report, Stage, ignore
from xsave.rounds import DryRun, Precopy, dry_run
from xsave.save import Writer

#: The other end still works on what came last, and beside it, on the same processors, the last look
#: takes half as long again. Where so little is pending that the stop is short, it is waited for.
_SETTLE_S, _LITTLE_BYTES = 0.02, 4 << 20


@dataclass(frozen=True)
class Options:
    """How to migrate.

    bandwidth: bytes a second at most; dirty_log: userfaultfd, compare or auto, what there is;
    postcopy: after one round the guest goes, and its memory follows.
    """

    live: bool = True
    limits: Limits = field(default_factory=Limits)
    bandwidth: float | None = None
    compress_level: int | None = None
    cpu_mismatch: str = "refuse"
    dirty_log: str = "auto"
    nr_connections: int = 1
    postcopy: bool = False

    def check(self, target: Target) -> None:
        """Raise UsageError for what cannot be had together."""
        if not self.postcopy:
            return
        if isinstance(target, XlTarget):
            raise UsageError(f"{target.name}: {NO_POSTCOPY}")
        for wrong, what in (
            (not self.live, "--no-live"),
            (self.nr_connections > 1, "--connections"),
            (self.compress_level is not None, "--compress"),
            (self.limits.auto_converge, "--auto-converge"),
        ):
            if wrong:
                raise UsageError(f"--postcopy and {what} exclude each other")


@dataclass(frozen=True)
class MigrateResult:
    """What a migration did. nr_pages counts each page as often as it was sent; bytes_sent are
    those on the wire, total_ns from the first connection to the end.

    downtime_ns is the host's: from when it knew of the suspend to the receiver's report.
    guest_downtime_ns is the guest's: the difference of its wall clock (Xen's, of shared_info, and
    the system time) between its suspend and its first moment at the target. freeze_ns is what came
    before: from asking the guest to suspend to knowing that it has.
    postcopy_pages are those that came behind the guest (nr_pages counts them, too),
    postcopy_faults those of them that it asked for before they were sent.
    """

    outcome: str
    dirty_log: str | None
    nr_rounds: int
    nr_pages: int
    bytes_sent: int
    memory_bytes: int
    total_ns: int
    downtime_ns: int
    guest_downtime_ns: int
    freeze_ns: int
    postcopy_pages: int = 0
    postcopy_faults: int = 0


def migrate(
    domctl: Domctl,
    target: Target,
    options: Options | None = None,
    *,
    report: Report = ignore,
) -> MigrateResult:
    """Move the guest to `target`, a host or whatever takes a migration.

    Raises MigrationCancelled, SuspendFailed, StorageError (the guest runs on here),
    HandoverUndecided.
    """
    if isinstance(target, Host) and target.directory == domctl.machine.directory:
        raise UsageError(f"the domain is on host {target.name} already")
    started = time.monotonic_ns()
    options = options or Options()
    options.check(target)
    journals, transaction = Journals(domctl.machine.directory), new_transaction()
    chosen = {"cpu-mismatch": options.cpu_mismatch, "transaction": transaction}
    if options.postcopy:
        chosen["postcopy"] = ""
    with journals.begin(SOURCE, transaction, domctl.name, target.name) as journal:
        journal.note(domid=domctl.domid)
        domctl.journal = str(journal.path)
        with connect(target, chosen, options.nr_connections) as receiver:
            result = Sender(domctl, journal, receiver, options, report).run()
    result = replace(result, total_ns=time.monotonic_ns() - started)
    seconds = result.total_ns / 1e9
    downtime = f"downtime {result.downtime_ns / 1e6:.0f} ms"
    report(Finished("migrate", seconds, result.nr_pages, result.bytes_sent, downtime))
    return result


def estimate(domctl: Domctl, target: Target, options: Options) -> DryRun:
    """Say what a live migration would take, from a sample; the guest runs and nothing moves.

    The bandwidth is what gets to the target now, that of a pipe here if it is a real xl, or what
    the options allow. Raises StorageError, UsageError."""
    bandwidth = min(_bandwidth(target), options.bandwidth or float("inf"))
    log = domctl.log_dirty(options.dirty_log)
    writer = LiveWriter(domctl, lambda buffers: None, ignore, log, zeroes=True)
    try:
        limits = None if options.postcopy else options.limits
        return dry_run(domctl, writer, log.kind, bandwidth, limits)
    finally:
        with suppress(XsaveError):
            log.off()


def _bandwidth(target: Target) -> float:
    if isinstance(target, XlTarget):
        return measured_bandwidth()
    with connect(target, {"probe": ""}) as receiver:
        try:
            return receiver.bandwidth() or measured_bandwidth()
        except StorageError as e:
            raise StorageError(f"nothing gets there: {receiver.complaint() or e}") from e


class Sender:
    """One migration, seen from the source."""

    def __init__(
        self,
        domctl: Domctl,
        journal: Journal,
        receiver: Receiver,
        options: Options,
        report: Report,
    ) -> None:
        self._domctl = domctl
        self._journal = journal
        self._host = Host(domctl.machine.directory)
        self._receiver = receiver
        self._options = options
        self._report = report
        self._suspended_ns = self._freeze_ns = 0
        self._dirty_log: str | None = None
        self._nr_rounds = 0
        self._left_out: LeftOut | None = None

    def _stage(self, name: str, detail: str = "") -> None:
        self._report(Stage("migrate", name, detail))

    def run(self) -> MigrateResult:
        # A guest that does not run writes nothing, and has its own reasons not to suspend.
        info = self._domctl.info()
        live = self._options.live and info.state == "running"
        channel = self._receiver.channel(self._options.compress_level, self._options.bandwidth)
        try:
            self._stage("connect")
            writer = self._send_live(channel) if live else self._send_image(channel)
            channel.flush()
            self._stage("hand over")
        except BaseException as e:  # noqa: BLE001 - _explain raises it again
            if self._suspended_ns:  # else the guest is not ours to resume
                with suppress(XsaveError):
                    self._domctl.resume()
            with suppress(XsaveError):
                self._journal.take(Step.TAKE_BACK)
            self._explain(e)
        handing = self._hand_over(channel)
        downtime_ns = (handing.reported_ns or time.monotonic_ns()) - self._suspended_ns
        if behind := self._left_out:
            seconds = (time.monotonic_ns() - handing.reported_ns) / 1e9
            self._report(Followed("migrate", behind.nr_sent, behind.nr_faults, seconds))
        return MigrateResult(
            outcome="migrated",
            dirty_log=self._dirty_log,
            nr_rounds=self._nr_rounds,
            nr_pages=writer.nr_pages + (behind.nr_sent if behind else 0),
            bytes_sent=channel.wire_bytes(),
            memory_bytes=info.memory_bytes,
            total_ns=0,
            downtime_ns=downtime_ns,
            guest_downtime_ns=self._guest_downtime_ns(downtime_ns),
            freeze_ns=self._freeze_ns,
            postcopy_pages=behind.nr_sent if behind else 0,
            postcopy_faults=behind.nr_faults if behind else 0,
        )

    def _guest_downtime_ns(self, downtime_ns: int) -> int:
        """By the guest's clock; the host's figure where the receiver did not say, or the guest
        never ran."""
        resumed_ns = self._receiver.resumed_ns()
        suspended_ns = self._domctl.suspended_ns
        return resumed_ns - suspended_ns if resumed_ns and suspended_ns else downtime_ns

    def _suspend(self, ask_last: Callable[[], None] = lambda: None) -> None:
        self._stage("freeze", "asking the guest to suspend")
        asked_ns = time.monotonic_ns()
        wait = self._domctl.ask_suspend()
        ask_last()
        wait(lambda stage: self._stage("suspend", stage))
        self._suspended_ns = time.monotonic_ns()
        self._freeze_ns = self._suspended_ns - asked_ns

    def _send_image(self, channel: Channel) -> Writer:
        self._receiver.greet()
        self._suspend()
        writer = Writer(self._domctl, channel.write, self._relabel)
        writer.run()
        return writer

    def _send_live(self, channel: Channel) -> Writer:
        log = self._domctl.log_dirty(self._options.dirty_log)
        self._dirty_log = log.kind
        self._stage("log dirty", log.kind)
        try:
            self._receiver.greet()  # what the guest writes meanwhile is logged
            zeroes = self._receiver.is_xsave
            postcopy = self._options.postcopy
            writer = LiveWriter(
                self._domctl, channel.write, self._relabel, log, zeroes=zeroes, postcopy=postcopy
            )
            writer.begin()
            rounds = Precopy(
                self._domctl, writer, self._options.limits, self._report, channel.wire_bytes,
                channel.flush,
            )  # fmt: skip
            decision = rounds.run_once() if postcopy else rounds.run()
            self._nr_rounds = rounds.nr_rounds + 1  # the last one is sent by finish()
            if decision.action == CANCEL:
                raise MigrationCancelled(
                    f"migration cancelled, the guest goes on here: {decision.reason}"
                )
            if writer.pending_bytes <= _LITTLE_BYTES:
                time.sleep(_SETTLE_S)
            self._suspend(writer.ask_last)
            writer.finish()
            if postcopy:
                self._left_out = LeftOut(
                    self._domctl, writer.left_out, writer.left_out_mfns, channel.write,
                    channel.flush, self._report, self._options.bandwidth,
                )  # fmt: skip
        except XsaveError:  # after a Ctrl-C the connection is not to be asked: it is closed
            with suppress(XsaveError):
                log.off()
            raise
        return writer

    def _relabel(self, event: Event) -> None:
        self._report(replace(event, operation="migrate"))

    def _explain(self, error: BaseException) -> None:
        """Raise the error, with what the receiver said if it is the one that failed."""
        if not isinstance(error, StorageError):
            raise error
        reason = self._receiver.complaint() or error
        raise StorageError(f"migration failed, the guest goes on here: {reason}") from error

    def _hand_over(self, channel: Channel) -> HandingOver:
        """Hand over; return when the guest is the target's. Raises what went wrong when it goes on
        here, HandoverUndecided if neither is known."""
        with Patience(self._told_to_stop) as patience:
            handing = HandingOver(
                self._domctl, self._journal, channel, self._receiver.output, self._left_out,
                patience.begin if self._left_out else lambda: None,
                soon=self._dirty_log is not None and self._receiver.is_xsave,
            )  # fmt: skip
            end, wrong = handing.run()
        if end == "unknown":
            self._ask(wrong)
        elif end == "kept":
            self._explain(wrong or _could_not_start(handing.status))
        return handing

    def _told_to_stop(self) -> None:
        self._stage("wait", "the guest runs there: this goes on until all of it has come")

    def _ask(self, wrong: BaseException | None) -> None:
        """Nobody has said how it ended: ask both journals. Return if the guest is the target's."""
        wrong = wrong or StorageError("the hand-over was interrupted")
        entry = self._journal.read()
        try:
            self._stage("recover", str(wrong) or "interrupted")
            self._domctl.close()
            self._receiver.close()
            outcome = recover(self._host, self._journal, working=True)
        except HandoverUndecided:
            raise
        except BaseException as e:
            raise undecided(self._host, entry, str(e) or "interrupted") from e
        if outcome.what == LOST:
            raise GuestStateError(outcome.said) from wrong
        if outcome.what != MIGRATED:
            self._explain(wrong)


def _could_not_start(status: bytes) -> StorageError:
    return StorageError(f"the receiving end could not start its copy (status {status[0]})")
