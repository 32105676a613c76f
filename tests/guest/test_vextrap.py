"""AVX, which the emulator would execute wrongly: an invalid opcode, exactly where it is."""

from __future__ import annotations

import pytest

from tests.guest.rig import Guest
from tests.guest.test_cpufeatures import LEAF7, policy
from tests.guest.test_user_space import CS32, Process
from xsave.guest.xen.cpuregs import RAX, RBX, RIP
from xsave.guest.xen.vextrap import first_vex

VEX = {
    "vmovaps": b"\xc5\xf8\x28\xc1",
    "vaddps": b"\xc5\xf0\x58\xc2",
    "vmovdqu xmm8": b"\xc5\x7a\x6f\x07",  # [rdi]
    "vpxor xmm9": b"\xc4\x41\x31\xef\xc9",
    "vpshufb": b"\xc4\xe2\x71\x00\xc2",
    "vpalignr": b"\xc4\xe3\x71\x0f\xc2\x04",
    "vmovups fs": b"\x64\xc5\xf8\x10\x07",
    "vzeroupper": b"\xc5\xf8\x77",
}
IN_32_BITS = [name for name in VEX if not name.endswith(("8", "9"))]
INC, JUMP = b"\xff\xc0", b"\xeb\x00"


@pytest.fixture
def traps(guest):
    """A guest with handlers for what may go wrong."""
    guest.invalid = guest.set_handler(6)
    for vector in (13, 14):
        guest.set_handler(vector)
    return guest


@pytest.mark.parametrize("name", VEX)
@pytest.mark.parametrize("before", [b"", INC * 3, INC + JUMP + INC + b"\x48\x89\xc3"])
def test_vex_is_invalid(traps, name, before):
    """Whatever comes before it has been done, once, and nothing behind it; however often."""
    code = before + VEX[name] + b"\xff\xc3" * 3
    for _ in range(3):
        assert traps.run(code, rax=0, rbx=0, rdi=traps.va(3)) == traps.invalid
        assert traps.stacked(3)[2] == traps.va(0, len(before))
        nr = before.count(INC)
        assert traps.hv.q[RAX] == nr
        assert traps.hv.q[RBX] == (nr if before.endswith(b"\xc3") else 0)


@pytest.mark.parametrize(
    ("name", "cs"), [*((n, 0xE033) for n in VEX), *((n, CS32) for n in IN_32_BITS)]
)
def test_a_program_with_vex(traps, name, cs):
    """It is its kernel that gets the exception, in 32-bit code as in 64-bit code."""
    process = Process(traps)
    for _ in range(2):
        assert (
            process.run(INC + VEX[name] + b"\xff\xc3", cs=cs, rbx=0, rdi=traps.va(8))
            == traps.invalid
        )
        _, _, rip, found, *_ = traps.stacked(7)
        assert (rip, found & 0xFFFF) == (traps.va(7, 2), cs)
        assert (traps.hv.q[RAX], traps.hv.q[RBX]) == (1, 0)


def test_counted_runs(traps):
    """A count is not used up: the handler is where the run ends."""
    traps.power_on()
    traps.poke(0, 0, INC * 5 + VEX["vaddps"] + INC)
    for _ in range(2):
        traps.hv.q[RIP], traps.hv.q[RAX] = traps.va(0), 0
        traps.hv.cpu.run(20)
        assert traps.hv.q[RIP] == traps.invalid
        assert traps.hv.q[RAX] == 5


@pytest.mark.parametrize("cs", [0xE033, CS32])
def test_what_only_looks_like_it(traps, cs):
    """The same bytes inside of other instructions are theirs."""
    process = Process(traps)
    traps.syscall = traps.set_handler(40)
    traps.vcpu.context.syscall_callback_eip = traps.syscall
    code = b"\xb8" + VEX["vmovaps"] + b"\x89\xc5\x89\xc3" + b"\x0f\x05"
    assert process.run(code, cs=cs) == traps.syscall
    assert traps.hv.q[RBX] == int.from_bytes(VEX["vmovaps"], "little")


def test_an_exception_before_it(traps):
    """A fault of an instruction before it in the block is the one that happens."""
    process = Process(traps)
    assert process.run(b"\x8b\x07" + VEX["vaddps"], rdi=traps.va(3)) == traps.vcpu.traps[14][0]
    assert traps.stacked(4)[3] == traps.va(7)


def test_bmi_is_executed_where_promised(traps):
    """VEX-coded instructions on general registers work, in a block with none of the others."""
    traps.domain.policy = policy([(LEAF7, 3), (LEAF7, 8)])
    andn = b"\xc4\xe2\x70\xf2\xc2"  # andn eax, ecx, edx
    assert traps.run(andn, rcx=0b1010, rdx=0b0110) == traps.va(0, len(andn))
    assert traps.hv.q[RAX] == 0b0100
    assert traps.run(andn + VEX["vaddps"], rcx=0b1010, rdx=0b0111) == traps.invalid
    assert traps.stacked(3)[2] == traps.va(0, len(andn))


def test_les_and_lds_of_32_bits():
    """In 32-bit code the prefixes are other instructions if what follows names memory."""
    assert first_vex(b"\x90\xc5\x38\x28\x00\x00", compat=True) is None
    assert first_vex(b"\x90\xc5\x38\x28\xc0\x00", compat=False) == (1, 1)
    assert first_vex(b"\x90\xc5\xf8\x28\xc0", compat=True) == (1, 1)


@pytest.mark.parametrize("promised", [False, True])
def test_a_kernel_high_up(machine, promised):
    """A kernel's own code is looked at if it was promised AVX."""
    guest = Guest(machine)
    guest.domain.policy = policy([((0x1, 0xFFFFFFFF, 2), 28)] if promised else [])
    high = 1 << 63 | 0x7FFF_8000_0000_0000 | 300 << 39
    assert guest.tables.update_entry(guest.l4, 300, guest.machine.mem[guest.l4, 0].item()) == 0
    invalid = guest.set_handler(6)
    guest.power_on()
    at = high + (guest.va(5) & (1 << 39) - 1)
    guest.poke(5, 0, VEX["vmovaps"] + b"\x0f\x05")
    guest.stops.add(at + 4)
    guest.run(b"\xff\xe0", rax=at)
    assert guest.hv.stopped_at == (invalid if promised else at + 4)
