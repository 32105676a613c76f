"""create: a domain from options, from an xl configuration file, or from both."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from xsave.commands.common import SIZE, Settings, json_option, pass_settings
from xsave.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

DEFAULT_MEMORY = 64 << 20
ACTION = click.Choice(["destroy", "restart", "preserve"])
_EVENTS = ("poweroff", "reboot", "crash")


@click.command()
@click.argument("name", metavar="NAME|FILE.cfg")
@click.argument("arguments", metavar="[KEY=VALUE]...", nargs=-1)
@click.option(
    "--kernel", metavar="FILE", help="A PV kernel: vmlinuz or ELF. Default: the built-in guest."
)
@click.option("--ramdisk", metavar="FILE", help="The kernel's initial ramdisk.")
@click.option("--cmdline", metavar="TEXT", help="The kernel's command line.")
@click.option("--memory", type=SIZE, help="Its memory; 64M unless told otherwise.")
@click.option("--maxmem", type=SIZE, help="What mem-set may give it; its memory, by default.")
@click.option("--vcpus", type=click.IntRange(1), metavar="N", help="Its vCPUs; 1 by default.")
@click.option(
    "--disk", "disks", multiple=True, metavar="SPEC", help="A disk: FILE,raw|qcow2,xvda,w|r."
)
@click.option("--on-poweroff", type=ACTION, help="When it powers off: destroy, by default.")
@click.option("--on-reboot", type=ACTION, help="When it reboots: restart, by default.")
@click.option("--on-crash", type=ACTION, help="When it crashes: preserve, by default.")
@click.option("-p", "--paused", is_flag=True, help="Build it and leave it paused.")
@click.option("--deterministic", type=click.IntRange(0), metavar="SEED", help="Virtual time.")
@json_option
@pass_settings
def create(
    settings: Settings,
    /,
    name: str,
    arguments: tuple[str, ...],
    memory: int | None,
    maxmem: int | None,
    paused: bool,
    deterministic: int | None,
    disks: tuple[str, ...],
    as_json: bool,
    **given: Any,
) -> None:
    """Build a domain and start it.

    Without --kernel the built-in guest runs: it prints a TICK each second, and touch=SIZE on
    its command line makes it fill that much memory.

    FILE.cfg (or any path with a / in it) is a configuration file in the syntax of xl; KEY=VALUE
    overrides what it says, and options override both.
    """
    file = name
    name, options = read_config(settings, file, arguments)
    actions = {event: given.pop(f"on_{event}") for event in _EVENTS}
    given |= {"memory_bytes": memory, "max_memory_bytes": maxmem}
    options["disks"] = [*options.get("disks", ()), *disks]
    options |= {key: value for key, value in given.items() if value is not None}
    chosen = {event: action for event, action in actions.items() if action}
    if file != name and "kernel" not in options:
        raise UsageError(f"{file}: it has no kernel")
    with settings.prestart(options.get("kernel")) as process:
        from xsave.host import create as verb

        options["actions"] = options.get("actions", verb.DEFAULT_ACTIONS) | chosen
        options.setdefault("memory_bytes", DEFAULT_MEMORY)
        host = settings.open_host()
        with settings.progress() as report:
            info = verb.create(
                host,
                name,
                **options,
                paused=paused,
                deterministic=deterministic,
                process=process,
                report=report,
            )
    settings.answer(as_json, asdict(info), f"{info.name}: domain {info.domid}, {info.state}")


def read_config(
    settings: Settings, name: str, arguments: Sequence[str]
) -> tuple[str, dict[str, Any]]:
    """Return the domain's name and what a configuration file, if that is one, says of it."""
    if not (name.endswith(".cfg") or "/" in name):
        if arguments:
            raise UsageError(f"unexpected {arguments[0]!r}: {name} is no configuration file")
        return name, {}
    from xsave.host.xldomain import read_file

    for argument in arguments:
        if "=" not in argument:
            raise UsageError(f"unexpected {argument!r}: expected KEY=VALUE")
    config = read_file(name, arguments)
    for warning in config.warnings:
        settings.say(f"warning: {warning}")
    if config.name is None:
        raise UsageError(f"{name}: it has no name (name=NAME can be given behind the file)")
    return config.name, dict(config.options)
