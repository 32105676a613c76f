"""The disks of one running domain: their files, a thread each, and their devices in the guest.

Requests are done by the disk's thread; what is done is handed back in the vCPU thread (serve),
which alone touches the guest. In virtual time everything is done at once, so that real time does
not matter. While a migration is undecided the files are closed, so that the other end can have
them; a device itself stays as it is, for the guest that may go on with it.
"""

from __future__ import annotations

import errno
import queue
import threading
from collections import deque
from collections.abc import Callable, Sequence

from xsave.errors import StorageError
from xsave.guest.xen.blkback.device import BlockDevice
from xsave.guest.xen.blkback.requests import Job
from xsave.guest.xen.domain import Domain
from xsave.host.disk.image import Image, check, open_image
from xsave.host.disk.spec import DiskSpec

Have = Callable[[Sequence[memoryview]], bool]


class Worker:
    """A thread that does a disk's work in order. wake() is called, in it, after each piece."""

    def __init__(self, name: str, wake: Callable[[], None]) -> None:
        self._wake = wake
        self._queue: queue.SimpleQueue[tuple[Callable[[], None], Callable[[], None]] | None]
        self._queue = queue.SimpleQueue()
        self._done: deque[Callable[[], None]] = deque()
        self._thread = threading.Thread(target=self._serve, name=name, daemon=True)
        self._thread.start()

    def submit(self, work: Callable[[], None], then: Callable[[], None]) -> None:
        """Have work() done by the thread, and then() called by serve()."""
        self._queue.put((work, then))

    def _serve(self) -> None:
        while (item := self._queue.get()) is not None:
            work, then = item
            work()
            self._done.append(then)
            self._wake()

    def has_done(self) -> bool:
        return bool(self._done)

    def serve(self) -> None:
        """Call what is to follow on work that is done."""
        while self._done:
            self._done.popleft()()

    def stop(self) -> None:
        """Let it do what it has been given, and end."""
        self._queue.put(None)
        self._thread.join()


class AttachedDisk:
    """One disk: its file, open or not, and what does its work."""

    def __init__(self, spec: DiskSpec, wake: Callable[[], None], have: Have) -> None:
        self.spec = spec
        self._wake = wake
        self._have = have
        self._image: Image | None = None
        self.worker: Worker | None = None
        self.device: BlockDevice | None = None
        self._flushed = False
        self._flushing = False
        self._error: OSError | None = None

    @property
    def image(self) -> Image:
        assert self._image is not None  # the guest does not run without
        return self._image

    def open(self) -> None:
        """Raises StorageError."""
        if self._image is None:
            self._image = open_image(self.spec)

    def close(self) -> None:
        """Finish what is in flight, and close the file. Raises StorageError; it is closed then."""
        if self.worker is not None:
            self.worker.stop()
            self.worker.serve()
            self.worker = None
        image, self._image = self._image, None
        try:
            if image is not None:
                image.close()
        except OSError as e:
            raise self._trouble(e) from e

    def _trouble(self, e: OSError) -> StorageError:
        return StorageError(f"disk {self.spec.path}: {e.strerror}", path=self.spec.path)

    def plug(self, domain: Domain, forget_code: Callable[[], None]) -> None:
        """Give a fresh domain the device."""
        submit = self._at_once if domain.clock.virtual else self._by_worker
        self.device = BlockDevice(domain, self.spec.vbd(), _Behind(self), submit, forget_code)
        self.device.plug()

    def unplug(self) -> None:
        """The domain goes, its frames with it: nothing may be in flight."""
        if self.worker is not None:
            self.worker.stop()
            self.worker = None
        self.device = None

    def _at_once(self, job: Job) -> None:
        self._run(job, self.image)
        self._complete(job)

    def _by_worker(self, job: Job) -> None:
        if self.worker is None:
            self.worker = Worker(f"disk {self.spec.vdev}", self._wake)
        image = self.image
        self.worker.submit(lambda: self._run(job, image), lambda: self._complete(job))

    def _run(self, job: Job, image: Image) -> None:
        """The guest's memory goes to the kernel by its address."""
        if self._have(job.buffers):
            job.run(image)
        else:
            job.failed = True

    def _complete(self, job: Job) -> None:
        self._flushed = False
        if self.device is not None:
            self.device.complete(job)

    def settled(self) -> bool:
        """True if nothing is in flight and all is on the disk; else that is on its way.

        Raises StorageError."""
        if self._error is not None:
            error, self._error = self._error, None
            raise self._trouble(error)
        if self._flushed or self._image is None or self.image.readonly:
            return self.device is None or not self.device.nr_in_flight
        if self._flushing or (self.device is not None and self.device.nr_in_flight):
            return False
        if self.worker is None:  # nothing was ever asked of it, or everything was done at once
            self._flush()
            self._flush_done()
            return self.settled()
        self._flushing = True
        self.worker.submit(self._flush, self._flush_done)
        return False

    def _flush(self) -> None:
        try:
            self.image.flush()
        except Exception as e:  # noqa: BLE001 - who waits for it must hear
            self._error = e if isinstance(e, OSError) else OSError(errno.EIO, str(e))

    def _flush_done(self) -> None:
        self._flushing = False
        self._flushed = self._error is None


