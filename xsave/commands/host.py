"""info and host add, list, remove: the machines domains run on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from xsave import console
from xsave.commands.common import HOST, SIZE, Settings, json_option, pass_settings

if TYPE_CHECKING:
    from xsave.host.host import Host


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
@json_option
@pass_settings
def add(
    settings: Settings,
    name: str,
    memory: int | None,
    seed: int | None,
    ssh: str | None,
    as_json: bool,
) -> None:
    """Make a host: an empty machine with its own frames."""
    from xsave.host.host import add_host

    made = describe(add_host(name, memory, seed, ssh))
    settings.answer(as_json, made, f"{name}: {console.human_bytes(made['memory_bytes'])}")


@host.command("list")
@json_option
def list_all(as_json: bool) -> None:
    """List the hosts."""
    from xsave.host.host import list_hosts

    hosts = [describe(one) for one in list_hosts()]
    if as_json:
        console.emit_json(hosts)
        return
    rows = [
        [
            one["name"],
            console.human_bytes(one["memory_bytes"]),
            console.human_bytes(one["free_frames"] << 12),
            str(one["nr_domains"]),
            one["ssh"] or "local",
        ]
        for one in hosts
    ]
    console.table("", ["Name", "Memory", "Free", "Domains", "Where"], rows)


def describe(one: Host) -> dict[str, Any]:
    """Return what the host commands say of a host."""
    return {
        "name": one.name,
        "memory_bytes": one.memory_bytes,
        "nr_frames": one.nr_frames,
        "free_frames": one.free_frames,
        "nr_domains": len(one.domains()),
        "ssh": one.ssh,
    }


@host.command()
@click.argument("name", type=HOST)
@json_option
@pass_settings
def remove(settings: Settings, name: str, as_json: bool) -> None:
    """Remove a host that runs nothing."""
    from xsave.host.host import remove_host

    remove_host(name)
    settings.answer(as_json, {"name": name, "removed": True}, f"{name}: removed")
