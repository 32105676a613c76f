"""A domain's process that lets no guest run on a host with a file STILL in its directory.

Its domains become the guest, with all that belongs to it but the guest's first instruction: so what
it was given can be compared with what it was sent. With the arguments of `xsave` it is that
command, with such processes.
"""

from __future__ import annotations

import sys

from tests.flows.faulty import fill_disks
from xsave import cli
from xsave.guest.xen.domain import Domain
from xsave.host import loop, prestart, process

STILL = "still"
PROCESS_MODULE = "tests.flows.standstill"


def stand_still():
    """Change this process."""
    runnable, start = loop.DomainProcess._runnable, Domain.start

    def still(machine):
        return (machine.directory / STILL).exists()

    def not_now(one):
        return runnable(one) and not still(one.running.machine)

    def start_later(domain):
        if not still(domain.machine):  # power_on() does it then
            start(domain)

    loop.DomainProcess._runnable = not_now
    Domain.start = start_later


def main():
    fill_disks()
    if sys.argv[1] == "--host":
        prestart.PROCESS_MODULE = PROCESS_MODULE
        cli.main()
    stand_still()
    process.main(sys.argv[1:])


if __name__ == "__main__":
    main()
