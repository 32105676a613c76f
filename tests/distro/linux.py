"""What the tests of distributions' kernels share: booting one, and what it says on its console."""

from __future__ import annotations

import os
import re
from pathlib import Path

from tests.flows.flow import MIB, console, state, wait_for
from xsave.host.create import create

#: Booting takes 4 s on an idle machine with one vCPU.
PATIENCE_S = 600
#: What a kernel prints when something is wrong with it, or with its processors.
COMPLAINTS = re.compile(
    r"BUG:|Oops|WARNING:|Call Trace|detected stall|Kernel panic|general protection|segfault"
    r"|W\+X.*FAILED"
)


def kernels():
    """Return the kernels there are to test, none if there is no directory."""
    directory = Path(os.environ.get("XSAVE_DISTRO_KERNELS", "/nonexistent"))
    return sorted(path.name for path in directory.glob("vmlinuz-*")) or ["none"]


def boot(host, kernel, ramdisk, **options):
    options = {"memory_bytes": 256 * MIB, "cmdline": "console=hvc0", **options}
    create(host, "g", kernel=kernel, ramdisk=ramdisk, **options)


def told(host):
    """The console with newlines as they are everywhere else. Raises nothing."""
    return console(host).replace("\r\n", "\n")


def ticks(text):
    """[(number, "cpus=N HASH")] of what user space printed."""
    return [(int(n), rest) for n, rest in re.findall(r"^TICK (\d+) (.+)\n", text, re.MULTILINE)]


def wait_for_ticks(host, last, after=""):
    """Wait until user space has ticked so far behind this text; return what was said there.

    Fails at once if the domain ends."""

    def reached():
        text = told(host).rpartition(after)[2] if after else told(host)
        if ticks(text) and ticks(text)[-1][0] >= last:
            return text
        assert state(host) == "running", told(host)[-2000:]
        return None

    return wait_for(reached, PATIENCE_S)


def without_complaint(text, same=True):
    """Assert that the kernel found nothing wrong, that each tick is the last one's next, and that
    user space always saw the same (same=False: but for the number of processors)."""
    assert COMPLAINTS.findall(text) == []
    numbers = [n for n, _ in ticks(text)]
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    seen = {rest if same else rest.split()[-1] for _, rest in ticks(text)}
    assert len(seen) == 1, seen


def type_line(host, line):
    """Type on the guest's console."""
    with host.find("g") as domctl:
        domctl.console_attach().sendall(line)


def do(host, command):
    """Have the guest's user space do a line of shell that must succeed; return what was said."""
    before = len(told(host))
    type_line(host, b"do " + command.encode() + b"\n")

    def done():
        assert state(host) == "running", told(host)[-2000:]
        return re.search(r"^(.*?)^DONE (\d+)$", told(host)[before:], re.MULTILINE | re.DOTALL)

    found = wait_for(done, PATIENCE_S)
    assert found[2] == "0", found[0]
    return found[1]
