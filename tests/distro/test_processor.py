"""What user space gets of its processor: exceptions, 32-bit code, registers that nobody else uses,
and a clock."""

from __future__ import annotations

import hashlib
import re
import time

import pytest

from tests.distro.linux import PATIENCE_S, boot, do, told, wait_for_ticks, without_complaint
from tests.flows.flow import destroy, nothing_is_left, restore, save, wait_for

pytestmark = pytest.mark.slow


def test_exceptions_and_32_bits(host, kernel, probing_ramdisk, directory):
    """Programs of 64 and of 32 bits get the signals that a processor's exceptions are, single
    steps, system calls in every way there is, and each other's code; a whole busybox of 32 bits
    runs."""
    boot(host, kernel, probing_ramdisk)
    wait_for_ticks(host, 1)
    for program in ("/probe64", "/probe32"):
        said = do(host, program)
        assert "probe: 0 bad" in said, said
    busybox32 = directory / "busybox32"
    if busybox32.is_file():
        said = do(host, "/busybox32 sh -c '/busybox32 cat /busybox32 | /busybox32 sha256sum'")
        assert hashlib.sha256(busybox32.read_bytes()).hexdigest() in said
    without_complaint(told(host))
    destroy(host)
    nothing_is_left(host)


@pytest.mark.parametrize("preempt", ["full", "voluntary"])
def test_code_that_only_computes(host, kernel, probing_ramdisk, tmp_path, preempt):
    """Programs that count in registers and make no system call are stopped wherever they are,
    saved and restored, and have lost no instruction and no register."""
    boot(host, kernel, probing_ramdisk, vcpus=2, cmdline=f"console=hvc0 preempt={preempt}")
    wait_for_ticks(host, 1)
    assert f"Dynamic Preempt: {preempt}" in told(host)
    do(host, "/probe64 spin & /probe32 spin &")
    last = 0
    for generation in range(4):
        if generation:
            save(host, tmp_path / "img")
            restore(host, tmp_path / "img")
        for bits in ("64", "32"):
            wait_for(lambda bits=bits: spun(told(host), bits), PATIENCE_S)
        text = wait_for_ticks(host, 1)
        assert "BAD" not in text
        numbers = spun(text, "64")
        assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
        assert not last or numbers[0] >= last  # what it said last may be on both consoles' edge
        last = numbers[-1]
        without_complaint(text)
    destroy(host)
    nothing_is_left(host)


def spun(text, bits):
    """The numbers of the rounds a spinning probe is through with."""
    return [int(n) for n in re.findall(rf"SPIN{bits} (\d+) ok\n", text)]


def test_the_clock_goes_on(host, kernel, ramdisk, tmp_path):
    """Restored later, the guest's time of day is as far from the host's as it was, although it did
    not run meanwhile; its monotonic clock does not go back."""
    boot(host, kernel, ramdisk)
    wait_for_ticks(host, 1)
    watch = "last=0; while read up _ < /proc/uptime; do up=${up%.*}${up#*.};"
    watch += ' [ $up -lt $last ] && echo "BACK $up $last"; last=$up; sleep 0.01; done'
    do(host, f"({watch}) &")
    before = behind(host)
    save(host, tmp_path / "img")
    time.sleep(4)  # so that a clock which stood still meanwhile would be seen
    restore(host, tmp_path / "img")
    after = behind(host)
    assert after[0] <= before[1] + 1
    assert before[0] <= after[1] + 1
    without_complaint(told(host))
    assert "BACK" not in told(host).replace(f"do ({watch}) &", "")
    destroy(host)
    nothing_is_left(host)


def behind(host):
    """The least and the most seconds the guest's time of day can be behind the host's."""
    asked = time.time()
    said = do(host, "date +%s")
    answered = time.time()
    (guest,) = re.findall(r"^(\d{9,})$", said, re.MULTILINE)
    return asked - int(guest) - 1, answered - int(guest)
