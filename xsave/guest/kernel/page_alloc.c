/*
 * page_alloc.c - single pages: a list of freed ones, then the next never used one.
 *
 * Pages nobody asked for stay untouched, so that a big guest that does little stays a small
 * image. Freed pages are zeroed at once: what was a page table must not keep its mfns.
 */
#include "mm.h"
#include "sched.h"

struct free_page {
	struct free_page *next;
};

static struct spinlock zone_lock;
static struct free_page *free_list;
static u64 nr_listed, unused_pfn, end_of_pages;

void page_alloc_init(u64 first_pfn, u64 end_pfn)
{
	unused_pfn = first_pfn;
	end_of_pages = end_pfn;
}

u64 nr_free_pages(void)
{
	return nr_listed + end_of_pages - unused_pfn;
}

/* `nr` zeroed pages in a row, or NULL. Only ever from the unused end: nothing is merged. */
void *alloc_pages_contiguous(u32 nr)
{
	void *page = NULL;

	spin_lock(&zone_lock);
	if (end_of_pages - unused_pfn >= nr) {
		page = pfn_to_virt(unused_pfn);
		unused_pfn += nr;
	}
	spin_unlock(&zone_lock);
	if (page)
		memset(page, 0, nr * PAGE_SIZE);
	return page;
}

/* A zeroed page, or NULL. */
void *alloc_page(void)
{
	struct free_page *page;

	spin_lock(&zone_lock);
	page = free_list;
	if (page) {
		free_list = page->next;
		page->next = NULL;
		nr_listed--;
	}
	spin_unlock(&zone_lock);
	return page ? page : alloc_pages_contiguous(1);
}

void free_page(void *ptr)
{
	struct free_page *page = ptr;

	memset(page, 0, PAGE_SIZE);
	spin_lock(&zone_lock);
	page->next = free_list;
	free_list = page;
	nr_listed++;
	spin_unlock(&zone_lock);
}
