"""Damaged images: CPU policies, configuration, emulator, HVM."""

from __future__ import annotations

import struct

from tests.image import synthetic as s
from tests.image import synthetic_kinds as kinds
from tests.image.damage import added, pv, sample
from tests.image.pieces import index, moved, replaced, without
from xsave.image import libxc, libxl


@sample("policy-refused")
def msr_policy_with_flags():
    return pv(msr_policy=[(0xCE, 1, 0)])


@sample("policy-refused")
def cpuid_policy_too_long():
    return pv(cpuid=[(i, 0, 0, 0, 0, 0) for i in range(5000)])


@sample("policy")
def msr_policy_with_an_unknown_msr():
    return pv(msr_policy=[(0x10, 0, 0)])


@sample("policy")
def cpuid_leaves_not_sorted():
    return pv(cpuid=[s.CPUID[1], s.CPUID[0], *s.CPUID[2:]])


@sample("no-policy")
def no_cpuid_policy():
    return pv(lambda pieces: without(pieces, "X86_CPUID_POLICY"))


@sample("policy-late")
def policy_behind_static_data_end():
    return pv(lambda pieces: moved(pieces, "X86_CPUID_POLICY", "X86_PV_P2M_FRAMES"))


def _config(change):
    image = s.PvImage()
    change(image.config)
    return image.encode()


CONFIGS = {
    "config_without_name": lambda config: config["c_info"].pop("name"),
    "config_of_another_guest_type": lambda config: config["c_info"].update(type="hvm"),
    "config_without_a_type_to_build": lambda config: config["b_info"].pop("type.pv"),
    "config_with_too_few_vcpus": lambda config: config["b_info"].update(max_vcpus=1),
    "config_with_too_little_memory": lambda config: config["b_info"].update(
        max_memkb=-200, target_memkb=-200
    ),
    # xl mem-set to less than a guest without a balloon driver has: a real Xen refuses the restore.
    "config_with_too_low_a_target": lambda config: config["b_info"].update(target_memkb=-200),
    "config_without_parts": lambda config: config.clear(),
}
for _name, _change in CONFIGS.items():

    def _make_config(change=_change):
        return _config(change)

    _make_config.__name__ = _name
    sample("config")(_make_config)


@sample("config")
def config_is_no_json():
    image = s.PvImage()
    text = image.pieces()[0].data.replace(b'"c_info"', b"'c_info'")
    return image.encode(edit=lambda pieces: replaced(pieces, "xl header", text))


@sample("config")
def config_is_no_object():
    image = s.PvImage()
    image.config = [1, 2]
    return image.encode()


@sample("config")
def emulator_of_a_pvh_guest():
    image = kinds.HvmImage(pvh=True)
    return image.encode(edit=added(libxl.EmulatorContext(2, 0, b"QEVM"), before="libxl END"))


@sample("no-config")
def no_config():
    def edit(pieces):
        old = pieces[index(pieces, "xl header")].data
        return replaced(pieces, "xl header", old[:44] + bytes(4))

    return pv(edit)


@sample("emulator")
def unknown_emulator():
    dirty = libxl.EmulatorContext(9, 0, b"QEVM").encode()
    return kinds.HvmImage().encode(edit=lambda pieces: replaced(pieces, "EMULATOR_CONTEXT", dirty))


def _hvm(**attributes):
    image = kinds.HvmImage()
    for name, value in attributes.items():
        setattr(image, name, value)
    return image.encode()


HVM = {
    "emulator": {
        "xenstore_data_without_nul": {"xenstore_data": b"physmap/1/name\0ram"},
        "xenstore_key_without_value": {"xenstore_data": b"physmap/1/name\0"},
        "xenstore_data_without_end_of_strings": {"xenstore_data": b"a\0" * 70_000},
        "xenstore_key_not_relative": {"xenstore_data": b"/physmap\0ram\0"},
    },
    "hvm-context": {
        "context_without_end": {"context": [(1, 0, kinds.hvm_header()), (2, 0, bytes(8))]},
        "context_without_cpu": {"context": [(1, 0, kinds.hvm_header()), (0, 0, b"")]},
        "context_without_header": {"context": [(2, 0, bytes(1032)), (0, 0, b"")]},
        "context_with_wrong_magic": {
            "context": [(1, 0, kinds.hvm_header(1)), (2, 0, bytes(8)), (0, 0, b"")]
        },
        "context_without_end_of_entries": {
            "context": [(1, 0, kinds.hvm_header())] + [(2, 0, b"")] * 70_000
        },
        "context_behind_end": {
            "context": [(1, 0, kinds.hvm_header()), (2, 0, b""), (0, 0, b""), (2, 0, b"")]
        },
        "end_with_content": {
            "context": [(1, 0, kinds.hvm_header()), (2, 0, b""), (0, 0, bytes(8))]
        },
    },
    "hvm-params": {
        "param_twice": {"params": [(1, s.STORE), (17, s.CONSOLE), (17, s.CONSOLE)]},
        "store_page_not_in_the_image": {"params": [(1, 0xFEFFC), (17, s.CONSOLE)]},
    },
    "hvm-sparse": {"no_console_param": {"params": [(1, s.STORE)]}},
}
for _rule, _hvm_samples in HVM.items():
    for _name, _attributes in _hvm_samples.items():

        def _make_hvm(attributes=_attributes):
            return _hvm(**attributes)

        _make_hvm.__name__ = _name
        sample(_rule)(_make_hvm)


@sample("hvm-context")
def context_entry_too_long():
    content = struct.pack("<HHI", 1, 0, 1 << 31)
    record = libxc.HvmContext(content).encode()
    return kinds.HvmImage().encode(edit=lambda pieces: replaced(pieces, "HVM_CONTEXT", record))


@sample("hvm-sparse")
def no_hvm_params():
    return kinds.HvmImage().encode(edit=lambda pieces: without(pieces, "HVM_PARAMS"))
