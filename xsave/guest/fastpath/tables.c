/*
 * tables.c - single changes of page-table entries (pagetable.py).
 */
#include "fastpath.h"

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

int mmu_update(struct fastpath *f)
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
