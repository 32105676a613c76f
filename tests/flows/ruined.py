"""Images to be damaged, and the invariant of a restore, whatever the bytes.

Restore gives a domain, or raises an XsaveError with one line of text; an ImageError says at which
offset; after an error there is no domain, no frame, no process, no file. The guests stay paused:
what a hostile guest may do when it runs is another question.

Domain processes are forks (forked.py) and images are small, so that each case is some 30 ms.
"""

from __future__ import annotations

from tests.flows.flow import destroy
from tests.flows.forked import nothing_is_left, restore
from tests.image.synthetic import PvImage
from xsave.errors import ImageError, NameTaken, XsaveError


def one_vcpu(**attributes):
    """The synthetic guest with one vCPU; its configuration says so."""
    image = PvImage(nr_vcpus=1)
    image.config["b_info"]["max_vcpus"] = 1
    for name, value in attributes.items():
        setattr(image, name, value)
    return image


def error_of(world, data):
    """Restore an image, paused. Return the error, None if it can be restored; whichever it is,
    nothing is left afterwards."""
    host, forks = world
    error = None
    try:
        info = restore(host, data, cpu_mismatch="allow")
    except XsaveError as problem:
        error = problem
        assert str(error)
        assert "\n" not in str(error)
        assert not isinstance(error, ImageError) or error.offset is not None, str(error)
        assert not isinstance(error, NameTaken)
    else:
        assert info.state == "paused"
        destroy(host, str(info.domid))
        host.settle()
    nothing_is_left(host, forks)
    return error


def refused(world, data, kind=ImageError):
    """Assert that an image is refused with this kind of error; return it."""
    error = error_of(world, data)
    assert type(error) is kind, repr(error)
    return error


def damaged(edit):
    """Return the bytes of an image with its pieces edited."""
    return one_vcpu().encode("xl", edit)


SOUND = one_vcpu().encode()
PIECES = one_vcpu().pieces()
HEADERS = ["xl header", "libxl header", "image header", "domain header"]
RECORDS = list(dict.fromkeys(p.name for p in PIECES if p.name not in HEADERS and p.data))
