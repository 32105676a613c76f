"""Xen's own verifier and ours agree on what both of them look at."""

from __future__ import annotations

import pytest

from tests.image import damage_host, damage_stream
from tests.image.pieces import patched
from tests.image.synthetic import PvImage
from tests.image.synthetic_kinds import HvmImage, Pv32Image
from xsave.image import libxc
from xsave.image.buffers import reader
from xsave.image.stream import StreamDecoder, StreamEncoder
from xsave.image.verify import verify

WRAPPINGS = ("xl", "libxl", "libxc")
KINDS = {
    "pv": PvImage,
    "pv-32": Pv32Image,
    "hvm": HvmImage,
    "pvh": lambda: HvmImage(pvh=True),
}


def errors_of(data):
    return [finding for finding in verify(reader(data)) if finding.severity == "error"]


@pytest.fixture
def judge(xen_verify, tmp_path):
    """Give bytes to Xen's verifier: `judge(data, wrapping) -> (exit status, output)`."""

    def run(data, wrapping="xl"):
        path = tmp_path / "image"
        path.write_bytes(data)
        return xen_verify(path, wrapping)

    return run


@pytest.mark.parametrize("wrapping", WRAPPINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_accepts_sound_images(judge, kind, wrapping):
    """The synthetic images are images to Xen as well, in all three wrappings."""
    data = KINDS[kind]().encode(wrapping)
    status, output = judge(data, wrapping)
    assert status == 0, output
    assert errors_of(data) == []


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_accepts_what_the_encoder_writes(judge, wrapping):
    """Headers, batches and trailer as the flows write them are accepted."""
    batch = PvImage().page_batch(PvImage().types.nonzero()[0])
    values = [libxc.X86PvInfo(8, 4), libxc.StaticDataEnd(), libxc.Verify()]
    data = StreamEncoder.headers(wrapping, b"{}")
    data += b"".join(StreamEncoder.record(value) for value in values)
    data += StreamEncoder.page_data_header(batch.pfns, batch.types) + batch.pages.tobytes()
    status, output = judge(data + StreamEncoder.trailer(wrapping), wrapping)
    assert status == 0, output


def test_accepts_decoded_and_encoded(judge):
    """An image taken apart and put together again is accepted, and it is the same."""
    data = PvImage().encode()
    again = b"".join(StreamEncoder.record(i.value) for i in StreamDecoder(reader(data)))
    assert again == data
    assert judge(again)[0] == 0


BOTH_REFUSE = {
    "cut_off": damage_stream.cut_off,
    "cut_in_the_last_record": damage_stream.cut_in_the_last_record,
    "unknown_mandatory_record": damage_stream.unknown_mandatory_record,
    "wrong_page_type": damage_stream.wrong_page_type,
    "something_else": damage_stream.something_else,
    "xl_magic": lambda: PvImage().encode(edit=lambda p: patched(p, "xl header", 3, b"?")),
    "libxl_ident": lambda: PvImage().encode(edit=lambda p: patched(p, "libxl header", 0, b"?")),
    "libxl_version": lambda: PvImage().encode(edit=lambda p: patched(p, "libxl header", 11, b"9")),
    "image_marker": lambda: PvImage().encode(edit=lambda p: patched(p, "image header", 0, b"?")),
    "image_version": lambda: PvImage().encode(edit=lambda p: patched(p, "image header", 15, b"9")),
    "domain_type": lambda: PvImage().encode(edit=lambda p: patched(p, "domain header", 0, b"9")),
    "page_shift": lambda: PvImage().encode(edit=lambda p: patched(p, "domain header", 4, b"\15")),
    "pv_info": lambda: PvImage().encode(edit=lambda p: patched(p, "X86_PV_INFO", 8, b"\6")),
    "batch_count": lambda: PvImage().encode(edit=lambda p: patched(p, "PAGE_DATA", 8, b"\1")),
    "record_length": lambda: PvImage().encode(edit=lambda p: patched(p, "SHARED_INFO", 4, b"\1")),
    "params_count": lambda: HvmImage().encode(edit=lambda p: patched(p, "HVM_PARAMS", 8, b"\1")),
    "unknown_emulator": damage_host.unknown_emulator,
}


@pytest.mark.parametrize("name", BOTH_REFUSE)
def test_both_refuse(judge, name):
    """What Xen's verifier refuses, ours does not let pass."""
    data = BOTH_REFUSE[name]()
    assert judge(data)[0] == 1
    assert errors_of(data)


ONLY_WARNED = {
    "domain_reserved": damage_stream.reserved_field_of_the_domain_header,
    "batch_reserved": damage_stream.reserved_bits_of_a_batch_entry,
    "padding": damage_stream.padding_not_zero,
}


@pytest.mark.parametrize("name", ONLY_WARNED)
def test_reserved_fields(judge, name):
    """Reserved fields that Xen's verifier refuses and Xen's restore ignores are warnings here."""
    data = ONLY_WARNED[name]()
    assert judge(data)[0] == 1
    assert [finding.severity for finding in verify(reader(data))] == ["warning"]


SEEN_HERE_ONLY = {
    "order": damage_stream.pages_before_static_data_end,
    "missing": damage_stream.no_shared_info,
    "tail": damage_stream.junk_behind_the_end,
    "config": damage_host.config_is_no_json,
}


@pytest.mark.parametrize("name", SEEN_HERE_ONLY)
def test_seen_here_only(judge, name):
    """Order, completeness, what follows and the configuration are beyond Xen's verifier."""
    data = SEEN_HERE_ONLY[name]()
    assert judge(data)[0] == 0
    assert errors_of(data)
