/*
 * head.S - ELF notes for the domain builder, and the first instructions.
 *
 * Xen enters at xen_start in ring 3 with paging on, rsi = start_info (virtual), events masked.
 */
#include "layout.h"
#include "xen.h"

#define ELFNOTE(type, desc...)                  \
	.pushsection .note.Xen, "a", @note;     \
	.balign 4;                              \
	.long 2f - 1f, 4f - 3f, type;           \
1:	.asciz "Xen";                           \
2:	.balign 4;                              \
3:	desc;                                   \
4:	.balign 4;                              \
	.popsection

	ELFNOTE(XEN_ELFNOTE_GUEST_OS, .asciz "xsave-guest")
	ELFNOTE(XEN_ELFNOTE_GUEST_VERSION, .asciz "1")
	ELFNOTE(XEN_ELFNOTE_XEN_VERSION, .asciz "xen-3.0")
	ELFNOTE(XEN_ELFNOTE_LOADER, .asciz "generic")
	ELFNOTE(XEN_ELFNOTE_PAE_MODE, .asciz "yes")
	ELFNOTE(XEN_ELFNOTE_FEATURES, .asciz "!writable_page_tables|pae_pgdir_above_4gb")
	ELFNOTE(XEN_ELFNOTE_ENTRY, .quad xen_start)
	ELFNOTE(XEN_ELFNOTE_VIRT_BASE, .quad VIRT_BASE)
	ELFNOTE(XEN_ELFNOTE_PADDR_OFFSET, .quad 0)
	ELFNOTE(XEN_ELFNOTE_L1_MFN_VALID, .quad 1; .quad 1)
	ELFNOTE(XEN_ELFNOTE_SUSPEND_CANCEL, .long 1)

	.section .text.head, "ax"
	.globl xen_start
xen_start:
	cld
	leaq	init_stack + THREAD_SIZE(%rip), %rsp
	movq	%rsi, %rdi
	/* The boot thread becomes the idle thread: start it without anything of the builder's. */
	xorl	%eax, %eax
	xorl	%ebx, %ebx
	xorl	%ecx, %ecx
	xorl	%edx, %edx
	xorl	%esi, %esi
	xorl	%ebp, %ebp
	xorl	%r8d, %r8d
	xorl	%r9d, %r9d
	xorl	%r10d, %r10d
	xorl	%r11d, %r11d
	xorl	%r12d, %r12d
	xorl	%r13d, %r13d
	xorl	%r14d, %r14d
	xorl	%r15d, %r15d
	pushq	$0			/* ends every backtrace */
	call	start_kernel
	ud2

	/* The compiler, for the test that rebuilds this file: same compiler, same bytes. */
	.section .note.toolchain, "a", @note
	.balign 4
	.long	6, 4f - 3f, 1
	.asciz	"xsave"
	.balign 4
3:	.asciz	TOOLCHAIN
4:	.balign 4

	.bss
	.balign THREAD_SIZE
	.globl init_stack
init_stack:
	.skip	THREAD_SIZE

	.section .note.GNU-stack, "", @progbits
