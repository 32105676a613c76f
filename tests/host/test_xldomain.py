"""What an xl configuration file makes of a domain: honoured, refused or warned about."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xsave.errors import StorageError, UsageError
from xsave.host.xlcfg import parse
from xsave.host.xldomain import Reader, read_file

UUID = "0a1b2c3d-0000-4000-8000-123456789abc"


def read(text):
    return Reader(parse(text, "web.cfg")).read()


def options(text):
    """Return the options of a file that gives no warning."""
    found = read(text)
    assert found.warnings == []
    return dict(found.options)


def warning(text):
    """Return the one warning."""
    (found,) = read(text).warnings
    assert "\n" not in found
    return found


def test_a_whole_file():
    """Everything that is honoured, as xl.cfg(5) has it."""
    text = f"""
        name = "web"
        type = "pv"
        uuid = "{UUID}"
        kernel = "/boot/vmlinuz"
        ramdisk = "/boot/initrd.img"
        root = "/dev/xvda1 ro"
        extra = "console=hvc0"
        memory = 256
        maxmem = "512"
        vcpus = 2
        maxvcpus = 2
        on_poweroff = "preserve"
        on_reboot = "destroy"
        on_crash = "restart"
        on_watchdog = "destroy"
        disk = ['/x.img,raw,xvda,w', "/y.img,qcow2,xvdb,r"]
    """
    found = read(text)
    assert found.name == "web"
    assert found.warnings == []
    assert found.options == {
        "kernel": "/boot/vmlinuz",
        "ramdisk": "/boot/initrd.img",
        "disks": ["/x.img,raw,xvda,w", "/y.img,qcow2,xvdb,r"],
        "cmdline": "root=/dev/xvda1 ro console=hvc0",
        "memory_bytes": 256 << 20,
        "max_memory_bytes": 512 << 20,
        "vcpus": 2,
        "uuid": UUID,
        "actions": {
            "poweroff": "preserve",
            "reboot": "destroy",
            "crash": "restart",
            "watchdog": "destroy",
        },
    }


def test_what_is_not_said():
    """Nothing is made up, and libxl's actions stand."""
    assert options("") == {"actions": {}}
    assert read("").name is None
    assert options("builder='generic'; kernel=''") == {"actions": {}}


def test_the_command_line():
    """cmdline as it is, or root and extra in this order; never both."""
    assert options("extra='quiet'")["cmdline"] == "quiet"
    assert options("root='/dev/xvda'")["cmdline"] == "root=/dev/xvda"
    assert options("cmdline='a'")["cmdline"] == "a"
    both = read("cmdline='a'; extra='b'")
    assert both.options["cmdline"] == "a"
    assert both.warnings == ["web.cfg:1:1: cmdline: root and extra are ignored beside it"]


