"""zstdseek.py: walking zstd frames, and the seek table."""

from __future__ import annotations

import subprocess

import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from xsave.errors import ImageError
from xsave.image.buffers import reader
from xsave.image.zstdseek import parse_seek_table, seek_table, walk

RANDOM = np.random.default_rng(1).bytes(3_000_000)
SKIPPABLE = bytes.fromhex("502a4d18 03000000") + b"abc"


def frame(content, **options):
    options = {"write_checksum": True, "write_content_size": True, **options}
    return zstandard.ZstdCompressor(**options).compress(content)


def streamed(content, **parameters):
    """A frame without its content size in the header, as a pipe gives."""
    options = zstandard.ZstdCompressionParameters(**parameters)
    compressor = zstandard.ZstdCompressor(compression_params=options).compressobj()
    return compressor.compress(content) + compressor.flush()


def frames(data):
    """The bytes of each frame, and what its header says."""
    found = []
    for piece in walk(reader(data)):
        if piece.is_first:
            found.append([piece.header, b"", piece.offset])
        found[-1][1] += piece.data
        assert len(zstd_blocks(piece)) <= 8
    return found


def zstd_blocks(piece):
    """A piece holds at most eight blocks: nothing else bounds its content."""
    at = len(piece.header.data) if piece.is_first else 0
    blocks = []
    while at + 3 <= len(piece.data):
        value = int.from_bytes(piece.data[at : at + 3], "little")
        at += 3 + (1 if (value >> 1) & 3 == 1 else value >> 3)
        blocks.append(value)
        if value & 1:
            break
    return blocks


@pytest.mark.parametrize("size", [0, 1, 255, 256, 65_791, 65_792, 131_072, 3_000_000])
@pytest.mark.parametrize("make", [frame, streamed], ids=["sized", "streamed"])
def test_frames_are_found(size, make):
    """Frames of every header form are cut where they end, between skippable ones."""
    parts = [make(RANDOM[:size]), make(bytes(size)), make(b"x" * size)]
    data = SKIPPABLE.join(parts)
    found = frames(data)
    assert [one[1] for one in found] == parts
    first, second, _ = (len(part) + len(SKIPPABLE) for part in parts)
    assert [one[2] for one in found] == [0, first, first + second]
    if make is frame:
        assert [one[0].content_bytes for one in found] == [size] * 3
        assert all(one[0].has_checksum for one in found)


def test_window_is_what_the_library_says():
    """The window of a frame is computed as RFC 8878 says."""
    for window_log in range(10, 27):
        data = streamed(b"abc", window_log=window_log)
        ((header, _, _),) = frames(data)
        assert header.window_bytes == zstandard.get_frame_parameters(data).window_size


def test_large_windows_are_refused():
    """A frame that would take more than 128 MiB of memory is refused before any is taken."""
    with pytest.raises(ImageError, match="window too large"):
        frames(streamed(b"abc", window_log=28))


def test_dictionaries_are_refused():
    """A frame made with a dictionary cannot be read without it."""
    dictionary = zstandard.train_dictionary(
        2000, [RANDOM[i : i + 500] for i in range(0, 90000, 500)]
    )
    with pytest.raises(ImageError, match="dictionary"):
        frames(frame(RANDOM[:1000], dict_data=dictionary))


@given(st.binary(max_size=40), st.data())
def test_cut_anywhere(content, data):
    """A cut inside a frame or a skippable frame is an ImageError with its offset."""
    whole = frame(content) + SKIPPABLE + frame(b"x" * 300_000)
    ends = [0, len(frame(content)), len(frame(content) + SKIPPABLE), len(whole)]
    cut = data.draw(st.integers(0, len(whole)).filter(lambda n: n not in ends))
    with pytest.raises(ImageError, match=r"cut off|no zstd frame") as found:
        frames(whole[:cut])
    assert found.value.offset <= cut


@given(st.binary(max_size=60), st.sampled_from([b"", b"\x28\xb5\x2f\xfd", frame(b"abc")]))
def test_any_bytes(junk, start):
    """Any bytes are frames or an ImageError."""
    try:
        frames(start + junk)
    except ImageError as error:
        assert error.offset <= len(start + junk)


sizes = st.lists(st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1)), max_size=5)


@given(sizes, st.binary(max_size=20))
def test_seek_table_round_trip(entries, before):
    """The table is found at the end of any file, with the sizes it was made of."""
    found = parse_seek_table(before + seek_table(entries))
    assert [tuple(row) for row in found.tolist()] == entries


@given(sizes, st.integers(0), st.integers(1, 255))
def test_a_damaged_table_is_no_table(entries, where, change):
    """A table with damage outside its rows is not taken for one; rows are only numbers."""
    table = bytearray(seek_table(entries))
    at = where % len(table)
    table[at] ^= change
    found = parse_seek_table(bytes(table))
    if not 8 <= at < len(table) - 9:
        assert found is None or at == len(table) - 5  # two reserved bits there mean nothing
    else:
        assert len(found) == len(entries)


@given(st.binary(max_size=60))
def test_any_end_has_a_table_or_none(end):
    """No bytes make the search for a table fail."""
    assert parse_seek_table(end) is None


def test_the_zstd_tool_skips_the_table(tmp_path):
    """`zstd -d` reads frames and table, if that tool is here."""
    path = tmp_path / "x.zst"
    path.write_bytes(frame(b"one") + frame(b"two") + seek_table([(1, 3), (2, 3)]))
    try:
        done = subprocess.run(["zstd", "-dc", path], capture_output=True, check=False)
    except FileNotFoundError:
        pytest.skip("no zstd tool here")
    assert done.stdout == b"onetwo"
