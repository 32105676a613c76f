"""xsave-image(5) describes the format as the code has it: records, layouts, order, types."""

from __future__ import annotations

import ctypes

import construct
import pytest

from tests import manual
from xsave import public
from xsave.frames import PageType, type_has_data
from xsave.image import libxc, libxl, order, pages, xl

PAGE = manual.PAGES["xsave-image.5"]
SUBSECTIONS = {
    heading: text
    for section in manual.sections(PAGE).values()
    for heading, text in manual.sections(section, "Ss").items()
    if heading
}
#: Heading -> who has the layout.
LAYOUTS = {
    "xl header": xl.XlHeader,
    "libxl header": libxl.LibxlHeader,
    "image header": libxc.ImageHeader,
    "domain header": libxc.DomainHeader,
    "X86_PV_INFO": libxc.X86PvInfo,
    "X86_PV_P2M_FRAMES": libxc.X86PvP2mFrames,
    "X86_PV_VCPU_BASIC": libxc.X86PvVcpuBasic,
    "X86_TSC_INFO": libxc.X86TscInfo,
    "HVM_PARAMS": libxc.HvmParams,
    "PAGE_DATA": pages.PageDataHeader,
    "EMULATOR_XENSTORE_DATA": libxl.EmulatorXenstoreData,
    "EMULATOR_CONTEXT": libxl.EmulatorContext,
    "CHECKPOINT_STATE": libxl.CheckpointState,
}
STRUCTURES = {
    "vcpu_guest_context": public.VcpuGuestContext,
    "cpu_user_regs": public.UserRegs,
    "xen_domctl_ext_vcpucontext": public.VcpuExtended,
    "shared_info": public.SharedInfo,
    "vcpu_info": public.VcpuInfo,
    "vcpu_time_info": public.VcpuTimeInfo,
    "arch_shared_info": public.ArchSharedInfo,
    "start_info": public.StartInfo,
}
#: One table for what several have in common.
SHARED_LAYOUTS = {"X86_PV_VCPU_EXTENDED", "X86_PV_VCPU_XSAVE", "X86_PV_VCPU_MSRS"}


def layout_rows(cls):
    """Return [offset, size, field] of a layout, as the page writes them."""
    found, offset = [], 0
    for field in cls.LAYOUT.fields.subcons:
        try:
            size = field.sizeof()
        except construct.SizeofError:
            size = 0
        found.append([f"{offset:#x}", str(size) if size else "rest", field.name])
        offset += size
    return found


def structure_rows(cls):
    """Return [offset, size, field] of a C structure without its padding."""
    named = [(name, getattr(cls, name)) for name, _ in cls._fields_ if not name.startswith("_")]
    return [[f"{field.offset:#x}", str(field.size), name] for name, field in named]


def when(rule):
    """Return what the page says of when a record may come."""
    words = [] if len(rule.guests) > 1 else ["PV" if libxc.TYPE_X86_PV in rule.guests else "HVM"]
    words += ["once"] if rule.once else []
    words += [f"v{rule.since_version}"] if rule.since_version > 2 else []
    return ", ".join(words) or "any"


@pytest.mark.parametrize("heading", LAYOUTS)
def test_layouts(heading):
    """The fields of a header or record, their offsets and sizes, are those of its class."""
    found = [row[:3] for row in manual.rows(SUBSECTIONS[heading])]
    expected = layout_rows(LAYOUTS[heading])
    assert found[: len(expected)] == expected
    # Entries and pages of PAGE_DATA are no part of the class.
    assert len(found) == len(expected) + (heading == "PAGE_DATA")


@pytest.mark.parametrize("heading", STRUCTURES)
def test_structures(heading):
    """The fields of a structure of Xen's, their offsets and sizes, are those of public.py."""
    found = [row[:3] for row in manual.rows(SUBSECTIONS[heading])]
    assert found == structure_rows(STRUCTURES[heading])


@pytest.mark.parametrize(
    ("heading", "records", "digits"),
    [
        ("Records", {**libxc.RECORDS, pages.TYPE: pages}, 2),
        ("Records of the libxl layer", libxl.RECORDS, 1),
    ],
)
def test_every_record_is_listed(heading, records, digits):
    """The tables of records have every type with its name, in order, and no other."""
    listed = [row[:2] for row in manual.rows(SUBSECTIONS[heading]) if row[0][:2] == "0x"]
    named = [row for row in listed if row[1].isupper()]
    numbers = sorted(records)
    assert named == [[f"{n:#0{digits + 2}x}", records[n].NAME] for n in numbers]


def test_every_record_has_a_place():
    """Each libxc record has a subsection of its own, but for END."""
    names = {cls.NAME for cls in libxc.RECORDS.values()} | {pages.NAME}
    assert names - set(SUBSECTIONS) == {libxc.End.NAME}
    # A record with fields has its table.
    with_fields = {cls.NAME for cls in libxc.RECORDS.values() if len(cls.LAYOUT.names) > 1}
    assert with_fields <= set(LAYOUTS) | SHARED_LAYOUTS


@pytest.mark.parametrize("layer", ["libxc", "libxl"])
def test_order(layer):
    """The tables of the order are those of order.py, rule by rule."""
    table = {"libxc": order.LIBXC, "libxl": order.LIBXL}[layer]
    expected = [[name, when(rule), ", ".join(rule.after) or "-"] for name, rule in table.items()]
    assert manual.rows(SUBSECTIONS[f"Order of the {layer} layer"]) == expected


def test_page_types():
    """The types of pages, their names, and whether they have content."""
    found = [row[:3] for row in manual.rows(SUBSECTIONS["page types"])]
    sizes = {True: "4096", False: "0"}
    assert found == [[f"{t:#x}", t.name, sizes[type_has_data(t)]] for t in PageType]


def test_numbers_in_the_text():
    """Sizes and magics that the text names are those of the code."""
    for number in (
        f"{ctypes.sizeof(public.VcpuGuestContext)} bytes",
        f"or {libxc.X86PvVcpuBasic.SIZES[4]} in a 32-bit guest",
        f"cr1 (at {public.VcpuGuestContext.ctrlreg.offset + 8:#x})",
        f"cr3 (at {public.VcpuGuestContext.ctrlreg.offset + 24:#x})",
        f"cr4 (at {public.VcpuGuestContext.ctrlreg.offset + 32:#x})",
        f"at most {pages.MAX_BATCH} entries",
        f"{libxc.ID:#x}",
        f"{libxl.IDENT:#x}",
        f"{xl.BYTEORDER:#010x}",
    ):
        assert number in " ".join(PAGE.split()), number
