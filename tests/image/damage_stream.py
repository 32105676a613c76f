"""Damaged images: framing, order, reserved fields, what follows, where it came from."""

from __future__ import annotations

import struct

from tests.image import synthetic as s
from tests.image import synthetic_kinds as kinds
from tests.image.damage import added, pv, sample
from tests.image.pieces import Piece, index, moved, patched, replaced, twice, without
from xsave.image import libxc, libxl
from xsave.image.stream import GO_MESSAGE


@sample("damaged")
def cut_off():
    return pv()[:-100_000]


@sample("damaged")
def cut_in_the_last_record():
    return pv()[:-4]


@sample("damaged")
def unknown_mandatory_record():
    return pv(added(libxc.Unknown(0x55, b"")))


@sample("damaged")
def wrong_page_type():
    return pv(lambda pieces: patched(pieces, "PAGE_DATA", 16 + 7, b"\x50"))


@sample("damaged")
def nothing_at_all():
    return b""


@sample("damaged")
def something_else():
    return bytes(range(256))


@sample("order")
def pages_before_static_data_end():
    return pv(lambda pieces: moved(pieces, "PAGE_DATA", "STATIC_DATA_END"))


@sample("order")
def second_pv_info():
    return pv(lambda pieces: twice(pieces, "X86_PV_INFO"))


@sample("order")
def no_static_data_end():
    return pv(lambda pieces: without(pieces, "STATIC_DATA_END"))


@sample("order")
def no_pv_info():
    return pv(lambda pieces: without(pieces, "X86_PV_INFO"))


@sample("order")
def no_p2m_frames():
    return pv(lambda pieces: without(pieces, "X86_PV_P2M_FRAMES"))


@sample("order")
def no_vcpus():
    names = ("BASIC", "EXTENDED", "XSAVE", "MSRS")

    def edit(pieces):
        for name in names:
            pieces = without(pieces, f"X86_PV_VCPU_{name}")
        return pieces

    return pv(edit)


@sample("order")
def hvm_record_in_pv_guest():
    return pv(added(libxc.HvmParams(((1, 2),))))


@sample("order")
def emulator_of_a_pv_guest():
    return pv(added(libxl.EmulatorContext(2, 0, b"QEVM"), before="libxl END"))


@sample("missing-record")
def no_shared_info():
    return pv(lambda pieces: without(pieces, "SHARED_INFO"))


@sample("missing-record")
def no_vcpu_0():
    image = s.PvImage()
    return image.encode(
        edit=lambda pieces: [
            piece for piece in pieces if "VCPU" not in piece.name or piece.data[8:12] != bytes(4)
        ]
    )


@sample("missing-record")
def no_hvm_context():
    return kinds.HvmImage().encode(edit=lambda pieces: without(pieces, "HVM_CONTEXT"))


@sample("tail")
def junk_behind_the_end():
    return pv(tail=b"junk")


@sample("tail")
def junk_behind_the_go_message():
    return pv(tail=GO_MESSAGE + b"\0")


@sample("go-message")
def recorded_migration():
    return pv(tail=GO_MESSAGE)


@sample("unknown-optional")
def unknown_optional_record():
    return pv(added(libxc.Unknown(0x8000_0042, b"?")))


@sample("checkpointed")
def checkpointed_stream():
    def edit(pieces):
        records = [libxc.Checkpoint(), libxl.CheckpointEnd()]
        at = index(pieces, "END")
        return pieces[:at] + [Piece(r.NAME, r.encode()) for r in records] + pieces[at:]

    return pv(edit)


@sample("reserved")
def reserved_field_of_the_domain_header():
    return pv(lambda pieces: patched(pieces, "domain header", 6, b"\1"))


@sample("reserved")
def reserved_option_of_the_image_header():
    return pv(lambda pieces: patched(pieces, "image header", 16, b"\x80"))


@sample("reserved")
def reserved_bits_of_a_batch_entry():
    return pv(lambda pieces: patched(pieces, "PAGE_DATA", 16 + 6, b"\x10"))


@sample("reserved")
def reserved_field_of_an_msr():
    return pv(msrs=[struct.pack("<IIQ", 0x48, 1, 1)] * 2)


@sample("padding")
def padding_not_zero():
    dirty = libxl.EmulatorContext(2, 0, b"QEVM", padding=b"\0\0\1\0").encode()
    return kinds.HvmImage().encode(edit=lambda pieces: replaced(pieces, "EMULATOR_CONTEXT", dirty))


@sample("tsc-mode")
def unknown_tsc_mode():
    return pv(tsc=libxc.X86TscInfo(9, 0, 0, 0))


@sample("no-tsc")
def no_tsc_info():
    return pv(lambda pieces: without(pieces, "X86_TSC_INFO"))


@sample("version-2")
def stream_of_an_old_xen():
    return pv(version=2)


@sample("legacy")
def stream_of_the_converter():
    return pv(lambda pieces: patched(pieces, "domain header", 8, struct.pack("<II", 0, 1)))
