/*
 * p2m.c - where the toolstack finds the p2m list: a tree of mfns in ordinary pages.
 *
 * shared_info.arch.pfn_to_mfn_frame_list_list holds the mfn of the top page; its entries are the
 * mfns of list pages; their entries are the mfns of the p2m's own pages (512 pfns each). p2m_cr3
 * stays 0: no linear list is offered. All of it is rebuilt after each suspend.
 */
#include "mm.h"

#define PER_PAGE (PAGE_SIZE / sizeof(u64))
#define MAX_LISTS 16		/* 16 GiB: a list page covers 512 * 512 pfns */

static u64 *top;		/* pfn_to_mfn_frame_list_list */
static u64 *lists[MAX_LISTS];	/* the list pages, in order */
static u32 nr_lists;

void p2m_init(void)
{
	u32 i;

	nr_lists = (max_pfn + PER_PAGE * PER_PAGE - 1) / (PER_PAGE * PER_PAGE);
	BUG_ON(nr_lists > MAX_LISTS);
	top = alloc_page();
	BUG_ON(!top);
	for (i = 0; i < nr_lists; i++) {
		lists[i] = alloc_page();
		BUG_ON(!lists[i]);
	}
	build_mfn_list_list();
}

noinline void build_mfn_list_list(void)
{
	u64 first = virt_to_pfn(phys_to_machine_mapping);
	u64 nr_pages = (max_pfn + PER_PAGE - 1) / PER_PAGE, i;

	for (i = 0; i < nr_lists; i++)
		top[i] = pfn_to_mfn(virt_to_pfn(lists[i]));
	for (i = 0; i < nr_pages; i++)
		lists[i / PER_PAGE][i % PER_PAGE] = pfn_to_mfn(first + i);
}

noinline void publish_mfn_list_list(struct shared_info *shared)
{
	shared->arch.max_pfn = max_pfn;
	shared->arch.pfn_to_mfn_frame_list_list = pfn_to_mfn(virt_to_pfn(top));
	shared->arch.p2m_cr3 = 0;
}
