"""One cell of the matrix, its sweeps, and what a whole run is made with. Names are contracts: a
journal and --at use them.

A cell is a kernel's configuration. A sweep is a window on one of its vCPUs while the other ones
are in a place of their own: with two vCPUs, the second one's window while the first is idle and
takes the suspend; and the first one's window with the second held at the entry of each of the
page-table paths in turn.
"""

from __future__ import annotations

from dataclasses import dataclass

from xsave.errors import UsageError

PREEMPT = ("full", "voluntary", "none")
ON_OFF = ("off", "on")
#: Where the other vCPU stands, in the middle of each of the paths.
PLACES = ("set_entry", "flush_mmu_updates", "flush_calls", "pin_op", "mm_unpin", "load_cr3")
THREADS = 2
FREEZE_TIMEOUT_S = 2
#: Of a cell.
DEFAULT_POINTS, QUICK_POINTS = 1000, 6


@dataclass(frozen=True)
class Settings:
    """What all cells have in common.

    max_points: how many of a cell's points are tried (0: no limit); every: each so manieth, and
    the first of each instruction, instead; quick: a few at which a register holds a frame number,
    and no second sweep. trace: count the window a second way.
    """

    kernel: str
    seed: int = 1
    max_points: int = DEFAULT_POINTS
    every: int = 0
    jobs: int = 1
    threads: int = THREADS
    trace: bool = False
    quick: bool = False


@dataclass(frozen=True, order=True)
class Cell:
    """A kernel's configuration, named like `full-off-on-1`."""

    preempt: str
    freezer: bool
    stop_machine: bool
    vcpus: int

    @property
    def name(self) -> str:
        return f"{self.preempt}-{_on(self.freezer)}-{_on(self.stop_machine)}-{self.vcpus}"

    @classmethod
    def parse(cls, name: str) -> Cell:
        """Raises UsageError."""
        parts = name.split("-")
        if (
            len(parts) != 4
            or parts[0] not in PREEMPT
            or not {parts[1], parts[2]} <= set(ON_OFF)
            or not parts[3].isdigit()
        ):
            raise UsageError(f"{name!r} is no cell: expected one like full-off-on-1")
        return cls(parts[0], parts[1] == "on", parts[2] == "on", int(parts[3]))

    def threads(self, settings: Settings) -> int:
        """How many threads make address spaces: at least one on each vCPU."""
        return max(settings.threads, self.vcpus)

    def command_line(self, settings: Settings) -> str:
        """What the guest's kernel is told."""
        return (
            f"preempt={self.preempt} freezer={_on(self.freezer)} "
            f"stop_machine={_on(self.stop_machine)} threads={self.threads(settings)} touch=64K "
            f"seed={settings.seed} freeze_timeout={FREEZE_TIMEOUT_S}"
        )

    def sweeps(self, *, quick: bool = False) -> list[Sweep]:
        """All its windows; the most telling one."""
        if self.vcpus > 1 and quick:
            return [Sweep(self, 1)]
        if self.vcpus == 1:
            return [Sweep(self, 0)]
        return [Sweep(self, 1)] + [Sweep(self, 0, place) for place in PLACES]


@dataclass(frozen=True)
class Sweep:
    """One window of a cell: whose, and in which function vCPU 1 is held ("": it is not).

    Named like `full-off-on-2/v0@pin_op`.
    """

    cell: Cell
    vcpu: int
    held_in: str = ""

    @property
    def name(self) -> str:
        held = f"@{self.held_in}" if self.held_in else ""
        return f"{self.cell.name}/v{self.vcpu}{held}"


def parse_point(text: str) -> tuple[Sweep, int]:
    """Return the sweep and the number of a point like `full-off-on-1/v0/1234`. UsageError."""
    cell_name, _, rest = text.partition("/")
    sweep_name, _, index = rest.partition("/")
    if index.isdigit():
        for sweep in Cell.parse(cell_name).sweeps():
            if sweep.name == f"{cell_name}/{sweep_name}":
                return sweep, int(index)
    raise UsageError(f"{text!r} is no point: expected one like full-off-on-1/v0/1234")


def claimed_clean(cell: Cell) -> bool:
    """What the original series says of a cell, for a suspend that comes at any moment.

    Frozen threads hold nothing. Without the freezer, and with preemption, a suspend preempts one
    in the middle of an update. Without either, a thread is never left there on its own vCPU, and
    on the others stop_machine waits until they are at a place that is safe.
    """
    if cell.freezer:
        return True
    return cell.preempt != "full" and (cell.stop_machine or cell.vcpus == 1)


def _on(flag: bool) -> str:
    return ON_OFF[flag]
