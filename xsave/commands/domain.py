"""list, pause, unpause, shutdown, reboot, destroy: the life of a domain."""

from __future__ import annotations

from dataclasses import asdict, fields
from typing import TYPE_CHECKING

import click

from xsave import console
from xsave.commands.common import DOMAIN, Settings, json_option, pass_settings
from xsave.errors import StorageError, XsaveError

if TYPE_CHECKING:
    from xsave.guest.xen.domctl import DomainInfo

COLUMNS = ["Name", "ID", "Host", "State", "VCPUs", "Memory", "Frames"]


@click.command("list")
@click.option("-a", "--all", "everywhere", is_flag=True, help="The domains of every host.")
@json_option
@pass_settings
def list_domains(settings: Settings, everywhere: bool, as_json: bool) -> None:
    """List the domains of the host."""
    from xsave.host.host import list_hosts

    hosts = list_hosts() if everywhere else [settings.open_host()]
    domains = [domain for host in hosts for domain in host.domains()]
    failures = add_those_elsewhere(domains) if everywhere else []
    if as_json:
        console.emit_json([asdict(domain) for domain in domains])
    else:
        console.table("", COLUMNS, [row(domain) for domain in domains])
    if failures:
        settings.stdout_is_data = True  # the answer is there
        raise StorageError("; ".join(failures))


def add_those_elsewhere(domains: list[DomainInfo]) -> list[str]:
    """Add the domains of hosts on other machines, which have our names for them here; return
    what went wrong."""
    from xsave.guest.xen.domctl import DomainInfo
    from xsave.host.asking import ask
    from xsave.host.ssh import list_ssh_hosts

    failures = []
    known = {field.name for field in fields(DomainInfo)}
    for host in list_ssh_hosts():
        try:
            for found in ask(host, ["list"]):
                facts = {key: value for key, value in found.items() if key in known}
                domains.append(DomainInfo(**facts | {"host": host.name}))
        except (XsaveError, TypeError, AttributeError) as e:
            failures.append(str(e))
    return failures


def row(domain: DomainInfo) -> list[str]:
    """Return a domain's cells, in the order of COLUMNS."""
    frames = f"{domain.min_mfn:#x}-{domain.max_mfn:#x}"
    memory = console.human_bytes(domain.memory_bytes)
    state = [domain.name, str(domain.domid), domain.host, domain.state]
    offline = domain.online_vcpus < domain.vcpus
    vcpus = f"{domain.online_vcpus} of {domain.vcpus}" if offline else str(domain.vcpus)
    return [*state, vcpus, memory, frames]


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
