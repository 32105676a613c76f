"""The built-in kernel's ELF: what is shipped is what the sources say, and what Xen expects."""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
from pathlib import Path

import pytest

KERNEL = Path(__file__).parents[2] / "xsave" / "guest" / "kernel"
ELF = KERNEL / "xsave-guest.elf"
TOOLS = ("gcc", "ld", "make", "objcopy")
VIRT_BASE = 0xFFFFFFFF80000000
PT_LOAD, PT_NOTE = 1, 4
SHT_SYMTAB = 2
PF_X, PF_W = 1, 2
ENTRY, HYPERCALL_PAGE, XEN_VERSION, FEATURES = 1, 2, 5, 10
VIRT_BASE_NOTE, PADDR_OFFSET, LOADER, PAE_MODE = 3, 4, 8, 9


def segments(elf):
    """Yield (type, flags, offset, vaddr, paddr, filesz, memsz) of every program header."""
    (table,) = struct.unpack_from("<Q", elf, 32)
    size, number = struct.unpack_from("<HH", elf, 54)
    for i in range(number):
        yield struct.unpack_from("<IIQQQQQ", elf, table + i * size)


def notes(elf):
    """Return {(owner, type): descriptor} of all ELF notes."""
    found = {}
    for kind, _, offset, _, _, size, _ in segments(elf):
        at, end = offset, offset + size
        while kind == PT_NOTE and at < end:
            name_size, size, note = struct.unpack_from("<3I", elf, at)
            name = elf[at + 12 : at + 12 + name_size].rstrip(b"\0").decode()
            at += 12 + (name_size + 3 & ~3)
            found[name, note] = elf[at : at + size]
            at += size + 3 & ~3
    return found


def symbols(elf):
    """Return {name: value} of the symbol table; {} where it was stripped."""
    (table,) = struct.unpack_from("<Q", elf, 40)
    size, number = struct.unpack_from("<HH", elf, 58)
    headers = [struct.unpack_from("<IIQQQQII", elf, table + i * size) for i in range(number)]
    found = {}
    for _, kind, _, _, at, length, link, _ in headers:
        for entry in range(at, at + length, 24) if kind == SHT_SYMTAB else ():
            name, _, _, value, _ = struct.unpack_from("<IBxHQQ", elf, entry)
            start = headers[link][4] + name
            found[elf[start : elf.index(b"\0", start)].decode()] = value
    return found


def data_at(elf, address, nr):
    """Return the bytes a virtual address has in the file."""
    for kind, _, offset, vaddr, _, filesz, _ in segments(elf):
        if kind == PT_LOAD and vaddr <= address < vaddr + filesz:
            return elf[offset + address - vaddr :][:nr]
    raise AssertionError(f"{address:#x} is not in the file")


