"""dom0 of a real Xen as one initramfs, made of Debian's packages (packages.py).

boot/xen         the hypervisor, unpacked: QEMU loads the 32-bit ELF
boot/vmlinux     dom0's kernel as an ELF: nothing is decompressed on an emulated CPU
boot/initrd      user space: xl and Xen's daemons, busybox, their libraries; dom0-init
"""

from __future__ import annotations

import gzip
import hashlib
import lzma
import shutil
import struct
import subprocess
import tempfile
from pathlib import Path

from tests.realxen.packages import Packages, Unavailable, xen_packages

#: In the order in which they are loaded; what the kernel has built in is left out.
MODULES = (
    *("xen-evtchn", "xen-gntdev", "xen-gntalloc", "xen-privcmd", "xenfs", "virtio_ring", "virtio"),
    *("virtio_pci_legacy_dev", "virtio_pci_modern_dev", "virtio_pci"),
    *("netfs", "fscache", "9pnet", "9pnet_virtio", "9p", "virtio_console"),
)
_UNWANTED = ("usr/share", "usr/lib/debug", "boot", "usr/lib/xen-*/boot", "etc/init.d")
_SOURCES = ("dom0.py", "dom0-init", "packages.py")
_SETUP_SECTS, _PAYLOAD = 0x1F1, 0x248  # of a bzImage's header


def build(directory: Path, version: str) -> Path:
    """Return the directory with the boot files of this version of Xen, made if it is not there
    yet. Raises Unavailable."""
    sources = b"".join((Path(__file__).parent / name).read_bytes() for name in _SOURCES)
    boot = directory / f"boot-{hashlib.sha256(sources).hexdigest()[:12]}"
    if boot.is_dir():
        return boot
    packages = Packages(directory, version)
    with tempfile.TemporaryDirectory(dir=directory) as name:
        work = Path(name)
        root, kernel, making = work / "root", work / "kernel", work / "boot"
        for path in (root, kernel, making):
            path.mkdir()
        packages.unpack(xen_packages(version), root)
        packages.kernel(kernel)
        hypervisor = next(root.glob(f"boot/xen-{version}-amd64.gz"))
        (making / "xen").write_bytes(gzip.decompress(hypervisor.read_bytes()))
        (making / "vmlinux").write_bytes(_payload(next(kernel.glob("boot/vmlinuz-*"))))
        _fill(root, kernel, version)
        _archive(root, making / "initrd")
        making.rename(boot)
    return boot


def _payload(kernel):
    """Return the ELF inside a bzImage of Debian's."""
    data = kernel.read_bytes()
    offset, length = struct.unpack_from("<II", data, _PAYLOAD)
    start = (data[_SETUP_SECTS] + 1) * 512 + offset
    content = lzma.LZMADecompressor().decompress(data[start : start + length])
    if not content.startswith(b"\x7fELF"):
        raise Unavailable(f"{kernel.name} holds no ELF file")
    return content


def _fill(root, kernel, version):
    """Make a root file system of the unpacked packages."""
    for pattern in _UNWANTED:
        for path in root.glob(pattern):
            shutil.rmtree(path)
    modules = root / "modules"
    modules.mkdir()
    order = []
    for module in MODULES:
        for path in kernel.glob(f"lib/modules/*/kernel/**/{module}.ko*"):
            content = path.read_bytes()
            if path.suffix == ".xz":
                content = lzma.decompress(content)
            (modules / f"{module}.ko").write_bytes(content)
            order.append(module)
    (modules / "order").write_text("\n".join([*order, ""]))
    for name in ("lib", "lib64"):  # newer packages leave these links to base-files
        if not (root / name).exists():
            (root / name).symlink_to(f"usr/{name}")
    if not (root / "bin/busybox").exists():
        (root / "bin").mkdir(exist_ok=True)
        shutil.copy(root / "usr/bin/busybox", root / "bin/busybox")
    init = (Path(__file__).parent / "dom0-init").read_text()
    (root / "init").write_text(init.replace("@VERSION@", version))
    (root / "init").chmod(0o755)


def _archive(root, target):
    """Pack root as the newc archive a kernel takes; everything in it belongs to root."""
    names = sorted(str(path.relative_to(root)) for path in root.rglob("*"))
    with target.open("wb") as output:
        subprocess.run(
            ["cpio", "-o", "-H", "newc", "-R", "0:0", "--quiet"],
            input="\n".join([".", *names, ""]).encode(),
            stdout=output,
            cwd=root,
            check=True,
        )
