/*
 * The crossings that guests make by the ten thousand, answered without Python.
 *
 * Linux patches its own code all the time while it boots: for each patch it changes a few page-table
 * entries one by one, changes to other page tables and back, and reads its clock; and each switch of
 * tasks, tick and event takes a few more. These functions are the emulator's hooks. They do such a
 * crossing if it is of the usual kind and nothing about it is in doubt, just as hypervisor.py and what
 * it calls would; all else they leave to Python, before they have changed anything. That Python does
 * the same with or without them is tested (tests/guest/test_fastpath.py); without this library it does
 * everything.
 *
 * Everything here is known to Python by address: struct fastpath is fastpath.py's, its order too.
 */
#include "fastpath.h"

#define EXPORTED __attribute__((visibility("default")))

static uint64_t monotonic(struct fastpath *f)
{
	struct timespec64 now;

	f->clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.s * NS_PER_S + (uint64_t)now.ns;
}

static void set_selectors(uint64_t *q, uint64_t cs, uint64_t ss)
{
	((uint32_t *)q)[HFLAGS] |= LONG_MODE;
	q[CS_BASE] = 0;
	q[CS_SEL] = (q[CS_SEL] & ~0xffffULL) | cs;
	q[SS_SEL] = (q[SS_SEL] & ~0xffffULL) | ss;
}

/* HYPERVISOR_iret from the kernel to the kernel. */
static int iret(struct fastpath *f, void *engine)
{
	uint64_t *q = f->registers, flags;
	struct iret_frame *frame = guest_bytes(f, q[RSP], sizeof *frame);

	if (!frame || (frame->cs & 3) == 3 || frame->rflags & RFLAGS_TF)
		return 0;
	f->events[1] = !(frame->rflags & RFLAGS_IF);
	flags = (frame->rflags & RFLAGS_LIVE) | RFLAGS_IF | 2;
	f->write_register(engine, UC_RFLAGS, &flags);
	set_selectors(q, (frame->cs & 0xffff) | 3, (frame->ss & 0xffff) | 3);
	if (!(frame->flags & VGCF_IN_SYSCALL)) {
		q[R11] = frame->r11;
		q[RCX] = frame->rcx;
	}
	q[RIP] = frame->rip - SYSCALL_BYTES;
	q[RAX] = frame->rax;
	q[RSP] = frame->rsp;
	return 1;
}

/* GuestCpu.bounce of the kernel into its event callback. 0: Python is to do it. */
static int deliver(struct fastpath *f, void *engine, uint64_t skip)
{
	uint64_t *q = f->registers, callback = f->control_registers[EVENT_CALLBACK], rflags = 0;
	uint64_t bottom = (q[RSP] & ~15ULL) - sizeof(struct bounce_frame);
	struct bounce_frame *frame = guest_page(f, bottom, sizeof *frame, PRESENT | USER | RW);

	if (!f->in_kernel || !callback || !frame)
		return 0;
	f->read_register(engine, UC_RFLAGS, &rflags);
	frame->rcx = q[RCX];
	frame->r11 = q[R11];
	frame->rip = q[RIP] + skip;
	frame->cs = q[CS_SEL] & 0xfffc; /* and no saved mask, as it was not set */
	frame->rflags = (rflags & ~RFLAGS_HIDDEN) | RFLAGS_IF;
	frame->rsp = q[RSP];
	frame->ss = q[SS_SEL] & 0xffff;
	q[RSP] = bottom;
	rflags = (rflags & ~RFLAGS_CLEARED) | RFLAGS_IF | 2;
	f->write_register(engine, UC_RFLAGS, &rflags);
	set_selectors(q, FLAT_RING3_CS64, FLAT_RING3_SS64);
	q[RIP] = callback - skip;
	f->events[1] = 1;
	return 1;
}

/* Hypervisor.leave. */
static void leave(struct fastpath *f, void *engine, uint64_t skip)
{
	f->nr_crossings++;
	if (f->kicked || monotonic(f) >= f->deadline ||
	    (f->events[0] && !f->events[1] && !deliver(f, engine, skip)))
		f->leave(skip);
}

/* The emulator's hook of `syscall` instructions. */
EXPORTED void fastpath_syscall(void *engine, struct fastpath *f)
{
	int done = 0;

	if (f->open && f->in_kernel && !f->kicked) {
		switch ((uint32_t)f->registers[RAX]) {
		case MMU_UPDATE:
			done = mmu_update(f);
			break;
		case MMUEXT_OP:
			done = mmuext_op(f);
			break;
		case VCPU_OP:
			done = vcpu_op(f);
			break;
		case STACK_SWITCH:
			done = stack_switch(f);
			break;
		case XEN_VERSION:
			done = xen_version(f);
			break;
		case IRET:
			done = iret(f, engine);
			break;
		case SET_SEGMENT_BASE:
			done = set_segment_base(f);
			break;
		}
	}
	if (done)
		leave(f, engine, SYSCALL_BYTES);
	else
		f->slow_syscall(engine, 0);
}

static void read_tsc(struct fastpath *f)
{
	uint64_t now = monotonic(f) + f->clock_offset, high, low, rest;

	/* now * khz / 10^6, which fits: no clock has run for that long. */
	__asm__("mulq %3" : "=a"(low), "=d"(high) : "0"(now), "r"(f->khz) : "cc");
	__asm__("divq %4" : "=a"(low), "=d"(rest) : "0"(low), "1"(high), "r"(KHZ_TO_NS) : "cc");
	f->registers[RAX] = (uint32_t)low;
	f->registers[RDX] = low >> 32;
}

/* rdtsc, of which Python does not say that it was a crossing either; cli of the kernel. */
static int privileged(struct fastpath *f, void *engine)
{
	uint64_t *q = f->registers;
	uint8_t *code;

	if (f->exception[1] || !(((uint32_t *)q)[HFLAGS] & CODE64))
		return 0;
	code = guest_bytes(f, q[RIP], 2);
	if (!code)
		return 0;
	if (code[0] == 0x0f && code[1] == 0x31) {
		*f->old_exception = UINT32_MAX;
		read_tsc(f);
		q[RIP] += 2;
		return 1;
	}
	if (code[0] == 0xfa && f->in_kernel) {
		*f->old_exception = UINT32_MAX;
		q[RIP] += 1;
		leave(f, engine, 0);
		return 1;
	}
	return 0;
}

/* The emulator's hook of exceptions. */
EXPORTED void fastpath_exception(void *engine, uint32_t vector, struct fastpath *f)
{
	if (!f->open || vector != GP_FAULT || !privileged(f, engine))
		f->slow_exception(engine, vector, 0);
}

/* The size of what Python has to fill in. */
EXPORTED const uint64_t fastpath_bytes = sizeof(struct fastpath);
