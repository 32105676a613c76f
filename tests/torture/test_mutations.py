"""What the torture is worth: things broken on purpose, each of which it finds.

Two lists. KERNEL: a change of the built-in kernel's source, built where there is a compiler, and
the cell whose quick run finds it (slow). TOOLSTACK: a change of the save, the restore or the
hypervisor, found by a single suspend. To find means: a frame number that is stale, a guest that
is lost, or a save or a restore that refuses the guest.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from tests.guest import rig
from tests.torture.conftest import SETTINGS
from xsave import gathering, p2m, placing, save, settling
from xsave.canonical import local_p2m
from xsave.errors import XsaveError
from xsave.guest.xen.cpuregs import R12, R13
from xsave.guest.xen.hypervisor import Hypervisor
from xsave.torture import campaign, forks
from xsave.torture.journal import Journal
from xsave.torture.point import FINE, attempt
from xsave.torture.settings import Cell
from xsave.torture.stale import live
from xsave.torture.table import summarise

SOURCES = Path(save.__file__).parent / "guest" / "kernel"
TOOLS = ("gcc", "ld", "make", "objcopy")
FROZEN, STOPPED = "full-on-on-1", "none-off-on-2"


@dataclass(frozen=True)
class KernelMutation:
    """One text of a source file replaced by another, and the clean cell that then is not."""

    name: str
    file: str
    old: str
    new: str
    cell: str = FROZEN


KERNEL = [
    KernelMutation(
        "the freezer waits for nobody", "freezer.c", "\treturn todo;\n", "\treturn 0;\n"
    ),
    KernelMutation(
        "no freeze point where threads sleep",
        "freezer.h",
        "\tfreezable_sleep_until(ktime_get() + ns);\n",
        "\tsleep_until(ktime_get() + ns);\n",
    ),
    KernelMutation("no pinning for the suspend", "suspend.c", "\tmm_pin_all();\n", ""),
    KernelMutation(
        "start_info: the console's mfn stays",
        "suspend.c",
        "\txen_start_info->console_mfn = console_pfn();\n",
        "",
    ),
    KernelMutation(
        "start_info: the store's mfn stays",
        "suspend.c",
        "\txen_start_info->store_mfn = store_pfn();\n",
        "",
    ),
    KernelMutation("shared_info stays mapped", "suspend.c", "\tunmap_shared_info();\n}", "}"),
    KernelMutation(
        "a register is not scrubbed",
        "entry.S",
        "\txorl\t%r10d, %r10d\n\txorl\t%r11d, %r11d\n\txorl\t%ecx, %ecx\n\tmovl\t$__HYP",
        "\tmovq\t%rdx, %r10\n\txorl\t%r11d, %r11d\n\txorl\t%ecx, %ecx\n\tmovl\t$__HYP",
    ),
    KernelMutation(
        "a batch is left behind",
        "mmu.c",
        "\tmemset(batch->req, 0, count * sizeof(batch->req[0]));\n",
        "",
    ),
    KernelMutation(
        "the calls of a multicall are left behind",
        "mm.c",
        "\tmemset(calls->call, 0, count * sizeof(calls->call[0]));\n",
        "",
    ),
    KernelMutation("a pin request is left behind", "mm.c", "\top->arg1 = 0;\n", ""),
    KernelMutation(
        "stop_machine stops nobody",
        "suspend.c",
        "\t\tstop_machine(xen_suspend_stopped, cancelled);\n",
        "\t\tsuspend_unstopped(cancelled);\n",
        STOPPED,
    ),
]


@pytest.fixture(scope="module")
def tools():
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")


def built(directory, mutation):
    """Return the path of a kernel with a mutation, or with none."""
    sources = directory / "kernel"
    shutil.copytree(SOURCES, sources)
    if mutation is not None:
        path = sources / mutation.file
        text = path.read_text()
        assert text.count(mutation.old) == 1, f"{mutation.name}: where is it now?"
        path.write_text(text.replace(mutation.old, mutation.new))
    command = ["make", "-s", "-C", sources, f"OUT={directory}", "EXTRA_CFLAGS=-Wno-error"]
    subprocess.run(command, check=True, capture_output=True)
    return directory / "xsave-guest.elf"


def found_in(cell, kernel):
    """Return what a quick run finds in a cell: ("", None) for nothing."""
    settings = replace(SETTINGS, kernel=str(kernel), quick=True, max_points=8, jobs=2)
    journal = Journal(settings, None)
    try:
        campaign.run([cell], settings, journal)
    except XsaveError as e:
        return str(e)
    (summary,) = summarise([cell], journal)
    assert summary["points"] == settings.max_points
    bad = {fate: nr for fate, nr in summary["fates"].items() if fate != FINE}
    return f"{summary['stale']} stale, {bad}" if summary["stale"] or bad else ""


@pytest.mark.slow
@pytest.mark.parametrize("name", [FROZEN, STOPPED])
def test_the_sound_kernel(tools, tmp_path, name):
    """Built in the same way without a mutation, the cells below are clean."""
    assert found_in(Cell.parse(name), built(tmp_path, None)) == ""


@pytest.mark.slow
@pytest.mark.parametrize("mutation", KERNEL, ids=lambda m: m.name)
def test_kernel_mutation(tools, tmp_path, mutation):
    """Each of them is found."""
    assert found_in(Cell.parse(mutation.cell), built(tmp_path, mutation)) != ""


# ---- the toolstack


def level_left_alone(level):
    """canonicalise forgets the tables of one level."""

    def canonicalise(tables, levels, m2p, p2m):
        result = save_canonicalise(tables, levels, m2p, p2m)
        result.tables[levels == level] = tables[levels == level]
        return result

    save_canonicalise = save.canonicalise
    return save, "canonicalise", canonicalise


def context_left_alone(change):
    """A vCPU's context goes into the image with one number as Xen has it."""

    def write_tail(self, seen, vcpus, contexts):
        for context, vcpu in zip(contexts, vcpus, strict=True):
            change(context, save.VcpuGuestContext.from_buffer_copy(vcpu.context))
        honest(self, seen, vcpus, contexts)

    honest = save.Writer._write_tail
    return save.Writer, "_write_tail", write_tail


