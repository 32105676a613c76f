/*
 * p2m.c - the p2m: which mfn stands behind each pfn, in leaves of one page, and how the toolstack
 * finds them.
 *
 *     p2m_top[pfn / 512] -> leaf[pfn % 512] = mfn, or INVALID_P2M_ENTRY for a hole
 *
 * The p2m has room for MAX_DOMAIN_PAGES and grows by leaves. Where 512 pfns in a row are holes,
 * all share one leaf, p2m_missing, so that a table with large gaps is small and yet complete for
 * those who read it from outside. They find it through a tree of mfns: shared_info names the
 * top page, its entries are list pages, their entries the leaves; again, one list page of
 * nothing but p2m_missing serves for every gap. The tree is rebuilt after each suspend: its mfns
 * are the old host's, the leaves' contents the toolstack's work. p2m_cr3 stays 0, as no linear
 * list is offered.
 */
#include "events.h"
#include "mm.h"

#define MAX_DOMAIN_PAGES (16UL << 30 >> PAGE_SHIFT)
#define TOP_ENTRIES (MAX_DOMAIN_PAGES / P2M_PER_PAGE)
#define MAX_LISTS (TOP_ENTRIES / P2M_PER_PAGE)

u64 *p2m_top[TOP_ENTRIES];	/* NULL beyond max_pfn */
u64 max_pfn;

static u64 p2m_missing[P2M_PER_PAGE] __attribute__((aligned(PAGE_SIZE)));
static u64 list_missing[P2M_PER_PAGE] __attribute__((aligned(PAGE_SIZE)));
static u64 *top;		/* pfn_to_mfn_frame_list_list */
static u64 *lists[MAX_LISTS];	/* the list pages, or list_missing */

static u64 nr_leaves(void)
{
	return (max_pfn + P2M_PER_PAGE - 1) / P2M_PER_PAGE;
}

/* The builder's list is an array of leaves already; called again when its address changes. */
void p2m_use_boot_list(u64 *mfn_list)
{
	u64 i;

	max_pfn = xen_start_info->nr_pages;
	if (max_pfn > MAX_DOMAIN_PAGES)
		panic("%lu pages: no more than %lu can be used", max_pfn, MAX_DOMAIN_PAGES);
	for (i = 0; i < nr_leaves(); i++)
		p2m_top[i] = mfn_list + i * P2M_PER_PAGE;
}

/* What a reader of the whole table sees: every pfn has a leaf, and the last one ends in holes. */
void p2m_init(void)
{
	u64 i;

	for (i = 0; i < P2M_PER_PAGE; i++)
		p2m_missing[i] = INVALID_P2M_ENTRY;
	for (i = max_pfn; i % P2M_PER_PAGE; i++)
		p2m_top[i / P2M_PER_PAGE][i % P2M_PER_PAGE] = INVALID_P2M_ENTRY;
	top = alloc_page();
	BUG_ON(!top);
	for (i = 0; i < nr_leaves(); i += P2M_PER_PAGE) {
		lists[i / P2M_PER_PAGE] = alloc_page();
		BUG_ON(!lists[i / P2M_PER_PAGE]);
	}
	build_mfn_list_list();
}

/* The mfn of any pfn at all, INVALID_P2M_ENTRY where there is none. */
noinline u64 get_phys_to_machine(u64 pfn)
{
	return pfn < max_pfn ? pfn_to_mfn(pfn) : INVALID_P2M_ENTRY;
}

/* Only for pfns that p2m_grow() made room for. */
noinline void set_phys_to_machine(u64 pfn, u64 mfn)
{
	BUG_ON(pfn >= max_pfn || p2m_top[pfn / P2M_PER_PAGE] == p2m_missing);
	p2m_top[pfn / P2M_PER_PAGE][pfn % P2M_PER_PAGE] = mfn;
}

/* A leaf of its own for `pfn`, all holes so far, known to the tree; -1 without memory. */
static noinline int alloc_leaf(u64 pfn)
{
	u64 index = pfn / P2M_PER_PAGE, *leaf;

	if (!lists[index / P2M_PER_PAGE] || lists[index / P2M_PER_PAGE] == list_missing) {
		u64 *list = alloc_page();

		if (!list)
			return -1;
		lists[index / P2M_PER_PAGE] = list;
	}
	leaf = alloc_page();
	if (!leaf)
		return -1;
	memcpy(leaf, p2m_missing, PAGE_SIZE);
	p2m_top[index] = leaf;
	return 0;
}

/* Make room for `pfn`, with a gap of holes if it is not the next one; -1 if there is none. */
noinline int p2m_grow(u64 pfn)
{
	u64 i, end = pfn / P2M_PER_PAGE;

	if (pfn >= MAX_DOMAIN_PAGES)
		return -1;
	for (i = nr_leaves(); i <= end; i++)
		p2m_top[i] = p2m_missing;
	for (i = 0; i <= end / P2M_PER_PAGE; i++)
		if (!lists[i])
			lists[i] = list_missing;
	if (p2m_top[end] == p2m_missing && alloc_leaf(pfn))
		return -1;
	max_pfn = max(max_pfn, pfn + 1);
	build_mfn_list_list();
	publish_mfn_list_list(HYPERVISOR_shared_info);
	return 0;
}

/* One list page for all gaps; while there is none, no mfn in a page nobody knows of. */
static noinline void build_list_missing(u64 nr_lists)
{
	u64 entry = 0, i;

	for (i = 0; i < nr_lists; i++)
		if (lists[i] == list_missing)
			entry = pfn_to_mfn(virt_to_pfn(p2m_missing));
	for (i = 0; i < P2M_PER_PAGE; i++)
		list_missing[i] = entry;
}

noinline void build_mfn_list_list(void)
{
	u64 leaves = nr_leaves(), nr_lists = (leaves + P2M_PER_PAGE - 1) / P2M_PER_PAGE, i;

	build_list_missing(nr_lists);
	for (i = 0; i < leaves; i++)
		if (lists[i / P2M_PER_PAGE] != list_missing)
			lists[i / P2M_PER_PAGE][i % P2M_PER_PAGE] =
				pfn_to_mfn(virt_to_pfn(p2m_top[i]));
	for (i = 0; i < nr_lists; i++)
		top[i] = pfn_to_mfn(virt_to_pfn(lists[i]));
}

noinline void publish_mfn_list_list(struct shared_info *shared)
{
	shared->arch.max_pfn = max_pfn;
	shared->arch.pfn_to_mfn_frame_list_list = pfn_to_mfn(virt_to_pfn(top));
	shared->arch.p2m_cr3 = 0;
}
