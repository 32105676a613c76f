/*
 * mm.c - address spaces: made, pinned, unpinned, torn down.
 *
 * An mm is known (in mm_list) from the moment its L4 holds an mfn until it holds none, so that a
 * suspend finds it in whatever state its owner was frozen: mm_pin_all() then makes page tables
 * of the half-built ones as well, and the toolstack sees their type and converts them.
 */
#include "hypercall.h"
#include "mm.h"
#include "sched.h"

#define KERNEL_L4_START table_index(PAGE_OFFSET, 4)
#define USER_L4_SLOTS 256

static struct list_head mm_list = LIST_HEAD_INIT(mm_list);

/* Calls for one multicall: the read-only (or writable) remaps of a whole address space. */
static struct {
	struct multicall_entry call[32];
	u32 count;
} calls;

static __pgtable void flush_calls(void)
{
	u32 count = calls.count, i;

	if (!count)
		return;
	if (HYPERVISOR_multicall(calls.call, count))
		panic("multicall refused");
	for (i = 0; i < count; i++)
		if (calls.call[i].result)
			panic("call %u of a multicall refused: %ld", i, calls.call[i].result);
	memset(calls.call, 0, count * sizeof(calls.call[0]));
	calls.count = 0;
}

static __pgtable void queue_protect(u64 *table, u64 flags)
{
	struct multicall_entry *call = &calls.call[calls.count++];

	call->op = __HYPERVISOR_update_va_mapping;
	call->args[0] = (u64)table;
	call->args[1] = make_pte(virt_to_pfn(table), flags);
	call->args[2] = UVMF_INVLPG;
	if (calls.count == ARRAY_SIZE(calls.call))
		flush_calls();
}

/* Apply fn to every table of the user half, the lower ones first. */
static __pgtable void for_each_table(u64 *table, int level, void (*fn)(u64 *table))
{
	u32 i, slots = level == 4 ? USER_L4_SLOTS : PTRS_PER_TABLE;

	for (i = 0; level > 1 && i < slots; i++)
		if (table[i] & _PAGE_PRESENT)
			for_each_table(pfn_to_virt(pte_pfn(table[i])), level - 1, fn);
	fn(table);
}

static void queue_readonly(u64 *table)
{
	queue_protect(table, PAGE_KERNEL_RO);
}

static void queue_readwrite(u64 *table)
{
	queue_protect(table, PAGE_KERNEL);
}

static __pgtable void pin_op(u32 cmd, u64 *pgd)
{
	static struct mmuext_op op;

	op.cmd = cmd;
	op.arg1 = pfn_to_mfn(virt_to_pfn(pgd));
	if (HYPERVISOR_mmuext_op(&op, 1))
		panic("mmuext_op %u of pgd %p refused", cmd, (void *)pgd);
	op.arg1 = 0;
}

/* Turn the memory of an address space into page tables, for Xen: read-only, typed, pinned. */
__pgtable void mm_pin(struct mm_struct *mm)
{
	preempt_disable();
	for_each_table(mm->pgd, 4, queue_readonly);
	flush_calls();
	pin_op(MMUEXT_PIN_L4_TABLE, mm->pgd);
	mm->pinned = 1;
	preempt_enable();
}

/* And back into plain memory. No CPU may be running on it. */
__pgtable void mm_unpin(struct mm_struct *mm)
{
	preempt_disable();
	BUG_ON(this_cpu()->active_mm == mm);
	pin_op(MMUEXT_UNPIN_TABLE, mm->pgd);
	for_each_table(mm->pgd, 4, queue_readwrite);
	flush_calls();
	mm->pinned = 0;
	preempt_enable();
}

/* A new address space with the kernel's half and an empty user half; pgd NULL: no memory. */
__pgtable void mm_init(struct mm_struct *mm)
{
	mm->pinned = mm->pinned_for_suspend = 0;
	mm->pgd = alloc_page();
	if (!mm->pgd)
		return;
	preempt_disable();
	list_add_tail(&mm->mmlist, &mm_list);
	memcpy(mm->pgd + KERNEL_L4_START, init_mm.pgd + KERNEL_L4_START,
	       (PTRS_PER_TABLE - KERNEL_L4_START) * sizeof(u64));
	preempt_enable();
}

static void free_table(u64 *table)
{
	free_page(table);
}

/* Free all tables of an unpinned mm; what they map is the caller's. */
__pgtable void mm_exit(struct mm_struct *mm)
{
	BUG_ON(mm->pinned);
	preempt_disable();
	for_each_table(mm->pgd, 4, free_table);
	list_del_init(&mm->mmlist);
	mm->pgd = NULL;
	preempt_enable();
}

/* Pre-suspend: no table with an mfn in it may be without a type. */
noinline void mm_pin_all(void)
{
	struct mm_struct *mm;

	list_for_each_entry(mm, &mm_list, mmlist) {
		if (mm->pinned)
			continue;
		mm_pin(mm);
		mm->pinned_for_suspend = 1;
	}
}

/* Post-suspend: give the owners back what they had. */
noinline void mm_unpin_all(void)
{
	struct mm_struct *mm;

	list_for_each_entry(mm, &mm_list, mmlist) {
		if (!mm->pinned_for_suspend)
			continue;
		mm_unpin(mm);
		mm->pinned_for_suspend = 0;
	}
}
