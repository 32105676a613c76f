"""source.py and open_source: files, pipes, holes."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from tests.image.strategies import image
from xsave.errors import ImageError, StorageError
from xsave.host.channel import open_source
from xsave.host.source import FileSource, StreamSource
from xsave.image.stream import StreamDecoder

CONTENT = np.random.default_rng(2).bytes(700_000)


def read_in_steps(source, steps):
    pieces = [bytes(source.read(n)) for n in steps]
    while piece := bytes(source.read(100_000)):
        pieces.append(piece)
    return b"".join(pieces)


class Feeder:
    """A pipe into which a thread writes pieces, one write each."""

    def __init__(self, pieces):
        self.read_fd, self._fd = os.pipe()
        self._pieces = pieces
        self._thread = threading.Thread(target=self._write)
        self._thread.start()

    def _write(self):
        try:
            for piece in self._pieces:
                view = memoryview(piece)
                while len(view):
                    view = view[os.write(self._fd, view) :]
        except BrokenPipeError:
            pass
        finally:
            os.close(self._fd)

    def join(self):
        self._thread.join(10)
        assert not self._thread.is_alive()


def cut(data, places):
    """The data in pieces, cut at these places."""
    ends = sorted({min(place, len(data)) for place in places} | {len(data)})
    return [data[a:b] for a, b in zip([0, *ends], ends, strict=False)]


places = st.lists(st.integers(0, len(CONTENT)), max_size=8)
steps = st.lists(st.integers(0, 300_000), max_size=8)


@given(places, steps)
def test_a_pipe_gives_the_bytes_however_they_come(where, sizes):
    """read(n) is n bytes whatever pieces the pipe has; fewer only at the end."""
    feeder = Feeder(cut(CONTENT, where))
    with StreamSource(feeder.read_fd, "pipe") as source:
        for n in sizes:
            before = source.position
            piece = source.read(n)
            assert piece == CONTENT[before : before + n]
        assert bytes(source.read(len(CONTENT) + 1)) == CONTENT[sum(sizes) :]
        assert source.position == len(CONTENT)
        assert len(source.read(1)) == 0
        assert source.size is None
        assert source.zero_pages(0, 1) is None
    feeder.join()


def test_an_image_fed_at_every_split():
    """An image that comes in two pieces, cut anywhere, is the same items."""
    data = image("xl", config=b"{}")
    expected = [item.value for item in StreamDecoder(_reads(data))]
    for place in [*range(400), *range(400, len(data), 997)]:
        feeder = Feeder([data[:place], data[place:]])
        with StreamSource(feeder.read_fd, "pipe") as source:
            assert [item.value for item in StreamDecoder(source.read)] == expected
        feeder.join()


def _reads(data):
    from xsave.image.buffers import reader

    return reader(data)


@given(steps)
def test_a_file_gives_views(tmp_path_factory, sizes):
    """A regular file is mapped: read returns read-only views of the map."""
    path = tmp_path_factory.mktemp("source") / "file"
    path.write_bytes(CONTENT)
    with open_source(str(path)) as source:
        assert isinstance(source, FileSource)
        assert source.size == len(CONTENT)
        piece = source.read(10)
        assert piece.readonly
        assert bytes(piece) + read_in_steps(source, sizes) == CONTENT
    assert bytes(piece) == CONTENT[:10]  # views outlive the source


def test_an_empty_file(tmp_path):
    """An empty file cannot be mapped, and is empty."""
    path = tmp_path / "empty"
    path.write_bytes(b"")
    with open_source(str(path)) as source:
        assert len(source.read(5)) == 0
        assert source.size == 0


def test_peek_consumes_nothing():
    """Looking for a magic leaves the bytes for read, also when they come one by one."""
    feeder = Feeder([b"a", b"b", b"c", b"d", b"efg"])
    with StreamSource(feeder.read_fd, "pipe") as source:
        assert bytes(source.peek(4)) == b"abcd"
        assert bytes(source.read(5)) == b"abcde"
        assert source.position == 5
    feeder.join()


@pytest.mark.parametrize("path", ["/no/such/file", "/", "a\0b"])
def test_what_cannot_be_read(path):
    """A missing file, a directory and an impossible name are StorageErrors with the name."""
    with pytest.raises(StorageError, match="cannot read"):
        open_source(path)


def test_a_file_cut_while_it_is_read(tmp_path):
    """A file that somebody cuts is a StorageError, not the end of the process."""
    path = tmp_path / "file"
    path.write_bytes(CONTENT)
    with open_source(str(path)) as source:
        source.read(10)
        os.truncate(path, 1000)
        with pytest.raises(StorageError, match="cut shorter"):
            source.read(100_000)


def sparse_file(path, pages, shift):
    """A file whose pages (from offset `shift`) are data or holes; skip where holes do not exist."""
    with path.open("wb") as out:
        for index, has_data in enumerate(pages):
            if has_data:
                os.pwrite(out.fileno(), b"d" * 4096, shift + 4096 * index)
        out.truncate(shift + 4096 * len(pages))


@given(st.lists(st.booleans(), min_size=1, max_size=60), st.integers(0, 5000))
def test_zero_pages_are_never_wrong(tmp_path_factory, pages, shift):
    """A page with data is never called zero; inside a long hole every page is."""
    path = tmp_path_factory.mktemp("holes") / "file"
    sparse_file(path, pages, shift)
    with open_source(str(path)) as source:
        zero = source.zero_pages(shift, len(pages))
    assert zero.shape == (len(pages),)
    assert not any(is_zero and has_data for is_zero, has_data in zip(zero, pages, strict=True))


def test_holes_are_found(tmp_path):
    """Pages inside a hole are known to be zero without a look; others are not."""
    path = tmp_path / "file"
    sparse_file(path, [True] + [False] * 62 + [True], 0)
    if path.stat().st_blocks * 512 >= 64 * 4096:
        pytest.skip("this file system has no holes")
    with open_source(str(path)) as source:
        assert source.zero_pages(0, 64).tolist() == [False] + [True] * 62 + [False]
        assert source.zero_pages(4096 * 2 + 1, 3).tolist() == [True] * 3
        assert source.zero_pages(1, 1).tolist() == [False]
    path.write_bytes(b"")
    os.truncate(path, 65536)
    with open_source(str(path)) as source:
        assert source.zero_pages(0, 16).all()


SHOW = """
import sys
from xsave.host.channel import open_source
with open_source("-") as source:
    print(type(source).__name__, source.size, len(source.read(1 << 30)), source.position)
