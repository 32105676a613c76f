"""One host's machine memory and the tables Xen keeps of its frames.

`machine.mem` is a sparse file on tmpfs: the host's RAM, mapped shared by every domain process
and by the toolstack, as libxc maps foreign frames. `frames.tab` holds one array per property of
a frame (owner, type, type count, pin, references). The m2p lives in machine memory itself, as
in Xen, so that guests can read it through their page tables.

    frame 0            never handed out
    frames 1, 2        Xen's L3 and L2 tables that map the m2p into every guest (slot 256)
    frames 512 ..      the m2p, 8 bytes a frame, mapped with 2 MiB pages
    then               frames for domains, handed out shuffled

Frames are handed out in shuffled 2 MiB chunks and shuffled inside each chunk, so that pfn order
never equals mfn order by luck. A freed frame is punched out of the file: the next owner finds
zeros, and a frame nobody touched is known without reading it (`resident`).
"""

from __future__ import annotations

import mmap
import os
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np

from xsave.errors import OutOfFrames, StorageError
from xsave.filelock import exclusive
from xsave.frames import (
    INVALID_M2P_ENTRY,
    PAGE_SHIFT,
    PAGE_SIZE,
    PTE_ACCESSED,
    PTE_PRESENT,
    PTE_PSE,
    PTE_USER,
)
from xsave.guest.xen.residency import mark_touched
from xsave.vectors import behind, row_vectors, write_vectors

DOMID_FREE = 0x7FF4  # DOMID_INVALID
DOMID_XEN = 0x7FF2

CHUNK_FRAMES = 512
M2P_L3_FRAME = 1
M2P_L2_FRAME = 2
M2P_FIRST_FRAME = 512
MIN_FRAMES = 4 * CHUNK_FRAMES
#: Frames of every domain that are Xen's own (domain.py).
XEN_FRAMES = 8
MAX_FRAMES = 1 << 27  # 512 GiB: one L2 of m2p superpages

_HEADER_BYTES = PAGE_SIZE
#: What a new machine writes beside its two big tables, generously.
_SMALL_BYTES = 1 << 20
_COLUMNS = (
    ("owner", np.uint16),
    ("page_type", np.uint8),
    ("pinned", np.uint8),
    ("type_count", np.uint32),
    ("refs", np.uint32),
)


