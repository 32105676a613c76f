"""An initial ramdisk of one static busybox: a guest's user space that ticks, forks and obeys."""

from __future__ import annotations

import stat
from collections.abc import Mapping

_HEADER = "070701" + "{:08x}" * 13
_DIRECTORY, _PROGRAM = stat.S_IFDIR | 0o755, stat.S_IFREG | 0o755

#: One tick a second: the processors there are, and a hash that is computed anew by children.
#: What is typed on the console meanwhile is done ("do" and a line of shell), not echoed into the
#: middle of a line of output.
INIT = b"""#!/busybox sh
/busybox mkdir -p /bin /sbin /proc /sys /dev
/busybox --install -s /bin
mount -t proc none /proc
mount -t sysfs none /sys
mount -t devtmpfs none /dev
stty -echo
n=0
while :; do
    n=$((n + 1))
    echo "TICK $n cpus=$(grep -c ^processor /proc/cpuinfo) $(sha256sum < /busybox | cut -c1-16)"
    read -t 1 word && case $word in
    crash) echo c > /proc/sysrq-trigger ;;
    echo*) echo "heard ${word#echo}" ;;
    do*) eval "${word#do}"; echo "DONE $?" ;;
    esac
done
"""
#: What the kernel runs when it is asked to end (orderly_poweroff, orderly_reboot).
_ENDING = "#!/busybox sh\nexec /busybox {} -f\n"


def initramfs(busybox: bytes, programs: Mapping[str, bytes] | None = None) -> bytes:
    """Return the archive of that user space, with more programs in the root directory."""
    return archive(
        {
            "init": INIT,
            "busybox": busybox,
            "sbin": None,
            "sbin/poweroff": _ENDING.format("poweroff").encode(),
            "sbin/reboot": _ENDING.format("reboot").encode(),
            **(programs or {}),
        }
    )


def archive(files: Mapping[str, bytes | None]) -> bytes:
    """Return an archive in the "newc" format of cpio that kernels unpack: programs, all of them,
    by name; None: a directory."""
    members = [
        _member(i, name, _DIRECTORY if data is None else _PROGRAM, data or b"")
        for i, (name, data) in enumerate(files.items())
    ]
    return b"".join([*members, _member(len(members), "TRAILER!!!", 0, b"")])


def _member(inode: int, name: str, mode: int, data: bytes) -> bytes:
    fields = [inode, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name) + 1, 0]
    head = _HEADER.format(*fields).encode() + name.encode() + b"\0"
    return _padded(head) + _padded(data)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)
