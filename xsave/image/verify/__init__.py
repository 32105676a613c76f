"""Strict verification of a whole image, down into page tables, p2m and vCPU contexts.

The reader is tolerant and a real Xen is credulous: the format has no checksum, Xen's own verifier
looks at no more than the framing, and nearly every wrong field of a vCPU makes "Restore
successful" and a dead guest. `verify` answers one question: would a restore of this image, on a
machine like the one it came from, give the guest back? It would if no finding is an error.

    walk        StreamDecoder items -> order, reserved fields (strict.py)
                                    -> Collector -> Image: what a restore would have built
    then        checks over the Image: each module one subject, `check(image, findings)`

rules.py lists every rule. Nothing here touches files; nothing is kept that the checks at the end
do not need (frames.py, tables.py, pvpages.py).
"""

from __future__ import annotations

from xsave.image.verify.findings import Finding
from xsave.image.verify.rules import RULES
from xsave.image.verify.walk import verify

__all__ = ["RULES", "Finding", "verify"]
