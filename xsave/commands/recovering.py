"""migrate --status and --recover: what became of migrations, and one running copy of each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from xsave import console
from xsave.commands.common import Settings
from xsave.errors import GuestStateError, HandoverUndecided, XsaveError

if TYPE_CHECKING:
    from xsave.host.handover.status import Side, Status

_COLUMNS = ["ID", "Name", "Source", "Target", "Meaning"]


def show(settings: Settings, which: str | None, as_json: bool) -> None:
    """Show the migrations of the chosen host: of a name, by id, or all."""
    from xsave.host.handover.ends import far_end
    from xsave.host.handover.status import select, status

    host = settings.open_host()
    found = [status(host, journal, far_end) for journal in select(host, which)]
    if as_json:
        console.emit_json([one.to_json() for one in found])
    else:
        console.table("", _COLUMNS, [row(one) for one in found])


def row(found: Status) -> list[str]:
    """Return a migration's cells, in the order of _COLUMNS."""
    entry, said = found.entry, found.to_json()
    return [entry.transaction, entry.name, cell(found.source), cell(found.target), said["meaning"]]


def cell(side: Side | None) -> str:
    """Return a side as a table's cell."""
    if side is None:
        return "?"
    domain = f", {side.domain}" if side.domain else ""
    return f"{side.host}: {side.state}{domain}" if side.host else str(side.state)


def recover(settings: Settings, which: str | None, as_json: bool) -> None:
    """Recover the migrations of the chosen host that are not finished: of a name, by id, or all.

    Raises the first of what kept it from one, when all have been tried.
    """
    from xsave.host.handover.ends import far_end
    from xsave.host.handover.recovery import recover as bring_about
    from xsave.host.handover.status import select, status

    host = settings.open_host()
    answers: list[dict[str, Any]] = []
    failures: list[XsaveError] = []
    nr_at_work = 0
    for journal in select(host, which):
        before = status(host, journal, far_end)
        named = before.entry.transaction == which
        if before.finished and not named:
            continue
        if which is None and before.in_hand:
            settings.say(f"migration {before.entry.transaction} of {before.entry.name} is at work")
            nr_at_work += 1
            continue
        try:
            outcome = bring_about(host, journal, far_end, named=named)
        except XsaveError as e:
            failures.append(e)
            continue
        after = status(host, journal, far_end).to_json()
        answers.append(after | {"outcome": outcome.what})
        settings.say(outcome.said)
        if outcome.what == "two":
            failures.append(HandoverUndecided(f"{outcome.said}: destroy one of them"))
        elif outcome.what == "lost":
            failures.append(GuestStateError(outcome.said))
    if failures:
        settings.failure["migrations"] = answers
        raise worst(failures)
    if as_json:
        console.emit_json(answers)
    elif not answers and not nr_at_work:
        settings.say("nothing to recover")


def worst(failures: list[XsaveError]) -> XsaveError:
    """Return the failure that is told: an undecided hand-over before all others."""
    undecided = [e for e in failures if isinstance(e, HandoverUndecided)]
    return (undecided or failures)[0]
