/*
 * paging.c - from the builder's boot mapping to the kernel's own address space.
 *
 * The builder maps, from VIRT_BASE on, the kernel and what it made for it, and a little slack.
 * paging_init() makes the direct map (every pfn at PAGE_OFFSET + pfn * 4096) out of that slack
 * and then of what it has mapped so far, and takes the boot mapping of everything but the
 * kernel image away. After that each frame has one writable mapping at most and becomes a page
 * table by one change, make_page_readonly().
 *
 * Rule of Xen's: a frame that is (part of) a page table may not be mapped writable anywhere.
 */
#include "hypercall.h"
#include "mm.h"
#include "sched.h"

extern char _text[], _end[];

struct mm_struct init_mm = { .mmlist = LIST_HEAD_INIT(init_mm.mmlist) };

static u64 boot_pfns;		/* pfns below this are mapped at VIRT_BASE */
static u64 direct_pfns;		/* pfns below this are mapped at PAGE_OFFSET */
static u64 tables_start, next_pfn;	/* tables made here: [tables_start, next_pfn) */

static u64 boot_va_to_pfn(u64 va)
{
	return (va - VIRT_BASE) >> PAGE_SHIFT;
}

/* One beyond the highest pfn the builder put anything in. */
u64 boot_structures_end(void)
{
	struct start_info *si = xen_start_info;
	u64 end = boot_va_to_pfn((u64)_end);

	end = max(end, boot_va_to_pfn((u64)si) + 1);
	end = max(end, boot_va_to_pfn(si->pt_base) + si->nr_pt_frames);
	end = max(end, boot_va_to_pfn(si->mfn_list + si->nr_pages * 8 + PAGE_SIZE - 1));
	end = max(end, mfn_to_pfn(si->console_mfn) + 1);
	end = max(end, mfn_to_pfn(si->store_mfn) + 1);
	return end;
}

/* Where a frame can be reached while both mappings are in the making. */
static void *early_virt(u64 pfn)
{
	return pfn < direct_pfns ? pfn_to_virt(pfn) : (void *)(VIRT_BASE + (pfn << PAGE_SHIFT));
}

static u64 *early_table(u64 entry)
{
	return early_virt(pte_pfn(entry));
}

static noinline void map_page(u64 va, u64 pte)
{
	BUG_ON(HYPERVISOR_update_va_mapping(va, pte, UVMF_INVLPG));
}

static int is_boot_table(u64 pfn)
{
	u64 first = boot_va_to_pfn(xen_start_info->pt_base);

	return (pfn >= first && pfn < first + xen_start_info->nr_pt_frames) ||
	       (pfn >= tables_start && pfn < next_pfn);
}

/* Take the next free frame for a table; it is still writable. */
static u64 early_alloc_table(void)
{
	u64 pfn = next_pfn++;

	BUG_ON(pfn >= max(boot_pfns, direct_pfns));
	memset(early_virt(pfn), 0, PAGE_SIZE);
	return pfn;
}

/* Make a filled table read-only wherever it is mapped, and enter it into its parent. */
static noinline void link_table(u64 *parent, u32 index, u64 pfn)
{
	u64 parent_pfn = (u64)parent >= VIRT_BASE ? boot_va_to_pfn((u64)parent)
						  : virt_to_pfn(parent);
	u64 *entry = early_virt(parent_pfn);

	if (pfn < boot_pfns)
		map_page(VIRT_BASE + (pfn << PAGE_SHIFT), make_pte(pfn, PAGE_KERNEL_RO));
	if (pfn < direct_pfns)
		map_page((u64)pfn_to_virt(pfn), make_pte(pfn, PAGE_KERNEL_RO));
	queue_mmu_update(entry + index, make_pte(pfn, PAGE_TABLE));
	flush_mmu_updates();
}

/* The next-level table behind parent[index], made if there is none. */
static noinline u64 *next_table(u64 *parent, u32 index)
{
	if (!(parent[index] & _PAGE_PRESENT))
		link_table(parent, index, early_alloc_table());
	return early_table(parent[index]);
}

