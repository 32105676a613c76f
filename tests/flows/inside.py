"""What the built-in kernel's own variables say, read in its memory by the names in its ELF."""

from __future__ import annotations

import struct

import numpy as np

from tests.guest.test_kernel_build import ELF, VIRT_BASE, data_at, symbols

_ELF = ELF.read_bytes()
SYMBOLS = symbols(_ELF)


def memory(host, address, nr, name="g"):
    """Return bytes of a domain's kernel image (of one page) at a virtual address."""
    (domid,) = [domain.domid for domain in host.domains() if domain.name == name]
    machine = host.machine
    pfn, offset = divmod(address - VIRT_BASE, 4096)
    (mfn,) = np.flatnonzero((machine.owner == domid) & (machine.m2p == np.uint64(pfn)))
    return machine.pages[mfn, offset : offset + nr].tobytes()


def switches(host, nr_cpus):
    """Return how many context switches each CPU has made."""
    size, _, _, _, offset = struct.unpack("<5Q", data_at(_ELF, SYMBOLS["xsave_cpu_layout"], 40))
    first = SYMBOLS["cpu_data"]
    return [
        struct.unpack("<Q", memory(host, first + i * size + offset, 8))[0] for i in range(nr_cpus)
    ]


def upcall_masks(host, nr_cpus):
    """Return evtchn_upcall_mask of each CPU's vcpu_info, where it is in the kernel's memory."""
    first = SYMBOLS["vcpu_infos"]
    return [memory(host, first + 64 * i, 2)[1] for i in range(nr_cpus)]


def function_at(address):
    """Return the name of the function an address is in."""
    below = {value: name for name, value in SYMBOLS.items() if VIRT_BASE < value <= address}
    return below[max(below)]
