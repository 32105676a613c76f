"""save, restore: a domain becomes bytes and bytes become a domain."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from xsave.commands.common import DOMAIN, Settings, json_option, pass_settings
from xsave.errors import UsageError

if TYPE_CHECKING:
    from xsave.guest.xen.domctl import Domctl
    from xsave.host.host import Host
    from xsave.host.prestart import WaitingProcess
    from xsave.host.source import Source
    from xsave.lazy import Lazy

STDIO = "-"
STDOUT_NAMES = (STDIO, "/dev/stdout", "/dev/fd/1", "/proc/self/fd/1")
DEFAULT_COMPRESS_LEVEL = 1


cpu_mismatch_option = click.option(
    "--cpu-mismatch",
    type=click.Choice(["refuse", "allow"]),
    default="refuse",
    show_default=True,
    help="What if the guest was promised CPU features the host lacks.",
)


@click.command()
@click.argument("name", type=DOMAIN)
@click.argument("file", metavar="FILE|-", type=click.Path(allow_dash=True))
@click.option("-c", "--leave-running", is_flag=True, help="The domain runs on afterwards.")
@click.option("-p", "--leave-paused", is_flag=True, help="The domain is paused afterwards.")
@click.option("--compress", is_flag=True, help="Write zstd; restore and zstd -d read it.")
@click.option(
    "--compress-level",
    type=click.IntRange(1, 19),
    metavar="N",
    help=f"zstd's level (1 to 19, {DEFAULT_COMPRESS_LEVEL}); implies --compress.",
)
@json_option
@pass_settings
def save(
    settings: Settings,
    name: str,
    file: str,
    leave_running: bool,
    leave_paused: bool,
    compress: bool,
    compress_level: int | None,
    as_json: bool,
) -> None:
    """Suspend a domain and save it to FILE, in Xen's own format.

    The domain ends only when the image is complete and on disk; after any failure it runs on.
    """
    from xsave import save as verb
    from xsave.host.channel import open_sink

    leave = leave_as(leave_running, leave_paused)
    settings.stdout_is_data = file in STDOUT_NAMES
    if file in STDOUT_NAMES and sys.stdout.isatty():
        raise UsageError("an image is nothing for a terminal: redirect stdout, or name a file")
    level = compress_level or (DEFAULT_COMPRESS_LEVEL if compress else None)
    with (
        settings.find(name) as domctl,
        open_sink(file, compress_level=level) as sink,
        settings.progress() as report,
    ):
        result = verb.save(domctl, sink.write, commit=sink.commit, leave=leave, report=report)
    settings.answer(as_json, asdict(result), f"{name}: saved to {file}")


def leave_as(running: bool, paused: bool) -> str:
    """Return what becomes of the domain after a save."""
    if running and paused:
        raise UsageError("--leave-running and --leave-paused exclude each other")
    return "running" if running else "paused" if paused else "destroyed"


@click.command()
@click.argument("file", metavar="FILE|-", type=click.Path(allow_dash=True))
@click.option("--name", metavar="NAME", help="The domain's name (default: the image's).")
@click.option("-p", "--paused", is_flag=True, help="Leave the domain paused.")
@click.option("--lazy", is_flag=True, help="Start at once; bring the memory when it is touched.")
@click.option(
    "--disk",
    "disks",
    multiple=True,
    metavar="VDEV=FILE",
    help="Another file for a disk of the image.",
)
@cpu_mismatch_option
@json_option
@pass_settings
def restore(
    settings: Settings,
    file: str,
    name: str | None,
    paused: bool,
    lazy: bool,
    disks: tuple[str, ...],
    cpu_mismatch: str,
    as_json: bool,
) -> None:
    """Continue the guest of an image, on fresh frames; zstd is recognised.

    After any failure nothing is left of the new domain.

    With --lazy the image must stay as it is until all of it has come (removing it does no harm).
    If it cannot be read then, the guest is lost; the image is not.
    """
    files = disk_files(disks)
    with settings.prestart() as process:
        from xsave import restore as verb
        from xsave.host.channel import open_source

        host = settings.open_host()
        with open_source(file) as source, ExitStack() as stack, settings.progress() as report:
            share = stack.enter_context(lazily(source, host.nr_frames)) if lazy else None
            info = verb.restore(
                source,
                domain_maker(host, process, share.descriptors if share else ()),
                name=name,
                paused=paused,
                cpu_mismatch=cpu_mismatch,
                disk_files=files,
                nr_frames=host.nr_frames,
                lazy=share,
                report=report,
            )
    settings.answer(as_json, asdict(info), f"{info.name}: domain {info.domid}, {info.state}")


def lazily(source: Source, nr_frames: int) -> Lazy:
    """Return what a lazy restore from this source takes. Raises UsageError: it cannot be one."""
    from xsave.host.source import FileSource
    from xsave.lazy import Lazy

    if not isinstance(source, FileSource):
        raise UsageError(
            f"{source.name} cannot be restored lazily: that takes a plain file, neither compressed "
            "nor a pipe (zstd -d --sparse makes one)"
        )
    return Lazy(source, nr_frames)


def disk_files(texts: Sequence[str]) -> dict[str, str]:
    """Return absolute paths by virtual device, from texts VDEV=FILE."""
    files = {}
    for text in texts:
        vdev, _, path = text.partition("=")
        if not vdev or not path:
            raise UsageError(f"--disk {text}: expected VDEV=FILE, such as xvda=disk.img")
        if vdev in files:
            raise UsageError(f"--disk {vdev} is given twice")
        files[vdev] = str(Path(path).absolute())
    return files


def domain_maker(
    host: Host, process: WaitingProcess | None = None, lazy: Sequence[int] = ()
) -> Callable[[str, int], Domctl]:
    """Return what makes an empty domain of this host, given its name and pages.

    process: one that waits for its domain already; lazy: see spawn()."""
    from xsave.host.spawn import spawn

    def make(name: str, nr_pages: int) -> Domctl:
        host.check_room(nr_pages)
        return spawn(host, name, process, lazy)

    return make
