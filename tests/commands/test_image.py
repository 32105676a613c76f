"""`xsave image`: the commands as processes, files and pipes, answers and exit codes."""

from __future__ import annotations

import json
import os
import stat

import pytest
import zstandard

from tests.image.strategies import image
from xsave.image.stream import GO_MESSAGE

KEYS = {
    "format",
    "domain_type",
    "xen_version",
    "stream_version",
    "endianness",
    "nr_vcpus",
    "max_pfn",
    "nr_pages",
    "records",
    "config",
    "trailing_bytes",
}


@pytest.fixture
def small(tmp_path):
    """A small sound image, as a file."""
    path = tmp_path / "small.img"
    path.write_bytes(image(config=b'{"c_info": {"name": "small"}}'))
    return path


def through_pipe(xsave, data, *arguments):
    """Run a command with the data on a real pipe as its standard input."""
    return xsave(*arguments, stdin=data)


def test_info_keys(xsave, small):
    """`info --json` has the keys of the contract."""
    found = xsave.json("image", "info", small)
    assert set(found) >= KEYS
    assert found["config"] == {"c_info": {"name": "small"}}
    assert {"NOTAB", "L1TAB", "L2TAB", "L3TAB", "L4TAB", "XTAB", "pinned"} <= set(found["nr_pages"])
    assert set(found["records"][0]) >= {"type", "count", "bytes"}


def test_file_pipe_and_zstd_give_the_same_answer(xsave, small, tmp_path):
    """The answer is that of the image, whichever way it comes in."""
    data = small.read_bytes()
    (tmp_path / "small.zst").write_bytes(zstandard.compress(data))
    expected = xsave.ok("image", "info", small, "--json").out
    assert xsave.ok("image", "info", tmp_path / "small.zst", "--json").out == expected
    for piped in (data, zstandard.compress(data)):
        assert through_pipe(xsave, piped, "image", "info", "-", "--json").out == expected


def test_info_for_people(xsave, small):
    """Without --json there is a table."""
    out = xsave.ok("image", "info", small).out.decode()
    assert "Xen 4.17" in out
    assert "X86_PV_VCPU_BASIC" in out
    small.write_bytes(small.read_bytes() + GO_MESSAGE)
    assert "go_message" in xsave.ok("image", "info", small).out.decode()


@pytest.mark.parametrize("command", ["info", "verify", "decode", "convert"])
def test_damage_is_exit_code_3(xsave, small, tmp_path, command):
    """A cut image is exit code 3, one line, and no file left behind."""
    small.write_bytes(small.read_bytes()[:-9])
    out = tmp_path / "out" / "x"
    out.parent.mkdir()
    more = {"decode": ["-o", out], "convert": [out]}.get(command, [])
    result = xsave("image", command, small, *more)
    assert result.code == 3
    assert "cut off" in result.err + result.out.decode()
    assert list(out.parent.iterdir()) == []


@pytest.mark.parametrize("command", ["info", "verify", "decode", "encode"])
def test_no_file_is_exit_code_7(xsave, command):
    """What cannot be read is exit code 7."""
    result = xsave("image", command, "/no/such/file")
    assert result.code == 7
    assert "No such file" in result.err


