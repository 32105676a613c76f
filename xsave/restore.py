"""restore: an image becomes a domain on fresh frames, or nothing at all.

    read -> order check -> populate fresh mfns -> place pages -> localise tables -> p2m,
    start_info, shared_info -> pin -> vCPUs -> commit -> unpause

The stream decides everything, so nothing in it is believed: sizes are bounded by the machine,
every pfn by the p2m, every table entry by the types. Whatever fails before the commit leaves no
domain and no frame. Mirrors tools/libs/guest/xg_sr_restore.c and xg_sr_restore_x86_pv.c; unlike
libxc, page tables are localised at the end, when the last type of every pfn is known.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Protocol

import numpy as np

from xsave.domconfig import read_config, renamed, with_disk_files
from xsave.errors import HostCannotTake, ImageError, UsageError
from xsave.guest.xen.cpuid import missing_features
from xsave.guest.xen.domctl import DomainInfo, DomainState, Domctl
from xsave.image import libxc, postcopy, xl
from xsave.image.pageindex import PageIndex
from xsave.image.pages import PageBatch
from xsave.image.stream import GO_MESSAGE, Item, StreamDecoder
from xsave.lazy import Lazy, LazyMemory
from xsave.p2m import largest
from xsave.parts import Parts
from xsave.placing import Memory
from xsave.postponed import Postponed, PostponedMemory
from xsave.progress import Finished, Pages, Report, Stage, ignore
from xsave.settling import Settler

_AVX_STATE = 1 << 2
_TAIL_LIMIT = 4096
_PFNS_PER_P2M_PAGE = 512
#: A sender that is silent for so long is at the end of a round, or its guest suspends.
_PAUSE_S = 0.002

MakeDomain = Callable[[str, int], Domctl]


class Source(Protocol):
    """What restore reads from (xsave.host.source.Source)."""

    position: int

    def read(self, n: int) -> memoryview: ...
    def ready(self, wait_s: float = 0.0) -> bool: ...
    def zero_pages(self, offset: int, nr_pages: int) -> np.ndarray | None: ...


def restore(
    source: Source,
    make_domain: MakeDomain,
    *,
    name: str | None = None,
    paused: bool = False,
    cpu_mismatch: str = "refuse",
    disk_files: Mapping[str, str] | None = None,
    nr_frames: int,
    suffix: str = "",
    until_end: bool = True,
    lazy: Lazy | None = None,
    postponed: Postponed | None = None,
    start: Callable[[Domctl], DomainInfo] | None = None,
    report: Report = ignore,
) -> DomainInfo:
    """Make a domain from the image and start it (unless paused).

    make_domain(name, nr_pages) starts an empty domain; nr_frames bounds what the image may ask
    for. disk_files are absolute paths, by vdev, in the place of those the image names.
    lazy, of this very source: only an index of the pages is read, and the domain has them brought
    when they are touched, or by and by; it starts at once. make_domain gives it lazy.descriptors.
    postponed: the stream may leave pages out that come when the guest runs, by the connection that
    make_domain gives the domain (postponed.descriptors).
    A migration takes the domain under its name with a suffix, does not look for the end of
    the input behind the image, and hands over in start, which lets the complete domain run.
    Raises ImageError, HostCannotTake, OutOfFrames, NameTaken, StorageError, UsageError.
    """
    started = time.monotonic()
    report(Stage("restore", "read"))
    reader = Reader(
        source, make_domain, name, suffix, cpu_mismatch, disk_files or {}, nr_frames, report,
        lazy, postponed,
    )  # fmt: skip
    try:
        domctl = reader.run(until_end)
        if not paused:
            report(Stage("restore", "unpause"))
        if start is None:
            start = _leave_paused if paused else _unpause
        info = start(domctl)
        domctl.close()
    except BaseException:
        reader.abandon()
        raise
    seconds = time.monotonic() - started
    report(Finished("restore", seconds, reader.nr_pages, source.position, info.name))
    return info


def _leave_paused(domctl: Domctl) -> DomainInfo:
    return domctl.info()


def _unpause(domctl: Domctl) -> DomainInfo:
    return domctl.unpause()


class Reader:
    """Reads one image into one domain."""

    def __init__(
        self,
        source: Source,
        make_domain: MakeDomain,
        name: str | None,
        suffix: str,
        cpu_mismatch: str,
        disk_files: Mapping[str, str],
        nr_frames: int,
        report: Report,
        lazy: Lazy | None = None,
        postponed: Postponed | None = None,
    ) -> None:
        self._source = source
        self._lazy = lazy
        self._postponed = postponed
        self._make_domain = make_domain
        self._name = name
        self._suffix = suffix
        self._cpu_mismatch = cpu_mismatch
        self._disk_files = disk_files
        self._nr_frames = nr_frames
        self._report = report
        self._parts = Parts()
        self._domctl: Domctl | None = None
        self._memory: Memory | None = None
        self._settler: Settler | None = None
        self.nr_pages = 0

    def abandon(self) -> None:
        """Leave nothing behind of a restore that failed."""
        if self._memory is not None:
            self._memory.stop()
        if self._domctl is not None:
            self._domctl.abandon()

    def run(self, until_end: bool) -> Domctl:
        whole = None if self._lazy is None else self._lazy.image.whole
        postcopy = self._postponed is not None
        decoder = StreamDecoder(self._source.read, whole=whole, postcopy=postcopy)
        for item in decoder:
            handler = _HANDLERS.get(type(item.value))
            if handler:
                handler(self, item)
        if until_end:
            self._check_tail(decoder)
        if self._memory is None or self._domctl is None:
            raise ImageError("the image has no X86_PV_P2M_FRAMES record", offset=decoder.position)
        if self._postponed and self._postponed.begun and not self._postponed.whole:
            raise ImageError("what is to come later was not named", offset=decoder.position)
        self._report(Stage("restore", "settle", "page tables, p2m, vCPUs"))
        self._check_vcpus(decoder.position)
        assert self._settler is not None
        self._settler.run(self._state(self._memory))
        self.nr_pages = self._memory.nr_populated
        return self._domctl

    def _check_tail(self, decoder: StreamDecoder) -> None:
        tail = decoder.tail(_TAIL_LIMIT)
        if tail and tail != GO_MESSAGE:
            raise ImageError(
                "unknown bytes behind the end of the image",
                offset=decoder.position - len(tail),
                expected="the end, or a migration's go-ahead",
                found=f"{tail[:16].hex()}...",
            )

    # -- records ---

    def _xl_header(self, item: Item) -> None:
        self._parts.config = item.value.config

    def _domain_header(self, item: Item) -> None:
        header = item.value
        if header.type != libxc.TYPE_X86_PV:
            raise HostCannotTake(
                "the image is of an HVM or PVH guest; only PV guests can be restored here"
            )
        self._parts.xen_version = (header.xen_major, header.xen_minor)

    def _pv_info(self, item: Item) -> None:
        if item.value.guest_width != 8:
            raise HostCannotTake("the image is of a 32-bit guest; only 64-bit guests run here")
        self._parts.width = 8

    def _cpuid_policy(self, item: Item) -> None:
        self._parts.cpuid = item.value.content

    def _msr_policy(self, item: Item) -> None:
        self._parts.msrs = item.value.content

    def _p2m_frames(self, item: Item) -> None:
        """The first one begins the domain; later ones replace a part of the list, and the p2m
        grows to their end (a guest that got memory while it was migrated)."""
        record, parts = item.value, self._parts
        size = max(record.end_pfn + 1, self._memory.p2m.size if self._memory else 0)
        self._check_p2m_frames(record, size, item.offset)
        old = parts.p2m_frames
        first = record.start_pfn // _PFNS_PER_P2M_PAGE
        pages = [] if old is None else [old[:first], old[first + len(record.pfns) :]]
        pages.insert(1, record.pfns)
        parts.p2m_frames, parts.p2m_offset = np.concatenate(pages), item.offset
        if self._memory is None:
            self._check_cpu()
            self._begin(size)
        else:
            self._memory.grow(size)

    def _check_p2m_frames(self, record: libxc.X86PvP2mFrames, size: int, offset: int) -> None:
        wanted = record.nr_frames(8)
        so_far = 0 if self._parts.p2m_frames is None else len(self._parts.p2m_frames)
        gap = record.start_pfn // _PFNS_PER_P2M_PAGE > so_far
        if gap or len(record.pfns) != wanted:
            raise ImageError(
                "the p2m frame list does not cover the p2m",
                offset=offset,
                record=record.NAME,
                expected=f"{wanted} frames from pfn {so_far * _PFNS_PER_P2M_PAGE:#x} or below",
                found=f"{len(record.pfns)} from pfn {record.start_pfn:#x}",
            )
        if size > largest(self._nr_frames):
            raise HostCannotTake(
                f"the guest's p2m has {size} pfns, this host has {self._nr_frames} frames"
            )
        if (record.pfns >= size).any():
            worst = int(record.pfns.max())
            raise ImageError(
                "a p2m frame lies outside the p2m",
                offset=offset,
                record=record.NAME,
                expected=f"below {size:#x}",
                found=f"{worst:#x}",
            )

    def _check_cpu(self) -> None:
        """Refuse, before anything is started, a guest that was promised what we cannot do."""
        missing = missing_features(self._parts.cpuid)
        if missing and self._cpu_mismatch != "allow":
            raise HostCannotTake(
                f"the guest was promised CPU features this host lacks: {', '.join(missing)} "
                "(--cpu-mismatch=allow restores it all the same, at its own risk)"
            )

    def _begin(self, p2m_size: int) -> None:
        self._parts.config = with_disk_files(self._parts.config, self._disk_files)
        config = read_config(self._parts.config)
        name = self._name or config.name
        if not name:
            raise UsageError("the image carries no name: give one with --name")
        self._parts.config = renamed(self._parts.config, name)
        max_pages = config.pages or p2m_size
        self._domctl = self._make_domain(name + self._suffix, min(p2m_size, max_pages))
        self._domctl.begin(
            nr_vcpus=config.nr_vcpus,
            max_pages=max_pages,
            target_pages=config.target_pages,
            available_vcpus=config.available_vcpus,
            deterministic=config.deterministic,
            builtin=config.builtin,
            disks=config.disks,
            disks_later=bool(self._suffix),  # the other end has them
            warm=bool(self._suffix),  # while pages come, the guest still runs there
            seed=config.seed,
        )
        if self._postponed is not None:
            self._memory = PostponedMemory(self._domctl, p2m_size, self._postponed)
        elif self._lazy is None:
            self._memory = Memory(self._domctl, p2m_size, live=bool(self._suffix))
        else:
            self._memory = LazyMemory(self._domctl, p2m_size, self._lazy)
        self._settler = Settler(self._domctl, self._memory, self._parts)
        if self._suffix:  # else a guest that is soon suspended would wait for the process to start
            self._domctl.wait_begun()

    def _page_data(self, item: Item) -> None:
        batch: PageBatch = item.value
        if self._memory is None:
            raise ImageError("PAGE_DATA before X86_PV_P2M_FRAMES", offset=item.offset)
        zero = self._source.zero_pages(batch.pages_offset, len(batch.pages))
        self._memory.place(batch, zero, item.offset)
        self._report_pages()
        # A guest that moves waits for what is left to do at the end.
        if self._suffix and self._settler and not self._source.ready(_PAUSE_S):
            while self._settler.work_ahead() and not self._source.ready():
                pass

    def _page_index(self, item: Item) -> None:
        assert isinstance(self._memory, LazyMemory)  # only such a restore asks for indexes
        self._memory.place_index(item.value)
        self._report_pages()

    def _postcopy_begin(self, _item: Item) -> None:
        assert self._postponed is not None  # the decoder refuses it else
        self._postponed.begun = True

    def _postcopy_pfns(self, item: Item) -> None:
        assert isinstance(self._memory, PostponedMemory)
        self._memory.postpone(item.value.pfns, item.offset)

    def _postcopy_transition(self, _item: Item) -> None:
        assert self._postponed is not None
        self._postponed.whole = True

    def _report_pages(self) -> None:
        assert self._memory is not None
        done, total = self._memory.nr_populated, self._memory.p2m.size
        self._report(Pages("restore", done, total, self._source.position, 0))

    def _tsc_info(self, item: Item) -> None:
        tsc = item.value
        self._parts.tsc = (tsc.mode, tsc.khz, tsc.nsec, tsc.incarnation)

    def _shared_info(self, item: Item) -> None:
        self._parts.shared_info = item.value.content

    def _vcpu(self, item: Item) -> None:
        self._parts.vcpus.setdefault(item.value.vcpu_id, {})[item.value.NAME] = item

    # -- the end of the stream ---

    def _check_vcpus(self, end: int) -> None:
        parts = self._parts
        for vcpu_id in {0, *parts.vcpus}:
            if libxc.X86PvVcpuBasic.NAME not in parts.vcpus.get(vcpu_id, {}):
                raise ImageError(
                    f"the image has no X86_PV_VCPU_BASIC record of vCPU {vcpu_id}", offset=end
                )
        if parts.shared_info is None:
            raise ImageError("the image has no SHARED_INFO record", offset=end)
        xsave = parts.vcpus[0].get(libxc.X86PvVcpuXsave.NAME)
        if xsave and not parts.cpuid and self._cpu_mismatch != "allow":
            xcr0 = int.from_bytes(xsave.value.context[:8], "little")
            if xcr0 & _AVX_STATE:
                raise HostCannotTake(
                    "the guest has AVX state and this host has no AVX "
                    "(--cpu-mismatch=allow restores it all the same, at its own risk)"
                )

    def _state(self, memory: Memory) -> DomainState:
        parts = self._parts
        return DomainState(
            never_run=True,
            nr_vcpus=len(parts.vcpus),
            max_pages=0,
            shared_info_mfn=0,
            tsc=parts.tsc,
            config=parts.config,
            cpuid_policy=parts.cpuid,
            msr_policy=parts.msrs,
            p2m_frames=parts.p2m_frames,
            p2m_size=memory.p2m.size,
            xen_version=parts.xen_version,
        )


_HANDLERS: dict[type, Callable[[Reader, Item], None]] = {
    xl.XlHeader: Reader._xl_header,
    libxc.DomainHeader: Reader._domain_header,
    libxc.X86PvInfo: Reader._pv_info,
    libxc.X86CpuidPolicy: Reader._cpuid_policy,
    libxc.X86MsrPolicy: Reader._msr_policy,
    libxc.X86PvP2mFrames: Reader._p2m_frames,
    PageBatch: Reader._page_data,
    PageIndex: Reader._page_index,
    postcopy.PostcopyBegin: Reader._postcopy_begin,
    postcopy.PostcopyPfns: Reader._postcopy_pfns,
    postcopy.PostcopyTransition: Reader._postcopy_transition,
    libxc.X86TscInfo: Reader._tsc_info,
    libxc.SharedInfo: Reader._shared_info,
    libxc.X86PvVcpuBasic: Reader._vcpu,
    libxc.X86PvVcpuExtended: Reader._vcpu,
    libxc.X86PvVcpuXsave: Reader._vcpu,
    libxc.X86PvVcpuMsrs: Reader._vcpu,
}
