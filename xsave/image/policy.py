"""What the guest of an image was promised of its CPU, read from the image's beginning."""

from __future__ import annotations

from xsave.errors import ImageError
from xsave.image.buffers import Read
from xsave.image.libxc import X86CpuidPolicy
from xsave.image.pages import PageBatch
from xsave.image.stream import StreamDecoder


def cpuid_policy(read: Read) -> bytes:
    """Return the body of X86_CPUID_POLICY; empty where the image has none, or is damaged."""
    try:
        for item in StreamDecoder(read):
            if isinstance(item.value, X86CpuidPolicy):
                return item.value.content
            if isinstance(item.value, PageBatch):
                break
    except ImageError:  # `verify` has its own words for that
        pass
    return b""
