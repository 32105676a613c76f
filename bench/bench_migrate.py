"""How long does a guest stand still when it is migrated, and how much is sent?

    python bench/bench_migrate.py [--memory 256M,1G] [--rounds 5] [--case NAME ...] [--tmpfs DIR]
                                  [--json FILE] [--kernel VMLINUZ --busybox FILE]

A built-in guest moves to and fro between two hosts, idle, writing a little, writing a lot; live
with both ways to log its writes, compressed, through a real sshd on loopback, and suspended first
(--no-live), the peer of the same run: what it takes without the rounds. With a kernel, an idle
Linux does too, and beside it QEMU's own migration of the same Linux. Every migration is the
command as people run it. README.md says more.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from qemu_migration import migrate_in_qemu  # noqa: E402

from tests.distro.initramfs import initramfs  # noqa: E402
from tests.transport.sshd import Sshd, far_command  # noqa: E402

XSAVE = [sys.executable, "-m", "xsave", "-q"]
WRITERS = {
    "idle": "threads=0",
    "light": "write=8M rate=4M",
    "heavy": "write=32M rate=400M",
}
LINUX = "linux"
QEMU = "QEMU TCG"
#: The guest's beat, in milliseconds.
_BEAT_MS = 10
CASES = {
    "live": ([], {}),
    "live, compare": ([], {"XSAVE_DIRTY_LOG": "compare"}),
    "live, zstd": (["--compress"], {}),
    "live, ssh": ([], {}),
    "no live": (["--no-live"], {}),
    "no live, ssh": (["--no-live"], {}),
}
PEER = "no live"
#: Cases that go to a host through ssh: "far-" and its name.
SSH_CASES = ("live, ssh", "no live, ssh")
DOMAIN = "bench"
#: What the guest's pattern fills, as a part of its memory.
_TOUCHED = 4
#: Longer than the guest takes to tell its longest gap.
_SETTLE_S = 1.6
_TIMEOUT_S = 120.0
_MS = 1e6


def main() -> None:
    options = parse_arguments()
    home = tempfile.mkdtemp(prefix="xsave-bench.", dir=options.tmpfs)
    os.environ |= {"XSAVE_HOME": home, "PYTHONPATH": str(ROOT)}
    os.environ["PYTHONPYCACHEPREFIX"] = f"{home}/pycache"  # compiled, as pip leaves it
    results: list[dict[str, Any]] = []
    sshd = None if options.no_ssh else start_sshd(Path(home) / "sshd")
    left_out = set(SSH_CASES if sshd is None else ())
    if options.case:
        left_out |= CASES.keys() - {*options.case, PEER}
    for case in left_out:
        del CASES[case]
    try:
        for memory in options.memory:
            for host in ("a", "b"):
                name = host + memory
                run("host", "add", name, "--memory", f"{mebibytes(memory) + 512}M")
                if sshd:
                    far = ["--ssh", "far", "--command", far_command(home), "--remote-host", name]
                    run("host", "add", f"far-{name}", *far)
            for writer in options.writers:
                touch = f"touch={mebibytes(memory) // _TOUCHED}M heartbeat={_BEAT_MS}"
                how = ["--cmdline", f"{touch} {WRITERS[writer]}"]
                results += measure(memory, writer, how, options.rounds)
            if options.kernel:
                results += measure_linux(memory, Path(home), options)
    finally:
        if sshd:
            sshd.stop()
        subprocess.run([*XSAVE, "--host", "a", "list"], check=False, capture_output=True)
        shutil.rmtree(home, ignore_errors=True)
    if options.json:
        Path(options.json).write_text(json.dumps(results, indent=2) + "\n")


def start_sshd(directory: Path) -> Sshd:
    """Start a server on loopback, and have `ssh far` lead to it."""
    sshd = Sshd(directory)
    os.environ["PATH"] = f"{sshd.bin}:{os.environ['PATH']}"
    return sshd


def mebibytes(size: str) -> int:
    return int(size[:-1]) * {"M": 1, "G": 1024}[size[-1]]


def run(*arguments: str, **environment: str) -> str:
    """Run a command to its end; return its output."""
    done = subprocess.run(
        [*XSAVE, *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"xsave {' '.join(arguments)}: {done.returncode}: {done.stderr}")
    return done.stdout


def measure(memory: str, writer: str, how: list[str], rounds: int) -> list[dict[str, Any]]:
    """Move one guest, made so, to and fro; print a row per case."""
    here, there = f"a{memory}", f"b{memory}"
    run("--host", here, "create", DOMAIN, "--memory", memory, *how)
    wait_for_word(here, "TICK 2 ")
    found: dict[str, list[dict[str, Any]]] = {case: [] for case in CASES}
    for _ in range(rounds):
        for case, (flags, environment) in CASES.items():
            full = nonempty_bytes(here)
            to = f"far-{there}" if case in SSH_CASES else there
            said = run(
                "--host", here, "migrate", DOMAIN, "--to", to, "--json", *flags, **environment
            )
            here, there = there, here
            time.sleep(_SETTLE_S)
            result = json.loads(said.splitlines()[-1]) | {"nonempty_bytes": full}
            found[case].append(result | what_the_guest_says(console(here)))
    run("--host", here, "destroy", DOMAIN)
    rows = [summary(memory, writer, case, found[case], found[PEER]) for case in CASES]
    show(rows)
    return rows


def measure_linux(memory: str, home: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The same with a Linux; and QEMU's migration of that Linux, in turn with nothing."""
    ramdisk = home / "initrd"
    ramdisk.write_bytes(initramfs(Path(options.busybox).read_bytes()))
    how = ["--kernel", options.kernel, "--ramdisk", str(ramdisk), "--cmdline", "console=hvc0"]
    rows = measure(memory, LINUX, how, options.rounds)
    for number in range(options.rounds):
        said = migrate_in_qemu(options.kernel, ramdisk, mebibytes(memory), home / f"qemu{number}")
        print(
            f"{memory:>5} {LINUX:6} {QEMU:14} host {said['downtime']:7.1f} ms"
            f"  total {said['total-time'] / 1e3:5.2f} s"
            f"  rounds {said['ram']['dirty-sync-count']:4}"
            f"  sent {said['ram']['transferred'] / (mebibytes(memory) << 20):5.2f} x memory",
            flush=True,
        )
        rows.append({"memory": memory, "writer": LINUX, "case": QEMU, "runs": [said]})
    return rows


