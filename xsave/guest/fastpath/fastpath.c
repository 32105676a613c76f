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

#include <stdint.h>

#define DOMID_SELF 0x7ff0
#define PAGE_SHIFT 12
#define FRAME_MASK 0x000ffffffffff000ULL
#define PRESENT 0x001ULL
#define RW 0x002ULL
#define USER 0x004ULL
#define ACCESSED_DIRTY 0x060ULL
#define PSE 0x080ULL
#define L1_DISALLOWED (0x008ULL | 0x010ULL | PSE) /* PWT, PCD */
#define UPPER_DISALLOWED (L1_DISALLOWED | 0x100ULL) /* GLOBAL */

enum page_type { PGT_NONE, PGT_L1, PGT_L2, PGT_L3, PGT_L4, PGT_WRITABLE, PGT_SEG_DESC, PGT_XEN };
enum { RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8, R9, R10, R11, RIP = 16, HFLAGS = 44, CR3 = 56 };
enum { CS_SEL = 26, CS_BASE, SS_SEL = 29, FS_BASE = 36, GS_SEL = 38, GS_BASE };
#define CODE64 (1U << 15)
#define LONG_MODE (CODE64 | 1U << 4 | 1U << 5)

enum { MMU_UPDATE = 1, STACK_SWITCH = 3, XEN_VERSION = 17, IRET = 23, VCPU_OP, SET_SEGMENT_BASE };
enum { MMUEXT_OP = 26, MMUEXT_NEW_BASEPTR = 5, MMUEXT_NEW_USER_BASEPTR = 15 };
enum { VCPUOP_IS_UP = 3, VCPUOP_SET_SINGLESHOT = 8, SINGLESHOT_FUTURE = 1 };
enum { SEGBASE_FS, SEGBASE_GS_USER, SEGBASE_GS_KERNEL, SEGBASE_GS_USER_SEL };
/* Words of struct vcpu_guest_context, from its control registers on. */
enum { GDT_FRAMES = -19, GDT_ENTRIES = -3, KERNEL_SS, KERNEL_SP };
enum { USER_CR3 = 1, KERNEL_CR3 = 3, EVENT_CALLBACK = 16, GS_BASE_USER = 22 };
#define MOST_UPDATES 32
#define ENOENT 2
#define SINGLESHOT_BYTES 12
#define NEVER UINT64_MAX

#define TABLE_INDICATOR 4
#define RESERVED_GDT_ENTRIES (14 * 512) /* the first that is Xen's */
#define DESCRIPTOR_PRESENT (1ULL << 47)
#define FLAT_RING3_CS64 0xe033
#define FLAT_RING3_SS64 0xe02b
#define RFLAGS_TF 0x100ULL
#define RFLAGS_IF 0x200ULL
#define RFLAGS_LIVE 0x240dd5ULL	   /* what is the guest's */
#define RFLAGS_HIDDEN 0x3200ULL	   /* IOPL, IF: in no frame */
#define RFLAGS_CLEARED 0x54100ULL  /* AC, RF, NT, TF: on the way into the kernel */
#define VGCF_IN_SYSCALL 0x100
#define UC_RFLAGS 253 /* UC_X86_REG_RFLAGS */

#define GP_FAULT 13
#define SYSCALL_BYTES 2
#define CLOCK_MONOTONIC 1
#define NS_PER_S 1000000000ULL
#define KHZ_TO_NS 1000000ULL

struct timespec64 {
	int64_t s, ns;
};

struct mmu_request {
	uint64_t pointer, value;
};

struct mmuext_request {
	uint32_t command, padding;
	uint64_t arg1, arg2;
};

struct singleshot {
	uint64_t timeout;
	uint32_t flags;
};

struct iret_frame {
	uint64_t rax, r11, rcx, flags, rip, cs, rflags, rsp, ss;
};

struct bounce_frame {
	uint64_t rcx, r11, rip, cs, rflags, rsp, ss;
};

/* The emulator's TLB, CPUTLB: an entry is all ones where there is none. */
struct tlb_entry {
	uint64_t read, write, code, physical, addend, unused[3];
};

#define TLB_VICTIMS 8

struct tlb_mode {
	uint64_t large_address, large_mask, window_begin, window_max, used, next_victim;
	struct tlb_entry victims[TLB_VICTIMS];
	uint64_t victims_iotlb[TLB_VICTIMS][2], iotlb;
};

struct tlb {
	uint64_t counters[4]; /* the first: a bit for each mode that has entries */
	struct tlb_mode modes[3];
	uint64_t padding;
	struct {
		uint64_t mask; /* (entries - 1) * 64 */
		struct tlb_entry *entries;
	} tables[3];
};

