"""What the samples of damaged images share: the register, and ways to change one thing.

Each sample changes one thing in a sound synthetic image and is registered under the rule that must
find it, and must be the only one to do so. The samples are in damage_stream.py (order, reserved
fields, origin), damage_memory.py (pfns, p2m, page tables), damage_vcpu.py (contexts, start_info)
and damage_host.py (policies, configuration, HVM).
"""

from __future__ import annotations

from tests.image import synthetic as s
from tests.image.pieces import Piece, index

#: (rule, name of the sample, function that returns the bytes of the image)
SAMPLES = []


def sample(rule):
    """Register a function that returns a damaged image under the rule it breaks."""

    def register(make):
        SAMPLES.append((rule, make.__name__, make))
        return make

    return register


def pv(edit=None, **attributes):
    """Return the bytes of a PV image with attributes set and its pieces edited."""
    image = s.PvImage()
    for name, value in attributes.items():
        setattr(image, name, value)
    return image.encode("xl", edit)


def added(value, before="END"):
    """Return an edit that puts a record in front of the first piece of that name."""

    def edit(pieces):
        i = index(pieces, before)
        return [*pieces[:i], Piece(value.NAME, value.encode()), *pieces[i:]]

    return edit


def entry(pfn, slot, value):
    """Return a PV image with one page-table entry replaced."""
    image = s.PvImage()
    image.table(pfn)[slot] = value
    return image.encode()
