/*
 * pattern.c - memory of known content: filled at boot, re-checked for ever.
 *
 * touch=SIZE pages at the top of memory, each computed from the seed and its pfn: one of three
 * is noise, the others text of common syllables, so that the whole compresses about as memory
 * does. The ticker hashes the first of them once a second and prints the hash, which therefore
 * never changes; the checker goes round all of them, check=PAGES each second.
 */
#include "freezer.h"
#include "gdt.h"
#include "mm.h"
#include "pattern.h"
#include "sched.h"
#include "time.h"

#define DEFAULT_PAGES 64
#define HASHED_PAGES 64
#define CHECKS_PER_SECOND 10
#define WORDS (PAGE_SIZE / sizeof(u64))
#define FNV_OFFSET 0xcbf29ce484222325UL
#define FNV_PRIME 0x100000001b3UL

static u64 seed, first_pfn, nr_pages;
static u64 vocabulary[256];	/* words of eight letters */

u64 pattern_size(void)
{
	u64 pages = cmdline_number("touch", 0) / PAGE_SIZE;

	return max(pages, DEFAULT_PAGES);
}

static void make_vocabulary(void)
{
	static const char syllables[16][4] = {
		"the ", "and ", "page", " in ", "ment", "tion", "able", " of ",
		"ing ", "fram", "save", "stat", "e to", "s wi", "ence", ", a ",
	};
	u32 i;

	for (i = 0; i < ARRAY_SIZE(vocabulary); i++) {
		memcpy((char *)&vocabulary[i], syllables[i >> 4], 4);
		memcpy((char *)&vocabulary[i] + 4, syllables[i & 15], 4);
	}
}

static inline u64 xorshift(u64 x)
{
	x ^= x << 13;
	x ^= x >> 7;
	return x ^ x << 17;
}

/* Write, or compare with, one word; inlined with `check` known. Returns the difference. */
static inline __attribute__((always_inline)) u64 word(u64 *at, u64 value, int check)
{
	if (check)
		return READ_ONCE(*at) ^ value;
	*at = value;
	return 0;
}

static inline __attribute__((always_inline)) u64 noise_page(u64 *page, u64 x, int check)
{
	u64 differ = 0;
	u32 i;

	for (i = 0; i < WORDS; i++) {
		differ |= word(page + i, x, check);
		x = xorshift(x);
	}
	return differ;
}

/* Each random number chooses eight words; the first one is the page's own number. */
static inline __attribute__((always_inline)) u64 text_page(u64 *page, u64 x, int check)
{
	u64 differ = word(page, x, check), choice;
	u32 i, j;

	for (i = 0; i < WORDS; i += 8) {
		choice = x = xorshift(x);
		for (j = i ? 0 : 1; j < 8; j++, choice >>= 8)
			differ |= word(page + i + j, vocabulary[choice & 255], check);
	}
	return differ;
}

static noinline u64 do_page(u64 pfn, int check)
{
	u64 x = hash64(seed + pfn) | 1, *page = pfn_to_virt(pfn);

	if (pfn % 3)
		return check ? text_page(page, x, 1) : text_page(page, x, 0);
	return check ? noise_page(page, x, 1) : noise_page(page, x, 0);
}

static u64 pattern_hash(void)
{
	u64 hash = FNV_OFFSET, count = min(nr_pages, HASHED_PAGES) * WORDS, i;
	const u64 *at = pfn_to_virt(first_pfn);

	for (i = 0; i < count; i++)
		hash = (hash ^ READ_ONCE(at[i])) * FNV_PRIME;
	return hash;
}

void pattern_init(u64 first, u64 nr)
{
	u64 i;

	seed = hash64(cmdline_number("seed", 1));
	first_pfn = first;
	nr_pages = nr;
	make_vocabulary();
	for (i = 0; i < nr; i++)
		do_page(first + i, 0);
	printk("pattern: %lu pages from pfn %lu\n", nr, first);
}

noreturn void check_failed(const char *what, u64 where)
{
	printk("CHECK FAILED %s %lx\n", what, where);
	panic("memory is not what it was");
}

/* Once a second, on the second; seconds during which nothing ran are not made up for. */
int ticker_thread(void *unused)
{
	u64 first = pattern_hash(), next = ktime_get(), hash;
	u64 n = 0;

	(void)unused;
	for (;;) {
		hash = pattern_hash();
		printk("TICK %lu %016lx\n", ++n, hash);
		if (hash != first)
			check_failed("tick", n);
		gdt_check();
		clock_check();
		for (next += NSEC_PER_SEC; ktime_get() < next;)
			freezable_sleep_until(next);
		next = max(next, ktime_get());
	}
	return 0;
}

int checker_thread(void *unused)
{
	u64 some = max(cmdline_number("check", 1024) / CHECKS_PER_SECOND, 1), at = 0, i;

	(void)unused;
	for (;;) {
		for (i = 0; i < some; i++, at = (at + 1) % nr_pages) {
			if (do_page(first_pfn + at, 1))
				check_failed("pattern page, pfn", first_pfn + at);
			cond_resched();
		}
		freezable_schedule_timeout(NSEC_PER_SEC / CHECKS_PER_SECOND);
	}
	return 0;
}