#define LARGE_TLB 1024
#define MODE_USER 1 /* a PV guest's kernel is there too */
#define NR_BLOCK_CACHE 4096
#define MOST_STALE 16

/* *unflushed: what has changed is Python's, or in `stale` */
enum { ALL_FLUSHED, UNFLUSHED, UNFLUSHED_STALE };

struct fastpath {
	/* the emulator */
	uint64_t *registers;
	uint32_t *exception; /* error code; behind it, whether an `int` raised it */
	uint32_t *old_exception;
	void *cpu;
	void (*tlb_flush)(void *cpu);
	struct tlb *tlb;
	uint64_t *block_cache; /* of virtual addresses: tb_jmp_cache */
	int (*read_register)(void *engine, int which, void *value);
	int (*write_register)(void *engine, int which, const void *value);
	int (*clock_gettime)(int clock, struct timespec64 *now);
	/* Python's way, and the end of a crossing in which there is something to do */
	void (*slow_syscall)(void *engine, void *data);
	void (*slow_exception)(void *engine, uint32_t vector, void *data);
	void (*leave)(uint64_t skip);
	/* the machine */
	uint64_t *memory;
	uint16_t *owner;
	uint8_t *page_type;
	uint32_t *type_count;
	uint32_t *references;
	uint64_t nr_frames;
	uint64_t domid;
	/* pagetable.py: a present entry has changed since the last flush */
	uint8_t *unflushed;
	/* the domain, as of the last crossing that Python saw */
	uint64_t open; /* 0: everything is Python's */
	uint64_t in_kernel;
	uint64_t *control_registers; /* in its struct vcpu_guest_context */
	volatile uint8_t *events; /* of struct vcpu_info: pending, mask */
	uint64_t nr_vcpus;
	uint64_t version; /* what XENVER_version says */
	uint64_t clock_offset; /* the domain's time is the monotonic clock's and this */
	uint64_t khz;
	uint64_t *timer; /* of the vCPU that runs, by the domain's time */
	uint64_t deadline; /* by the monotonic clock: a timer is due */
	/* both sides */
	volatile uint64_t kicked;
	uint64_t nr_crossings;
	/* this side's: physical pages that an entry showed which has changed since the last flush */
	uint64_t nr_stale;
	uint64_t stale[MOST_STALE];
};

static uint64_t monotonic(struct fastpath *f)
{
	struct timespec64 now;

	f->clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.s * NS_PER_S + (uint64_t)now.ns;
}

static int owned(struct fastpath *f, uint64_t mfn)
{
	return mfn < f->nr_frames && f->owner[mfn] == f->domid && f->page_type[mfn] != PGT_XEN;
}

static int canonical(uint64_t address)
{
	uint64_t top = address >> 47;

	return top == 0 || top == 0x1ffff;
}

/*
 * Return where nr bytes at a guest address are, if they are in one page, whose entries all have
 * what is needed; 0 else.
 */
static void *guest_page(struct fastpath *f, uint64_t address, uint64_t nr, uint64_t need)
{
	uint64_t frame = f->registers[CR3] >> PAGE_SHIFT, entry;

	if (!canonical(address) || (address & 0xfff) + nr > 0x1000)
		return 0;
	for (int shift = 39; shift >= 12; shift -= 9) {
		if (frame >= f->nr_frames)
			return 0;
		entry = f->memory[frame << 9 | (address >> shift & 511)];
		if ((entry & need) != need || (shift > 12 && entry & PSE))
			return 0;
		frame = (entry & FRAME_MASK) >> PAGE_SHIFT;
	}
	if (frame >= f->nr_frames)
		return 0;
	return (char *)f->memory + (frame << PAGE_SHIFT | (address & 0xfff));
}

static void *guest_bytes(struct fastpath *f, uint64_t address, uint64_t nr)
{
	return guest_page(f, address, nr, PRESENT | USER);
}

/* A present entry of this frame has changed. */
static void note_stale(struct fastpath *f, uint64_t frame)
{
	if (*f->unflushed == ALL_FLUSHED)
		f->nr_stale = 0;
	if (*f->unflushed == UNFLUSHED || f->nr_stale == MOST_STALE) {
		*f->unflushed = UNFLUSHED;
		return;
	}
	*f->unflushed = UNFLUSHED_STALE;
	f->stale[f->nr_stale++] = frame << PAGE_SHIFT;
}

