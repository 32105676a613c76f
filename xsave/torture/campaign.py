"""The matrix: all sweeps of all cells, so many workers at a time, one journal.

Every point's result is a function of the kernel, the cell, the seed and the point alone; workers
share nothing, so how many there are changes the time only. A worker that is killed, or an
interrupt, ends all of them; what was found is in the journal.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from xsave.errors import GuestStateError
from xsave.torture import forks
from xsave.torture.journal import Journal
from xsave.torture.settings import Cell, Settings, Sweep
from xsave.torture.worker import work

#: A sweep with fewer points is not worth a second laboratory.
_POINTS_PER_PART = 400
_CHUNK = 1 << 16


@dataclass
class Job:
    """A part of a sweep: (which, of how many) of it, its points at most, those that are done."""

    sweep: Sweep
    limit: int
    part: tuple[int, int]
    done: set[int] = field(default_factory=set)


@dataclass
class _Worker:
    pid: int
    out: int
    rest: bytes = b""


def run(
    cells: Sequence[Cell],
    settings: Settings,
    journal: Journal,
    report: Callable[[int, str], None] = lambda done, where: None,
) -> None:
    """Try all points of these cells that are not in the journal yet.

    report(done, where) is called for each point. Raises GuestStateError.
    """
    _Campaign(settings, journal, report).run(jobs_of(cells, settings, journal))


def jobs_of(cells: Sequence[Cell], settings: Settings, journal: Journal) -> list[Job]:
    """What is still to do."""
    jobs = []
    for cell in cells:
        sweeps = cell.sweeps(quick=settings.quick)
        for sweep in sweeps:
            limit = max(settings.max_points // len(sweeps), 1) if settings.max_points else 0
            whole = settings.every or not limit or limit > _POINTS_PER_PART
            parts = settings.jobs if whole else 1
            done, facts = journal.done(sweep.name), journal.sweeps.get(sweep.name)
            if facts is None or len(done) < facts["planned"]:
                jobs += [Job(sweep, limit, (part, parts), done) for part in range(parts)]
    return jobs


class _Campaign:
    def __init__(
        self, settings: Settings, journal: Journal, report: Callable[[int, str], None]
    ) -> None:
        self._settings, self._journal, self._report = settings, journal, report
        self._selector = selectors.DefaultSelector()
        self._workers: list[_Worker] = []
        self._nr_tried = 0

    def run(self, jobs: list[Job]) -> None:
        waiting = list(jobs)
        try:
            while waiting or self._workers:
                while waiting and len(self._workers) < self._settings.jobs:
                    self._start(waiting.pop(0))
                for key, _ in self._selector.select():
                    self._listen(key.data)
        finally:
            self._end()

    def _start(self, job: Job) -> None:
        out, into = os.pipe()

        def lines() -> None:
            os.close(out)
            with os.fdopen(into, "wb") as stream:

                def emit(record: dict[str, object]) -> None:
                    stream.write(json.dumps(record).encode() + b"\n")
                    stream.flush()

                try:
                    work(job.sweep, self._settings, job.limit, job.part, job.done, emit)
                except Exception as e:  # noqa: BLE001 - told by the one who listens
                    emit({"error": f"{job.sweep.name}: {type(e).__name__}: {e}"})

        pid, answer = forks.start(lines)
        os.close(answer)
        os.close(into)
        worker = _Worker(pid, out)
        self._workers.append(worker)
        self._selector.register(out, selectors.EVENT_READ, worker)

    def _listen(self, worker: _Worker) -> None:
        data = os.read(worker.out, _CHUNK)
        *lines, worker.rest = (worker.rest + data).split(b"\n")
        for line in lines:
            record = json.loads(line)
            if "error" in record:
                raise GuestStateError(record["error"])
            self._journal.add(record)
            if "at" in record:
                self._nr_tried += 1
                self._report(self._nr_tried, record["at"])
        if not data:
            self._forget(worker)
            _, status = os.waitpid(worker.pid, 0)
            if status:
                raise GuestStateError(f"a worker of the torture was killed (status {status:#x})")

    def _forget(self, worker: _Worker) -> None:
        self._selector.unregister(worker.out)
        os.close(worker.out)
        self._workers.remove(worker)

    def _end(self) -> None:
        """End all workers; their children end with them."""
        for worker in list(self._workers):
            self._forget(worker)
            with suppress(ProcessLookupError):
                os.kill(worker.pid, signal.SIGKILL)
            os.waitpid(worker.pid, 0)
        self._selector.close()
