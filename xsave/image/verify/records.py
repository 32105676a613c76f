"""Check which records came at all, and what the headers say of the image as a whole."""

from __future__ import annotations

from xsave.image import libxl
from xsave.image.libxc import (
    Checkpoint,
    DomainHeader,
    ImageHeader,
    PageBatch,
    SharedInfo,
    X86CpuidPolicy,
    X86MsrPolicy,
    X86TscInfo,
)
from xsave.image.verify.findings import Findings
from xsave.image.verify.model import Image

_MAX_TSC_MODE = 3
#: DomainHeader.xen_major of what Xen's converter of legacy images wrote.
_CONVERTER = 0


def check(image: Image, findings: Findings) -> None:
    """Check presence, versions and the TSC."""
    needed = [PageBatch.NAME] + ([SharedInfo.NAME] if image.is_pv else [])
    for name in needed:
        if not image.counts[name]:
            findings.add("missing-record", "it never came", record=name)
    _check_tsc(image, findings)
    _note_origin(image, findings)


def _check_tsc(image: Image, findings: Findings) -> None:
    tsc = image.value(X86TscInfo.NAME)
    if tsc is None:
        findings.add("no-tsc", "it never came", record=X86TscInfo.NAME)
    elif tsc.mode > _MAX_TSC_MODE:
        text = f"mode {tsc.mode}, expected 0 to {_MAX_TSC_MODE}"
        offset = image.offset(X86TscInfo.NAME)
        findings.add("tsc-mode", text, record=X86TscInfo.NAME, offset=offset)


def _note_origin(image: Image, findings: Findings) -> None:
    if image.version < 3:
        text, offset = f"stream version {image.version}", image.offset(ImageHeader.NAME)
        findings.add("version-2", text, record=ImageHeader.NAME, offset=offset)
    else:
        for name in (X86CpuidPolicy.NAME, X86MsrPolicy.NAME):
            if not image.counts[name]:
                findings.add("no-policy", "it never came", record=name)
    if image.counts[Checkpoint.NAME]:
        text, offset = f"{image.counts[Checkpoint.NAME]}", image.offset(Checkpoint.NAME)
        findings.add("checkpointed", f"{text} checkpoints", record=Checkpoint.NAME, offset=offset)
    header = image.value(libxl.LibxlHeader.NAME)
    is_legacy = header and header.options & libxl.OPTION_LEGACY
    if is_legacy or image.value(DomainHeader.NAME).xen_major == _CONVERTER:
        offset = image.offset(DomainHeader.NAME)
        findings.add("legacy", "by its headers", record=DomainHeader.NAME, offset=offset)