def test_decode_and_encode(xsave, small, tmp_path):
    """decode, then encode, is the same file; through pipes too."""
    text = tmp_path / "x.json"
    xsave.ok("image", "decode", small, "-o", text)
    assert json.loads(text.read_text())["format"] == "xl"
    xsave.ok("image", "encode", text, "-o", tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == small.read_bytes()
    assert stat.S_IMODE((tmp_path / "again").stat().st_mode) == 0o600
    shown = xsave.ok("image", "decode", small)
    assert shown.out == text.read_bytes()
    assert through_pipe(xsave, shown.out, "image", "encode", "-").out == small.read_bytes()


def test_decode_without_pages(xsave, small):
    """--no-pages leaves a text to read, which encode refuses as an image of nothing."""
    shown = xsave.ok("image", "decode", "--no-pages", small).out
    result = through_pipe(xsave, shown, "image", "encode", "-")
    assert result.code == 3
    assert "no-pages" in result.err


def test_convert(xsave, small, tmp_path):
    """Wrapping, compression and tail change; the answer says what was written."""
    small.write_bytes(small.read_bytes() + b"tail")
    packed = tmp_path / "x.zst"
    answer = xsave.json("image", "convert", small, packed, "--format", "libxc", "--drop-tail")
    assert answer["output"] == str(packed)
    assert packed.read_bytes()[:4] == b"\x28\xb5\x2f\xfd"
    found = xsave.json("image", "info", packed)
    assert (found["format"], found["trailing_bytes"]) == ("libxc", 0)
    result = xsave.ok("image", "convert", small, "-", "--json")
    assert result.out == small.read_bytes()
    assert json.loads(result.err)["image_bytes"] == len(result.out)
    result = xsave.ok("image", "convert", small, "-", "--compress-level", "3")
    assert zstandard.ZstdDecompressor().decompressobj().decompress(result.out)


def test_convert_needs_a_configuration_for_xl(xsave, small, tmp_path):
    """libxc to xl wants --config, which is written into the header."""
    bare, config = tmp_path / "bare", tmp_path / "config.json"
    xsave.ok("image", "convert", small, bare, "--format", "libxc")
    assert xsave("image", "convert", bare, tmp_path / "x", "--format", "xl").code == 2
    assert not (tmp_path / "x").exists()
    config.write_text('{"c_info": {"name": "small"}}')
    xsave.ok("image", "convert", bare, tmp_path / "x", "--format", "xl", "--config", config)
    assert (tmp_path / "x").read_bytes() == small.read_bytes()


def test_convert_upgrades(xsave, tmp_path):
    """--stream-version 3 makes version 3 of version 2."""
    (tmp_path / "v2").write_bytes(image(version=2))
    xsave.ok("image", "convert", tmp_path / "v2", tmp_path / "v3", "--stream-version", "3")
    assert xsave.json("image", "info", tmp_path / "v3")["stream_version"] == 3


def test_convert_makes_holes(xsave, xen_image, tmp_path):
    """Empty pages of a real image become holes, and the bytes stay the same."""
    source = xen_image("pv-micro-1cpu.img")
    xsave.ok("image", "convert", source, tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == source.read_bytes()
    assert (tmp_path / "x").stat().st_blocks < source.stat().st_blocks / 1.5


@pytest.mark.parametrize(
    "arguments",
    [
        ["convert", "in", "out", "--format", "tar"],
        ["convert", "in", "out", "--compress-level", "0"],
        ["convert", "IN", "out", "--no-compress", "--compress-level", "1"],
        ["info"],
        ["nothing"],
    ],
)
def test_usage_errors(xsave, small, arguments):
    """What makes no sense is exit code 2."""
    arguments = [str(small) if argument == "IN" else argument for argument in arguments]
    assert xsave("image", *arguments).code == 2


def test_a_reader_that_left(xsave, small):
    """A broken pipe is a clean stop without a word."""
    small.write_bytes(small.read_bytes() + bytes(3_000_000))
    process = xsave.start("image", "convert", small, "-")
    process.stdout.close()
    assert process.wait(60) == 0
    assert process.stderr.read() == b""
    process.stderr.close()


def test_no_image_to_a_terminal(xsave, small):
    """An image is not written to a terminal."""
    leader, follower = os.openpty()
    process = xsave.start("image", "convert", small, "-", stdout=follower)
    assert process.wait(60) == 2
    assert b"terminal" in process.stderr.read()
    process.stderr.close()
    os.close(leader)
    os.close(follower)


def test_verify(xsave, xen_image, tmp_path):
    """A real image has no errors; a junk tail is one, listed with its place."""
    path = xen_image("pv-micro-1cpu-qemu64.img")
    answer = xsave.json("image", "verify", path)
    assert [f for f in answer["findings"] if f["severity"] == "error"] == []
    bad = tmp_path / "bad"
    bad.write_bytes(path.read_bytes() + b"junk")
    result = xsave("image", "verify", bad, "--json")
    assert result.code == 3
    (finding,) = [f for f in json.loads(result.out)["findings"] if f["severity"] == "error"]
    assert finding["offset"] == path.stat().st_size
    assert "error" in xsave("image", "verify", bad).out.decode()


def test_verify_for_host(xsave, xen_image):
    """AVX is asked of this host only with --for-host, and named: exit code 4; pipes too."""
    with_avx, plain = xen_image("pv-micro-1cpu.img"), xen_image("pv-micro-1cpu-qemu64.img")
    assert xsave("image", "verify", with_avx).code == 0
    result = xsave("image", "verify", "--for-host", with_avx)
    assert result.code == 4
    assert "avx" in result.out.decode().lower()
    assert xsave("image", "verify", "--for-host", plain).code == 0
    result = through_pipe(
        xsave, with_avx.read_bytes(), "image", "verify", "--for-host", "-", "--json"
    )
    assert result.code == 4
    assert "avx" in [name.lower() for name in json.loads(result.out)["missing_features"]]
