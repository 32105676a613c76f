"""How soon does a guest run, whatever the size of its image? restore --lazy, beside restore.

    python bench/bench_lazy.py [--memory 64M,1G,8G] [--touch 0] [--rounds 5]
                               [--tmpfs DIR] [--images DIR] [--json FILE]

For each size a built-in guest is saved once (--touch of it filled: the rest are holes of the
image) and then restored again and again, lazily and at once. Measured is from the start of the
command to the first line that the guest writes to its console, which is some thousand instructions
behind its first one, and to the command's end. The sizes of a round come in shuffled order.
README.md says more.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
XSAVE = [sys.executable, "-m", "xsave", "-q"]
DOMAIN = "bench"
CASES = {"lazy": ["--lazy"], "at once": []}
_TIMEOUT_S = 120.0
_GLANCE_S = 0.0005
#: What `xsave` itself needs of a machine, and the frames that its size rounds away.
_SPARE_MIB = 256


def main() -> None:
    options = parse_arguments()
    sizes = options.memory.split(",")
    home = tempfile.mkdtemp(prefix="xsave-bench.", dir=options.tmpfs)
    images = tempfile.mkdtemp(prefix="xsave-bench.", dir=options.images)
    os.environ |= {"XSAVE_HOME": home, "PYTHONPATH": str(ROOT)}
    os.environ["PYTHONPYCACHEPREFIX"] = f"{home}/pycache"  # compiled, as pip leaves it
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    samples: dict[tuple[str, str], list[dict[str, float]]] = {}
    try:
        run("host", "add", "a", "--memory", f"{max(map(mebibytes, sizes)) + _SPARE_MIB}M")
        for size in sizes:
            make_image(size, options.touch, f"{images}/{size}")
        for number in range(options.rounds):
            order = [(size, case) for size in sizes for case in CASES]
            random.Random(number).shuffle(order)
            for size, case in order:
                sample = restore(Path(home), f"{images}/{size}", CASES[case])
                samples.setdefault((size, case), []).append(sample)
            print(f"round {number + 1} of {options.rounds} done", file=sys.stderr)
    finally:
        run("--host", "a", "destroy", DOMAIN, check=False)
        shutil.rmtree(home, ignore_errors=True)
        shutil.rmtree(images, ignore_errors=True)
    report(sizes, samples, options.json)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="How soon does a guest run?")
    parser.add_argument("--memory", default="64M,1G,8G", help="sizes (64M,1G,8G)")
    parser.add_argument("--touch", default="0", help="how much of each is filled (0)")
    parser.add_argument("--rounds", type=int, default=5, help="restores of each kind (5)")
    parser.add_argument("--tmpfs", default="/dev/shm", help="where the host's memory goes")
    parser.add_argument("--images", default="/var/tmp", help="where the images go")
    parser.add_argument("--json", metavar="FILE", help="write all samples there")
    return parser.parse_args()


def mebibytes(size: str) -> int:
    return int(size[:-1]) * {"M": 1, "G": 1024}[size[-1]]


def run(*arguments: str, check: bool = True) -> None:
    quiet = None if check else subprocess.DEVNULL
    subprocess.run([*XSAVE, *arguments], check=check, stderr=quiet)


def make_image(size: str, touch: str, image: str) -> None:
    arguments = ["--memory", size, "--cmdline", f"touch={touch}"]
    run("--host", "a", "create", DOMAIN, *arguments)
    deadline = time.monotonic() + _TIMEOUT_S
    while "TICK 2" not in console_log(Path(os.environ["XSAVE_HOME"])):
        if time.monotonic() > deadline:
            sys.exit("the guest does not tick")
        time.sleep(0.05)
    run("--host", "a", "save", DOMAIN, image)
    wait_until_gone(Path(os.environ["XSAVE_HOME"]))


def console_log(home: Path) -> str:
    """Return what the one domain's guest has written."""
    for path in (home / "hosts" / "a" / "domains").glob("*/console.log"):
        return path.read_text()
    return ""


def wait_until_gone(home: Path) -> None:
    """Until the domain's process has given its frames back."""
    while any((home / "hosts" / "a" / "domains").iterdir()):
        time.sleep(0.01)
    time.sleep(0.2)


def restore(home: Path, image: str, options: list[str]) -> dict[str, float]:
    """Restore once and destroy; return seconds to the first line, and to the command's end."""
    start = time.perf_counter()
    command = [*XSAVE, "--host", "a", "restore", *options, image]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    ended = line = None
    while ended is None or line is None:
        now = time.perf_counter() - start
        if ended is None and process.poll() is not None:
            ended = now
        if line is None and console_log(home):
            line = now
        if now > _TIMEOUT_S or process.returncode:
            sys.exit(f"{' '.join(command)}: exit {process.returncode}")
        time.sleep(_GLANCE_S)
    run("--host", "a", "destroy", DOMAIN)
    wait_until_gone(home)
    return {"first_line_s": line, "command_s": ended}


def report(
    sizes: list[str], samples: dict[tuple[str, str], list[dict[str, float]]], path: str | None
) -> None:
    rows: list[dict[str, Any]] = []
    for (size, case), found in sorted(samples.items(), key=lambda i: (i[0][1], mebibytes(i[0][0]))):
        least = samples[min(sizes, key=mebibytes), case]
        pairs = zip(found, least, strict=True)
        row = {
            "memory": size,
            "case": case,
            "samples": found,
            "first_line_s": statistics.median(s["first_line_s"] for s in found),
            "command_s": statistics.median(s["command_s"] for s in found),
            "ratio": statistics.median(a["first_line_s"] / b["first_line_s"] for a, b in pairs),
        }
        rows.append(row)
        print(
            f"{size:>5} {case:8} first line {row['first_line_s']:6.3f} s"
            f"  command {row['command_s']:6.3f} s"
            f"  {row['ratio']:5.2f} x {min(sizes, key=mebibytes)}"
        )
    if path:
        Path(path).write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
