"""`python -m tests.flows.faulty FAULTS ARGUMENT ...`: xsave, with a fault at a step of a hand-over.

FAULTS is JSON: {"sender": FAULT, "receiver": FAULT}, each of the two as it likes. FAULT is
{"at": a place of the table, "when": "before" or "behind" it, "what": ...}:

    kill        SIGKILL
    interrupt   SIGINT, once
    stop        SIGSTOP
    cut         the pipes of this end are closed
    full        from here on no journal of this host can be written, by nobody

The sender passes the receiver's on to it.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

from xsave.host import prestart, receivers
from xsave.host.handover import journal, play

#: A host's disk is full as long as there is this file in its directory.
FULL = "full"
PROCESS_MODULE = "tests.flows.fulldisk"


def fill_disks():
    """Make journals of a host that is FULL unwritable, in this process."""
    write_slot = journal._write_slot

    def write(fd, number, entry):
        path = Path(f"/proc/self/fd/{fd}").readlink()
        if (path.parent.parent / FULL).exists():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write_slot(fd, number, entry)

    journal._write_slot = write


def strike(what, player):
    """Do what goes wrong."""
    if what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif what == "interrupt":
        os.kill(os.getpid(), signal.SIGINT)
    elif what == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif what == "full":
        (player._journal.path.parent.parent / FULL).touch()
    elif hasattr(player, "_channel"):  # the sender
        cut(player._channel._wire._fd, player._output, TO_RECEIVER[0])
    else:
        cut(0, 1, player._source._fd)


def cut(*descriptors):
    """Let go of pipes, but keep the numbers."""
    null = os.open(os.devnull, os.O_RDWR)
    for fd in descriptors:
        os.dup2(null, fd)


TO_RECEIVER = []


def inject(fault):
    """Have the fault at its step."""
    act = play._act

    def faulty(here, player):
        mine = here[0].at == fault["at"]
        if mine and fault["when"] == "before":
            strike(fault["what"], player)
        then = act(here, player)
        if mine and fault["when"] == "behind":
            strike(fault["what"], player)
        return then

    play._act = faulty


def pass_on(faults):
    """Start the receiver with its fault, when one is started."""
    popen = subprocess.Popen

    def start(command, **options):
        if "migrate-receive" in command:
            at = command.index("xsave")
            mine = json.dumps({"sender": faults.get("receiver")})
            command = [sys.executable, "-m", "tests.flows.faulty", mine, *command[at + 1 :]]
        process = popen(command, **options)
        if "migrate-receive" in command:
            TO_RECEIVER.append(process.stdin.fileno())
        return process

    receivers.subprocess = SimpleNamespace(**vars(subprocess) | {"Popen": start})


def main():
    """Run xsave so."""
    faults = json.loads(sys.argv[1])
    sys.argv[1:] = sys.argv[2:]
    fill_disks()
    prestart.PROCESS_MODULE = PROCESS_MODULE
    if fault := faults.get("sender"):
        inject(fault)
    pass_on(faults)
    from xsave import cli

    cli.main()


if __name__ == "__main__":
    main()
