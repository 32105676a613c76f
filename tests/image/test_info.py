"""info.py and policy.py: what is said about an image."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from tests.image.strategies import batch, hvm_values, image, pv_values
from xsave.errors import ImageError
from xsave.image import libxc
from xsave.image.buffers import reader
from xsave.image.info import summary
from xsave.image.policy import cpuid_policy
from xsave.image.stream import GO_MESSAGE, StreamDecoder


def info(data):
    return summary(StreamDecoder(reader(data)))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("pv-micro-1cpu.img", {"nr_vcpus": 1, "max_pfn": 8191, "pinned": 18, "trailing_bytes": 0}),
        ("pv-micro-2cpu.img", {"nr_vcpus": 2, "max_pfn": 8191}),
        ("pv-micro-migrate.stdin", {"trailing_bytes": 44, "trailing": "go_message"}),
        ("pvh-1cpu.img", {"nr_vcpus": None, "domain_type": "x86_hvm", "max_pfn": 0xFEFFF}),
        ("pv-debian-1cpu-A.img", {"max_pfn": 20479}),
    ],
)
def test_real_images(xen_image, name, expected):
    """What the README of the images says of each is found in it."""
    found = info(xen_image(name).read_bytes())
    common = {"format": "xl", "xen_version": "4.17", "stream_version": 3, "endianness": "little"}
    assert {key: found[key] for key in (*common, *expected)} == {**common, **expected}
    assert found["config"]["c_info"]["name"]
    assert json.loads(json.dumps(found)) == found


def listed_by_xen(text):
    """{name: [how many, bytes with header and padding]} of the records verify-stream-v2 lists."""
    found = {}
    for name, length in re.findall(r"Lib\w+ Record: (.*), length (\d+)", text):
        count = found.setdefault(name.lower().removeprefix("x86 "), [0, 0])
        count[0] += 1
        count[1] += 8 + (int(length) + 7) // 8 * 8
    return found


@pytest.mark.parametrize("name", ["pv-micro-2cpu.img", "pv-debian-1cpu-A.img", "pvh-1cpu.img"])
def test_the_verifier_of_xen_counts_the_same(xen_images, xen_image, name):
    """Kinds, numbers and lengths of records are those Xen's own verify-stream-v2 listed."""
    expected = listed_by_xen((xen_images / f"{name}.verify.txt").read_text())
    found = {}
    for entry in info(xen_image(name).read_bytes())["records"]:
        shown = entry["type"].lower().replace("_", " ").removeprefix("x86 ")
        count = found.setdefault(shown, [0, 0])
        count[0] += entry["count"]
        count[1] += entry["bytes"]
    del found["page data"]  # the verifier does not list them one by one
    assert found == expected


def test_counts_are_of_the_final_types():
    """A repeated pfn counts once, as what it was last; pinned tables count as tables too."""
    values = [*pv_values(), batch([0, 2], [1, 4])]
    found = info(image(values=values))
    expected = {"NOTAB": 1, "L1TAB": 1, "L4TAB": 1, "XTAB": 1, "pinned": 0}
    assert {k: v for k, v in found["nr_pages"].items() if v or k == "pinned"} == expected
    assert found["nr_entries"] == 7
    assert info(image())["nr_pages"]["pinned"] == info(image())["pinned"] == 1


def test_records_add_up():
    """The bytes of all records, with headers of streams, are the bytes of the image."""
    data = image(config=b"{}")
    found = info(data)
    headers = 48 + 4 + 3 + 16 + 24 + 16
    assert sum(entry["bytes"] for entry in found["records"]) + headers == len(data)
    assert found["image_bytes"] == len(data)
    assert [e["count"] for e in found["records"] if e["type"] == "PAGE_DATA"] == [2]
    assert [e["layer"] for e in found["records"] if e["type"] == "END"] == ["libxc", "libxl"]


def test_each_wrapping_and_version():
    """Format and version are what they are; without an xl header there is no configuration."""
    for fmt in ("xl", "libxl", "libxc"):
        found = info(image(fmt, version=2))
        assert (found["format"], found["stream_version"]) == (fmt, 2)
        assert (found["config"] is None) == (fmt != "xl")


def test_hvm():
    """An HVM image has no vCPU records; its last pfn is the highest one sent."""
    found = info(image(values=hvm_values(), guest_type=2))
    assert (found["nr_vcpus"], found["max_pfn"]) == (None, 2)
    assert info(image(values=hvm_values()[1:2], guest_type=2))["max_pfn"] is None


@pytest.mark.parametrize(
    ("tail", "expected"),
    [
        (b"", (0, None)),
        (GO_MESSAGE, (44, "go_message")),
        (b"x" * 44, (44, "unknown")),
        (GO_MESSAGE + b"x" * 3_000_000, (3_000_044, "unknown")),
    ],
)
def test_what_follows(tail, expected):
    """Bytes behind the image are counted, and xl's GO message is told from others."""
    found = info(image(tail=tail))
    assert (found["trailing_bytes"], found["trailing"]) == expected


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (b'{"a": [1]}', {"a": [1]}),
        (b"", ""),
        (b"not json", "not json"),
        (b"\xff", "\\xff"),
        (b"[" * 100_000, "[" * 100_000),
    ],
)
def test_any_configuration(config, expected):
    """A configuration that is no JSON is shown as text; none makes `info` fail."""
    assert info(image(config=config))["config"] == expected


def test_enormous_pfns_cost_nothing():
    """A pfn of 52 bits in an HVM image is counted, not allocated for."""
    values = [*hvm_values(), batch([2**52 - 1])]
    assert info(image(values=values, guest_type=2))["max_pfn"] == 2**52 - 1


def test_damage_is_an_error():
    """There is no answer about half an image."""
    with pytest.raises(ImageError):
        info(image()[:-9])


def test_cpuid_policy():
    """The policy is found at the beginning of an image; its absence and damage mean none."""
    leaf = np.arange(6, dtype="<u4").tobytes()
    values = [
        libxc.X86CpuidPolicy(leaf) if v.NAME == "X86_CPUID_POLICY" else v for v in pv_values()
    ]
    data = image(values=values)
    assert cpuid_policy(reader(data)) == leaf
    assert cpuid_policy(reader(data[: data.index(leaf) + 60])) == leaf
    assert cpuid_policy(reader(image(version=2))) == b""
    assert cpuid_policy(reader(data[:60])) == b""
