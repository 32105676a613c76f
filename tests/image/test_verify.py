"""`verify` finds each thing it says it looks for, and nothing in images that are sound."""

from __future__ import annotations

import numpy as np
import pytest

from tests.image import damage_host, damage_memory, damage_stream, damage_vcpu, synthetic
from tests.image.damage import SAMPLES, pv
from tests.image.pieces import index
from tests.image.synthetic_kinds import HvmImage, Pv32Image
from xsave.errors import ImageError
from xsave.image.buffers import reader
from xsave.image.stream import StreamDecoder
from xsave.image.verify import RULES, verify
from xsave.image.verify import tables as tables_module
from xsave.image.verify.findings import MAX_PER_RULE, Findings

MODULES = (damage_stream, damage_memory, damage_vcpu, damage_host)
IMAGES = {
    "pv": synthetic.PvImage,
    "pv-1cpu": lambda: synthetic.PvImage(1),
    "pv-32": Pv32Image,
    "hvm": HvmImage,
    "pvh": lambda: HvmImage(pvh=True),
}


def rules_of(data, floor="note"):
    """Return the rules broken by an image, those less severe than `floor` left out."""
    kept = {"error": ("error",), "warning": ("error", "warning")}.get(floor)
    return {f.rule for f in verify(reader(data)) if not kept or f.severity in kept}


@pytest.mark.parametrize("wrapping", ["xl", "libxl", "libxc"])
@pytest.mark.parametrize("name", IMAGES)
def test_sound_images_are_clean(name, wrapping):
    """A sound image of each kind of guest, in each wrapping, has not so much as a note."""
    assert verify(reader(IMAGES[name]().encode(wrapping))) == []


def test_every_record_type():
    """VERIFY with pages sent again, and an unknown optional record, are only noted."""
    data = synthetic.PvImage(everything=True).encode()
    assert rules_of(data) == {"repeated", "unknown-optional"}


@pytest.mark.parametrize(
    ("rule", "make"), [pytest.param(r, make, id=f"{r}-{name}") for r, name, make in SAMPLES]
)
def test_one_damage_one_rule(rule, make):
    """One damage breaks one rule; notes that go with it do not count, if it is no note itself."""
    assert rules_of(make(), floor=RULES[rule][0]) == {rule}


def test_every_rule_has_a_sample():
    """No rule stands in the table that nothing can break (tables-skipped has its own test)."""
    assert {make.__module__ for _, _, make in SAMPLES} == {m.__name__ for m in MODULES}
    assert {rule for rule, _, _ in SAMPLES} | {"tables-skipped"} == set(RULES)


def records_of(data):
    """Return (offset, name) of all headers and records that can be decoded, and of the end."""
    decoder = StreamDecoder(reader(data), strict_order=False)
    places = []
    try:
        for item in decoder:
            places.append((item.offset, item.value.NAME))
    except ImageError:
        pass
    return [*places, (decoder.position, None)]


@pytest.mark.parametrize(
    "make", [pytest.param(make, id=name) for rule, name, make in SAMPLES if rule != "damaged"]
)
def test_offsets_lie_in_their_record(make):
    """A finding's offset lies within a record of the name that the finding gives."""
    data = make()
    places = records_of(data)
    for finding in verify(reader(data)):
        if finding.offset is not None and finding.record is not None:
            name = [name for offset, name in places if offset <= finding.offset][-1]
            assert name == finding.record, finding


def test_offset_of_a_field():
    """The offset of a bad vCPU field is where that field is: patching it there mends the image."""
    good, bad = synthetic.PvImage().encode(), damage_vcpu.vcpu(regs__rax=1)
    (finding,) = verify(reader(bad))
    mended = bytearray(bad)
    mended[finding.offset] = 0
    assert bytes(mended) == good


def test_offset_of_an_entry():
    """The offset of a bad page-table entry is where that entry is."""
    data = synthetic.PvImage()
    data.table(synthetic.L1)[synthetic.L2] |= synthetic.RW
    bad = data.encode()
    (finding,) = verify(reader(bad))
    entry = int.from_bytes(bad[finding.offset : finding.offset + 8], "little")
    assert finding.rule == "pte-writable"
    assert entry >> 12 == synthetic.L2


def test_last_version_counts():
    """A page table that was wrong while the guest ran, and right in the end, is right."""
    image = synthetic.PvImage()
    good = image.batches([synthetic.L1])[0]
    image.table(synthetic.L1)[synthetic.L2] |= synthetic.RW
    pieces = image.pieces()
    at = index(pieces, "X86_TSC_INFO")
    data = b"".join(piece.data for piece in [*pieces[:at], good, *pieces[at:]])
    assert rules_of(data) == {"repeated"}
    assert rules_of(image.encode()) == {"pte-writable"}


def test_last_start_info_counts():
    """start_info whose last version has lost its magic is no start_info."""
    image = synthetic.PvImage()
    image.pages[synthetic.START_INFO, :8] = 0
    emptied = image.batches([synthetic.START_INFO])[0]
    pieces = synthetic.PvImage().pieces()
    at = index(pieces, "X86_TSC_INFO")
    data = b"".join(piece.data for piece in [*pieces[:at], emptied, *pieces[at:]])
    assert rules_of(data, "warning") == {"start-info"}


def test_zero_pages_are_not_touched():
    """Pages that the caller knows to be zero are left alone, the others are looked at."""
    asked = []

    def zero_pages(offset, nr_pages):
        asked.append((offset, nr_pages))
        return np.ones(nr_pages, bool)

    findings = verify(reader(pv()), zero_pages)
    assert {finding.rule for finding in findings} == {"start-info"}  # it was said to be zero
    assert sum(nr_pages for _, nr_pages in asked) == synthetic.NR_POPULATED
    assert verify(reader(pv()), lambda offset, nr_pages: None) == []


def test_too_many_tables(monkeypatch):
    """Behind the limit tables are counted, not kept, and the caller is told."""
    monkeypatch.setattr(tables_module, "MAX_ENTRIES", 100)
    assert "tables-skipped" in rules_of(pv())


def test_findings_are_bounded():
    """However often a rule is broken, its findings are few, and the last one counts the rest."""
    findings = Findings()
    for i in range(1000):
        findings.add("reserved", f"number {i}", offset=i)
    result = findings.result()
    assert len(result) == MAX_PER_RULE
    assert f"{1000 - MAX_PER_RULE} more" in result[-1].message


def test_worst_first():
    """Errors come before warnings, warnings before notes."""
    image = synthetic.PvImage(everything=True)
    image.vcpus[0].user_regs.rax = 1
    severities = [finding.severity for finding in verify(reader(image.encode()))]
    assert severities == sorted(severities, key=["error", "warning", "note"].index)
    assert severities[0] == "error"
