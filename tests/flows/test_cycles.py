"""Many save/restore cycles in a row: the guest notices none of them, and nothing leaks.

XSAVE_TEST_CYCLES says how many cycles the slow test does (100).
"""

from __future__ import annotations

import gc
import os
import random
import time
from pathlib import Path

import pytest

from tests.flows.flow import (
    MEMORY,
    all_free,
    create,
    destroy,
    hashes,
    nothing_is_left,
    processes,
    restore,
    ticks,
    wait_for,
    wait_for_tick,
)
from xsave.guest.xen.machine import XEN_FRAMES
from xsave.host.channel import open_sink
from xsave.save import save as save_flow


def save_with_console(host, path):
    """Save g; return all it ever wrote to its console, read while it is suspended."""
    written = []

    def commit():
        written.append(domctl.console_log().decode())
        sink.commit()

    with host.find("g") as domctl, open_sink(str(path)) as sink:
        save_flow(domctl, sink.write, commit=commit)
    return written[0]


def files_below(directory):
    """Return the names of all files, those of the domain (they carry its number) apart."""
    names = {str(path.relative_to(directory)) for path in Path(directory).rglob("*")}
    return {name for name in names if not name.startswith("domains/")}


def open_descriptors():
    """Return how many descriptors this process has; what is garbage has none."""
    gc.collect()
    return len(list(Path("/proc/self/fd").iterdir()))


def cycle(host, image, rng):
    """One cycle: the guest runs for a moment, is saved, comes back. Return its console."""
    time.sleep(rng.random() * 0.4)
    text = save_with_console(host, image)
    wait_for(lambda: host.free_frames == all_free(host))
    restore(host, image)
    return text


def run_cycles(host, tmp_path, count):
    """The console of `count` cycles in one text, and proof that nothing piled up."""
    rng = random.Random(count)
    create(host)
    text = cycle(host, tmp_path / "img", rng)
    owned = all_free(host) - host.free_frames
    files, descriptors = files_below(host.directory), open_descriptors()
    for _ in range(count - 1):
        text += cycle(host, tmp_path / "img", rng)
    assert all_free(host) - host.free_frames == owned
    assert owned - (MEMORY >> 12) <= XEN_FRAMES  # its memory, and what Xen keeps for it
    assert len(processes(host)) == 1
    assert files_below(host.directory) == files
    assert open_descriptors() == descriptors
    assert [path.name for path in tmp_path.iterdir()] == ["img"]
    return text


def check_cycles(host, tmp_path, count):
    text = run_cycles(host, tmp_path, count)
    so_far = ticks(text)
    text += wait_for_tick(host, after=max(so_far) + 1)
    assert text.count("SUSPEND\n") == text.count("RESUME new\n") == count
    assert ticks(text) == list(range(1, ticks(text)[-1] + 1))
    assert len(hashes(text)) == 1
    assert "CHECK FAILED" not in text
    assert "panic" not in text.lower()
    destroy(host)
    nothing_is_left(host)


def test_ten_cycles(host, tmp_path):
    """The ticks go on without a gap or a repeat, always with the same hash; the guest's own
    checks of its memory and page tables find nothing; frames, processes, files and descriptors
    are as many at the end as after the first cycle."""
    check_cycles(host, tmp_path, 10)


@pytest.mark.slow
def test_a_hundred_cycles(host, tmp_path):
    """The same, a hundred times."""
    check_cycles(host, tmp_path, int(os.environ.get("XSAVE_TEST_CYCLES") or 100))
