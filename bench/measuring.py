"""Measure commands side by side: wall and CPU time of whole processes, medians, ratios.

A case is a shell command (so that a peer can be `cp ... && sync FILE`) with a step before it that
is not timed. All cases of a round run in a shuffled order, so that a slow minute of the machine
meets all of them; the ratio of two cases is the median of their ratios round by round.
"""

from __future__ import annotations

import os
import random
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field


@dataclass(frozen=True)
class Sample:
    """One run. CPU is user and system time of the process and the children it waited for."""

    wall_s: float
    cpu_s: float
    max_rss_kib: int


@dataclass
class Case:
    """A command, and what is known of it: `before` runs untimed, `output` is the file it writes."""

    name: str
    command: Sequence[str]
    output: str | None = None
    before: Callable[[], None] = lambda: None
    after: Callable[[], None] = lambda: None
    samples: list[Sample] = field(default_factory=list)
    output_bytes: int = 0
    allocated_bytes: int = 0

    def run(self) -> None:
        """Run once and keep the sample."""
        if self.output is not None and os.path.exists(self.output):  # noqa: PTH110
            os.unlink(self.output)  # noqa: PTH108 - freeing an old file is no part of writing one
        self.before()
        self.samples.append(timed(self.command))
        if self.output is not None:
            status = os.stat(self.output)  # noqa: PTH116
            self.output_bytes, self.allocated_bytes = status.st_size, status.st_blocks * 512
        self.after()

    def median(self, column: str) -> float:
        """Return the median of `wall_s` or `cpu_s`."""
        return statistics.median(getattr(sample, column) for sample in self.samples)

    def best_s(self) -> float:
        """Return the shortest wall time."""
        return min(sample.wall_s for sample in self.samples)

    def as_json(self) -> dict[str, object]:
        """Return everything measured."""
        return {
            "name": self.name,
            "command": list(self.command),
            "samples": [asdict(sample) for sample in self.samples],
            "median_wall_s": self.median("wall_s"),
            "median_cpu_s": self.median("cpu_s"),
            "output_bytes": self.output_bytes,
            "allocated_bytes": self.allocated_bytes,
        }


def timed(command: Sequence[str]) -> Sample:
    """Run a command to its end; RuntimeError with its stderr if it fails."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    said = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    wall_s = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)}: exit {process.returncode}: {said.decode()}")
    return Sample(wall_s, usage.ru_utime + usage.ru_stime, usage.ru_maxrss)


def run_rounds(groups: Sequence[Sequence[Case]], rounds: int, say: Callable[[str], None]) -> None:
    """Run every case `rounds` times. The cases of one group stay in their order."""
    for number in range(rounds):
        order = list(groups)
        random.Random(number).shuffle(order)
        for case in (case for group in order for case in group):
            case.run()
        say(f"round {number + 1} of {rounds} done")


def ratio(case: Case, peer: Case, column: str = "wall_s") -> float:
    """Return the median over the rounds of case / peer."""
    pairs = zip(case.samples, peer.samples, strict=True)
    return statistics.median(getattr(a, column) / getattr(b, column) for a, b in pairs)
