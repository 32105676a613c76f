"""compression.py: zstd in both directions, in bounded memory, by many threads."""

from __future__ import annotations

import subprocess
import threading

import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from xsave.errors import ImageError, StorageError
from xsave.host.channel import open_sink, open_source
from xsave.host.compression import ZstdSource
from xsave.host.source import Source
from xsave.image.buffers import Rows, Zeros, reader
from xsave.image.zstdseek import FRAME_CONTENT, parse_seek_table

RANDOM = np.random.default_rng(3).bytes(2_500_000)
CONTENT = RANDOM + bytes(7_000_000) + RANDOM[:1_000_000] * 3


class Memory(Source):
    """A source of bytes in memory."""

    def __init__(self, data):
        super().__init__("memory")
        self._read = reader(data)

    def read(self, n):
        return self._read(n)


def compress(content, **options):
    return zstandard.ZstdCompressor(write_checksum=True, **options).compress(content)


def streamed(content):
    compressor = zstandard.ZstdCompressor(write_checksum=True).compressobj()
    return compressor.compress(content) + compressor.flush()


def decompress(data, steps=()):
    with ZstdSource(Memory(data)) as source:
        pieces = [bytes(source.read(n)) for n in steps]
        while piece := bytes(source.read(1 << 20)):
            pieces.append(piece)
        assert source.position == sum(map(len, pieces))
    return b"".join(pieces)


FILES = {
    "one sized frame": compress(CONTENT),
    "one long frame": streamed(CONTENT),
    "many short frames": b"".join(
        compress(CONTENT[i : i + 300_000]) for i in range(0, len(CONTENT), 300_000)
    ),
    "a mixture": compress(CONTENT[:10])
    + streamed(CONTENT[10:5_000_000])
    + compress(b"")
    + compress(CONTENT[5_000_000:])
    + streamed(b""),
}


@pytest.mark.parametrize("kind", FILES)
@given(steps=st.lists(st.integers(0, 2_000_000), max_size=6))
def test_the_content_comes_back(kind, steps):
    """Any frames, read in any steps, give the content."""
    assert decompress(FILES[kind], steps) == CONTENT


@given(st.sampled_from(sorted(FILES)), st.integers(0), st.integers(1, 255))
def test_one_damaged_byte(kind, where, change):
    """A damaged byte is an ImageError, or (in bits that mean nothing) the same content."""
    data = bytearray(FILES[kind])
    data[where % len(data)] ^= change
    try:
        found = decompress(bytes(data))
    except ImageError as error:
        assert error.record == "zstd frame"
    else:
        assert found == CONTENT


@given(st.sampled_from(sorted(FILES)), st.integers(0))
def test_cut_anywhere(kind, where):
    """A file cut inside a frame is an ImageError, be it in the last byte of a checksum."""
    data = FILES[kind]
    try:
        found = decompress(data[: where % len(data)])
    except ImageError:
        pass
    else:  # the cut was between two frames
        assert len(found) < len(CONTENT) or found == CONTENT
        assert CONTENT.startswith(found)
    with pytest.raises(ImageError, match="cut off"):
        decompress(data[:-1])


def test_something_behind_the_frames():
    """Junk behind the last frame is an ImageError, not ignored."""
    with pytest.raises(ImageError, match="no zstd frame"):
        decompress(FILES["one sized frame"] + b"junk")


def test_a_bomb_takes_its_time_not_our_memory():
    """A frame of 1 GiB of zeros in 33 kB is handed out in pieces of a few MiB at most."""
    compressor = zstandard.ZstdCompressor(write_checksum=True).compressobj()
    zeros = bytes(16 << 20)
    bomb = b"".join(compressor.compress(zeros) for _ in range(64)) + compressor.flush()
    with ZstdSource(Memory(bomb)) as source:
        assert not any(source.read(1000))
        assert len(source._rest) <= 8 << 20
        assert not any(source.read(50 << 20))


def test_a_frame_that_lies_about_its_content():
    """A short frame with more inside than it says, or less, is an ImageError."""
    honest = compress(b"x" * 1000)  # 2-byte content size at offset 5
    for size in (999, 1001):
        lying = honest[:5] + (size - 256).to_bytes(2, "little") + honest[7:]
        with pytest.raises(ImageError):
            decompress(lying)


FRAMES = np.random.default_rng(1).integers(0, 9, (99, 512), np.uint64)

buffers = st.lists(
    st.one_of(
        st.binary(max_size=3000),
        st.builds(Zeros, st.integers(0, 5000) | st.just(3 * FRAME_CONTENT + 5)),
        st.integers(0, 900).map(lambda n: np.frombuffer(RANDOM, np.uint8)[: n * 1024]),
        st.integers(0, 700).map(
            lambda n: Rows(FRAMES, np.arange(7 * n, step=7, dtype=np.uint64) % np.uint64(99))
        ),
    ),
    max_size=8,
)


def content(buffer):
    if isinstance(buffer, Rows):
        buffer = buffer.gather()
    return bytes(buffer.nbytes) if isinstance(buffer, Zeros) else bytes(buffer)


@given(buffers)
def test_round_trip(tmp_path_factory, given_buffers):
    """What is written through a compressing sink comes back, for us and for the library."""
    path = tmp_path_factory.mktemp("compressed") / "x.zst"
    with open_sink(str(path), compress_level=1) as sink:
        sink.write(given_buffers)
        sink.commit()
        nr_bytes = sink.position
    expected = b"".join(map(content, given_buffers))
    assert nr_bytes == len(expected)
    sizes = parse_seek_table(path.read_bytes())
    assert sizes[:, 1].sum() == len(expected)
    assert all(size == FRAME_CONTENT for size in sizes[:-1, 1])
    if expected:
        assert path.read_bytes()[:4] == b"\x28\xb5\x2f\xfd"
        with open_source(str(path)) as source:
            assert isinstance(source, ZstdSource)
            assert bytes(source.read(len(expected) + 1)) == expected


def test_buffers_may_be_used_again(tmp_path):
    """write() is done with its buffers when it returns, though threads still compress."""
    scratch = bytearray(3 << 20)
    with open_sink(str(tmp_path / "x"), compress_level=1) as sink:
        for value in range(8):
            scratch[:] = bytes([value]) * len(scratch)
            sink.write([scratch])
        scratch[:] = b"\xff" * len(scratch)
        sink.commit()
    with open_source(str(tmp_path / "x")) as source:
        for value in range(8):
            assert bytes(source.read(3 << 20)) == bytes([value]) * (3 << 20)


def test_the_zstd_tool_reads_it(tmp_path):
    """`zstd -d` reads our files, `-t` finds the checksums right."""
    path = tmp_path / "x.zst"
    with open_sink(str(path), compress_level=3) as sink:
        sink.write([CONTENT])
        sink.commit()
    try:
        subprocess.run(["zstd", "-qt", path], check=True)
    except FileNotFoundError:
        pytest.skip("no zstd tool here")
    assert subprocess.run(["zstd", "-dc", path], capture_output=True).stdout == CONTENT


def test_an_abort_leaves_nothing(tmp_path):
    """Leaving without commit removes the file and ends the threads."""
    nr_threads = threading.active_count()
    with open_sink(str(tmp_path / "x"), compress_level=1) as sink:
        sink.write([CONTENT])
    assert list(tmp_path.iterdir()) == []
    with open_sink("/dev/full", compress_level=1) as sink, pytest.raises(StorageError):
        sink.write([CONTENT])
        sink.commit()
    with ZstdSource(Memory(FILES["many short frames"])) as source:
        source.read(10)
    assert threading.active_count() == nr_threads
