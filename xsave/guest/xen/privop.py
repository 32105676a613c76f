"""Privileged instructions of a PV kernel: decoded and emulated after their #GP.

Mirrors xen/arch/x86/pv/emul-priv-op.c for the instructions PV kernels really use: MSRs, control
and debug registers, and a few no-ops. Port I/O does not fault here: vcpu.py answers it.
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Callable

from xsave.guest.xen.cpuregs import FS_BASE, GS_BASE, RAX, RCX, RDX, RIP
from xsave.guest.xen.guestcpu import GuestCpu
from xsave.guest.xen.guestmem import GuestFault
from xsave.guest.xen.vcpu import CR4_FSGSBASE, CR4_OSXSAVE

MSR_APIC_BASE, MSR_PAT, MSR_EFER = 0x1B, 0x277, 0xC0000080
MSR_FS_BASE, MSR_GS_BASE, MSR_KERNEL_GS_BASE = 0xC0000100, 0xC0000101, 0xC0000102
_FIXED_MSRS = {MSR_APIC_BASE: 0xFEE00900, MSR_PAT: 0x0007010600070106, MSR_EFER: 0xD01}
_GUEST_CR4 = CR4_FSGSBASE | CR4_OSXSAVE
_ONE_BYTE_NOPS = {0xFA, 0xFB, 0xF4}  # cli, sti, hlt: the guest means its virtual flag
_TWO_BYTE_NOPS = {0x06, 0x08, 0x09}  # clts, invd, wbinvd
_XSETBV = b"\x01\xd1"
_RDTSC, _RDTSCP = b"\x0f\x31", b"\x0f\x01\xf9"
_XCR0_ALLOWED = 7
_LONGEST = 5


def fetch(hv: GuestCpu) -> bytes:
    """Return the bytes at rip, as many as the longest of these instructions has, fewer if the page
    behind is not there."""
    rip = hv.cpu.linear_rip
    try:
        return hv.read(rip, _LONGEST)
    except GuestFault:
        pass
    out = b""
    with contextlib.suppress(GuestFault):
        while len(out) < _LONGEST:
            out += hv.read(rip + len(out), 1)
    return out


def emulate_privileged(hv: GuestCpu, code: bytes) -> bool:
    """Emulate the instruction at rip, `code`, if it is one of these. False: it is a real #GP."""
    length = _emulate(hv, code + bytes(_LONGEST))
    if length > len(code):
        return False
    hv.q[RIP] += length
    return length > 0


def emulate_rdtsc(hv: GuestCpu, code: bytes, rdtsc: Callable[[], int]) -> bool:
    """Emulate rdtsc or rdtscp at rip, of the kernel or of user space. False: it is neither."""
    if code.startswith(_RDTSC):
        length = 2
    elif code.startswith(_RDTSCP):
        length = 3
    else:
        return False
    q, tsc = hv.q, rdtsc()
    q[RAX], q[RDX] = tsc & 0xFFFFFFFF, tsc >> 32
    q[RIP] += length
    return True


def _emulate(hv: GuestCpu, code: bytes) -> int:
    """Return the length of the instruction emulated, 0 if it is none of ours."""
    skip, rex = 0, 0
    if code[0] & 0xF0 == 0x40:
        skip, rex = 1, code[0]
    op = code[skip]
    if op in _ONE_BYTE_NOPS:
        return skip + 1
    if op == 0x0F:
        return _emulate_two_byte(hv, code[skip + 1 :], rex, skip)
    return 0


def _emulate_two_byte(hv: GuestCpu, code: bytes, rex: int, skip: int) -> int:
    op = code[0]
    if op == 0x30:
        _wrmsr(hv)
    elif op == 0x32:
        _rdmsr(hv)
    elif op in _TWO_BYTE_NOPS:
        pass
    elif code[:2] == _XSETBV:
        return skip + 3 if _xsetbv(hv) else 0
    elif 0x20 <= op <= 0x23:
        _move_control(hv, op, code[1], rex)
        return skip + 3
    else:
        return 0
    return skip + 2


def _wrmsr(hv: GuestCpu) -> None:
    q = hv.q
    value = (q[RDX] & 0xFFFFFFFF) << 32 | q[RAX] & 0xFFFFFFFF
    msr = q[RCX] & 0xFFFFFFFF
    if msr == MSR_FS_BASE:
        q[FS_BASE] = value
    elif msr == MSR_GS_BASE:
        q[GS_BASE] = value
    elif msr == MSR_KERNEL_GS_BASE:
        hv.vcpu.context.gs_base_user = value


def _rdmsr(hv: GuestCpu) -> None:
    q = hv.q
    msr = q[RCX] & 0xFFFFFFFF
    if msr == MSR_FS_BASE:
        value = q[FS_BASE]
    elif msr == MSR_GS_BASE:
        value = q[GS_BASE]
    elif msr == MSR_KERNEL_GS_BASE:
        value = hv.vcpu.context.gs_base_user
    else:
        value = _FIXED_MSRS.get(msr, 0)
    q[RAX], q[RDX] = value & 0xFFFFFFFF, value >> 32


def _xsetbv(hv: GuestCpu) -> bool:
    """Only what the vCPU's XSAVE state already has room for."""
    vcpu, q = hv.vcpu, hv.q
    value = (q[RDX] & 0xFFFFFFFF) << 32 | q[RAX] & 0xFFFFFFFF
    if q[RCX] & 0xFFFFFFFF or not value & 1 or value & ~_XCR0_ALLOWED or value & 6 == 4:
        return False
    if len(vcpu.xsave) <= 16:
        return False
    accum = struct.unpack_from("<Q", vcpu.xsave, 8)[0]
    if value & ~accum:
        return False
    vcpu.xsave = struct.pack("<Q", value) + vcpu.xsave[8:]
    return True


def _move_control(hv: GuestCpu, op: int, modrm: int, rex: int) -> None:
    """mov to and from control and debug registers; both registers may be r8-r15."""
    number = (modrm >> 3 & 7) | (rex & 4) << 1
    register = (modrm & 7) | (rex & 1) << 3
    context = hv.vcpu.context
    if op == 0x20:
        hv.q[register] = context.ctrlreg[number] if number < 8 else 0
        if number == 3:
            hv.q[register] = hv.vcpu.cr3
    elif op == 0x21:
        hv.q[register] = context.debugreg[number] if number < 8 else 0
    elif op == 0x22 and number == 4:
        context.ctrlreg[4] = context.ctrlreg[4] & ~_GUEST_CR4 | hv.q[register] & _GUEST_CR4
    elif op == 0x23 and number < 8:
        context.debugreg[number] = hv.q[register]
