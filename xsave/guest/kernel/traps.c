/*
 * traps.c - exceptions. None is expected: each one ends in a message and a crash.
 */
#include "hypercall.h"
#include "mm.h"
#include "sched.h"
#include "traps.h"

extern void trap_0(void), trap_1(void), trap_3(void), trap_4(void), trap_5(void), trap_6(void),
	trap_7(void), trap_10(void), trap_11(void), trap_12(void), trap_13(void), trap_14(void),
	trap_16(void), trap_17(void), trap_19(void);
extern char _text[], _etext[];

#define MASK_EVENTS 4
#define TRAP(vector, dpl) { vector, dpl | MASK_EVENTS, FLAT_RING3_CS64, 0, (u64)trap_##vector }

static const struct trap_info trap_table[] = {
	TRAP(0, 0), TRAP(1, 0), TRAP(3, 3), TRAP(4, 3), TRAP(5, 0), TRAP(6, 0), TRAP(7, 0),
	TRAP(10, 0), TRAP(11, 0), TRAP(12, 0), TRAP(13, 0), TRAP(14, 0), TRAP(16, 0),
	TRAP(17, 0), TRAP(19, 0), { 0 },
};

static const char *const trap_names[20] = {
	[0] = "divide error", [1] = "debug", [3] = "int3", [4] = "overflow", [5] = "bounds",
	[6] = "invalid opcode", [7] = "device not available", [10] = "invalid TSS",
	[11] = "segment not present", [12] = "stack segment", [13] = "general protection",
	[14] = "page fault", [16] = "x87", [17] = "alignment check", [19] = "SIMD",
};

static noreturn void crash(void)
{
	struct sched_shutdown arg = { SHUTDOWN_crash };

	HYPERVISOR_sched_op(SCHEDOP_shutdown, &arg);
	for (;;)
		HYPERVISOR_sched_op(SCHEDOP_block, NULL);
}

/* Return addresses along the frame pointers, as long as they stay on this thread's stack. */
static void show_backtrace(const u64 *frame)
{
	u64 low = (u64)current, high = low + THREAD_SIZE;
	int depth;

	for (depth = 0; depth < 12; depth++) {
		if ((u64)frame < low || (u64)frame > high - 16 || (u64)frame & 7)
			break;
		printk(" [<%lx>]\n", frame[1]);
		frame = (const u64 *)frame[0];
	}
}

noreturn void panic(const char *fmt, ...)
{
	static int panicking;
	char text[160];
	__builtin_va_list args;

	local_irq_disable();
	if (panicking++)
		crash();
	__builtin_va_start(args, fmt);
	vsnprintf(text, sizeof(text), fmt, args);
	__builtin_va_end(args);
	printk("PANIC: %s (in %s)\n", text, current ? current->comm : "boot");
	show_backtrace(__builtin_frame_address(0));
	crash();
}

/* entry.S; cr2 is in vcpu_info, the guest cannot read the register. */
noreturn void do_trap(struct pt_regs *regs, u32 vector)
{
	u64 cr2 = this_cpu()->vcpu->cr2;

	printk("TRAP %u %s, error %lx, cr2 %lx, in %s\n", vector, trap_names[vector],
	       regs->error_code, cr2, current ? current->comm : "boot");
	printk("rip %lx rsp %lx flags %lx cs %lx\n", regs->ip, regs->sp, regs->flags, regs->cs);
	printk("rax %lx rbx %lx rcx %lx rdx %lx\n", regs->ax, regs->bx, regs->cx, regs->dx);
	printk("rsi %lx rdi %lx rbp %lx r8 %lx\n", regs->si, regs->di, regs->bp, regs->r8);
	printk("r9 %lx r10 %lx r11 %lx r12 %lx\n", regs->r9, regs->r10, regs->r11, regs->r12);
	printk("r13 %lx r14 %lx r15 %lx\n", regs->r13, regs->r14, regs->r15);
	show_backtrace((const u64 *)regs->bp);
	panic("unexpected exception %u", vector);
}

noreturn void bad_iret(void)
{
	panic("Xen could not return to a frame of ours");
}

noreturn void bad_syscall(void)
{
	panic("a system call, and nobody to make one");
}

/* For a vCPU's first context, where the vector is the index. */
void trap_copy_table(struct trap_info *table)
{
	const struct trap_info *trap;

	for (trap = trap_table; trap->address; trap++)
		table[trap->vector] = *trap;
}

void trap_init(void)
{
	if (HYPERVISOR_set_trap_table(trap_table))
		panic("set_trap_table refused");
}
