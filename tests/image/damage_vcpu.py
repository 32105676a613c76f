"""Damaged images: vCPU contexts and blobs, start_info, shared_info."""

from __future__ import annotations

import struct

from tests.image import synthetic as s
from tests.image.damage import added, pv, sample
from tests.image.pieces import index, replaced, twice
from xsave.image import libxc


def vcpu(number=0, **fields):
    """Return a PV image with fields of a vCPU's context replaced; `regs__rip` is user_regs.rip,
    `ctrlreg__3` and the like one element of an array."""
    image = s.PvImage()
    for name, value in fields.items():
        owner, _, part = name.replace("regs__", "user_regs__").partition("__")
        state = image.vcpus[number]
        if not part:
            setattr(state, owner, value)
        elif part.isdigit():
            getattr(state, owner)[int(part)] = value
        else:
            setattr(getattr(state, owner), part, value)
    return image.encode()


NOWHERE = s.direct(100_000)
NOT_CANONICAL = 0x8000_0000_0000_0000

#: rule -> name of the sample -> (vCPU, fields)
FIELDS = {
    "start-info": {
        "rdx_names_data": (0, {"regs__rdx": s.DATA}),
        "rdx_names_a_hole": (0, {"regs__rdx": 250}),
        "rdx_names_a_table": (0, {"regs__rdx": s.L4}),
        "rdx_out_of_range": (0, {"regs__rdx": 1 << 50}),
        "rdx_is_an_address": (0, {"regs__rdx": s.direct(s.START_INFO)}),
    },
    "vcpu-cr3": {
        "cr3_names_data": (0, {"ctrlreg__3": s.DATA << 12}),
        "cr3_names_an_l3_table": (1, {"ctrlreg__3": s.L3 << 12}),
        "cr3_out_of_range": (0, {"ctrlreg__3": 0x9999 << 12}),
    },
    "vcpu-cr1": {
        "cr1_names_data": (0, {"ctrlreg__1": s.DATA << 12 | 1}),
        "cr1_is_0_beside_a_user_table": (1, {"ctrlreg__1": 0}),
        "cr1_without_its_valid_bit": (0, {"ctrlreg__1": s.L4_USER << 12}),
    },
    "vcpu-gdt": {
        "gdt_is_empty": (0, {"gdt_ents": 0}),
        "gdt_too_long": (0, {"gdt_ents": 8000}),
        "gdt_frame_out_of_range": (1, {"gdt_frames__0": 1 << 60}),
        "gdt_frame_is_a_hole": (0, {"gdt_frames__0": 250}),
        "gdt_second_frame_missing": (0, {"gdt_ents": 1024, "gdt_frames__1": 250}),
    },
    "vcpu-canonical": {
        "rip_not_canonical": (0, {"regs__rip": NOT_CANONICAL}),
        "callback_not_canonical": (0, {"failsafe_callback_eip": NOT_CANONICAL}),
        "gs_base_user_not_canonical": (1, {"gs_base_user": NOT_CANONICAL}),
    },
    "vcpu-unmapped": {
        "rip_unmapped": (0, {"regs__rip": NOWHERE}),
        "rip_is_0": (1, {"regs__rip": 0}),
        "stack_unmapped": (0, {"regs__rsp": NOWHERE}),
        "event_callback_unmapped": (0, {"event_callback_eip": NOWHERE}),
        "syscall_callback_unmapped": (1, {"syscall_callback_eip": NOWHERE}),
    },
    "vcpu-flags": {
        "not_in_kernel": (0, {"flags": 0}),
        "not_in_kernel_but_online": (0, {"flags": 0x20}),
    },
    "vcpu-iopl": {"iopl_0": (0, {"regs__rflags": 0x202})},
    "vcpu-segments": {
        "cs_is_null": (0, {"regs__cs": 0}),
        "ss_is_null": (0, {"regs__ss": 3}),
        "cs_behind_the_gdt": (0, {"regs__cs": 0x103}),
    },
    "vcpu-rax": {"rax_is_1": (0, {"regs__rax": 1})},
    "vcpu-callbacks": {
        "no_event_callback": (0, {"event_callback_eip": 0}),
        "no_syscall_callback": (1, {"syscall_callback_eip": 0}),
    },
    "vcpu-gs-base": {"gs_base_kernel_is_0": (1, {"gs_base_kernel": 0})},
    "vcpu-cr4": {"cr4_without_osxsave": (0, {"ctrlreg__4": 0x10660})},
    "assists": {"no_writable_page_tables": (0, {"vm_assist": 0})},
}

for _rule, _samples in FIELDS.items():
    for _name, (_number, _fields) in _samples.items():

        def _make(number=_number, fields=_fields):
            return vcpu(number, **fields)

        _make.__name__ = _name
        sample(_rule)(_make)