class _Behind:
    """The disk a device talks of: it may be closed for a while, its size and mode stay."""

    def __init__(self, attached: AttachedDisk) -> None:
        self._attached = attached
        self.readonly = attached.spec.readonly

    @property
    def nr_sectors(self) -> int:
        return self._attached.image.nr_sectors

    def read(self, offset: int, buffers: list[memoryview]) -> None:
        self._attached.image.read(offset, buffers)

    def write(self, offset: int, buffers: list[memoryview]) -> None:
        self._attached.image.write(offset, buffers)

    def flush(self) -> None:
        self._attached.image.flush()


class Disks:
    """All of a domain's."""

    def __init__(
        self, specs: Sequence[DiskSpec], wake: Callable[[], None], have: Have = lambda buffers: True
    ) -> None:
        """have(buffers), in any thread: wait until these pieces of the guest's memory are there,
        False if they never will be."""
        self._attached = [AttachedDisk(spec, wake, have) for spec in specs]

    def check(self) -> None:
        """See whether the files are there and can be used, though they may be in use still.

        Raises StorageError."""
        for attached in self._attached:
            check(attached.spec)

    def open(self) -> None:
        """Have the files, all or none. Raises StorageError."""
        try:
            for attached in self._attached:
                attached.open()
        except BaseException:
            self.close_quietly()
            raise

    def close(self) -> None:
        """Give up the files. Raises StorageError of the first that could not be finished."""
        errors = []
        for attached in self._attached:
            try:
                attached.close()
            except StorageError as e:
                errors.append(e)
        if errors:
            raise errors[0]

    def close_quietly(self) -> None:
        """close(), when nobody is there to be told."""
        try:
            self.close()
        except StorageError:
            return

    def plug(self, domain: Domain, forget_code: Callable[[], None]) -> None:
        """Give a domain its devices."""
        for attached in self._attached:
            attached.plug(domain, forget_code)

    def unplug(self) -> None:
        """A domain goes: nothing touches its frames when this returns."""
        for attached in self._attached:
            attached.unplug()

    def serve(self) -> None:
        """Hand back to the guest what is done. In the vCPU thread."""
        for attached in self._attached:
            if attached.worker is not None:
                attached.worker.serve()

    def has_done(self) -> bool:
        """True if serve() would find anything; for any thread."""
        return any(a.worker is not None and a.worker.has_done() for a in self._attached)

    def settled(self) -> bool:
        """True if nothing is in flight and all is on the disks. Raises StorageError."""
        each = [attached.settled() for attached in self._attached]  # all are set going
        return all(each)