def first_domain_frame(nr_frames: int) -> int:
    """Return the first frame that domains may own on a machine of this size."""
    superpages = -(-nr_frames * 8 // (CHUNK_FRAMES * PAGE_SIZE))
    return M2P_FIRST_FRAME + superpages * CHUNK_FRAMES


def create_files(directory: Path, nr_frames: int, seed: int) -> None:
    """Write `machine.mem` and `frames.tab` of a new machine with nothing in it.

    Raises StorageError."""
    if not MIN_FRAMES <= nr_frames <= MAX_FRAMES:
        raise StorageError(f"machine of {nr_frames} frames: expected {MIN_FRAMES} to {MAX_FRAMES}")
    try:
        for name, size in (
            ("machine.mem", nr_frames * PAGE_SIZE),
            (
                "frames.tab",
                _HEADER_BYTES + nr_frames * sum(np.dtype(t).itemsize for _, t in _COLUMNS),
            ),
        ):
            fd = os.open(directory / name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            os.ftruncate(fd, size)
            os.close(fd)
        status = os.statvfs(directory)
    except OSError as e:
        raise StorageError(f"{directory}: cannot make the machine's memory: {e.strerror}") from e
    # Both are written at once; what does not fit in would end in SIGBUS.
    need = nr_frames * (np.dtype(np.uint16).itemsize + np.dtype(np.uint64).itemsize) + _SMALL_BYTES
    if need > (free := status.f_bavail * status.f_frsize):
        raise StorageError(
            f"{directory}: the tables of a machine of {nr_frames * PAGE_SIZE >> 20} MiB need "
            f"{-(-need >> 20)} MiB and there are {free >> 20} MiB left on this filesystem "
            "(set XSAVE_HOME to a directory on a larger tmpfs, or have a smaller host)"
        )
    _initialise(Machine(directory, "new"), seed)


def _initialise(machine: Machine, seed: int) -> None:
    machine.header[0] = seed
    machine.header[1] = 0
    machine.owner[:] = DOMID_FREE
    first = first_domain_frame(machine.nr_frames)
    machine.owner[:first] = DOMID_XEN
    machine.m2p[:] = INVALID_M2P_ENTRY
    flags = PTE_PRESENT | PTE_USER | PTE_ACCESSED
    machine.mem[M2P_L3_FRAME, 0] = (M2P_L2_FRAME << PAGE_SHIFT) | flags
    superpages = np.arange(M2P_FIRST_FRAME, first, CHUNK_FRAMES, dtype=np.uint64)
    machine.mem[M2P_L2_FRAME, : superpages.size] = (superpages << PAGE_SHIFT) | (flags | PTE_PSE)


class Machine:
    """The mapped memory and frame tables of one host. All arrays are views of shared memory.

    mem: (nr_frames, 512) u64; pages: (nr_frames, 4096) u8, the same bytes; m2p: (nr_frames,) u64;
    owner, page_type, pinned, type_count, refs: (nr_frames,).

    marked, unless None: the frames that have got another owner, pfn or page type; whoever looks at
    such a change from outside does not find it in the frames that were written. What takes and
    frees frames is seen here, the rest is said by who does it (Xen's paging_mark_dirty).
    """

    def __init__(self, directory: Path, name: str) -> None:
        self.directory = directory
        self.name = name
        try:
            fd = os.open(directory / "machine.mem", os.O_RDWR | os.O_CLOEXEC)
            self.map = mmap.mmap(fd, 0)
            os.close(fd)
            tab = os.open(directory / "frames.tab", os.O_RDWR | os.O_CLOEXEC)
            self._tab = mmap.mmap(tab, 0)
            os.close(tab)
        except (OSError, ValueError) as e:
            raise StorageError(f"{directory}: cannot map the machine's memory: {e}") from e
        self.nr_frames = len(self.map) >> PAGE_SHIFT
        self.first_frame = first_domain_frame(self.nr_frames)
        self.mem = np.frombuffer(self.map, np.uint64).reshape(-1, 512)
        self.pages = np.frombuffer(self.map, np.uint8).reshape(-1, PAGE_SIZE)
        self.m2p = self.mem[M2P_FIRST_FRAME : self.first_frame].reshape(-1)[: self.nr_frames]
        self.header = np.frombuffer(self._tab, np.uint64, 512)
        offset = _HEADER_BYTES
        for column, dtype in _COLUMNS:
            setattr(self, column, np.frombuffer(self._tab, dtype, self.nr_frames, offset))
            offset += self.nr_frames * np.dtype(dtype).itemsize

    marked: set[int] | None = None
    owner: np.ndarray
    page_type: np.ndarray
    pinned: np.ndarray
    type_count: np.ndarray
    refs: np.ndarray

    def lock(self) -> AbstractContextManager[None]:
        """Hold the host's allocator lock."""
        return exclusive(self.directory / "lock")

    def free_frames(self) -> int:
        return int(np.count_nonzero(self.owner == DOMID_FREE))

    def allocate(self, domid: int, nr: int, order: int | None = None) -> np.ndarray:
        """Give `nr` free frames to domid; return their mfns, shuffled, (nr,) u64. All are zero.

        order: which ones follows from this number and from what is free, whatever the host's
        seed and its past."""
        with self.lock():
            free = self.owner == DOMID_FREE
            seed = _hash64(_hash64(self.header[:1]) + self.header[1:2])
            if order is not None:
                seed = _hash64(np.array([order & (1 << 64) - 1], np.uint64))
            mfns = _pick_shuffled(free, nr, seed)
            if mfns is None:
                raise OutOfFrames(wanted=nr, free=int(np.count_nonzero(free)), host=self.name)
            self.header[1] += np.uint64(1)
            self.owner[mfns.view(np.int64)] = domid
        self.mark(mfns)
        return mfns

    def mark(self, mfns: np.ndarray) -> None:
        """Note frames (n,) in `marked`."""
        if self.marked is not None:
            self.marked.update(mfns.tolist())

    def write_frames(self, mfns: np.ndarray, pages: np.ndarray, rows: np.ndarray) -> None:
        """Fill frames mfns (n,), none twice, with these rows (n,) of pages (m, 4096) u8.

        Through the file, as that spares frames nobody touched yet being zeroed and mapped first.
        Raises StorageError.
        """
        if not len(mfns):
            return
        order = np.argsort(mfns)
        rows = rows[order]
        vectors = row_vectors(pages, rows)
        sorted_mfns = mfns[order].astype(np.int64)
        cuts = np.flatnonzero(np.diff(sorted_mfns) != 1) + 1
        starts, data = np.concatenate(([0], cuts)), pages.reshape(-1).data
        fd = os.open(self.directory / "machine.mem", os.O_RDWR | os.O_CLOEXEC)
        try:
            for start, end, at, mfn in zip(
                starts.tolist(),
                (*cuts.tolist(), len(vectors)),
                (rows[starts] * PAGE_SIZE).tolist(),
                sorted_mfns[starts].tolist(),
                strict=True,
            ):
                position = mfn << PAGE_SHIFT
                # Of a few pages hardly two lie together: each by itself costs the least then.
                page = data[at : at + PAGE_SIZE]
                if end - start > 1 or os.pwrite(fd, page, position) != PAGE_SIZE:
                    _write_all(fd, vectors[start:end], position)
        except OSError as e:
            raise StorageError(f"{self.directory}: cannot fill frames: {e.strerror}") from e
        finally:
            os.close(fd)

    def free(self, mfns: np.ndarray) -> None:
        """Take frames back: clear their table rows, punch their contents out, mark them free."""
        if not len(mfns):
            return
        runs = self._punch(mfns)
        with self.lock():
            self.m2p[runs] = INVALID_M2P_ENTRY
            for column, _ in _COLUMNS[1:]:
                getattr(self, column)[runs] = 0
            self.owner[runs] = DOMID_FREE
        self.mark(runs)

    def drop(self, mfns: np.ndarray) -> None:
        """Make holes of frames that stay their domain's: they hold nothing any more."""
        if len(mfns):
            self._punch(mfns)

    def _punch(self, mfns: np.ndarray) -> np.ndarray:
        """Make holes of frames, at least one; return them as i64, ascending."""
        runs = np.sort(mfns.astype(np.int64))
        breaks = np.flatnonzero(np.diff(runs) != 1) + 1
        starts = runs[np.concatenate(([0], breaks))]
        ends = runs[np.concatenate((breaks - 1, [runs.size - 1]))] + 1
        for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
            self.map.madvise(mmap.MADV_REMOVE, start << PAGE_SHIFT, (end - start) << PAGE_SHIFT)
        return runs

    def let_go(self, mfns: np.ndarray) -> None:
        """Who read frames of another process's domain may have read some that were free by then,
        and a hole that is read is none any more: make holes again of those that are free."""
        with self.lock():
            free = mfns[self.owner[mfns] == DOMID_FREE]
            if free.size:
                self._punch(free)

    def free_domain(self, domid: int) -> int:
        """Free every frame the domain owns; return how many there were."""
        mfns = np.flatnonzero(self.owner == domid)
        self.free(mfns)
        return int(mfns.size)

    def resident(self, mfns: np.ndarray) -> np.ndarray:
        """Return (n,) bool: False for frames that were never touched, which hold only zeros.

        Nothing is read, and so nothing allocated (see residency.py).
        """
        chunks = np.zeros(-(-self.nr_frames // CHUNK_FRAMES) + 2, bool)
        chunks[mfns // CHUNK_FRAMES + 1] = True
        edges = np.flatnonzero(np.diff(chunks)) * CHUNK_FRAMES
        ends = np.minimum(edges[1::2], self.nr_frames)
        runs = zip(edges[::2].tolist(), (ends - edges[::2]).tolist(), strict=True)
        touched = np.zeros(self.nr_frames, bool)
        path = self.directory / "machine.mem"
        mark_touched(path, self.pages.ctypes.data, runs, touched)
        return touched[mfns]


def _write_all(fd: int, left: np.ndarray, position: int) -> None:
    while len(left):
        written = write_vectors(fd, left, position)
        if written == len(left) * PAGE_SIZE:
            return
        position += written
        left = behind(left, written)


def _pick_shuffled(free: np.ndarray, nr: int, seed: np.ndarray) -> np.ndarray | None:
    """Choose nr of the free frames: chunks in random order, shuffled inside each chunk.

    By a hash, not by numpy.random: that takes longer to load than a guest to be given frames.
    """
    padded = np.zeros(-(-free.size // CHUNK_FRAMES) * CHUNK_FRAMES, bool)
    padded[: free.size] = free
    per_chunk = padded.reshape(-1, CHUNK_FRAMES).view(np.uint8).sum(axis=1, dtype=np.uint32)
    keys = _hash64(np.arange(per_chunk.size, dtype=np.uint64) + seed)
    order = np.argsort(keys)
    running = np.cumsum(per_chunk[order])
    if nr > running[-1]:
        return None
    last = int(np.searchsorted(running, nr))
    order = order[: last + 1]
    frames = (order[:, None] * CHUNK_FRAMES + _shuffled_chunks(keys[order])).reshape(-1)
    if running[last] != frames.size:  # some are not free
        frames = frames[padded[frames]]
    return frames[:nr].view(np.uint64)


def _shuffled_chunks(keys: np.ndarray) -> np.ndarray:
    """Return for each key (n,) u64 a permutation of 0 to 511, (n, 512): rounds that can be undone
    (times an odd number, plus a number, xor with its own upper bits), modulo 512."""
    indices = np.broadcast_to(np.arange(CHUNK_FRAMES, dtype=np.uint16), (keys.size, CHUNK_FRAMES))
    for shift, bits in ((5, 0), (4, 18), (5, 36)):
        factor = (keys >> np.uint64(bits)).astype(np.uint16)[:, None] | np.uint16(1)
        summand = (keys >> np.uint64(bits + 9)).astype(np.uint16)[:, None]
        indices = (indices * factor + summand) & np.uint16(CHUNK_FRAMES - 1)
        indices ^= indices >> np.uint16(shift)
    return indices


def _hash64(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64: every bit of x (u64) changes about half of the result's."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
