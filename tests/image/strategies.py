"""Hypothesis strategies for records and small images, and a plain small image to damage."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from xsave.image import libxc, libxl
from xsave.image.pages import PageBatch, has_data
from xsave.image.stream import StreamEncoder
from xsave.image.xl import XlHeader

u8s, u16s = st.integers(0, 2**8 - 1), st.integers(0, 2**16 - 1)
u32s, u64s = st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1)
blobs = st.binary(max_size=48)
PAGE_TYPES = [0, 1, 2, 3, 4, 9, 10, 11, 12, 13, 14, 15]


def u64_arrays(max_size=6):
    return st.lists(u64s, max_size=max_size).map(lambda values: np.array(values, np.uint64))


def multiples(n, min_size=0, max_size=4):
    sizes = st.integers(min_size, max_size)
    return sizes.flatmap(lambda count: st.binary(min_size=n * count, max_size=n * count))


def vcpu(cls, contexts):
    return st.builds(cls, vcpu_id=u32s, context=contexts, reserved=u32s)


LIBXC = {
    libxc.End: st.builds(libxc.End),
    libxc.X86PvInfo: st.tuples(st.sampled_from([(4, 3), (8, 4)]), u16s, u32s).map(
        lambda t: libxc.X86PvInfo(*t[0], *t[1:])
    ),
    libxc.X86PvP2mFrames: st.builds(
        lambda a, b, pfns: libxc.X86PvP2mFrames(min(a, b), max(a, b), pfns),
        u32s,
        u32s,
        u64_arrays(),
    ),
    libxc.X86PvVcpuBasic: vcpu(
        libxc.X86PvVcpuBasic, st.sampled_from([bytes(5168), bytes(range(250)) * 11 + bytes(50)])
    ),
    libxc.X86PvVcpuExtended: vcpu(libxc.X86PvVcpuExtended, st.binary(max_size=128)),
    libxc.X86PvVcpuXsave: vcpu(
        libxc.X86PvVcpuXsave, st.just(b"") | st.binary(min_size=16, max_size=40)
    ),
    libxc.X86PvVcpuMsrs: vcpu(libxc.X86PvVcpuMsrs, multiples(16)),
    libxc.SharedInfo: st.builds(libxc.SharedInfo, u8s.map(lambda v: bytes([v]) * 4096)),
    libxc.X86TscInfo: st.builds(libxc.X86TscInfo, u32s, u32s, u64s, u32s, u32s),
    libxc.HvmContext: st.builds(libxc.HvmContext, st.binary(min_size=1, max_size=40)),
    libxc.HvmParams: st.builds(
        libxc.HvmParams, st.lists(st.tuples(u64s, u64s), max_size=4).map(tuple), u32s
    ),
    libxc.Toolstack: st.builds(libxc.Toolstack, blobs),
    libxc.Verify: st.builds(libxc.Verify),
    libxc.Checkpoint: st.builds(libxc.Checkpoint),
    libxc.CheckpointDirtyPfnList: st.builds(libxc.CheckpointDirtyPfnList, u64_arrays()),
    libxc.StaticDataEnd: st.builds(libxc.StaticDataEnd),
    libxc.X86CpuidPolicy: st.builds(libxc.X86CpuidPolicy, multiples(24, 1)),
    libxc.X86MsrPolicy: st.builds(libxc.X86MsrPolicy, multiples(16, 1)),
}
LIBXL = {
    libxl.LibxlEnd: st.builds(libxl.LibxlEnd),
    libxl.LibxcContext: st.builds(libxl.LibxcContext),
    libxl.EmulatorXenstoreData: st.builds(libxl.EmulatorXenstoreData, u32s, u32s, blobs),
    libxl.EmulatorContext: st.builds(libxl.EmulatorContext, u32s, u32s, blobs),
    libxl.CheckpointEnd: st.builds(libxl.CheckpointEnd),
    libxl.CheckpointState: st.builds(libxl.CheckpointState, u32s, blobs),
}
HEADERS = {
    XlHeader: st.builds(XlHeader.for_config, st.binary(max_size=40)),
    libxl.LibxlHeader: st.builds(libxl.LibxlHeader, options=u32s.map(lambda v: v & ~1)),
    libxc.ImageHeader: st.builds(
        libxc.ImageHeader,
        version=st.sampled_from([2, 3]),
        options=u16s.map(lambda v: v & ~1),
        reserved1=u16s,
        reserved2=u32s,
    ),
    libxc.DomainHeader: st.builds(
        libxc.DomainHeader,
        type=st.sampled_from([1, 2]),
        reserved=u16s,
        xen_major=u32s,
        xen_minor=u32s,
    ),
}
unknown = st.builds(libxc.Unknown, u32s.map(lambda v: v | 0x80000000), blobs)


@st.composite
def batches(draw, max_entries=4):
    """A PageBatch with reserved bits now and then; pages of one repeated byte."""
    count = draw(st.integers(1, max_entries))
    pfns = draw(st.lists(st.integers(0, 2**52 - 1), min_size=count, max_size=count))
    types = draw(st.lists(st.sampled_from(PAGE_TYPES), min_size=count, max_size=count))
    types = np.array(types, np.uint8)
    fill = draw(st.binary(min_size=count, max_size=count))
    pages = np.repeat(np.frombuffer(fill, np.uint8), 4096).reshape(count, 4096)[
        : sum(has_data(types))
    ]
    bits = draw(st.none() | st.just(np.arange(1, count + 1, dtype=np.uint8)))
    return PageBatch(np.array(pfns, np.uint64), types, pages, 0, draw(u32s), bits)


def batch(pfns, types=None, fill=1):
    """A plain batch: page i holds the byte (fill + i) % 256."""
    pfns = np.array(pfns, np.uint64)
    types = np.zeros(len(pfns), np.uint8) if types is None else np.array(types, np.uint8)
    values = (fill + np.arange(int(has_data(types).sum()))).astype(np.uint8)
    return PageBatch(pfns, types, np.repeat(values, 4096).reshape(-1, 4096))


def pv_values(nr_pfns=4, version=3):
    """The libxc records of a small correct PV stream, END left out."""
    return [
        libxc.X86PvInfo(8, 4),
        *([libxc.X86CpuidPolicy(bytes(24)), libxc.X86MsrPolicy(bytes(16))] if version > 2 else []),
        *([libxc.StaticDataEnd()] if version > 2 else []),
        libxc.X86PvP2mFrames(0, nr_pfns - 1, np.array([1], np.uint64)),
        batch(range(nr_pfns), [0, 0, 0xC, 0xF, *[0] * (nr_pfns - 4)]),
        batch([1], fill=9),
        libxc.X86TscInfo(0, 1000, 5, 1),
        libxc.SharedInfo(bytes(4096)),
        libxc.X86PvVcpuBasic(0, bytes(5168)),
        libxc.X86PvVcpuExtended(0, bytes(64)),
    ]


def hvm_values():
    """The libxc records of a small correct HVM stream, END left out."""
    return [
        libxc.X86CpuidPolicy(bytes(24)),
        libxc.StaticDataEnd(),
        batch([0, 1, 2], [0, 0xF, 0]),
        libxc.X86TscInfo(0, 1000, 5, 1),
        libxc.HvmContext(b"context"),
        libxc.HvmParams(((1, 2), (5, 6))),
    ]


def image(fmt="xl", values=None, *, version=3, guest_type=1, config=b"{}", tail=b""):
    """The bytes of an image of these records (default: `pv_values`)."""
    values = pv_values(version=version) if values is None else values
    head = StreamEncoder.headers(fmt, config, guest_type=guest_type, version=version)
    body = b"".join(StreamEncoder.record(value) for value in values)
    return head + body + StreamEncoder.trailer(fmt) + tail
