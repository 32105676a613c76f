"""What all tests share: a home for hosts, the CLI as a process, real Xen images.

`XSAVE_XEN_IMAGES` names a directory of images a real Xen wrote (*.zst), `XSAVE_KERNELS` one with
a small Linux; tests that want them are skipped, with the reason, where they are unset.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).resolve().parents[1]
SHARED_MEMORY = Path("/dev/shm")
CLI_TIMEOUT_S = 120

# A shell that starts the suite in the background has it ignore Ctrl-C, and so all its children.
signal.signal(signal.SIGINT, signal.default_int_handler)

# The machines the tests run on are slow and shared: no example may fail for its time.
settings.register_profile(
    "xsave", deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
settings.load_profile("xsave")


def processes_of(home: Path) -> list[int]:
    """Return the pids of the domain processes whose host lives below `home`."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                arguments = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if any(part.startswith(os.fsencode(home) + b"/") for part in arguments):
                found.append(int(entry.name))
    return found


def no_process_is_left(home: Path, seconds: float = 10) -> bool:
    """True once the domain processes of `home` are gone: one that has given up its domain
    takes a moment to end."""
    deadline = time.monotonic() + seconds
    while processes_of(home) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not processes_of(home)


def end_processes(home: Path) -> None:
    """Kill what still runs below `home`, by pid, and wait until it is gone."""
    deadline = time.monotonic() + 10
    while (pids := processes_of(home)) and time.monotonic() < deadline:
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.02)


def make_home():
    """Make an empty directory for XSAVE_HOME, in shared memory if there is any."""
    base = SHARED_MEMORY if os.access(SHARED_MEMORY, os.W_OK) else None
    return Path(tempfile.mkdtemp(prefix="xsave-test-", dir=base))


@pytest.fixture
def xsave_home(monkeypatch):
    """An empty XSAVE_HOME in shared memory; the test leaves no process and no file behind."""
    home = make_home()
    monkeypatch.setenv("XSAVE_HOME", str(home))
    yield home
    end_processes(home)
    shutil.rmtree(home, ignore_errors=True)


@dataclass
class Result:
    """How a command ended."""

    code: int
    out: bytes
    err: str

    def json(self):
        """The JSON document on stdout."""
        return json.loads(self.out)


class Xsave:
    """The command line, as a process of its own."""

    def __init__(self, home):
        self.home = home

    def start(self, *arguments, **popen):
        """Start a command; the caller waits for it."""
        command = [sys.executable, "-m", "xsave", *map(str, arguments)]
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen(command, cwd=ROOT, **(pipes | popen))

    def __call__(self, *arguments, stdin=None, timeout=CLI_TIMEOUT_S):
        """Run a command to its end, whatever that is."""
        feed = {"stdin": subprocess.PIPE} if isinstance(stdin, bytes) else {"stdin": stdin}
        process = self.start(*arguments, **({} if stdin is None else feed))
        try:
            out, err = process.communicate(stdin if isinstance(stdin, bytes) else None, timeout)
        finally:
            process.kill()
            process.wait()
        return Result(process.returncode, out, err.decode(errors="replace"))

    def ok(self, *arguments, **options):
        """Run a command that must succeed."""
        result = self(*arguments, **options)
        assert result.code == 0, f"xsave {arguments}: {result.code}: {result.err}"
        return result

    def json(self, *arguments, **options):
        """Run a command that must succeed with --json; return its answer."""
        return self.ok(*arguments, "--json", **options).json()


@pytest.fixture
def xsave(xsave_home):
    """The command line on an empty home: `xsave("list")`, `xsave.ok(...)`, `xsave.json(...)`."""
    return Xsave(xsave_home)


def directory_named_by(variable):
    """Return the directory an environment variable names, or skip the test with the reason."""
    value = os.environ.get(variable)
    if not value:
        pytest.skip(f"{variable} is unset")
    if not Path(value).is_dir():
        pytest.skip(f"{variable}={value} is no directory")
    return Path(value)


@pytest.fixture(scope="session")
def unzstd(tmp_path_factory):
    """Decompress a .zst file once per session: `unzstd(path) -> path of the plain file`."""
    directory = tmp_path_factory.mktemp("plain")

    def plain(path):
        import zstandard

        target = directory / path.name.removesuffix(".zst")
        if not target.exists():
            with path.open("rb") as source, target.open("wb") as out:
                zstandard.ZstdDecompressor().copy_stream(source, out)
        return target

    return plain


@pytest.fixture(scope="session")
def xen_images():
    """The directory of real Xen images (*.zst)."""
    return directory_named_by("XSAVE_XEN_IMAGES")


@pytest.fixture(scope="session")
def xen_image(xen_images, unzstd):
    """One real Xen image by name, decompressed: `xen_image("pv-micro-1cpu.img") -> path`."""

    def image(name):
        path = xen_images / f"{name}.zst"
        if not path.exists():
            pytest.skip(f"no {path.name} in XSAVE_XEN_IMAGES")
        return unzstd(path)

    return image


@pytest.fixture(scope="session")
def micro_linux(unzstd):
    """The small Linux: (kernel ELF, initial ramdisk)."""
    directory = directory_named_by("XSAVE_KERNELS")
    return unzstd(directory / "vmlinux-micro.zst"), directory / "micro-initrd"