def console(host: str) -> str:
    """Return what the host's one guest has written since it came there."""
    logs = Path(os.environ["XSAVE_HOME"]).glob(f"hosts/{host}/domains/*/console.log")
    return "".join(log.read_text(errors="replace") for log in logs)


def wait_for_word(host: str, word: str) -> None:
    deadline = time.monotonic() + _TIMEOUT_S
    while word not in console(host):
        if time.monotonic() > deadline:
            raise RuntimeError(f"the guest never said {word!r}: {console(host)[-500:]}")
        time.sleep(0.1)


def what_the_guest_says(text: str) -> dict[str, float]:
    """Return its longest gap between two beats, or from Linux's time stamps how long it thawed."""
    if gaps := re.findall(r"HEARTBEAT (\d+) us", text):
        return {"gap_ms": int(gaps[0]) / 1e3}
    stamps = re.findall(r"^\[ *(\d+\.\d+)\]", text, re.M)
    return {"thaw_ms": (float(stamps[-1]) - float(stamps[0])) * 1e3} if len(stamps) > 1 else {}


def nonempty_bytes(host: str) -> int:
    """Return the bytes of the pages of the host's one guest that hold anything."""
    import numpy as np

    from xsave.host.host import open_host

    machine = open_host(host).machine
    mfns = np.flatnonzero(machine.owner[machine.first_frame :] < 0x7FF0) + machine.first_frame
    mfns = mfns[machine.resident(mfns)]
    parts = range(0, mfns.size, 4096)
    return 4096 * sum(int(machine.mem[mfns[i : i + 4096]].any(axis=1).sum()) for i in parts)


