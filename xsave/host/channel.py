"""How the bytes of an image come in and go out: files, pipes, devices, zstd on top of any.

    with open_source("-") as source, open_sink("img") as sink:
        ... source.read(n) ... sink.write([header, pages, Zeros(4096)]) ...
        sink.commit()

A source recognises zstd by its first bytes. A regular file written to appears under its name
only at `commit`, complete and on disk; whatever stands there before stays until then. Every
failure of the operating system is a StorageError that names the file.
"""

from __future__ import annotations

import os
import re
import stat
from typing import TYPE_CHECKING

from xsave.errors import StorageError
from xsave.host.oserror import BrokenPipe, storage_error

if TYPE_CHECKING:
    from collections.abc import Sequence

    from xsave.host.sink import Sink
    from xsave.host.source import FileSource, Source, StreamSource

__all__ = ["BrokenPipe", "open_joined", "open_sink", "open_source"]

_OWN_DESCRIPTOR = re.compile(r"/(?:dev|proc/self)/fd/(\d{1,6})")
_STANDARD = {"-": 1, "/dev/stdout": 1, "/dev/stderr": 2}


def open_source(path: str, timeout_s: float | None = None) -> Source:
    """Return the source of this path ("-": standard input), decompressed if it is zstd.

    timeout_s: for how long a pipe or socket may be silent, for ever if None."""
    from xsave.host.source import open_raw

    return _decompressed(open_raw(path, timeout_s))


def open_joined(fds: Sequence[int], timeout_s: float | None = None) -> Source:
    """Return the source of what comes in stripes over several descriptors (striping.py), which
    are its own from then on; decompressed if it is zstd."""
    from xsave.host.striping import StripedSource

    return _decompressed(StripedSource(fds, "the connections", timeout_s))


def _decompressed(raw: FileSource | StreamSource) -> Source:
    from xsave.image.zstdseek import MAGIC

    if bytes(raw.peek(len(MAGIC))) != MAGIC:
        return raw
    from xsave.host.compression import ZstdSource

    return ZstdSource(raw)


def open_sink(path: str, *, compress_level: int | None = None) -> Sink:
    """Return the sink for this path ("-": standard output); a level means zstd."""
    sink = _raw_sink(path)
    if compress_level is None:
        return sink
    from xsave.host.compression import CompressingSink

    return CompressingSink(sink, compress_level)


def _raw_sink(path: str) -> Sink:
    from xsave.host.sink import DescriptorSink, FileSink

    own = _OWN_DESCRIPTOR.fullmatch(path)
    number = int(own[1]) if own else _STANDARD.get(path)
    try:
        if number is not None:
            name = "standard output" if number == 1 else path
            return DescriptorSink(os.dup(number), name)
        if _is_special(path):
            return DescriptorSink(os.open(path, os.O_WRONLY | os.O_CLOEXEC), path)
    except OSError as error:
        storage_error(error, path, "write")
    except ValueError as error:  # a NUL in the name
        raise StorageError(f"cannot write {path!r}: {error}", path=path) from error
    return FileSink(path)


def _is_special(path: str) -> bool:
    """Return whether the path is a pipe, a device or a socket: written to, never replaced."""
    try:
        mode = os.stat(path).st_mode  # noqa: PTH116 - "-" and odd names are strings here
    except FileNotFoundError:
        return False
    if stat.S_ISDIR(mode):
        raise StorageError(f"cannot write {path}: it is a directory", path=path)
    return not stat.S_ISREG(mode)
