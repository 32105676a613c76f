/*
 * mmtest.c - the workload: threads=N threads, spread over the CPUs, each making an address space,
 * running in it, changing it by every path Xen offers, and destroying it, for ever.
 *
 * One life is a row of steps with a sleep between them. A thread can be frozen in any of these
 * sleeps, so a suspend meets address spaces that are half built and not pinned, pinned and
 * running, shuffled, and half torn down. Each step checks what the ones before it did.
 */
#include "freezer.h"
#include "mm.h"
#include "mmtest.h"
#include "pattern.h"
#include "sched.h"
#include "user_space.h"

#define REST 30			/* ms between two steps, roughly, unless rest= says otherwise */

static noinline void step_create(struct user_space *us)
{
	us->life++;
	us->nr = 0;
	us->extra_pfn = 0;
	mm_init(&us->mm);
}

static noinline int map_slot(struct user_space *us, u32 slot)
{
	void *page = alloc_page();

	if (!page)
		return -1;
	fill_page(us, page, slot);
	if (map_page(&us->mm, slot_va(slot), virt_to_pfn(page), PAGE_USER_DATA)) {
		free_page(page);
		return -1;
	}
	us->pfn[slot] = virt_to_pfn(page);
	us->content[slot] = slot;
	us->nr = slot + 1;
	return 0;
}

/* A third of the slots; three of these steps, one of them already pinned. */
static noinline void step_map(struct user_space *us)
{
	u32 end = min(us->nr + SLOTS / 3, SLOTS);

	while (us->mm.pgd && us->nr < end)
		if (map_slot(us, us->nr))
			return;
}

static noinline void step_pin(struct user_space *us)
{
	if (us->mm.pgd)
		mm_pin(&us->mm);
}

/* Run in it from here on: schedule() switches to it with this thread. */
static noinline void step_activate(struct user_space *us)
{
	if (!us->mm.pinned)
		return;
	preempt_disable();
	current->mm = &us->mm;
	switch_mm(&us->mm);
	preempt_enable();
}

static noinline void step_check(struct user_space *us)
{
	u32 i;

	if (current->mm)
		for (i = 0; i < us->nr; i++)
			check_page(us, (u64 *)slot_va(i), us->content[i]);
}

/* Write through the user mapping, see it through the direct map. */
static noinline void step_touch(struct user_space *us)
{
	u32 i;

	if (!current->mm)
		return;
	for (i = 0; i < us->nr; i++) {
		us->content[i] += SLOTS;
		fill_page(us, (u64 *)slot_va(i), us->content[i]);
		check_page(us, pfn_to_virt(us->pfn[i]), us->content[i]);
	}
}

/* The page of each slot moves on to the next one. */
static noinline void step_shuffle(struct user_space *us)
{
	u64 pfn, content;
	u32 i;

	if (!current->mm || !us->nr)
		return;
	pfn = us->pfn[us->nr - 1];
	content = us->content[us->nr - 1];
	for (i = us->nr - 1; i; i--) {
		us->pfn[i] = us->pfn[i - 1];
		us->content[i] = us->content[i - 1];
	}
	us->pfn[0] = pfn;
	us->content[0] = content;
	remap_slots(us);
}

/* One slot away and back, another one read-only and back: update_va_mapping this time. */
static noinline void step_update_va(struct user_space *us)
{
	u32 a, b;

	if (!current->mm || !us->nr)
		return;
	us->random = hash64(us->random + 1);
	a = us->random % us->nr;
	b = (us->random >> 32) % us->nr;
	update_slot_away(a);
	if (maps_pfn(&us->mm, slot_va(a), us->pfn[a]))
		check_failed("unmapped slot", a);
	update_slot(us, a, PAGE_USER_DATA);
	update_slot(us, b, PAGE_USER_DATA & ~_PAGE_RW);
	check_page(us, (u64 *)slot_va(b), us->content[b]);
	update_slot(us, b, PAGE_USER_DATA);
}

