"""What `verify` looks for: every rule by its slug, how bad a breach is, and why.

`error`: a restore is refused, or succeeds and leaves a guest that is dead or has lost data.
`warning`: against the letter of the specs, or odd enough to look twice; restores have worked.
`note`: worth knowing, ordinary in images that real Xens write.
The man page and the tests are made from this table. The numbers of facts are upstream's: what
libxc refuses is in xg_sr_restore*.c, what the hypervisor refuses in arch/x86/mm.c and domain.c,
what kills the guest afterwards was found by changing one field at a time of a sound image.
"""

from __future__ import annotations

ERROR, WARNING, NOTE = "error", "warning", "note"
SEVERITIES = (ERROR, WARNING, NOTE)

_ERRORS = {
    # the stream
    "damaged": "a header or record cannot be decoded; nothing behind it was looked at",
    "order": "a record comes where, or as often as, the specs do not allow it",
    "missing-record": "a record without which the guest cannot go on was never sent",
    "tail": "bytes follow the image that are not the go-ahead of a migration",
    "config": "xl would refuse the configuration, or the domain it describes is not this one",
    "emulator": "the emulator's records are malformed, or the guest has no emulator",
    # memory
    "coverage": "a pfn of the guest has no final state: a batch was lost",
    "pfn-range": "a batch names a pfn behind the end of the p2m",
    "page-type": "a page has a type that no page of such a guest can have",
    "p2m-frames": "the p2m pages are not all there as ordinary pages with content",
    "pte-range": "a page table names a pfn behind the end of the p2m: libxc aborts",
    "pte-level": "an entry names a page that is no table of the level below: Xen refuses it",
    "pte-flags": "an entry has bits set that Xen allows no guest (PWT, PCD, PAT, PSE, GLOBAL)",
    "pte-writable": "a page table or GDT frame is mapped writable: Xen refuses the vCPU",
    "pte-hole": "an entry maps a pfn that has no content: the guest would find an empty page",
    # what the guest finds when it wakes up
    "start-info": "rdx of vCPU 0 does not lead to start_info: the restore patches another page",
    "start-info-rings": "start_info names no usable xenstore or console page",
    "upcall-mask": "events are not masked in vCPU 0's slot of shared_info: the guest hangs",
    "tsc-mode": "there is no such TSC mode",
    "policy-refused": "Xen refuses the CPU policy: flags on an MSR, or too long",
    # vCPUs
    "vcpu-id": "a vCPU number is too high, comes twice, or has no BASIC record",
    "vcpu-size": "a context has the size of the other guest width",
    "vcpu-cr3": "cr3 leads to no page table of the top level",
    "vcpu-cr1": "cr1 leads to no user page table, or is 0 although the guest has one",
    "vcpu-gdt": "the GDT is empty, too long, or not in ordinary pages",
    "vcpu-canonical": "an address is not canonical: Xen refuses the vCPU",
    "vcpu-unmapped": "code, stack or an entry point of the vCPU is not mapped",
    "vcpu-flags": "the vCPU is not in kernel mode and has no user page table",
    "vcpu-iopl": "IOPL is 0 in a guest with user mode: its kernel faults at once",
    "vcpu-segments": "cs or ss is null or behind the end of the GDT",
    "vcpu-rax": "rax of vCPU 0 is not 0: the guest believes its suspend was cancelled",
    "vcpu-callbacks": "an entry point that Xen must call is 0",
    "vcpu-traps": "no trap handler at all",
    "vcpu-gs-base": "the kernel's GS base is 0 in a guest with user mode",
    "vcpu-cr4": "cr4 and the XSAVE record contradict each other",
    "vcpu-xsave": "Xen would refuse the XSAVE state",
    "vcpu-extended": "Xen would refuse the extended state, or set that of another vCPU",
    # HVM
    "hvm-context": "the HVM context is no chain from HEADER to END with a CPU in it",
    "hvm-params": "a parameter comes twice or names a page that is not in the image",
}

_WARNINGS = {
    "reserved": "a reserved field is not 0",
    "padding": "the padding of a record is not 0",
    "batch": "a batch is longer than Xen writes, or names a pfn twice",
    "policy-late": "a CPU policy behind STATIC_DATA_END is read and ignored",
    "policy": "a CPU policy is not sorted, or has an entry that Xen does not know",
    "no-config": "no configuration: xl restore needs one on its command line",
    "l4-xen-slots": "Xen's own slots of a top-level table are not empty",
    "pte-linear": "a table maps itself or one of its own level (Xen may be built without that)",
    "tables-skipped": "so many page-table entries that not all of them were kept and checked",
    "shared-info": "shared_info contradicts the p2m, or events are not masked on another vCPU",
    "vcpu-msrs": "an MSR that Xen does not send",
    "vcpu-order": "vCPU records are not in ascending order",
    "no-user-mode": "no syscall entry: IOPL and GS base 0 are fine if it never enters user mode",
    "hvm-sparse": "an HVM record or parameter is missing that Xen always writes",
}

_NOTES = {
    "go-message": "the image is a recorded migration: the go-ahead follows it",
    "unknown-optional": "an optional record of unknown type, which readers skip",
    "version-2": "a stream of Xen 4.13 or older: no CPU policy",
    "legacy": "made by Xen's converter from a legacy image",
    "checkpointed": "a checkpointed stream (Remus, COLO)",
    "repeated": "pfns were sent more than once, as a live migration does; the last one counts",
    "no-policy": "no CPU policy: the host's default applies",
    "no-tsc": "no X86_TSC_INFO: the host's default applies",
    "table-unused": "page tables that no vCPU and no pin reaches",
    "assists": "without writable page tables: a guest that writes its tables directly would fault",
    "host-frames": "frame numbers of the source host are left where a restore rewrites them",
}

#: slug -> (severity, why). In the order in which a person would want to read them.
RULES: dict[str, tuple[str, str]] = {
    slug: (severity, why)
    for severity, rules in ((ERROR, _ERRORS), (WARNING, _WARNINGS), (NOTE, _NOTES))
    for slug, why in rules.items()
}
