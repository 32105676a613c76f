"""`verify` on images that a real Xen wrote: sound as they are, and each of the single changes that
were once tried on a real Xen and refused, or restored to a guest that was dead, is an error."""

from __future__ import annotations

import struct

import numpy as np
import pytest

from xsave import public
from xsave.image import libxc
from xsave.image.buffers import reader
from xsave.image.pages import PageBatch
from xsave.image.stream import StreamDecoder
from xsave.image.verify import verify

CONTEXT, REGS = public.VcpuGuestContext, public.UserRegs
PV = "pv-micro-1cpu.img"


def field(name, *rest):
    """Return the offset of a field in a BASIC record: `ctrlreg`, 3 or `user_regs`, "rip"."""
    at = 16 + getattr(CONTEXT, name).offset
    if not rest:
        return at
    return at + (8 * rest[0] if isinstance(rest[0], int) else getattr(REGS, rest[0]).offset)


def u64(value):
    return struct.pack("<Q", value)


@pytest.fixture(scope="module")
def findings(xen_images, unzstd):
    """The findings of every real image, by name."""
    paths = sorted(xen_images.glob("*.zst"))
    found = {}
    for path in paths:
        if ".core" not in path.name:
            found[path.name] = verify(reader(unzstd(path).read_bytes()))
    return found


def test_real_images_are_sound(findings):
    """No image that a real Xen wrote and restored has an error or a warning."""
    assert findings
    bad = {n: [f for f in fs if f.severity != "note"] for n, fs in findings.items()}
    assert {name: found for name, found in bad.items() if found} == {}


def test_real_images_name_host_frames(findings):
    """Xen leaves its frame numbers in the p2m pages, start_info and shared_info; that is noted."""
    for name, found in findings.items():
        rules = [finding.rule for finding in found]
        assert rules.count("host-frames") == (3 if name.startswith("pv-") else 0), name
        assert ("go-message" in rules) == ("migrate" in name), name


@pytest.fixture(scope="module")
def micro(xen_image):
    """(bytes of a real PV image, name -> offset of the last record of that name)."""
    data = xen_image(PV).read_bytes()
    offsets = {item.value.NAME: item.offset for item in StreamDecoder(reader(data))}
    return data, offsets


@pytest.fixture(scope="module")
def l1_entries(micro):
    """Places of present L1 entries: (offset in the image, entry, type of the page it names)."""
    data, _ = micro
    batches = [i.value for i in StreamDecoder(reader(data)) if isinstance(i.value, PageBatch)]
    types = {p: t for b in batches for p, t in zip(b.pfns.tolist(), b.types.tolist(), strict=True)}
    found = []
    for batch in batches:
        assert batch.has_data.all()
        for i in np.flatnonzero(batch.types == 1).tolist():
            for slot, entry in enumerate(batch.pages[i].view("<u8").tolist()):
                if entry & 1:
                    at = batch.pages_offset + 4096 * i + 8 * slot
                    found.append((at, entry, types[entry >> 12 & 0xFFFFFFFF]))
    return found


def errors_of(data):
    return {finding.rule for finding in verify(reader(data)) if finding.severity == "error"}


def changed(data, at, new):
    """Return the image with some bytes replaced."""
    return data[:at] + new + data[at + len(new) :]


DEAD_GUESTS = {
    "vcpu-flags": (field("flags"), struct.pack("<I", 0x20)),
    "vcpu-iopl": (field("user_regs", "rflags"), u64(0x202)),
    "vcpu-segments": (field("user_regs", "cs"), bytes(2)),
    "vcpu-traps": (field("trap_ctxt"), bytes(16 * 256)),
    "vcpu-cr1": (field("ctrlreg", 1), u64(0)),
    "vcpu-gdt": (field("gdt_ents"), u64(0)),
    "vcpu-callbacks": (field("event_callback_eip"), u64(0)),
    "vcpu-gs-base": (field("gs_base_kernel"), u64(0)),
    "vcpu-cr4": (field("ctrlreg", 4), u64(0)),
    "vcpu-rax": (field("user_regs", "rax"), u64(1)),
    "start-info": (field("user_regs", "rdx"), u64(0x1234)),
    "vcpu-cr3": (field("ctrlreg", 3), u64(0x1234 << 12)),
}


@pytest.mark.parametrize("rule", DEAD_GUESTS)
def test_dead_guest(micro, rule):
    """A real Xen restores this image "successfully", and its guest is dead: verify says why."""
    data, offsets = micro
    at, new = DEAD_GUESTS[rule]
    assert errors_of(changed(data, offsets["X86_PV_VCPU_BASIC"] + at, new)) == {rule}


