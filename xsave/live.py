"""live: the image of a domain that runs on while it is written, round by round.

    begin    static records and the p2m's frames, as a save writes them
    round    what has to be sent now: all, at first; then what was written, what is another frame
             than before, what became or ceased to be a page table, what was deferred; but for
             ordinary pages that were written again meanwhile (skipping.py), which stay due
    finish   the guest is suspended: the rest, with nothing deferred any more; vCPUs; END
             or, with post-copy, only what it takes to start the guest, and the names of the rest

The stream is a live migration's as Xen's tools send it: pages come again, the last one counts, and
the final ones are those of a save (save.py) of the suspended guest. A page table that names a frame
which is not the guest's at that moment is XTAB for now, and due again. Frames and types are read
after the log was cleaned. A table whose frame nobody wrote can still change its type, and then its
bytes mean something else: the log names it then, as Xen's does. Mirrors send_memory_live and
suspend_and_send_dirty of tools/libs/guest/xg_sr_save.c.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from xsave.canonical import canonical_p2m, canonicalise
from xsave.errors import GuestStateError
from xsave.frames import INVALID_P2M_ENTRY, PAGE_SIZE, PageType
from xsave.gathering import Gatherer, Patches
from xsave.guest.xen.domctl import DomainState, Domctl, VcpuState
from xsave.guest.xen.logdirty import LogDirty
from xsave.image import libxc, postcopy
from xsave.image.buffers import Write
from xsave.image.pages import MAX_BATCH
from xsave.p2m import PER_PAGE, GuestP2m
from xsave.progress import Report
from xsave.public import StartInfo, VcpuGuestContext
from xsave.save import Seen, Writer
from xsave.skipping import Skipping
from xsave.view import View

_INVALID = np.uint64(INVALID_P2M_ENTRY)
#: Of so few pages nobody asks which were ever touched: to ask takes longer than to look.
_FEW_PAGES = 4096
#: A round that left out nearly all of it sends so much all the same: how long that takes is the
#: bandwidth.
_LEAST_BYTES = 4 << 20
#: A running guest may be just about to publish another p2m: look again, so often and after so long.
_LOOKS, _LOOK_AGAIN_S = 10, 0.003


#: Of what was asked for ahead: what waits for the answers.
_Last = tuple[Callable[[], DomainState], Callable[[], list[VcpuState]], Callable[[], np.ndarray]]


@dataclass(frozen=True)
class Round:
    """What one round sent. zero_pages are counted in nr_pages; deferred_pages came without data,
    skipped_pages not at all."""

    nr_pages: int
    zero_pages: int
    deferred_pages: int
    nr_bytes: int
    seconds: float
    skipped_pages: int = 0


class AllTouched:
    """The log's pages, none of which is known to be zero."""

    def __init__(self, log: LogDirty) -> None:
        self.pages = log.pages

    def touched(self, mfns: np.ndarray) -> np.ndarray:
        """Return (n,) bool."""
        return np.ones(mfns.size, bool)