static noinline void fill_direct_table(u64 *table, u64 first)
{
	u64 i, pfn;

	for (i = 0, pfn = first; i < PTRS_PER_TABLE && pfn < max_pfn; i++, pfn++)
		table[i] = make_pte(pfn, is_boot_table(pfn) ? PAGE_KERNEL_RO : PAGE_KERNEL);
}

/* Extend the direct map by one L1 table, 2 MiB. */
static noinline void map_direct_chunk(u64 first)
{
	u64 va = (u64)pfn_to_virt(first), pfn;
	u64 *l3 = next_table(early_virt(virt_to_pfn(init_mm.pgd)), table_index(va, 4));
	u64 *l2 = next_table(l3, table_index(va, 3));

	pfn = early_alloc_table();
	fill_direct_table(early_virt(pfn), first);
	link_table(l2, table_index(va, 2), pfn);
	direct_pfns = min(first + PTRS_PER_TABLE, max_pfn);
}

static noinline u64 *boot_l2(void)
{
	u64 *l3 = early_table(init_mm.pgd[table_index(VIRT_BASE, 4)]);

	return early_table(l3[table_index(VIRT_BASE, 3)]);
}

static noinline u64 count_boot_pfns(void)
{
	u64 *l2 = boot_l2(), i = 0, j;

	while (i < PTRS_PER_TABLE && l2[i] & _PAGE_PRESENT)
		i++;
	for (j = PTRS_PER_TABLE; j && !(early_table(l2[i - 1])[j - 1] & _PAGE_PRESENT); j--)
		;
	return (i - 1) * PTRS_PER_TABLE + j;
}

/* Remove one boot L1 table whole, and give its frame back. */
static noinline void zap_boot_table(u64 *l2, u32 index)
{
	u64 *table = early_table(l2[index]);

	queue_mmu_update(l2 + index, 0);
	flush_mmu_updates();
	make_page_readwrite(table);
	free_page(table);
}

/* Leave only [_text, _end) mapped at VIRT_BASE. By now all pointers lead to the direct map. */
noinline void paging_drop_boot_mapping(void)
{
	u64 first = boot_va_to_pfn((u64)_text), last = boot_va_to_pfn((u64)_end), pfn;
	u64 *l2 = boot_l2(), *l1 = early_table(l2[0]);
	struct mmuext_op flush = { .cmd = MMUEXT_TLB_FLUSH_LOCAL };
	u32 i;

	BUG_ON(last > PTRS_PER_TABLE);
	for (pfn = 0; pfn < min(boot_pfns, PTRS_PER_TABLE); pfn++)
		if (pfn < first || pfn >= last)
			queue_mmu_update(l1 + pfn, 0);
	flush_mmu_updates();
	HYPERVISOR_mmuext_op(&flush, 1);
	for (i = 1; i < PTRS_PER_TABLE && l2[i] & _PAGE_PRESENT; i++)
		zap_boot_table(l2, i);
	HYPERVISOR_mmuext_op(&flush, 1);
}

/* Build the direct map and move our pointers there. Returns the first pfn nobody uses. */
noinline u64 paging_init(u64 first_free_pfn)
{
	struct start_info *si = xen_start_info;
	u64 first;

	init_mm.pgd = (u64 *)si->pt_base;
	init_mm.pinned = 1;
	tables_start = next_pfn = first_free_pfn;
	boot_pfns = count_boot_pfns();
	for (first = 0; first < max_pfn; first += PTRS_PER_TABLE)
		map_direct_chunk(first);
	init_mm.pgd = pfn_to_virt(boot_va_to_pfn(si->pt_base));
	p2m_use_boot_list(pfn_to_virt(boot_va_to_pfn(si->mfn_list)));
	xen_start_info = pfn_to_virt(boot_va_to_pfn((u64)si));
	return next_pfn;
}