def test_syscall_callback(micro):
    """So does one without a syscall entry."""
    data, offsets = micro
    at = offsets["X86_PV_VCPU_BASIC"] + field("syscall_callback_eip")
    assert errors_of(changed(data, at, u64(0))) == {"vcpu-callbacks"}


def test_upcall_mask(micro):
    """And one whose events are not masked in shared_info."""
    data, offsets = micro
    assert errors_of(changed(data, offsets["SHARED_INFO"] + 8 + 1, b"\0")) == {"upcall-mask"}


@pytest.mark.parametrize("name", ["SHARED_INFO", "X86_PV_VCPU_XSAVE"])
def test_record_taken_away(micro, name):
    """Without shared_info the guest spins; without its XSAVE state it crashes."""
    data, offsets = micro
    at = offsets[name]
    length = struct.unpack_from("<I", data, at + 4)[0]
    rule = {"SHARED_INFO": "missing-record"}.get(name, "vcpu-cr4")
    assert errors_of(data[:at] + data[at + 8 + length + -length % 8 :]) == {rule}


def test_writable_mapping_of_a_table(micro, l1_entries):
    """Xen refuses a vCPU whose page tables map a page table writable."""
    data, _ = micro
    at, entry, _ = next(e for e in l1_entries if e[2] in range(1, 13) and not e[1] & 2)
    bad = changed(data, at, u64(entry | 2))
    (finding,) = [f for f in verify(reader(bad)) if f.severity == "error"]
    assert (finding.rule, finding.offset) == ("pte-writable", at)


@pytest.mark.parametrize(
    ("rule", "change"),
    [
        ("pte-flags", lambda entry: entry | 0x10),
        ("pte-range", lambda entry: entry + (0x2000 << 12)),
    ],
)
def test_bad_entry(micro, l1_entries, rule, change):
    """Bits that Xen disallows, and a pfn behind the last one, are found at their place."""
    data, _ = micro
    at, entry, _ = l1_entries[len(l1_entries) // 2]
    bad = changed(data, at, u64(change(entry)))
    (finding,) = [f for f in verify(reader(bad)) if f.severity == "error"]
    assert (finding.rule, finding.offset) == (rule, at)


def retyped(data, change):
    """Return the image with the types of all its entries changed."""
    broken = bytearray(data)
    for item in StreamDecoder(reader(data)):
        if isinstance(item.value, PageBatch):
            for i, page_type in enumerate(item.value.types.tolist()):
                at = item.offset + 16 + 8 * i + 7
                broken[at] = broken[at] & 0x0F | change(page_type) << 4
    return bytes(broken)


@pytest.mark.parametrize(
    ("rules", "change"),
    [
        ({"vcpu-cr3", "vcpu-cr1"}, lambda t: 0),
        ({"pte-level"}, lambda t: 0 if t in (1, 9) else t),
        ({"pte-level"}, lambda t: 2 if t == 1 else t),
    ],
    ids=["no-types", "l1-as-data", "l1-as-l2"],
)
def test_wrong_types(micro, rules, change):
    """Types that were refused: none at all, L1 tables as data, L1 tables as L2."""
    data, _ = micro
    assert rules <= errors_of(retyped(data, change))


def test_no_pins(micro):
    """No pins at all were restored: Xen types the tables through cr3 alone."""
    data, _ = micro
    assert errors_of(retyped(data, lambda t: t & 7 if 9 <= t <= 12 else t)) == set()


def test_minimal_records(micro):
    """Without policies, TSC and extended state the guest went on; there are no errors."""
    data, offsets = micro
    dropped = {"X86_CPUID_POLICY", "X86_MSR_POLICY", "X86_TSC_INFO", "X86_PV_VCPU_EXTENDED"}
    for at in sorted((offsets[name] for name in dropped), reverse=True):
        length = struct.unpack_from("<I", data, at + 4)[0]
        data = data[:at] + data[at + 8 + length + -length % 8 :]
    found = {finding.rule for finding in verify(reader(data))}
    assert found == {"no-policy", "no-tsc", "host-frames"}


def test_xsave_of_nothing(micro):
    """A blob of 16 zero bytes, as Xen writes for a guest that never enabled XSAVE, is sound once
    cr4 agrees; a blob of 16 bytes that claims features is refused."""
    data, offsets = micro
    at = offsets["X86_PV_VCPU_XSAVE"]
    length = struct.unpack_from("<I", data, at + 4)[0]
    rest = data[at + 8 + length + -length % 8 :]
    empty = libxc.X86PvVcpuXsave(0, bytes(16)).encode()
    claiming = libxc.X86PvVcpuXsave(0, u64(7) + u64(7)).encode()
    assert errors_of(data[:at] + empty + rest) == set()
    assert errors_of(data[:at] + claiming + rest) == {"vcpu-xsave"}
