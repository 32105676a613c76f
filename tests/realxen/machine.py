"""A real Xen in a QEMU process: no root, no KVM. Scripts run in its dom0, by a shared directory.

The CPU is qemu64, whose features every other host has, so that images travel; or `max`, which
gives guests AVX. SMAP and RDTSCP are taken away: QEMU 7.2 gets them wrong for Xen's guests.
"""

from __future__ import annotations

import itertools
import subprocess
import time
from pathlib import Path

BOOT_TIMEOUT_S = 300
SCRIPT_TIMEOUT_S = 240
_POLL_S = 0.05
#: For a script's redirections: whatever number dom0's kernel gave the port.
PORT = '"$(echo /dev/vport*)"'
#: What every script may use: the console of a domain, and waiting for one of its ticks.
_PRELUDE = r"""
log() { echo /run/console/guest-$1.log; }
ticks() { grep -ac '^TICK' $(log $1) 2>/dev/null; }
last_tick() { grep -a '^TICK' $(log $1) | tail -1; }
wait_ticks() {  # NAME NUMBER: until it has printed so many
    i=0
    while [ "$(ticks $1)" -lt $2 ] 2>/dev/null || [ ! -e $(log $1) ]; do
        i=$((i + 1))
        [ $i -lt 240 ] || { echo "$1 does not tick"; tail -5 $(log $1); return 1; }
        sleep 0.25
    done
}
"""


class RealXen:
    """One machine, running from its making to `stop`."""

    def __init__(self, boot: Path, directory: Path, version: str, cpu: str) -> None:
        self.version = version
        self.share = directory / "share"
        for part in ("in", "out"):
            (self.share / part).mkdir(parents=True)
        self._log = directory / "serial.log"
        #: A way into dom0 and out: a unix socket here, PORT there.
        self.socket = directory / "port"
        self._numbers = itertools.count(1)
        xen = "xen console=com1 com1=115200,8n1 dom0_mem=1200M,max:1200M dom0_max_vcpus=1"
        linux = "console=hvc0 rdinit=/init quiet mitigations=off nokaslr"
        command = [
            "qemu-system-x86_64", "-accel", "tcg,thread=multi,tb-size=512", "-machine", "pc",
            "-cpu", f"{cpu},-smap,-rdtscp", "-smp", "2", "-m", "2G", "-nodefaults",
            "-display", "none", "-no-reboot", "-serial", f"file:{self._log}",
            "-fsdev", f"local,id=h,path={self.share},security_model=none",
            "-device", "virtio-9p-pci,fsdev=h,mount_tag=host",
            "-chardev", f"socket,id=p,path={self.socket},server=on,wait=off",
            "-device", "virtio-serial-pci", "-device", "virtserialport,chardev=p",
            "-kernel", f"{boot}/xen", "-append", f"{xen} no-real-mode noreboot=1",
            "-initrd", f"{boot}/vmlinux {linux},{boot}/initrd",
        ]  # fmt: skip
        self._process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=(directory / "qemu.err").open("w"),
        )  # fmt: skip
        try:
            self._await(self.share / "ready", BOOT_TIMEOUT_S, "dom0 does not come up")
        except BaseException:
            self.stop()
            raise

    def _await(self, path, seconds, complaint):
        deadline = time.monotonic() + seconds
        while not path.exists():
            if self._process.poll() is not None or time.monotonic() > deadline:
                text = self._log.read_text(errors="replace") if self._log.exists() else ""
                raise AssertionError(f"{complaint}\n{text[-3000:]}")
            time.sleep(_POLL_S)

    def run(self, script, timeout=SCRIPT_TIMEOUT_S):
        """Run a shell script in dom0; return its exit status and what it printed."""
        name = f"{next(self._numbers):04}"
        making = self.share / "in" / f".{name}"
        making.write_text(_PRELUDE + script)
        making.rename(self.share / "in" / f"{name}.sh")
        out = self.share / "out"
        self._await(out / f"{name}.rc", timeout, f"no answer to:\n{script}")
        status = int((out / f"{name}.rc").read_text())
        return status, (out / f"{name}.out").read_text(errors="replace")

    def stop(self):
        self._process.kill()
        self._process.wait()
