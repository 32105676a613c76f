"""Block devices, with Linux's own blkfront: file systems that are written, saved and moved.

The guest makes a file system on a raw and on a qcow2 disk, writes and fsyncs there, forgets what it
has cached and compares; it runs programs from there, and is refused by a read-only disk. Modules
are those of the directory that tests/distro/fetch fills.
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import subprocess

import pytest

from tests.conftest import directory_named_by
from tests.distro.blockdevice import is_sound, modules
from tests.distro.initramfs import archive
from tests.distro.linux import PATIENCE_S, kernels, ticks, told, wait_for_ticks
from tests.distro.linux import without_complaint as kernel_is_content
from tests.flows.flow import nothing_is_left, restore, save, state, wait_for
from tests.host.test_qcow2 import blank
from xsave.errors import StorageError
from xsave.host.channel import open_sink
from xsave.host.create import create
from xsave.host.disk.image import open_image
from xsave.host.disk.spec import parse
from xsave.host.host import add_host
from xsave.migrate import migrate
from xsave.save import save as save_flow

pytestmark = pytest.mark.slow

MIB = 1 << 20
#: A file from before any save and one of each tick are read from the disks again; `persistent`
#: comes from the command line.
INIT = b"""#!/busybox sh
/busybox mkdir -p /bin /sbin /proc /sys /dev /xvda /xvdc
/busybox --install -s /bin
mount -t proc none /proc
mount -t sysfs none /sys
mount -t devtmpfs none /dev
for module in crc16 libcrc32c crc32c_generic mbcache jbd2 ext4; do
    [ ! -e /$module.ko ] || insmod /$module.ko
done
insmod /xen-blkfront.ko feature_persistent=$persistent
until [ -b /dev/xvda ] && [ -b /dev/xvdb ] && [ -b /dev/xvdc ]; do sleep 0.1; done
for disk in xvda xvdc; do
    mke2fs /dev/$disk > /dev/null
    mount -t ext4 /dev/$disk /$disk || echo "NO $disk"
    cp /busybox /$disk/busybox
    dd if=/dev/urandom of=/$disk/old bs=4k count=300 conv=fsync 2> /dev/null
done
sum() { sha256sum | cut -c1-16; }
old_xvda=$(sum < /xvda/old)
old_xvdc=$(sum < /xvdc/old)
echo "READ $(sha256sum < /dev/xvdb)"
dd if=/dev/zero of=/dev/xvdb bs=4k count=1 2> /dev/null && echo WRITTEN || echo REFUSED
n=0
while :; do
    n=$((n + 1))
    verdict=
    for disk in xvda xvdc; do
        dd if=/dev/urandom of=/$disk/new bs=4k count=60 conv=fsync 2> /dev/null
        new=$(sum < /$disk/new)
        eval old=\\$old_$disk
        echo 7 > /proc/sys/vm/drop_caches
        [ "$(/$disk/busybox sha256sum /$disk/new | cut -c1-16)" = $new ] || verdict="$verdict NEW"
        [ "$(/$disk/busybox sha256sum /$disk/old | cut -c1-16)" = $old ] || verdict="$verdict OLD"
        verdict="$verdict $disk"
    done
    echo "TICK $n$verdict"
    sleep 0.1
done
"""
POWEROFF = (
    b"#!/busybox sh\n/busybox umount /xvda\n/busybox umount /xvdc\nexec /busybox poweroff -f\n"
)


@pytest.fixture(params=kernels())
def guest(request, tmp_path):
    """(kernel, initial ramdisk); each kernel in turn."""
    directory = directory_named_by("XSAVE_DISTRO_KERNELS")
    if not (directory / "busybox").is_file():
        pytest.skip(f"no static busybox in {directory}")
    files = {
        "init": INIT,
        "busybox": (directory / "busybox").read_bytes(),
        "sbin": None,
        "sbin/poweroff": POWEROFF,
        **modules(directory, request.param),
    }
    path = tmp_path / "initrd"
    path.write_bytes(archive(files))
    return str(directory / request.param), str(path)


@pytest.fixture
def disks(tmp_path):
    """Specifications of a raw disk, one that may only be read, and a qcow2 disk."""
    (tmp_path / "a.img").write_bytes(b"")
    os.truncate(tmp_path / "a.img", 24 * MIB)
    (tmp_path / "b.img").write_bytes(random.Random(1).randbytes(2 * MIB))
    blank(tmp_path / "c.qcow2", 24 * MIB, cluster_bits=16)
    return [
        f"{tmp_path}/a.img,raw,xvda,w",
        f"{tmp_path}/b.img,raw,xvdb,r",
        f"{tmp_path}/c.qcow2,qcow2,xvdc,w",
    ]


def boot(host, guest, disks, *, vcpus, persistent, **options):
    kernel, ramdisk = guest
    create(
        host,
        "g",
        kernel=kernel,
        ramdisk=ramdisk,
        cmdline=f"console=hvc0 persistent={persistent}",
        memory_bytes=256 * MIB,
        vcpus=vcpus,
        disks=disks,
        **options,
    )


def goes_on(host, after):
    """Wait for two more ticks behind number `after`; return the last one's number."""
    text = wait_for_ticks(host, after + 2)
    kernel_is_content(text)
    assert ticks(text)[0][1] == "xvda xvdc"
    assert "I/O error" not in text
    assert "EXT4-fs error" not in text
    return ticks(text)[-1][0]


def cancel_a_save(host, path):
    """A save that fails at its last step: the guest goes on with the same ring."""

    def fail():
        raise StorageError("cancelled")

    with (
        host.find("g") as domctl,
        open_sink(str(path)) as sink,
        pytest.raises(StorageError, match="cancelled"),
    ):
        save_flow(domctl, sink.write, commit=fail)


@pytest.mark.parametrize(("vcpus", "persistent"), [(1, 1), (2, 0)])
def test_disks_from_boot_to_the_end(xsave_home, guest, disks, tmp_path, vcpus, persistent):
    """What is written is on the disks, through a cancelled save, a checkpoint, a save and restore
    and a migration; then the file systems are sound, and the read-only disk is as it was."""
    host, target = add_host("a", 600 * MIB, seed=3), add_host("b", 600 * MIB, seed=4)
    before = (tmp_path / "b.img").read_bytes()
    boot(host, guest, disks, vcpus=vcpus, persistent=persistent)
    last = goes_on(host, 0)
    assert f"READ {hashlib.sha256(before).hexdigest()}" in told(host)
    assert "REFUSED" in told(host)
    cancel_a_save(host, tmp_path / "img")
    last = goes_on(host, last)
    save(host, tmp_path / "img", leave="running")
    last = goes_on(host, last)
    save(host, tmp_path / "img")
    restore(host, tmp_path / "img")
    last = goes_on(host, last)
    with host.find("g") as domctl:
        migrate(domctl, target)
    goes_on(target, last)
    with target.find("g") as domctl:
        domctl.shutdown("poweroff")
    wait_for(lambda: state(target) is None, PATIENCE_S)
    nothing_is_left(host)
    nothing_is_left(target)
    assert (tmp_path / "b.img").read_bytes() == before
    is_sound(tmp_path / "a.img")
    disk = open_image(parse(disks[2]))
    contents = bytearray(disk.nr_sectors * 512)
    disk.read(0, [memoryview(contents)])
    disk.close()
    (tmp_path / "c.raw").write_bytes(contents)
    is_sound(tmp_path / "c.raw")
    if shutil.which("qemu-img"):
        subprocess.run(["qemu-img", "check", tmp_path / "c.qcow2"], check=True, capture_output=True)
