"""What the tests of the 2008 series' capabilities share (test_series_*.py, one per group).

The guests are deterministic: five seconds of their time run for each command, at once. What they
publish to the toolstack is looked at while they are suspended.
"""

from __future__ import annotations

from contextlib import contextmanager

import numpy as np

from tests.flows.flow import console, create, ticks, wait_for, wait_for_tick
from xsave.host.channel import open_sink, open_source
from xsave.image.libxc import X86PvP2mFrames
from xsave.image.pages import PageBatch
from xsave.image.stream import StreamDecoder
from xsave.image.verify import verify
from xsave.public import SharedInfo
from xsave.save import save as save_flow

PAGES = 2048  # of flow.create's 8 MiB


def boot(host, name="g", **options):
    """Create a deterministic guest that has ticked, with one thread that works on page tables."""
    options["cmdline"] = "threads=1 " + options.get("cmdline", "")
    create(host, name, **{"deterministic": 7, **options})
    return wait_for_tick(host, name)


def save_said(host, path, name="g", **options):
    """Save the guest; return all it ever said in this domain, read while it is suspended."""
    said = []

    def commit():
        said.append(domctl.console_log().decode())
        sink.commit()

    with host.find(name) as domctl, open_sink(str(path)) as sink:
        save_flow(domctl, sink.write, commit=commit, **options)
    return said[0]


def set_target(host, nr_pages, name="g"):
    """Ask the guest for so many pages and wait until it says that it has them."""
    line = f"balloon: {nr_pages} pages of "
    before = console(host, name).count(line)
    with host.find(name) as domctl:
        domctl.set_target(nr_pages)
    wait_for(lambda: console(host, name).count(line) > before)


def ticked(host, nr_ticks, name="g"):
    """Wait until the guest has ticked so often in this domain; return its console."""
    wait_for(lambda: len(ticks(console(host, name))) >= nr_ticks)
    return console(host, name)


def goes_on(host, before, name="g", nr_ticks=1):
    """Assert that the restored guest counts on where it was, and finds all in order; return
    what it said."""
    text = ticked(host, nr_ticks, name)
    assert ticks(before + text) == list(range(1, ticks(text)[-1] + 1))
    assert "CHECK FAILED" not in before + text
    assert "PANIC" not in (before + text).upper()
    return text


@contextmanager
def suspended(host, name="g"):
    """The guest, suspended for a look; then its suspend is cancelled."""
    with host.find(name) as domctl:
        domctl.suspend(lambda stage: None)
        yield domctl
        domctl.resume()


def shared_info(domctl):
    """Return the domain's shared_info, a copy."""
    page = domctl.machine.pages[domctl.state().shared_info_mfn]
    return SharedInfo.from_buffer_copy(page.tobytes())


def records(path):
    """Return the values of an image's records, in order."""
    with open_source(str(path)) as source:
        values = []
        for item in StreamDecoder(source.read):
            value = item.value
            if isinstance(value, PageBatch):  # its buffers are reused
                value = PageBatch(value.pfns.copy(), value.types.copy(), value.pages.copy())
            values.append(value)
        return values


def record(path, kind):
    """Return the one record of its kind."""
    (value,) = [value for value in records(path) if isinstance(value, kind)]
    return value


def types(path):
    """Return the type of every pfn, (n,) u8."""
    found = np.full(record(path, X86PvP2mFrames).end_pfn + 1, 0xFF, np.uint8)
    for value in records(path):
        if isinstance(value, PageBatch):
            found[value.pfns] = value.types
    return found


def pages(path, pfns):
    """Return the content of these pfns as (n, 512) u64."""
    found = {}
    for value in records(path):
        if isinstance(value, PageBatch):
            with_data = value.pfns[value.has_data]
            found |= zip(with_data.tolist(), value.pages.view(np.uint64), strict=True)
    return np.array([found[int(pfn)] for pfn in pfns])


def sound(path):
    """Assert that `image verify` finds no error."""
    with open_source(str(path)) as source:
        found = [finding for finding in verify(source.read) if finding.severity == "error"]
    assert found == []
