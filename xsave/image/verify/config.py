"""Check the configuration in the xl header against the image it heads.

xl starts a restore by making a domain of this JSON (libxl_domain_config); broken text makes it
abort. `xl restore` can be given another configuration, so an image without one is only odd.
"""

from __future__ import annotations

import json
from typing import Any

from xsave.image.libxc import DOMAIN_TYPES, TYPE_X86_HVM, TYPE_X86_PV
from xsave.image.libxl import EmulatorContext, EmulatorXenstoreData
from xsave.image.verify.findings import Findings
from xsave.image.verify.model import Image
from xsave.image.xl import FIXED_SIZE, XlHeader

_GUEST_TYPES = {"pv": TYPE_X86_PV, "hvm": TYPE_X86_HVM, "pvh": TYPE_X86_HVM}
#: What libxl adds to the memory of a domain (LIBXL_MAXMEM_CONSTANT).
_SLACK_KB = 1024
#: Where the header has the length of the optional data.
_LENGTH_OFFSET = 44
#: In front of the JSON: the header and the length of the text.
_TEXT_OFFSET = FIXED_SIZE + 4


def check(image: Image, findings: Findings) -> None:
    """Check the configuration, where the wrapping has one."""
    header: XlHeader | None = image.value(XlHeader.NAME)
    if header is None:
        return
    if not header.config:
        findings.add("no-config", "it is empty", record=header.NAME, offset=_LENGTH_OFFSET)
        return
    try:
        config = json.loads(header.config)
    except (ValueError, RecursionError) as error:
        at = _TEXT_OFFSET + getattr(error, "pos", 0)
        text = f"the configuration is no JSON: {error}"
        findings.add("config", text, record=header.NAME, offset=at)
        return
    for what in _faults(image, config):
        findings.add("config", what, record=header.NAME, offset=_TEXT_OFFSET)


def _faults(image: Image, config: Any) -> list[str]:
    c_info, b_info = _part(config, "c_info"), _part(config, "b_info")
    if c_info is None or b_info is None:
        return ["no c_info and b_info"]
    faults = []
    if not isinstance(c_info.get("name"), str) or not c_info["name"]:
        faults.append("the domain has no name")
    faults += _type_faults(image, c_info, b_info)
    if image.is_pv:
        faults += _vcpu_faults(image, b_info) + _memory_faults(image, b_info)
    return faults


def _part(config: Any, name: str) -> dict[str, Any] | None:
    part = config.get(name) if isinstance(config, dict) else None
    return part if isinstance(part, dict) else None


def _type_faults(image: Image, c_info: dict[str, Any], b_info: dict[str, Any]) -> list[str]:
    # Absent, the type is libxl's default, HVM in old versions; only a contradiction is wrong.
    named = c_info.get("type")
    faults = []
    if named is not None and _GUEST_TYPES.get(str(named)) != image.guest_type:
        faults.append(f"the domain is {named!r}, the image {DOMAIN_TYPES[image.guest_type]}")
    if "type" not in b_info and not any(key.startswith("type.") for key in b_info):
        faults.append("b_info does not say which type of guest it builds")
    has_emulator = image.counts[EmulatorContext.NAME] + image.counts[EmulatorXenstoreData.NAME]
    if has_emulator and named == "pvh":
        faults.append("a PVH guest has no emulator, the image has its records")
    return faults


def _vcpu_faults(image: Image, b_info: dict[str, Any]) -> list[str]:
    limit = _number(b_info, "max_vcpus", 1)
    highest = max(image.vcpus, default=0)
    return [f"max_vcpus is {limit}, the image has vCPU {highest}"] if highest >= limit else []


def _memory_faults(image: Image, b_info: dict[str, Any]) -> list[str]:
    """Memory may be left out (libxl has a default), and too much of it does no harm.

    The limit is what a ballooned guest was told to keep to (libxl__build_pre), whatever it may
    grow to later: Xen refuses more, and the restore fails.
    """
    limit = _number(b_info, "target_memkb", 0) or _number(b_info, "max_memkb", 0)
    needed = 4 * len(image.frames.populated)
    if not limit or needed <= limit + _SLACK_KB:
        return []
    return [f"the domain gets {limit} KiB, its pages take {needed} KiB"]


def _number(part: dict[str, Any], name: str, default: int) -> int:
    value = part.get(name)
    return value if isinstance(value, int) else default
