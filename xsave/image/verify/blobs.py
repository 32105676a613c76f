"""Check what travels beside the BASIC records: XSAVE and extended state, MSRs, CPU policies.

XSAVE: xen/arch/x86/xstate.c (validate_xstate), domctl.c (XEN_DOMCTL_setvcpuextstate). The size of
an area is that of the features ever enabled (xcr0_accum), in the standard format, whose layout the
guest's own CPUID policy (leaf 0xd) tells.
"""

from __future__ import annotations

import struct
from itertools import pairwise

import numpy as np

from xsave import public
from xsave.image.libxc import (
    CpuidLeaf,
    X86CpuidPolicy,
    X86MsrPolicy,
    X86PvVcpuBasic,
    X86PvVcpuExtended,
    X86PvVcpuMsrs,
    X86PvVcpuXsave,
)
from xsave.image.stream import Item
from xsave.image.verify.context import CONTEXT_OFFSET, basic_items
from xsave.image.verify.findings import Findings
from xsave.image.verify.model import Image

#: Xen takes a few hundred leaves or MSRs.
_MAX_POLICY_BYTES = 1 << 16
_MASKS_BYTES = 16
_LEGACY_BYTES, _XSAVE_HEADER_BYTES = 512, 64
_X87, _SSE, _YMM = 1, 2, 4
_YMM_STATE = (0x240, 0x100)
_CR4_OSXSAVE = 1 << 18
_CR4 = public.VcpuGuestContext.ctrlreg.offset + 8 * 4
_XSTATE_LEAF = 0xD
#: What Xen has ever sent: SPEC_CTRL, MISC_FEATURES_ENABLES, PKRS, BNDCFGS, XSS, TSC_AUX,
#: VIRT_SPEC_CTRL, and AMD's breakpoint address masks.
_MSRS = {0x48, 0x140, 0x6E1, 0xD90, 0xDA0, 0xC0000103, 0xC001011F}
_MSRS |= {0xC0011027, 0xC0011019, 0xC001101A, 0xC001101B}
#: PLATFORM_INFO and ARCH_CAPABILITIES: the entries of an MSR policy so far.
_POLICY_MSRS = {0xCE, 0x10A}
#: Extended state up to and including what Xen asks for.
_EXTENDED_BYTES = public.VcpuExtended.mcg_cap.offset


def check(image: Image, findings: Findings) -> None:
    """Check the blobs of every vCPU, and the policies."""
    _check_policies(image, findings)
    for number, records in sorted(image.vcpus.items()):
        if item := records.get(X86PvVcpuExtended.NAME):
            _check_extended(findings, number, item)
        if item := records.get(X86PvVcpuMsrs.NAME):
            _check_msrs(findings, item)
        _check_xsave(image, findings, number, records.get(X86PvVcpuXsave.NAME))


def _check_policies(image: Image, findings: Findings) -> None:
    for name in (X86CpuidPolicy.NAME, X86MsrPolicy.NAME):
        item = image.items.get(name)
        if item and len(item.value.content) > _MAX_POLICY_BYTES:
            text = f"{len(item.value.content)} bytes, expected {_MAX_POLICY_BYTES} at most"
            findings.add("policy-refused", text, record=name, offset=item.offset)
    keys = [(leaf.leaf, (leaf.subleaf + 1) & 0xFFFF_FFFF) for leaf in _leaves(image)]
    if any(a >= b for a, b in pairwise(keys)):
        text = "the leaves are not in ascending order, each once"
        name = X86CpuidPolicy.NAME
        findings.add("policy", text, record=name, offset=image.offset(name))
    _check_msr_policy(image, findings)


def _check_msr_policy(image: Image, findings: Findings) -> None:
    item = image.items.get(X86MsrPolicy.NAME)
    if not item or len(item.value.content) > _MAX_POLICY_BYTES:
        return
    entries, place = item.value.entries, {"record": item.value.NAME, "offset": item.offset}
    if flagged := [entry.idx for entry in entries if entry.flags]:
        findings.add("policy-refused", f"MSR {flagged[0]:#x} has flags", **place)
    if unknown := sorted({entry.idx for entry in entries} - _POLICY_MSRS):
        findings.add("policy", f"MSR {unknown[0]:#x}", **place)


def _leaves(image: Image) -> list[CpuidLeaf]:
    """Return the leaves of the CPUID policy; none if there are absurdly many."""
    policy = image.value(X86CpuidPolicy.NAME)
    if policy is None or len(policy.content) > _MAX_POLICY_BYTES:
        return []
    leaves: list[CpuidLeaf] = policy.leaves
    return leaves


