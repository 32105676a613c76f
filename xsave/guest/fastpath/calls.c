/*
 * calls.c - hypercalls that only set or tell something.
 */
#include "fastpath.h"

/* The timer of the only vCPU: of several the deadline would be the least. */
static int set_singleshot(struct fastpath *f)
{
	uint64_t *q = f->registers;
	struct singleshot *wanted = guest_bytes(f, q[RDX], SINGLESHOT_BYTES);
	__int128 deadline;

	if (!wanted || q[RSI] || f->nr_vcpus != 1 || wanted->flags & SINGLESHOT_FUTURE)
		return 0;
	*f->timer = wanted->timeout;
	deadline = (__int128)wanted->timeout - (int64_t)f->clock_offset;
	f->deadline = deadline < 0 ? 0 : deadline > NEVER ? NEVER : (uint64_t)deadline;
	q[RAX] = 0;
	return 1;
}

/* Linux asks for every vCPU that its build has room for. */
int vcpu_op(struct fastpath *f)
{
	uint64_t *q = f->registers;

	if (q[RDI] == VCPUOP_SET_SINGLESHOT)
		return set_singleshot(f);
	if ((uint32_t)q[RDI] != VCPUOP_IS_UP || (q[RDI] | q[RSI]) >> 31 || q[RSI] < f->nr_vcpus)
		return 0;
	q[RAX] = -ENOENT;
	return 1;
}

int stack_switch(struct fastpath *f)
{
	uint64_t *q = f->registers;

	f->control_registers[KERNEL_SS] = q[RDI];
	f->control_registers[KERNEL_SP] = q[RSI];
	q[RAX] = 0;
	return 1;
}

/* GuestCpu.load_user_gs of a selector of the guest's own GDT. */
static int load_user_gs(struct fastpath *f, uint64_t selector)
{
	uint64_t *q = f->registers, *control = f->control_registers, index = selector >> 3;
	uint64_t descriptor = 0, frame;

	if (selector & TABLE_INDICATOR || index >= RESERVED_GDT_ENTRIES)
		return 0;
	if (index < control[GDT_ENTRIES]) {
		frame = control[GDT_FRAMES + (int)(index >> 9)];
		if (frame >= f->nr_frames)
			return 0;
		descriptor = f->memory[frame << 9 | (index & 511)];
	}
	if (!(descriptor & DESCRIPTOR_PRESENT))
		selector = descriptor = 0;
	q[GS_SEL] = (q[GS_SEL] & ~0xffffULL) | selector;
	q[GS_SEL + LIMIT_AND_FLAGS] = FLAT_RING3_DATA;
	control[GS_BASE_USER] = (descriptor >> 16 & 0xffffff) | (descriptor >> 32 & 0xff000000);
	return 1;
}

int set_segment_base(struct fastpath *f)
{
	uint64_t *q = f->registers, base = q[RSI];

	if (q[RDI] == SEGBASE_GS_USER_SEL) {
		if (!load_user_gs(f, base & 0xffff))
			return 0;
	} else if (!canonical(base)) {
		return 0;
	} else if (q[RDI] == SEGBASE_FS) {
		q[FS_BASE] = base;
	} else if (q[RDI] == SEGBASE_GS_USER) {
		f->control_registers[GS_BASE_USER] = base;
	} else if (q[RDI] == SEGBASE_GS_KERNEL) {
		q[GS_BASE] = base;
	} else {
		return 0;
	}
	q[RAX] = 0;
	return 1;
}

/* XENVER_version: Linux asks when it wants its events. */
int xen_version(struct fastpath *f)
{
	if (f->registers[RDI])
		return 0;
	f->registers[RAX] = f->version;
	return 1;
}
