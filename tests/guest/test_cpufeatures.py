"""Instructions that a guest's CPUID policy does not promise: its CPU does not have them."""

from __future__ import annotations

import struct

import pytest

from tests.guest.rig import Guest
from tests.guest.test_user_space import Process
from xsave.guest.xen import cpufeatures
from xsave.guest.xen.cpufeatures import CpuFeatures
from xsave.guest.xen.cpuid import NO_SUBLEAF, CpuPolicy
from xsave.guest.xen.cpuregs import UnsupportedEmulator
from xsave.guest.xen.vcpu import CR4_FSGSBASE, CR4_OSXSAVE

LEAF1, LEAF7, XSAVE_1 = (0x1, NO_SUBLEAF, 2), (0x7, 0, 1), (0xD, 1, 0)
EXTENDED_C, EXTENDED_D = (0x80000001, NO_SUBLEAF, 2), (0x80000001, NO_SUBLEAF, 3)
#: Name -> instruction, and the feature bits that together make it one.
OPTIONAL = {
    "rdrand": (b"\x0f\xc7\xf0", [(LEAF1, 30)]),
    "rdseed": (b"\x48\x0f\xc7\xf8", [(LEAF1, 30)]),
    "ssse3": (b"\x66\x0f\x38\x00\xc1", [(LEAF1, 9)]),  # pshufb
    "sse4.1": (b"\x66\x0f\x38\x17\xc1", [(LEAF1, 19)]),  # ptest
    "sse4.2": (b"\xf2\x0f\x38\xf1\xc1", [(LEAF1, 20)]),  # crc32
    "movbe": (b"\x0f\x38\xf0\x07", [(LEAF1, 22)]),
    "popcnt": (b"\xf3\x0f\xb8\xc1", [(LEAF1, 23)]),
    "aes": (b"\x66\x0f\x38\xdc\xc1", [(LEAF1, 25)]),  # aesenc
    "pclmul": (b"\x66\x0f\x3a\x44\xc1\x00", [(LEAF1, 1)]),
    "xgetbv": (b"\x0f\x01\xd0", [(LEAF1, 26)]),
    "xsave": (b"\x0f\xae\x27", [(LEAF1, 26)]),
    "xrstor": (b"\x0f\xae\x2f", [(LEAF1, 26)]),
    "xsaveopt": (b"\x0f\xae\x37", [(LEAF1, 26), (XSAVE_1, 0)]),
    "rdfsbase": (b"\xf3\x0f\xae\xc0", [(LEAF7, 0)]),
    "wrgsbase": (b"\xf3\x48\x0f\xae\xd8", [(LEAF7, 0)]),
    "andn": (b"\xc4\xe2\x70\xf2\xc2", [(LEAF7, 3)]),  # BMI1
    "mulx": (b"\xc4\xe2\x73\xf6\xc2", [(LEAF7, 8)]),  # BMI2
    "rdtscp": (b"\x0f\x01\xf9", [(EXTENDED_D, 27)]),
}
NOWHERE = {
    "clac": b"\x0f\x01\xca", "stac": b"\x0f\x01\xcb", "monitor": b"\x0f\x01\xc8",
    "mwait": b"\x0f\x01\xc9", "clwb": b"\x66\x0f\xae\x37", "adcx": b"\x66\x0f\x38\xf6\xc1",
    "pfadd": b"\x0f\x0f\xc1\x9e", "rdpkru": b"\x0f\x01\xee", "xsavec": b"\x0f\xc7\x27",
    "vmcall": b"\x0f\x01\xc1", "vmovups ymm": b"\xc5\xfc\x10\xc1",
}  # fmt: skip


def policy(bits):
    """The default policy and more bits of it."""
    leaves = dict(CpuPolicy.default().leaves)
    for (leaf, subleaf, register), bit in bits:
        words = list(leaves.get((leaf, subleaf), (0, 0, 0, 0)))
        words[register] |= 1 << bit
        leaves[leaf, subleaf] = tuple(words)
    body = b"".join(struct.pack("<6I", *key, *words) for key, words in leaves.items())
    return CpuPolicy(body, b"")