def need_tools(*more):
    """Skip the test, with the reason, where the toolchain is missing."""
    missing = [tool for tool in (*TOOLS, *more) if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")


def toolchain():
    """Return the versions of gcc and ld, as the Makefile writes them into the ELF."""
    gcc = subprocess.run(["gcc", "-dumpfullversion"], capture_output=True, text=True, check=True)
    ld = subprocess.run(["ld", "--version"], capture_output=True, text=True, check=True)
    return f"gcc-{gcc.stdout.strip()} ld-{ld.stdout.splitlines()[0].split()[-1]}"


def need_same_toolchain():
    """Skip where gcc or ld is another than the one that made the shipped ELF."""
    need_tools()
    shipped = notes(ELF.read_bytes())["xsave", 1].rstrip(b"\0").decode()
    if toolchain() != shipped:
        pytest.skip(f"built with {shipped}, here is {toolchain()}")


def copy_sources(target):
    """Copy the sources, without what was built from them."""
    shutil.copytree(KERNEL, target, ignore=shutil.ignore_patterns("build", "*.elf"))
    return target


def build(sources):
    """Build in a copy of the sources, any warning being an error; return the ELF's bytes."""
    command = ["make", "-s", "-C", str(sources), "EXTRA_CFLAGS=-Werror"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return (sources / "xsave-guest.elf").read_bytes()


def test_sources_compile_without_a_warning(tmp_path):
    """Any gcc builds the sources cleanly, and the result carries the notes Xen asks for."""
    need_tools()
    assert notes(build(copy_sources(tmp_path / "kernel"))).keys() == notes(ELF.read_bytes()).keys()


def test_shipped_elf_is_built_from_these_sources(tmp_path):
    """Rebuilt in another directory with the same compiler, the ELF is the same to the byte."""
    need_same_toolchain()
    assert build(copy_sources(tmp_path / "kernel")) == ELF.read_bytes()


def test_a_changed_source_gives_another_elf(tmp_path):
    """The comparison above notices a change of one constant."""
    need_same_toolchain()
    sources = copy_sources(tmp_path / "kernel")
    changed = (sources / "pattern.c").read_text().replace("0x100000001b3UL", "0x100000001b5UL")
    (sources / "pattern.c").write_text(changed)
    assert build(sources) != ELF.read_bytes()


def test_notes_describe_a_pv_kernel():
    """The notes say: entry inside the text, linked at VIRT_BASE, no writable page tables."""
    elf = ELF.read_bytes()
    found = {note: value for (owner, note), value in notes(elf).items() if owner == "Xen"}
    (entry,) = struct.unpack("<Q", found[ENTRY])
    text = next(s for s in segments(elf) if s[0] == PT_LOAD and s[1] & PF_X)
    assert text[3] <= entry < text[3] + text[5]
    assert struct.unpack("<Q", found[VIRT_BASE_NOTE]) == (VIRT_BASE,)
    assert struct.unpack("<Q", found[PADDR_OFFSET]) == (0,)
    assert found[XEN_VERSION] == b"xen-3.0\0"
    assert found[LOADER] == b"generic\0"
    assert found[PAE_MODE] == b"yes\0"
    assert found[FEATURES] == b"!writable_page_tables|pae_pgdir_above_4gb\0"
    assert HYPERCALL_PAGE not in found


def test_segments_are_where_the_kernel_counts_on_them():
    """Physical is virtual - VIRT_BASE; pfn 0 stays free; all is within 2 MiB; never W and X."""
    loads = [s for s in segments(ELF.read_bytes()) if s[0] == PT_LOAD]
    assert len(loads) == 2
    for _, flags, offset, vaddr, paddr, filesz, memsz in loads:
        assert paddr == vaddr - VIRT_BASE
        assert vaddr % 4096 == offset % 4096 == 0
        assert paddr >= 4096
        assert filesz <= memsz
        assert paddr + memsz <= 2 << 20
        assert flags & (PF_W | PF_X) != PF_W | PF_X


def test_page_table_paths_have_a_section_of_their_own():
    """The symbol table is shipped; the page-table paths, and no others, lie between its marks."""
    table = symbols(ELF.read_bytes())
    inside = range(table["__pgtable_text_start"], table["__pgtable_text_end"])
    for name in ("set_entry", "queue_mmu_update", "flush_mmu_updates", "pte_lookup", "pte_alloc",
                 "mm_pin", "mm_unpin", "mm_init", "mm_exit", "load_cr3", "switch_mm"):  # fmt: skip
        assert table[name] in inside
    for name in ("schedule", "printk", "xen_event_callback", "alloc_page", "mm_pin_all"):
        assert table[name] not in inside


def test_tasks_can_be_found_from_outside():
    """xsave_task_layout holds what sched.h promises: sane offsets, sizes of powers of two."""
    elf = ELF.read_bytes()
    table = symbols(elf)
    layout = struct.unpack("<8Q", data_at(elf, table["xsave_task_layout"], 64))
    comm, sp, state, flags, node, thread_size, struct_size, curr = layout
    assert sp == 0
    assert curr == 8
    assert thread_size == 8192
    assert max(comm + 16, state + 4, flags + 4, node + 16) <= struct_size < 512
    assert VIRT_BASE < table["all_tasks"] < VIRT_BASE + (2 << 20)


def test_elf_is_small_and_names_no_place():
    """The shipped file is small and holds no path of the machine that built it."""
    elf = ELF.read_bytes()
    assert len(elf) < 96 << 10
    assert str(KERNEL).encode() not in elf
    assert not re.search(rb"/(home|root|tmp|usr|work|build)/", elf)


def test_kernel_uses_no_fpu_register():
    """No x87, MMX, SSE or AVX register is named anywhere: there is no FPU state to save."""
    need_tools("objdump")
    command = ["objdump", "-d", "--no-show-raw-insn", str(ELF)]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "syscall" in listing
    assert not re.search(r"%(xmm|ymm|zmm|mm|st)\d?\b", listing)
