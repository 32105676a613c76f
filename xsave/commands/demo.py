"""demo: the whole story in a few seconds, on two hosts that are gone again afterwards.

Host a and host b hand out their frames in different orders. A guest is created on a, saved, and
restored on b while the old one still stands there, paused: only so can every page be compared,
frame against frame, and the image that b writes be the very bytes of a's. Then the old one ends,
the new one runs, and migrates back to a. The guest counts; no tick may be missing.
"""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from xsave import console
from xsave.commands.common import SIZE, Settings, json_option, pass_settings
from xsave.commands.flows import domain_maker
from xsave.commands.story import (
    GUEST,
    TICK_TIMEOUT_S,
    Story,
    chapter,
    detail,
    judge,
    show_proof,
    ticks_in,
    ticks_so_far,
    watch_ticks,
)
from xsave.errors import GuestStateError

if TYPE_CHECKING:
    from xsave.compare import Comparison
    from xsave.host.host import Host

HOST_MEMORY_FACTOR = 4


@click.command()
@click.option("--memory", type=SIZE, default="64M", show_default=True, help="The guest's memory.")
@click.option(
    "--touch", type=SIZE, default="8M", show_default=True, help="How much of it the guest fills."
)
@json_option
@pass_settings
def demo(settings: Settings, memory: int, touch: int, as_json: bool) -> None:
    """Create, save, restore and migrate a guest on two hosts; prove that it stays the same."""
    settings.stdout_is_data = as_json  # the story then goes to stderr
    with two_hosts(memory * HOST_MEMORY_FACTOR) as (a, b, directory):
        story, comparison = tell(settings, a, b, directory, memory, touch)
    if as_json:
        facts = {**story.facts, **asdict(comparison), "ticks": story.ticks}
        console.emit_json({**facts, "gapless": story.gapless})
    else:
        show_proof(story, comparison)
    judge(story, comparison)


@contextmanager
def two_hosts(memory_bytes: int) -> Iterator[tuple[Host, Host, Path]]:
    """Make two hosts in a home of their own; nothing of them is left afterwards."""
    from xsave.host.host import add_host, list_hosts
    from xsave.host.paths import runtime_directory

    directory = Path(tempfile.mkdtemp(prefix="demo-", dir=runtime_directory()))
    before = os.environ.get("XSAVE_HOME")
    os.environ["XSAVE_HOME"] = str(directory)
    try:
        yield add_host("a", memory_bytes), add_host("b", memory_bytes), directory
    finally:
        for host in list_hosts():
            for domain in host.domains():
                with host.find(str(domain.domid)) as domctl:
                    domctl.destroy()
            host.settle()
        shutil.rmtree(directory, ignore_errors=True)
        os.environ.pop("XSAVE_HOME")
        if before is not None:
            os.environ["XSAVE_HOME"] = before


def tell(
    settings: Settings, a: Host, b: Host, directory: Path, memory: int, touch: int
) -> tuple[Story, Comparison]:
    """Run the story, saying what happens; return what was found."""
    story = Story()
    first, second = directory / "first.img", directory / "second.img"
    size = console.human_bytes(a.memory_bytes)
    chapter(settings, f"two hosts, a and b: {size} each, frames handed out in different orders")
    create(settings, a, memory, touch)
    watch_ticks(settings, story, "created on a", a, 2)
    save(settings, story, a, first)
    story.ticks["created on a"] = ticks_so_far(story, a)
    check(settings, first)
    restore(settings, b, first)
    chapter(settings, "the old guest stands on a, the new one on b: every page is compared")
    comparison = compare_guests(a, b)
    story.facts["image_identical"] = save_again(settings, b, first, second)
    destroy(a)
    unpause(b)
    watch_ticks(settings, story, "restored on b", b, 2)
    migrate(settings, story, b, a)
    watch_ticks(settings, story, "migrated to a", a, 2)
    return story, comparison


# ---- chapters


