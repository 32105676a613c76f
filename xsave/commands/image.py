"""`xsave image`: look at, check and transform images, without running anything.

Every command takes any wrapping, compressed or not, from a file or a pipe, and gives the same
answer for each. With `-` as output, answers and talk go to stderr.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import click

from xsave import console
from xsave.commands.common import Settings, json_option, pass_settings
from xsave.errors import HostCannotTake, ImageError, UsageError
from xsave.progress import Pages, Report

if TYPE_CHECKING:
    from xsave.host.sink import Sink
    from xsave.host.source import Source
    from xsave.image.buffers import Buffer
    from xsave.image.verify import Finding

_DEFAULT_LEVEL = 1
#: The static data of an image (its CPUID policy among them) lie within this.
_HEAD_BYTES = 32 << 20
_PAGE_SIZE = 4096


@click.group()
def image() -> None:
    """Look at, check and transform saved images."""


@image.command()
@click.argument("file")
@json_option
@pass_settings
def info(settings: Settings, file: str, as_json: bool) -> None:
    """Say what an image is: kind, versions, pages by type, records, configuration."""
    from xsave.host.channel import open_source
    from xsave.image.info import summary
    from xsave.image.stream import StreamDecoder

    with open_source(file) as source:
        answer = summary(StreamDecoder(source.read))
    if as_json:
        console.emit_json(answer)
    else:
        _show_info(answer)


@image.command()
@click.argument("file")
@click.option("--for-host", is_flag=True, help="Also ask whether this host's CPU can run it.")
@json_option
@pass_settings
def verify(settings: Settings, file: str, for_host: bool, as_json: bool) -> None:
    """Check an image strictly, down into page tables and vCPUs: is a restore safe?

    Exit code 3: it has errors; 4: it is sound, but this host lacks what it was promised.
    """
    from xsave.host.channel import open_source
    from xsave.image.verify import verify as verify_image

    with open_source(file) as source:
        head = _Head(source)
        findings = verify_image(head.read, source.zero_pages)
    missing = head.missing_features() if for_host else []
    _show_findings(findings, missing, as_json)
    nr_errors = sum(finding.severity == "error" for finding in findings)
    if nr_errors:
        raise click.exceptions.Exit(ImageError.exit_code)
    if missing:
        raise click.exceptions.Exit(HostCannotTake.exit_code)
    if not as_json:
        settings.say(f"{file}: no errors")


@image.command()
@click.argument("file")
@click.option("-o", "--output", default="-", show_default=True, help="Where the JSON goes.")
@click.option("--no-pages", is_flag=True, help="Leave the pages out (to read, not to encode).")
@json_option
@pass_settings
def decode(settings: Settings, file: str, output: str, no_pages: bool, as_json: bool) -> None:
    """Write an image as JSON, one record a line; nothing is lost."""
    from xsave.host.channel import open_sink, open_source
    from xsave.image.stream import StreamDecoder
    from xsave.image.textfile import decode as decode_image

    settings.stdout_is_data = output == "-"
    with open_source(file) as source, open_sink(output) as sink:
        lines = decode_image(StreamDecoder(source.read), with_pages=not no_pages)
        _copy(([line.encode()] for line in lines), sink)
    _answer_written(settings, as_json, file, output, sink)


@image.command()
@click.argument("file")
@click.option("-o", "--output", default="-", show_default=True, help="Where the image goes.")
@json_option
@pass_settings
def encode(settings: Settings, file: str, output: str, as_json: bool) -> None:
    """Write the image that `decode` wrote as JSON."""
    from xsave.host.channel import open_sink, open_source
    from xsave.image.textfile import encode as encode_image

    _claim_stdout(settings, output)
    with open_source(file) as source, open_sink(output) as sink:
        _copy(encode_image(source.read), sink)
    _answer_written(settings, as_json, file, output, sink)


@image.command()
@click.argument("source_file", metavar="IN")
@click.argument("output", metavar="OUT")
@click.option(
    "--format",
    "target",
    type=click.Choice(["xl", "libxl", "libxc"]),
    help="The wrapping to write (default: that of IN).",
)
@click.option("--config", type=click.File("rb"), help="JSON for the xl header (else kept).")
@click.option("--stream-version", type=click.Choice(["3"]), help="Make version 3 of version 2.")
@click.option("--drop-tail", is_flag=True, help="Leave out what follows the end of the image.")
@click.option("--compress/--no-compress", default=None, help="zstd; default: if OUT ends in .zst")
@click.option("--compress-level", type=click.IntRange(1, 19), help="1 is fast, 19 is small.")
@json_option
@pass_settings
def convert(
    settings: Settings,
    source_file: str,
    output: str,
    target: str | None,
    config: Any,
    stream_version: str | None,
    drop_tail: bool,
    compress: bool | None,
    compress_level: int | None,
    as_json: bool,
) -> None:
    """Write an image in another wrapping, compressed or not; empty pages become holes."""
    from xsave.host.channel import open_sink, open_source
    from xsave.image.convert import convert as convert_image
    from xsave.image.stream import StreamDecoder

    _claim_stdout(settings, output)
    level = _level(output, compress, compress_level)
    with (
        open_source(source_file) as source,
        open_sink(output, compress_level=level) as sink,
        settings.progress() as report,
    ):
        buffers = convert_image(
            StreamDecoder(source.read),
            target or "",
            config=config.read().rstrip(b"\0") if config else None,
            stream_version=int(stream_version) if stream_version else None,
            drop_tail=drop_tail,
            zero_hint=source.zero_pages if sink.wants_zeros else None,
        )
        _copy(buffers, sink, report, source.size)
    _answer_written(settings, as_json, source_file, output, sink)


class _Head:
    """Reads through to a source and remembers the beginning, for a second look at it."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._pieces: list[memoryview] = []
        self._left = _HEAD_BYTES

    def read(self, n: int) -> memoryview:
        """Return the next n bytes of the source."""
        piece = self._source.read(n)
        if self._left > 0:
            self._pieces.append(piece)
            self._left -= len(piece)
        return piece

    def missing_features(self) -> list[str]:
        """Return the CPU features the image was promised and this host lacks."""
        from xsave.guest.xen.cpuid import missing_features
        from xsave.image.buffers import reader
        from xsave.image.policy import cpuid_policy

        return missing_features(cpuid_policy(reader(b"".join(self._pieces))))


