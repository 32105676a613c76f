"""One point again: the code around it, what was stale and where, and the guest's fate."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import capstone

from xsave.errors import UsageError
from xsave.torture import forks
from xsave.torture.inmemory import make_directory
from xsave.torture.laboratory import Laboratory
from xsave.torture.point import Outcome, attempt
from xsave.torture.settings import Settings, Sweep
from xsave.torture.window import Point
from xsave.torture.worker import points_of

_BEFORE, _AFTER = 8, 6
_MOST_CODE_BYTES = 4096
_CALLS = {"call", "jmp"}


@dataclass(frozen=True)
class Line:
    """One instruction: `here` is the boundary, in front of it."""

    address: int
    name: str
    text: str
    here: bool


@dataclass(frozen=True)
class Replay:
    """What --at shows."""

    point: Point
    name: str
    code: list[Line]
    held: dict[str, int]  # the registers with a frame number in them
    outcome: Outcome


def replay(sweep: Sweep, index: int, settings: Settings) -> Replay:
    """Try one point of a sweep. Raises UsageError if its window has no such point."""
    with make_directory() as directory:
        lab = Laboratory(sweep.cell, settings, Path(directory))
        lab.prepare(sweep)
        for point in points_of(lab, sweep, {index}):
            held = lab.held()
            code = list(disassemble(lab, point.rip))
            outcome = forks.in_child(lambda: attempt(lab, {}))
            return Replay(point, lab.symbols.name(point.rip), code, held, outcome)
    raise UsageError(f"the window of {sweep.name} has no point {index}")


def disassemble(lab: Laboratory, rip: int) -> Iterator[Line]:
    """Yield the instructions around rip. From the start of its function, so that they are right."""
    symbols = lab.symbols
    start = rip - symbols.function(rip)[1]
    data = lab.door.xen.read(start, min(rip - start + 16 * _AFTER, _MOST_CODE_BYTES))
    engine = capstone.Cs(capstone.CS_ARCH_X86, capstone.CS_MODE_64)
    found = list(engine.disasm(data, start))
    at = next((i for i, one in enumerate(found) if one.address == rip), 0)
    for one in found[max(at - _BEFORE, 0) : at + _AFTER]:
        operands = one.op_str
        if one.mnemonic in _CALLS and operands.startswith("0x"):
            operands = symbols.name(int(operands, 16)).removesuffix("+0x0")
        text = f"{one.mnemonic} {operands}".strip()
        yield Line(one.address, symbols.name(one.address), text, one.address == rip)