def create(settings: Settings, host: Host, memory: int, touch: int) -> None:
    """Make the guest."""
    from xsave.host import create as verb

    size, filled = console.human_bytes(memory), console.human_bytes(touch)
    chapter(settings, f"create: a guest of {size}, {filled} of it filled")
    with settings.progress() as report:
        verb.create(host, GUEST, memory_bytes=memory, cmdline=f"touch={touch}", report=report)


def save(settings: Settings, story: Story, host: Host, image: Path) -> None:
    """Save the guest, which stays where it is, paused."""
    from xsave import save as verb
    from xsave.host.channel import open_sink

    chapter(settings, "save: the guest freezes itself, its state becomes an image of Xen's format")
    with (
        host.find(GUEST) as domctl,
        open_sink(str(image)) as sink,
        settings.progress() as report,
    ):
        result = verb.save(domctl, sink.write, commit=sink.commit, leave="paused", report=report)
    on_disk = image.stat().st_blocks * 512
    story.facts |= {"save": asdict(result), "image_bytes_on_disk": on_disk}
    size, blocks = console.human_bytes(result.image_bytes), console.human_bytes(on_disk)
    told = f"{result.nr_pages} pages, {size} of image ({blocks} on disk)"
    detail(settings, f"{told} in {result.seconds:.2f} s")


def check(settings: Settings, image: Path) -> None:
    """Verify the image strictly."""
    from xsave.host.channel import open_source
    from xsave.image.verify import verify

    with open_source(str(image)) as source:
        errors = [f for f in verify(source.read) if f.severity == "error"]
    if errors:
        raise GuestStateError(f"the image is not sound: {errors[0].message}")
    chapter(settings, "image verify: no errors, down into page tables and vCPU state")


def restore(settings: Settings, host: Host, image: Path) -> None:
    """Restore the guest paused."""
    from xsave import restore as verb
    from xsave.host.channel import open_source

    chapter(settings, f"restore on {host.name}: fresh frames, page tables written anew")
    with open_source(str(image)) as source, settings.progress() as report:
        verb.restore(
            source, domain_maker(host), paused=True, nr_frames=host.nr_frames, report=report
        )


def compare_guests(old: Host, new: Host) -> Comparison:
    """Compare the two guests frame by frame."""
    from xsave.compare import compare

    with old.find(GUEST) as before, new.find(GUEST) as after:
        return compare(before, after)


def save_again(settings: Settings, host: Host, first: Path, second: Path) -> bool:
    """Save the guest that never ran from its new frames; True if the bytes are the same."""
    from xsave import save as verb
    from xsave.host.channel import open_sink

    chapter(settings, f"saved again from {host.name} without having run: are the bytes the same?")
    with host.find(GUEST) as domctl, open_sink(str(second)) as sink:
        verb.save(domctl, sink.write, commit=sink.commit, leave="paused")
    return first.read_bytes() == second.read_bytes()


def destroy(host: Host) -> None:
    """End the guest that was only there to be compared."""
    with host.find(GUEST) as domctl:
        domctl.destroy()


def unpause(host: Host) -> None:
    """Let the guest run on."""
    with host.find(GUEST) as domctl:
        domctl.unpause()


def migrate(settings: Settings, story: Story, source: Host, target: Host) -> None:
    """Move the guest, listening to its old console until that closes."""
    from xsave import migrate as verb

    chapter(settings, f"migrate from {source.name} to {target.name}")
    start = time.monotonic()
    with source.find(GUEST) as listener, source.find(GUEST) as domctl:
        old_console = listener.console_attach()
        seen = ticks_so_far(story, source)
        with settings.progress() as report:
            verb.migrate(domctl, target, report=report)
        seen += ticks_in(story, read_to_end(old_console))
    # A tick may be both in the log and on the console: it came while we began to listen.
    story.ticks[f"restored on {source.name}"] = sorted(set(seen))
    story.facts["migrate_seconds"] = time.monotonic() - start


def read_to_end(stream: socket.socket) -> bytes:
    """Return everything until the other end closes."""
    stream.settimeout(TICK_TIMEOUT_S)
    data = b""
    with suppress(OSError):
        while piece := stream.recv(1 << 16):
            data += piece
    return data