def cr3(context, old):
    context.ctrlreg[3] = old.ctrlreg[3]


def gdt(context, old):
    context.gdt_frames[0] = old.gdt_frames[0]


def rdx(context, old):
    context.user_regs.rdx = old.user_regs.rdx


def p2m_left_alone():
    """The p2m's pages go into the image with mfns, as Xen's own tools leave them."""
    return save, "canonical_p2m", local_p2m


def p2m_tree_left_alone():
    """The pages of the frame lists are written as they are."""

    def find(*arguments):
        return replace(honest(*arguments), list_frames=np.empty(0, np.intp))

    honest = p2m.find
    return p2m, "find", find


def shared_info_left_alone():
    """The list tree's frame stays in shared_info."""
    return save, "normalise_shared_info", lambda shared: None


def start_info_left_alone():
    """shared_info's machine address stays in start_info."""

    def start_info(self, pfn, state):
        page = honest(self, pfn, state).copy()
        raw = self._machine.mem[self._p2m[pfn]]
        at = save.StartInfo.shared_info.offset // 8
        page[at] = raw[at]
        return page

    honest = save.Writer._start_info
    return save.Writer, "_start_info", start_info


def no_m2p():
    """restore gives frames to pfns and does not tell Xen's table."""

    def populate(self, pfns):
        honest(self, pfns)
        self._machine.m2p[self.p2m[pfns]] = 0

    honest = placing.Memory.populate
    return placing.Memory, "populate", populate


def no_pins():
    """restore leaves out the pins."""
    return settling.Settler, "_pinning", lambda self: contextlib.nullcontext()


def lost_page():
    """A page that is not zero is taken for one."""

    def find_zero(self, pfns, sources):
        honest(self, pfns, sources)
        frames = np.flatnonzero(sources == gathering._FRAME)
        sources[frames[3:60]] = gathering._ZERO

    honest = gathering.Gatherer._find_zero
    return gathering.Gatherer, "_find_zero", find_zero


TOOLSTACK: dict[str, Callable[[], tuple[object, str, object]]] = {
    **{f"L{n} tables are not canonicalised": lambda n=n: level_left_alone(n) for n in (1, 2, 3, 4)},
    "cr3 is not canonicalised": lambda: context_left_alone(cr3),
    "a GDT frame is not canonicalised": lambda: context_left_alone(gdt),
    "rdx is not canonicalised": lambda: context_left_alone(rdx),
    "the p2m is not canonicalised": p2m_left_alone,
    "the p2m's list tree is not canonicalised": p2m_tree_left_alone,
    "shared_info is not canonicalised": shared_info_left_alone,
    "start_info is not canonicalised": start_info_left_alone,
    "the m2p is not filled": no_m2p,
    "nothing is pinned": no_pins,
    "pages get lost": lost_page,
}


@pytest.mark.parametrize("name", TOOLSTACK)
def test_toolstack_mutation(lab, monkeypatch, name):
    """Each of them is found, by one suspend that is clean without it."""
    outcome = forks.in_child(lambda: attempt(lab, {}))
    assert (outcome.fate, outcome.stale) == (FINE, ())
    monkeypatch.setattr(*TOOLSTACK[name]())
    outcome = forks.in_child(lambda: attempt(lab, {}))
    assert live(list(outcome.stale)) or outcome.fate != FINE


@pytest.mark.parametrize("flushes", [True, False])
def test_tlb_mutation(machines, monkeypatch, flushes):
    """A page is mapped elsewhere by hypercall: its reader sees the new one, unless the hypervisor
    forgets to flush. (The torture cannot tell: its guest switches address spaces, which flushes,
    before it looks again.)"""
    if not flushes:
        monkeypatch.setattr(Hypervisor, "_flush", lambda self: None)
    guest = rig.Guest(machines.make())
    guest.poke(3, 0, b"old page")
    guest.poke(4, 0, b"new page")
    entry = guest.frames[4] << 12 | rig.FULL
    # mov r12, [rbx]; syscall; mov r13, [rbx]
    code = b"\x4c\x8b\x23\x0f\x05\x4c\x8b\x2b"
    guest.run(code, rax=14, rbx=guest.va(3), rdi=guest.va(3), rsi=entry, rdx=0)
    seen = [guest.hv.q[register].to_bytes(8, "little") for register in (R12, R13)]
    assert seen == [b"old page", b"new page" if flushes else b"old page"]


@pytest.fixture
def machines():
    made = rig.Machines()
    yield made
    made.close()
