/*
 * xen.h - the public x86_64 PV interface of Xen, as far as this kernel uses it.
 *
 * Numbers and layouts are those of xen/include/public; the static asserts at the end of each
 * structure hold them to the offsets a toolstack relies on.
 */
#ifndef XSAVE_GUEST_XEN_H
#define XSAVE_GUEST_XEN_H

/* Hypercall numbers. */
#define __HYPERVISOR_set_trap_table      0
#define __HYPERVISOR_mmu_update          1
#define __HYPERVISOR_set_gdt             2
#define __HYPERVISOR_stack_switch        3
#define __HYPERVISOR_memory_op           12
#define __HYPERVISOR_multicall           13
#define __HYPERVISOR_update_va_mapping   14
#define __HYPERVISOR_xen_version         17
#define __HYPERVISOR_console_io          18
#define __HYPERVISOR_iret                23
#define __HYPERVISOR_vcpu_op             24
#define __HYPERVISOR_set_segment_base    25
#define __HYPERVISOR_mmuext_op           26
#define __HYPERVISOR_sched_op            29
#define __HYPERVISOR_callback_op         30
#define __HYPERVISOR_event_channel_op    32
#define __HYPERVISOR_physdev_op          33

/* The windows Xen keeps in every guest's address space, and its flat segments. */
#define MACH2PHYS_VIRT_START 0xffff800000000000
#define FLAT_RING3_CS64      0xe033
#define FLAT_RING3_SS64      0xe02b

/* ELF notes (owner "Xen"). */
#define XEN_ELFNOTE_ENTRY          1
#define XEN_ELFNOTE_VIRT_BASE      3
#define XEN_ELFNOTE_PADDR_OFFSET   4
#define XEN_ELFNOTE_XEN_VERSION    5
#define XEN_ELFNOTE_GUEST_OS       6
#define XEN_ELFNOTE_GUEST_VERSION  7
#define XEN_ELFNOTE_LOADER         8
#define XEN_ELFNOTE_PAE_MODE       9
#define XEN_ELFNOTE_FEATURES       10
#define XEN_ELFNOTE_L1_MFN_VALID   13
#define XEN_ELFNOTE_SUSPEND_CANCEL 14

/* sched_op */
#define SCHEDOP_yield     0
#define SCHEDOP_block     1
#define SCHEDOP_shutdown  2
#define SCHEDOP_poll      3
#define SHUTDOWN_poweroff 0
#define SHUTDOWN_reboot   1
#define SHUTDOWN_suspend  2
#define SHUTDOWN_crash    3

/* mmu_update, update_va_mapping, mmuext_op */
#define MMU_NORMAL_PT_UPDATE     0
#define UVMF_NONE                0
#define UVMF_TLB_FLUSH           1
#define UVMF_INVLPG              2
#define UVMF_ALL                 4	/* on all vCPUs */
#define MMUEXT_PIN_L1_TABLE      0
#define MMUEXT_PIN_L4_TABLE      3
#define MMUEXT_UNPIN_TABLE       4
#define MMUEXT_NEW_BASEPTR       5
#define MMUEXT_TLB_FLUSH_LOCAL   6
#define MMUEXT_INVLPG_LOCAL      7
#define DOMID_SELF               0x7ff0

/* memory_op */
#define XENMEM_decrease_reservation 1
#define XENMEM_populate_physmap     6

/* set_segment_base, vcpu_op, callback_op, physdev_op */
#define SEGBASE_GS_KERNEL             2
#define VCPUOP_initialise             0
#define VCPUOP_up                     1
#define VCPUOP_down                   2
#define VCPUOP_is_up                  3
#define VCPUOP_set_singleshot_timer   8
#define VCPUOP_stop_singleshot_timer  9
#define VCPUOP_register_vcpu_info     10
#define CALLBACKOP_register           0
#define CALLBACKTYPE_event            0
#define CALLBACKTYPE_failsafe         1
#define CALLBACKTYPE_syscall          2
#define CALLBACKF_mask_events         1
#define PHYSDEVOP_set_iopl            6

/* event_channel_op */
#define EVTCHNOP_bind_virq   1
#define EVTCHNOP_close       3
#define EVTCHNOP_send        4
#define EVTCHNOP_status      5
#define EVTCHNOP_alloc_unbound 6
#define EVTCHNOP_bind_ipi    7
#define EVTCHNOP_bind_vcpu   8
#define EVTCHNOP_unmask      9
#define EVTCHNSTAT_virq      4
#define VIRQ_TIMER           0
#define NR_EVENT_CHANNELS    4096

/* Xen's error numbers, negated in hypercall results. */
#define XEN_EEXIST 17
#define XEN_EBUSY  16
#define XEN_ENOSYS 38

#ifndef __ASSEMBLER__
#include "types.h"

