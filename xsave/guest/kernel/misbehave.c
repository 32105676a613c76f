/*
 * misbehave.c - threads that are no good citizens, for those who want to see what becomes of it.
 *
 * stubborn=N: a thread that sleeps and wakes for ever and does not freeze when asked to: with 1
 * never, with 2 not the first time, and so on.
 * spin=MS: a thread that sleeps a second and then keeps CPU 0 for so many milliseconds, in turn,
 * without a call of the scheduler: only preemption at any instruction helps against it.
 */
#include "freezer.h"
#include "misbehave.h"
#include "time.h"

static int stubborn_thread(void *unused)
{
	u64 yields_at = cmdline_number("stubborn", 0), asked = 0;
	int before = 0;

	(void)unused;
	for (;;) {
		schedule_timeout(10 * NSEC_PER_MSEC);
		asked += freezing() && !before;
		before = freezing();
		if (yields_at > 1 && asked >= yields_at)
			try_to_freeze();
	}
	return 0;
}

/* Without a hypercall, so that nothing but an interruption can end it early. */
static noinline void spin_until(u64 end)
{
	volatile u32 n;

	while (ktime_get() < end)
		for (n = 0; n < 100; n++)
			;
}

static int spinner_thread(void *unused)
{
	const u64 *switches = &this_cpu()->rq.nr_switches;
	u64 ns = cmdline_number("spin", 0) * NSEC_PER_MSEC, before;

	(void)unused;
	for (;;) {
		freezable_schedule_timeout(NSEC_PER_SEC);
		printk("SPIN begins\n");
		before = READ_ONCE(*switches);
		spin_until(ktime_get() + ns);
		before = READ_ONCE(*switches) - before;
		printk("SPIN ends, %lu switches\n", before);
	}
	return 0;
}

void misbehave_start(void)
{
	if (cmdline_number("stubborn", 0))
		BUG_ON(!kthread_run(stubborn_thread, NULL, 0, "stubborn"));
	if (cmdline_number("spin", 0))
		BUG_ON(!kthread_run(spinner_thread, NULL, 0, "spinner"));
}
