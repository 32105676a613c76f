"""Work for a guest to be in the middle of when it is suspended, and which knows its own results.

Five things go on for ever: forks, execs and pipes; big buffers mapped, filled and hashed; files
in memory compressed and unpacked; files written to a block device, fsynced and read from it again;
and, where there is a compiler, a compile. Each compares what comes out with what came out the first
time, says WRONG if it differs, counts its rounds in /work/n.NAME, and ends when it finds
/work/end.NAME. /work/file.N and /disk/file.N are files that nobody changes. What is typed on the
console is done.
"""

from __future__ import annotations

from pathlib import Path

from tests.distro.blockdevice import MODULES, modules
from tests.distro.initramfs import archive

#: The compiler and what it is linked to, as tests/distro/fetch leaves them.
_COMPILER = (
    "tcc", "ld-linux-x86-64.so.2", "libc.so.6", "libm.so.6", "libdl.so.2", "libpthread.so.0",
)  # fmt: skip
NAMES = ("fork", "map", "zip", "fsync")

#: The ticks' own loop never reads: a read with a time-out may lose half a line. Nothing is echoed,
#: least of all into the middle of a tick.
INIT = b"""#!/busybox sh
/busybox mkdir -p /bin /sbin /proc /sys /dev /work /disk
/busybox --install -s /bin
stty -echo
mount -t proc none /proc
mount -t sysfs none /sys
mount -t devtmpfs none /dev
mount -t tmpfs none /work
for module in %s; do
    [ ! -e /$module.ko ] || insmod /$module.ko
done
until [ -b /dev/xvda ]; do sleep 0.1; done
mke2fs /dev/xvda > /dev/null && mount -t ext4 /dev/xvda /disk || echo "WRONG: no disk"
/busywork &
while read line; do
    eval "$line"
    echo "DONE $?"
done < /dev/console &
n=0
while :; do
    n=$((n + 1))
    echo "TICK $n cpus=$(grep -c ^processor /proc/cpuinfo) $(sha256sum < /busybox | cut -c1-16)"
    sleep 1
done
""" % " ".join(MODULES).encode()
WORK = b"""#!/busybox sh
cd /work
for i in 0 1 2 3 4 5 6 7; do
    dd if=/busybox of=file.$i bs=64k count=1 skip=$i 2> /dev/null
    dd if=file.$i of=/disk/file.$i conv=fsync 2> /dev/null
done
i=0
while [ $i -lt 150 ]; do
    echo "int f$i(int x) { int a[8]; for (int j = 0; j < 8; j++) a[j] = x * j + $i;"
    echo "return a[x & 7] + f$i(x - 1); }"
    i=$((i + 1))
done > source.c

compile() {
    /ld-linux-x86-64.so.2 --library-path / /tcc -c source.c -o object.o && sha256sum < object.o
}
# keep NAME COMMAND: run it for ever, and look at each result
keep() {
    want= rounds=0
    while [ ! -e end.$1 ]; do
        got=$($2 2>&1)
        : ${want:=$got}
        [ "$got" = "$want" ] || echo "WRONG $1: $got, not $want"
        rounds=$((rounds + 1))
        echo $rounds > n.$1.new && mv n.$1.new n.$1
    done
    echo > ended.$1
}
forks() {
    for i in 0 1 2 3 4 5 6 7 8 9; do
        (/bin/true; echo $i) | cat
        echo $(expr $i + $i) | grep -c .
    done | sha256sum
}
# (The freezer interrupts, and cuts short, a read of /dev/zero.)
maps() { dd if=/dev/zero bs=6M count=1 iflag=fullblock 2> /dev/null | tr '\\0' x | sha256sum; }
# Each round writes what was not there before over one of four files, and reads the device, not what
# the kernel remembers. rounds is keep's.
sum() { sha256sum | cut -c1-64; }
fsyncs() {
    at=/disk/round.$((rounds % 4))
    cat file.$((rounds % 8)) n.fork n.map n.zip > text 2> /dev/null
    dd if=text of=$at.new bs=16k conv=fsync 2> /dev/null && mv $at.new $at || echo cannot write
    written=$(sum < text)
    [ "$(dd if=$at iflag=direct bs=16k 2> /dev/null | sum)" = $written ] || echo reads otherwise
    echo "$written  $at" > sum.$((rounds % 4))
}
zips() { cat file.* | gzip -1 | gunzip | sha256sum; }

keep fork forks &
keep map maps &
keep zip zips &
keep fsync fsyncs &
[ ! -e /tcc ] || keep compile compile &
"""


def ramdisk(busybox: bytes, directory: Path, kernel: str) -> tuple[bytes, tuple[str, ...]]:
    """Return the initial ramdisk for a kernel, and the names of what it keeps going. directory:
    where its modules are, and a compiler may be."""
    compiler = [directory / name for name in _COMPILER]
    names, programs = NAMES, {"busywork": WORK, **modules(directory, kernel)}
    if all(file.is_file() for file in compiler):
        names = (*NAMES, "compile")
        programs |= {file.name: file.read_bytes() for file in compiler}
    return archive({"init": INIT, "busybox": busybox, "sbin": None, **programs}), names
