/*
 * entry.S - ways in from Xen (traps, events), the way back (iret hypercall), the thread switch,
 * and the suspend hypercall.
 *
 * Xen pushes, from low to high: rcx, r11, [error code], rip, cs, rflags, rsp, ss, on the stack
 * that was in use (the whole kernel runs in "kernel mode" of ring 3). cs has its RPL bits
 * cleared, and in bits 32.. the event mask of before. SAVE_REGS completes struct pt_regs.
 */
#include "layout.h"
#include "xen.h"

	.macro SAVE_REGS
	pushq	%rdi
	pushq	%rsi
	pushq	%rdx
	pushq	%rcx
	pushq	%rax
	pushq	%r8
	pushq	%r9
	pushq	%r10
	pushq	%r11
	pushq	%rbx
	pushq	%rbp
	pushq	%r12
	pushq	%r13
	pushq	%r14
	pushq	%r15
	cld
	movq	%rsp, %rdi
	.endm

	/* The registers a callee may destroy, and may have left an mfn in. */
	.macro ZERO_SCRATCH
	xorl	%ecx, %ecx
	xorl	%edx, %edx
	xorl	%esi, %esi
	xorl	%edi, %edi
	xorl	%r8d, %r8d
	xorl	%r9d, %r9d
	xorl	%r10d, %r10d
	xorl	%r11d, %r11d
	.endm

	/*
	 * Make [rdi, rsp), the dead part of the stack, zero. Most of it is: it is looked at
	 * first, which is cheaper than a store and leaves clean pages clean. Uses rax, rdi.
	 */
	.macro SCRUB_BELOW
	jmp	2f
1:	movq	(%rdi), %rax
	orq	8(%rdi), %rax
	orq	16(%rdi), %rax
	orq	24(%rdi), %rax
	leaq	32(%rdi), %rdi
	jz	2f
	movq	$0, -32(%rdi)
	movq	$0, -24(%rdi)
	movq	$0, -16(%rdi)
	movq	$0, -8(%rdi)
2:	leaq	32(%rdi), %rax
	cmpq	%rsp, %rax
	jbe	1b
3:	cmpq	%rsp, %rdi
	jae	4f
	movq	$0, (%rdi)
	addq	$8, %rdi
	jmp	3b
4:
	.endm

	.text
	.globl xen_event_callback
xen_event_callback:
	popq	%rcx
	popq	%r11
	pushq	$-1
	SAVE_REGS
	call	xen_evtchn_do_upcall
	/*
	 * Preemption at any instruction: the event has made another thread the one to run, nobody
	 * down the stack keeps preemption off, and what was interrupted had events on. (It has:
	 * an upcall comes through no mask. But a trap's handler may take the same way one day.)
	 */
	cmpl	$0, %gs:CPU_NEED_RESCHED
	je	xen_iret
	cmpl	$0, %gs:CPU_PREEMPT_COUNT
	jne	xen_iret
	testl	$EFLAGS_IF, PT_REGS_FLAGS(%rsp)
	jz	xen_iret
	call	preempt_schedule_irq

/* Back to where the event or trap came from; the mask returns with rflags.IF, atomically. */
xen_iret:
	popq	%r15
	popq	%r14
	popq	%r13
	popq	%r12
	popq	%rbp
	popq	%rbx
	popq	%r11
	popq	%r10
	popq	%r9
	popq	%r8
	popq	%rax
	popq	%rcx
	popq	%rdx
	popq	%rsi
	popq	%rdi
	/* struct iret_context: rax r11 rcx flags | rip cs rflags rsp ss are there already */
	movq	$0, (%rsp)
	pushq	%rcx
	pushq	%r11
	pushq	%rax
	movl	$__HYPERVISOR_iret, %eax
	syscall
	ud2

	.globl xen_failsafe_callback
xen_failsafe_callback:
	/* A frame of ours could not be returned to: there is no frame to show either. */
	call	bad_iret
	ud2

	.globl xen_syscall_target
xen_syscall_target:
	/* There is no user mode yet. */
	call	bad_syscall
	ud2

	.macro TRAP vector, has_error
	.globl	trap_\vector
trap_\vector:
	popq	%rcx
	popq	%r11
	.if !\has_error
	pushq	$0
	.endif
	SAVE_REGS
	movl	$\vector, %esi
	call	do_trap
	jmp	xen_iret
	.endm

	TRAP 0, 0
	TRAP 1, 0
	TRAP 3, 0
	TRAP 4, 0
	TRAP 5, 0
	TRAP 6, 0
	TRAP 7, 0
	TRAP 10, 1
	TRAP 11, 1
	TRAP 12, 1
	TRAP 13, 1
	TRAP 14, 1
	TRAP 16, 0
	TRAP 17, 1
	TRAP 19, 0

/*
 * struct task_struct *__switch_to_asm(prev, next): returns prev, on next's stack.
 *
 * Leaves prev's dead stack zero, so that nothing a switched-out thread once computed with (an
 * mfn, a pte) stays in memory, and hands no scratch register over: the next event would push it
 * onto the new thread's stack.
 */
	.globl __switch_to_asm
__switch_to_asm:
	pushq	%rbp
	pushq	%rbx
	pushq	%r12
	pushq	%r13
	pushq	%r14
	pushq	%r15
	movq	%rdi, %rdx
	addq	$TASK_STRUCT_SIZE, %rdi
	SCRUB_BELOW
	movq	%rsp, TASK_SP(%rdx)
	movq	TASK_SP(%rsi), %rsp
	movq	%rdx, %rax
	popq	%r15
	popq	%r14
	popq	%r13
	popq	%r12
	popq	%rbx
	popq	%rbp
	ZERO_SCRATCH
	ret

/* A fresh vCPU, on its idle thread's stack. The boot CPU comes in at xen_start. */
	.globl cpu_bringup
cpu_bringup:
	cld
	xorl	%ebp, %ebp
	pushq	$0			/* ends every backtrace */
	call	start_secondary
	ud2

/* First run of a thread: kthread_run() left kthread_entry's frame. rax = prev. */
	.globl ret_from_fork
ret_from_fork:
	movq	%rax, %rdi
	call	kthread_entry
	ud2

/* void stack_scrub(void *stack_end): zero the dead stack and the scratch registers. */
	.globl stack_scrub
stack_scrub:
	SCRUB_BELOW
	ZERO_SCRATCH
	ret

/*
 * int HYPERVISOR_suspend(struct sched_shutdown *arg, const u64 *mfn, void *stack_end)
 *
 * The third argument of the hypercall is the mfn of start_info: the toolstack finds it in rdx
 * of vCPU 0 and makes a pfn of it, so rdx is the only register that may hold an mfn. Everything
 * below rsp is zeroed and every scratch register with it. 0: new domain; 1: cancelled.
 */
	.globl HYPERVISOR_suspend
HYPERVISOR_suspend:
	movq	%rdi, %r8
	movq	%rsi, %r9
	movq	%rdx, %rdi
	SCRUB_BELOW
	movq	%r8, %rsi
	movq	(%r9), %rdx
	movl	$SCHEDOP_shutdown, %edi
	xorl	%r8d, %r8d
	xorl	%r9d, %r9d
	xorl	%r10d, %r10d
	xorl	%r11d, %r11d
	xorl	%ecx, %ecx
	movl	$__HYPERVISOR_sched_op, %eax
	syscall
	ZERO_SCRATCH
	ret

	.section .note.GNU-stack, "", @progbits
