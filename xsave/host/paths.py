"""Where xsave keeps things: a runtime directory on tmpfs (RAM is volatile) and nothing else.

`$XSAVE_HOME` if set; else `$XDG_RUNTIME_DIR/xsave`; else `/dev/shm/xsave-UID`. An empty variable
counts as unset. Layout: hosts/NAME/{host.json, machine.mem, frames.tab, domains/DOMID/...}.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from xsave.errors import StorageError


def runtime_directory() -> Path:
    """Return the runtime directory, made if need be (mode 0700). Raises StorageError."""
    home, xdg = os.environ.get("XSAVE_HOME"), os.environ.get("XDG_RUNTIME_DIR")
    if home:
        path = Path(home)
    elif xdg:
        path = Path(xdg) / "xsave"
    elif Path("/dev/shm").is_dir():
        path = Path(f"/dev/shm/xsave-{os.getuid()}")
    else:
        path = Path(tempfile.gettempdir()) / f"xsave-{os.getuid()}"
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        owner = path.stat().st_uid
    except OSError as e:
        raise StorageError(f"{path}: cannot make the runtime directory: {e.strerror}") from e
    if owner != os.getuid():
        raise StorageError(f"{path}: the runtime directory belongs to user {owner}, not to you")
    return path


def hosts_directory() -> Path:
    path = runtime_directory() / "hosts"
    path.mkdir(mode=0o700, exist_ok=True)
    return path