struct vcpu_time_info {
	u32 version;			/* odd while Xen writes it */
	u32 pad0;
	u64 tsc_timestamp;
	u64 system_time;		/* ns at tsc_timestamp */
	u32 tsc_to_system_mul;
	s8 tsc_shift;
	u8 flags;
	u8 pad1[2];
};

struct vcpu_info {
	u8 evtchn_upcall_pending;
	u8 evtchn_upcall_mask;
	u8 pad[6];
	u64 evtchn_pending_sel;
	u64 cr2;
	u64 arch_pad;
	struct vcpu_time_info time;
};

struct shared_info {
	struct vcpu_info vcpu_info[32];
	u64 evtchn_pending[64];
	u64 evtchn_mask[64];
	u32 wc_version, wc_sec, wc_nsec, wc_sec_hi;
	struct {
		u64 max_pfn;
		u64 pfn_to_mfn_frame_list_list;
		u64 nmi_reason;
		u64 p2m_cr3, p2m_vaddr, p2m_generation;
	} arch;
};
_Static_assert(__builtin_offsetof(struct shared_info, evtchn_pending) == 0x800, "pending");
_Static_assert(__builtin_offsetof(struct shared_info, arch.max_pfn) == 0xc10, "max_pfn");
_Static_assert(sizeof(struct shared_info) == 3136, "shared_info");

struct start_info {
	char magic[32];
	u64 nr_pages;
	u64 shared_info;		/* machine address */
	u32 flags;
	u64 store_mfn;			/* a pfn while suspended */
	u32 store_evtchn;
	u64 console_mfn;		/* a pfn while suspended */
	u32 console_evtchn;
	u64 pt_base, nr_pt_frames;
	u64 mfn_list;
	u64 mod_start, mod_len;
	char cmd_line[1024];
	u64 first_p2m_pfn, nr_p2m_frames;
};
_Static_assert(__builtin_offsetof(struct start_info, console_mfn) == 0x48, "console_mfn");
_Static_assert(sizeof(struct start_info) == 1168, "start_info");

struct mmu_update {
	u64 ptr;			/* machine address of the entry, or'ed with the command */
	u64 val;
};

struct mmuext_op {
	u32 cmd;
	u32 pad;
	u64 arg1;			/* mfn or linear address */
	u64 arg2;
};

struct multicall_entry {
	u64 op;
	s64 result;
	u64 args[6];
};

struct xen_memory_reservation {
	u64 *extent_start;		/* populate: pfns in, mfns out; decrease: mfns in */
	u64 nr_extents;
	u32 extent_order;
	u32 mem_flags;
	u16 domid;
};

struct trap_info {
	u8 vector;
	u8 flags;			/* 0-3: DPL, bit 2: mask events on entry */
	u16 cs;
	u32 pad;
	u64 address;
};

struct callback_register {
	u16 type;
	u16 flags;
	u32 pad;
	u64 address;
};

struct sched_shutdown {
	u32 reason;
};

struct sched_poll {
	u32 *ports;
	u32 nr_ports;
	u64 timeout;			/* absolute, system time in ns; 0: none */
};

struct vcpu_set_singleshot_timer {
	u64 timeout_abs_ns;
	u32 flags;
};

struct evtchn_bind_virq {
	u32 virq, vcpu;
	u32 port;			/* out */
};

struct evtchn_bind_vcpu {
	u32 port, vcpu;
};

struct evtchn_alloc_unbound {
	u16 dom, remote_dom;
	u32 port;			/* out */
};

struct evtchn_bind_ipi {
	u32 vcpu;
	u32 port;			/* out */
};

struct evtchn_status {
	u16 dom;
	u32 port;
	u32 status, vcpu;		/* out */
	u32 virq;			/* out, where status is EVTCHNSTAT_virq */
	u32 pad;
};

struct xencons_interface {
	char in[1024];
	char out[2048];
	u32 in_cons, in_prod;
	u32 out_cons, out_prod;
};
_Static_assert(__builtin_offsetof(struct xencons_interface, in_cons) == 3072, "console ring");

#define XENSTORE_RING_SIZE   1024
#define XENSTORE_PAYLOAD_MAX 4096

enum xsd_sockmsg_type {
	XS_READ = 2,
	XS_WATCH = 4,
	XS_TRANSACTION_START = 6,
	XS_TRANSACTION_END = 7,
	XS_WRITE = 11,
	XS_RM = 13,
	XS_WATCH_EVENT = 15,
	XS_ERROR = 16,
};

struct xsd_sockmsg {
	u32 type;
	u32 req_id;
	u32 tx_id;
	u32 len;
};

struct xenstore_domain_interface {
	char req[XENSTORE_RING_SIZE];	/* guest to xenstored */
	char rsp[XENSTORE_RING_SIZE];	/* xenstored to guest, and watch events */
	u32 req_cons, req_prod;
	u32 rsp_cons, rsp_prod;
};

#endif /* __ASSEMBLER__ */
#endif
