"""The structures of Xen's public headers that both the image and the hypervisor speak.

A leaf: imports nothing of xsave. ctypes declares the layout (the offsets are those a compiler
gives for xen/include/public on x86_64); nothing here has behaviour. `X.field.offset` is the
offset to report when a field is wrong.
"""

from __future__ import annotations

import ctypes as c

u8, u16, u32, u64 = c.c_uint8, c.c_uint16, c.c_uint32, c.c_uint64


class UserRegs(c.LittleEndianStructure):
    """cpu_user_regs, x86_64 (200 bytes)."""

    _fields_ = [
        *[(n, u64) for n in ("r15", "r14", "r13", "r12", "rbp", "rbx", "r11", "r10", "r9", "r8")],
        *[(n, u64) for n in ("rax", "rcx", "rdx", "rsi", "rdi")],
        ("error_code", u32),
        ("entry_vector", u32),
        ("rip", u64),
        ("cs", u16),
        ("_pad0", u16),
        ("saved_upcall_mask", u8),
        ("_pad1", u8 * 3),
        ("rflags", u64),
        ("rsp", u64),
        ("ss", u16),
        ("_pad2", u16 * 3),
        ("es", u16),
        ("_pad3", u16 * 3),
        ("ds", u16),
        ("_pad4", u16 * 3),
        ("fs", u16),
        ("_pad5", u16 * 3),
        ("gs", u16),
        ("_pad6", u16 * 3),
    ]


class TrapInfo(c.LittleEndianStructure):
    """trap_info: one entry of the guest's virtual IDT (16 bytes)."""

    _fields_ = [("vector", u8), ("flags", u8), ("cs", u16), ("_pad", u32), ("address", u64)]


class VcpuGuestContext(c.LittleEndianStructure):
    """vcpu_guest_context, x86_64 (5168 bytes): the body of X86_PV_VCPU_BASIC."""

    _fields_ = [
        ("fpu_ctxt", u8 * 512),
        ("flags", u32),
        ("_pad0", u32),
        ("user_regs", UserRegs),
        ("trap_ctxt", TrapInfo * 256),
        ("ldt_base", u64),
        ("ldt_ents", u64),
        ("gdt_frames", u64 * 16),
        ("gdt_ents", u64),
        ("kernel_ss", u64),
        ("kernel_sp", u64),
        ("ctrlreg", u64 * 8),
        ("debugreg", u64 * 8),
        ("event_callback_eip", u64),
        ("failsafe_callback_eip", u64),
        ("syscall_callback_eip", u64),
        ("vm_assist", u64),
        ("fs_base", u64),
        ("gs_base_kernel", u64),
        ("gs_base_user", u64),
    ]


VGCF_I387_VALID = 1 << 0
VGCF_IN_KERNEL = 1 << 2
VGCF_FAILSAFE_DISABLES_EVENTS = 1 << 3
VGCF_SYSCALL_DISABLES_EVENTS = 1 << 4
VGCF_ONLINE = 1 << 5


class VcpuExtended(c.LittleEndianStructure):
    """xen_domctl_ext_vcpucontext (64 bytes): the body of X86_PV_VCPU_EXTENDED."""

    _fields_ = [
        ("vcpu", u32),
        ("size", u32),
        ("syscall32_callback_eip", u64),
        ("sysenter_callback_eip", u64),
        ("syscall32_callback_cs", u16),
        ("sysenter_callback_cs", u16),
        ("syscall32_disables_events", u8),
        ("sysenter_disables_events", u8),
        ("_pad", u8 * 2),
        ("mcg_cap", u64),
        ("mci_ctl2_bank0", u64),
        ("mci_ctl2_bank1", u64),
        ("mcg_ext_ctl", u64),
    ]


class VcpuTimeInfo(c.LittleEndianStructure):
    """vcpu_time_info (32 bytes)."""

    _fields_ = [
        ("version", u32),
        ("pad0", u32),
        ("tsc_timestamp", u64),
        ("system_time", u64),
        ("tsc_to_system_mul", u32),
        ("tsc_shift", c.c_int8),
        ("flags", u8),
        ("pad1", u8 * 2),
    ]


class VcpuInfo(c.LittleEndianStructure):
    """vcpu_info (64 bytes)."""

    _fields_ = [
        ("evtchn_upcall_pending", u8),
        ("evtchn_upcall_mask", u8),
        ("_pad", u8 * 6),
        ("evtchn_pending_sel", u64),
        ("cr2", u64),
        ("_arch_pad", u64),
        ("time", VcpuTimeInfo),
    ]


class ArchSharedInfo(c.LittleEndianStructure):
    """arch_shared_info, x86_64."""

    _fields_ = [
        ("max_pfn", u64),
        ("pfn_to_mfn_frame_list_list", u64),
        ("nmi_reason", u64),
        ("p2m_cr3", u64),
        ("p2m_vaddr", u64),
        ("p2m_generation", u64),
    ]


class SharedInfo(c.LittleEndianStructure):
    """shared_info, x86_64 (3136 bytes of a page)."""

    _fields_ = [
        ("vcpu_info", VcpuInfo * 32),
        ("evtchn_pending", u64 * 64),
        ("evtchn_mask", u64 * 64),
        ("wc_version", u32),
        ("wc_sec", u32),
        ("wc_nsec", u32),
        ("wc_sec_hi", u32),
        ("arch", ArchSharedInfo),
    ]


class StartInfo(c.LittleEndianStructure):
    """start_info, x86_64 (1168 bytes)."""

    _fields_ = [
        ("magic", c.c_char * 32),
        ("nr_pages", u64),
        ("shared_info", u64),
        ("flags", u32),
        ("_pad0", u32),
        ("store_mfn", u64),
        ("store_evtchn", u32),
        ("_pad1", u32),
        ("console_mfn", u64),
        ("console_evtchn", u32),
        ("_pad2", u32),
        ("pt_base", u64),
        ("nr_pt_frames", u64),
        ("mfn_list", u64),
        ("mod_start", u64),
        ("mod_len", u64),
        ("cmd_line", c.c_char * 1024),
        ("first_p2m_pfn", u64),
        ("nr_p2m_frames", u64),
    ]


START_INFO_MAGIC = b"xen-3.0-x86_64"
SIF_MOD_START_PFN = 1 << 3
SHUTDOWN_POWEROFF, SHUTDOWN_REBOOT, SHUTDOWN_SUSPEND, SHUTDOWN_CRASH = range(4)
SHUTDOWN_NAMES = ("poweroff", "reboot", "suspend", "crash", "watchdog", "soft_reset")

#: vCPUs whose vcpu_info has a place in shared_info.
XEN_LEGACY_MAX_VCPUS = 32

# The 32-bit vcpu_guest_context is carried and its size is checked; nothing runs it here.
VCPU_CONTEXT_BYTES_64 = 5168
VCPU_CONTEXT_BYTES_32 = 2800
