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
STATE_TIMEOUT_S = 90
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
#: What to know about a script that does not end: each question may itself have no answer.
_STATE = r"""
for question in ps "xl list" "xl vcpu-list" "xl dmesg" dmesg "xenstore-ls /local/domain"; do
    echo "--- $question"
    timeout 10 $question 2>&1 | tail -40
done
for pid in $(pidof xl xenstored xenconsoled); do
    echo "--- $pid: $(tr '\0' ' ' </proc/$pid/cmdline)"
    cat /proc/$pid/wchan /proc/$pid/stack /proc/$pid/syscall
done
"""


class Silent(AssertionError):
    """The machine says nothing any more, whatever it is asked."""


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
            if not self._appears(self.share / "ready", BOOT_TIMEOUT_S):
                raise Silent(f"dom0 does not come up\n{self._serial()}")
        except BaseException:
            self.stop()
            raise

    def _appears(self, path, seconds):
        """Wait for a file; False if it does not come, or cannot any more."""
        deadline = time.monotonic() + seconds
        while not path.exists():
            if self._process.poll() is not None or time.monotonic() > deadline:
                return False
            time.sleep(_POLL_S)
        return True

    def _serial(self):
        return self._log.read_text(errors="replace")[-3000:] if self._log.exists() else ""

    @property
    def running(self):
        """Whether scripts can be run: not any more behind one that did not end."""
        return self._process.poll() is None

    def run(self, script, timeout=SCRIPT_TIMEOUT_S):
        """Run a shell script in dom0; return its exit status and what it printed. One that does not
        end is an AssertionError that says what dom0 looks like, or Silent if dom0 says nothing at
        all any more; the machine is gone then."""
        if not self.running:
            raise Silent("the machine is gone")
        name = self._give(script)
        if not self._appears(self._out(name, "rc"), timeout):
            said, state = self._said(name), self._state()
            self.stop()
            message = f"no end after {timeout} s:\n{script}\nIt said:\n{said}\n"
            if state is None:
                raise Silent(f"{message}dom0 answers nothing any more.\n{self._serial()}")
            raise AssertionError(f"{message}{state}")
        return int(self._out(name, "rc").read_text()), self._said(name)

    def _give(self, script):
        """Have a script started; return its name."""
        name = f"{next(self._numbers):04}"
        making = self.share / "in" / f".{name}"
        making.write_text(_PRELUDE + script)
        making.rename(self.share / "in" / f"{name}.sh")
        return name

    def _out(self, name, kind):
        return self.share / "out" / f"{name}.{kind}"

    def _said(self, name):
        path = self._out(name, "out")
        return path.read_text(errors="replace") if path.exists() else ""

    def _state(self):
        """Return what dom0 looks like; None if it does not answer."""
        name = self._give(_STATE)
        return self._said(name) if self._appears(self._out(name, "rc"), STATE_TIMEOUT_S) else None

    def stop(self):
        self._process.kill()
        self._process.wait()
