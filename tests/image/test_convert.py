"""convert.py: one wrapping to another, and back."""

from __future__ import annotations

import numpy as np
import pytest

from tests.image.strategies import batch, hvm_values, image, pv_values
from xsave.errors import ImageError, UsageError
from xsave.image import libxl
from xsave.image.buffers import Zeros, reader
from xsave.image.convert import convert
from xsave.image.stream import StreamDecoder

FORMATS = ["xl", "libxl", "libxc"]


def converted(data, target="", **options):
    buffers = [b for bs in convert(StreamDecoder(reader(data)), target, **options) for b in bs]
    assert all(not isinstance(b, Zeros) or "zero_hint" in options for b in buffers)
    return b"".join(bytes(b.nbytes) if isinstance(b, Zeros) else bytes(b) for b in buffers)


@pytest.mark.parametrize("source", FORMATS)
@pytest.mark.parametrize("target", FORMATS)
def test_every_wrapping_to_every_other(source, target):
    """Conversion gives exactly the image that would have been written in that wrapping."""
    config = b"{}" if target == "xl" else None
    assert converted(image(source), target, config=config) == image(target)


def test_real_images_there_and_back(xen_image):
    """xl -> libxc -> xl is the same file, when it gets its configuration back."""
    data = xen_image("pv-micro-2cpu.img").read_bytes()
    config = next(iter(StreamDecoder(reader(data)))).value.config
    assert converted(converted(data, "libxc"), "xl", config=config) == data
    assert converted(data) == data


def test_xl_needs_a_configuration():
    """What has no configuration becomes no xl file without one."""
    with pytest.raises(UsageError, match="configuration"):
        converted(image("libxc"), "xl")


def test_a_configuration_needs_xl():
    """A configuration for a wrapping without place for it is refused, also by default."""
    for data, target in ((image("xl"), "libxl"), (image("libxc"), "")):
        with pytest.raises(UsageError, match="no place"):
            converted(data, target, config=b"{}")
    assert converted(image(), config=b'{"new":1}') == image(config=b'{"new":1}')


def test_emulator_state_is_not_dropped():
    """libxc has no place for what libxl says of the emulator."""
    end = libxl.LibxlEnd().encode()
    emulator = libxl.EmulatorContext(2, 0, b"qemu").encode()
    data = image(values=hvm_values(), guest_type=2).removesuffix(end) + emulator + end
    with pytest.raises(UsageError, match="EMULATOR_CONTEXT"):
        converted(data, "libxc")
    assert converted(data, "xl") == data


@pytest.mark.parametrize("guest_type", [1, 2])
def test_version_2_to_3(guest_type):
    """The static data end where version 2 implies it; the result is a sound version 3 stream."""
    values = pv_values(version=2) if guest_type == 1 else hvm_values()[2:]
    data = image(values=values, version=2, guest_type=guest_type)
    result = converted(data, stream_version=3)
    names = [item.value.NAME for item in StreamDecoder(reader(result))]
    behind = "X86_PV_P2M_FRAMES" if guest_type == 1 else "PAGE_DATA"
    assert names[names.index("STATIC_DATA_END") + 1] == behind
    assert names.count("STATIC_DATA_END") == 1
    assert len(result) == len(data) + 8
    assert converted(image(), stream_version=3) == image()


def test_tails():
    """What follows the image is kept, or dropped where that is asked for."""
    tail = b"t" * 3_000_000
    assert converted(image(tail=tail)) == image(tail=tail)
    assert converted(image(tail=tail), drop_tail=True) == image()


def zero_batches():
    some = batch(range(16), fill=1)
    some.pages.flags.writeable = True
    some.pages[2:8] = 0
    some.pages[9] = 0
    return [*pv_values(16)[:5], some, batch([1], [0xF]), *pv_values()[7:]]


@pytest.mark.parametrize("known", [None, [], [3, 4, 5, 9]])
def test_zero_pages_become_holes(known):
    """Long runs of zero pages are Zeros, with a hint from the file or by looking."""
    asked = []

    def hint(offset, nr_pages):
        asked.append((offset, nr_pages))
        if known is None:
            return None
        return np.isin(np.arange(nr_pages), known)

    data = image(values=zero_batches())
    assert converted(data, zero_hint=hint) == data
    decoder = StreamDecoder(reader(data))
    holes = [b for bs in convert(decoder, zero_hint=hint) for b in bs if isinstance(b, Zeros)]
    assert holes == [Zeros(6 * 4096)]
    assert data[asked[0][0] : asked[0][0] + 4096] == b"\x01" * 4096


def test_pages_the_hint_knows_are_not_looked_at():
    """A hint is believed: nobody reads a page of which the file says it is a hole."""
    data = image(values=[*pv_values(16)[:5], batch(range(16)), *pv_values()[7:]])
    result = converted(data, zero_hint=lambda _offset, nr_pages: np.ones(nr_pages, bool))
    assert bytes(16 * 4096) in result


def test_damage_is_an_error():
    """A cut image raises ImageError after the records before the cut."""
    with pytest.raises(ImageError):
        converted(image()[:-9], "libxc")
