/* layout.h - sizes and addresses that C, assembly and the linker script have to agree on. */
#ifndef XSAVE_GUEST_LAYOUT_H
#define XSAVE_GUEST_LAYOUT_H

/* The kernel image, and at boot all that the builder made. */
#define VIRT_BASE   0xffffffff80000000
/* The direct map of every pfn, in the first L4 slot behind Xen's. */
#define PAGE_OFFSET 0xffff880000000000

#define THREAD_PAGES     2
#define THREAD_SIZE      8192
#define TASK_STRUCT_SIZE 160	/* sched.h: sizeof(struct task_struct) */
#define TASK_SP          0

/* percpu.h: offsets in struct cpu; traps.h: in struct pt_regs */
#define CPU_CURR          8
#define CPU_PREEMPT_COUNT 16
#define CPU_NEED_RESCHED  20
#define PT_REGS_FLAGS     144
#define EFLAGS_IF         0x200

#endif
