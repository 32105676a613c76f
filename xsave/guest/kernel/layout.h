/* layout.h - sizes and addresses that C, assembly and the linker script have to agree on. */
#ifndef XSAVE_GUEST_LAYOUT_H
#define XSAVE_GUEST_LAYOUT_H

#define VIRT_BASE   0xffffffff80000000	/* the kernel image; at boot all that the builder made */
#define PAGE_OFFSET 0xffff880000000000	/* the direct map: every pfn, from the first L4 slot of ours */

#define THREAD_PAGES     2
#define THREAD_SIZE      8192
#define TASK_STRUCT_SIZE 128		/* sched.h: sizeof(struct task_struct) */
#define TASK_SP          0

#endif
