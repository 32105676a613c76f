"""qcow2 images: whatever is written is read again, by us and by QEMU; what is wrong is refused."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import zlib

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from xsave.errors import StorageError
from xsave.host.disk.image import check, open_image
from xsave.host.disk.spec import DiskSpec

needs_qemu_img = pytest.mark.skipif(shutil.which("qemu-img") is None, reason="no qemu-img")
MIB = 1 << 20
SECTOR = 512


def blank(path, size=MIB, *, cluster_bits=9, version=3, **changed):
    """Write an image with nothing in it, as qemu-img would: header, L1, refcount table, block."""
    cluster = 1 << cluster_bits
    l1_size = -(-size // (cluster * cluster // 8))
    l1_clusters = -(-l1_size * 8 // cluster)
    header = {
        "magic": 0x514649FB, "version": version, "backing_offset": 0, "backing_bytes": 0,
        "cluster_bits": cluster_bits, "size": size, "crypt": 0, "l1_size": l1_size,
        "l1_offset": 3 * cluster, "refcount_offset": cluster, "refcount_clusters": 1,
        "snapshots": 0, "snapshots_offset": 0, "incompatible": 0, "compatible": 0,
        "autoclear": 0, "order": 4, "length": 104,
    } | changed  # fmt: skip
    raw = struct.pack(">IIQIIQIIQQIIQQQQII", *header.values())
    used = 3 + l1_clusters
    parts = [
        (0, raw if version == 3 else raw[:72]),
        (cluster, struct.pack(">Q", 2 * cluster)),
        (2 * cluster, struct.pack(">H", 1) * used),
        (used * cluster - 1, b"\0"),
    ]
    with path.open("wb") as file:
        for offset, data in parts:
            file.seek(offset)
            file.write(data)
    return path


def spec(path, *, readonly=False):
    return DiskSpec(str(path), "qcow2", "xvda", readonly=readonly)


def read(disk, offset, nr):
    """Read in two pieces."""
    data = bytearray(nr)
    view = memoryview(data)
    disk.read(offset, [view[: nr // 3], view[nr // 3 :]])
    return data


def write(disk, offset, data):
    """Write in two pieces."""
    view = memoryview(data)
    disk.write(offset, [view[: len(data) // 3], view[len(data) // 3 :]])


def qemu_img(*arguments):
    subprocess.run(["qemu-img", *map(str, arguments)], check=True, stdout=subprocess.DEVNULL)


def as_qemu_sees_it(path):
    """Check an image with qemu-img, and return the disk's contents."""
    qemu_img("check", path)
    qemu_img("convert", "-f", "qcow2", "-O", "raw", path, f"{path}.raw")
    return path.with_name(f"{path.name}.raw").read_bytes()


# -- what is written is read ---

