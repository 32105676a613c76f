/*
 * writer.c - a thread that dirties memory, and notices what of it got lost.
 *
 * write=SIZE of memory is written round and round, rate=SIZE of it a second (all of it, if that
 * is not said), a few words of each page. Every word follows from its address and from how often
 * it was written: before a page is written again, it must hold what the round before put there.
 */
#include "freezer.h"
#include "mm.h"
#include "pattern.h"
#include "sched.h"
#include "time.h"
#include "writer.h"

#define BATCHES_PER_SECOND 100
#define STRIDE 61		/* words; every cache line of a page is somebody's */

static u64 first_pfn, nr_pages, rate;

u64 writer_size(void)
{
	return cmdline_number("write", 0) / PAGE_SIZE;
}

void writer_init(u64 first, u64 nr)
{
	first_pfn = first;
	nr_pages = nr;
	rate = max(cmdline_number("rate", nr * PAGE_SIZE) / PAGE_SIZE, 1);
}

static inline u64 value(const u64 *at, u64 round)
{
	return round ? hash64((u64)at ^ round << 48) : 0;
}

/* Fresh memory is zero: that is round 0. */
static noinline void write_page(u64 pfn, u64 round)
{
	u64 *page = pfn_to_virt(pfn);
	u32 i;

	for (i = pfn % STRIDE; i < PAGE_SIZE / sizeof(u64); i += STRIDE) {
		if (READ_ONCE(page[i]) != value(page + i, round - 1))
			check_failed("written page, pfn", pfn);
		page[i] = value(page + i, round);
	}
}

static int writer_thread(void *unused)
{
	u64 batch = max(rate / BATCHES_PER_SECOND, 1), at = 0, round = 1, i;

	(void)unused;
	for (;;) {
		for (i = 0; i < batch; i++) {
			write_page(first_pfn + at, round);
			if (++at == nr_pages) {
				at = 0;
				round++;
			}
			cond_resched();
		}
		freezable_schedule_timeout(NSEC_PER_SEC / BATCHES_PER_SECOND);
	}
	return 0;
}

void writer_start(void)
{
	if (nr_pages)
		BUG_ON(!kthread_run(writer_thread, NULL, 0, "writer"));
}
