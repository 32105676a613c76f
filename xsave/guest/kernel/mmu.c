/*
 * mmu.c - the paths by which a page-table entry changes.
 *
 * A table Xen does not know yet is ordinary memory: a plain store. A pinned one is read-only and
 * changes by hypercall: mmu_update in batches for any table of ours, update_va_mapping for an
 * address of the running address space. Every buffer that held a pte is zeroed behind the call.
 */
#include "hypercall.h"
#include "mm.h"
#include "sched.h"

static struct mmu_batch {
	struct mmu_update req[64];
	u32 count;
} batches[NR_CPUS];

__pgtable void flush_mmu_updates(void)
{
	struct mmu_batch *batch = &batches[this_cpu()->id];
	u32 count = batch->count;

	if (!count)
		return;
	if (HYPERVISOR_mmu_update(batch->req, count))
		panic("mmu_update of %u entries refused", count);
	memset(batch->req, 0, count * sizeof(batch->req[0]));
	batch->count = 0;
}

/*
 * Remember a change; it happens with flush_mmu_updates(). The batch is this CPU's: the caller
 * keeps preemption off from the first of them to the flush.
 */
__pgtable void queue_mmu_update(const u64 *entry, u64 pte)
{
	struct mmu_batch *batch = &batches[this_cpu()->id];
	struct mmu_update *req = &batch->req[batch->count++];

	req->ptr = virt_to_machine(entry) | MMU_NORMAL_PT_UPDATE;
	req->val = pte;
	if (batch->count == ARRAY_SIZE(batch->req))
		flush_mmu_updates();
}

/*
 * Change one entry of a table of `mm`, by the path its state asks for. The pte was made by the
 * caller and came here in a register, as in Linux: where a thread can be preempted, it can be
 * preempted with that mfn in its hands.
 */
__pgtable void set_entry(struct mm_struct *mm, u64 *entry, u64 pte)
{
	if (!mm->pinned) {
		WRITE_ONCE(*entry, pte);
		return;
	}
	preempt_disable();
	queue_mmu_update(entry, pte);
	flush_mmu_updates();
	preempt_enable();
}

/* Other permissions for the page at `va`: read the pte, modify it, write it back. */
__pgtable void change_protection(struct mm_struct *mm, u64 va, u64 flags)
{
	u64 *entry = pte_lookup(mm, va);

	if (entry)
		set_entry(mm, entry, pte_modify(READ_ONCE(*entry), flags));
}

/* In the direct map, which every CPU uses: none may go on with an old translation. */
static __pgtable void protect_page(const void *page, u64 flags)
{
	u64 pte = make_pte(virt_to_pfn(page), flags);

	if (HYPERVISOR_update_va_mapping((u64)page, pte, UVMF_INVLPG | UVMF_ALL))
		panic("update_va_mapping of %p refused", page);
}

__pgtable void make_page_readonly(const void *page)
{
	protect_page(page, PAGE_KERNEL_RO);
}

__pgtable void make_page_readwrite(const void *page)
{
	protect_page(page, PAGE_KERNEL);
}

/* The L1 entry of `va`, or NULL where a table is missing on the way. */
__pgtable u64 *pte_lookup(struct mm_struct *mm, u64 va)
{
	u64 *table = mm->pgd;
	int level;

	for (level = 4; level > 1; level--) {
		u64 entry = READ_ONCE(table[table_index(va, level)]);

		if (!(entry & _PAGE_PRESENT))
			return NULL;
		table = pfn_to_virt(pte_pfn(entry));
	}
	return table + table_index(va, 1);
}

/* Add an empty table below `entry`; in a pinned mm it has to be read-only first. */
static __pgtable int alloc_table(struct mm_struct *mm, u64 *entry)
{
	void *table = alloc_page();

	if (!table)
		return -1;
	if (mm->pinned)
		make_page_readonly(table);
	set_entry(mm, entry, make_pte(virt_to_pfn(table), PAGE_TABLE));
	return 0;
}

/*
 * The same, making the missing tables: each is linked into its parent before anything is put
 * into it, so that at any moment all tables with an mfn in them hang below an L4.
 */
__pgtable u64 *pte_alloc(struct mm_struct *mm, u64 va)
{
	u64 *table = mm->pgd, *entry;
	int level;

	for (level = 4; level > 1; level--) {
		entry = table + table_index(va, level);
		if (!(READ_ONCE(*entry) & _PAGE_PRESENT) && alloc_table(mm, entry))
			return NULL;
		table = pfn_to_virt(pte_pfn(READ_ONCE(*entry)));
	}
	return table + table_index(va, 1);
}

/* Run on the tables of `mm`. The request lives in the per-CPU area: schedule() calls this on
 * the stacks of threads that are never frozen. */
__pgtable void load_cr3(struct mm_struct *mm)
{
	struct mmuext_op *op = &this_cpu()->new_baseptr;

	op->cmd = MMUEXT_NEW_BASEPTR;
	op->arg1 = pfn_to_mfn(virt_to_pfn(mm->pgd));
	if (HYPERVISOR_mmuext_op(op, 1))
		panic("new base pointer refused");
	op->arg1 = 0;
}

__pgtable void switch_mm(struct mm_struct *next)
{
	struct cpu *cpu = this_cpu();

	if (cpu->active_mm == next)
		return;
	cpu->active_mm = next;
	load_cr3(next);
}
