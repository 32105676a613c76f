"""Migrations as the command does them, with faults (faulty.py), and what all must come to."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

from tests.conftest import ROOT
from tests.flows import faulty
from tests.flows.flow import console, nothing_is_left, runs_on, state, wait_for


def migrate(source, target, *options, **faults):
    """Migrate g as the command does, with faults; return exit code and what was said."""
    arguments = [*("--host", source.name), "migrate", "g", "--to", target.name, *options]
    command = [sys.executable, "-m", "tests.flows.faulty", json.dumps(faults), *arguments]
    ended = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    return ended.returncode, ended.stderr


def recover_all(xsave, *hosts):
    """Recover at every host; there is room again. Twice: the second time nothing is left to do."""
    for host in hosts:
        (host.directory / faulty.FULL).unlink(missing_ok=True)
    for host in hosts:
        assert xsave("--host", host.name, "migrate", "--recover").code == 0
    for host in hosts:
        said = xsave.json("--host", host.name, "migrate", "--status")
        assert all(one["finished"] for one in said), said
        assert xsave.json("--host", host.name, "migrate", "--recover") == []


def receivers(home):
    """Return the pids of the `migrate-receive` that work for the hosts of a home."""
    mine = b"XSAVE_HOME=" + os.fsencode(home)
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if (
                entry.name.isdigit()
                and b"migrate-receive" in (entry / "cmdline").read_bytes().split(b"\0")
                and mine in (entry / "environ").read_bytes().split(b"\0")
            ):
                found.append(int(entry.name))
    return found


def one_runs(*hosts):
    """Assert that one copy runs all else being as if there had been no other; return where."""
    wait_for(lambda: sum(len(host.domains()) for host in hosts) == 1)
    (where,) = [host for host in hosts if state(host)]
    runs_on(where)
    assert "CHECK FAILED" not in console(where)
    for host in hosts:
        if host is not where:
            nothing_is_left(host)
    return where
