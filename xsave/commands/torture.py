"""torture: stop the guest at every instruction that updates a page table, and suspend it there."""

from __future__ import annotations

import os
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from xsave import console
from xsave.commands.common import Settings, json_option, pass_settings
from xsave.errors import GuestStateError

if TYPE_CHECKING:
    from xsave.torture.replay import Replay
    from xsave.torture.settings import Cell
    from xsave.torture.settings import Settings as Plan

_PREEMPT = ("full", "voluntary", "none")
_ON_OFF = ("on", "off")
_PROGRESS_EVERY = 100
#: What --random tries unless told otherwise: the busiest guest, with all that protects it.
_RANDOM_CELL = {"preempt": ("full",), "freezer": ("on",), "stop_machine": ("on",), "vcpus": (4,)}


@click.command()
@click.option("--quick", is_flag=True, help="A few points of each cell, in less than a minute.")
@click.option("--preempt", multiple=True, type=click.Choice(_PREEMPT), help="Only these rows.")
@click.option("--freezer", multiple=True, type=click.Choice(_ON_OFF), help="Only these rows.")
@click.option("--stop-machine", multiple=True, type=click.Choice(_ON_OFF), help="Only these rows.")
@click.option(
    "--vcpus", multiple=True, type=click.IntRange(1, 8), metavar="N", help="Only these rows."
)
@click.option("--max-points", type=click.IntRange(0), metavar="N", help="Of each cell; 0: all.")
@click.option("--every", type=click.IntRange(1), metavar="N", help="Each Nth point; 1: all.")
@click.option(
    "--seed",
    type=click.IntRange(0),
    default=1,
    show_default=True,
    metavar="N",
    help="What all is drawn from.",
)
@click.option("--jobs", type=click.IntRange(1), metavar="N", help="Processes; default: one a core.")
@click.option(
    "--journal", type=click.Path(dir_okay=False, path_type=Path), help="Record, and resume, here."
)
@click.option("--trace", is_flag=True, help="Count the points of each window a second way.")
@click.option("--at", metavar="POINT", help="Replay one point, like full-off-on-1/v0/1234.")
@click.option("--random", type=click.IntRange(1), metavar="N", help="N suspends at random points.")
@click.option(
    "--kernel",
    type=click.Path(exists=True, dir_okay=False),
    metavar="ELF",
    help="A build with symbols.",
)
@json_option
@pass_settings
def torture(settings: Settings, /, as_json: bool, **options: Any) -> None:
    """Prove that no frame number survives a suspend, at every instruction that handles one."""
    plan = _plan(options)
    if options["at"]:
        _replay(options["at"], plan, as_json)
    elif options["random"]:
        _random(options, plan, as_json)
    else:
        _matrix(settings, options, plan, as_json)


def _plan(options: dict[str, Any]) -> Plan:
    from xsave.host.create import BUILTIN_KERNEL
    from xsave.torture import settings as torture_settings

    quick = options["quick"]
    points = torture_settings.QUICK_POINTS if quick else torture_settings.DEFAULT_POINTS
    if options["max_points"] is not None:
        points = options["max_points"]
    return torture_settings.Settings(
        kernel=options["kernel"] or str(BUILTIN_KERNEL),
        seed=options["seed"],
        max_points=points,
        every=options["every"] or 0,
        jobs=options["jobs"] or len(os.sched_getaffinity(0)),
        trace=options["trace"],
        quick=quick,
    )


def cells_of(options: dict[str, Any]) -> list[Cell]:
    """Return the cells that were asked for, all in the order of the table."""
    from xsave.torture.settings import Cell

    return [
        Cell(preempt, freezer == "on", stop_machine == "on", vcpus)
        for vcpus in options["vcpus"] or (1, 2)
        for preempt in _PREEMPT
        if preempt in (options["preempt"] or _PREEMPT)
        for freezer in ("off", "on")
        if freezer in (options["freezer"] or _ON_OFF)
        for stop_machine in ("off", "on")
        if stop_machine in (options["stop_machine"] or _ON_OFF)
    ]


def _matrix(settings: Settings, options: dict[str, Any], plan: Plan, as_json: bool) -> None:
    from xsave.torture import campaign, table
    from xsave.torture.journal import Journal

    def report(done: int, where: str) -> None:
        if done % _PROGRESS_EVERY == 0:
            settings.say(f"{done} points, now at {where}")

    cells = cells_of(options)
    with closing(Journal(plan, options["journal"])) as journal:
        campaign.run(cells, plan, journal, report)
        found = table.summarise(cells, journal)
    if as_json:
        console.emit_json(found)
    else:
        console.table("", table.COLUMNS, table.rows(found))
    other = [cell["cell"] for cell in found if not cell["as_claimed"]]
    if other:
        raise GuestStateError(f"not as the freezer's series claims: {', '.join(other)}")


def _replay(at: str, plan: Plan, as_json: bool) -> None:
    from xsave.torture.replay import replay
    from xsave.torture.settings import parse_point

    sweep, index = parse_point(at)
    found = replay(sweep, index, plan)
    if as_json:
        console.emit_json({"at": at, **asdict(found)})
    else:
        _show(at, found)


def _show(at: str, found: Replay) -> None:
    """Print a replayed point: the code, what was stale, and the end."""
    console.text(f"{at}: suspend asked for at {found.name}")
    for line in found.code:
        mark = "->" if line.here else "  "
        console.text(f"{mark} {line.address:016x}  {line.name:32}  {line.text}")
    outcome = found.outcome
    values = {stale.value for stale in outcome.stale}
    for name, value in found.held.items():
        mark = "**" if value in values else "  "
        console.text(f"{mark} a frame number in {name} = {value:#x}")
    for stale in outcome.stale:
        console.text(f"stale in {stale.kind}: {stale.where} = {stale.value:#x}")
    if not outcome.stale:
        console.text("nothing stale in the image")
    detail = f": {outcome.detail}" if outcome.detail else ""
    console.text(f"the guest: {outcome.fate}{detail}")


def _random(options: dict[str, Any], plan: Plan, as_json: bool) -> None:
    from xsave.torture import random

    chosen = {key: options[key] or value for key, value in _RANDOM_CELL.items()}
    found = [random.suspends(cell, plan, options["random"]) for cell in cells_of(chosen)]
    if as_json:
        console.emit_json(found)
    else:
        columns = ("preempt", "freezer", "stop_machine", "vcpus", "points", "stale")
        rows = [[str(cell[key]) for key in (*columns, "guest_failed")] for cell in found]
        console.table("", (*columns, "guest failed"), rows)
    if any(cell["stale"] or cell["guest_failed"] for cell in found):
        raise GuestStateError("a suspend at a random moment was not clean")
