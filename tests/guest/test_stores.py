"""The stores decoded by hand are what capstone says they are, and the usual ones are among them."""

from __future__ import annotations

import capstone
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from xsave.guest.xen import stores

ENGINE = capstone.Cs(capstone.CS_ARCH_X86, capstone.CS_MODE_64)
ENGINE.detail = True
AT = 0xFFFF_FFFF_8107_0000

prefixes = st.sampled_from([b"", b"", b"\xf0", b"\x3e", b"\x66", b"\xf3", b"\x3e\xf0"])
rex = st.one_of(st.just(b""), st.integers(0x40, 0x4F).map(lambda n: bytes([n])))
opcode = st.sampled_from([b"\x87", b"\x89", b"\x80", b"\x80", b"\x86", b"\x88", b"\x81", b"\xc7"])
instructions = st.builds(
    lambda *parts: b"".join(parts), prefixes, rex, opcode, st.binary(max_size=9)
)


@settings(max_examples=2000, deadline=None)
@given(instructions)
@example(b"\x3e\x41\x80\x27\xfd")
def test_what_capstone_says(code):
    """The same instruction, as long, with the same operands; or it is left to capstone."""
    mine = stores.decode(code)
    if mine is None:
        return
    other = next(ENGINE.disasm(code, AT, 1), None)
    assert other is not None
    assert mine.mnemonic == other.mnemonic.removeprefix("lock ")
    assert mine.size == other.size
    assert len(other.operands) == 2
    memory, source = sorted(other.operands, key=lambda operand: operand.type != stores.MEM)
    assert (mine.operands[0].type, mine.operands[0].size) == (memory.type, memory.size)
    assert mine.operands[1].type == source.type
    if source.type == stores.REG:
        assert mine.reg_name(mine.operands[1].reg) == other.reg_name(source.reg)
    else:
        assert mine.operands[1].imm & 0xFF == source.imm & 0xFF


@pytest.mark.parametrize(
    ("code", "mnemonic"),
    [
        ("488710", "xchg"), ("48871a", "xchg"), ("48877500", "xchg"), ("4c893c25ff000000", "mov"),
        ("3e418027fd", "and"), ("f0418027fd", "and"), ("f0800f02", "or"), ("48890d12345678", "mov"),
    ],
)  # fmt: skip
def test_the_usual_ones_are_decoded(code, mnemonic):
    code = bytes.fromhex(code)
    for behind in (b"", b"\x90" * 8):
        found = stores.decode(code + behind)
        assert found is not None
        assert (found.mnemonic, found.size) == (mnemonic, len(code))
    for nr in range(len(code)):
        assert stores.decode(code[:nr]) is None


@pytest.mark.parametrize("code", ["4887c8", "f0488917", "80e103", "8737", "48211f", "90"])
def test_others_are_not(code):
    """Of registers, with a lock that may not be, and all the rest."""
    assert stores.decode(bytes.fromhex(code)) is None
