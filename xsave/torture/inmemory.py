"""An image in memory, written and read, and the little that has to be a file all the same."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import numpy as np

from xsave.image.buffers import Buffer, Rows, Zeros, reader


class Source:
    """An image in memory, for restore."""

    def __init__(self, image: bytes) -> None:
        self._read = reader(image)
        self.position = 0

    def read(self, n: int) -> memoryview:
        piece = self._read(n)
        self.position += len(piece)
        return piece

    def ready(self, wait_s: float = 0.0) -> bool:
        return True

    def zero_pages(self, offset: int, nr_pages: int) -> np.ndarray | None:
        return None


def as_bytes(buffer: Buffer) -> bytes:
    if isinstance(buffer, Zeros):
        return bytes(buffer.nbytes)
    if isinstance(buffer, Rows):
        return bytes(buffer.gather())
    return bytes(buffer)


def make_directory() -> tempfile.TemporaryDirectory[str]:
    """A directory for what a domain's process keeps in files: its console goes nowhere."""
    directory = tempfile.TemporaryDirectory(prefix="xsave-torture-")
    os.symlink(os.devnull, Path(directory.name) / "console.log")  # noqa: PTH211
    return directory
