"""How long does a guest stand still when it is migrated, and how much is sent?

    python bench/bench_migrate.py [--memory 256M,1G] [--rounds 5] [--tmpfs DIR] [--json FILE]

A built-in guest moves to and fro between two hosts, idle, writing a little, writing a lot; live with
both ways to log its writes, compressed, through a real sshd on loopback, and suspended first
(--no-live), the peer of the same run: what it takes without the rounds. Every migration is the command as people run it. README.md says
more.
"""

from __future__ import annotations

import argparse
import json
import os
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

from tests.transport.sshd import Sshd, far_command

XSAVE = [sys.executable, "-m", "xsave", "-q"]
WRITERS = {
    "idle": "threads=0",
    "light": "write=8M rate=4M",
    "heavy": "write=32M rate=400M",
}
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
_SETTLE_S = 1.0
_MS = 1e6


def main() -> None:
    options = parse_arguments()
    home = tempfile.mkdtemp(prefix="xsave-bench.", dir=options.tmpfs)
    os.environ |= {"XSAVE_HOME": home, "PYTHONPATH": str(ROOT)}
    os.environ["PYTHONPYCACHEPREFIX"] = f"{home}/pycache"  # compiled, as pip leaves it
    results: list[dict[str, Any]] = []
    sshd = None if options.no_ssh else start_sshd(Path(home) / "sshd")
    if sshd is None:
        for case in SSH_CASES:
            del CASES[case]
    try:
        for memory in options.memory.split(","):
            for host in ("a", "b"):
                name = host + memory
                run("host", "add", name, "--memory", f"{mebibytes(memory) + 512}M")
                if sshd:
                    far = ["--ssh", "far", "--command", far_command(home), "--remote-host", name]
                    run("host", "add", f"far-{name}", *far)
            for writer in options.writers.split(","):
                results += measure(memory, writer, options.rounds)
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


def measure(memory: str, writer: str, rounds: int) -> list[dict[str, Any]]:
    """Move one guest to and fro; print a row per case."""
    here, there = f"a{memory}", f"b{memory}"
    touch = f"touch={mebibytes(memory) // _TOUCHED}M"
    cmdline = f"{touch} {WRITERS[writer]}"
    run("--host", here, "create", DOMAIN, "--memory", memory, "--cmdline", cmdline)
    time.sleep(_SETTLE_S)
    found: dict[str, list[dict[str, Any]]] = {case: [] for case in CASES}
    for _ in range(rounds):
        for case, (flags, environment) in CASES.items():
            full = nonempty_bytes(here)
            to = f"far-{there}" if case in SSH_CASES else there
            said = run(
                "--host", here, "migrate", DOMAIN, "--to", to, "--json", *flags, **environment
            )
            here, there = there, here
            found[case].append(json.loads(said.splitlines()[-1]) | {"nonempty_bytes": full})
            time.sleep(_SETTLE_S)
    run("--host", here, "destroy", DOMAIN)
    rows = [summary(memory, writer, case, found[case], found[PEER]) for case in CASES]
    show(rows)
    return rows


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
        "downtime_ratio": statistics.median(ratios),
        "total_s": median("total_ns") / 1e9,
        "nr_rounds": median("nr_rounds"),
        "sent_by_nonempty": statistics.median(o["bytes_sent"] / o["nonempty_bytes"] for o in runs),
        "sent_by_memory": statistics.median(o["bytes_sent"] / o["memory_bytes"] for o in runs),
        "runs": runs,
    }


def show(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        print(
            f"{row['memory']:>5} {row['writer']:6} {row['case']:14}"
            f" guest {row['guest_downtime_ms']:7.1f} ms (least {row['least_guest_downtime_ms']:6.1f})"
            f"  host {row['downtime_ms']:7.1f} ms ({row['downtime_ratio']:5.2f} x no live)"
            f"  total {row['total_s']:5.2f} s  rounds {row['nr_rounds']:4.1f}"
            f"  sent {row['sent_by_nonempty']:5.2f} x non-empty, {row['sent_by_memory']:5.2f} x memory",
            flush=True,
        )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--memory", default="256M,1G", help="sizes, with commas (256M,1G)")
    parser.add_argument("--writers", default=",".join(WRITERS), help="idle,light,heavy")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-ssh", action="store_true", help="leave the rows with sshd out")
    parser.add_argument("--tmpfs", default="/dev/shm")
    parser.add_argument("--json", help="write everything measured to this file")
    return parser.parse_args()


if __name__ == "__main__":
    main()
