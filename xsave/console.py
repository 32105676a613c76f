"""What people and scripts see: progress, tables, JSON, messages. The only importer of rich.

Data goes to stdout, talk to stderr. rich is loaded only where something is drawn on a terminal;
a pipe or a file gets plain aligned text, so that scripts pay nothing for it and see no escapes.
Progress is drawn from the events of `xsave/progress.py` on stderr: on a terminal as stages by
name and a bar with pages, rate and time left; with `--progress json` as one JSON line each.
"""

from __future__ import annotations

import errno
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from typing import Any, TextIO

from xsave.errors import StorageError
from xsave.progress import (
    Decided,
    Event,
    Finished,
    Followed,
    Pages,
    Report,
    Round,
    Stage,
    ignore,
    undisturbed,
)

PAGE_SIZE = 4096
ERROR_PREFIX = "xsave: error: "


def emit_json(obj: object, *, stderr: bool = False) -> None:
    """Write one JSON document and a newline; numpy integers count as integers."""
    text = json.dumps(obj, indent=2, default=_plain)
    _write(sys.stderr if stderr else sys.stdout, text + "\n")


def emit_json_line(obj: object) -> None:
    """Write one JSON document as one line on stdout."""
    _write(sys.stdout, json.dumps(obj, default=_plain) + "\n")


def table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], *, stderr: bool = False
) -> None:
    """Print a table: drawn on a terminal, else aligned columns under one header line."""
    out = sys.stderr if stderr else sys.stdout
    if out.isatty():
        _rich_table(out, title, columns, rows)
    else:
        _write(out, _plain_table(columns, rows))


def text(line: str, *, stderr: bool = False) -> None:
    """Print one line of an answer."""
    _write(sys.stderr if stderr else sys.stdout, line + "\n")


def raw(data: bytes) -> None:
    """Write bytes to stdout as they are."""
    out = sys.stdout.buffer
    _guard("stdout", lambda: (out.write(data), out.flush()))


def say(message: str) -> None:
    """Tell a person something that is not the answer itself. If nobody listens any more, what is
    to be done is done all the same."""
    with suppress(BrokenPipeError):
        _write(sys.stderr, f"{message}\n")


def error(message: str) -> None:
    """Report why the command failed, in one line; a stderr that is gone does not matter."""
    one_line = " ".join(message.split("\n"))
    with suppress(OSError, StorageError):
        _write(sys.stderr, f"{ERROR_PREFIX}{one_line}\n")


@contextmanager
def progress(mode: str = "auto", *, quiet: bool = False, verbose: bool = False) -> Iterator[Report]:
    """Give a `report` callable for a flow; what is drawn is gone when the block ends.

    `mode` is auto (draw on a terminal, else nothing, or stages as lines where `verbose`), json
    or none."""
    if mode == "json":
        yield undisturbed(report_json)
    elif mode == "none" or quiet:
        yield ignore
    elif not sys.stderr.isatty():
        yield report_lines if verbose else ignore
    else:
        with _terminal_progress() as report:
            yield report


def report_json(event: Event) -> None:
    """Write an event as one JSON line on stderr: `event` is its class, then its fields."""
    _write(sys.stderr, json.dumps(event_fields(event), default=_plain) + "\n")


def event_fields(event: Event) -> dict[str, Any]:
    """Return an event as a JSON object: `event` is its class, then its fields."""
    return {"event": type(event).__name__.lower(), **asdict(event)}


def report_lines(event: Event) -> None:
    """Write all but pages as plain lines on stderr."""
    if isinstance(event, Stage):
        say(f"{event.operation}: {event.name}{_detail(event.detail)}")
    elif isinstance(event, Finished):
        say(finished_line(event))
    elif isinstance(event, Round):
        say(f"{event.operation}: {round_line(event)}")
    elif isinstance(event, Decided):
        say(f"{event.operation}: {event.action}: {event.reason}")
    elif isinstance(event, Followed):
        say(f"{event.operation}: {followed_line(event)}")


def round_line(event: Round) -> str:
    """Say what a round did, in columns."""
    of_these = f"{event.zero_pages} empty"
    if event.deferred_pages:
        of_these += f", {event.deferred_pages} deferred"
    if event.skipped_pages:
        of_these += f", {event.skipped_pages} more skipped"
    return (
        f"round {event.number:2}: {event.nr_pages:8} pages ({of_these}), "
        f"{human_bytes(event.nr_bytes):>9} in {event.seconds:6.2f} s "
        f"({human_bytes(int(event.bandwidth))}/s); written meanwhile: {event.pending_pages:7} "
        f"pages ({human_bytes(int(event.dirty_rate))}/s); "
        f"downtime now: {event.estimated_downtime_s * 1000:.0f} ms"
    )


