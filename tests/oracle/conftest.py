"""Xen's own verifier, taken from Debian's package and run as a process; nothing of it is vendored.

It looks at framing only: no order, no completeness, nothing inside pages. It calls every optional
record unknown, and fails on any xenstore data of an emulator (it compares bytes with str), so such
images are not given to it. Big records are cut short when it reads a pipe: it gets files.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

#: Debian 12, 13 and 11.
XEN_VERSIONS = ("4.17", "4.20", "4.14")
TIMEOUT_S = 120


def _run(*command, cwd):
    return subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )


def _unpack(version, directory):
    """Download and unpack one version's xen-utils; return why that failed, "" if it did not."""
    package = f"xen-utils-{version}"
    try:
        result = _run("apt-get", "download", package, cwd=directory)
        if result.returncode:
            return f"apt-get download {package}: {result.stderr.strip() or 'it failed'}"
        deb = max(directory.glob(f"{package}_*.deb"))
        # Renamed when it is whole: an interrupted run leaves nothing that looks unpacked.
        partial = Path(tempfile.mkdtemp(dir=directory))
        result = _run("dpkg-deb", "-x", deb.name, partial.name, cwd=directory)
    except subprocess.TimeoutExpired as error:
        return f"{error.cmd[0]} took more than {TIMEOUT_S} s"
    if result.returncode:
        return f"dpkg-deb -x {deb.name}: {result.stderr.strip()}"
    partial.rename(directory / f"unpacked-{version}")
    return ""


def _find(directory):
    """Return the script of a version that was unpacked, None if there is none."""
    scripts = sorted(directory.glob("unpacked-*/usr/lib/xen-*/bin/verify-stream-v2"))
    return scripts[0] if scripts else None


@pytest.fixture(scope="session")
def verify_stream_v2(request):
    """The path of Xen's verify-stream-v2; the test is skipped where it cannot be had."""
    directory = Path(request.config.cache.mkdir("xen-utils"))
    if script := _find(directory):
        return script
    for tool in ("apt-get", "dpkg-deb"):
        if not shutil.which(tool):
            pytest.skip(f"Xen's verifier comes from a Debian package, and there is no {tool}")
    reasons = []
    for version in XEN_VERSIONS:
        reasons.append(_unpack(version, directory))
        if script := _find(directory):
            return script
    pytest.skip(f"Xen's verifier cannot be downloaded: {reasons[0]}")


@pytest.fixture(scope="session")
def xen_verify(verify_stream_v2):
    """Run Xen's verifier: `xen_verify(path, "xl"|"libxl"|"libxc") -> (exit status, output)`.

    0: it found nothing, 1: the stream is wrong, 2: the verifier itself failed.
    """
    library = verify_stream_v2.parents[1] / "lib" / "python"

    def run(path, wrapping):
        command = [sys.executable, verify_stream_v2, "-f", wrapping, "-v", "-i", path]
        environment = os.environ | {"PYTHONPATH": str(library), "PYTHONDONTWRITEBYTECODE": "1"}
        result = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
        return result.returncode, result.stdout + result.stderr

    return run
