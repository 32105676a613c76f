"""How fast does Linux boot, and how fast is it saved and restored? Beside QEMU's TCG.

    python bench/bench_boot.py --kernel VMLINUZ --busybox FILE [--rounds 5] [--json FILE]

The same distribution kernel and the same initial ramdisk (tests/distro/initramfs.py), 256 MiB, one
vCPU. Measured is the time from the start of the command to the first line that user space writes
on its console. Both emulate every instruction: QEMU as a PC that the kernel takes for hardware,
xsave as a Xen, whose kernel is paravirtualised. README.md says more.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from measuring import Case, Sample, ratio, timed  # noqa: E402

from tests.distro.initramfs import initramfs  # noqa: E402

XSAVE = [sys.executable, "-m", "xsave", "-q"]
DOMAIN = "bench"
FIRST_WORD = b"TICK 1 "
_TIMEOUT_S = 300.0
_LOOK_S = 0.005
_MIB = 256
#: At most so many times QEMU's time: the project's aim.
AIM = 1.5
QEMU, BOOT, SAVE, RESTORE = "QEMU TCG", "xsave create", "xsave save", "xsave restore"


def main() -> None:
    options = parse_arguments()
    home = tempfile.mkdtemp(prefix="xsave-bench.", dir=options.tmpfs)
    os.environ["XSAVE_HOME"] = home
    os.environ["PYTHONPATH"] = str(ROOT)
    os.environ["PYTHONPYCACHEPREFIX"] = f"{home}/pycache"  # compiled, as pip leaves it
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    ramdisk = Path(home) / "initrd"
    ramdisk.write_bytes(initramfs(Path(options.busybox).read_bytes()))
    found = {name: Case(name, []) for name in (QEMU, BOOT, SAVE, RESTORE)}
    timed([*XSAVE, "list"])
    try:
        for number in range(options.rounds):
            found[QEMU].samples.append(boot_qemu(options, ramdisk))
            boot_xsave(options, ramdisk, home, found)
            print(f"round {number + 1} of {options.rounds} done", file=sys.stderr, flush=True)
    finally:
        subprocess.run([*XSAVE, "destroy", DOMAIN], check=False, stderr=subprocess.DEVNULL)
        shutil.rmtree(home, ignore_errors=True)
    show(options, found)
    if options.json:
        Path(options.json).write_text(json.dumps(report(options, found), indent=1) + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="How fast does Linux boot?")
    parser.add_argument("--kernel", required=True, help="a distribution's vmlinuz")
    parser.add_argument("--busybox", required=True, help="a static busybox for the ramdisk")
    parser.add_argument("--rounds", type=int, default=5, help="boots of each (5)")
    parser.add_argument("--machine", default="pc", help="QEMU's machine (pc)")
    parser.add_argument("--tmpfs", default="/dev/shm", help="where files go")
    parser.add_argument("--json", metavar="FILE", help="write all samples there")
    return parser.parse_args()


# -- the two ---


def boot_qemu(options: argparse.Namespace, ramdisk: Path) -> Sample:
    """Boot in QEMU, with no device but the serial port: the least that it has to do."""
    command = ["qemu-system-x86_64", "-accel", "tcg", "-machine", options.machine, "-nodefaults"]
    command += ["-m", str(_MIB), "-smp", "1", "-display", "none", "-serial", "stdio", "-no-reboot"]
    command += ["-kernel", options.kernel, "-initrd", str(ramdisk), "-append", "console=ttyS0"]
    start = time.perf_counter()
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        assert process.stdout is not None
        heard = b""
        while FIRST_WORD not in heard:
            if not (more := os.read(process.stdout.fileno(), 65536)):
                sys.exit(f"{command[0]} ended before user space spoke:\n{heard[-2000:].decode()}")
            heard += more
        sample = Sample(time.perf_counter() - start, cpu_s(process.pid), 0)
        process.kill()
    return sample


def boot_xsave(
    options: argparse.Namespace, ramdisk: Path, home: str, found: dict[str, Case]
) -> None:
    """Boot, then save to a file in memory and restore from it."""
    start = time.perf_counter()
    command = ["create", DOMAIN, "--kernel", options.kernel, "--ramdisk", str(ramdisk)]
    created = timed([*XSAVE, *command, "--cmdline", "console=hvc0", "--memory", f"{_MIB}M"])
    wait_for_word(home)
    wall_s = time.perf_counter() - start
    found[BOOT].samples.append(Sample(wall_s, created.cpu_s + cpu_s(domain_pid(home)), 0))
    image = f"{home}/image"
    found[SAVE].samples.append(timed([*XSAVE, "save", DOMAIN, image]))
    found[SAVE].output_bytes = os.stat(image).st_size  # noqa: PTH116
    found[RESTORE].samples.append(timed([*XSAVE, "restore", image]))
    timed([*XSAVE, "destroy", DOMAIN])
    os.unlink(image)  # noqa: PTH108


def wait_for_word(home: str) -> None:
    """Look at the console's log, which costs the domain nothing."""
    deadline = time.monotonic() + _TIMEOUT_S
    while True:
        for log in Path(home).glob("hosts/localhost/domains/*/console.log"):
            if FIRST_WORD in log.read_bytes():
                return
        if time.monotonic() > deadline:
            sys.exit("user space does not speak")
        time.sleep(_LOOK_S)


def domain_pid(home: str) -> int:
    """The process of the only domain."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            arguments = (entry / "cmdline").read_bytes().split(b"\0")
            if f"{home}/hosts/localhost".encode() in arguments:
                return int(entry.name)
    sys.exit("the domain has no process")


def cpu_s(pid: int) -> float:
    """User and system time of a process that runs."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# -- what came out ---


def show(options: argparse.Namespace, found: dict[str, Case]) -> None:
    print(f"\n{Path(options.kernel).name}\n{'':<20} {'wall s':>7} {'best':>6} {'CPU s':>6}")
    for case in found.values():
        cpu = case.median("cpu_s")
        print(f"{case.name:<20} {case.median('wall_s'):7.2f} {case.best_s():6.2f} {cpu:6.2f}")
    wall = ratio(found[BOOT], found[QEMU])
    cpu = ratio(found[BOOT], found[QEMU], "cpu_s")
    verdict = "met" if wall <= AIM else "MISSED"
    print(f"\n{wall:.2f} ({cpu:.2f})  {BOOT} / {QEMU}, wall (CPU)  aim {AIM}: {verdict}")


def report(options: argparse.Namespace, found: dict[str, Case]) -> dict[str, object]:
    return {
        "kernel": Path(options.kernel).name,
        "machine": {"cpus": os.cpu_count(), "kernel": platform.release(), "load": os.getloadavg()},
        "python": platform.python_version(),
        "qemu": first_line(["qemu-system-x86_64", "--version"]),
        "cases": [case.as_json() for case in found.values()],
    }


def first_line(command: Sequence[str]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split("\n")[0]


if __name__ == "__main__":
    main()