def executes(machine, code, bits, *, in_kernel=True, cs=0xE033):
    """Run an instruction on a CPU with these features; True unless it is an invalid opcode."""
    guest = Guest(machine)
    invalid = guest.set_handler(6)
    guest.domain.policy = policy(bits)
    guest.vcpu.context.ctrlreg[4] |= CR4_FSGSBASE | CR4_OSXSAVE
    guest.poke(3, 0, bytes(576))
    guest.vcpu.context.fpu_ctxt[24] = 0  # no exception of any instruction's is masked
    if in_kernel:
        at = guest.run(code, rdi=guest.va(3), rcx=0, rax=0, rdx=0)
        end = guest.va(0, len(code))
    else:
        process = Process(guest)
        end = guest.va(6)
        guest.poke(6, 0, b"\x0f\x05")
        guest.stops.add(end)
        guest.vcpu.context.syscall_callback_eip = end
        at = process.run(code + b"\x0f\x05", cs=cs, rdi=guest.va(8), rcx=0)
    assert at in (end, invalid)
    if at == invalid:  # a fault: the frame has the instruction's own address
        assert guest.stacked(3)[2] == guest.va(0 if in_kernel else 7)
    return at == end


@pytest.mark.parametrize("name", OPTIONAL)
@pytest.mark.parametrize("in_kernel", [True, False])
def test_what_is_not_promised_is_invalid(machine, name, in_kernel):
    """An instruction works with its features, and is #UD without any one of them."""
    code, bits = OPTIONAL[name]
    assert executes(machine, code, bits, in_kernel=in_kernel)
    for missing in bits:
        others = [bit for bit in bits if bit != missing]
        assert not executes(machine, code, others, in_kernel=in_kernel)


def test_rdrand_says_nothing_of_the_host(machine):
    """The default policy has none, so a program that executes it all the same changes nothing."""
    guest = Guest(machine)
    guest.set_handler(6)
    guest.run(b"\x48\x0f\xc7\xf0", rax=0x1234)
    assert guest.hv.q[0] == 0x1234


@pytest.mark.parametrize("name", NOWHERE)
def test_what_no_guest_has(machine, name):
    """These are invalid whatever is promised."""
    everything = [bits[0] for _, bits in OPTIONAL.values()]
    assert not executes(machine, NOWHERE[name], everything, in_kernel=False)


def test_a_second_vcpu_has_the_same(machine):
    """A vCPU's state is loaded by a CPU that has everything; its guest finds only the policy."""
    guest = Guest(machine)
    invalid = guest.set_handler(6)
    guest.power_on()
    guest.vcpu.load_registers(guest.hv.cpu, 0)
    assert guest.run(b"\x0f\xc7\xf0") == invalid


def test_xsave_state_without_a_policy(machine):
    """A vCPU that has XSAVE state, in an image that says nothing of the instructions, has them."""
    guest = Guest(machine)
    invalid = guest.set_handler(6)
    guest.vcpu.context.ctrlreg[4] |= CR4_OSXSAVE
    guest.vcpu.xsave = struct.pack("<QQ", 3, 3) + bytes(24) + struct.pack("<II", 0x1F80, 0xFFFF)
    guest.vcpu.xsave += bytes(544)
    code = b"\x0f\x01\xd0"
    assert guest.run(code, rcx=0) == guest.va(0, len(code))
    assert guest.hv.q[0] == 3
    assert guest.run(b"\x0f\xc7\xf0") == invalid


def test_the_policy_of_an_image_without_one():
    """It promises what the emulator has, so that its guest goes on to have it, and has a record."""
    policy = CpuPolicy.of_emulator()
    for _, bits in OPTIONAL.values():
        for (leaf, subleaf, register), bit in bits:
            if (leaf, bit) != (1, 26) and leaf != 0xD:
                assert policy.executes(leaf, subleaf, register) >> bit & 1
    assert CpuPolicy(policy.cpuid, b"").leaves == policy.leaves
    assert len(policy.leaves) * 24 == len(policy.cpuid)
    assert not policy.executes(*LEAF1) >> 26 & 1


def test_another_model_is_refused(monkeypatch, guest):
    """The words must be where they are known to be, with what the release's model has."""
    guest.power_on()
    guest.hv.cpu._features.have_all()
    CpuFeatures(guest.hv.q)
    monkeypatch.setattr(cpufeatures, "_FEATURES", cpufeatures._FEATURES + 1)
    with pytest.raises(UnsupportedEmulator, match=r"2\.1\.4"):
        CpuFeatures(guest.hv.q)
