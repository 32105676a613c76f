"""How fast are save and restore? Whole processes, beside cp and zstd on the same bytes.

    python bench/bench_save.py [--memory 1G] [--touch 340M] [--rounds 5]
                               [--tmpfs DIR] [--disk DIR] [--json FILE]

A built-in guest of --memory, --touch of it filled, runs throughout. For each place (tmpfs, disk)
its image is written once, also as a dense copy (no holes) and as the touched bytes alone; then
rounds of: save, save --compress, save and restore of either kind, and the peers. README.md says
what the rows and the ratios mean. The only output kept is the table and --json.
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
from pathlib import Path

from measuring import Case, ratio, run_rounds, timed

XSAVE = [sys.executable, "-m", "xsave", "-q"]
DOMAIN = "bench"
_TIMEOUT_S = 120.0
_COPY_BYTES = 1 << 24

#: (case, peer, most it may be): the aims of the project, each a ratio of wall times.
AIMS = (
    ("save", "cp --sparse=always, dense source", 2.0),
    ("save --compress", "zstd -1 -T2, touched bytes", 1.25),
    ("restore", "save and destroy", 1.0),
    ("restore, zstd", "save --compress and destroy", 1.0),
)
#: Further ratios worth a line.
RATIOS = (
    ("save", "cp --sparse=always, sparse source"),
    ("save", "cp --sparse=never"),
    ("save --compress", "zstd -1 -T2, dense source"),
    ("restore", "cp --sparse=always, dense source"),
    ("restore", "cp --sparse=always, sparse source"),
    ("restore, zstd", "zstd -d"),
)


def main() -> None:
    options = parse_arguments()
    home = tempfile.mkdtemp(prefix="xsave-bench.", dir=options.tmpfs)
    os.environ["XSAVE_HOME"] = home
    os.environ["PYTHONPATH"] = str(Path(__file__).resolve().parents[1])
    os.environ["PYTHONPYCACHEPREFIX"] = f"{home}/pycache"  # compiled, as pip leaves it
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    places = {"tmpfs": options.tmpfs, "disk": options.disk}
    try:
        boot(options.memory, options.touch)
        results = {
            place: measure(place, directory, options.rounds)
            for place, directory in places.items()
            if directory
        }
        check_guest()
    finally:
        subprocess.run([*XSAVE, "destroy", DOMAIN], check=False, stderr=subprocess.DEVNULL)
        shutil.rmtree(home, ignore_errors=True)
    if options.json:
        Path(options.json).write_text(json.dumps(report(options, results), indent=1) + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="How fast are save and restore?")
    parser.add_argument("--memory", default="1G", help="the guest's memory (1G)")
    parser.add_argument("--touch", default="340M", help="how much of it is filled (340M)")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each case (5)")
    parser.add_argument("--tmpfs", default="/dev/shm", help="where files in memory go")
    parser.add_argument("--disk", default="/var/tmp", help='where files on disk go ("": nowhere)')
    parser.add_argument("--json", metavar="FILE", help="write all samples there")
    return parser.parse_args()


# -- the guest ---


def boot(memory: str, touch: str) -> None:
    """Create the guest and wait until its memory is filled: it ticks from then on."""
    arguments = ["create", DOMAIN, "--memory", memory, "--cmdline", f"touch={touch}"]
    timed([*XSAVE, *arguments])
    wait_for(lambda: "TICK 2" in console(), "the guest does not tick")


def console() -> str:
    return subprocess.run(
        [*XSAVE, "console", DOMAIN, "--log"], check=True, capture_output=True, text=True
    ).stdout


def check_guest() -> None:
    """The guest checks its memory all the time; after so many restores it must still agree."""
    time.sleep(2)
    text = console()
    if "TICK" not in text or "FAILED" in text:
        sys.exit(f"the guest is not well:\n{text[-2000:]}")


def wait_for(condition: object, complaint: str) -> None:
    deadline = time.monotonic() + _TIMEOUT_S
    while not condition():  # type: ignore[operator]
        if time.monotonic() > deadline:
            sys.exit(complaint)
        time.sleep(0.1)


def wait_until_gone() -> None:
    """Until the process of the saved domain has given its frames back."""
    domains = Path(os.environ["XSAVE_HOME"]) / "hosts" / "localhost" / "domains"
    wait_for(lambda: not any(domains.iterdir()), "the domain does not end")


# -- one place ---


def measure(place: str, parent: str, rounds: int) -> dict[str, Case]:
    """Run all cases with their files in a fresh directory below `parent`."""
    with tempfile.TemporaryDirectory(prefix="xsave-bench.", dir=parent) as directory:
        os.chmod(directory, 0o700)  # noqa: PTH101
        say(f"{place}: {directory}")
        base = Path(directory)
        prepare(base)
        groups = cases(base)
        run_rounds(groups, rounds, say)
    found = {case.name: case for group in groups for case in group}
    show(place, found)
    return found


def prepare(base: Path) -> None:
    """Write the image once: sparse, dense, the touched bytes alone, compressed by zstd."""
    sparse, dense = base / "sparse", base / "dense"
    timed([*XSAVE, "save", "-c", DOMAIN, str(sparse)])
    timed(["cp", "--sparse=never", str(sparse), str(dense)])
    copy_data(sparse, base / "touched")
    timed(["zstd", "-1", "-T2", "-q", "-f", str(dense), "-o", str(base / "dense.zst")])


def copy_data(source: Path, target: Path) -> None:
    """Copy what is not in a hole, one piece behind the other."""
    with source.open("rb") as read, target.open("wb") as write:
        position, end = 0, os.fstat(read.fileno()).st_size
        while position < end:
            try:
                position = os.lseek(read.fileno(), position, os.SEEK_DATA)
            except OSError:  # a hole up to the end
                return
            hole = os.lseek(read.fileno(), position, os.SEEK_HOLE)
            while position < hole:
                data = os.pread(read.fileno(), min(hole - position, _COPY_BYTES), position)
                write.write(data)
                position += len(data)


def cases(base: Path) -> list[list[Case]]:
    """Return the groups: a restore belongs behind its save."""

    def peer(name: str, tool: str, source: str, output: str = "peer.out") -> list[Case]:
        target = base / output
        command = f"{tool.format(base / source, target)} && sync {target}"
        return [Case(name, ["sh", "-c", command], str(target))]

    def save(name: str, *arguments: str, output: str) -> Case:
        target = str(base / output)
        return Case(name, [*XSAVE, "save", *arguments, DOMAIN, target], target)

    def pair(image: str, save_name: str, restore_name: str, *arguments: str) -> list[Case]:
        first = save(save_name, *arguments, output=image)
        first.after = wait_until_gone
        return [first, Case(restore_name, [*XSAVE, "restore", str(base / image)])]

    return [
        [Case("start-up (xsave list)", [*XSAVE, "list"])],
        [save("save", "-c", output="save.img")],
        [save("save --compress", "-c", "--compress", output="save.zst")],
        pair("pair.img", "save and destroy", "restore"),
        pair("pair.zst", "save --compress and destroy", "restore, zstd", "--compress"),
        peer("cp --sparse=never", "cp --sparse=never {} {}", "dense"),
        peer("cp --sparse=always, dense source", "cp --sparse=always {} {}", "dense"),
        peer("cp --sparse=always, sparse source", "cp --sparse=always {} {}", "sparse"),
        peer("zstd -1 -T2, dense source", "zstd -1 -T2 -q -f {} -o {}", "dense"),
        peer("zstd -1 -T2, touched bytes", "zstd -1 -T2 -q -f {} -o {}", "touched"),
        peer("zstd -d", "zstd -d -q -f {} -o {}", "dense.zst"),
    ]


# -- what came out ---


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def show(place: str, found: dict[str, Case]) -> None:
    """Print the table of one place and the ratios."""
    print(f"\n{place:<36} {'wall s':>7} {'best':>6} {'CPU s':>6} {'MiB out':>8} {'on disk':>8}")
    for case in found.values():
        size = f"{case.output_bytes / 2**20:8.0f} {case.allocated_bytes / 2**20:8.0f}"
        print(
            f"{case.name:<36} {case.median('wall_s'):7.2f} {case.best_s():6.2f} "
            f"{case.median('cpu_s'):6.2f} {size if case.output else ''}"
        )
    print("\nratio of wall (of CPU) times")
    for name, peer_name, aim in (*AIMS, *((a, b, None) for a, b in RATIOS)):
        case, peer = found[name], found[peer_name]
        wall = ratio(case, peer)
        verdict = "" if aim is None else f"  aim {aim}: {'met' if wall <= aim else 'MISSED'}"
        print(f"{wall:6.2f} ({ratio(case, peer, 'cpu_s'):5.2f})  {name} / {peer_name}{verdict}")
    sys.stdout.flush()


def report(options: argparse.Namespace, results: dict[str, dict[str, Case]]) -> dict[str, object]:
    return {
        "memory": options.memory,
        "touch": options.touch,
        "machine": {"cpus": os.cpu_count(), "kernel": platform.release(), "load": os.getloadavg()},
        "python": platform.python_version(),
        "places": {
            place: [case.as_json() for case in found.values()] for place, found in results.items()
        },
    }


if __name__ == "__main__":
    main()
