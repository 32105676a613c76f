/*
 * mm.c - address spaces: made, pinned, unpinned, torn down.
 *
 * An mm is known (in mm_list) from the moment its L4 holds an mfn until it holds none, and at each
 * moment all its tables hang below that L4. So a suspend finds it in whatever state its owner was
 * stopped, be it in the middle of a function here: mm_pin_all() makes page tables of the
 * half-built ones as well, and the toolstack sees their type and converts them. Afterwards the
 * owner finds them as they were: memory, or on the way to being tables.
 *
 * The walks are preemptible. Their ptes are in registers and on the stack meanwhile.
 */
#include "hypercall.h"
#include "mm.h"
#include "sched.h"

#define KERNEL_L4_START table_index(PAGE_OFFSET, 4)
#define USER_L4_SLOTS 256

static struct list_head mm_list = LIST_HEAD_INIT(mm_list);
static struct spinlock mmlist_lock;

/* Calls for one multicall: the remaps of all tables that hang below one. Preemption is off. */
static struct multicall_buffer {
	struct multicall_entry call[32];
	u32 count;
} buffers[NR_CPUS];

static __pgtable void flush_calls(void)
{
	struct multicall_buffer *calls = &buffers[this_cpu()->id];
	u32 count = calls->count, i;

	if (!count)
		return;
	if (HYPERVISOR_multicall(calls->call, count))
		panic("multicall refused");
	for (i = 0; i < count; i++)
		if (calls->call[i].result)
			panic("call %u of a multicall refused: %ld", i, calls->call[i].result);
	memset(calls->call, 0, count * sizeof(calls->call[0]));
	calls->count = 0;
}

static __pgtable void queue_protect(u64 *table, u64 flags)
{
	struct multicall_buffer *calls = &buffers[this_cpu()->id];
	struct multicall_entry *call = &calls->call[calls->count++];

	call->op = __HYPERVISOR_update_va_mapping;
	call->args[0] = (u64)table;
	call->args[1] = make_pte(virt_to_pfn(table), flags);
	call->args[2] = UVMF_INVLPG | UVMF_ALL;
	if (calls->count == ARRAY_SIZE(calls->call))
		flush_calls();
}

/* Entries of a table of `level` that are the address space's own. */
static u32 nr_slots(int level)
{
	return level == 4 ? USER_L4_SLOTS : PTRS_PER_TABLE;
}

static __pgtable void protect_children(const u64 *table, int level, u64 flags)
{
	u32 i;

	preempt_disable();
	for (i = 0; i < nr_slots(level); i++)
		if (table[i] & _PAGE_PRESENT)
			queue_protect(pfn_to_virt(pte_pfn(table[i])), flags);
	flush_calls();
	preempt_enable();
}

/* All tables below `table`: read-only for the life of page tables, or writable memory again. */
static __pgtable void protect_tables(const u64 *table, int level, u64 flags)
{
	u32 i;

	for (i = 0; level > 2 && i < nr_slots(level); i++)
		if (table[i] & _PAGE_PRESENT)
			protect_tables(pfn_to_virt(pte_pfn(table[i])), level - 1, flags);
	protect_children(table, level, flags);
}

/* One request: a pgd is pinned when `pinned` says so, whatever moment a suspend looks. */
static __pgtable void pin_op(struct mm_struct *mm, u32 cmd)
{
	static struct mmuext_op ops[NR_CPUS];
	struct mmuext_op *op;

	preempt_disable();
	op = &ops[this_cpu()->id];
	op->cmd = cmd;
	op->arg1 = pfn_to_mfn(virt_to_pfn(mm->pgd));
	if (HYPERVISOR_mmuext_op(op, 1))
		panic("mmuext_op %u of pgd %p refused", cmd, (void *)mm->pgd);
	op->arg1 = 0;
	mm->pinned = cmd == MMUEXT_PIN_L4_TABLE;
	mm->pinning = 0;
	preempt_enable();
}

/* Turn the memory of an address space into page tables, for Xen: read-only, typed, pinned. */
__pgtable void mm_pin(struct mm_struct *mm)
{
	mm->pinning = 1;
	barrier();
	protect_tables(mm->pgd, 4, PAGE_KERNEL_RO);
	make_page_readonly(mm->pgd);
	pin_op(mm, MMUEXT_PIN_L4_TABLE);
}

/* And back into plain memory. No CPU may be running on it. */
__pgtable void mm_unpin(struct mm_struct *mm)
{
	BUG_ON(this_cpu()->active_mm == mm);
	pin_op(mm, MMUEXT_UNPIN_TABLE);
	make_page_readwrite(mm->pgd);
	protect_tables(mm->pgd, 4, PAGE_KERNEL);
}

/* A new address space with the kernel's half and an empty user half; pgd NULL: no memory. */
__pgtable void mm_init(struct mm_struct *mm)
{
	mm->pinned = mm->pinning = mm->pinned_for_suspend = 0;
	mm->pgd = alloc_page();
	if (!mm->pgd)
		return;
	spin_lock(&mmlist_lock);
	list_add_tail(&mm->mmlist, &mm_list);
	spin_unlock(&mmlist_lock);
	memcpy(mm->pgd + KERNEL_L4_START, init_mm.pgd + KERNEL_L4_START,
	       (PTRS_PER_TABLE - KERNEL_L4_START) * sizeof(u64));
}

/* A table leaves its parent when it is empty, and is free after that. */
static __pgtable void free_tables(u64 *table, int level)
{
	u64 *child;
	u32 i;

	for (i = 0; level > 1 && i < nr_slots(level); i++) {
		if (!(table[i] & _PAGE_PRESENT))
			continue;
		child = pfn_to_virt(pte_pfn(table[i]));
		free_tables(child, level - 1);
		WRITE_ONCE(table[i], 0);
		free_page(child);
	}
}

/* Free all tables of an unpinned mm; what they map is the caller's, and unmapped. */
__pgtable void mm_exit(struct mm_struct *mm)
{
	BUG_ON(mm->pinned);
	free_tables(mm->pgd, 4);
	memset(mm->pgd, 0, PAGE_SIZE);
	spin_lock(&mmlist_lock);
	list_del_init(&mm->mmlist);
	spin_unlock(&mmlist_lock);
	free_page(mm->pgd);
	mm->pgd = NULL;
}

/* Pre-suspend: no table with an mfn in it may be without a type. */
noinline void mm_pin_all(void)
{
	struct mm_struct *mm;
	int pinning;

	spin_lock(&mmlist_lock);
	list_for_each_entry(mm, &mm_list, mmlist) {
		if (mm->pinned)
			continue;
		pinning = mm->pinning;
		mm_pin(mm);
		mm->pinning = pinning;
		mm->pinned_for_suspend = 1;
	}
	spin_unlock(&mmlist_lock);
}

/* Post-suspend: give the owners back what they had. One who was pinning has them read-only. */
noinline void mm_unpin_all(void)
{
	struct mm_struct *mm;
	int pinning;

	spin_lock(&mmlist_lock);
	list_for_each_entry(mm, &mm_list, mmlist) {
		if (!mm->pinned_for_suspend)
			continue;
		pinning = mm->pinning;
		if (pinning)
			pin_op(mm, MMUEXT_UNPIN_TABLE);
		else
			mm_unpin(mm);
		mm->pinning = pinning;
		mm->pinned_for_suspend = 0;
	}
	spin_unlock(&mmlist_lock);
}