def test_numbers():
    """Decimal, hexadecimal and octal, in a string or not, as strtol has them."""
    assert options("memory=0x40; vcpus='010'")["memory_bytes"] == 64 << 20
    assert options("vcpus='010'")["vcpus"] == 8
    assert options("maxvcpus=3")["vcpus"] == 3


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("type='hvm'", "1:1: type: 'hvm' guests cannot be run"),
        ("\n  type='pvh'", "2:3: type: 'pvh' guests"),
        ("builder='hvm'", "1:1: builder: 'hvm' guests"),
        ("disk=['/x,raw']", "1:1: disk '/x,raw': it names no virtual device (xvda, say)"),
        ("disk='/x,raw,xvda,rw'", "1:1: disk: expected a list"),
        ("disk=[['/x,raw,xvda,rw']]", "1:1: disk: expected a list of strings"),
        ("disk=['/x,,xvda','/y,,xvda']", "1:1: two disks are xvda"),
        ("pci=['01:00.0']", "1:1: pci: "),
        ("bootloader='pygrub'", "1:1: bootloader: boot loaders are not run"),
        ("memory='256M'", "1:1: memory: expected a number from 1 to"),
        ("memory=0", "1:1: memory: expected a number"),
        ("memory=099", "1:1: memory: expected a number"),
        ("memory=" + "9" * 30, "1:1: memory: expected a number"),
        ("memory=[1]", "1:1: memory: expected a single value, found a list"),
        ("vcpus=-1", "1:1: vcpus: expected a number"),
        ("vcpus=4; maxvcpus=2", "1:10: maxvcpus: 2 is less than vcpus, 4"),
        ("uuid='x'", "1:1: uuid: 'x' is none"),
        ("on_crash='dance'", "1:1: on_crash: expected destroy, restart"),
        ("on_soft_reset='soft-reset'", "1:1: on_soft_reset: expected destroy"),
        ("name=['a']", "1:1: name: expected a single value"),
    ],
)
def test_what_is_refused(text, says):
    """What a guest would miss, or what makes no sense, is refused with its place."""
    with pytest.raises(UsageError) as caught:
        read(text)
    assert str(caught.value).startswith("web.cfg:" + says)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("\nvif=['bridge=x']", "web.cfg:2:1: vif: domains have no network yet"),
        ("vfb=['vnc=1']", "web.cfg:1:1: vfb: domains have no framebuffer"),
        ("cpu_weight=5", "web.cfg:1:1: cpu_weight: it has no effect here"),
        ("vpcus=5", "web.cfg:1:1: vpcus: unknown, ignored"),
        ("vcpus=1; maxvcpus=4", "web.cfg:1:10: maxvcpus: vCPUs cannot be added"),
        ("on_crash='coredump-restart'", "web.cfg:1:1: on_crash: coredump-restart is taken as rest"),
        (
            "on_reboot='rename-restart'",
            "web.cfg:1:1: on_reboot: rename-restart is taken as restart",
        ),
    ],
)
def test_what_is_warned_about(text, says):
    """What a guest can do without is one line."""
    assert warning(text).startswith(says)


def test_empty_devices_need_no_word():
    """An empty list asks for nothing."""
    assert options("vif=[]; vfb=[]; pci=[]") == {"actions": {}}


def test_files(tmp_path):
    """Arguments override the file; what cannot be read is said so."""
    path = tmp_path / "web.cfg"
    path.write_text("name='web'\nmemory=64\n")
    found = read_file(str(path), ["memory=128", "name=two", "extra=quiet loglevel=3"])
    assert (found.name, found.options["memory_bytes"]) == ("two", 128 << 20)
    assert found.options["cmdline"] == "quiet loglevel=3"
    with pytest.raises(UsageError, match="argument memory:1:1: memory: expected"):
        read_file(str(path), ["memory=lots"])
    with pytest.raises(StorageError, match="No such file"):
        read_file(str(tmp_path / "none.cfg"))
    path.write_bytes(b"a=1\nb='\xff'\n")
    with pytest.raises(UsageError, match=f"^{path}:2:4: the file is no UTF-8 text"):
        read_file(str(path))
    path.write_bytes(b"#" * ((1 << 20) + 1))
    with pytest.raises(UsageError, match="more than 1 MiB"):
        read_file(str(path))


keys = st.sampled_from(
    ["name", "type", "memory", "maxmem", "vcpus", "uuid", "kernel", "disk", "vif", "on_crash", "x"]
)
texts = st.sampled_from(["''", "'pv'", "5", "0x7", "-1", "[]", "['a']", "'destroy'", f"'{UUID}'"])


@given(st.lists(st.tuples(keys, texts), max_size=6))
def test_any_settings(settings):
    """Any settings are options of the right kind, or one error with its place."""
    try:
        found = read("\n".join(f"{key}={value}" for key, value in settings))
    except UsageError as error:
        assert str(error).startswith("web.cfg:")
        return
    for key in ("memory_bytes", "max_memory_bytes", "vcpus"):
        assert found.options.get(key, 1) > 0
