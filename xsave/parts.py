"""What a restore keeps of an image besides its pages, until the stream has ended."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from xsave.image.stream import Item


@dataclass
class Parts:
    """The records of one image other than its pages, as they came, with their offsets."""

    config: bytes = b""
    xen_version: tuple[int, int] = (4, 17)
    width: int = 0
    cpuid: bytes = b""
    msrs: bytes = b""
    tsc: tuple[int, int, int, int] = (0, 0, 0, 0)
    shared_info: bytes | None = None
    p2m_frames: np.ndarray | None = None
    p2m_offset: int = 0
    vcpus: dict[int, dict[str, Item]] = field(default_factory=dict)
