/*
 * heartbeat.c - how long the guest ever stood still, as a thread of its own sees it.
 *
 * heartbeat=MS: a thread that wakes every so many milliseconds and looks at the wall clock, which
 * goes on while the guest is suspended. Once a second it tells the longest gap between two beats.
 */
#include "freezer.h"
#include "heartbeat.h"
#include "time.h"

static int heartbeat_thread(void *unused)
{
	u64 ns = cmdline_number("heartbeat", 0) * NSEC_PER_MSEC;
	u64 last = ktime_get_real(), told = last, longest = 0, now;

	(void)unused;
	for (;;) {
		freezable_schedule_timeout(ns);
		now = ktime_get_real();
		longest = max(longest, now - last);
		last = now;
		if (now - told < NSEC_PER_SEC)
			continue;
		printk("HEARTBEAT %lu us\n", longest / 1000);
		told = now;
		longest = 0;
	}
	return 0;
}

void heartbeat_start(void)
{
	if (cmdline_number("heartbeat", 0))
		BUG_ON(!kthread_run(heartbeat_thread, NULL, 0, "heartbeat"));
}
