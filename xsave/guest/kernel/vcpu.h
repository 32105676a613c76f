/* vcpu.h - what Xen is told of a vCPU as a whole: arch-x86/xen.h, vcpu.h. */
#ifndef XSAVE_GUEST_VCPU_H
#define XSAVE_GUEST_VCPU_H

#include "xen.h"

struct vcpu_register_vcpu_info {
	u64 mfn;
	u32 offset;
	u32 pad;
};

#define VGCF_in_kernel                4
#define VGCF_failsafe_disables_events 8
#define VGCF_syscall_disables_events  16

struct vcpu_guest_context {
	u8 fpu_ctxt[512];
	u64 flags;
	struct {
		u64 r15, r14, r13, r12, rbp, rbx, r11, r10, r9, r8, rax, rcx, rdx, rsi, rdi;
		u32 error_code, entry_vector;
		u64 rip;
		u16 cs, pad0;
		u8 saved_upcall_mask, pad1[3];
		u64 rflags, rsp;
		u16 ss, pad2[3];
		u16 es, pad3[3], ds, pad4[3], fs, pad5[3], gs, pad6[3];
	} user_regs;
	struct trap_info trap_ctxt[256];
	u64 ldt_base, ldt_ents;
	u64 gdt_frames[16], gdt_ents;
	u64 kernel_ss, kernel_sp;
	u64 ctrlreg[8];			/* 3: machine address of the page tables */
	u64 debugreg[8];
	u64 event_callback_eip, failsafe_callback_eip, syscall_callback_eip;
	u64 vm_assist;
	u64 fs_base, gs_base_kernel, gs_base_user;
};
_Static_assert(__builtin_offsetof(struct vcpu_guest_context, trap_ctxt) == 720, "trap_ctxt");
_Static_assert(sizeof(struct vcpu_guest_context) == 5168, "vcpu_guest_context");

#endif
