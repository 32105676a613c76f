/*
 * user_space.c - the pages of an mmtest thread: where they are, what is in them, and all ways Xen
 * offers to enter them into page tables.
 */
#include "hypercall.h"
#include "pattern.h"
#include "sched.h"
#include "user_space.h"

/* Low, in the middle, and spread downwards over many L1 tables as stacks are. */
u64 slot_va(u32 slot)
{
	u64 i = slot / 3;

	switch (slot % 3) {
	case 0: return 0x0000000000400000UL + i * PAGE_SIZE;
	case 1: return 0x0000555555554000UL + i * PAGE_SIZE;
	default: return 0x00007fffffffe000UL - i * 0x201000UL;
	}
}

static u64 content_word(struct user_space *us, u64 content, u64 i)
{
	return hash64(us->life << 16 | content) + i;
}

void fill_page(struct user_space *us, u64 *page, u64 content)
{
	u64 i;

	for (i = 0; i < WORDS; i++)
		page[i] = content_word(us, content, i);
}

void check_page(struct user_space *us, const u64 *page, u64 content)
{
	u64 i;

	for (i = 0; i < WORDS; i++)
		if (READ_ONCE(page[i]) != content_word(us, content, i))
			check_failed("user page, address", (u64)(page + i));
}

/* 0; -1: no memory for a table on the way. */
__pgtable int map_page(struct mm_struct *mm, u64 va, u64 pfn, u64 flags)
{
	u64 *entry = pte_alloc(mm, va);

	if (!entry)
		return -1;
	set_entry(mm, entry, make_pte(pfn, flags));
	return 0;
}

__pgtable int maps_pfn(struct mm_struct *mm, u64 va, u64 pfn)
{
	const u64 *entry = pte_lookup(mm, va);
	u64 pte = entry ? READ_ONCE(*entry) : 0;

	return pte & _PAGE_PRESENT && pte_pfn(pte) == pfn;
}

/* The page itself is the caller's to free. */
__pgtable void unmap_page(struct mm_struct *mm, u64 va)
{
	set_entry(mm, pte_lookup(mm, va), 0);
}

/* One mmu_update batch for all slots, one flush. */
__pgtable void remap_slots(struct user_space *us)
{
	u32 i;

	preempt_disable();
	for (i = 0; i < us->nr; i++)
		queue_mmu_update(pte_lookup(&us->mm, slot_va(i)),
				 make_pte(us->pfn[i], PAGE_USER_DATA));
	flush_mmu_updates();
	flush_tlb();
	preempt_enable();
}

/* Through the hypercall for addresses of the running address space. */
static __pgtable void update_va(u64 va, u64 pte)
{
	if (HYPERVISOR_update_va_mapping(va, pte, UVMF_INVLPG))
		panic("update_va_mapping of user address %lx refused", va);
}

__pgtable void update_slot(struct user_space *us, u32 slot, u64 flags)
{
	update_va(slot_va(slot), make_pte(us->pfn[slot], flags));
}

void update_slot_away(u32 slot)
{
	update_va(slot_va(slot), 0);
}

/* No other CPU runs in an address space of this one's threads. */
void flush_tlb(void)
{
	static struct mmuext_op flush = { .cmd = MMUEXT_TLB_FLUSH_LOCAL };

	HYPERVISOR_mmuext_op(&flush, 1);
}
