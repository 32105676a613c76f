"""A file that has no name until it is complete: whoever is killed before leaves nothing.

Linux makes files without a name (O_TMPFILE) on most file systems. Where it does not, the file is
called `.NAME.XXXXXX` meanwhile, and so it is, for the moment between two system calls, where an
older file must be replaced: linkat(2) does not do that, rename(2) does.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

_WITHOUT_A_NAME = os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC
#: What open(2) answers where there is no O_TMPFILE: by the file system, by an old kernel.
_NOT_HERE = (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL)


class NewFile:
    """A new, private file (mode 0600) for the place `target`, open as `fd`.

    Raises OSError, ValueError, here and everywhere.
    """

    def __init__(self, target: str) -> None:
        self._target = Path(target)
        self._directory = os.open(self._target.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._temporary: Path | None = None
        try:
            self.fd = self._open()
        except BaseException:
            os.close(self._directory)
            raise

    def _prefix(self) -> str:
        return f".{self._target.name[:200]}."

    def _open(self) -> int:
        if self._target.is_dir() or "\0" in self._target.name:
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        try:
            fd = os.open(self._target.parent, _WITHOUT_A_NAME, 0o600)
        except OSError as error:
            if error.errno not in _NOT_HERE:
                raise
            import tempfile  # 5 ms that hardly any save needs

            fd, name = tempfile.mkstemp(prefix=self._prefix(), dir=self._target.parent)
            self._temporary = Path(name)
        os.fchmod(fd, 0o600)  # whatever the umask
        return fd

    def commit(self) -> None:
        """Put what was written on disk, then in its place, and the name on disk too."""
        os.fsync(self.fd)
        if self._temporary or not self._link(self._target):
            self._replace()
        os.fsync(self._directory)
        self.close()

    def _link(self, path: Path) -> bool:
        """Give the file this name, False if it is taken."""
        try:
            # Only with a descriptor of a directory does os.link follow the symbolic link.
            os.link(f"/proc/self/fd/{self.fd}", path.name, dst_dir_fd=self._directory)
        except FileExistsError:
            return False
        return True

    def _replace(self) -> None:
        while not self._temporary:
            path = self._target.with_name(f"{self._prefix()}{os.urandom(4).hex()}")
            if self._link(path):
                self._temporary = path
        self._temporary.replace(self._target)
        self._temporary = None

    def close(self) -> None:
        """Give up unless committed; nothing is left then."""
        if self._temporary:
            self._temporary.unlink(missing_ok=True)
            self._temporary = None
        if self.fd >= 0:
            os.close(self.fd)
            os.close(self._directory)
            self.fd = -1