/* The same of an L2 or L3 table that had none: another is none either, or names a table in use. */
static int new_upper_entry(struct fastpath *f, uint64_t *slot, uint64_t new, uint8_t level)
{
	uint64_t target;

	if (*slot & PRESENT)
		return 0;
	if (new & PRESENT) {
		new |= USER;
		target = (new & FRAME_MASK) >> PAGE_SHIFT;
		if (new & UPPER_DISALLOWED || !owned(f, target) ||
		    f->page_type[target] != level - 1 || !f->type_count[target])
			return 0;
		f->type_count[target]++;
		f->references[target]++;
	}
	*slot = new;
	return 1;
}

/* PageTables.mmu_update of an entry of a table in use. 0: it is not that simple. */
static int update_entry(struct fastpath *f, uint64_t pointer, uint64_t new)
{
	uint64_t table = pointer >> PAGE_SHIFT, target, old, was;
	uint64_t *slot;

	if (pointer & 7 || !owned(f, table) || !f->type_count[table])
		return 0;
	slot = f->memory + (pointer >> 3);
	if (f->page_type[table] == PGT_L2 || f->page_type[table] == PGT_L3)
		return new_upper_entry(f, slot, new, f->page_type[table]);
	if (f->page_type[table] != PGT_L1)
		return 0;
	old = *slot;
	was = (old & FRAME_MASK) >> PAGE_SHIFT;
	if (old & PRESENT && was >= f->nr_frames)
		return 0;
	if (old & PRESENT && old & RW && (f->page_type[was] != PGT_WRITABLE || !f->type_count[was]))
		return 0;
	if (new & PRESENT) {
		new |= USER;
		target = (new & FRAME_MASK) >> PAGE_SHIFT;
		if (new & L1_DISALLOWED || !owned(f, target))
			return 0;
		if (new & RW) {
			if (f->type_count[target] && f->page_type[target] != PGT_WRITABLE)
				return 0;
			f->page_type[target] = PGT_WRITABLE;
			f->type_count[target]++;
		}
		f->references[target]++;
	}
	*slot = new;
	if (old & PRESENT) {
		f->references[was]--;
		if (old & RW && --f->type_count[was] == 0)
			f->page_type[was] = PGT_NONE;
		note_stale(f, was);
	}
	return 1;
}

static int mmu_update(struct fastpath *f)
{
	uint64_t *q = f->registers, count = q[RSI];
	struct mmu_request *request;

	if (count == 0 || count > MOST_UPDATES || q[RDX] || q[R10] != DOMID_SELF)
		return 0;
	request = guest_bytes(f, q[RDI], count * sizeof *request);
	if (!request)
		return 0;
	/* What was done before one that is not simple may be done again: it changes nothing more. */
	for (; count; count--, request++)
		if (!update_entry(f, request->pointer, request->value))
			return 0;
	q[RAX] = 0;
	return 1;
}

/* Can this be loaded, or unloaded, without a table beginning or ceasing to be one? */
static int in_use(struct fastpath *f, uint64_t mfn, uint32_t count)
{
	return owned(f, mfn) && f->page_type[mfn] == PGT_L4 && f->type_count[mfn] >= count;
}

/* Is the upper half of the address space the same with either L4 table? */
static int same_upper_half(struct fastpath *f, uint64_t one, uint64_t other)
{
	uint64_t *a = f->memory + (one << 9), *b = f->memory + (other << 9), differ = 0;

	for (int slot = 256; slot < 512; slot++)
		differ |= a[slot] ^ b[slot];
	return !(differ & ~ACCESSED_DIRTY);
}

/* Forget the lower half, and of the upper what may be an entry's that has changed. */
static void forget_entry(struct fastpath *f, struct tlb_entry *entry, uint64_t *used)
{
	uint64_t upper_half = entry->read & entry->write & entry->code, stale;

	if (upper_half == ~0ULL)
		return;
	stale = !(upper_half >> 63);
	for (uint64_t i = 0; i < f->nr_stale; i++)
		stale |= entry->physical == f->stale[i];
	if (!stale)
		return;
	*entry = (struct tlb_entry){~0ULL, ~0ULL, ~0ULL, ~0ULL, ~0ULL, {~0ULL, ~0ULL, ~0ULL}};
	(*used)--;
}

/*
 * Is the TLB of the right size? If not, the next flush changes it: it doubles one that is full, and
 * makes one smaller of which little was used in the last tenth of a second. One that is far too
 * large takes too long to go through for that.
 */
static int fits(struct tlb_mode *mode, uint64_t nr_entries)
{
	uint64_t per_cent = mode->used * 100 / nr_entries;

	if (nr_entries > LARGE_TLB && per_cent < 30) {
		mode->window_begin = 0;
		mode->window_max = mode->used;
		return 0;
	}
	return per_cent <= 70;
}

