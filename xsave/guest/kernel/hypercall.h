/*
 * hypercall.h - the calls into Xen, one inline function each, by direct `syscall`: the number in
 * rax, arguments in rdi rsi rdx r10 r8, result in rax, rcx and r11 lost. No hypercall page.
 *
 * All argument registers count as clobbered, which a debug build of Xen makes use of.
 */
#ifndef XSAVE_GUEST_HYPERCALL_H
#define XSAVE_GUEST_HYPERCALL_H

#include "xen.h"

static inline long hypercall4(long nr, u64 a1, u64 a2, u64 a3, u64 a4)
{
	register u64 r10 __asm__("r10") = a4;
	long ret;

	__asm__ volatile("syscall"
			 : "=a"(ret), "+D"(a1), "+S"(a2), "+d"(a3), "+r"(r10)
			 : "0"(nr)
			 : "rcx", "r8", "r9", "r11", "memory", "cc");
	return ret;
}

static inline long HYPERVISOR_set_trap_table(const struct trap_info *table)
{
	return hypercall4(__HYPERVISOR_set_trap_table, (u64)table, 0, 0, 0);
}

static inline long HYPERVISOR_mmu_update(struct mmu_update *req, u32 count)
{
	return hypercall4(__HYPERVISOR_mmu_update, (u64)req, count, 0, DOMID_SELF);
}

static inline long HYPERVISOR_set_gdt(u64 *frames, u32 entries)
{
	return hypercall4(__HYPERVISOR_set_gdt, (u64)frames, entries, 0, 0);
}

static inline long HYPERVISOR_stack_switch(u64 ss, u64 rsp)
{
	return hypercall4(__HYPERVISOR_stack_switch, ss, rsp, 0, 0);
}

static inline long HYPERVISOR_memory_op(int cmd, void *arg)
{
	return hypercall4(__HYPERVISOR_memory_op, cmd, (u64)arg, 0, 0);
}

static inline long HYPERVISOR_multicall(struct multicall_entry *calls, u32 count)
{
	return hypercall4(__HYPERVISOR_multicall, (u64)calls, count, 0, 0);
}

static inline long HYPERVISOR_update_va_mapping(u64 va, u64 pte, u64 flags)
{
	return hypercall4(__HYPERVISOR_update_va_mapping, va, pte, flags, 0);
}

static inline long HYPERVISOR_xen_version(int cmd, void *arg)
{
	return hypercall4(__HYPERVISOR_xen_version, cmd, (u64)arg, 0, 0);
}

static inline long HYPERVISOR_console_io(const char *buf, u64 len)
{
	return hypercall4(__HYPERVISOR_console_io, 0, len, (u64)buf, 0);
}

static inline long HYPERVISOR_vcpu_op(int cmd, int vcpu, void *arg)
{
	return hypercall4(__HYPERVISOR_vcpu_op, cmd, vcpu, (u64)arg, 0);
}

static inline long HYPERVISOR_set_segment_base(int which, u64 base)
{
	return hypercall4(__HYPERVISOR_set_segment_base, which, base, 0, 0);
}

static inline long HYPERVISOR_mmuext_op(struct mmuext_op *ops, u32 count)
{
	return hypercall4(__HYPERVISOR_mmuext_op, (u64)ops, count, 0, DOMID_SELF);
}

static inline long HYPERVISOR_sched_op(int cmd, void *arg)
{
	return hypercall4(__HYPERVISOR_sched_op, cmd, (u64)arg, 0, 0);
}

static inline long HYPERVISOR_callback_op(int cmd, void *arg)
{
	return hypercall4(__HYPERVISOR_callback_op, cmd, (u64)arg, 0, 0);
}

static inline long HYPERVISOR_event_channel_op(int cmd, void *arg)
{
	return hypercall4(__HYPERVISOR_event_channel_op, cmd, (u64)arg, 0, 0);
}

static inline long HYPERVISOR_physdev_op(int cmd, void *arg)
{
	return hypercall4(__HYPERVISOR_physdev_op, cmd, (u64)arg, 0, 0);
}

/* entry.S: SCHEDOP_shutdown(SHUTDOWN_suspend) with the mfn at *mfn as third argument. */
int HYPERVISOR_suspend(struct sched_shutdown *arg, const u64 *mfn, void *stack_end);

#endif
