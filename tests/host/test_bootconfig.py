"""The configuration a domain is started again from: what is written is read, anything else is
one error or a default."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xsave.errors import HostCannotTake
from xsave.host.bootconfig import (
    ACTIONS,
    DEFAULT_ACTIONS,
    DESTROY,
    PRESERVE,
    RESTART,
    BootConfig,
    action_on,
    read,
)

MIB = 1 << 20
KERNEL = BootConfig(
    kernel="/boot/vmlinuz",
    ramdisk="/boot/initrd",
    cmdline='console=hvc0 a="b c"',
    memory_bytes=128 * MIB,
    max_memory_bytes=256 * MIB,
    vcpus=2,
)


@pytest.mark.parametrize("boot", [KERNEL, BootConfig(), BootConfig(cmdline="seed=3", vcpus=4)])
def test_what_is_written_is_read(boot):
    """A domain is started again with what it was created with."""
    assert read(boot.to_json("web")) == boot


def test_what_a_real_xl_writes():
    """Older libxl kept the kernel with the type; numbers and actions are the same."""
    config = {
        "c_info": {"type": "pv", "name": "x"},
        "b_info": {
            "max_memkb": 65536,
            "target_memkb": 65536,
            "type.pv": {"kernel": "/k", "cmdline": "c", "ramdisk": "/r"},
        },
        "on_crash": "coredump_restart",
        "on_poweroff": "preserve",
    }
    text = json.dumps(config).encode()
    boot = read(text)
    assert (boot.kernel, boot.ramdisk, boot.cmdline, boot.vcpus) == ("/k", "/r", "c", 1)
    assert action_on(text, "crash") == RESTART
    assert action_on(text, "poweroff") == PRESERVE
    assert action_on(text, "reboot") == RESTART


@pytest.mark.parametrize("event", DEFAULT_ACTIONS)
@pytest.mark.parametrize("config", [b"", b"[]", b"{", b'{"on_crash": 3, "on_poweroff": "dance"}'])
def test_actions_default_to_libxl(event, config):
    """What nobody said, or what nobody knows, is what libxl does: only a reboot begins again."""
    assert action_on(config, event) == (RESTART if event == "reboot" else DESTROY)


def test_actions_are_written():
    """The actions travel under libxl's names."""
    text = BootConfig(actions={"crash": PRESERVE, "reboot": DESTROY}).to_json("g")
    assert json.loads(text)["on_reboot"] == DESTROY
    assert action_on(text, "crash") == PRESERVE
    assert action_on(text, "reboot") == DESTROY


def test_available_vcpus():
    """Those in use are read again as they were written: all, unless some are not."""
    some = BootConfig(kernel="/k", vcpus=4, available_vcpus=(0, 1))
    assert read(some.to_json("g")).available_vcpus == (0, 1)
    assert read(BootConfig(kernel="/k", vcpus=2).to_json("g")).available_vcpus is None
    assert read(b'{"b_info": {"kernel": "/k", "target_memkb": 4096}}').available_vcpus is None


def test_uuids():
    """A uuid is kept if given, follows from the seed of a deterministic guest, else is new."""

    def uuid_of(boot, **options):
        return json.loads(boot.to_json("g", **options))["c_info"]["uuid"]

    twin = BootConfig(deterministic=5)
    assert uuid_of(twin) == uuid_of(twin)
    assert uuid_of(KERNEL) != uuid_of(KERNEL)
    assert uuid_of(KERNEL, domain_uuid="u") == "u"


@pytest.mark.parametrize(
    ("b_info", "says"),
    [
        ({}, "names no kernel"),
        ({"kernel": 7}, "names no kernel"),
        ({"kernel": "a\0b"}, "names no kernel"),
        ({"kernel": "/k"}, "0 KiB"),
        ({"kernel": "/k", "target_memkb": -5}, "0 KiB"),
        ({"kernel": "/k", "target_memkb": 1e300}, "0 KiB"),
        ({"kernel": "/k", "target_memkb": 4096, "max_vcpus": 33}, "33 vCPUs"),
        ({"kernel": "/k", "target_memkb": 4096, "max_vcpus": 0}, "0 vCPUs"),
    ],
)
def test_what_does_not_say_how(b_info, says):
    """A configuration from anywhere that lacks the kernel or sane numbers is refused."""
    with pytest.raises(HostCannotTake, match=says):
        read(json.dumps({"b_info": b_info}).encode())


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
)
keys = st.sampled_from(
    ["kernel", "ramdisk", "cmdline", "target_memkb", "max_memkb", "max_vcpus", "type.pv"]
)
configs = st.fixed_dictionaries(
    {},
    optional={
        "b_info": st.dictionaries(keys, json_values) | json_values,
        "xsave": json_values,
        "on_crash": json_values,
    },
)


@given(configs | json_values)
def test_any_configuration(config):
    """Any JSON is a way to begin, with paths, text and bounded numbers, or HostCannotTake; its
    actions are ones we know."""
    text = json.dumps(config).encode()
    assert action_on(text, "crash") in ACTIONS
    try:
        boot = read(text)
    except HostCannotTake:
        return
    assert boot.kernel_path
    assert isinstance(boot.cmdline, str)
    assert 4096 <= boot.memory_bytes <= boot.max_memory_bytes
    assert 1 <= boot.vcpus <= 32
