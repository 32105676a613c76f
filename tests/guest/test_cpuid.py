"""CPUID: what a guest is told, and which promises of another host are noticed."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xsave.guest.xen import cpuid
from xsave.guest.xen.cpuid import NO_SUBLEAF, XEN_LEAVES, CpuPolicy, missing_features, parse_policy

LACKING = [(leaf, bit, name) for leaf, bits in cpuid._LACKING.items() for bit, name in bits.items()]


def ask(policy, leaf, subleaf=0, *, khz=1_000_000, osxsave=False):
    return policy.leaf(leaf, subleaf, khz=khz, osxsave=osxsave)


def record(*leaves):
    return b"".join(struct.pack("<6I", *leaf) for leaf in leaves)


def test_a_new_guest_sees_qemu64():
    """The default is what every x86-64 host can honour: SSE3, CMPXCHG16B and a hypervisor;
    nothing that this emulator, or the leaf-1 word of QEMU's qemu64, lacks."""
    policy = CpuPolicy.default()
    _, _, c, d = ask(policy, 1)
    assert c == 0x80002001
    assert d == 0x1789C3F5
    assert missing_features(policy.cpuid) == []
    assert ask(policy, 7) == (0, 0, 0, 0)
    assert struct.pack("<3I", *(ask(policy, 0)[i] for i in (1, 3, 2))) == b"AuthenticAMD"
    brand = b"".join(struct.pack("<4I", *ask(policy, 0x80000002 + i)) for i in range(3))
    assert brand.rstrip(b"\0").rstrip() == b"xsave emulated CPU"


def test_the_default_is_a_record():
    """The default policy is in record form: whole leaves, each once, up to the highest it names."""
    policy = CpuPolicy.default()
    assert len(policy.cpuid) % 24 == 0
    leaves = parse_policy(policy.cpuid)
    assert len(leaves) == len(policy.cpuid) // 24
    assert max(leaf for leaf, _ in leaves) == ask(policy, 0x80000000)[0]
    assert CpuPolicy(policy.cpuid, policy.msrs).leaf(1, 0, khz=1, osxsave=False) == ask(policy, 1)
    assert len(policy.msrs) % 16 == 0


@given(st.integers(0, (1 << 32) - 1), st.integers(0, (1 << 32) - 1), st.booleans())
def test_any_leaf_is_answered(leaf, subleaf, osxsave):
    """Every leaf has an answer of four 32-bit words; one that is not known is zero."""
    policy = CpuPolicy.default()
    answer = ask(policy, leaf, subleaf, osxsave=osxsave)
    assert len(answer) == 4
    assert all(0 <= word < 1 << 32 for word in answer)
    known = any(key[0] == leaf for key in parse_policy(policy.cpuid))
    if not known and not XEN_LEAVES <= leaf < XEN_LEAVES + 5:
        assert answer == (0, 0, 0, 0)


def test_subleaves():
    """A leaf with subleaves answers for those it has; one without answers for all."""
    policy = CpuPolicy(
        record((7, 0, 1, 2, 3, 4), (7, 1, 5, 6, 7, 8), (2, NO_SUBLEAF, 9, 9, 9, 9)), b""
    )
    assert ask(policy, 7, 0) == (1, 2, 3, 4)
    assert ask(policy, 7, 1) == (5, 6, 7, 8)
    assert ask(policy, 7, 2) == (0, 0, 0, 0)
    assert ask(policy, 2, 77) == (9, 9, 9, 9)


@pytest.mark.parametrize("promised", [0, cpuid.OSXSAVE])
@pytest.mark.parametrize("enabled", [False, True])
def test_osxsave_mirrors_cr4(promised, enabled):
    """Leaf 1's OSXSAVE says what the guest set in CR4, not what its policy holds."""
    policy = CpuPolicy(record((1, NO_SUBLEAF, 1, 2, promised | 5, 4)), b"")
    assert ask(policy, 1, osxsave=enabled) == (1, 2, 5 | (cpuid.OSXSAVE if enabled else 0), 4)


def test_xens_own_leaves():
    """XenVMM, version 4.17, and the TSC frequency: nothing of this host."""
    policy = CpuPolicy.default()
    top, *signature = ask(policy, XEN_LEAVES)
    assert struct.pack("<3I", *signature) == b"XenVMMXenVMM"
    assert top == XEN_LEAVES + 4
    assert ask(policy, XEN_LEAVES + 1)[0] == 4 << 16 | 17
    assert ask(policy, XEN_LEAVES + 3, 0, khz=2_400_000)[2] == 2_400_000
    assert ask(policy, XEN_LEAVES + 3, 1) == ask(policy, XEN_LEAVES + 0xFF) == (0, 0, 0, 0)
    assert ask(policy, XEN_LEAVES + 0x100) == (0, 0, 0, 0)


@pytest.mark.parametrize(("leaf", "bit", "name"), LACKING)
def test_each_promise_this_cpu_cannot_keep_is_named(leaf, bit, name):
    """A policy that promises one thing the emulator lacks is told by exactly that name."""
    number, subleaf, register = leaf
    words = [0, 0, 0, 0]
    words[register] = 1 << bit
    assert missing_features(record((number, subleaf, *words))) == [name]
    words[register] = ((1 << 32) - 1) & ~(1 << bit)
    assert name not in missing_features(record((number, subleaf, *words)))


def test_names_are_told_apart():
    """No two promises have one name, so a message says what is missing."""
    names = [name for _, _, name in LACKING]
    assert len(set(names)) == len(names)
    everything = record(*((leaf, sub, *[0xFFFFFFFF] * 4) for leaf, sub, _ in cpuid._LACKING))
    assert missing_features(everything) == names


@given(st.binary(max_size=200))
def test_any_bytes_are_a_policy(content):
    """Whole leaves are read, a rest is ignored, and nothing is raised for any bytes."""
    leaves = parse_policy(content)
    assert len(leaves) <= len(content) // 24
    assert all(len(leaf) == 4 for leaf in leaves.values())
    missing_features(content)
    CpuPolicy(content, b"").leaf(1, 0, khz=1, osxsave=True)