@sample("vcpu-traps")
def no_trap_handler():
    image = s.PvImage()
    for trap in image.vcpus[0].trap_ctxt:
        trap.address = 0
    return image.encode()


@sample("vcpu-canonical")
def trap_handler_not_canonical():
    image = s.PvImage()
    image.vcpus[0].trap_ctxt[14].address = NOT_CANONICAL
    return image.encode()


@sample("vcpu-cr4")
def osxsave_without_record():
    return pv(xsave=[b"", s.xsave_blob()])


@sample("no-user-mode")
def unikernel():
    """No syscall entry, no user table; IOPL and GS base may be 0 then."""
    image = s.PvImage(1)
    image.config["b_info"]["max_vcpus"] = 1
    image.table(s.L4)[0] = 0
    state = image.vcpus[0]
    state.syscall_callback_eip = state.ctrlreg[1] = state.gs_base_kernel = 0
    state.trap_ctxt[0x80].address = 0
    state.user_regs.rflags = 0x202
    return image.encode()


@sample("vcpu-id")
def vcpu_id_too_high():
    return pv(added(libxc.X86PvVcpuExtended(9000, bytes(64))))


@sample("vcpu-id")
def vcpu_without_basic():
    return pv(
        lambda pieces: [
            piece for piece in pieces if piece.name != "X86_PV_VCPU_BASIC" or not piece.data[8]
        ]
    )


@sample("vcpu-id")
def vcpu_twice():
    return pv(lambda pieces: twice(pieces, "X86_PV_VCPU_MSRS"))


@sample("vcpu-size")
def context_of_the_other_width():
    record = libxc.X86PvVcpuBasic(0, bytes(2800)).encode()
    return pv(lambda pieces: replaced(pieces, "X86_PV_VCPU_BASIC", record))


@sample("vcpu-order")
def vcpus_in_descending_order():
    def edit(pieces):
        mine = [piece for piece in pieces if "VCPU" in piece.name]
        others = [piece for piece in pieces if "VCPU" not in piece.name]
        at = index(others, "END")
        return [*others[:at], *sorted(mine, key=lambda piece: -piece.data[8]), *others[at:]]

    return pv(edit)


def _xsave(**masks):
    return pv(xsave=[s.xsave_blob(**masks), s.xsave_blob()])


XSAVE = {
    "xcr0_not_within_accum": {"accum": 3, "area": 576, "bv": 3},
    "xcr0_without_x87": {"xcr0": 6},
    "ymm_without_sse": {"xcr0": 5, "accum": 5, "bv": 5},
    "area_too_small": {"area": 576},
    "area_missing": {"area": 0},
    "area_too_big": {"area": 1024},
    "compacted": {"xcomp": 1 << 63},
    "states_never_enabled": {"bv": 15},
    "header_not_zero": {"reserved": 1},
    "xcr0_without_accum": {"accum": 0, "area": 0},
}
for _name, _masks in XSAVE.items():

    def _make_xsave(masks=_masks):
        return _xsave(**masks)

    _make_xsave.__name__ = f"xsave_{_name}"
    sample("vcpu-xsave")(_make_xsave)


@sample("vcpu-extended")
def extended_of_another_vcpu():
    image = s.PvImage()
    image.extended[1].vcpu = 0
    return image.encode()


@sample("vcpu-extended")
def extended_too_short():
    return pv(extended=[bytes(16), bytes(64)])


@sample("vcpu-msrs")
def msr_that_xen_does_not_send():
    return pv(msrs=[struct.pack("<IIQ", 0x174, 0, 1)] * 2)


@sample("start-info-rings")
def store_mfn_left_as_it_was():
    image = s.PvImage()
    image.start_info.store_mfn = 0x13579
    return image.encode()


@sample("start-info-rings")
def console_page_is_a_hole():
    image = s.PvImage()
    image.start_info.console_mfn = 250
    return image.encode()


@sample("host-frames")
def shared_info_address_in_start_info():
    image = s.PvImage()
    image.start_info.shared_info = 0xBFDA7000
    return image.encode()


@sample("host-frames")
def frame_list_list_in_shared_info():
    image = s.PvImage()
    image.shared_info.arch.pfn_to_mfn_frame_list_list = 0x1367DC
    return image.encode()


@sample("upcall-mask")
def events_not_masked():
    image = s.PvImage()
    image.shared_info.vcpu_info[0].evtchn_upcall_mask = 0
    return image.encode()


@sample("shared-info")
def events_not_masked_on_vcpu_1():
    image = s.PvImage()
    image.shared_info.vcpu_info[1].evtchn_upcall_mask = 0
    return image.encode()


@sample("shared-info")
def max_pfn_of_another_guest():
    image = s.PvImage()
    image.shared_info.arch.max_pfn = 512
    return image.encode()
