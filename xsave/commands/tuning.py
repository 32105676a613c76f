"""mem-set, vcpu-set: what a running guest is asked to have more or less of."""

from __future__ import annotations

import click

from xsave.commands.common import DOMAIN, SIZE, Settings, json_option, pass_settings
from xsave.frames import PAGE_SIZE


@click.command("mem-set")
@click.argument("name", type=DOMAIN)
@click.argument("size", type=SIZE)
@json_option
@pass_settings
def mem_set(settings: Settings, name: str, size: int, as_json: bool) -> None:
    """Ask the guest to have so much memory.

    Its balloon driver gives memory back or takes more, when it likes; list shows what it has.
    """
    with settings.find(name) as domctl:
        domctl.set_target(size // PAGE_SIZE)
    asked = size // PAGE_SIZE * PAGE_SIZE
    result = {"name": name, "target_bytes": asked}
    settings.answer(as_json, result, f"{name}: asked to have {asked >> 10} KiB of memory")


@click.command("vcpu-set")
@click.argument("name", type=DOMAIN)
@click.argument("number", metavar="N", type=click.IntRange(1))
@json_option
@pass_settings
def vcpu_set(settings: Settings, name: str, number: int, as_json: bool) -> None:
    """Ask the guest to use the first N of its vCPUs.

    It takes vCPUs offline and online when it likes; list shows how many are.
    """
    with settings.find(name) as domctl:
        domctl.set_available_vcpus(number)
    result = {"name": name, "available_vcpus": number}
    settings.answer(as_json, result, f"{name}: asked to use {number} of its vCPUs")
