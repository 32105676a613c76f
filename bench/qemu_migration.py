"""QEMU's own live migration of an idle Linux, from one QEMU to another: a peer."""

from __future__ import annotations

import json
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_TIMEOUT_S = 120.0
_LOOK_S = 0.05


class Monitor:
    """A connection to one QEMU's QMP."""

    def __init__(self, path: Path) -> None:
        self._sock = socket.socket(socket.AF_UNIX)
        deadline = time.monotonic() + _TIMEOUT_S
        while True:
            try:
                self._sock.connect(str(path))
                break
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(_LOOK_S)
        self._file = self._sock.makefile("rw")
        self._file.readline()  # the greeting
        self.ask("qmp_capabilities")

    def ask(self, command: str, **arguments: Any) -> Any:
        """Return what it answers. Raises RuntimeError if that is an error."""
        json.dump({"execute": command, "arguments": arguments}, self._file)
        self._file.write("\n")
        self._file.flush()
        while True:
            answer = json.loads(self._file.readline())
            if "error" in answer:
                raise RuntimeError(f"QEMU, {command}: {answer['error']['desc']}")
            if "return" in answer:
                return answer["return"]

    def close(self) -> None:
        self._file.close()
        self._sock.close()


def start(
    kernel: str, ramdisk: Path, memory_mib: int, directory: Path, name: str, more: Sequence[str]
) -> subprocess.Popen[bytes]:
    """Start one QEMU: its QMP is at NAME.qmp, its console goes to NAME.log."""
    command = ["qemu-system-x86_64", "-accel", "tcg", "-machine", "pc", "-nodefaults"]
    command += ["-m", str(memory_mib), "-smp", "1", "-display", "none", "-no-reboot"]
    command += ["-serial", f"file:{directory / name}.log"]
    command += ["-qmp", f"unix:{directory / name}.qmp,server=on,wait=off"]
    command += ["-kernel", kernel, "-initrd", str(ramdisk), "-append", "console=ttyS0", *more]
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def migrate_in_qemu(kernel: str, ramdisk: Path, memory_mib: int, directory: Path) -> dict[str, Any]:
    """Boot, migrate through a unix socket; return what query-migrate says in the end (downtime and
    total-time in ms, ram with transferred in bytes). Raises RuntimeError."""
    directory.mkdir()
    channel = f"unix:{directory}/channel"
    source = start(kernel, ramdisk, memory_mib, directory, "source", [])
    target = start(kernel, ramdisk, memory_mib, directory, "target", ["-incoming", channel])
    try:
        monitor = Monitor(directory / "source.qmp")
        deadline = time.monotonic() + _TIMEOUT_S
        while b"TICK 3 " not in (directory / "source.log").read_bytes():
            if time.monotonic() > deadline:
                raise RuntimeError("user space does not speak in QEMU")
            time.sleep(_LOOK_S)
        monitor.ask("migrate-set-parameters", **{"max-bandwidth": 1 << 40})
        monitor.ask("migrate", uri=channel)
        while (said := monitor.ask("query-migrate"))["status"] != "completed":
            if said["status"] in ("failed", "cancelled") or time.monotonic() > deadline:
                raise RuntimeError(f"QEMU's migration: {said}")
            time.sleep(_LOOK_S)
        monitor.close()
        return dict(said)
    finally:
        for process in (source, target):
            process.kill()
            process.wait()