/*
 * Load an address space, as Cpu.load_cr3. Linux changes to another one and back for each patch of
 * its code; what it maps for all of them stays in the TLB, if nothing of it can have changed: the
 * same L4 entries lead to the same tables, and of these no present entry has changed since the last
 * flush, but single ones of L1 tables, of which we know what they showed.
 */
static void load_cr3(struct fastpath *f, uint64_t mfn)
{
	struct tlb_mode *mode = f->tlb->modes + MODE_USER;
	struct tlb_entry *entries = f->tlb->tables[MODE_USER].entries;
	uint64_t nr = (f->tlb->tables[MODE_USER].mask / sizeof *entries) + 1;
	uint64_t old = f->registers[CR3] >> PAGE_SHIFT, *cache = f->block_cache, cached = NR_BLOCK_CACHE;

	f->registers[CR3] = mfn << PAGE_SHIFT;
	if (*f->unflushed == ALL_FLUSHED)
		f->nr_stale = 0;
	if (*f->unflushed == UNFLUSHED || (uint16_t)f->tlb->counters[0] & ~(1U << MODE_USER) ||
	    !fits(mode, nr) || old >= f->nr_frames || !same_upper_half(f, old, mfn)) {
		f->tlb_flush(f->cpu);
	} else {
		for (uint64_t i = 0; i < nr; i++)
			forget_entry(f, entries + i, &mode->used);
		for (int i = 0; i < TLB_VICTIMS; i++)
			forget_entry(f, mode->victims + i, &(uint64_t){0});
		__asm__ volatile("rep stosq" : "+D"(cache), "+c"(cached) : "a"(0) : "memory");
	}
	/* Python goes by when it flushed itself: it shall go on to. */
	if (*f->unflushed)
		*f->unflushed = UNFLUSHED_STALE;
	f->nr_stale = 0;
}

/* NEW_BASEPTR and NEW_USER_BASEPTR, in this order: a change of address space. */
static int mmuext_op(struct fastpath *f)
{
	uint64_t *q = f->registers, *control = f->control_registers;
	struct mmuext_request *request;
	uint64_t kernel, user, old_kernel = control[KERNEL_CR3] >> PAGE_SHIFT;
	uint64_t old_user = control[USER_CR3] >> PAGE_SHIFT;

	if (q[RSI] != 2 || q[RDX] || q[R10] != DOMID_SELF)
		return 0;
	request = guest_bytes(f, q[RDI], 2 * sizeof *request);
	if (!request || request[0].command != MMUEXT_NEW_BASEPTR ||
	    request[1].command != MMUEXT_NEW_USER_BASEPTR)
		return 0;
	kernel = request[0].arg1;
	user = request[1].arg1;
	/* One table in both places would be let go of twice. */
	if (old_kernel == old_user)
		return 0;
	if (kernel != old_kernel && !(in_use(f, kernel, 1) && in_use(f, old_kernel, 2)))
		return 0;
	if ((user && !in_use(f, user, 1)) || (old_user && !in_use(f, old_user, 2)))
		return 0;
	if (kernel != old_kernel) {
		f->type_count[kernel]++;
		control[KERNEL_CR3] = kernel << PAGE_SHIFT;
		f->type_count[old_kernel]--;
	}
	load_cr3(f, kernel);
	if (user)
		f->type_count[user]++;
	control[USER_CR3] = user << PAGE_SHIFT;
	if (old_user)
		f->type_count[old_user]--;
	q[RAX] = 0;
	return 1;
}

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
static int vcpu_op(struct fastpath *f)
{
	uint64_t *q = f->registers;

	if (q[RDI] == VCPUOP_SET_SINGLESHOT)
		return set_singleshot(f);
	if ((uint32_t)q[RDI] != VCPUOP_IS_UP || (q[RDI] | q[RSI]) >> 31 || q[RSI] < f->nr_vcpus)
		return 0;
	q[RAX] = -ENOENT;
	return 1;
}

static int stack_switch(struct fastpath *f)
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
	control[GS_BASE_USER] = (descriptor >> 16 & 0xffffff) | (descriptor >> 32 & 0xff000000);
	return 1;
}

static int set_segment_base(struct fastpath *f)
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
static int xen_version(struct fastpath *f)
{
	if (f->registers[RDI])
		return 0;
	f->registers[RAX] = f->version;
	return 1;
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
void fastpath_syscall(void *engine, struct fastpath *f)
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
void fastpath_exception(void *engine, uint32_t vector, struct fastpath *f)
{
	if (!f->open || vector != GP_FAULT || !privileged(f, engine))
		f->slow_exception(engine, vector, 0);
}

/* The size of what Python has to fill in. */
const uint64_t fastpath_bytes = sizeof(struct fastpath);