/* A slot read-only and back, by its pte: plain memory or mmu_update, as the tables are now. */
static noinline void step_protect(struct user_space *us)
{
	u32 slot;

	if (!us->mm.pgd || !us->nr)
		return;
	us->random = hash64(us->random + 1);
	slot = us->random % us->nr;
	change_protection(&us->mm, slot_va(slot), PAGE_USER_DATA & ~_PAGE_RW);
	if (current->mm) {
		flush_tlb();
		check_page(us, (u64 *)slot_va(slot), us->content[slot]);
	}
	change_protection(&us->mm, slot_va(slot), PAGE_USER_DATA);
	if (current->mm)
		flush_tlb();
}

/* New tables in a pinned address space. */
static noinline void step_grow(struct user_space *us)
{
	void *page = current->mm ? alloc_page() : NULL;

	if (!page)
		return;
	if (map_page(&us->mm, EXTRA_VA, virt_to_pfn(page), PAGE_USER_DATA)) {
		free_page(page);
		return;
	}
	us->extra_pfn = virt_to_pfn(page);
	fill_page(us, (u64 *)EXTRA_VA, SLOTS * SLOTS);
	check_page(us, page, SLOTS * SLOTS);
}

/* Software walk: every entry leads, through the m2p, to the frame we gave it. */
static noinline void step_walk(struct user_space *us)
{
	u32 i;

	for (i = 0; us->mm.pgd && i < us->nr; i++)
		if (!maps_pfn(&us->mm, slot_va(i), us->pfn[i]))
			check_failed("page table entry of", slot_va(i));
}

static noinline void step_deactivate(struct user_space *us)
{
	(void)us;
	preempt_disable();
	current->mm = NULL;
	switch_mm(&init_mm);
	preempt_enable();
}

static noinline void step_unpin(struct user_space *us)
{
	if (us->mm.pinned)
		mm_unpin(&us->mm);
}

static noinline void drop_page(struct user_space *us, u64 va, u64 pfn)
{
	unmap_page(&us->mm, va);
	free_page(pfn_to_virt(pfn));
}

/* Unpinned again, the tables are memory: entries away, then the pages, then the tables. */
static noinline void step_unmap(struct user_space *us)
{
	if (!us->mm.pgd)
		return;
	if (us->extra_pfn)
		drop_page(us, EXTRA_VA, us->extra_pfn);
	us->extra_pfn = 0;
	for (; us->nr > SLOTS / 2; us->nr--)
		drop_page(us, slot_va(us->nr - 1), us->pfn[us->nr - 1]);
}

static noinline void step_destroy(struct user_space *us)
{
	if (!us->mm.pgd)
		return;
	for (; us->nr; us->nr--)
		drop_page(us, slot_va(us->nr - 1), us->pfn[us->nr - 1]);
	mm_exit(&us->mm);
}

static void (*const life[])(struct user_space *us) = {
	step_create, step_map, step_map, step_walk, step_protect, step_pin, step_activate,
	step_check, step_touch, step_map, step_shuffle, step_check, step_update_va, step_protect,
	step_grow, step_check, step_walk, step_deactivate, step_unpin, step_walk, step_unmap,
	step_destroy,
};

/* The outermost function: what it holds is in the image, so it holds no mfn. */
static int mmtest_thread(void *arg)
{
	u64 rest = cmdline_number("rest", REST);
	struct user_space *us = arg;
	u32 step;

	for (step = 0;; step = (step + 1) % ARRAY_SIZE(life)) {
		life[step](us);
		us->random = hash64(us->random + 1);
		freezable_schedule_timeout((rest / 3 + us->random % max(rest, 1)) * NSEC_PER_MSEC);
	}
	return 0;
}

/* Returns how many could be started. */
int mmtest_start(u32 nr_threads)
{
	struct user_space *us;
	char name[16];
	u32 i;

	for (i = 0; i < nr_threads; i++) {
		us = alloc_page();
		if (!us)
			break;
		us->random = hash64(i);
		us->life = (u64)i << 32;
		snprintf(name, sizeof(name), "mmtest/%u", i);
		if (!kthread_run_on(&cpu_data[i % nr_cpus], PRIO_NORMAL, mmtest_thread, us,
				    PF_USER, name))
			break;
	}
	return i;
}