def _level(output: str, compress: bool | None, level: int | None) -> int | None:
    """Return the zstd level to use, None for no compression."""
    if compress is False and level is not None:
        raise UsageError("--no-compress and --compress-level exclude each other")
    if compress or level is not None or (compress is None and output.endswith(".zst")):
        return level or _DEFAULT_LEVEL
    return None


def _claim_stdout(settings: Settings, output: str) -> None:
    """Note that an image goes to stdout; refuse to write one to a terminal."""
    settings.stdout_is_data = output == "-"
    if output == "-" and sys.stdout.isatty():
        raise UsageError("an image is not for a terminal: give an output file, or a pipe")


def _copy(
    chunks: Iterable[list[Buffer]], sink: Sink, report: Report | None = None, size: int | None = 0
) -> None:
    """Write all chunks and commit, reporting the way through `size` bytes.

    A reader that left is told apart from a fault of ours, for `cli` to stop quietly.
    """
    from xsave.host.channel import BrokenPipe

    try:
        for buffers in chunks:
            sink.write(buffers)
            if report:
                done = sink.position // _PAGE_SIZE
                report(Pages("convert", done, (size or 0) // _PAGE_SIZE, sink.position))
        sink.commit()
    except BrokenPipe as error:
        raise BrokenPipeError(str(error)) from error


def _answer_written(settings: Settings, as_json: bool, file: str, output: str, sink: Sink) -> None:
    answer = {"input": file, "output": output, "image_bytes": sink.position}
    size = console.human_bytes(sink.position)
    settings.answer(as_json, answer, f"{file} -> {output}: {size}")


def _show_info(answer: dict[str, Any]) -> None:
    """Print the answer of `info` for a person."""
    config = answer["config"]
    c_info = config.get("c_info") if isinstance(config, dict) else None
    name = c_info.get("name") if isinstance(c_info, dict) else None
    pages = {kind: count for kind, count in answer["nr_pages"].items() if count}
    trailing = f"{answer['trailing_bytes']} bytes ({answer['trailing']})"
    rows = [
        ["format", f"{answer['format']}, stream version {answer['stream_version']}"],
        ["domain", f"{answer['domain_type']}{f', {name}' if name else ''}"],
        ["saved by", f"Xen {answer['xen_version']}"],
        ["vCPUs", str(answer["nr_vcpus"]) if answer["nr_vcpus"] is not None else "in HVM_CONTEXT"],
        ["last pfn", f"{answer['max_pfn']:#x}" if answer["max_pfn"] is not None else "none"],
        ["pages", ", ".join(f"{count} {kind}" for kind, count in pages.items())],
        ["size", console.human_bytes(answer["image_bytes"])],
        ["behind it", trailing if answer["trailing_bytes"] else "nothing"],
    ]
    console.table("Image", ["", "value"], rows)
    records = [
        [entry["layer"], entry["type"], str(entry["count"]), console.human_bytes(entry["bytes"])]
        for entry in answer["records"]
    ]
    console.table("Records", ["layer", "record", "count", "size"], records)


def _show_findings(findings: list[Finding], missing: list[str], as_json: bool) -> None:
    """Print what `verify` found."""
    fields = ("severity", "rule", "message", "record", "offset")
    if as_json:
        listed = [{name: getattr(finding, name) for name in fields} for finding in findings]
        console.emit_json({"findings": listed, "missing_features": missing})
        return
    rows = [
        [
            f.severity,
            f.rule,
            f.record or "",
            f"{f.offset:#x}" if f.offset is not None else "",
            f.message,
        ]
        for f in findings
    ]
    if rows:
        console.table("Findings", ["severity", "rule", "record", "offset", "message"], rows)
    if missing:
        console.text(f"this host lacks: {' '.join(missing)}")
