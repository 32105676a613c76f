"""Disk specifications: xl's words for a disk, libxl's JSON, device numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xsave.errors import HostCannotTake, UsageError, XsaveError
from xsave.host.bootconfig import BootConfig
from xsave.host.disk.spec import DiskSpec, from_json, parse, parse_all
from xsave.host.disk.vdev import device_number

RW = DiskSpec("/a.img", "raw", "xvda", readonly=False)
RO = DiskSpec("/a.img", "qcow2", "xvdb", readonly=True)


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("/a.img,raw,xvda,w", RW),
        ("/a.img,raw,xvda,rw", RW),
        ("/a.img,raw,xvda", RW),
        ("/a.img,,xvda,", RW),
        ("/a.img, raw, xvda, w", RW),
        ("format=raw, vdev=xvda, access=rw, target=/a.img", RW),
        ("vdev=xvda,target=/a.img", RW),
        ("/a.img,raw,xvda,w,direct-io-safe,no-discard", RW),
        ("/a.img,raw,xvda,w,backendtype=qdisk", RW),
        ("/a.img,qcow2,xvdb,r", RO),
        ("/a.img,qcow2,xvdb,ro", RO),
        ("access=r,format=qcow2,vdev=xvdb,target=/a.img", RO),
        ("vdev=xvda,target=/a,b=c.img", DiskSpec("/a,b=c.img", "raw", "xvda", readonly=False)),
        ("/a.iso,,hdc:cdrom", DiskSpec("/a.iso", "raw", "hdc", readonly=True, cdrom=True)),
        ("/a.iso,,hdc,cdrom", DiskSpec("/a.iso", "raw", "hdc", readonly=True, cdrom=True)),
        ("/a.iso,,hdc,,devtype=cdrom", DiskSpec("/a.iso", "raw", "hdc", readonly=True, cdrom=True)),
    ],
)
def test_what_a_specification_means(text, spec):
    """By place and by name, with xl's defaults."""
    assert parse(text) == spec


def test_a_relative_path_is_made_absolute():
    """The image's configuration must mean the same file wherever it is read."""
    assert parse("a.img,raw,xvda,w").path == str(Path("a.img").absolute())


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "names no file"),
        (",raw,xvda,w", "names no file"),
        ("/a.img", "no virtual device"),
        ("/a.img,raw", "no virtual device"),
        ("/a.img,raw,nonsense,w", "'nonsense' is no virtual device"),
        ("/a.img,raw,hde,w", "'hde' is no virtual device"),
        ("/a.img,raw,sdq,w", "'sdq' is no virtual device"),
        ("/a.img,vmdk,xvda,w", "format 'vmdk': expected raw or qcow2"),
        ("/a.img,vhd,xvda,w", "format 'vhd'"),
        ("/a.img,raw,xvda,x", "access 'x'"),
        ("/a.img,raw,xvda,w,more", "'more' is one too many"),
        ("/a.img,raw,xvda,w,devtype=tape", "devtype 'tape'"),
        ("/a.img,raw,xvda,w,script=/x", "unknown setting 'script'"),
        ("/a.img,raw,xvda,w,backend=dom7", "only domain 0"),
        ("/a.img,raw,xvda,w,backendtype=ioemu", "only domain 0"),
        ("vdev=xvda,target=/a\0b", "a zero byte"),
    ],
)
def test_wrong_specifications(text, says):
    """One line each, that repeats what was written."""
    with pytest.raises(UsageError, match="disk ") as caught:
        parse(text)
    assert says in str(caught.value)


def test_two_disks_of_one_name():
    """xvda and its number are the same device."""
    with pytest.raises(UsageError, match="two disks"):
        parse_all(["/a,raw,xvda,w", "/b,raw,51712,w"])
    assert len(parse_all(["/a,raw,xvda,w", "/b,raw,xvdb,w"])) == 2


@pytest.mark.parametrize(
    ("vdev", "number"),
    [
        ("xvda", 51712), ("xvda1", 51713), ("xvdp15", 51967), ("xvdq", 268439552),
        ("xvdaa", 1 << 28 | 26 << 8), ("d0", 51712), ("d1p2", 51730), ("d16", 268439552),
        ("sda", 2048), ("sdb3", 2067), ("hda", 768), ("hdb", 832), ("hdc", 5632), ("hdd1", 5697),
        ("51712", 51712), ("0xca00", 51712), ("xvda16", 1 << 28 | 16),
        ("", None), ("xvd", None), ("xvda999", None), ("hde", None), ("hda64", None),
        ("sda16", None), ("d9999999", None), ("XVDA", None), ("0", None),
    ],
)  # fmt: skip
def test_device_numbers(vdev, number):
    """As docs/man/xen-vbd-interface counts them."""
    assert device_number(vdev) == number


@pytest.mark.parametrize("spec", [RW, RO, parse("/c.iso,,hdc,cdrom")])
def test_what_is_written_to_the_image_is_read(spec):
    """A disk survives the image's JSON, in libxl's words."""
    config = json.loads(BootConfig(disks=(spec,)).to_json("web"))
    assert from_json(config["disks"]) == (spec,)
    assert config["disks"][0]["pdev_path"] == spec.path
    assert config["disks"][0].get("readwrite", 0) == int(not spec.readonly)


def test_no_disks_no_word():
    """The configuration of a domain without is what it was before there were any."""
    assert "disks" not in json.loads(BootConfig().to_json("web"))


def test_an_empty_drive_is_no_disk():
    """A real xl's empty CD drive is left out."""
    assert from_json([{"vdev": "hdc", "format": "empty", "is_cdrom": 1, "removable": 1}]) == ()


@pytest.mark.parametrize(
    "disks",
    [
        {},
        [3],
        [{}],
        [{"pdev_path": "relative", "vdev": "xvda"}],
        [{"pdev_path": "/a", "vdev": "nonsense"}],
        [{"pdev_path": "/a", "vdev": 7}],
        [{"pdev_path": "/a\0", "vdev": "xvda"}],
        [{"pdev_path": "/a", "vdev": "xvda", "format": "vhd"}],
        [{"pdev_path": "/a", "vdev": "xvda", "format": ["raw"]}],
        [{"pdev_path": "/a", "vdev": "xvda"}, {"pdev_path": "/b", "vdev": "xvda"}],
    ],
)
def test_wrong_json(disks):
    """What an image says of disks and cannot be had is one error."""
    with pytest.raises(HostCannotTake):
        from_json(disks)


@given(st.text(max_size=60) | st.text("adefgmorstv12=,./ xr", max_size=40))
def test_any_text_is_a_disk_or_an_error(text):
    """Nothing else ever comes of it, and what comes survives the JSON."""
    try:
        spec = parse(text)
    except UsageError:
        return
    assert from_json([spec.to_json()]) == (spec,)


values = st.none() | st.booleans() | st.integers() | st.text(max_size=8) | st.just("/a")
keys = st.sampled_from(["pdev_path", "vdev", "format", "readwrite", "is_cdrom"])


@given(st.lists(st.dictionaries(keys, values) | values, max_size=3) | values)
def test_any_json_is_disks_or_an_error(disks):
    """Nothing else ever comes of it."""
    try:
        from_json(disks)
    except XsaveError as e:
        assert isinstance(e, HostCannotTake)