transfers = st.lists(
    st.tuples(
        st.sampled_from(["write", "read", "flush", "reopen"]),
        st.integers(0, MIB // SECTOR - 1),
        st.integers(1, 40),
        st.integers(1, 255),
    ),
    max_size=40,
)


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(cluster_bits=st.sampled_from([9, 12, 16]), version=st.integers(2, 3), steps=transfers)
def test_a_disk_is_what_was_written_to_it(tmp_path, cluster_bits, version, steps):
    """Like an array of bytes, through any writes, flushes and reopenings."""
    path = blank(tmp_path / "a", MIB + SECTOR, cluster_bits=cluster_bits, version=version)
    model = bytearray(MIB + SECTOR)
    disk = open_image(spec(path))
    for what, sector, nr, byte in steps:
        offset, end = sector * SECTOR, min((sector + nr) * SECTOR, len(model))
        if what == "write":
            data = bytes([byte]) * (end - offset)
            write(disk, offset, data)
            model[offset:end] = data
        elif what == "read":
            assert read(disk, offset, end - offset) == model[offset:end]
        elif what == "flush":
            disk.flush()
        else:
            disk.close()
            disk = open_image(spec(path))
    assert read(disk, 0, len(model)) == model
    disk.close()
    if shutil.which("qemu-img"):
        assert as_qemu_sees_it(path) == model


def test_only_what_is_flushed_counts_when_the_process_dies(tmp_path):
    """A copy of the file as it is at any moment holds all that was flushed, and is sound."""
    path = blank(tmp_path / "a")
    disk = open_image(spec(path))
    write(disk, 0, b"a" * 4096)
    disk.flush()
    write(disk, 8192, b"b" * 4096)
    write(disk, 0, b"c" * 512)
    shutil.copy(path, tmp_path / "copy")
    other = open_image(spec(tmp_path / "copy"))
    assert read(other, 512, 3584) == b"a" * 3584
    write(other, 300 * SECTOR, b"d" * 4096)
    assert read(other, 512, 3584) == b"a" * 3584
    other.close()
    if shutil.which("qemu-img"):
        as_qemu_sees_it(tmp_path / "copy")
    disk.close()


def test_many_clusters(tmp_path):
    """The refcount table grows when its clusters are too few, and is found again."""
    path = blank(tmp_path / "a", 20 * MIB)  # a cluster of table counts 8 MiB of the file
    disk = open_image(spec(path))
    for i in range(0, 20 * MIB, MIB):
        write(disk, i, bytes([1 + i // MIB]) * MIB)
    disk.close()
    disk = open_image(spec(path))
    assert all(read(disk, i, 5) == bytes([1 + i // MIB]) * 5 for i in range(0, 20 * MIB, MIB))
    disk.close()
    if shutil.which("qemu-img"):
        as_qemu_sees_it(path)


@needs_qemu_img
@pytest.mark.parametrize("cluster", [512, 65536])
@pytest.mark.parametrize("kind", ["raw", "qcow2", "compressed", "zstd", "snapshot"])
def test_what_qemu_made(tmp_path, kind, cluster):
    """Backing files, compressed clusters and snapshots are read, and written over without harm to
    what is below."""
    base = tmp_path / "base"
    contents = b"".join(bytes([i]) * 3000 for i in range(200))
    contents += bytes(-len(contents) % SECTOR)
    base.write_bytes(contents)
    path, options = tmp_path / "a", f"cluster_size={cluster}"
    if kind in ("raw", "qcow2"):
        if kind == "qcow2":
            qemu_img("convert", "-f", "raw", "-O", "qcow2", base, tmp_path / "b2")
        name = {"raw": "base", "qcow2": "b2"}[kind]
        qemu_img("create", "-q", "-f", "qcow2", "-o", options, "-b", name, "-F", kind, path, "1M")
    else:
        more = ["-c"] if kind != "snapshot" else []
        options += ",compression_type=zstd" if kind == "zstd" else ""
        qemu_img("convert", *more, "-f", "raw", "-O", "qcow2", "-o", options, base, path)
    if kind == "snapshot":
        qemu_img("snapshot", "-c", "s", path)
    disk = open_image(spec(path))
    model = bytearray(contents) + bytes(disk.nr_sectors * SECTOR - len(contents))
    assert read(disk, 0, len(model)) == model
    for offset in (512, 70000 // 512 * 512, len(contents) - 1024):
        write(disk, offset, b"new!" * 256)
        model[offset : offset + 1024] = b"new!" * 256
    assert read(disk, 0, len(model)) == model
    disk.close()
    assert as_qemu_sees_it(path) == model
    if kind == "snapshot":
        qemu_img("snapshot", "-a", "s", path)
        assert as_qemu_sees_it(path)[: len(contents)] == contents
    assert base.read_bytes() == contents


def test_compressed_clusters_that_are_none(tmp_path):
    """Garbage where compressed data should be is an input/output error, no more."""
    path = blank(tmp_path / "a")
    disk = open_image(spec(path))
    write(disk, 0, b"x" * 512)
    disk.close()
    raw = bytearray(path.read_bytes())
    l2 = struct.unpack_from(">Q", raw, 3 * 512)[0] & ((1 << 56) - 512)
    data = struct.unpack_from(">Q", raw, l2)[0] & ((1 << 56) - 512)
    for compressed in (b"\xff" * 512, zlib.compress(b"short", wbits=-12)):
        raw[data : data + len(compressed)] = compressed
        struct.pack_into(">Q", raw, l2, 1 << 62 | data)
        path.write_bytes(raw)
        disk = open_image(spec(path, readonly=True))
        with pytest.raises(OSError, match="compressed"):
            read(disk, 0, 512)
        disk.close()


# -- what is refused ---


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"magic": 0}, "no qcow2 image"),
        ({"version": 4}, "version 4"),
        ({"crypt": 1}, "encrypted"),
        ({"crypt": 2}, "encrypted"),
        ({"cluster_bits": 60}, "clusters of"),
        ({"incompatible": 1}, "was not closed"),
        ({"incompatible": 2}, "corrupt"),
        ({"incompatible": 4}, "an external data file"),
        ({"incompatible": 8}, "compressed in an unknown way"),
        ({"incompatible": 16}, "extended L2 entries"),
        ({"incompatible": 1 << 40}, "feature 40"),
        ({"order": 0}, "reference counts of 1 bits"),
        ({"order": 99}, "header cannot"),
        ({"order": 1 << 31}, "header cannot"),
        ({"l1_offset": 1 << 63}, "header cannot"),
        ({"refcount_offset": 1 << 56}, "header cannot"),
        ({"backing_offset": 1 << 63, "backing_bytes": 3}, "header cannot"),
        ({"length": 3}, "header of 3 bytes"),
        ({"length": 1 << 31}, "header of"),
        ({"l1_size": 0}, "L1 table"),
        ({"l1_size": 1 << 31}, "L1 table"),
        ({"l1_offset": 7}, "L1 table"),
        ({"l1_size": 3}, "L1 table"),
        ({"refcount_offset": 9}, "refcount table"),
        ({"refcount_clusters": 1 << 31}, "refcount table"),
        ({"backing_offset": 8, "backing_bytes": 1 << 31}, "backing file"),
        ({"backing_offset": 8, "backing_bytes": 0}, "backing file"),
    ],
)
def test_what_cannot_be_used_is_refused(tmp_path, changed, says):
    """One error each, when it is opened and when it is only looked at; the file is not locked
    after it."""
    path = blank(tmp_path / "a", **{k: v for k, v in changed.items() if k != "cluster_bits"})
    if "cluster_bits" in changed:
        raw = bytearray(path.read_bytes())
        struct.pack_into(">I", raw, 20, changed["cluster_bits"])
        path.write_bytes(raw)
    before = path.read_bytes()
    for look in (open_image, check):
        with pytest.raises(StorageError) as caught:
            look(spec(path))
        assert says in str(caught.value)
        assert str(path) in str(caught.value)
    assert path.read_bytes() == before


@pytest.mark.parametrize("changed", [{"incompatible": 1}, {"incompatible": 2}, {"order": 3}])
def test_what_cannot_be_written_can_be_read(tmp_path, changed):
    """Neither needs the reference counts."""
    disk = open_image(spec(blank(tmp_path / "a", **changed), readonly=True))
    assert read(disk, 0, 4096) == bytes(4096)
    disk.close()


def test_features_that_a_writer_does_not_know_end(tmp_path):
    """Autoclear bits are cleared by a writer, and by nobody else (bitmaps would be wrong)."""
    path = blank(tmp_path / "a", autoclear=1)
    open_image(spec(path, readonly=True)).close()
    check(spec(path))
    assert path.read_bytes()[88:96] == bytes(7) + b"\1"
    open_image(spec(path)).close()
    assert path.read_bytes()[88:96] == bytes(8)


def with_backing(path, name, kind=b"raw"):
    """An image with a backing file of this name and format; b"": of none that it says."""
    blank(path, backing_offset=200, backing_bytes=len(name))
    raw = bytearray(path.read_bytes())
    raw[200 : 200 + len(name)] = os.fsencode(name)
    if kind:
        struct.pack_into(">II8s", raw, 104, 0xE2792ACA, len(kind), kind)
    path.write_bytes(raw)
    return path


@pytest.mark.parametrize(
    ("name", "kind", "says"),
    [
        ("missing", b"raw", "No such file"),
        ("json:{}", b"raw", "not supported"),
        ("a", b"qcow2", "backing files"),
        ("a", b"", "is not named"),
        ("a", b"vmdk", "not supported"),
        ("a\0b", b"raw", "cannot be right"),
    ],
)
def test_wrong_backing_files(tmp_path, name, kind, says):
    """One that is not there, one that is no file, one that is its own, one whose format is not
    named: an error each."""
    path = with_backing(tmp_path / "a", name, kind)
    with pytest.raises(StorageError, match=says):
        open_image(spec(path, readonly=True))


def test_a_backing_file_is_shared_and_not_written(tmp_path):
    """Two images may stand on one; nobody may write that meanwhile."""
    base = tmp_path / "base"
    base.write_bytes(b"base" * 1024)
    first = open_image(spec(with_backing(tmp_path / "a", "base")))
    second = open_image(spec(with_backing(tmp_path / "b", "base")))
    write(first, 512, b"1" * 512)
    assert read(second, 0, 4096) == b"base" * 1024
    assert read(first, 0, 1024) == b"base" * 128 + b"1" * 512
    with pytest.raises(StorageError, match="in use"):
        open_image(DiskSpec(str(base), "raw", "xvda", readonly=False))
    first.close()
    second.close()
    open_image(DiskSpec(str(base), "raw", "xvda", readonly=False)).close()


damage = st.lists(st.tuples(st.integers(0, 4095), st.integers(0, 255)), min_size=1, max_size=8)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(damage=damage)
def test_a_damaged_image_is_an_error_or_a_disk(tmp_path, damage):
    """Opening raises StorageError, reading and writing OSError, and nothing else."""
    path = blank(tmp_path / "a", 64 * SECTOR)
    disk = open_image(spec(path))
    write(disk, 0, b"x" * 4096)
    disk.close()
    raw = bytearray(path.read_bytes())
    for offset, byte in damage:
        raw[offset % len(raw)] = byte
    path.write_bytes(raw)
    try:
        disk = open_image(spec(path))
    except StorageError:
        return
    try:
        end = min(disk.nr_sectors, 64) * SECTOR
        read(disk, 0, end)
        write(disk, 0, b"y" * end)
        disk.flush()
        disk.close()
    except OSError:
        disk._file.close()