"""


def run_with(stdin):
    return subprocess.run(
        [sys.executable, "-c", SHOW],
        stdin=stdin,
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    ).stdout.split()


def test_standard_input(tmp_path):
    """`-` is mapped where it is a file, from its position on; a pipe is read; zstd is noticed."""
    path = tmp_path / "file"
    path.write_bytes(CONTENT)
    n = len(CONTENT)
    with path.open("rb", buffering=0) as file:
        assert run_with(file) == ["FileSource", str(n), str(n), str(n)]
        file.seek(1000)
        assert run_with(file) == ["FileSource", *[str(n - 1000)] * 3]
    feeder = Feeder([CONTENT])
    assert run_with(feeder.read_fd) == ["StreamSource", "None", str(n), str(n)]
    feeder.join()
    os.close(feeder.read_fd)
    feeder = Feeder(cut(zstandard.compress(CONTENT), [1, 2, 3, 10]))
    assert run_with(feeder.read_fd) == ["ZstdSource", "None", str(n), str(n)]
    feeder.join()
    os.close(feeder.read_fd)


def test_pipes_and_files_give_the_same_error(tmp_path):
    """A cut image is the same ImageError from a file and from a pipe."""
    data = image()[:-20]
    path = tmp_path / "file"
    path.write_bytes(data)
    feeder = Feeder([data])
    messages = []
    for source in (open_source(str(path)), StreamSource(feeder.read_fd, "pipe")):
        with source, pytest.raises(ImageError) as found:
            list(StreamDecoder(source.read))
        messages.append(str(found.value))
    assert messages[0] == messages[1]
    feeder.join()