class LiveWriter(Writer):
    """Writes one running domain, whose writes `log` knows.

    zeroes: the other end gives out empty frames only, so that empty pages need not be sent.
    postcopy: what is left when the guest is suspended is named, not sent.
    """

    def __init__(
        self,
        domctl: Domctl,
        write: Write,
        report: Report,
        log: LogDirty,
        *,
        zeroes: bool,
        postcopy: bool = False,
    ) -> None:
        super().__init__(domctl, write, report)
        self._log = log
        self._skipping = Skipping(log, domctl.machine.nr_frames)
        self._zeroes = zeroes
        self._view = View(domctl)
        self._pending = self._unsent = np.zeros(0, bool)
        self._sent_p2m = np.zeros(0, np.uint64)
        self._frames = np.empty(0, np.int64)  # of the p2m's pages, as the other end was told
        self._rewritten = np.zeros(0, bool)  # of them: holes came or went since it was sent
        self._postcopy = postcopy
        self._last: _Last | None = None
        #: With post-copy, once finished: the pfns that were left out, and their frames, (n,) i64.
        self.left_out = self.left_out_mfns = np.empty(0, np.int64)

    def begin(self) -> None:
        """Write what precedes the pages; all of them are pending then. What was written since the
        log is on, is likely to be again. Raises GuestStateError."""
        dirty = self._log.clean()
        self._skipping.cleaned(hot=dirty)
        self._write_head(self._see(dirty))
        if self._postcopy:
            self._record(postcopy.PostcopyBegin())

    @property
    def pending_bytes(self) -> int:
        """Bytes of the pages that are due."""
        with_data = self._pending & (self._view.types != PageType.XTAB)
        return int(np.count_nonzero(with_data)) * PAGE_SIZE

    @property
    def growth(self) -> list[tuple[float, float]]:
        """How many bytes were dirty so many seconds after the last look, as far as seen."""
        return self._skipping.growth

    @property
    def nr_tables(self) -> int:
        """How many page tables there are."""
        types = self._view.types
        return int(np.count_nonzero((types != PageType.NOTAB) & (types < PageType.BROKEN)))

    @property
    def nr_p2m_pages(self) -> int:
        """How many pages the p2m has."""
        return self._frames.size

    def look(self) -> None:
        """Add to what is pending all that changed since the last look. Raises GuestStateError."""
        told, dirty = self._frames, self._log.clean()
        self._skipping.cleaned()
        self._tell_frames(told, self._see(dirty))

    def _tell_frames(self, told: np.ndarray, seen: Seen) -> None:
        if self._frames is not told:
            self._record(libxc.X86PvP2mFrames(0, self._p2m.size - 1, seen.found.frames))

    def _see(self, dirty: np.ndarray) -> Seen:
        for _ in range(_LOOKS - 1):
            try:
                return self._see_now(self._domctl.state(), dirty)
            except GuestStateError:
                time.sleep(_LOOK_AGAIN_S)
        return self._see_now(self._domctl.state(), dirty)

    def _see_now(self, state: DomainState, dirty: np.ndarray) -> Seen:
        """Look at what these frames name, and note what is due because of it."""
        page, shared = self._shared_info(state)
        view = self._view
        changes = view.look(shared, dirty)
        self._p2m = view.p2m
        self._grow()
        self._pending[changes.written] = True
        self._note(changes.other)
        found = GuestP2m(
            view.p2m, view.frames.astype(np.uint64), view.list_frames.astype(np.uint64)
        )
        return Seen(state, page, shared, found)

    def _grow(self) -> None:
        """The p2m got longer, or its pages are others."""
        more = self._p2m.size - self._sent_p2m.size
        if more < 0:
            raise GuestStateError("the guest's p2m got shorter while it was migrated")
        if more:
            self._sent_p2m = np.append(self._sent_p2m, np.full(more, _INVALID))
            self._unsent = np.append(self._unsent, np.ones(more, bool))
            self._pending = np.append(self._pending, np.ones(more, bool))
        frames = self._view.frames
        if more or not np.array_equal(frames, self._frames):
            self._pending[self._frames] = True  # what were p2m pages may be others now
            self._frames, self._rewritten = frames, np.ones(frames.size, bool)

    def _note(self, pfns: np.ndarray) -> None:
        """Mark as pending which of these have another frame than was sent."""
        now, sent = self._p2m[pfns], self._sent_p2m[pfns]
        changed = now != sent
        if (left := sent[changed & (sent != _INVALID)]).size:
            self._machine.let_go(left)
        self._pending[pfns[changed]] = True
        # The p2m's own pages are sent as canonical ones: only holes that come and go change them.
        # One page may stand for several ranges.
        holes = (now == _INVALID) != (sent == _INVALID)
        self._rewritten[pfns[holes] // PER_PAGE] = True
        self._pending[self._frames] = False
        self._pending[self._frames[self._rewritten]] = True

    def forget_pending(self) -> None:
        """Take what is pending for sent, as if it were (to sample what is written)."""
        self._sent_p2m = self._p2m.copy()
        self._pending[:] = self._rewritten[:] = False

    def send_round(self) -> Round:
        """Send what is pending; the guest runs."""
        return self._send_pending(Patches.of([self._lists()]), final=False)

    def ask_last(self) -> None:
        """The guest was asked to suspend: what finish() is to know of it then."""
        self._last = self._domctl.ask_state(), self._domctl.ask_vcpus(), self._log.ask_last()

    def finish(self) -> Round:
        """The guest is suspended: send what is left of it. Raises GuestStateError."""
        started = time.monotonic()
        if self._last is None:
            self.ask_last()
        assert self._last is not None
        state, ask_vcpus, clean = self._last
        described, vcpus, told = state(), ask_vcpus(), self._frames
        seen = self._see_now(described, clean())
        self._tell_frames(told, seen)
        contexts = self._contexts(vcpus)
        start_info_pfn = contexts[0].user_regs.rdx
        start_info = self._start_info(start_info_pfn, seen.state).reshape(1, -1)
        known = Patches.of([self._lists(), (np.array([start_info_pfn]), start_info)])
        self._pending[self._view.list_frames] = True
        self._pending[start_info_pfn] = True
        if self._postcopy:
            self._leave_out(seen, contexts, start_info)
        sent = self._send_pending(known, final=True)
        image_bytes = self.image_bytes
        if self._postcopy:
            self._write_left_out()
        self._write_tail(seen, vcpus, contexts)
        nr_bytes = sent.nr_bytes + self.image_bytes - image_bytes
        seconds = time.monotonic() - started
        return Round(sent.nr_pages, sent.zero_pages, 0, nr_bytes, seconds)

    def _lists(self) -> tuple[np.ndarray, np.ndarray]:
        pfns = self._view.list_frames
        return pfns, self._frame_lists(pfns)

    def _leave_out(
        self, seen: Seen, contexts: list[VcpuGuestContext], start_info: np.ndarray
    ) -> None:
        """Of what is pending take out all that the other end does not need to build the domain:
        of ordinary pages all but the p2m's, start_info, the rings that it names and GDTs."""
        left_out = self._pending & (self._view.types == PageType.NOTAB)
        info = StartInfo.from_buffer_copy(start_info.tobytes())
        needed = [contexts[0].user_regs.rdx, info.store_mfn, info.console_mfn]
        for context in contexts:
            needed += context.gdt_frames[: -(-context.gdt_ents // PER_PAGE)]
        for pfns in (seen.found.frames, seen.found.list_frames, np.array(needed, np.uint64)):
            left_out[pfns[pfns < np.uint64(left_out.size)].astype(np.intp)] = False
        self._pending &= ~left_out
        self.left_out = np.flatnonzero(left_out)
        self.left_out_mfns = self._p2m[self.left_out].astype(np.int64)

    def _write_left_out(self) -> None:
        self._record(postcopy.PostcopyPfnsBegin())
        for first in range(0, self.left_out.size, postcopy.MAX_PFNS):
            some = self.left_out[first : first + postcopy.MAX_PFNS]
            self._record(postcopy.PostcopyPfns.of(some))
        self._record(postcopy.PostcopyTransition())

    def _send_pending(self, known: Patches, *, final: bool) -> Round:
        started = time.monotonic()
        before = self.nr_pages, self.zero_pages, self.image_bytes
        pfns = np.flatnonzero(self._pending)
        types = self._view.types.copy()
        skippable = types == PageType.NOTAB
        skippable[self._frames] = skippable[self._view.list_frames] = False
        self._sent_p2m[pfns] = self._p2m[pfns]
        rows = np.flatnonzero(self._pending[self._frames])
        p2m_pages = (self._frames[rows], canonical_p2m(self._p2m, rows=rows))
        known = Patches.of((p2m_pages, (known.pfns, known.pages)))
        self._rewritten[rows] = False
        self._pending = np.zeros(types.size, bool)
        deferred = skipped = 0

        def patches(some: np.ndarray) -> Patches:
            nonlocal deferred
            tables, pages = (
                self._canonical_tables(some, types) if final else self._resolving(some, types)
            )
            deferred += int(np.count_nonzero(self._pending[some]))
            inside = known.among(some)
            return Patches.of(((inside.pfns, inside.pages), (tables, pages)))

        def skip(some: np.ndarray) -> np.ndarray:
            nonlocal skipped
            again = skippable[some]
            again[again] = self._skipping.among(self._p2m[some[again]])
            self._pending[some[again]] = True
            skipped += int(np.count_nonzero(again))
            return again

        def send(pfns: np.ndarray, skip: Callable[[np.ndarray], np.ndarray] | None) -> None:
            self._send(
                Gatherer(
                    self._domctl, self._p2m, types, patches, pfns=pfns,
                    frames=self._log if pfns.size > _FEW_PAGES else AllTouched(self._log),
                    unsent=self._unsent if self._zeroes else None, skip=skip,
                ),
                few=pfns.size <= MAX_BATCH,
            )  # fmt: skip

        send(pfns, None if final or pfns.size <= MAX_BATCH else skip)
        if skipped and self.image_bytes < before[-1] + _LEAST_BYTES:
            more = np.flatnonzero(self._pending & skippable)[: _LEAST_BYTES // PAGE_SIZE]
            self._pending[more] = False
            skipped -= more.size
            send(more, None)
        nr_pages, zero_pages, image_bytes = before
        return Round(
            self.nr_pages - nr_pages, self.zero_pages - zero_pages, deferred,
            self.image_bytes - image_bytes, time.monotonic() - started, skipped,
        )  # fmt: skip

    def _table_pages(self, pfns: np.ndarray) -> np.ndarray:
        return np.asarray(self._log.pages[self._p2m[pfns]])

    def _resolving(self, pfns: np.ndarray, types: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (pfns, pages) of those page tables among these pfns all of whose frames are the
        guest's; the others become XTAB, and are due again."""
        levels = np.where(types[pfns] < PageType.BROKEN, types[pfns] & 7, 0)
        tables = pfns[levels != 0]
        result = canonicalise(
            self._table_pages(tables), levels[levels != 0], self._machine.m2p, self._p2m
        )
        late = tables[result.deferred]
        types[late] = PageType.XTAB
        self._pending[late] = True
        good = ~result.deferred
        return tables[good], result.tables[good]
