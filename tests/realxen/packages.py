"""The parts of a real Xen, from Debian's packages: downloaded, unpacked, never installed.

The hypervisor and its tools come from the Debian release that has the wanted version; dom0's
kernel, its libraries and busybox from the release of this machine or, for other versions of Xen,
the libraries from that release too. Nothing here needs root.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

#: Xen's version -> the Debian release that has it.
SUITES = {"4.14": "bullseye", "4.17": "bookworm", "4.20": "trixie"}
KERNEL = "linux-image-amd64"
TIMEOUT_S = 600
_TOOLS = ("apt-get", "apt-cache", "dpkg-deb", "cpio", "qemu-system-x86_64")


class Unavailable(Exception):
    """What is needed cannot be had here; says what."""


def require_tools():
    """Raise Unavailable unless all programs are there."""
    if missing := [tool for tool in _TOOLS if not shutil.which(tool)]:
        raise Unavailable(f"not installed: {', '.join(missing)}")


def run(*command, **options):
    """Run a command and return its output. Raises Unavailable with its complaint."""
    try:
        result = subprocess.run(
            list(map(str, command)), capture_output=True, text=True, timeout=TIMEOUT_S, **options
        )
    except subprocess.TimeoutExpired as error:
        raise Unavailable(f"{command[0]} took more than {TIMEOUT_S} s") from error
    if result.returncode:
        complaint = (result.stderr or result.stdout).strip()
        raise Unavailable(f"{' '.join(map(str, command))}: {complaint}")
    return result.stdout


def xen_packages(version):
    """Return the packages of dom0's user space for this version of Xen."""
    store = "libxenstore3.0" if version == "4.14" else "libxenstore4"
    xen = f"""xen-hypervisor-{version}-amd64 xen-utils-{version} xen-utils-common xenstore-utils
        libxenmisc{version} {store} libxencall1 libxenevtchn1 libxenforeignmemory1 libxengnttab1
        libxentoollog1 libxendevicemodel1 libxenhypfs1 libxentoolcore1"""
    libraries = """libc6 libgcc-s1 libyajl2 libuuid1 libnl-route-3-200 libnl-3-200 libncurses6
        libtinfo6 zlib1g liblzma5 libbz2-1.0 libzstd1 liblzo2-2 libgcrypt20 libgpg-error0 libfdt1
        busybox-static"""
    return f"{xen} {libraries}".split()


class Packages:
    """Downloads of one Xen version, kept in `directory` from one run to the next."""

    def __init__(self, directory: Path, version: str) -> None:
        self.version = version
        self._debs = directory / "debs"
        self._debs.mkdir(parents=True, exist_ok=True)
        self._apt = directory / "apt"

    def unpack(self, names, target):
        """Download what is missing and unpack all of it below target."""
        for name in names:
            run("dpkg-deb", "-x", self._deb(name), target)

    def kernel(self, target):
        """Unpack the newest kernel of this machine's Debian below target."""
        depends = run("apt-cache", "depends", KERNEL)
        found = re.search(r"Depends: (linux-image-\d\S+)", depends)
        if not found:
            raise Unavailable(f"{KERNEL} names no kernel")
        self.unpack([found[1]], target)

    def _deb(self, name):
        """Return the path of a package's file, downloaded if need be."""
        if not (found := self._find(name)):
            own = [] if name.startswith("linux-") else self._options()
            partial = self._debs / "partial"
            partial.mkdir(exist_ok=True)
            run("apt-get", *own, "-qq", "download", name, cwd=partial)
            for deb in partial.glob("*.deb"):
                deb.rename(self._debs / deb.name)
            found = self._find(name)
        return max(found)

    def _find(self, name):
        return list(self._debs.glob(f"{name}_*.deb"))

    def _options(self):
        """Options for apt-get to see the release that has this Xen, if it is not this machine's."""
        suite = SUITES[self.version]
        if f"VERSION_CODENAME={suite}" in Path("/etc/os-release").read_text():
            return []
        options = {
            "Dir::Etc::sourcelist": self._apt / "sources.list",
            "Dir::Etc::sourceparts": "-",
            "Dir::State::lists": self._apt / "lists",
            "Dir::Cache": self._apt / "cache",
            "Dir::State::status": "/dev/null",
        }
        arguments = [word for pair in options.items() for word in ("-o", "{}={}".format(*pair))]
        if not (self._apt / "sources.list").exists():
            for part in ("lists/partial", "cache/archives/partial"):
                (self._apt / part).mkdir(parents=True, exist_ok=True)
            line = f"deb [signed-by={_keyring()}] {_mirror()} {suite} main\n"
            (self._apt / "sources.list.new").write_text(line)
            (self._apt / "sources.list.new").rename(self._apt / "sources.list")
            run("apt-get", *arguments, "-qq", "update")
        return arguments


def _keyring():
    return "/usr/share/keyrings/debian-archive-keyring.gpg"


def _mirror():
    """Return the Debian mirror this machine is configured for."""
    sources = [Path("/etc/apt/sources.list"), *Path("/etc/apt/sources.list.d").glob("*")]
    for source in sources:
        if source.is_file() and (
            found := re.search(r"^(?!#).*?(https?://\S+/debian)/?\s*", source.read_text(), re.M)
        ):
            return found[1]
    return "http://deb.debian.org/debian"
