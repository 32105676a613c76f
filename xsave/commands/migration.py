"""migrate: a running domain moves to another host."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from xsave import console
from xsave.commands.common import DOMAIN, HOST, SIZE, Settings, json_option, pass_settings
from xsave.commands.flows import (
    DEFAULT_COMPRESS_LEVEL,
    cpu_mismatch_option,
)
from xsave.errors import HandoverUndecided, MigrationCancelled, NotFound, UsageError
from xsave.progress import Event, Pages, Report, undisturbed
from xsave.progress import Round as RoundEvent

if TYPE_CHECKING:
    from xsave.migrate import MigrateResult, Options
    from xsave.rounds import DryRun

#: How writes are to be logged, for tests of what other kernels have: auto, userfaultfd, compare.
DIRTY_LOG_VARIABLE = "XSAVE_DIRTY_LOG"
#: Of precopy.py, which a command that only parses need not import; a test compares.
DOWNTIME_MS, TIMEOUT_S = 300, 120
#: Of host/striping.py; likewise.
MAX_CONNECTIONS = 16
_OUTCOMES: tuple[tuple[type[BaseException], str], ...] = (
    (MigrationCancelled, "cancelled"),
    (HandoverUndecided, "undecided"),
    (KeyboardInterrupt, "interrupted"),
)
#: Said before: in the help, the prompt and the man page (tests compare).
RISK = (
    "If the source, this command or the connection dies before all of its memory has come, the "
    "guest is lost."
)
ENDINGS = ("stop-and-copy", "cancel")


@click.command()
@click.argument("name", type=DOMAIN, required=False)
@click.option(
    "--to",
    "target",
    type=HOST,
    metavar="HOST",
    help="The host to move to, or tcp:HOST:PORT, unix:PATH, xl:COMMAND.",
)
@click.option("--no-live", is_flag=True, help="Suspend first, then copy.")
@click.option(
    "--downtime",
    type=click.IntRange(1),
    metavar="MS",
    default=DOWNTIME_MS,
    show_default=True,
    help="How long the guest may stand still.",
)
@click.option(
    "--timeout",
    type=click.FloatRange(0, min_open=True),
    metavar="S",
    default=TIMEOUT_S,
    show_default=True,
    help="How long to copy while it runs.",
)
@click.option(
    "--on-timeout",
    type=click.Choice(ENDINGS),
    default=ENDINGS[0],
    show_default=True,
    help="What if its writes do not fit into that.",
)
@click.option("--auto-converge", is_flag=True, help="Throttle a guest that writes too fast.")
@click.option("--bandwidth", type=SIZE, metavar="RATE", help="Bytes a second, at most (100M).")
@click.option(
    "--connections",
    type=click.IntRange(1, MAX_CONNECTIONS),
    metavar="N",
    default=1,
    help=f"Send over so many connections at once (1 to {MAX_CONNECTIONS}, 1).",
)
@click.option("--postcopy", is_flag=True, help=f"Start it there after one round. {RISK}")
@click.option("-y", "--yes", is_flag=True, help="With --postcopy: do not ask.")
@click.option("--compress", is_flag=True, help="Send zstd.")
@click.option(
    "--compress-level",
    type=click.IntRange(1, 19),
    metavar="N",
    help=f"zstd's level (1 to 19, {DEFAULT_COMPRESS_LEVEL}); implies --compress.",
)
@click.option("--dry-run", is_flag=True, help="Only say how it would go.")
@click.option("--status", is_flag=True, help="Show what became of migrations, by name or id.")
@click.option("--recover", is_flag=True, help="Bring an undecided one to one running copy.")
@cpu_mismatch_option
@json_option
@pass_settings
def migrate(settings: Settings, /, name: str | None, target: str | None, **options: Any) -> None:
    """Move a domain to another host while it runs on.

    Its memory is copied in rounds, each time what it wrote meanwhile; then it is suspended for the
    rest and the hand-over. NAME may be left out where the host runs just one domain. With --status
    and --recover it may be the id of a migration too, or be left out for all of them.
    """
    if options["status"] or options["recover"]:
        from xsave.commands import recovering

        if target or (options["status"] and options["recover"]):
            raise UsageError("--to, --status and --recover exclude each other")
        ask = recovering.show if options["status"] else recovering.recover
        ask(settings, name, options["as_json"])
        return
    if target is None:
        raise click.UsageError("Missing option '--to'.")
    from xsave import migrate as verb
    from xsave.host.receivers import open_target

    as_json, chosen = options["as_json"], read_options(options)
    if options["no_live"] and options["dry_run"]:
        raise UsageError("--no-live and --dry-run exclude each other")
    destination = open_target(target)
    chosen.check(destination)
    if options["postcopy"] and not (options["yes"] or options["dry_run"]):
        warn(settings)
    with settings.find(name or only_domain(settings)) as domctl:
        if options["dry_run"]:
            planned = verb.estimate(domctl, destination, chosen)
            answer = {"name": domctl.name, "host": target, **asdict(planned)}
            say_estimate(settings, as_json, answer, planned)
            return
        with settings.progress() as report:
            if as_json:
                report = lines(report, settings)
            result = run(settings, lambda: verb.migrate(domctl, destination, chosen, report=report))
        if as_json:
            console.emit_json_line({"name": domctl.name, "host": target, **asdict(result)})
        else:
            settings.say(sentence(domctl.name, target, result))


def warn(settings: Settings) -> None:
    """Say what post-copy risks; ask, where there is somebody. Raises click.Abort."""
    if sys.stdin.isatty() and sys.stderr.isatty():
        click.confirm(f"{RISK} Go on?", abort=True, err=True)
    else:
        settings.say(f"{RISK}")


def read_options(options: dict[str, Any]) -> Options:
    """Return the options as the flow wants them."""
    from xsave.guest.xen.domctl import DIRTY_LOGS
    from xsave.migrate import Options
    from xsave.precopy import Limits

    dirty_log = os.environ.get(DIRTY_LOG_VARIABLE) or DIRTY_LOGS[0]
    if dirty_log not in DIRTY_LOGS:
        raise UsageError(f"{DIRTY_LOG_VARIABLE}={dirty_log}: expected {', '.join(DIRTY_LOGS)}")
    level = options["compress_level"] or (DEFAULT_COMPRESS_LEVEL if options["compress"] else None)
    return Options(
        live=not options["no_live"],
        limits=Limits(
            downtime_s=options["downtime"] / 1000,
            timeout_s=options["timeout"],
            on_timeout=options["on_timeout"],
            auto_converge=options["auto_converge"],
        ),
        bandwidth=options["bandwidth"],
        compress_level=level,
        cpu_mismatch=options["cpu_mismatch"],
        dirty_log=dirty_log,
        nr_connections=options["connections"],
        postcopy=options["postcopy"],
    )


def lines(report: Report, settings: Settings) -> Report:
    """Return a report that also writes what happens, all but the pages, as lines on stdout."""
    settings.failure = {"outcome": "failed", "nr_rounds": 0, "bytes_sent": 0}
    tell = undisturbed(lambda event: console.emit_json_line(console.event_fields(event)))

    def both(event: Event) -> None:
        report(event)
        if isinstance(event, RoundEvent):
            settings.failure["nr_rounds"] = event.number
            settings.failure["bytes_sent"] += event.nr_bytes
        if not isinstance(event, Pages):
            tell(event)

    return both


def run(settings: Settings, move: Callable[[], MigrateResult]) -> MigrateResult:
    """Migrate; of a failure, note what kind it was."""
    try:
        return move()
    except BaseException as e:
        if settings.failure:
            kinds = [word for kind, word in _OUTCOMES if isinstance(e, kind)]
            settings.failure["outcome"] = (kinds or ["failed"])[0]
        raise


def sentence(name: str, target: str, result: MigrateResult) -> str:
    """Say what a migration did."""
    said = f"{name}: now on {target}, downtime {result.downtime_ns / 1e6:.0f} ms"
    if not result.nr_rounds:
        return said
    said += f" ({result.guest_downtime_ns / 1e6:.0f} ms for the guest)"
    if result.postcopy_pages:
        said += f", {result.postcopy_pages} pages behind it ({result.postcopy_faults} asked for)"
    sent, memory = result.bytes_sent, result.memory_bytes
    return (
        f"{said}, {result.total_ns / 1e9:.2f} s in all, {result.nr_rounds} rounds, "
        f"{console.human_bytes(sent)} sent ({sent / memory:.2f} of its memory)"
    )


def say_estimate(
    settings: Settings, as_json: bool, answer: dict[str, Any], planned: DryRun
) -> None:
    """Say how a migration would go."""
    if as_json:
        console.emit_json_line(answer)
        return
    rate, bandwidth = (
        console.human_bytes(int(number)) for number in (planned.dirty_rate, planned.bandwidth)
    )
    console.table(
        "",
        ["estimate", ""],
        [
            ["dirty log", planned.dirty_log],
            ["writes", f"{rate}/s"],
            ["bandwidth", f"{bandwidth}/s"],
            ["rounds", str(planned.nr_rounds)],
            ["then", f"{planned.outcome}: {planned.reason}"],
            ["total", f"{planned.total_ns / 1e9:.2f} s"],
            ["downtime", f"{planned.downtime_ns / 1e6:.0f} ms"],
            ["sent", console.human_bytes(planned.bytes_sent)],
        ],
    )


def only_domain(settings: Settings) -> str:
    """Return the name of the host's one domain."""
    names = [domain.name for domain in settings.open_host().domains()]
    if not names:
        raise NotFound(f"host {settings.host} runs no domain")
    if len(names) > 1:
        raise UsageError(f"host {settings.host} runs {len(names)}: say which ({', '.join(names)})")
    return names[0]
