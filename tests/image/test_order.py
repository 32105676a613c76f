"""order.py: what may come when, one case per rule, seen through the decoder."""

from __future__ import annotations

import numpy as np
import pytest

from tests.image.strategies import batch, hvm_values, image, pv_values
from xsave.errors import ImageError
from xsave.image import libxc, libxl
from xsave.image.buffers import reader
from xsave.image.pages import PageBatch
from xsave.image.stream import StreamDecoder, StreamEncoder


def names(data, **options):
    return [item.value.NAME for item in StreamDecoder(reader(data), **options)]


def without(values, *classes):
    return [value for value in values if not isinstance(value, classes)]


def first(values, cls):
    """The values with the first of this class in front."""
    found = next(value for value in values if isinstance(value, cls))
    return [found, *[value for value in values if value is not found]]


def test_the_orders_xen_writes_are_accepted():
    """PV and HVM in the order of the reference writer; HVM also in that of the spec."""
    assert names(image()).count("PAGE_DATA") == 2
    assert "HVM_CONTEXT" in names(image(values=hvm_values(), guest_type=2))
    values = hvm_values()
    assert names(image(values=[*values[:-2], values[-1], values[-2]], guest_type=2))


def test_version_2_has_no_static_data_end():
    """A version 2 stream infers the end of its static data."""
    assert "STATIC_DATA_END" not in names(image(version=2))


PV, V2 = pv_values(), pv_values(version=2)
WRONG = [
    (first(PV, PageBatch), 3, "no STATIC_DATA_END in front of it.*PAGE_DATA"),
    (without(PV, libxc.StaticDataEnd), 3, "no STATIC_DATA_END in front of it.*P2M_FRAMES"),
    (first(PV, libxc.X86PvP2mFrames), 3, "no X86_PV_INFO in front of it.*P2M_FRAMES"),
    (without(PV, libxc.X86PvP2mFrames), 3, "no X86_PV_P2M_FRAMES in front of it.*PAGE_DATA"),
    (first(PV, libxc.SharedInfo), 3, "no X86_PV_INFO in front of it.*SHARED_INFO"),
    (first(PV, libxc.X86PvVcpuBasic), 3, "no X86_PV_INFO in front of it.*VCPU_BASIC"),
    (without(PV, libxc.X86PvVcpuBasic), 3, "no X86_PV_VCPU_BASIC in front of it.*END"),
    ([PV[0], *PV], 3, "a second record of its kind.*X86_PV_INFO"),
    ([*PV, libxc.StaticDataEnd()], 3, "a second record of its kind.*STATIC_DATA_END"),
    ([*PV, libxc.HvmParams(())], 3, "no record of an x86_pv guest.*HVM_PARAMS"),
    ([V2[0], libxc.StaticDataEnd(), *V2[1:]], 2, "no record of a version 2.*STATIC_DATA_END"),
    ([libxc.X86CpuidPolicy(bytes(24)), *V2], 2, "no record of a version 2.*CPUID"),
    ([*PV, batch([4])], 3, "pfn outside the p2m: expected at most 0x3, found 0x4"),
    (
        [*PV, libxc.X86PvP2mFrames(0, 512, np.array([1], np.uint64))],
        3,
        "wrong number of p2m frames: expected 2, found 1",
    ),
    ([*PV, libxc.X86PvVcpuBasic(1, bytes(2800))], 3, "expected 5168 bytes, found 2800"),
]


@pytest.mark.parametrize(("values", "version", "what"), WRONG, ids=[case[2] for case in WRONG])
def test_wrong_orders_are_refused(values, version, what):
    """Each rule, broken once, is an ImageError naming the record; strict_order=False reads on."""
    data = image("libxc", values, version=version)
    with pytest.raises(ImageError, match=what):
        names(data)
    assert names(data, strict_order=False)[-1] == "END"


def test_pv_records_have_no_place_in_an_hvm_stream():
    """The guest type decides which records there are."""
    with pytest.raises(ImageError, match=r"no record of an x86_hvm guest.*X86_PV_INFO"):
        names(image(values=pv_values(), guest_type=2))


def test_a_later_p2m_may_be_longer():
    """A second P2M_FRAMES with a larger end makes room for more pfns."""
    more = libxc.X86PvP2mFrames(0, 600, np.array([1, 2], np.uint64))
    at = next(i for i, v in enumerate(PV) if isinstance(v, PageBatch))
    assert names(image(values=[*PV[:at], more, *PV[at:], batch([600])]))


def test_a_32_bit_guest():
    """Width 4 means 1024 pfns per p2m page and contexts of 2800 bytes."""
    values = [
        libxc.X86PvInfo(4, 3),
        libxc.StaticDataEnd(),
        libxc.X86PvP2mFrames(0, 1023, np.array([1], np.uint64)),
        batch([1]),
        libxc.X86PvVcpuBasic(0, bytes(2800)),
    ]
    assert names(image(values=values))


def test_emulator_records_belong_to_hvm():
    """A PV image with emulator records is refused, an HVM one is read."""
    end = libxl.LibxlEnd().encode()
    emulator = libxl.EmulatorContext(2, 0, b"qemu").encode()
    hvm = image(values=hvm_values(), guest_type=2)
    assert "EMULATOR_CONTEXT" in names(hvm.removesuffix(end) + emulator + end)
    with pytest.raises(ImageError, match=r"no record of an x86_pv guest.*EMULATOR_CONTEXT"):
        names(image().removesuffix(end) + emulator + end)


def test_libxl_needs_its_context():
    """A libxl END, or anything, in front of LIBXC_CONTEXT is refused."""
    data = libxl.LibxlHeader().encode() + libxl.LibxlEnd().encode()
    with pytest.raises(ImageError, match="no LIBXC_CONTEXT in front of it"):
        names(data)
    with pytest.raises(ImageError, match="no libxc stream in front of it"):
        names(data, strict_order=False)


def test_a_checkpointed_stream():
    """libxl records of a checkpoint come between two runs of libxc records."""
    record = StreamEncoder.record
    head = StreamEncoder.headers("libxl")
    values = b"".join(record(value) for value in PV)
    pause = record(libxc.Checkpoint()) + record(libxl.CheckpointEnd())
    again = record(batch([2], [4])) + record(libxc.X86PvVcpuBasic(0, bytes(5168)))
    data = head + values + pause + again + pause + again + StreamEncoder.trailer("libxl")
    found = [(item.layer, item.value.NAME) for item in StreamDecoder(reader(data))]
    checkpoints = [i for i, (_, found_name) in enumerate(found) if found_name == "CHECKPOINT"]
    assert len(checkpoints) == 2
    for i in checkpoints:
        assert found[i + 1 : i + 3] == [("libxl", "CHECKPOINT_END"), ("libxc", "PAGE_DATA")]
    assert found[-2:] == [("libxc", "END"), ("libxl", "END")]