def _check_extended(findings: Findings, number: int, item: Item) -> None:
    context: bytes = item.value.context
    what = ""
    if len(context) < _EXTENDED_BYTES:
        what = f"{len(context)} bytes, expected {_EXTENDED_BYTES} at least"
    elif (owner := int.from_bytes(context[:4], "little")) != number:
        what = f"the state is that of vCPU {owner}"
    elif (size := int.from_bytes(context[4:8], "little")) < _EXTENDED_BYTES:
        what = f"it says of itself that it has {size} bytes, expected {_EXTENDED_BYTES} at least"
    if what:
        text = f"vCPU {number}: {what}"
        offset = item.offset + CONTEXT_OFFSET
        findings.add("vcpu-extended", text, record=item.value.NAME, offset=offset)


def _check_msrs(findings: Findings, item: Item) -> None:
    indices = np.frombuffer(item.value.context, "<u4").reshape(-1, 4)[:, 0].tolist()
    for unknown in sorted(set(indices) - _MSRS):
        text = f"vCPU {item.value.vcpu_id}: MSR {unknown:#x}"
        findings.add("vcpu-msrs", text, record=item.value.NAME, offset=item.offset)


def _check_xsave(image: Image, findings: Findings, number: int, item: Item | None) -> None:
    accumulated = 0
    if item:
        accumulated = struct.unpack_from("<Q", item.value.context, 8)[0]
        if what := _xsave_fault(image, item.value.context):
            text = f"vCPU {number}: {what}"
            offset = item.offset + CONTEXT_OFFSET
            findings.add("vcpu-xsave", text, record=item.value.NAME, offset=offset)
    _check_cr4(image, findings, number, item, accumulated)


def _check_cr4(
    image: Image, findings: Findings, number: int, item: Item | None, accumulated: int
) -> None:
    """A guest that enabled a feature in xcr0 had to set OSXSAVE first, and one that set it has an
    XSAVE record."""
    basic = basic_items(image).get(number)
    if basic is None or image.guest_width != 8:
        return
    cr4 = public.VcpuGuestContext.from_buffer_copy(basic.value.context).ctrlreg[4]
    what = ""
    if accumulated and not cr4 & _CR4_OSXSAVE:
        what = f"has used features {accumulated:#x} of XSAVE, cr4 is {cr4:#x}, without OSXSAVE"
    elif cr4 & _CR4_OSXSAVE and item is None:
        what = f"cr4 is {cr4:#x}, with OSXSAVE, and there is no {X86PvVcpuXsave.NAME}"
    if what:
        offset = basic.offset + CONTEXT_OFFSET + _CR4
        text = f"vCPU {number}: {what}"
        findings.add("vcpu-cr4", text, record=X86PvVcpuBasic.NAME, offset=offset)


def _xsave_fault(image: Image, context: bytes) -> str:
    """Return why Xen would refuse an XSAVE blob, "" if it would not."""
    xcr0, accumulated = struct.unpack_from("<QQ", context)
    if not accumulated:
        return f"xcr0 is {xcr0:#x}, xcr0_accum 0" if xcr0 else ""
    if what := _xcr0_fault(xcr0, accumulated):
        return what
    expected, found = _area_bytes(image, accumulated), len(context) - _MASKS_BYTES
    if expected and found != expected:
        return f"the area has {found} bytes, expected {expected} for features {accumulated:#x}"
    if found < _LEGACY_BYTES + _XSAVE_HEADER_BYTES:
        return f"the area has {found} bytes, features are {accumulated:#x}"
    start = _MASKS_BYTES + _LEGACY_BYTES
    xstate_bv, xcomp_bv, *rest = struct.unpack_from("<8Q", context, start)
    if xcomp_bv:
        return f"the area is compacted (XCOMP_BV {xcomp_bv:#x})"
    if xstate_bv & ~accumulated:
        return f"XSTATE_BV is {xstate_bv:#x}, features are {accumulated:#x}"
    return "reserved bytes of the header are not 0" if any(rest) else ""


def _xcr0_fault(xcr0: int, accumulated: int) -> str:
    for name, mask in (("xcr0", xcr0), ("xcr0_accum", accumulated)):
        if not mask & _X87 or (mask & _YMM and not mask & _SSE):
            return f"{name} is {mask:#x}, which no CPU accepts"
    return (
        f"xcr0 {xcr0:#x} is not within xcr0_accum {accumulated:#x}" if xcr0 & ~accumulated else ""
    )


def _area_bytes(image: Image, features: int) -> int:
    """Return the size of an area in standard format; 0 if the policy does not tell."""
    parts = {2: _YMM_STATE}
    for leaf in _leaves(image):
        if leaf.leaf == _XSTATE_LEAF and 2 <= leaf.subleaf < 64 and leaf.eax:
            parts[leaf.subleaf] = (leaf.ebx, leaf.eax)
    size = _LEGACY_BYTES + _XSAVE_HEADER_BYTES
    for bit in range(2, 64):
        if features >> bit & 1:
            if bit not in parts:
                return 0
            size = max(size, sum(parts[bit]))
    return size
