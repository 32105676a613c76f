"""Goes through the rows of an end, as table.py has them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Protocol

from xsave.host.handover.table import Act, Message, Row, Step


class Player(Protocol):
    """Does what rows say. Whatever it raises, a Ctrl-C too, means that nobody knows whether it was
    done."""

    def send(self, message: Message) -> None: ...

    def receive(self, among: Collection[Message]) -> Message: ...

    def do(self, step: Step) -> None: ...


def play(rows: Sequence[Row], at: str, player: Player) -> tuple[str, BaseException | None]:
    """Go from a place to an end; return that, and the first thing that went wrong."""
    wrong: BaseException | None = None
    while here := [row for row in rows if row.at == at]:
        try:
            at = _act(here, player)
        except BaseException as e:  # noqa: BLE001 - whoever plays raises it again
            wrong = wrong or e
            at = here[0].lost
    return at, wrong


def _act(here: Sequence[Row], player: Player) -> str:
    row = here[0]
    if row.act == Act.RECEIVE:
        message = player.receive([Message(row.what) for row in here])
        for row in here:
            if row.what == message:
                return row.then
        raise AssertionError(f"{message} at {row.at}")
    if isinstance(row.what, Step):
        player.do(row.what)
    else:
        player.send(row.what)
    return row.then