def summary(
    memory: str, writer: str, case: str, runs: list[dict[str, Any]], peers: list[dict[str, Any]]
) -> dict[str, Any]:
    def median(key: str, of: list[dict[str, Any]] = runs) -> float:
        return statistics.median(one[key] for one in of)

    ratios = [a["downtime_ns"] / b["downtime_ns"] for a, b in zip(runs, peers, strict=True)]
    return {
        "memory": memory,
        "writer": writer,
        "case": case,
        "guest_downtime_ms": median("guest_downtime_ns") / _MS,
        "least_guest_downtime_ms": min(one["guest_downtime_ns"] for one in runs) / _MS,
        "downtime_ms": median("downtime_ns") / _MS,
        "freeze_ms": median("freeze_ns") / _MS,
        "guest_says": {
            key: statistics.median(one[key] for one in runs if key in one)
            for key in ("gap_ms", "thaw_ms")
            if any(key in one for one in runs)
        },
        "downtime_ratio": statistics.median(ratios),
        "total_s": median("total_ns") / 1e9,
        "nr_rounds": median("nr_rounds"),
        "sent_by_nonempty": statistics.median(o["bytes_sent"] / o["nonempty_bytes"] for o in runs),
        "sent_by_memory": statistics.median(o["bytes_sent"] / o["memory_bytes"] for o in runs),
        "runs": runs,
    }


def show(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        guest = f"{row['guest_downtime_ms']:7.1f} ms (least {row['least_guest_downtime_ms']:6.1f})"
        sent = f"{row['sent_by_nonempty']:5.2f} x non-empty, {row['sent_by_memory']:5.2f} x memory"
        says = "".join(f"  {key[:-3]} {value:.1f} ms" for key, value in row["guest_says"].items())
        print(
            f"{row['memory']:>5} {row['writer']:6} {row['case']:14} guest {guest}"
            f"  host {row['downtime_ms']:7.1f} ms ({row['downtime_ratio']:5.2f} x no live)"
            f"  freeze {row['freeze_ms']:.1f} ms{says}"
            f"  total {row['total_s']:5.2f} s  rounds {row['nr_rounds']:4.1f}  sent {sent}",
            flush=True,
        )


def sizes(text: str) -> list[str]:
    if not all(re.fullmatch(r"[1-9][0-9]*[MG]", size) for size in text.split(",")):
        raise argparse.ArgumentTypeError(f"{text!r}: expected sizes like 256M,1G")
    return text.split(",")


def writers(text: str) -> list[str]:
    named = [name for name in text.split(",") if name]
    if unknown := set(named) - WRITERS.keys():
        raise argparse.ArgumentTypeError(f"{unknown.pop()!r}: expected {','.join(WRITERS)}")
    return named


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--memory", default="256M,1G", type=sizes, help="sizes, with commas (256M,1G)"
    )
    parser.add_argument(
        "--writers", default=",".join(WRITERS), type=writers,
        help="idle,light,heavy; '' for none, a Linux alone",
    )  # fmt: skip
    parser.add_argument("--rounds", type=int, default=5)
    names = list(CASES)
    parser.add_argument(
        "--case", action="append", choices=names, help=f"only this one, and {PEER!r}; repeatable"
    )
    parser.add_argument("--kernel", help="a distribution's vmlinuz: an idle Linux, too")
    parser.add_argument("--busybox", help="a static busybox for its ramdisk")
    parser.add_argument("--no-ssh", action="store_true", help="leave the rows with sshd out")
    parser.add_argument("--tmpfs", default="/dev/shm")
    parser.add_argument("--json", help="write everything measured to this file")
    return parser.parse_args()


if __name__ == "__main__":
    main()
