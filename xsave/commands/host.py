"""info and host add, list, remove: the machines domains run on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from xsave import console
from xsave.commands.common import HOST, SIZE, Settings, json_option, pass_settings
from xsave.errors import UsageError

if TYPE_CHECKING:
    from xsave.host.host import Host
    from xsave.host.ssh import SshHost


@click.command()
@json_option
@pass_settings
def info(settings: Settings, as_json: bool) -> None:
    """Show the host: memory, frames, CPU features, dirty log, huge pages, versions."""
    facts = settings.open_host().info()
    if as_json:
        console.emit_json(facts)
    else:
        rows = [[key, plain(value)] for key, value in facts.items() if key != "name"]
        console.table("", ["host", facts["name"]], rows)


def plain(value: Any) -> str:
    """Return a fact as a table's cell."""
    if isinstance(value, list | tuple):
        return " ".join(str(item) for item in value)
    if isinstance(value, dict):
        return ", ".join(f"{name} {version}" for name, version in value.items())
    return "-" if value is None else str(value)


@click.group()
def host() -> None:
    """Add, list and remove hosts."""


@host.command()
@click.argument("name", type=HOST)
@click.option("--memory", type=SIZE, help="The machine's memory (8G; sparse until it is used).")
@click.option("--seed", type=click.IntRange(0), metavar="N", help="The order of its frames.")
@click.option("--ssh", metavar="USER@ADDRESS", help="A host on another machine.")
@click.option("--command", metavar="COMMAND", help="What xsave is called there (xsave).")
@click.option("--remote-host", metavar="NAME", help="The host's name there (localhost).")
@json_option
@pass_settings
def add(
    settings: Settings,
    name: str,
    memory: int | None,
    seed: int | None,
    ssh: str | None,
    command: str | None,
    remote_host: str | None,
    as_json: bool,
) -> None:
    """Make a host: an empty machine with its own frames. With --ssh, remember one that is on
    another machine."""
    from xsave.host import ssh as far
    from xsave.host.host import add_host

    if ssh is None:
        if command is not None or remote_host is not None:
            raise UsageError("--command and --remote-host belong to --ssh")
        made = describe(add_host(name, memory, seed))
        sentence = console.human_bytes(made["memory_bytes"])
    else:
        if memory is not None or seed is not None:
            raise UsageError("--memory and --seed are chosen where the host is, not with --ssh")
        names = command or far.DEFAULT_COMMAND, remote_host or far.DEFAULT_REMOTE_HOST
        made = describe(far.add_ssh_host(name, ssh, *names))
        sentence = f"{made['remote_host']} at {ssh}"
    settings.answer(as_json, made, f"{name}: {sentence}")


@host.command("list")
@json_option
def list_all(as_json: bool) -> None:
    """List the hosts. Other machines are not asked."""
    from xsave.host.host import list_hosts
    from xsave.host.ssh import list_ssh_hosts

    hosts = [describe(one) for one in list_hosts()]
    hosts += [describe(one) for one in list_ssh_hosts()]
    hosts.sort(key=lambda one: str(one["name"]))
    if as_json:
        console.emit_json(hosts)
        return
    rows = [
        [
            one["name"],
            "-" if one["ssh"] else console.human_bytes(one["memory_bytes"]),
            "-" if one["ssh"] else console.human_bytes(one["free_frames"] << 12),
            "-" if one["ssh"] else str(one["nr_domains"]),
            f"{one['remote_host']} at {one['ssh']}" if one["ssh"] else "local",
        ]
        for one in hosts
    ]
    console.table("", ["Name", "Memory", "Free", "Domains", "Where"], rows)


def describe(one: Host | SshHost) -> dict[str, Any]:
    """Return what the host commands say of a host: null for what is not known here."""
    from xsave.host.ssh import SshHost

    facts: dict[str, Any] = {"name": one.name}
    if isinstance(one, SshHost):
        facts |= dict.fromkeys(("memory_bytes", "nr_frames", "free_frames", "nr_domains"))
        return facts | {"ssh": one.ssh, "command": one.command, "remote_host": one.remote_host}
    return facts | {
        "memory_bytes": one.memory_bytes,
        "nr_frames": one.nr_frames,
        "free_frames": one.free_frames,
        "nr_domains": len(one.domains()),
        "ssh": None,
        "command": None,
        "remote_host": None,
    }


@host.command()
@click.argument("name", type=HOST)
@json_option
@pass_settings
def remove(settings: Settings, name: str, as_json: bool) -> None:
    """Remove a host that runs nothing. One of another machine is only forgotten."""
    from xsave.host.host import remove_host

    remove_host(name)
    settings.answer(as_json, {"name": name, "removed": True}, f"{name}: removed")
