"""create, list, pause, unpause, shutdown, destroy: the life of a domain."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from xsave import console
from xsave.commands.common import DOMAIN, SIZE, Settings, json_option, pass_settings
from xsave.errors import UsageError

if TYPE_CHECKING:
    from xsave.guest.xen.domctl import DomainInfo

DEFAULT_MEMORY = "64M"
ACTION = click.Choice(["destroy", "restart", "preserve"])
COLUMNS = ["Name", "ID", "Host", "State", "VCPUs", "Memory", "Frames"]


@click.command()
@click.argument("name", metavar="NAME")
@click.option(
    "--kernel", metavar="FILE", help="A PV kernel: vmlinuz or ELF. Default: the built-in guest."
)
@click.option("--ramdisk", metavar="FILE", help="The kernel's initial ramdisk.")
@click.option("--cmdline", default="", metavar="TEXT", help="The kernel's command line.")
@click.option("--memory", type=SIZE, default=DEFAULT_MEMORY, show_default=True, help="Its memory.")
@click.option(
    "--vcpus", type=click.IntRange(1), default=1, metavar="N", help="Its vCPUs.", show_default=True
)
@click.option("--on-poweroff", type=ACTION, default="destroy", help="When it powers off.")
@click.option("--on-reboot", type=ACTION, default="restart", help="When it reboots.")
@click.option("--on-crash", type=ACTION, default="preserve", help="When it crashes.")
@click.option("-p", "--paused", is_flag=True, help="Build it and leave it paused.")
@click.option("--deterministic", type=click.IntRange(0), metavar="SEED", help="Virtual time.")
@json_option
@pass_settings
def create(
    settings: Settings,
    name: str,
    kernel: str | None,
    ramdisk: str | None,
    cmdline: str,
    memory: int,
    vcpus: int,
    on_poweroff: str,
    on_reboot: str,
    on_crash: str,
    paused: bool,
    deterministic: int | None,
    as_json: bool,
) -> None:
    """Build a domain and start it.

    Without --kernel the built-in guest runs: it prints a TICK each second, and touch=SIZE on
    its command line makes it fill that much memory.
    """
    refuse_config_file(name)
    with settings.prestart() as process:
        from xsave.host import create as verb

        host = settings.open_host()
        with settings.progress() as report:
            info = verb.create(
                host,
                name,
                kernel=kernel,
                ramdisk=ramdisk,
                cmdline=cmdline,
                memory_bytes=memory,
                vcpus=vcpus,
                paused=paused,
                deterministic=deterministic,
                actions={"poweroff": on_poweroff, "reboot": on_reboot, "crash": on_crash},
                process=process,
                report=report,
            )
    settings.answer(as_json, asdict(info), f"{info.name}: domain {info.domid}, {info.state}")


def refuse_config_file(name: str) -> None:
    """An argument that ends in .cfg or holds a / is a file, in xl's grammar."""
    if name.endswith(".cfg") or "/" in name:
        raise UsageError(
            f"{name}: xl configuration files are not read yet; "
            "give a name and --kernel, --ramdisk, --cmdline, --memory"
        )


@click.command("list")
@click.option("-a", "--all", "everywhere", is_flag=True, help="The domains of every host.")
@json_option
@pass_settings
def list_domains(settings: Settings, everywhere: bool, as_json: bool) -> None:
    """List the domains of the host."""
    from xsave.host.host import list_hosts

    hosts = list_hosts() if everywhere else [settings.open_host()]
    domains = [domain for host in hosts for domain in host.domains()]
    if as_json:
        console.emit_json([asdict(domain) for domain in domains])
    else:
        console.table("", COLUMNS, [row(domain) for domain in domains])


def row(domain: DomainInfo) -> list[str]:
    """Return a domain's cells, in the order of COLUMNS."""
    frames = f"{domain.min_mfn:#x}-{domain.max_mfn:#x}"
    memory = console.human_bytes(domain.memory_bytes)
    state = [domain.name, str(domain.domid), domain.host, domain.state]
    return [*state, str(domain.vcpus), memory, frames]


@click.command()
@click.argument("name", type=DOMAIN)
@json_option
@pass_settings
def pause(settings: Settings, name: str, as_json: bool) -> None:
    """Stop a domain's vCPUs where they are."""
    with settings.find(name) as domctl:
        domctl.pause()
        settings.answer(as_json, asdict(domctl.info()), f"{name}: paused")


@click.command()
@click.argument("name", type=DOMAIN)
@json_option
@pass_settings
def unpause(settings: Settings, name: str, as_json: bool) -> None:
    """Let a paused domain run on."""
    with settings.find(name) as domctl:
        before = domctl.info()
        domctl.unpause()  # from here on the guest may end at any moment
    settings.answer(as_json, asdict(before) | {"state": "running"}, f"{name}: running")


@click.command()
@click.argument("name", type=DOMAIN)
@json_option
@pass_settings
def shutdown(settings: Settings, name: str, as_json: bool) -> None:
    """Ask the guest to power off. It does so when it likes; destroy does not ask."""
    with settings.find(name) as domctl:
        domctl.shutdown("poweroff")
    result = {"name": name, "requested": "poweroff"}
    settings.answer(as_json, result, f"{name}: asked to power off")


@click.command()
@click.argument("name", type=DOMAIN)
@json_option
@pass_settings
def reboot(settings: Settings, name: str, as_json: bool) -> None:
    """Ask the guest to reboot. Its domain then begins again from the kernel."""
    with settings.find(name) as domctl:
        domctl.shutdown("reboot")
    settings.answer(as_json, {"name": name, "requested": "reboot"}, f"{name}: asked to reboot")


@click.command()
@click.argument("name", type=DOMAIN)
@json_option
@pass_settings
def destroy(settings: Settings, name: str, as_json: bool) -> None:
    """End a domain at once and free its frames."""
    with settings.find(name) as domctl:
        domctl.destroy()
    settings.answer(as_json, {"name": name, "destroyed": True}, f"{name}: destroyed")
