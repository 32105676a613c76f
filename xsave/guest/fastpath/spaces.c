/*
 * spaces.c - changes of the address space, and what the emulator may keep of its TLB then.
 */
#include "fastpath.h"

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
int mmuext_op(struct fastpath *f)
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