def followed_line(event: Followed) -> str:
    """Say what came behind a guest."""
    return (
        f"post-copy: {event.nr_pages} pages followed the guest in {event.seconds:.2f} s: "
        f"{event.nr_faults} it asked for, {event.nr_pages - event.nr_faults} by and by"
    )


def finished_line(event: Finished) -> str:
    """Say what an operation did: `save: 8192 pages, 12.0 MiB in 0.21 s`."""
    size = human_bytes(event.image_bytes)
    seconds = f"{event.seconds:.2f} s"
    detail = _detail(event.detail)
    return f"{event.operation}: {event.nr_pages} pages, {size} in {seconds}{detail}"


def human_bytes(count: int) -> str:
    """Return a byte count as a person reads it: `512 B`, `64.0 MiB`."""
    if count < 1024:
        return f"{count} B"
    size = float(count)
    for unit in ("KiB", "MiB", "GiB"):
        size /= 1024
        if size < 1024:
            return f"{size:.1f} {unit}"
    return f"{size / 1024:.1f} TiB"


def _detail(detail: str) -> str:
    return f" ({detail})" if detail else ""


def _plain(value: Any) -> object:
    """What json cannot write by itself: numpy scalars as Python's, bytes as hex."""
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value).hex()
    return value.item() if hasattr(value, "item") else str(value)


def _write(out: TextIO, data: str) -> None:
    _guard(getattr(out, "name", "the output"), lambda: (out.write(data), out.flush()))


def _guard(name: str, write: Callable[[], object]) -> None:
    """Write. A reader that left raises BrokenPipeError, everything else StorageError."""
    try:
        write()
    except BrokenPipeError:
        raise
    except OSError as problem:
        reason = errno.errorcode.get(problem.errno or 0, "?")
        raise StorageError(f"cannot write to {name}: {problem.strerror} ({reason})") from problem


def _plain_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [list(columns), *[list(row) for row in rows]]
    widths = [max(len(line[n]) for line in lines) for n in range(len(columns))]
    padded = (
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        for line in lines
    )
    return "".join(line.rstrip() + "\n" for line in padded)


def _rich_table(
    out: TextIO, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]
) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    drawn = Table(title=escape(title) or None, title_justify="left", box=SIMPLE_HEAD)
    for column in columns:
        drawn.add_column(escape(column), overflow="fold")
    for row in rows:
        drawn.add_row(*[escape(cell) for cell in row])
    Console(file=out).print(drawn)


@contextmanager
def _terminal_progress() -> Iterator[Report]:
    """Draw stages as they end (with their duration) above a bar of the pages."""
    import time

    from rich.console import Console
    from rich.markup import escape
    from rich.progress import (
        BarColumn,
        Progress,
        SpinnerColumn,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    bar = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[pages]}"),
        TransferSpeedColumn(),
        TimeRemainingColumn(compact=True),
        console=Console(stderr=True),
        transient=True,
    )
    task = bar.add_task("", total=None, pages="")
    began: list[tuple[Stage, float]] = []

    def end_stage() -> None:
        if began:
            stage, start = began.pop()
            label = escape(f"{stage.operation}: {stage.name}{_detail(stage.detail)}")
            milliseconds = (time.monotonic() - start) * 1000
            bar.console.print(f"  {label}  [dim]{milliseconds:.0f} ms", highlight=False)

    def report(event: Event) -> None:
        if isinstance(event, Pages):
            done, total = event.done_pages, event.total_pages
            bar.update(
                task,
                completed=done * PAGE_SIZE,
                total=(total or None) and total * PAGE_SIZE,
                pages=f"{done}/{total} pages ({event.zero_pages} empty)",
            )
            return
        if isinstance(event, Round):
            bar.console.print(f"  {escape(round_line(event))}", highlight=False)
            return
        if isinstance(event, Decided):
            bar.console.print(f"  {escape(f'{event.action}: {event.reason}')}", highlight=False)
            return
        if isinstance(event, Followed):
            bar.console.print(f"  {escape(followed_line(event))}", highlight=False)
            return
        end_stage()
        if isinstance(event, Stage):
            began.append((event, time.monotonic()))
            bar.update(task, description=escape(f"{event.operation}: {event.name}"))
        else:
            bar.console.print(f"  {escape(finished_line(event))}", highlight=False)
            bar.reset(task, total=None, pages="", description="")

    with bar:
        yield report
