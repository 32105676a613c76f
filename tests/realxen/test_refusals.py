"""What a real Xen refuses, xsave refuses; both messages stand in the report."""

from __future__ import annotations

import re
import struct

import pytest

from tests.realxen.travelling import Journey, builtin, once_more

_RECORD_TYPES = {"END": 0, "X86_PV_P2M_FRAMES": 3, "X86_PV_VCPU_BASIC": 4, "STATIC_DATA_END": 0x10}


@pytest.fixture(scope="module")
@once_more
def image(real_xens, tmp_path_factory):
    """One image of the real xl's, as bytes."""
    from tests.conftest import Xsave, end_processes, make_home

    home = make_home()
    journey = Journey(Xsave(home), real_xens, tmp_path_factory.mktemp("image"), "refused")
    journey.create_there(builtin(), 1)
    content = journey.save_there().read_bytes()
    journey.clean_up()
    end_processes(home)
    return content


def libxc_at(image):
    """Return where the libxc stream begins: at its marker, eight bytes of ones."""
    return image.index(b"\xff" * 8 + b"XENF")


def record_at(image, wanted):
    """Return where the first record of a type begins."""
    at = libxc_at(image) + 24 + 16
    while True:
        kind, length = struct.unpack_from("<II", image, at)
        if kind == wanted:
            return at
        at += 8 + -(-length // 8) * 8


def changed(image, at, data):
    return image[:at] + data + image[at + len(data) :]


def without(image, wanted):
    at = record_at(image, wanted)
    length = struct.unpack_from("<I", image, at + 4)[0]
    return image[:at] + image[at + 8 + -(-length // 8) * 8 :]


DAMAGES = {
    "cut in the middle": lambda image: image[: len(image) // 2],
    "another libxc version": lambda image: changed(image, libxc_at(image) + 12, b"\0\0\0\x09"),
    "an unknown mandatory record": lambda image: changed(
        image, record_at(image, _RECORD_TYPES["STATIC_DATA_END"]), b"\x55\0\0\0"
    ),
    "no vCPU": lambda image: without(image, _RECORD_TYPES["X86_PV_VCPU_BASIC"]),
    "no p2m": lambda image: without(image, _RECORD_TYPES["X86_PV_P2M_FRAMES"]),
}


@once_more
@pytest.mark.parametrize("damage", DAMAGES)
def test_both_refuse(xsave, real_xens, image, tmp_path, damage, record_property):
    """A damaged image is refused by the real xl and by xsave, whose message is one line with an
    offset; nothing is left of the domain here."""
    real_xen = real_xens.running()
    path = tmp_path / "damaged.img"
    path.write_bytes(DAMAGES[damage](image))
    (real_xen.share / "in.img").write_bytes(path.read_bytes())
    status, theirs = real_xen.run("xl restore /host/in.img")
    complaints = [line for line in theirs.splitlines() if "error" in line.lower()]
    ours = xsave("restore", path)
    record_property("xl restore", complaints[0] if complaints else theirs[-300:])
    record_property("xsave restore", ours.err.strip())
    print(f"{damage}\n  xl {real_xen.version}: {complaints[:1] or theirs[-300:]}")
    print(f"  xsave: {ours.err.strip()}")
    assert status != 0, theirs
    assert ours.code == 3, ours.err
    assert re.fullmatch(r"xsave: error: .*offset .*", ours.err.strip()), ours.err
    assert xsave.json("list") == []
    real_xen.run("xl destroy refused")
